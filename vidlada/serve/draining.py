"""The end of a server: it waits for the requests being answered, but not for ever."""

import asyncio
import socket
from collections.abc import Callable

import uvicorn

ERROR_SECONDS = 5  # to send errors to requests that did not end in time; then connections are broken off


class DrainingServer(uvicorn.Server):
    """Uvicorn, but requests that run for too long after SIGTERM or Ctrl-C get an error.

    Args:
        config: of Uvicorn; how long it waits is set here.
        seconds: given to running requests.
        give_up: called then; is to fail them.
    """

    def __init__(self, config: uvicorn.Config, seconds: int, give_up: Callable[[], None]):
        super().__init__(config)
        config.timeout_graceful_shutdown = seconds + ERROR_SECONDS
        self.seconds, self.give_up = seconds, give_up

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, wait, end."""
        timer = asyncio.get_running_loop().call_later(self.seconds, self.give_up)
        await super().shutdown(sockets)
        timer.cancel()
