"""Two processes over gloo on one machine: the curve of one process, checkpoints, and staying in step.

Tolerance: losses, printed with four digits after the point, differ by at most 2e-4; weights by at most 1e-4 after six
steps at a learning rate of 1e-2. Sums are only taken in another order.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from processes import Command, free_port, wait_for
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


# `vidlada` where DeepSpeed talks over gloo, as between machines: its own way within one takes minutes to compile.
OVER_GLOO = """
import sys
import deepspeed
from vidlada.cli import main

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
main(sys.argv[1:], prog_name="vidlada")
"""


def run_file(settings, folder):
    """The settings of a run as a file."""
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
    return path


def launch(settings, folder, *options, processes=2):
    """`vidlada train` in so many processes, with torchrun's variables; the exit code and all output."""
    path = run_file(settings, folder)
    variables = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}  # fmt: skip
    code = OVER_GLOO if settings.parallel in ("zero2", "zero3") else None
    ranks = [
        Command("train", path, *options, code=code, **variables, RANK=rank, LOCAL_RANK=rank)
        for rank in range(processes)
    ]
    with suppress(AssertionError):  # the codes say that some were killed
        wait_for(lambda: all(rank.poll() is not None for rank in ranks) or any(rank.poll() for rank in ranks), 900)
    for rank in ranks:
        rank.kill()
    codes = [rank.wait() for rank in ranks]
    return next(filter(None, codes), 0), "".join(rank.errors + rank.output for rank in ranks)


def launch_by(launcher, settings, folder):
    """`vidlada train` under a launcher, in Python processes of their own; the exit code and all output."""
    (folder / "over_gloo.py").write_text(OVER_GLOO)
    program = ["-m", "vidlada"] if find_spec("deepspeed") is None else [str(folder / "over_gloo.py")]
    command = [sys.executable, *launcher, *program, "train", str(run_file(settings, folder))]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
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


EVALUATION = Evaluation({**DATA, "split": "validation"}, every=2, steps=1, questions=6,
                        generation={"gen_length": 4, "block_length": 4})  # fmt: skip


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return alone(config(tmp_path_factory.mktemp("one") / "run"))


@pytest.fixture(scope="module")
def one_like_deepspeed(tmp_path_factory):
    return alone(config_of_deepspeed(tmp_path_factory.mktemp("one") / "run"))


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def two(request, tmp_path_factory):
    """The run of `one` in two processes, which evaluate too; its settings and output."""
    folder = tmp_path_factory.mktemp("two")
    return launched(config(folder / "run", parallel=request.param, evaluation=EVALUATION), folder)


@pytest.fixture(scope="module")
def zero2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero2")
    return launched(config_of_deepspeed(folder / "run", parallel="zero2"), folder)


def launched(settings, folder):
    code, log = launch(settings, folder)
    assert code == 0, log
    return settings, log


def copy_of(settings, folder):
    """The settings of a finished run for a copy of its folder."""
    shutil.copytree(settings.output, folder / "run")
    return replace(settings, output=str(folder / "run"))


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


def test_two_processes_follow_the_curve_of_one(one, two):
    settings, log = two
    follows(settings, log, one)
    sharded = (checkpoints(Path(settings.output))[-1] / "pytorch_model_fsdp_0").is_dir()
    assert sharded == (settings.parallel == "fsdp")


def test_two_processes_continue(two, tmp_path):
    settings, log = two
    resumes(copy_of(settings, tmp_path), log, tmp_path)


def test_one_process_continues_what_two_began(one, two, tmp_path):
    """On the curve of either: parts are the same in number."""
    settings = copy_of(two[0], tmp_path)
    shutil.rmtree(checkpoints(tmp_path / "run")[-1])
    code, resumed = launch(settings, tmp_path, "--resume", processes=1)
    assert code == 0, resumed
    assert losses(resumed) == pytest.approx(one[1][4:], abs=2e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_packed_rows_in_two_processes_follow_the_curve_of_separate_ones(tmp_path, parallel):
    """Every answer is hidden whole, so that nothing is drawn but the data. Rows of so few tokens hold one or two
    samples, and a process may have more of them than the other, or no video."""
    data = {**DATA, "pictures": False, "seconds": [2, 4], "questions": 1, "frames_per_batch": 12}

    def described(name, **packing):
        stages = (Stage("a", 1e-2, data, 4, collate={"force_up_to": 99, **packing}),)
        return config(tmp_path / name, stages=stages, per_device_batch=None, checkpoint_every=99, parallel=parallel)

    expected = alone(replace(described("one"), parallel="auto"))
    kinds = [{"packing": True}, *([{"packing": True, "tokens_per_row": 64}] if parallel == "ddp" else [])]
    for number, packing in enumerate(kinds):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings, log = launched(described(f"{number}/run", **packing), folder)
        assert losses(log) == pytest.approx(expected[1], abs=2e-4)
        found = weights(Path(settings.output) / "model")
        for name, tensor in expected[0].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


def test_two_processes_score_as_one(two, tmp_path):
    """Each answers its own questions; sharded weights are whole meanwhile. One answer may tip."""
    settings, log = two
    lines = []
    train(config(tmp_path / "one", evaluation=EVALUATION), report=lines.append)
    found, expected = (evaluations(text) for text in (log, "\n".join(lines)))
    assert len(found) == len(expected) == 3
    for (loss, score), (loss_of_one, score_of_one) in zip(found, expected, strict=True):
        assert loss == pytest.approx(loss_of_one, abs=2e-4)
        assert score == pytest.approx(score_of_one, abs=17)
    best = Path(settings.output) / "model-best"
    assert weights(best).keys() == weights(tmp_path / "one" / "model-best").keys()


DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")


@DEEPSPEED
def test_deepspeed_follows_the_curve_of_one_process(one_like_deepspeed, zero2):
    settings, log = zero2
    follows(settings, log, one_like_deepspeed)
    assert written_by_both(settings)


@DEEPSPEED
def test_deepspeed_s_sharded_weights_follow_the_curve_of_one_process(one_like_deepspeed, tmp_path):
    """Resuming takes the same code with zero2."""
    settings, log = launched(config_of_deepspeed(tmp_path / "run", parallel="zero3"), tmp_path)
    follows(settings, log, one_like_deepspeed)
    assert written_by_both(settings)
    resumes(settings, log, tmp_path)


@DEEPSPEED
def test_deepspeed_follows_it_without_a_launcher_too(one_like_deepspeed, tmp_path):
    settings = config_of_deepspeed(tmp_path / "run", parallel="zero2")
    process = Command("train", run_file(settings, tmp_path), code=OVER_GLOO, OMP_NUM_THREADS=1)
    assert process.wait() == 0, process.errors
    follows(settings, process.errors + process.output, one_like_deepspeed)


def written_by_both(settings):
    """Whether DeepSpeed's second process wrote into the newest checkpoint too."""
    names = {path.name for path in (checkpoints(Path(settings.output))[-1] / "pytorch_model").iterdir()}
    return any(name.startswith("zero_pp_rank_1") or "_zero_pp_rank_1" in name for name in names)


@DEEPSPEED
def test_deepspeed_is_not_continued_by_another_number_of_processes(zero2, tmp_path):
    """In a line: its own error is of a missing file. The model of the checkpoint is a start for another run."""
    settings = copy_of(zero2[0], tmp_path)
    code, log = launch(settings, tmp_path, "--resume", processes=1)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1, log
    assert "written by 2 processes of DeepSpeed, which cannot be continued by 1" in errors[0]
    start = str(checkpoints(tmp_path / "run")[-1] / "model")
    assert start in errors[0]
    launched(replace(settings, output=str(tmp_path / "other"), init_from=start, model=None), tmp_path)


def evaluations(text):
    return [tuple(map(float, each)) for each in re.findall(r"evaluation after .* loss ([\d.]+) score ([\d.]+)%", text)]


def follows(settings, log, expected):
    """Two processes came to the losses and weights of one."""
    assert len(expected[1]) == 6
    assert losses(log) == pytest.approx(expected[1], abs=2e-4)
    found = weights(Path(settings.output) / "model")
    for name, tensor in expected[0].items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    assert not list(Path(settings.output).glob("*.partial"))


def resumes(settings, log, folder):
    """Where two processes go on, as after kill -9 between step 4 and 6, they come to the same weights to the bit."""
    output = Path(settings.output)
    expected = weights(output / "model")
    for leftover in (checkpoints(output)[-1], output / "model"):
        leftover.rename(folder / leftover.name)
    code, resumed = launch(settings, folder, "--resume")
    assert code == 0, resumed
    assert losses(resumed) == losses(log)[4:]
    assert_same(output / "model", expected)


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
    code, log = launch_by(accelerate_launch(tmp_path, kind), settings, tmp_path)
    assert code == 0, log
    follows(settings, log, one_like_deepspeed)
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
    settings, log = launched(config_of_deepspeed(tmp_path / "run", parallel="fsdp", **changes), tmp_path)
    follows(settings, log, expected)
    resumes(settings, log, tmp_path)
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    code, log = launch(replace(settings, precision="bf16"), tmp_path, "--overwrite")
    assert code == 0, log
    assert losses(log) == pytest.approx(expected[1], rel=0.03)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler, for torch.compile on CPUs")
def test_compiled_layers_under_fsdp_follow_the_curve_of_one_process(tmp_path):
    """As the 8B model's configurations combine them. One stage: what is frozen in another is compiled once more."""
    stages = (Stage("a", 1e-2, DATA, 6),)
    expected = alone(config(tmp_path / "one", stages=stages))
    changes = {"parallel": "fsdp", "compile": True, "gradient_checkpointing": True, "checkpoint_every": 6}
    follows(*launched(config(tmp_path / "run", stages=stages, **changes), tmp_path), expected)


def test_under_fsdp_one_process_reads_the_checkpoint(base, tmp_path):
    """And sends the others theirs; in one that was sent none the weights would be whatever lay in memory."""
    changes = {"model": None, "init_from": str(base), "checkpoint_every": 6}
    expected = alone(config_of_deepspeed(tmp_path / "one", **changes))
    follows(*launched(config_of_deepspeed(tmp_path / "run", parallel="fsdp", **changes), tmp_path), expected)


@DEEPSPEED
@pytest.mark.parametrize("parallel", ["zero2", "zero3"])
def test_deepspeed_in_bf16_starts_from_a_checkpoint(base, tmp_path, parallel):
    """Whose weights it takes in that type, in which it also computes gradients: the curve is roughly the same."""
    changes = {"model": None, "init_from": str(base), "checkpoint_every": 6}
    expected = alone(config_of_deepspeed(tmp_path / "one", **changes))
    _, log = launched(config_of_deepspeed(tmp_path / "run", parallel=parallel, precision="bf16", **changes), tmp_path)
    assert losses(log) == pytest.approx(expected[1], rel=0.1)


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


def can_make_networks():
    """Whether this user may make network namespaces and cables between them."""
    if not all(shutil.which(tool) for tool in ("unshare", "nsenter", "ip")):
        return False
    command = ["unshare", "-Urn", "ip", "link", "add", "left", "type", "veth", "peer", "name", "right"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_make_networks(), reason="needs network namespaces")
def test_two_nodes_follow_the_curve_of_one_process(one, tmp_path):
    path = run_file(config(tmp_path / "run"), tmp_path)
    variables = {**os.environ, "PYTHON": sys.executable}
    command = ["unshare", "-Urn", "bash", "-c", TWO_NODES, "bash", str(SCRIPT), str(path)]
    ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    log = ended.stdout + ended.stderr
    assert ended.returncode == 0, log
    assert losses(log) == pytest.approx(one[1], abs=2e-4)
    assert (tmp_path / "run" / "checkpoint-0000006" / "random_states_1.pkl").is_file()


def test_sigterm_to_torchrun_saves_first(tmp_path):
    """As a cluster's scheduler ends a job."""
    stages = (Stage("a", 1e-2, DATA, 5000),)
    path = run_file(config(tmp_path / "run", stages=stages, checkpoint_every=10**6), tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port(),
               "-m", "vidlada", "train", str(path)]  # fmt: skip
    errors = tmp_path / "errors"
    with errors.open("w") as file:
        running = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file, start_new_session=True
        )
    wait_for(lambda: "step 2/" in errors.read_text() or running.poll() is not None, 300)
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=200)
    log = errors.read_text()
    assert re.search(r"stopped by signal 15 after step \d+; continue with --resume", log), log
    (saved,) = checkpoints(tmp_path / "run")
    assert f"after step {int(saved.name.split('-')[1])};" in log
