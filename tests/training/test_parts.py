"""What of a model is trained, how fast, by which objective; and evaluation, layouts, faults."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from trainings import MODEL, PICTURES, assert_same, quietly, run, weights

import vidlada
from vidlada.checkpoint.load import describe, save_model
from vidlada.cli import main
from vidlada.errors import InputError, VidLaDAError
from vidlada.training.config import CollateSettings, Evaluation, Lora, Stage
from vidlada.training.models import initial_model, new_model
from vidlada.training.objective import (
    IGNORED,
    Masking,
    before_targets,
    causal_mask,
    complement,
    diffusion_loss,
    draw_masking,
    draw_times,
    next_token_loss,
)
from vidlada.training.optimizers import make_optimizers, part_of
from vidlada.training.settings import build
from vidlada.training.trainer import train

EASY = {**PICTURES, "families": ["clock"], "choice_share": 0.0}


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


# One head of 72, as the published tower's: only then does a published checkpoint say all about its tower.
PUBLISHABLE = {**MODEL, "vision_config": {**MODEL["vision_config"], "hidden_size": 72, "num_attention_heads": 1}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder to start from, with weights large enough for a frozen head to say anything."""
    folder = tmp_path_factory.mktemp("base") / "model"
    arguments = {**MODEL, "text_config": {**MODEL["text_config"], "initializer_range": 0.3}}
    save_model(*new_model(arguments, seed=5), folder)
    return folder


def changed_tensors(before, after):
    return {part_of(name) for name in before if not torch.equal(before[name], after[name])}


def from_base(base, output, stages, **changes):
    return run(output, **{"model": None, "init_from": str(base), "stages": stages, "warmup_steps": 0, **changes})


def test_frozen_parts_stay_and_the_others_move(base, tmp_path):
    before = weights(base)
    stage = Stage("a", 1e-2, EASY, 2)
    tower = train(from_base(base, tmp_path / "t", (replace(stage, frozen=("tower",)),)), report=quietly)
    assert changed_tensors(before, weights(tower)) == {"projector", "language_model"}
    language = replace(stage, frozen=("tower", "language_model"))
    stages = (language, replace(stage, name="b", frozen=("language_model", "projector")))
    both = from_base(base, tmp_path / "b", stages, checkpoint_every=2, keep_checkpoints=9)
    end = weights(train(both, report=quietly))
    middle = weights(tmp_path / "b" / "checkpoint-0000002" / "model")
    assert changed_tensors(before, middle) == {"projector"}
    assert changed_tensors(middle, end) == {"tower"}


def test_parts_learn_at_their_own_rates():
    stage = Stage("a", 1e-2, EASY, 10, tower_learning_rate=1e-4, projector_learning_rate=3e-3, final_learning_rate=0)
    config = run("out", stages=(stage,), warmup_steps=0)
    model, _ = new_model(MODEL, 0)
    optimizers = make_optimizers(model, config)
    owners = {id(parameter): part_of(name) for name, parameter in model.named_parameters()}
    for step, share in ((0, 1.0), (5, 0.5)):
        assert optimizers.set_rate(config, step) == pytest.approx(1e-2 * share)
        for group in optimizers.optimizers[0].param_groups:
            (part,) = {owners[id(parameter)] for parameter in group["params"]}
            expected = {"tower": 1e-4, "projector": 3e-3, "language_model": 1e-2}[part]
            assert group["lr"] == pytest.approx(expected * share)
    seen = [id(p) for group in optimizers.optimizers[0].param_groups for p in group["params"]]
    assert len(seen) == len(set(seen)) == len(owners)


def test_lora_trains_adapters_that_load_merge_and_improve(base, tmp_path):
    losses = []

    def report(line):
        if line.startswith("evaluation"):
            losses.append(float(re.search(r"loss ([\d.]+)", line)[1]))

    data, whole = {**EASY, "frames_per_batch": 8}, CollateSettings(force_up_to=99)
    settings = from_base(
        base, tmp_path / "run", (Stage("a", 1e-2, data, 24, collate=whole),), lora=Lora(rank=4, alpha=8),
        evaluation=Evaluation({**data, "split": "validation"}, every=4, steps=1, collate=whole), checkpoint_every=12,
    )  # fmt: skip
    adapter = train(settings, report=report)
    assert losses[-1] < losses[0] - 0.3
    files = {path.name for path in adapter.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
    assert "model.safetensors" not in files
    before, after = weights(base), weights(adapter)
    assert before.keys() == after.keys()
    assert changed_tensors(before, after) == {"projector", "language_model"}
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])

    question = "What time is it?"
    answer = vidlada.load(adapter).ask(None, question, gen_length=8)
    result = CliRunner().invoke(main, ["merge", str(adapter), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.output
    assert vidlada.load(tmp_path / "merged").ask(None, question, gen_length=8).token_ids == answer.token_ids
    again = CliRunner().invoke(main, ["merge", str(adapter), str(tmp_path / "merged")])
    assert again.exit_code == 2 and "in use" in again.output
    unmerged = CliRunner().invoke(main, ["convert", str(adapter), str(tmp_path / "converted")])
    assert unmerged.exit_code == 2 and "vidlada merge" in unmerged.output

    # a run killed after its first checkpoint ends in the same adapter
    shutil.rmtree(tmp_path / "run" / "checkpoint-0000024")
    adapter.rename(tmp_path / "first")
    assert_same(train(settings, resume=True, report=quietly), after)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_frozen_weights_are_of_the_runs_type(base, tmp_path, stored):
    """Whatever the checkpoint's is: a run in bf16 on a CPU takes no float16 beside it."""
    vidlada.load(base).model.to(stored).save_pretrained(tmp_path / "base")
    for path in base.glob("*token*"):
        shutil.copy(path, tmp_path / "base")
    stage = Stage("a", 1e-2, {**EASY, "frames_per_batch": 2}, 2)
    settings = from_base(
        tmp_path / "base", tmp_path / "run", (stage,), lora=Lora(rank=2, alpha=4), precision="bf16", checkpoint_every=2
    )
    AcceleratorState._reset_state(True)  # which other tests have set to another precision
    try:
        assert weights(train(settings, report=quietly))
    finally:
        AcceleratorState._reset_state(True)
    model, _ = initial_model(settings)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_adapter_without_its_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(InputError, match="/nowhere/base is not there"):
        vidlada.load(tmp_path)


def test_lora_on_unknown_modules_is_refused():
    for modules in (["query"], []):
        with pytest.raises(InputError, match="lora.*modules"):
            build(Lora, {"modules": modules}, "lora")


def test_the_final_model_in_the_published_layout_too(tmp_path):
    layouts = ("vidlada", "published")
    settings = run(tmp_path / "run", model=PUBLISHABLE, stages=(Stage("a", 1e-2, EASY, 1),), layouts=layouts)
    final = train(settings, report=quietly)
    assert describe(tmp_path / "run" / "model-published").layout == "published"
    assert_same(tmp_path / "run" / "model-published", weights(final))
    (tmp_path / "run" / "model-published").rename(tmp_path / "run" / "model-published.partial")  # as a kill leaves it
    train(settings, resume=True, report=quietly)
    assert_same(tmp_path / "run" / "model-published", weights(final))


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path):
    settings = run(tmp_path / "run", stages=(Stage("a", 1e-2, EASY, 1),))
    train(settings, report=quietly)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        train(settings, report=quietly)
    train(replace(settings, seed=1), report=quietly, overwrite=True)
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "run" / "checkpoint-0000001").is_dir()


def test_too_many_broken_samples_end_the_run(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    entries = [{"id": str(n), "conversations": turns, **({"video": "gone.mp4"} if n % 2 else {})} for n in range(60)]
    (tmp_path / "d.json").write_text(json.dumps(entries))
    data = {"kind": "llava", "json_path": str(tmp_path / "d.json"), "batch_size": 20}
    settings = run(tmp_path / "run", stages=(Stage("a", 1e-3, data, 3),), max_skipped_share=1.0)
    lines = []
    train(settings, report=lines.append)
    listed = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert len(listed) > 10 and f"{len(listed)} of {60 + len(listed)} samples were broken" in lines[-1]
    assert "gone.mp4" in json.loads(listed[0])["problem"]
    with pytest.raises(VidLaDAError, match="max_skipped_share"):
        train(replace(settings, output=str(tmp_path / "strict"), max_skipped_share=0.01), report=quietly)


def test_broken_samples_of_the_evaluation_are_listed(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "d.json").write_text(json.dumps([{"id": "1", "conversations": turns, "video": "gone.mp4"}]))
    data = {"kind": "llava", "json_path": str(tmp_path / "d.json"), "batch_size": 1}
    stages = (Stage("a", 1e-3, EASY, 1),)
    train(run(tmp_path / "run", stages=stages, evaluation=Evaluation(data, 1, 1)), report=quietly)
    assert "d.json: entry 0, line 1: " in (tmp_path / "run" / "skipped.jsonl").read_text()


FULL_DISK = """
mount -t tmpfs -o size=1100k tmpfs "$1" && "$2" -m vidlada train "$3" --output "$1/run"
code=$?; ls "$1/run"; exit $code
"""


def can_mount():
    command = ["unshare", "-rm", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs mount namespaces")
def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(tmp_path):

    stage = {"name": "a", "steps": 3, "learning_rate": 1e-3, "data": EASY}
    settings = {"output": "unused", "model": MODEL, "stages": [stage], "checkpoint_every": 1, "keep_checkpoints": 9,
                "workers": 0, "precision": "no", "tracker": "none"}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "disk").mkdir()
    command = ["unshare", "-rm", "sh", "-c", FULL_DISK, "sh", str(tmp_path / "disk"), sys.executable,
               str(tmp_path / "run.yaml")]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ})
    log = ended.stdout + ended.stderr
    assert ended.returncode == 1, log
    assert "checkpoint-0000002 was not written" in log and "training goes on" in log
    assert "error: checkpoint-0000003 was not written" in log and "Traceback" not in log
    assert ended.stdout.split() == ["checkpoint-0000001"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_complementary_masks_cover_every_target_once():
    sample_index = torch.arange(4).repeat_interleave(50)[None]
    targets = torch.rand(sample_index.shape, generator=seeded(1)) < 0.8
    masking = draw_masking(targets, sample_index, draw_times(4, seeded(2)), seeded(3))
    other = complement(masking, targets, sample_index)
    assert torch.equal(masking.masked ^ other.masked, targets)
    torch.testing.assert_close(masking.probability + other.probability, torch.ones(4), rtol=0, atol=1e-3)


def test_a_complementary_run_takes_both_halves(tmp_path):
    settings = run(tmp_path / "run", stages=(Stage("a", 1e-2, EASY, 2),), complementary=True)
    lines = []
    train(settings, report=lines.append)
    losses = [float(value) for line in lines for value in re.findall(r"loss (\S+)", line)]
    assert len(losses) == 2 and min(losses) > 0


def test_next_token_loss_against_loops():
    labels = torch.tensor([[IGNORED, 4, 1, IGNORED, 2], [IGNORED, IGNORED, 3, 5, IGNORED]])
    sample_index = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 2, 2, -2]])
    logits = torch.randn(2, 5, 7, generator=seeded())
    places = before_targets(labels)
    assert places.tolist() == [[True, True, False, True, False], [False, True, True, False, False]]
    log_probability = logits.log_softmax(-1)
    sums = [-(log_probability[0, 0, 4] + log_probability[0, 1, 1]) / 2, -log_probability[0, 3, 2],
            -(log_probability[1, 1, 3] + log_probability[1, 2, 5]) / 2]  # fmt: skip
    loss = next_token_loss(logits[places], labels, sample_index)
    assert float(loss) == pytest.approx(float(sum(sums)) / 3, rel=1e-5)
    assert float(next_token_loss(logits[places], labels, sample_index, 6)) == pytest.approx(float(sum(sums)) / 6)


def test_causal_mask_only_forbids_more():
    allowed = torch.rand(2, 1, 5, 5, generator=seeded()) < 0.6
    mask = causal_mask(allowed, 5)
    for query in range(5):
        for key in range(5):
            expected = allowed[:, 0, query, key] & (key <= query)
            assert torch.equal(mask[:, 0, query, key], expected)
    valid = torch.tensor([[True, True, False]])
    assert causal_mask(valid, 3)[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    assert causal_mask(None, 2)[0, 0].tolist() == [[1, 0], [1, 1]]


def test_the_autoregressive_twin_learns(tmp_path):
    losses = []
    stage = Stage("a", 2e-2, {**EASY, "frames_per_batch": 8}, 40)
    settings = run(tmp_path / "run", stages=(stage,), objective="autoregressive", log_every=10, checkpoint_every=99)
    train(settings, report=lambda line: losses.extend(map(float, re.findall(r"loss (\S+)", line))))
    assert losses[-1] < losses[0] / 2


def test_weights_of_the_loss_follow_the_whole_step():
    """Two halves of a batch, each with the whole step's number of samples, add up to its loss."""
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    sample_index = torch.tensor([[0, 0, 0], [1, 1, 1]])
    masked = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    logits = torch.randn(2, 3, 8, generator=seeded())
    probability = torch.tensor([0.4, 0.9])
    whole = diffusion_loss(logits[masked], labels, sample_index, Masking(masked, probability))
    halves = [
        diffusion_loss(
            logits[row][masked[row]], labels[row, None], torch.zeros(1, 3, dtype=torch.long),
            Masking(masked[row, None], probability[row, None]), 2,
        )
        for row in range(2)
    ]  # fmt: skip
    assert float(sum(halves)) == pytest.approx(float(whole), rel=1e-6)
