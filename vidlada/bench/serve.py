"""Requests a second and latency of the server, against serving one at a time, and whether its memory stays flat.

Two really started servers take turns at every number of clients: one that decodes requests together, and one that lets
a request run only when the one before it is done. Every client asks its next question as soon as it has an answer.
Then, if asked, both get the same requests of mixed length at the same random times.
"""

import asyncio
import base64
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any

import httpx2

from vidlada.bench.mixed_load import mixed_load, mixed_rows, summary
from vidlada.errors import InputError, VidLaDAError
from vidlada.machine import MEBI, machine
from vidlada.markdown import table

SAMPLE = "serve/page/samples/order.mp4"
SERVERS = {"one at a time": ["--max-running", "1"], "together": []}
MEMORY_SAMPLES = 10
LONG_TIMES = 8  # as many slots as a short one, of the long requests among mixed ones
SHORT = 16  # answer slots of the requests that only memory is watched over


@contextmanager
def running_server(arguments: Sequence[str]) -> Iterator[str]:
    """A server process on a free port; gives its address."""
    command = [sys.executable, "-m", "vidlada", "serve", "--port", "0", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "VIDLADA_API_KEYS"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "startup complete" in line:
                break
        address = re.search(r"http://\S+", "".join(lines))
        if address is None or process.poll() is not None:
            raise VidLaDAError(f"the server did not start: {lines[-1].strip() if lines else 'it said nothing'}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the server
        yield address[0]
    finally:
        process.terminate()
        process.wait()


def question(text: str, gen_length: int) -> dict[str, Any]:
    """A request about the sample video."""
    content = (resources.files("vidlada") / SAMPLE).read_bytes()
    url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
    parts = [{"type": "text", "text": text}, {"type": "video_url", "video_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}], "gen_length": gen_length, "max_tokens": gen_length}


async def load(url: str, body: dict[str, Any], clients: int, requests: int) -> dict[str, Any]:
    """Ask `requests` questions through `clients` connections.

    Returns:
        Requests and tokens a second, and latencies in seconds.

    Raises:
        VidLaDAError: a request was not answered.
    """
    latencies: list[float] = []
    answers: set[str] = set()
    tokens, left = 0, requests
    async with httpx2.AsyncClient(base_url=url, timeout=None) as http:

        async def client() -> None:
            nonlocal tokens, left
            while left:
                left -= 1
                started = time.perf_counter()
                response = await http.post("/v1/chat/completions", json=body)
                latencies.append(time.perf_counter() - started)
                if response.status_code != 200:
                    raise VidLaDAError(f"a request was answered {response.status_code}: {response.text[:200]}")
                completion = response.json()
                answers.add(completion["choices"][0]["message"]["content"])
                tokens += completion["usage"]["completion_tokens"]

        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
        seconds = time.perf_counter() - started
    if len(answers) > 1:
        raise VidLaDAError(f"the same question got {len(answers)} different answers")
    latencies.sort()
    return {
        "requests_per_second": requests / seconds,
        "tokens_per_second": tokens / seconds,
        "median": statistics.median(latencies),
        "p95": latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))],
        "answer": answers.pop(),
    }


def memory(url: str) -> float:
    """MiB the server's process holds."""
    text = httpx2.get(f"{url}/metrics").text
    found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
    if found is None:
        raise VidLaDAError("the server does not report its memory; this needs Linux")
    return float(found[1]) / MEBI


def load_mixed(url: str, body: dict[str, Any], requests: int, rate: float, goodput: dict[str, float]) -> dict[str, Any]:
    """Figures of requests of mixed length."""
    slots = LONG_TIMES * body["gen_length"]
    bodies = {"short": body, "long": {**body, "gen_length": slots, "max_tokens": slots}}
    measured = asyncio.run(mixed_load(url, bodies, requests, rate))
    return summary(measured["seconds"], measured["timings"], goodput)


def watch_memory(
    url: str, body: dict[str, Any], clients: int, requests: int, progress: Callable[[str], None]
) -> list[float]:
    """MiB of a server before, during and after many requests."""
    found = [memory(url)]
    for part in range(1, MEMORY_SAMPLES + 1):
        progress(f"memory, part {part} of {MEMORY_SAMPLES}")
        asyncio.run(load(url, body, clients, max(1, requests // MEMORY_SAMPLES)))
        found.append(memory(url))
    return found


def serve_figures(
    model: str = "tiny",
    clients: Sequence[int] = (1, 4, 16),
    requests: int = 32,
    gen_length: int = 64,
    memory_requests: int = 0,
    mixed_requests: int = 0,
    rate: float = 1.0,
    goodput: dict[str, float] | None = None,
    device: str = "cpu",
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Load both servers, in turns.

    Args:
        model: what to serve.
        clients: numbers of clients.
        requests: questions at every number of clients.
        gen_length: answer slots.
        memory_requests: so many more short questions to the server that decodes together, watching its memory.
        mixed_requests: so many more of mixed length to both servers: short ones of `gen_length` slots, and one in four
            with eight times as many.
        rate: of those, a second.
        goodput: milliseconds of `ttft`, `tpot` and `e2el` within which a request counts as goodput.
        device: where the model runs.
        progress: called with what is measured next.
    """
    if any(number < 1 for number in (*clients, requests)):
        raise InputError("clients and requests must be at least 1")
    body, short = question("describe the video .", gen_length), question("is it red ?", SHORT)
    rows, common = list[dict[str, Any]](), ["--model", model, "--device", device]
    progress("starting the servers")
    with running_server([*common, *SERVERS["one at a time"]]) as alone, running_server(common) as together:
        body["model"] = short["model"] = httpx2.get(f"{together}/v1/models").json()["data"][0]["id"]
        urls = {"one at a time": alone, "together": together}
        for url in urls.values():
            asyncio.run(load(url, body, 1, 2))  # what only the first request pays for
        for number in clients:
            for name, url in urls.items():
                progress(f"{name}, {number} clients")
                rows.append({"server": name, "clients": number, **asyncio.run(load(url, body, number, requests))})
        mixed = {}
        if mixed_requests:
            progress("requests of mixed length")
            mixed = {name: load_mixed(url, body, mixed_requests, rate, goodput or {}) for name, url in urls.items()}
        memory_mib = watch_memory(together, short, max(clients), memory_requests, progress) if memory_requests else []
    answers = {row.pop("answer") for row in rows}
    return {
        "machine": machine(device),
        "model": model,
        "requests": requests,
        "gen_length": gen_length,
        "same_answers": len(answers) == 1,
        "rows": rows,
        "mixed": mixed,
        "mixed_requests": mixed_requests,
        "rate": rate,
        "memory_requests": memory_requests,
        "memory_mib": memory_mib,
    }


def serve_table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    baseline = {row["clients"]: row for row in figures["rows"] if row["server"] == "one at a time"}
    lines = [
        f"{figures['machine']}; {figures['requests']} requests a line, {figures['gen_length']} answer slots; "
        f"answers {'are all the same' if figures['same_answers'] else 'DIFFER'}",
        "",
    ]
    head = ["clients", "server", "requests/s", "times one at a time", "tokens/s", "median latency, s", "95 %, s"]
    rows = [
        [row["clients"], row["server"], f"{row['requests_per_second']:.2f}",
         f"{row['requests_per_second'] / baseline[row['clients']]['requests_per_second']:.2f}",
         f"{row['tokens_per_second']:.1f}", f"{row['median']:.3f}", f"{row['p95']:.3f}"]
        for row in figures["rows"]
    ]  # fmt: skip
    lines += table(head, rows)
    if figures["mixed"]:
        rows = [row for name, measured in figures["mixed"].items() for row in mixed_rows(name, measured)]
        goodput = next(iter(figures["mixed"].values()))["goodput"]
        kept = " and ".join(f"{name} ≤ {most:g} ms" for name, most in goodput.items()) or "every answer"
        head = ["server", "requests", "requests/s", "tokens/s", "goodput/s", "TTFT, ms", "TPOT, ms", "E2EL, ms"]
        lines += [
            "",
            f"{figures['mixed_requests']} requests at {figures['rate']:g} a second, one in four {LONG_TIMES} times as "
            f"long; median / 99 % of each time; goodput counts {kept}",
            "",
            *table(head, rows),
        ]
    if figures["memory_mib"]:
        values = " ".join(f"{value:.0f}" for value in figures["memory_mib"])
        lines += ["", f"memory over {figures['memory_requests']} further short requests, MiB: {values}"]
    return "\n".join(lines)
