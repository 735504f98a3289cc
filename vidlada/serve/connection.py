"""Clients that take their time, below HTTP: they must not hold connections that others need."""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

MILLISECONDS = 1000


def drop_idle_readers(listener: socket.socket, seconds: float) -> None:
    """Let the kernel break off connections whose client takes nothing of what is sent to it for so long."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # elsewhere a stream's deadline must do
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * MILLISECONDS))


def timeout_protocol(seconds: float) -> type[H11Protocol]:
    """Uvicorn's HTTP, but a connection is closed if a request's head is not there within `seconds`."""

    class TimeoutProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.waiting = self.loop.call_later(seconds, self.give_up)

        def on_response_complete(self) -> None:
            self.waiting.cancel()
            self.waiting = self.loop.call_later(seconds, self.give_up)
            super().on_response_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self.waiting.cancel()
            super().connection_lost(exc)

        def give_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return TimeoutProtocol
