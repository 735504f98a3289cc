"""Two processes over gloo on one machine: the curve of one process, checkpoints, and staying in step.

Tolerance: losses, printed with four digits after the point, differ by at most 2e-4; weights by at most 1e-4 after six
steps at a learning rate of 1e-2. Sums are only taken in another order.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from trainings import MODEL, assert_same, quietly, run, weights

from vidlada.checkpoint.load import save_model
from vidlada.errors import InputError
from vidlada.training.config import Evaluation, Lora, Stage
from vidlada.training.models import new_model
from vidlada.training.output import checkpoints
from vidlada.training.parallel import make_accelerator
from vidlada.training.trainer import train

pytestmark = pytest.mark.slow

# Each step has four samples, so one process in two passes and two processes in one split it into the same parts.
# Half of the samples are text alone: often one process has no video and the other has.
DATA = {"kind": "shapes", "pictures": True, "frames_per_batch": 4, "questions": 2, "families": ["clock"],
        "choice_share": 0.0, "text_only_share": 0.5}  # fmt: skip


def config(output, **changes):
    """The tower is frozen until the checkpoint that is resumed, as in the 8B model's curriculum."""
    stages = (
        Stage("a", 1e-2, DATA, 4, frozen=("tower",)),
        Stage("b", 1e-2, DATA, 2, tower_learning_rate=1e-3, frozen=("projector",)),
    )
    return run(output, **{"stages": stages, "per_device_batch": 2, "checkpoint_every": 2, **changes})


def config_of_deepspeed(output, **changes):
    """What DeepSpeed can do too: the same parts frozen in all stages, a video somewhere in every step. Often one
    process has none."""
    data = {**DATA, "text_only_share": 0.4}
    own_rate = "projector_learning_rate" if "lora" in changes else "tower_learning_rate"
    stages = (Stage("a", 1e-2, data, 4), Stage("b", 1e-2, data, 2, **{own_rate: 1e-3}))
    return config(output, **{"stages": stages, **changes})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def launch(settings, folder, *options, launcher=None, processes=2):
    """`vidlada train` in two processes, under torchrun or another launcher; the exit code and what it said."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port", free_port()]
    command = [sys.executable, *(launcher or torchrun), "-m", "vidlada", "train", str(path), *options]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed looks for ninja
    # what DeepSpeed compiles goes where the tests' other files go: a lock of a killed run elsewhere would hold it up
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": search, "TORCH_EXTENSIONS_DIR": str(folder.parent)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    return ended.returncode, ended.stdout + ended.stderr


def losses(text):
    return [float(value) for value in re.findall(r"step \d+/.* loss (\S+)", text)]


def alone(settings):
    """Weights and losses of one process in two passes a step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = []
    final = train(settings, report=lines.append)
    torch.set_num_threads(before)
    return weights(final), losses("\n".join(lines))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return alone(config(tmp_path_factory.mktemp("one") / "run"))


@pytest.fixture(scope="module")
def one_like_deepspeed(tmp_path_factory):
    return alone(config_of_deepspeed(tmp_path_factory.mktemp("one") / "run"))


def test_passes_are_a_whole_batch_in_parts(one, tmp_path):
    """Where every answer is hidden whole nothing is drawn, and the number of parts changes nothing at all."""
    found = []
    for passes in (None, 2, 1):
        stages = tuple(
            Stage(stage.name, stage.learning_rate, stage.data, stage.steps, collate={"force_up_to": 99})
            for stage in config(tmp_path).stages
        )
        settings = config(tmp_path / str(passes), stages=stages, per_device_batch=passes, checkpoint_every=99)
        found.append(weights(train(settings, report=quietly)))
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_follow_the_curve_of_one(one, tmp_path, parallel):
    follows_and_resumes(config(tmp_path / "run", parallel=parallel), one, tmp_path)
    sharded = (checkpoints(tmp_path / "run")[-1] / "pytorch_model_fsdp_0").is_dir()
    assert sharded == (parallel == "fsdp")


DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None or shutil.which("c++") is None,
    reason="needs deepspeed, and a C++ compiler for its communication on CPUs",
)


@DEEPSPEED
@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_deepspeed_follows_the_curve_of_one_process(one_like_deepspeed, tmp_path, parallel):
    expected = one_like_deepspeed
    settings = config_of_deepspeed(tmp_path / "run", parallel=parallel)
    if parallel == "zero2":  # resuming takes the same code as with zero3
        follows(settings, expected, tmp_path)
    else:
        follows_and_resumes(settings, expected, tmp_path)
    kept = {path.name for path in (checkpoints(tmp_path / "run")[-1] / "pytorch_model").iterdir()}
    assert any(name.startswith("zero_pp_rank_1") or "_zero_pp_rank_1" in name for name in kept), kept


@DEEPSPEED
def test_deepspeed_is_not_continued_by_another_number_of_processes(tmp_path):
    """In a line: its own error is of a missing file. The model of the checkpoint is a start for another run."""
    settings = config_of_deepspeed(tmp_path / "run", parallel="zero2", checkpoint_every=6)
    code, said = launch(settings, tmp_path)
    assert code == 0, said
    code, said = launch(settings, tmp_path, "--resume", processes=1)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1, said
    assert "written by 2 processes of DeepSpeed, which cannot be continued by 1" in errors[0]
    start = str(checkpoints(tmp_path / "run")[-1] / "model")
    assert start in errors[0]
    other = replace(settings, output=str(tmp_path / "other"), init_from=start, model=None)
    code, said = launch(other, tmp_path, processes=1)
    assert code == 0, said


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_other_numbers_of_processes_continue(one, tmp_path, parallel):
    """Two processes go on from one and one from two, on the curve of either: parts are the same in number."""
    settings = config(tmp_path / "run", parallel=parallel)
    code, said = launch(settings, tmp_path)
    assert code == 0, said
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    code, resumed = launch(settings, tmp_path, "--resume", processes=1)
    assert code == 0, resumed
    assert losses(resumed) == pytest.approx(one[1][4:], abs=2e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_score_as_one(tmp_path, parallel):
    """Each answers its own questions; sharded weights are whole meanwhile. One answer may tip."""
    evaluation = Evaluation({**DATA, "split": "validation"}, every=2, steps=1, questions=6,
                            generation={"gen_length": 4, "block_length": 4})  # fmt: skip
    lines = []
    train(config(tmp_path / "one", evaluation=evaluation), report=lines.append)
    code, said = launch(config(tmp_path / "two", evaluation=evaluation, parallel=parallel), tmp_path)
    assert code == 0, said
    found, expected = (evaluations(text) for text in (said, "\n".join(lines)))
    assert len(found) == len(expected) == 3
    for (loss, score), (loss_of_one, score_of_one) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_of_one, abs=2e-4)
        assert score == pytest.approx(score_of_one, abs=17)
    assert weights(tmp_path / "two" / "model-best").keys() == weights(tmp_path / "one" / "model-best").keys()
    assert losses(said) == pytest.approx(losses("\n".join(lines)), abs=2e-4)  # as if nothing had been evaluated


def evaluations(text):
    return [tuple(map(float, each)) for each in re.findall(r"evaluation after .* loss ([\d.]+) score ([\d.]+)%", text)]


def follows(settings, expected, folder, launcher=None):
    """Two processes come to the losses and weights of one; returns their own."""
    code, said = launch(settings, folder, launcher=launcher)
    assert code == 0, said
    assert len(expected[1]) == 6
    assert losses(said) == pytest.approx(expected[1], abs=2e-4)
    found = weights(Path(settings.output) / "model")
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    assert not list(Path(settings.output).glob("*.partial"))
    return found, losses(said)


def follows_and_resumes(settings, expected, folder):
    """And where they go on, as after kill -9 between step 4 and 6, they come to the same weights to the bit."""
    found, curve = follows(settings, expected, folder)
    output = Path(settings.output)
    for leftover in (checkpoints(output)[-1], output / "model"):
        leftover.rename(folder / leftover.name)
    code, resumed = launch(settings, folder, "--resume")
    assert code == 0, resumed
    assert losses(resumed) == curve[4:]
    assert_same(output / "model", found)


# What `accelerate config` writes. Without GPUs its MULTI_CPU needs MPI; MULTI_GPU starts processes as torchrun does.
ACCELERATE = {
    "ddp": {"distributed_type": "MULTI_GPU"},
    "fsdp": {
        "distributed_type": "FSDP",
        "fsdp_config": {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                        "fsdp_state_dict_type": "SHARDED_STATE_DICT", "fsdp_cpu_ram_efficient_loading": True},
    },
    # the run accumulates gradients and clips them as it says itself
    "deepspeed": {"distributed_type": "DEEPSPEED",
                  "deepspeed_config": {"zero_stage": 3, "gradient_accumulation_steps": 4, "gradient_clipping": 9.0}},
}  # fmt: skip


def accelerate_launch(folder, kind):
    """A launcher with a configuration file of accelerate's own."""
    path = folder / "accelerate.yaml"
    values = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, **ACCELERATE[kind]}
    path.write_text(yaml.safe_dump(values))
    return ["-m", "accelerate.commands.launch", "--config_file", str(path), "--main_process_port", free_port()]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", pytest.param("deepspeed", marks=DEEPSPEED)])
def test_accelerate_launch_decides_where_the_run_says_auto(one_like_deepspeed, tmp_path, kind):
    settings = config_of_deepspeed(tmp_path / "run", checkpoint_every=6)
    follows(settings, one_like_deepspeed, tmp_path, launcher=accelerate_launch(tmp_path, kind))
    files = {path.name for path in checkpoints(tmp_path / "run")[-1].iterdir()}
    assert files & {"model.safetensors", "pytorch_model_fsdp_0", "pytorch_model"} == {
        {"ddp": "model.safetensors", "fsdp": "pytorch_model_fsdp_0", "deepspeed": "pytorch_model"}[kind]
    }


@pytest.mark.parametrize(
    ("environment", "changes", "match"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, {"parallel": "ddp"}, "parallel: auto"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"parallel": "fsdp"}, "configured for deepspeed"),
    ],
)
def test_a_launch_that_contradicts_the_run_is_refused(tmp_path, monkeypatch, environment, changes, match):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=match):
        make_accelerator(config(tmp_path / "run", **changes))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder to start from, stored in bfloat16 as published ones are."""
    folder = tmp_path_factory.mktemp("base") / "model"
    model, processor = new_model({**MODEL, "text_config": {**MODEL["text_config"], "initializer_range": 0.3}}, seed=5)
    save_model(model.bfloat16(), processor, folder)
    return folder


def test_adapters_under_fsdp_follow_the_curve_of_one_process(base, tmp_path):
    """LoRA and recomputed activations; in bf16, where the frozen weights stay as they are stored, roughly."""
    changes = {"model": None, "init_from": str(base), "lora": Lora(rank=4, alpha=8), "gradient_checkpointing": True}
    expected = alone(config_of_deepspeed(tmp_path / "one", **changes))
    settings = config_of_deepspeed(tmp_path / "run", parallel="fsdp", **changes)
    follows_and_resumes(settings, expected, tmp_path)
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    code, said = launch(replace(settings, precision="bf16"), tmp_path, "--overwrite")
    assert code == 0, said
    assert losses(said) == pytest.approx(expected[1], rel=0.03)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler, for torch.compile on CPUs")
def test_compiled_layers_under_fsdp_follow_the_curve_of_one_process(one, tmp_path):
    """As the 8B model's configurations combine them."""
    changes = {"parallel": "fsdp", "compile": True, "gradient_checkpointing": True, "checkpoint_every": 6}
    follows(config(tmp_path / "run", **changes), one, tmp_path)


def test_under_fsdp_one_process_reads_the_checkpoint(base, tmp_path):
    """And sends the others theirs; in one that was sent none the weights would be whatever lay in memory."""
    changes = {"model": None, "init_from": str(base), "checkpoint_every": 6}
    expected = alone(config_of_deepspeed(tmp_path / "one", **changes))
    follows(config_of_deepspeed(tmp_path / "run", parallel="fsdp", **changes), expected, tmp_path)


# Two hosts in network namespaces of their own, a cable between them; each runs the launch script.
TWO_NODES = """
set -e
ip link set lo up
unshare -n sleep 600 & other=$!
sleep 1
ip link add left type veth peer name right netns $other
ip addr add 10.231.0.1/24 dev left
ip link set left up
nsenter -t $other -n sh -c 'ip link set lo up; ip addr add 10.231.0.2/24 dev right; ip link set right up'
export NNODES=2 NPROC_PER_NODE=1 MASTER_ADDR=10.231.0.1 MASTER_PORT=29511 OMP_NUM_THREADS=1
RANK=1 GLOO_SOCKET_IFNAME=right nsenter -t $other -n "$1" "$2" & second=$!
code=0
RANK=0 GLOO_SOCKET_IFNAME=left "$1" "$2" || code=$?
wait $second || code=$?
kill $other
exit $code
"""
SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sh"


def script(folder, *arguments, **variables):
    """The launch script with a Python that only tells how it was called."""
    python = folder / "python"
    python.write_text('#!/bin/sh\necho "$@"\necho "$RANK" "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), **variables}
    command = [str(SCRIPT), *arguments, "run.yaml", "--resume"]
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


def test_the_script_takes_a_number_of_devices_as_the_published_one(tmp_path):
    launched = script(tmp_path, "2", NPROC_PER_NODE="4").stdout.splitlines()[0]
    assert "--nnodes 1 --node-rank 0 --nproc-per-node 2 " in launched
    assert launched.endswith("-m vidlada train run.yaml --resume")
    assert script(tmp_path, "1").stdout.splitlines()[0] == "-m vidlada train run.yaml --resume"


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


def can_make_networks():
    """Whether this user may make network namespaces and cables between them."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    command = ["unshare", "-Urn", "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_make_networks(), reason="needs network namespaces")
def test_two_nodes_follow_the_curve_of_one_process(one, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config(tmp_path / "run"))))))
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["unshare", "-Urn", "bash", "-c", TWO_NODES, "bash", str(SCRIPT), str(path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    assert losses(said) == pytest.approx(one[1], abs=2e-4)
    assert (tmp_path / "run" / "checkpoint-0000006" / "random_states_1.pkl").is_file()


def test_sigterm_to_torchrun_saves_first(tmp_path):
    """As a cluster's scheduler ends a job."""
    stages = (Stage("a", 1e-2, DATA, 5000),)
    path = tmp_path / "run.yaml"
    settings = config(tmp_path / "run", stages=stages, checkpoint_every=10**6)
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port(),
               "-m", "vidlada", "train", str(path)]  # fmt: skip
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        running = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while "step 2/" not in errors.read_text() and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.2)
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=200)
    said = errors.read_text()
    assert re.search(r"stopped by signal 15 after step \d+; continue with --resume", said), said
    (saved,) = checkpoints(tmp_path / "run")
    assert f"after step {int(saved.name.split('-')[1])};" in said
