"""`vidlada batch --ray` on a Ray cluster of two machines that are processes here."""

import json
import os
import signal
import subprocess
import time

import pytest
from media import write_video
from processes import Command

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="needs vidlada[ray]")

LINES = 240


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with a CPU each."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    started.add_node(num_cpus=1)
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    for number in range(3):
        write_video(folder / f"{number}.mp4", frames=50 + 25 * number)
    lines = [{"id": i, "video": f"{i % 3}.mp4", "question": "is it red ?", "seed": i} for i in range(LINES)]
    lines[7] = {"id": {"any": ["thing"]}, "video": "none.mp4", "question": "is it red ?"}
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "questions.jsonl"


@pytest.fixture(scope="module")
def start(cluster, questions, small_folder):
    def start(out, *options):
        command = ["batch", questions, "--out", out, "--model", small_folder, "--gen-length", "32", *options]
        return Command(*command, RAY_ADDRESS=cluster.address)

    return start


@pytest.fixture(scope="module")
def expected(start, tmp_path_factory):
    """What one machine says."""
    out = tmp_path_factory.mktemp("expected") / "out.jsonl"
    process = start(out)
    assert (process.wait(300), answers_of(out)[7][2]) == (1, True)
    return answers_of(out)


def answers_of(path):
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    return [(answer["line"], answer.get("answer"), "error" in answer) for answer in answers]


def workers():
    """Processes that hold a model."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
    return {int(line.split()[0]) for line in listed if "ray::MapWorker" in line}


def lines_of(out):
    return out.read_bytes().count(b"\n") if out.exists() else 0


def wait_for_lines(process, out, number):
    while lines_of(out) < number:
        assert process.poll() is None, process.errors
        time.sleep(0.01)


@pytest.mark.parametrize("what", ["worker", "machine"])
def test_a_death_midway_loses_and_doubles_nothing(cluster, start, expected, tmp_path, what):
    process = start(tmp_path / "out.jsonl", "--ray", "--workers", 2)
    wait_for_lines(process, tmp_path / "out.jsonl", 1)
    before = workers()
    assert len(before) == 2
    if what == "worker":
        os.kill(min(before), signal.SIGKILL)
    else:
        cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
        cluster.add_node(num_cpus=1)
    assert process.wait(300) == 1  # a line could not be answered
    assert f"{LINES} lines answered, 0 before; 1 of all {LINES} are errors" in process.errors
    assert answers_of(tmp_path / "out.jsonl") == expected


def test_a_run_killed_midway_is_resumed(start, expected, tmp_path):
    out = tmp_path / "out.jsonl"
    process = start(out, "--ray", "--workers", 2)
    wait_for_lines(process, out, 1)
    process.kill()
    process.wait()
    done = lines_of(out)
    process = start(out, "--ray", "--workers", 1)
    process.wait(300)
    assert f"lines answered, {done} before; " in process.errors
    assert answers_of(out) == expected


def test_refusals_are_one_line(start, tmp_path):
    for options, message in [
        (("--ray",), "has no GPU"),
        (("--ray", "--workers", 1, "--block-length", 7), "block_length 7 does not divide"),
        (("--workers", 1), "add --ray"),
    ]:
        process = start(tmp_path / "out.jsonl", *options)
        assert process.wait(300) == 2, process.errors
        assert message in process.errors.splitlines()[-1]
        assert "Traceback" not in process.errors
    assert lines_of(tmp_path / "out.jsonl") == 0
