"""A really started server in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx2

KEY = "secret"
LIMITS = ("--max-upload-mb", 4, "--max-body-mb", 8, "--max-duration", 100, "--max-pixels", 500_000, "--max-frames", 32,
          "--max-running", 8, "--max-queue", 60, "--decode-seconds", 300, "--body-seconds", 10,
          "--reader-seconds", 5)  # fmt: skip


class RunningServer:
    """A server process.

    Attributes:
        url: its address.
        lines: what it has logged so far.
    """

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vidlada", "serve", "--port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
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
