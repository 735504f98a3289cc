"""What trackers know of a run: its name, config and figures. In processes of their own: trackers keep threads."""

import json
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import yaml
from click.testing import CliRunner
from processes import run_vidlada
from trainings import PICTURES, run

from vidlada.cli import main
from vidlada.training.config import Evaluation, Stage
from vidlada.training.trackers import flat, plain

CLOCK = {**PICTURES, "families": ["clock"], "choice_share": 0.0}


def test_settings_by_their_places():
    values = {"a": [1, {"b": None}], "c": {"d": "x"}, "e": True}
    assert flat(values) == {"a.0": 1, "a.1.b": "none", "c.d": "x", "e": True}
    assert plain({"a": (1, {2: object})}) == {"a": [1, {"2": str(object)}]}


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_trackers(tmp_path, tracker):
    held_out = Evaluation(CLOCK, every=2, steps=1, questions=2, generation={"gen_length": 4, "block_length": 4})
    stages = (Stage("a stage by this name", 1e-2, CLOCK, 2),)
    settings = run(tmp_path / "run", stages=stages, tracker=tracker, name="a run by this name", evaluation=held_out)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(settings)))))
    if find_spec(tracker) is None:
        result = CliRunner().invoke(main, ["train", str(path)])
        assert result.exit_code == 2 and f"pip install {tracker}" in result.output
        pytest.skip(f"{tracker} is not installed; that this is said was tested")
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    code, _, errors = run_vidlada("train", path, **places)
    assert code == 0, errors
    wanted = {"tensorboard": "run/logs/events*", "wandb": "wandb/offline-run-*/*.wandb", "trackio": "trackio/*.db"}
    (kept,) = (file for file in tmp_path.glob(wanted[tracker]) if file.stat().st_size > 0)
    content = b"".join(file.read_bytes() for file in kept.parent.glob(f"{kept.name}*"))  # a database's log too
    for known in (
        b"a run by this name",
        b"a stage by this name",
        b"evaluation_score",
        b"gradient_norm",
        b"frozen_parameters",
    ):
        assert known in content
    if tracker == "tensorboard":
        (values,) = (tmp_path / "run" / "logs").glob("*/hparams.yml")
        assert yaml.safe_load(values.read_text())["stages.0.learning_rate"] == 1e-2
