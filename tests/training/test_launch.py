"""The end of a run of two nodes when one process dies: a line on each node, no traces."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from trainings import run

from vidlada.training.config import Stage

pytestmark = pytest.mark.slow

DATA = {"kind": "shapes", "pictures": True, "frames_per_batch": 4, "questions": 2, "families": ["clock"],
        "choice_share": 0.0}  # fmt: skip


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def node(rank, port, path, log):
    """One of two nodes of this machine, as scripts/train.sh starts it."""
    command = [
        sys.executable, "-m", "vidlada.training.launch", "--nnodes", "2", "--node-rank", str(rank),
        "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port,
        "-m", "vidlada", "train", str(path),
    ]  # fmt: skip
    with log.open("w") as file:
        return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)


def child_of(process):
    """The one process that a node started."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("number", "codes", "messages"),
    [
        (signal.SIGKILL, [1, 1], ["process 0 was killed (SIGKILL)", "another process of this launch has ended"]),
        (signal.SIGTERM, [130, 130], ["stopped by signal 15", "stopped by signal 15"]),
    ],
)
def test_a_process_that_ends_is_one_line_on_each_node(tmp_path, number, codes, messages):
    settings = run(tmp_path / "run", stages=(Stage("a", 1e-3, DATA, 100_000),), checkpoint_every=10**6)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
    logs, port = [tmp_path / "first", tmp_path / "second"], free_port()
    nodes = [node(rank, port, path, log) for rank, log in enumerate(logs)]
    try:
        deadline = time.monotonic() + 300
        while "step 2/" not in logs[0].read_text() and time.monotonic() < deadline and nodes[0].poll() is None:
            time.sleep(0.2)
        os.kill(child_of(nodes[0]), number)
        assert [each.wait(timeout=200) for each in nodes] == codes, [log.read_text() for log in logs]
    finally:
        for each in nodes:
            each.kill()
            each.wait()
    for log, expected in zip(logs, messages, strict=True):
        errors = [line for line in log.read_text().splitlines() if not line.startswith("step")]
        assert errors[-1].startswith("error: ") and expected in errors[-1], errors
        assert len(errors) <= 3, errors  # what is read, the number of parameters, and this
