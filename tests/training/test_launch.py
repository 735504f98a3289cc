"""The launch script, and the end of a run of two nodes when one process dies: a line on each node, no traces."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from processes import free_port, wait_for
from trainings import run

from vidlada.training.config import Stage

pytestmark = pytest.mark.slow

DATA = {"kind": "shapes", "pictures": True, "frames_per_batch": 4, "questions": 2, "families": ["clock"],
        "choice_share": 0.0}  # fmt: skip


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
        wait_for(lambda: "step 2/" in logs[0].read_text() or nodes[0].poll() is not None, 300)
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


SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sh"


def script(folder, *arguments, **variables):
    """The launch script with a Python that only tells how it was called."""
    python = folder / "python"
    python.write_text('#!/bin/sh\necho "$@"\necho "$RANK" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
    command = [str(SCRIPT), *(arguments if "--resume" in arguments else [*arguments, "run.yaml", "--resume"])]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_script_starts_torchrun_as_its_variables_say(tmp_path):
    """And gives processes time to save: torchrun kills them 30 seconds after SIGTERM, while an 8B model is written."""
    nodes = {"NNODES": "3", "RANK": "2", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29999"}
    launched, environment = script(tmp_path, NPROC_PER_NODE="4", **nodes).stdout.splitlines()
    assert launched == (
        "-m vidlada.training.launch --nnodes 3 --node-rank 2 --nproc-per-node 4 --master-addr 10.0.0.7 "
        "--master-port 29999 -m vidlada train run.yaml --resume"
    )
    assert environment == " 3600"
    alone = script(tmp_path, NPROC_PER_NODE="1").stdout
    assert alone.splitlines()[0] == "-m vidlada train run.yaml --resume"


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"NNODES": "two"}, "NNODES=two is not a whole number"),
        ({"NNODES": "2", "RANK": "2", "MASTER_ADDR": "10.0.0.7"}, "RANK=2 is not a whole number from 0 to 1"),
        ({"RANK": "1"}, "RANK=1 is not a whole number from 0 to 0"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999 is not a whole number from 1 to 65535"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
    ],
)
def test_the_script_refuses_variables_that_would_hang_or_fail_in_torchrun(tmp_path, variables, match):
    ended = script(tmp_path, **{"NPROC_PER_NODE": "1", **variables})
    assert ended.returncode == 2 and ended.stderr.startswith(f"error: {match}") and not ended.stdout


def test_the_script_takes_a_number_of_devices_as_the_published_one(tmp_path):
    launched = script(tmp_path, "2", NPROC_PER_NODE="4").stdout.splitlines()[0]
    assert "--nnodes 1 --node-rank 0 --nproc-per-node 2 " in launched
    assert launched.endswith("-m vidlada train run.yaml --resume")
    assert script(tmp_path, "1").stdout.splitlines()[0] == "-m vidlada train run.yaml --resume"
    published = script(tmp_path, "8", "--resume").stdout.splitlines()[0]
    assert "--nproc-per-node 8 " in published and published.endswith("train vidlada-8b-llava-video-178k --resume")
