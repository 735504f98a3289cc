"""Fine-tuning from a checkpoint in the published layout, with the variables of the published scripts."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from trainings import run

from vidlada.checkpoint.load import describe
from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.training.config import CONFIGS, Evaluation, Stage, load_config
from vidlada.training.models import initial_config
from vidlada.training.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "vidlada" / "weights" / "tiny"
TOWER = "google/siglip2-so400m-patch14-384"
DATA = {"kind": "shapes", "pictures": True, "frames_per_batch": 16, "questions": 4, "choice_share": 0.0,
        "families": ["spot", "colour", "shape", "count", "existence"]}  # fmt: skip


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The shipped model in the published layout, spoiled by noise; its tower described where the scripts look."""
    result = CliRunner().invoke(main, ["convert", str(SHIPPED), str(tmp_path / "model"), "--to", "published"])
    assert result.exit_code == 0, result.output
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    state = load_file(weights)
    for name, tensor in state.items():
        if ".mlp." in name and "vision" not in name:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            state[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(state, weights, {"format": "pt"})
    config = tmp_path / "model" / "config.json"
    stored = json.loads(config.read_text())
    del stored["vidlada"]["vision_config"]  # published configurations name their tower instead of describing it
    config.write_text(json.dumps({**stored, "mm_vision_tower": TOWER}))
    tower = tmp_path / "towers" / TOWER
    tower.mkdir(parents=True)
    vision = describe(SHIPPED).config.vision_config.to_dict()
    (tower / "config.json").write_text(json.dumps({**vision, "num_hidden_layers": vision["num_hidden_layers"] + 1}))
    monkeypatch.setenv("VISION_TOWER_CACHE_DIR", str(tmp_path / "towers"))
    return tmp_path / "model"


def test_a_fine_tune_from_the_published_layout_improves_held_out_samples(published, tmp_path):
    held_out = Evaluation({**DATA, "split": "validation"}, every=40, steps=4)
    losses = []

    def report(line):
        if line.startswith("evaluation"):
            losses.append(float(re.search(r"loss ([\d.]+)", line)[1]))

    settings = run(
        tmp_path / "before", model=None, init_from=str(published), stages=(Stage("a", 1e-9, DATA, 1),),
        evaluation=held_out, checkpoint_every=99, warmup_steps=5, vision_tower=TOWER,
    )  # fmt: skip
    train(settings, report=report)
    after = replace(settings, output=str(tmp_path / "after"), stages=(Stage("a", 5e-4, DATA, 40),))
    final = train(replace(after, layouts=("vidlada", "published")), report=report)
    assert losses[1] < 0.9 * losses[0], losses
    assert describe(final.with_name("model-published")).layout == "published"


def test_the_variables_of_the_published_scripts_count(published, tmp_path, monkeypatch):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    (tmp_path / "all.json").write_text(json.dumps([{"id": "1", "video": "1.mp4", "conversations": turns}]))
    (tmp_path / "all.yaml").write_text("datasets: [{json_path: all.json}]")
    (tmp_path / "videos").mkdir()
    for name, value in (("LLM_VERSION", published), ("VIDEO_FOLDER", tmp_path / "videos"),
                        ("DATA", tmp_path / "all.yaml"), ("VISION_MODEL_VERSION", TOWER)):  # fmt: skip
        monkeypatch.setenv(name, str(value))
    path = CONFIGS / "vidlada-8b-llava-video-178k.yaml"
    config = load_config(path)
    assert config.init_from == str(published)
    assert config.stages[0].data["video_folder"] == str(tmp_path / "videos")
    assert initial_config(config).vision_config.image_size == 84
    dry = CliRunner().invoke(main, ["train", str(path), "--dry-run"])
    assert dry.exit_code == 0 and "1 steps" in dry.output, dry.output

    monkeypatch.setenv("VISION_MODEL_VERSION", "google/siglip-base")
    with pytest.raises(InputError, match=f"siglip-base, but .* was made with {TOWER}"):
        initial_config(load_config(path))
    monkeypatch.delenv("VISION_MODEL_VERSION")
    shutil.rmtree(tmp_path / "towers")
    with pytest.raises(InputError):  # nothing says how many heads this tower has
        initial_config(load_config(path))
