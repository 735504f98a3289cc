"""The load benchmark on its smallest input: what it reports, and that it leaves no server behind."""

import json
import os
import signal
import subprocess
import sys

import pytest
from processes import wait_for

from vidlada.bench.mixed_load import Timing, mixed_rows, summary
from vidlada.cli.bench import parse_goodput
from vidlada.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture
def bench():
    command = ["bench", "serve", "--clients", 1, "--requests", 2, "--gen-length", 16, "--memory-requests", 10,
               "--mixed-requests", 5, "--rate", 20, "--goodput", "e2el:1e9", "--json"]  # fmt: skip
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
    for measured in figures["mixed"].values():
        everything, short, long = measured["rows"]
        assert (everything["requests"], short["requests"], long["requests"]) == (5, 3, 2)
        assert everything["goodput"] == everything["requests_per_second"]
        assert all(row["ttft"]["median"] <= row["e2el"]["median"] for row in measured["rows"])


def test_figures_of_mixed_requests():
    timings = [Timing("short", 0.1, 0.3, 3), Timing("short", 0.2, 0.2, 1), Timing("long", 1.0, 11.0, 101)]
    found = summary(10.0, timings, {"ttft": 150.0, "tpot": 200.0})
    everything, short, long = found["rows"]
    assert (everything["requests_per_second"], everything["tokens_per_second"]) == (0.3, 10.5)
    assert (everything["goodput"], short["goodput"], long["goodput"]) == (0.1, 0.1, 0.0)
    assert short["tpot"] == pytest.approx({"mean": 50.0, "median": 50.0, "p99": 100.0})
    assert long["e2el"]["p99"] == 11_000
    assert len(mixed_rows("together", found)) == 3
    with pytest.raises(InputError, match="goodput"):
        parse_goodput("ttfb:5")


def test_ended_early_it_ends_its_servers(bench):
    wait_for(lambda: len(servers_of(bench)) == 2)  # the first is ready then, the second starts
    servers = servers_of(bench)
    bench.send_signal(signal.SIGTERM)
    bench.communicate(timeout=300)
    assert bench.returncode == 128 + signal.SIGTERM
    assert not any(runs(pid) for pid in servers)
