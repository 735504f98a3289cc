"""Latency under requests of mixed length that arrive at random, reported as `vllm bench serve` does.

Requests arrive as a Poisson process, whether or not the server keeps up. Of each: the time to its first token (TTFT; of
a denoised answer the first text that can no longer change), the time per output token after it (TPOT), and the whole
latency (E2EL). Goodput counts the requests a second that kept to a promise for each.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from vidlada.errors import VidLaDAError

LONG_SHARE = 0.25  # of the requests
MILLISECONDS = 1000.0


@dataclass(frozen=True)
class Timing:
    """How one request was served.

    Attributes:
        kind: `short` or `long`.
        first: seconds to its first settled text.
        latency: seconds to its end.
        tokens: of the answer.
    """

    kind: str
    first: float
    latency: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Seconds per token after the first."""
        return (self.latency - self.first) / max(1, self.tokens - 1)


async def ask(http: httpx2.AsyncClient, body: dict[str, Any], kind: str) -> Timing:
    """Stream one answer.

    Raises:
        VidLaDAError: the request was not answered.
    """
    started = time.perf_counter()
    first, tokens = None, 0
    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode()
            raise VidLaDAError(f"a request was answered {response.status_code}: {text[:200]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise VidLaDAError(f"a request failed: {event['error']['message']}")
            if first is None and any(choice["delta"].get("content") for choice in event["choices"]):
                first = time.perf_counter() - started
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    latency = time.perf_counter() - started
    return Timing(kind, latency if first is None else first, latency, tokens)


async def mixed_load(url: str, bodies: dict[str, dict[str, Any]], requests: int, rate: float) -> dict[str, Any]:
    """Send requests as they would come, the same ones at the same times to every server.

    Args:
        url: of the server.
        bodies: a short and a long request.
        requests: how many.
        rate: a second, on average.

    Returns:
        Seconds from the first request to the last answer, and every request's timing.
    """
    generator = random.Random(0)
    arrivals: list[tuple[float, str]] = []
    at = 0.0
    for number in range(requests):
        arrivals.append((at, "long" if number % round(1 / LONG_SHARE) == 0 else "short"))
        at += generator.expovariate(rate)
    started = time.perf_counter()

    async def one(http: httpx2.AsyncClient, at: float, kind: str) -> Timing:
        await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
        return await ask(http, {**bodies[kind], "stream": True, "stream_options": {"include_usage": True}}, kind)

    limits = httpx2.Limits(max_connections=requests)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits) as http:
        timings = await asyncio.gather(*(one(http, at, kind) for at, kind in arrivals))
    return {"seconds": time.perf_counter() - started, "timings": timings}


def summary(seconds: float, timings: Sequence[Timing], goodput: dict[str, float]) -> dict[str, Any]:
    """What vLLM's benchmark reports, for all requests and for each kind.

    Args:
        seconds: the load lasted.
        timings: of its requests.
        goodput: bounds of `ttft`, `tpot` and `e2el` in milliseconds, of requests that count as goodput.
    """
    rows = []
    for kind in ("all", "short", "long"):
        chosen = [timing for timing in timings if kind in ("all", timing.kind)]
        if not chosen:
            continue
        measured = [
            {
                "ttft": timing.first * MILLISECONDS,
                "tpot": timing.per_token * MILLISECONDS,
                "e2el": timing.latency * MILLISECONDS,
            }
            for timing in chosen
        ]
        kept = sum(all(each[name] <= most for name, most in goodput.items()) for each in measured)
        rows.append({
            "kind": kind,
            "requests": len(chosen),
            "requests_per_second": len(chosen) / seconds,
            "tokens_per_second": sum(timing.tokens for timing in chosen) / seconds,
            "goodput": kept / seconds,
            **{name: percentiles([each[name] for each in measured]) for name in ("ttft", "tpot", "e2el")},
        })  # fmt: skip
    return {"seconds": seconds, "goodput": goodput, "rows": rows}


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile."""
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"mean": statistics.fmean(ordered), "median": statistics.median(ordered), "p99": p99}


def mixed_rows(server: str, figures: dict[str, Any]) -> list[list[str]]:
    """Rows of a table: the server, the kind of request, rates, then median and 99th percentile of each time."""
    rows = []
    for row in figures["rows"]:
        times = [f"{row[name]['median']:.0f} / {row[name]['p99']:.0f}" for name in ("ttft", "tpot", "e2el")]
        rates = [f"{row[name]:.2f}" for name in ("requests_per_second", "tokens_per_second", "goodput")]
        rows.append([server, row["kind"], *rates, *times])
    return rows
