"""The load benchmark on its smallest input: what it reports, and that it leaves no server behind."""

import json
import os
import signal
import subprocess
import sys

import pytest
from serve.running import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def bench():
    command = ["bench", "serve", "--clients", 1, "--requests", 2, "--gen-length", 16, "--memory-requests", 10, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vidlada", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    if process.poll() is None:
        process.kill()
        process.wait()


def servers_of(process):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_figures(bench):
    out, err = bench.communicate(timeout=600)
    assert bench.returncode == 0, err
    figures = json.loads(out)
    assert [(row["server"], row["clients"]) for row in figures["rows"]] == [("one at a time", 1), ("together", 1)]
    assert all(row["requests_per_second"] > 0 and row["median"] <= row["p95"] for row in figures["rows"])
    assert figures["same_answers"]
    assert len(figures["memory_mib"]) == 11


def test_ended_early_it_ends_its_servers(bench):
    wait_for(lambda: len(servers_of(bench)) == 2)  # the first is ready then, the second starts
    servers = servers_of(bench)
    bench.send_signal(signal.SIGTERM)
    bench.communicate(timeout=300)
    assert bench.returncode == 128 + signal.SIGTERM
    assert not any(runs(pid) for pid in servers)
