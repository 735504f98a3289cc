"""The drift report against its definition."""

import pytest
import torch
from click.testing import CliRunner
from media import write_video

from vidlada.bench.drift import drift_figures
from vidlada.cli import main
from vidlada.decoding.sampler import Request, denoise
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings

pytestmark = pytest.mark.slow

FRAME_INDEX = [-1, -1, *[0] * 6, *[1] * 6, *[2] * 6, -1]


def make_request(small, **changes):
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(len(FRAME_INDEX), 32, generator=generator) * 0.2
    settings = GenerationSettings(gen_length=8, block_length=8).replace(**changes)
    return Request(prompt, settings, frame_index=FRAME_INDEX)


def test_drift_is_the_change_of_states_between_steps(small):
    figures = drift_figures(small.model, make_request(small))
    assert figures["steps"] == 8
    assert figures["chance"]["near"] == pytest.approx(7 / 9)
    states, model = [], small.model
    embed, request = model.language_model.embed_tokens, make_request(small)
    with torch.no_grad():
        ids = torch.full((8,), model.config.mask_token_id)
        for _, state in denoise(model, [request]):
            states.append(model.language_model(torch.cat((request.prompt, embed(ids)))[None])[0])
            ids = torch.where(state.committed, state.proposed, model.config.mask_token_id)
    expected = [
        1 - torch.cosine_similarity(a[2:20], b[2:20], dim=-1).mean() for a, b in zip(states, states[1:], strict=False)
    ]
    assert figures["layers"][-1]["visual"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-3)
    for row in figures["layers"]:
        assert all(0 <= row[name] <= 1 for name in ("near", "flatness", "on_anchors", "anchors_kept"))


def test_a_request_without_frames_is_refused(small):
    with pytest.raises(InputError, match="no frames"):
        drift_figures(small.model, Request(torch.zeros(3, 32), GenerationSettings()))


def test_command_line(small_folder, tmp_path):
    clip = write_video(tmp_path / "clip.mp4", frames=75)
    done = CliRunner().invoke(
        main, ["bench", "drift", str(clip), "is it red ?", "--model", str(small_folder), "--gen-length", "4"]
    )
    assert done.exit_code == 0
    assert done.stdout.count("\n| ") == 1 + 2
