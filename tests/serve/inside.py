"""The application without a socket: a test sees every event of the protocol, and can hold any of them back."""

import asyncio
import json
from contextlib import asynccontextmanager

import httpx2

from vidlada.serve.app import create_app
from vidlada.serve.limits import Limits
from vidlada.serve.server import ServerSettings

QUESTION = {"model": "small", "gen_length": 4, "messages": [{"role": "user", "content": "is it red ?"}]}


@asynccontextmanager
async def running_app(vidlada, limits=None, **settings):
    """The application of a model, and a client of it."""
    app = create_app(vidlada, ServerSettings("small", **settings), Limits(**(limits or {})))
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost", timeout=None) as http,
    ):
        yield app, http


class Call:
    """One request, fed by hand.

    Args:
        app: the application.
        method, path: of the request.
        headers: as text.

    Attributes:
        sent: the messages of the answer so far.
        task: ends with the answer.
    """

    def __init__(self, app, method, path, headers=()):
        self.incoming, self.sent = asyncio.Queue(), []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"host", b"localhost"), *((name.lower().encode(), value.encode()) for name, value in headers)],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "state": {}, "app": app,
        }  # fmt: skip

        async def send(message):
            self.sent.append(message)

        self.task = asyncio.ensure_future(app(scope, self.incoming.get, send))

    def body(self, content, more=False):
        """Let a piece of the body arrive."""
        self.incoming.put_nowait({"type": "http.request", "body": content, "more_body": more})

    def hang_up(self):
        self.incoming.put_nowait({"type": "http.disconnect"})

    async def answer(self):
        """Status and JSON."""
        await self.task
        content = b"".join(message.get("body", b"") for message in self.sent[1:])
        return self.sent[0]["status"], json.loads(content)


def chat(app):
    """A chat request whose body is yet to come."""
    return Call(app, "POST", "/v1/chat/completions", [("Content-Type", "application/json")])


async def until(condition):
    """Wait in an event loop until a condition holds."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")
