"""Between HTTP and the server: foreign pages, clients that hang up, streams, errors as OpenAI has them."""

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidlada.engine.requests import EngineClosedError
from vidlada.errors import InputError, VidLaDAError
from vidlada.serve.errors import RequestError, shutting_down
from vidlada.settings import as_sequence

RETRY_SECONDS = 1
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
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


async def cancel_on_disconnect(request: Request, work: Awaitable[Result]) -> Result:
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


@dataclass(frozen=True)
class SiteRules:
    """Which web pages may use a server that has no keys. Browsers say which page asks, whether it likes or not.

    Args:
        hosts: names by which the server may be called, in `Host`; None for any.
        origins: pages of other sites that may use it; `*` for all.
        same_origin: refuse pages that are neither the server's own nor among `origins`.
    """

    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    same_origin: bool = False

    def check(self, headers: Headers) -> None:
        """Refuse a request with a foreign `Host` (a name that was made to lead here) or `Origin`."""
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts is not None and name_of(host) not in self.hosts:
            text = f"this server is not called {name_of(host)[:80]!r}; --allowed-host adds a name"
            raise RequestError(403, text, "forbidden_host")
        if self.same_origin and origin is not None and not {"*", origin} & set(self.origins):
            scheme, _, authority = origin.lower().partition("://")
            port = {"http": ":80", "https": ":443"}.get(scheme, "")
            if authority.removesuffix(port) != host.removesuffix(port):
                text = f"pages of {origin[:80]!r} may not use this server; --cors allows them"
                raise RequestError(403, text, "forbidden_origin")


def name_of(host: str) -> str:
    """The name in a `Host` header, without the port."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not name.endswith(":") else host


def site_rules(bind: str, keys: bool, allowed_hosts: str | Sequence[str], origins: str | Sequence[str]) -> SiteRules:
    """The rules for a server.

    Args:
        bind: address it listens at.
        keys: it asks for keys, which no page can guess.
        allowed_hosts: names besides its own.
        origins: pages of other sites that may use it.
    """
    local = bind == "localhost" or is_loopback(bind)
    own = [*LOCAL_NAMES, f"[{bind}]" if ":" in bind else bind] if local and not keys else []
    hosts = frozenset(name.lower() for name in [*own, *as_sequence(allowed_hosts)])
    return SiteRules(hosts if hosts and "*" not in hosts else None, tuple(as_sequence(origins)), not keys)


def is_loopback(address: str) -> bool:
    """Whether an address is one of this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def answer_head(router: APIRouter) -> None:
    """Answer `HEAD` wherever the routes so far answer `GET`; the server sends no body then."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)


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


class ErrorMiddleware:
    """Refuses foreign pages, turns every error into OpenAI's object, counts responses, adds headers."""

    def __init__(self, app: ASGIApp, rules: SiteRules):
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *PAGE_HEADERS]
            await send(message)

        try:
            self.rules.check(Headers(scope=scope))
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            status = status or CLIENT_CLOSED
        except asyncio.CancelledError:  # by the server, which ends; an answer that began is broken off
            if not status:
                await error_response(shutting_down())(scope, receive, send_with_headers)
        except Exception as error:
            if not isinstance(error, VidLaDAError):
                log.exception("a request failed", exc_info=error)
            if status:  # too late to say so: breaking the connection off tells the client
                raise
            await error_response(as_request_error(error))(scope, receive, send_with_headers)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            scope["app"].state.server.metrics.responses.labels(route, str(status)).inc()
