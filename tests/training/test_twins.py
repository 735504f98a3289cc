"""The comparison of the causal twins, end to end on minuscule models."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from trainings import quietly, run

from vidlada.shapes.dataset import write_dataset
from vidlada.training.config import Stage
from vidlada.training.trainer import train

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_twins.py"
CLIPS = {"kind": "shapes", "seconds": [4, 4], "frames_per_batch": 8, "questions": 2}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_twins", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twins_are_compared_on_the_same_questions(script, tmp_path):
    pytest.importorskip("matplotlib")
    folders = [
        str(train(run(tmp_path / kind, stages=(Stage("a", 1e-2, CLIPS, 2),), objective=kind), report=quietly))
        for kind in ("diffusion", "autoregressive")
    ]
    questions = write_dataset(tmp_path / "data", "test", clips=2, questions=6, seconds=4, size=112)
    arguments = [*folders, str(questions), str(tmp_path / "out")]
    result = CliRunner().invoke(script.main, arguments)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    for group in ("family", "decisive event", "frames a second"):
        one, other = (
            {label: found["number"] for label, found in scores[name][group].items()} for name in ("diffusion", "causal")
        )
        assert one == other
        assert (tmp_path / "out" / f"{group.replace(' ', '-')}.svg").stat().st_size > 1000
    assert sum(found["number"] for found in scores["causal"]["family"].values()) == 12
    assert set(scores["causal"]["frames a second"]) == {"1", "0.5", "0.25"}
    again = CliRunner().invoke(script.main, arguments)
    assert again.exit_code == 2 and "not empty" in again.output


def entry(family, question, answer, choices=None, seconds=9):
    still = {"colour": "red", "shape": "ball", "size": "big", "appear": 2, "disappear": 7, "motion": "still",
             "start": [0.5, 0.5], "end": [0.5, 0.5], "turns": None}  # fmt: skip
    turns = [{"value": f"<image>\n{question}"}, {"value": answer}]
    clip = {"seconds": seconds, "seed": 0, "things": [still], "clock": True, "first_second": 0}
    return {"family": family, "conversations": turns, "choices": choices, "clip": clip}


@pytest.mark.parametrize(
    ("question", "third"),
    [
        (entry("when", "at which second does the red ball appear ?", "2"), "early"),
        (entry("when", "at which second ? A : 7 B : 2", "A", ["7", "2"]), "late"),
        (entry("at", "what happens at second 7 ?", "red ball disappears"), "late"),
        (entry("at", "what happens at second 4 ?", "nothing"), None),
        (entry("order", "what happens first ?", "red ball appears"), "early"),
        (entry("order", "what happens last ?", "red ball disappears"), "late"),
        (entry("colour", "what colour is the ball ?", "red"), None),
    ],
)
def test_the_time_of_the_decisive_event(script, question, third):
    assert script.third_of(question) == third
