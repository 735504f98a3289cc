"""The 8B configurations: each model on the meta device, each schedule run through without training."""

import json

import pytest
import torch
import yaml

from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.training.config import CONFIGS, load_config
from vidlada.training.flops import FlopCount
from vidlada.training.models import add_lora
from vidlada.training.optimizers import make_optimizers, part_of
from vidlada.training.stages import resolve_epochs, stage_sources

ENTRIES = 640


@pytest.fixture
def data(tmp_path, monkeypatch):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]
    entries = [{"id": str(n), "video": f"{n}.mp4", "conversations": turns} for n in range(ENTRIES)]
    (tmp_path / "all.json").write_text(json.dumps(entries))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({"datasets": [{"json_path": "all.json"}]}))
    for name in ("DATA", "SHORT_DATA", "MEDIUM_DATA", "LONG_DATA", "THINK_DATA"):
        monkeypatch.setenv(name, str(tmp_path / "all.yaml"))
    monkeypatch.setenv("VIDEO_FOLDER", str(tmp_path))
    for name in ("OUTPUT", "MODEL", "LLM_VERSION"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("path", sorted(p.name for p in CONFIGS.glob("vidlada-8b-*.yaml")))
def test_each_8b_run_on_meta(data, path):
    config = load_config(CONFIGS / path)
    with torch.device("meta"):
        model = VidLaDAForMaskedDiffusion(VidLaDAConfig())
        if config.lora is not None:
            model = add_lora(model, config.lora, "base", 0)
    total = sum(p.numel() for p in model.parameters())
    assert 8.4e9 < total < 8.9e9
    run = resolve_epochs(config, stage_sources(config))
    optimizers = make_optimizers(model, run)
    trained = {part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    expected = {"projector", "language_model"} | (set() if config.lora else {"tower"})
    assert trained == expected

    lengths = [-(-ENTRIES // stage.data["batch_size"]) for stage in config.stages]
    assert [stage.length for stage in run.stages] == lengths
    rates = [optimizers.set_rate(run, step) for step in range(run.total_steps)]
    assert max(rates) <= config.stages[0].learning_rate
    assert rates[-1] < rates[-2] < rates[len(rates) - 4]
    groups = dict(zip(optimizers.parts[0], optimizers.optimizers[0].param_groups, strict=True))
    last = run.stages[-1]
    for part, group in groups.items():
        assert group["lr"] == pytest.approx(rates[-1] * last.rate_ratio(part))
    frames = last.data["sampling"]["max_frames"]
    count = FlopCount(model, VidLaDAConfig())
    if config.lora is None:
        # known of the 8B model: one pass over 64 frames and 128 slots is 290 TFLOP, the head not counted
        assert count(1, 210 * 64 + 128, 0) / 3 == pytest.approx(290e12, rel=0.03)
    assert count(1, 210 * frames + 128, frames) > count(1, 210 * frames + 128, 0)


def test_published_hyper_parameters(data):
    config = load_config(CONFIGS / "vidlada-8b-llava-video-178k.yaml")
    (stage,) = config.stages
    assert (stage.learning_rate, stage.tower_learning_rate, config.weight_decay) == (1e-5, 2e-6, 0)
    assert (stage.schedule, config.warmup_share, stage.epochs, stage.data["batch_size"]) == ("cosine", 0.03, 1, 64)
    assert stage.data["sampling"] == {"fps": 1, "max_frames": 64, "force_sample": True}
    assert stage.data["time_instruction"] and stage.data["group_by_length"]
    assert (config.checkpoint_every, config.keep_checkpoints, config.gradient_checkpointing) == (2000, 1, True)


def test_a_variable_that_is_not_set_is_named(data, monkeypatch):
    monkeypatch.delenv("VIDEO_FOLDER")
    with pytest.raises(InputError, match="stages.*video_folder.*VIDEO_FOLDER is not set"):
        load_config(CONFIGS / "vidlada-8b-lora.yaml")


def test_a_data_file_may_stand_for_a_mixture(data, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path / "all.json"))
    (source,) = stage_sources(load_config(CONFIGS / "vidlada-8b-lora.yaml"))
    assert len(source.entries) == ENTRIES
