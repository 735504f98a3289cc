"""The model against numbers recorded from the published code."""

import numpy as np
import pytest
import torch
from vectors import VARIANTS, arrays, expand_video, load_reference_model, pixels

from vidlada.model.video_model import VidLaDAForMaskedDiffusion

CLOSE = {"rtol": 0, "atol": 5e-5}
LOGITS_CLOSE = {"rtol": 0, "atol": 3e-4}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


@pytest.fixture
def model(variant) -> VidLaDAForMaskedDiffusion:
    return load_reference_model(variant)


def close(ours, recorded, **tolerance):
    np.testing.assert_allclose(ours.numpy(), recorded, **(tolerance or CLOSE))


def test_language_model(model, variant):
    recorded = arrays(variant)
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(recorded["lm.ids"]).reshape(1, -1))
    close(output.hidden.reshape(recorded["lm.hidden"].shape), recorded["lm.hidden"])
    top = output.logits.topk(recorded["lm.top_ids"].shape[-1])
    assert np.array_equal(top.indices.reshape(recorded["lm.top_ids"].shape), recorded["lm.top_ids"])
    close(top.values.reshape(recorded["lm.top_logits"].shape), recorded["lm.top_logits"], **LOGITS_CLOSE)


def test_padding(model, variant):
    recorded = arrays(variant)
    ids = torch.from_numpy(recorded["lm_padded.ids"])
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).hidden
    close(hidden * mask[..., None], recorded["lm_padded.hidden"])


def test_vision(model, variant):
    recorded = arrays(variant)
    frames = pixels(104, 2)
    with torch.no_grad():
        close(model.vision.features(frames), recorded["vision.features"])
        pooled = model.vision(frames)
        close(pooled, recorded["vision.pooled"])
        close(model.vision.with_newlines(pooled), recorded["vision.tokens"])


def test_splice(model, variant):
    recorded = arrays(variant)
    with torch.no_grad():
        (visual,) = model.encode_media(pixels(104, 2), [2])
        embedded = model.embed(expand_video(recorded["splice.ids"], len(visual)), visual)
    close(embedded, recorded["splice.embeds"])
