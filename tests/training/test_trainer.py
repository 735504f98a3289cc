"""Whole runs of a minuscule model: what they write, and that stopping them in any way changes nothing."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from processes import Command
from safetensors import SafetensorError
from trainings import MODEL, PICTURES, STEPS, assert_same, quietly, run, weights

import vidlada.training.checkpoints as checkpoints
import vidlada.training.losses as losses
import vidlada.training.output as output_folder
import vidlada.training.trainer as trainer
from vidlada.checkpoint.load import load_model, save_model
from vidlada.errors import InputError, VidLaDAError
from vidlada.processor import VidLaDAProcessor
from vidlada.training.config import Evaluation, Stage
from vidlada.training.data.shapes import ShapesSource
from vidlada.training.data.workers import STOP_SIGNALS
from vidlada.training.models import new_model
from vidlada.training.signals import Interrupted
from vidlada.training.trainer import train

# A run that ends itself: after a step, or half way through writing a checkpoint.
KILLED_RUN = """
import os, signal, sys, json
import vidlada.training.checkpoints as checkpoints
import vidlada.training.trainer as trainer
from vidlada.training.config import CollateSettings, Stage, TrainingConfig

where, values = sys.argv[1], json.loads(sys.argv[2])
stages = tuple(Stage(**{**stage, "collate": CollateSettings(**stage["collate"])}) for stage in values.pop("stages"))

def report(line):
    if where == "step" and line.startswith("step 5/"):
        os.kill(os.getpid(), signal.SIGKILL)

def save_model(model, processor, folder, weights, dtype):
    model.save_pretrained(folder)
    if where == "checkpoint" and "0000004" in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save_model = save_model
trainer.train(TrainingConfig(**values, stages=stages), report=report)
"""


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    lines = []
    final = train(run(output), report=lines.append)
    return output, final, lines


@pytest.fixture(scope="module")
def expected(whole):
    return weights(whole[1])


def names(output):
    return sorted(path.name for path in output.glob("checkpoint-*"))


def test_a_run_writes_checkpoints_logs_and_a_model(whole, expected):
    output, final, (first, *lines) = whole
    assert final == output / "model"
    initial, _ = new_model(MODEL, 0)
    counts = [int(word.replace(",", "")) for word in first.split() if word[0].isdigit()]
    assert sum(counts) == sum(parameter.numel() for parameter in initial.parameters())
    assert first.endswith("frozen, precision no") and counts[1] > 0
    for figure in ("norm", "samples/s", "waiting"):
        assert all(figure in line for line in lines)
    assert names(output) == ["checkpoint-0000006", "checkpoint-0000007"]  # only the newest two are kept
    assert [line.split()[1] for line in lines] == [f"{step}/{STEPS}" for step in range(1, STEPS + 1)]
    assert [line.split()[2] for line in lines] == ["pictures"] * 3 + ["clips"] * 4
    assert list(output.glob("logs/**/events.*"))
    assert not list(output.glob("*.partial"))
    assert json.loads((output / "checkpoint-0000006" / "trainer_state.json").read_text())["step"] == 6
    unused = ("vision.tower.post_layernorm",)
    changed = {name for name, tensor in initial.state_dict().items() if not torch.equal(tensor, expected[name])}
    assert changed == {name for name in expected if not name.startswith(unused)}


def test_the_model_folder_is_complete(whole):
    processor = VidLaDAProcessor.from_pretrained(whole[1])
    model = load_model(whole[1])
    encoded = processor.encode([{"role": "user", "content": "Where is it?"}], [])
    logits = model(input_ids=torch.tensor([encoded.input_ids])).logits
    assert logits.shape[-1] == len(processor.tokenizer)
    assert_same(whole[0] / "checkpoint-0000007" / "model", model.state_dict())


def test_training_learns(tmp_path):
    stage = Stage("a", 2e-2, {**PICTURES, "families": ["clock"], "frames_per_batch": 8, "choice_share": 0.0}, 80)
    config = replace(run(tmp_path / "run"), stages=(stage,), log_every=10, checkpoint_every=100)
    lines = []
    train(config, report=lines.append)
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("step")]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("stop_at", [2, 3, 5])
def test_an_interrupted_run_continues_as_if_nothing_had_been(tmp_path, expected, stop_at):
    def terminate(line):
        if line.startswith(f"step {stop_at}/"):
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(Interrupted, match=f"after step {stop_at};") as caught:
        train(run(tmp_path / "run"), report=terminate)
    assert caught.value.exit_code == 130
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert names(tmp_path / "run")[-1] == f"checkpoint-{stop_at:07d}"
    assert not (tmp_path / "run" / "model").exists()
    lines = []
    final = train(run(tmp_path / "run"), resume=True, report=lines.append)
    assert lines[0] == f"resumed from checkpoint-{stop_at:07d}"
    assert lines[1].startswith(f"step {stop_at + 1}/")
    assert_same(final, expected)


def run_and_wait(code, where, config):
    """Run KILLED_RUN in a process group of its own."""
    command = Command(where, json.dumps(asdict(config)), code=code, new_session=True, OMP_NUM_THREADS=1)
    return command.wait(120), command.errors


@pytest.mark.parametrize(("where", "newest"), [("step", 4), ("checkpoint", 2)])
def test_a_killed_run_continues_as_if_nothing_had_been(tmp_path, expected, where, newest):
    output = tmp_path / "run"
    code, errors = run_and_wait(KILLED_RUN, where, run(output, workers=1))
    assert code == -signal.SIGKILL, errors
    leftover = ["checkpoint-0000004.partial"] if where == "checkpoint" else []
    assert [name for name in names(output) if name.endswith(".partial")] == leftover
    (output / "checkpoint-0000001.partial").mkdir()  # as if killed once more, while it deleted that one
    lines = []
    final = train(run(output), resume=True, report=lines.append)
    assert lines[0] == f"resumed from checkpoint-{newest:07d}"
    assert_same(final, expected)
    assert not list(output.glob("*.partial"))


def test_signals_to_the_whole_group_leave_workers_at_work(tmp_path, expected):
    """As with Ctrl-C in a terminal: the loader's processes get the signal too."""
    output = tmp_path / "run"
    source = KILLED_RUN.replace("os.kill(os.getpid(), signal.SIGKILL)", "os.killpg(0, signal.SIGINT)")
    _, errors = run_and_wait(source, "step", run(output, workers=1))
    assert errors.strip().splitlines()[-1].startswith("vidlada.training.signals.Interrupted: stopped by signal 2")
    assert names(output)[-1] == "checkpoint-0000005"
    assert_same(train(run(output), resume=True, report=quietly), expected)


@pytest.mark.parametrize("damaged", ["model.safetensors", "optimizer.bin", "trainer_state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, whole, damaged):
    shutil.copytree(whole[0], tmp_path / "run")
    file = tmp_path / "run" / "checkpoint-0000007" / damaged
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(InputError, match="checkpoint-0000007 is damaged"):
        train(run(tmp_path / "run"), resume=True, report=quietly)


def test_a_run_of_another_form_is_not_continued_and_other_changes_are_named(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "run")
    wider = {**MODEL, "text_config": {**MODEL["text_config"], "hidden_size": 32}}
    for changes in ({"optimizer": "muon"}, {"model": wider}):
        with pytest.raises(InputError, match="must be as they were"):
            train(run(tmp_path / "run", **changes), resume=True, report=quietly)
    lines = []
    train(run(tmp_path / "run", seed=7, log_every=2), resume=True, report=lines.append)
    assert lines[0] == "resumed from checkpoint-0000007; changed since: seed"


def test_a_killed_worker_ends_the_run_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ShapesSource, "load", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(VidLaDAError, match="prepares batches was killed.*--resume"):
        train(run(tmp_path / "run", workers=1), report=quietly)


def test_a_worker_that_is_killed_when_its_work_is_done_changes_nothing(tmp_path, monkeypatch, expected):
    save = checkpoints.save_model

    def save_and_kill(*arguments):
        for worker in multiprocessing.active_children():
            worker.kill()
        save(*arguments)

    monkeypatch.setattr(checkpoints, "save_model", save_and_kill)
    final = train(run(tmp_path / "run", workers=2, checkpoint_every=STEPS), report=quietly)
    assert_same(final, expected)
    assert names(tmp_path / "run") == [f"checkpoint-{STEPS:07d}"]


def test_resuming_a_finished_run_writes_the_same_model(tmp_path, whole, expected):
    shutil.copytree(whole[0], tmp_path / "run")
    assert_same(train(run(tmp_path / "run"), resume=True, report=quietly), expected)


def test_partial_and_empty_checkpoints_are_ignored(tmp_path):
    for name, complete in (("0000001", True), ("0000002", False), ("0000003.partial", True)):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{name}" / output_folder.STATE_FILE).write_text("{}")
    assert output_folder.newest_checkpoint(tmp_path) == tmp_path / "checkpoint-0000001"


# Holds a run's folder, as what is left of a killed torchrun does.
LOCK_FOLDER = """
import sys
from pathlib import Path
from vidlada.training.output import lock_output
with lock_output(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_write_into_one_folder(tmp_path, whole, expected):
    output = tmp_path / "run"
    shutil.copytree(whole[0], output)
    command = [sys.executable, "-c", LOCK_FOLDER, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        for how in ("resume", "overwrite"):
            with pytest.raises(InputError, match="another run is at work"):
                train(run(output), report=quietly, **{how: True})
        assert names(output) == names(whole[0])
    assert_same(train(run(output), resume=True, report=quietly), expected)
    assert not (output / output_folder.LOCK_FILE).exists()


def test_a_final_model_that_does_not_fit_is_reported_and_written_later(tmp_path, monkeypatch, expected):
    def half(model, processor, folder, *rest):
        if "checkpoint" in str(folder):
            return save_model(model, processor, folder, *rest)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_model", half)
        with pytest.raises(VidLaDAError, match="model was not written: No space left.*--resume"):
            train(run(tmp_path / "run"), report=quietly)
    assert not list((tmp_path / "run").glob("model*"))
    assert_same(train(run(tmp_path / "run"), resume=True, report=quietly), expected)


def test_who_asks_to_stop_does_not_wait_for_an_evaluation(tmp_path):
    lines = []

    def terminate(line):
        lines.append(line)
        if line.startswith("step 1/"):
            os.kill(os.getpid(), signal.SIGTERM)

    settings = run(tmp_path / "run", evaluation=Evaluation(PICTURES, every=1, steps=1))
    with pytest.raises(Interrupted, match="after step 1;"):
        train(settings, report=terminate)
    assert [line for line in lines if line.startswith("evaluation")] == []


def test_an_output_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        train(run(tmp_path / "run"))
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "notes.txt"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_to_resume_is_refused(tmp_path, exists):
    if exists:
        (tmp_path / "run" / "checkpoint-0000001.partial").mkdir(parents=True)
    before = list(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="no checkpoint"):
        train(run(tmp_path / "run"), resume=True)
    assert list(tmp_path.rglob("*")) == before


def test_init_from_starts_at_a_model_folder(tmp_path, whole, expected):
    """With a learning rate of almost nothing the weights stay where they started."""
    stage = Stage("a", 1e-30, PICTURES, 1)
    config = replace(run(tmp_path / "run"), model=None, init_from=str(whole[1]), stages=(stage,))
    assert_same(train(config, report=quietly), expected)


def test_gradient_checkpointing_changes_nothing(tmp_path, expected):
    found = weights(train(run(tmp_path / "run", gradient_checkpointing=True), report=quietly))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_a_loss_that_is_not_finite_ends_the_run_and_changes_nothing(tmp_path, monkeypatch):
    calls = []
    real = losses.diffusion_loss

    def broken(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(losses, "diffusion_loss", broken)
    with pytest.raises(VidLaDAError, match="step 3 is nan") as caught:
        train(run(tmp_path / "run", workers=1), report=quietly)
    assert len(calls) == 4
    assert caught.tb is not None and not multiprocessing.active_children()  # Python would wait for them at its end
    assert "input_ids" in torch.load(tmp_path / "run" / "not_finite_3.pt")
    assert names(tmp_path / "run") == ["checkpoint-0000002"]


def test_a_gradient_that_is_not_finite_ends_the_run_and_changes_nothing(tmp_path, monkeypatch, whole):
    """Its loss is: the next one would not be, after a checkpoint of spoilt weights."""
    calls = []
    real = losses.diffusion_loss

    def broken(logits, *others):
        calls.append(1)
        return real(logits, *others) + ((logits.sum() * 0).sqrt() if len(calls) == 4 else 0)

    monkeypatch.setattr(losses, "diffusion_loss", broken)
    with pytest.raises(VidLaDAError, match="gradient of step 3 is nan"):
        train(run(tmp_path / "run"), report=quietly)
    assert names(tmp_path / "run") == ["checkpoint-0000002"]


def test_freed_memory_is_returned_only_where_the_process_has_grown(monkeypatch):
    """Resident bytes at each look; those after a return are the new measure."""
    sizes, returned = iter([100, 90, 110, 112, 113, 105]), []
    monkeypatch.setattr(trainer, "resident_memory", lambda: next(sizes))
    monkeypatch.setattr(trainer, "return_free_memory", lambda: returned.append(True))
    looks = SimpleNamespace(trimmed=0)
    counts = []
    for _ in range(4):
        trainer.Run.trim(looks)
        counts.append(len(returned))
    assert counts == [1, 1, 1, 2] and looks.trimmed == 105
