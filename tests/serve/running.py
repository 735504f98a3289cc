"""A really started server in a process of its own."""

import json
import re
import signal
import socket
import threading
from contextlib import contextmanager

import httpx2
from processes import Command

KEY = "secret"
JSON = {"Content-Type": "application/json"}
LIMITS = ("--max-upload-mb", 4, "--max-stored-mb", 6, "--max-body-mb", 8, "--max-duration", 100,
          "--max-pixels", 500_000, "--max-frames", 32, "--max-running", 8, "--max-queue", 60, "--decode-seconds", 300,
          "--body-seconds", 6, "--reader-seconds", 5)  # fmt: skip


# for a model that cannot end early (`endless`): hundreds of steps; in one block, so that every event tells all slots
LONG = {"model": "tiny", "stream": True, "gen_length": 1024, "block_length": 1024, "diffusing": True,
        "messages": [{"role": "user", "content": "describe the video ."}]}  # fmt: skip
SHORT = {"model": "tiny", "gen_length": 16, "messages": [{"role": "user", "content": "is it red ?"}]}
HEAD = (
    "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    f"Authorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
)


class RunningServer:
    """A server process.

    Attributes:
        url: its address.
        lines: what it has logged so far.
    """

    def __init__(self, *arguments, **environment):
        self.process = Command("serve", "--port", 0, *arguments, pipe=True, **environment)
        self.lines = []
        started = threading.Event()
        threading.Thread(target=self._read, args=(started,), daemon=True).start()
        assert started.wait(300), self.log
        (self.url,) = re.findall(r"http://\S+", self.log)

    def _read(self, started):
        for line in self.process.stderr:
            self.lines.append(line)
            if "startup complete" in line:
                started.set()

    @property
    def log(self):
        return "".join(self.lines)

    def http(self, key=KEY, **options):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=300, **options)

    def connect(self, buffer=None):
        """A bare connection, with a receive buffer of so many bytes."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        if buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(300)
        connection.connect((host, int(port)))
        return connection

    def metric(self, name):
        text = self.http().get("/metrics").text
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(300)


@contextmanager
def running_server(*arguments, **environment):
    """A server of its own, for tests that end it."""
    server = RunningServer(*arguments, **environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def send_body(connection, body):
    """A request for an answer over a bare connection."""
    content = json.dumps(body).encode()
    connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def idle(server):
    return server.metric("vidlada_admitted_requests") == 0 and server.metric("vidlada_running_requests") == 0
