"""Bodies of requests: received within bounds of size and time, parsed within bounds of what a conversation can need.

A body takes no place among the requests until it is there, so clients that send slowly keep nobody out: where too many
bodies arrive at once, the one that has been arriving for longest makes way. JSON is scanned before anything is built
from it, and parsed and validated in a thread.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.types import Message

from vidlada.machine import MEBI
from vidlada.serve.errors import RequestError
from vidlada.serve.limits import Limits
from vidlada.serve.refusals import refusal_of
from vidlada.serve.threads import JSON, in_thread

SLOWEST = 2**18  # bytes a second; a body may take as much longer as it needs at this rate
LINGER_SECONDS, LINGER_BYTES = 5, 2**26
TAIL_BYTES = 256  # of a body, kept for whoever has to know how it ended
MOST_VALUES = 20_000  # in a JSON request; 1000 messages of three parts have fewer
BYTES_PER_TOKEN = 32  # of a conversation's text, at most; the tokenizer judges what passes
OTHER_BYTES = 2**16  # of a request besides its conversation
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(eq=False)
class Arrival:
    """A body on its way.

    Attributes:
        timeout: ends it.
        started: time of the event loop's clock.
        received: bytes so far.
        displaced: it had to make way.
    """

    timeout: asyncio.Timeout
    started: float
    received: int = 0
    displaced: bool = False


class LimitedReceive:
    """A request's `receive` that refuses more than so many bytes of body.

    Args:
        request: whose body is read.
        most: bytes.
        mebibytes: the limit as its owner knows it.
        count: called with the bytes of every piece; may refuse it with a `RequestError`.

    Attributes:
        seen: bytes so far.
        tail: the last of them.
    """

    def __init__(self, request: Request, most: int, mebibytes: int, count: Callable[[int], None]):
        self.request, self.most, self.mebibytes, self.count = request, most, mebibytes, count
        announced = request.headers.get("content-length", "0")
        self.too_much = announced.isdigit() and int(announced[:20]) > most
        self.seen, self.tail = 0, b""

    async def __call__(self) -> Message:
        """The next piece."""
        message: Message = {} if self.too_much else await self.request.receive()
        piece = message.get("body", b"")
        self.seen += len(piece)
        self.tail = (self.tail + piece[-TAIL_BYTES:])[-TAIL_BYTES:]
        try:
            if self.too_much or self.seen > self.most:
                text = f"the request is larger than the {self.mebibytes} MiB allowed"
                raise RequestError(413, text, "request_too_large")
            self.count(len(piece))
        except RequestError:
            await self.discard()
            raise
        return message

    async def discard(self) -> None:
        """Take in some more of a refused body: a client that is still sending would not see the refusal."""
        seen = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while seen < LINGER_BYTES:
                    message = await self.request.receive()
                    seen += len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return


class Arrivals:
    """The bodies that a server is receiving, and the memory of JSON bodies being received or answered.

    Args:
        limits: `body_seconds`, `request_seconds`, `max_arriving`, `max_body_mb` and `max_bodies_mb` count here.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.arriving: dict[Arrival, bool] = {}  # the oldest first; whether its bytes stay in memory
        self.kept = 0  # bytes of JSON bodies that are there

    @property
    def nbytes(self) -> int:
        """Bytes of JSON bodies in memory."""
        return self.kept + sum(arrival.received for arrival, in_memory in self.arriving.items() if in_memory)

    async def receive(
        self,
        request: Request,
        most: int,
        mebibytes: int,
        take: Callable[[Request, LimitedReceive], Awaitable[Result]],
        count: Callable[[int], None] = lambda size: None,
        in_memory: bool = False,
    ) -> Result:
        """Take in a body within the limits.

        Args:
            request: whose body it is.
            most: bytes of it.
            mebibytes: the limit as its owner knows it.
            take: reads the body of the request that it is given.
            count: called with the bytes of every piece; may refuse it.
            in_memory: the body counts among those in memory.

        Raises:
            RequestError: it is too large (413), too slow (408), or had to make way (503).
        """
        loop, seconds = asyncio.get_running_loop(), self.limits.body_seconds
        arrival: Arrival | None = None
        try:
            async with asyncio.timeout(seconds) as timeout:
                arrival = Arrival(timeout, loop.time())
                self.arriving[arrival] = in_memory
                if len(self.arriving) > self.limits.max_arriving:
                    self.displace()

                def count_bytes(size: int) -> None:
                    assert arrival is not None
                    count(size)
                    arrival.received += size
                    while in_memory and self.nbytes > self.limits.max_bodies_mb * MEBI:
                        if not self.displace() or arrival.displaced:
                            raise busy()
                    if not (arrival.displaced or timeout.expired()):
                        longer = min(seconds + arrival.received / SLOWEST, self.limits.request_seconds)
                        timeout.reschedule(arrival.started + max(seconds, longer))

                limited = LimitedReceive(request, most, mebibytes, count_bytes)
                try:
                    return await take(Request(request.scope, limited), limited)
                finally:
                    self.arriving.pop(arrival, None)
        except TimeoutError:
            if arrival is not None and arrival.displaced:
                raise busy() from None
            text = f"the request was not sent within {seconds:g} s and a second for every {SLOWEST // 1024} KiB"
            raise RequestError(408, text, "request_timeout") from None

    def displace(self) -> bool:
        """End the body that has been arriving for longest; whether there was one."""
        oldest = next(iter(self.arriving), None)
        if oldest is None:
            return False
        del self.arriving[oldest]
        oldest.displaced = True
        if not oldest.timeout.expired():
            oldest.timeout.reschedule(asyncio.get_running_loop().time())
        return True

    @asynccontextmanager
    async def json_body(self, request: Request) -> AsyncIterator[bytes]:
        """A JSON request's body; its memory counts until the context ends.

        Raises:
            RequestError: it says that it is something else (415), or cannot be taken in.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            text = f"send Content-Type: application/json, not {kind[:80] or 'none'!r}"
            raise RequestError(415, text, "unsupported_media_type")
        mebibytes = self.limits.max_body_mb

        async def take(limited: Request, receive: LimitedReceive) -> bytes:
            return await limited.body()

        body = await self.receive(request, mebibytes * MEBI, mebibytes, take, in_memory=True)
        size = len(body)
        self.kept += size
        try:
            yield body
        finally:
            self.kept -= size


def busy() -> RequestError:
    """The refusal of a body that had to make way for others."""
    return RequestError(503, "too many requests are being received; try later", "busy")


async def parse_in_thread(body: bytes, model: type[Model], max_length: int) -> Model:
    """What a JSON body says, parsed and validated in a thread.

    Args:
        body: of a request.
        model: what it has to be.
        max_length: tokens of the longest conversation.

    Raises:
        RequestError: it is not JSON (400), more than any conversation can need (413), or not such a request (422).
    """
    return await in_thread(JSON, parse, body, model, max_length)


def parse(body: bytes, model: type[Model], max_length: int) -> Model:
    """See `parsed`."""
    scan(body, max_length * BYTES_PER_TOKEN + OTHER_BYTES)
    try:
        content = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not valid JSON: {error}", "invalid_json") from error
    return validate(content, model)


def scan(body: bytes, most_text: int) -> None:
    """Refuse JSON with more text or values than allowed, before anything is built from it.

    Args:
        body: of a request, whether it is JSON or not.
        most_text: bytes outside of data URIs.
    """
    text, values, end = len(body), 0, 0
    for string in STRING.finditer(body):
        start = string.start()
        values += 1 + structure(body, end, start)
        end = string.end()
        if body[start + 1 : start + 6].lower() == b"data:":
            text -= end - start
        if values > MOST_VALUES:
            break
    if values + structure(body, end, len(body)) > MOST_VALUES:
        raise RequestError(413, f"the request has more than {MOST_VALUES} values", "request_too_large")
    if text > most_text:
        message = f"the request has {text} bytes besides data URIs, more than the {most_text} the model can use"
        raise RequestError(413, message, "request_too_large")


def structure(body: bytes, start: int, end: int) -> int:
    """Brackets and commas, of which there are at least as many as values that are no strings."""
    return sum(body.count(mark, start, end) for mark in (b",", b"[", b"{"))


def validate(content: Any, model: type[Model]) -> Model:
    """JSON as a model; the first thing wrong is named."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise refusal_of(error) from error
