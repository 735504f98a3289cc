"""Between HTTP and the server: bodies with limits, clients that hang up, streams, errors as OpenAI has them."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidlada.engine.engine import EngineClosedError
from vidlada.errors import InputError, VidLaDAError
from vidlada.machine import MEBI
from vidlada.serve.errors import RequestError, shutting_down
from vidlada.serve.schema import ChatRequest

RETRY_SECONDS = 1
LINGER_SECONDS, LINGER_BYTES = 5, 2**26
CLIENT_CLOSED = 499  # as nginx counts them; nobody reads it
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         429: "rate_limit_error"}  # fmt: skip
PAGE_HEADERS = [
    (b"content-security-policy",
     b"default-src 'self'; img-src 'self' data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
     b"frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]  # fmt: skip

log = logging.getLogger("vidlada.serve")
Result = TypeVar("Result")


class EventStream(StreamingResponse):
    """Server-sent events that hold resources until the last byte is sent or the client is gone.

    Args:
        events: already formatted.
        resources: to give back.
        deadline: time of the event loop's clock after which a client that does not read is dropped.
    """

    def __init__(self, events: AsyncIterator[bytes], resources: AsyncExitStack, deadline: float):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.resources, self.deadline = resources, deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send."""
        async with self.resources:
            try:
                async with asyncio.timeout_at(self.deadline):
                    await super().__call__(scope, receive, send)
            except TimeoutError:
                log.warning("a client read its answer too slowly and was dropped")


# --- requests ---


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Do some work, but cancel it when the client hangs up. The request's body must have been read."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


def limited_receive(
    request: Request, most: int, mebibytes: int, count: Callable[[int], None] = lambda size: None
) -> Receive:
    """The request's `receive`, which refuses more than `most` bytes of body.

    Args:
        request: whose body is read.
        most: bytes.
        mebibytes: the limit as its owner knows it.
        count: told of the bytes of every piece; may refuse it with a `RequestError`.
    """
    announced = request.headers.get("content-length", "0")
    too_much = announced.isdigit() and int(announced) > most
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message: Message = {} if too_much else await request.receive()
        size = len(message.get("body", b""))
        seen += size
        try:
            if too_much or seen > most:
                raise RequestError(413, f"the request is larger than the {mebibytes} MiB allowed", "request_too_large")
            count(size)
        except RequestError:
            await discard(request)
            raise
        return message

    return receive


async def discard(request: Request) -> None:
    """Take in some more of a refused body: a client that is still sending would not see the refusal."""
    seen = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while seen < LINGER_BYTES:
                message = await request.receive()
                seen += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


async def read_body(request: Request, mebibytes: int, seconds: float) -> bytes:
    """A request's body; 413 if it is too large, 408 if it comes too slowly."""
    limited = Request(request.scope, limited_receive(request, mebibytes * MEBI, mebibytes))
    try:
        async with asyncio.timeout(seconds):
            return await limited.body()
    except TimeoutError:
        raise not_sent(seconds) from None


def not_sent(seconds: float) -> RequestError:
    """The refusal of a client that takes too long."""
    return RequestError(408, f"the request was not sent within {seconds:g} s", "request_timeout")


def parse(body: bytes) -> ChatRequest:
    """A chat request from JSON."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request is not valid JSON: {error}", "invalid_json") from error
    try:
        return ChatRequest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = "it is not known here" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(422, f"{where[:200]}: {reason}", "invalid_request", where[:200] or None) from error


# --- errors ---


def as_request_error(error: Exception) -> RequestError:
    """Any error with a status."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EngineClosedError):
        return shutting_down()
    if isinstance(error, InputError):
        return RequestError(422, str(error), "invalid_request")
    if isinstance(error, VidLaDAError):
        return RequestError(500, str(error), "model_failed")
    return RequestError(500, "the server failed; its log tells why", "internal_error")


def error_body(error: RequestError) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: RequestError) -> Response:
    """OpenAI's error object as a response."""
    headers = {"Retry-After": str(RETRY_SECONDS)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


class Outermost:
    """Turns every error into OpenAI's object, counts responses, adds headers."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *PAGE_HEADERS]
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except ClientDisconnect:
            status = status or CLIENT_CLOSED
        except asyncio.CancelledError:  # by the server, which ends; an answer that began is broken off
            if not status:
                await error_response(shutting_down())(scope, receive, counted)
        except Exception as error:
            if not isinstance(error, VidLaDAError):
                log.exception("a request failed", exc_info=error)
            if status:  # too late to say so: breaking the connection off tells the client
                raise
            await error_response(as_request_error(error))(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            scope["app"].state.server.metrics.responses.labels(route, str(status)).inc()
