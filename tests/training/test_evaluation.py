"""Held-out samples during training: loss, score, and the model that is kept as the best."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from trainings import CLIPS, PICTURES, assert_same, quietly, run, weights

import vidlada
from vidlada.errors import InputError
from vidlada.training.answers import AskedQuestion, answer_questions, is_right
from vidlada.training.config import CollateSettings, Evaluation, Stage
from vidlada.training.data.collate import Collator, StepDataset
from vidlada.training.data.samples import Item, Sample
from vidlada.training.evaluation import EvaluationResult
from vidlada.training.signals import Interrupted
from vidlada.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CLOCK = {**PICTURES, "families": ["clock"], "choice_share": 0.0, "frames_per_batch": 8}
SHORT = {"gen_length": 4, "block_length": 4}
HIDDEN = CollateSettings(force_up_to=99, end_targets=2)


def lines_of(settings, **options):
    lines = []
    final = train(settings, report=lines.append, **options)
    return final, [line for line in lines if line.startswith("evaluation")]


def scores(lines):
    return [float(re.search(r"score (\S+)%", line)[1]) for line in lines]


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("red", "Red.", True), ("two  circles", "two circles", True), ("B", "b", True), ("", "", True),
        ("red circle", "red", False), ("", "red", False), ("1.5", "15", False),
    ],
)  # fmt: skip
def test_what_is_right(answer, expected, right):
    assert is_right(answer, expected) == right


class OneSample:
    """A source of one sample."""

    def __init__(self, sample):
        self.sample = sample

    def load(self, item, size):
        return self.sample


@pytest.mark.parametrize("separate", [True, False])
def test_answers_are_those_of_the_python_interface(small, separate):
    """Of a video's separate questions, and of a conversation's turns behind the true ones."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 36, 36, 3), dtype=np.uint8)
    exchanges = [("what colour is the circle ?", "red"), ("where is it ?", "left"), ("and then ?", "right")]
    item = Item(exchanges, None, separate)
    dataset = StepDataset(
        OneSample(Sample([frames], exchanges, separate)), Collator(small.processor, CollateSettings()), 0
    )
    settings = small.settings(gen_length=8, block_length=8, cache=None)
    questions = [AskedQuestion(dataset, item, number, answer) for number, (_, answer) in enumerate(exchanges)]
    found = answer_questions(small.model, small.processor, questions, settings)
    for number, (question, _) in enumerate(exchanges):
        chat = small.chat(frames, gen_length=8, block_length=8, cache="none")
        if not separate:
            for earlier, answer in exchanges[:number]:
                chat.messages += [chat.message(earlier), {"role": "assistant", "content": answer}]
        assert found[number] == chat.ask(question).text


ANSWERS = {
    "what colour is the circle ?": "red", "what colour is the square ?": "blue", "where is the circle ?": "left",
    "where is the square ?": "right", "which shape is red ?": "circle", "which shape is blue ?": "square",
}  # fmt: skip


@pytest.fixture
def facts(tmp_path):
    """Questions whose answers are to be learned by heart."""
    entries = [
        {"id": question, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in ANSWERS.items()
    ]
    (tmp_path / "facts.json").write_text(json.dumps(entries))
    return {"kind": "llava", "json_path": str(tmp_path / "facts.json"), "batch_size": len(ANSWERS)}


def test_the_score_rises_and_the_best_model_is_kept(tmp_path, facts):
    """It gives as many right answers when it is loaded."""
    held_out = Evaluation(facts, every=30, steps=1, questions=99, generation=SHORT)
    stage = Stage("a", 2e-2, facts, 90, collate=HIDDEN)
    settings = run(tmp_path / "run", stages=(stage,), evaluation=held_out, checkpoint_every=30, keep_checkpoints=1)
    _, lines = lines_of(replace(settings, log_every=40))
    found = scores(lines)
    assert len(found) == 3 and max(found) > 50
    best = json.loads((tmp_path / "run" / "model-best" / "evaluation.json").read_text())
    assert best["score"] == pytest.approx(max(found) / 100, abs=1e-3)
    assert best["step"] == 30 * (1 + found.index(max(found)))
    assert [line.endswith("the best so far") for line in lines] == [
        score > max(found[:number], default=-1) for number, score in enumerate(found)
    ]
    logged = events(tmp_path / "run" / "logs")
    assert logged["evaluation_score"] == pytest.approx([score / 100 for score in found], abs=1e-3)
    assert len(logged["evaluation_loss"]) == len(found)
    model = vidlada.load(tmp_path / "run" / "model-best")
    right = [model.ask(None, question, **SHORT).text == answer for question, answer in ANSWERS.items()]
    assert sum(right) / len(right) == pytest.approx(best["score"])


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_the_best_by_loss_survives_a_resumption(tmp_path):
    """A run that goes astray after its first evaluation, stopped and continued: the first model stays the best."""
    held_out = Evaluation({**CLOCK, "split": "validation"}, every=2, steps=1, collate=HIDDEN, best="loss")
    stages = (Stage("a", 1e-3, CLOCK, 2, collate=HIDDEN), Stage("astray", 5.0, CLIPS, 4))
    settings = run(tmp_path / "run", stages=stages, evaluation=held_out, keep_checkpoints=1, warmup_steps=0)

    def stop(line):
        if line.startswith("step 4/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(settings, report=stop)
    before = weights(tmp_path / "run" / "model-best")
    _, lines = lines_of(settings, resume=True)
    assert len(lines) == 1 and "best" not in lines[0]
    assert_same(tmp_path / "run" / "model-best", before)
    assert json.loads((tmp_path / "run" / "model-best" / "evaluation.json").read_text())["step"] == 2
    # and another run in its place does not keep it
    stage = Stage("a", 1e-30, CLOCK, 1, collate=HIDDEN)
    train(replace(settings, stages=(stage,), evaluation=None), report=quietly, overwrite=True)
    assert not (tmp_path / "run" / "model-best").exists()


def test_better_is_a_higher_score_or_a_lower_loss():
    first, second = EvaluationResult(1, loss=1.0, score=0.5), EvaluationResult(2, loss=2.0, score=0.75)
    assert second.beats(first, "score") and first.beats(second, "loss")
    assert not first.beats(first, "score") and not first.beats(first, "loss")
    assert first.beats(None, "loss")
    assert EvaluationResult(3, 0.5).beats(first, "score") and first.beats(EvaluationResult(3, 0.5), "score")


def test_settings_of_the_answers_that_do_not_fit_are_refused_before_the_first_step(tmp_path):
    held_out = Evaluation(CLOCK, questions=4, generation={"gen_lenght": 4})
    with pytest.raises(InputError, match="evaluation: generation: .*gen_lenght"):
        train(run(tmp_path / "run", evaluation=held_out), report=quietly)
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_no_best_model_where_none_is_asked_for(tmp_path):
    held_out = Evaluation(CLOCK, every=1, steps=1, best="none")
    train(run(tmp_path / "run", stages=(Stage("a", 1e-3, CLOCK, 1),), evaluation=held_out), report=quietly)
    assert not (tmp_path / "run" / "model-best").exists()


def test_evaluations_and_checkpoints_are_no_part_of_a_step(tmp_path, monkeypatch):
    late = 0.0

    def evaluate(run, done):
        nonlocal late
        late += 1e5

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late)
    monkeypatch.setattr("vidlada.training.figures.time", clock)
    reported = []
    monkeypatch.setattr("vidlada.training.trainer.Run.evaluate", evaluate)
    monkeypatch.setattr("vidlada.training.trainer.line_of", lambda figures, *place: reported.append(figures) or "")
    held_out = Evaluation(CLOCK, every=1, steps=1)
    train(run(tmp_path, evaluation=held_out, log_every=2, stages=(Stage("a", 1e-3, CLOCK, 4),)))
    assert late == 4e5 and len(reported) == 2
    assert all(figures["seconds_per_step"] < 1e4 for figures in reported)
