"""Images through the vision half against numbers recorded from the published code."""

import json

import numpy as np
import pytest
import torch
from vectors import DATA, our_key

from vidlada.model.config import VidLaDAConfig
from vidlada.model.vision import Vision
from vidlada.processor import VidLaDAProcessor
from vidlada.tiling import Tiling

GEOMETRY = json.loads((DATA / "anyres_geometry.json").read_text())["table"]
PUBLISHED = Tiling("anyres_max_4", 384, 27)


@pytest.fixture(scope="module")
def recorded():
    with np.load(DATA / "images.npz") as stored:
        return {name: stored[name] for name in stored.files}


def config(image_size=384, **changes):
    return VidLaDAConfig(
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "num_key_value_heads": 2, "vocab_size": 8},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": image_size, "patch_size": 14, "vision_use_head": False},
        **{"image_aspect_ratio": "anyres_max_4", **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def vision(recorded):
    vision = Vision(config())
    weights = {
        our_key(name.removeprefix("weight.")).removeprefix("vision."): torch.from_numpy(values).float()
        for name, values in recorded.items()
        if name.startswith("weight.")
    }
    vision.load_state_dict(weights)
    return vision.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "alone"), [("single", False), ("wide", True), pytest.param("big", True, marks=pytest.mark.slow)]
)
def test_recorded_images(vision, recorded, small, name, alone):
    processor = VidLaDAProcessor(small.processor.tokenizer, image_aspect_ratio="anyres_max_4")
    pictures, shape = processor.image_pictures(recorded[f"{name}.image"], alone)
    (tokens,) = vision.encode(processor.pixel_values(pictures), [shape])
    assert len(tokens) == recorded[f"{name}.tokens"] == PUBLISHED.tokens(shape) == config().visual_tokens(shape)
    np.testing.assert_allclose(tokens[recorded[f"{name}.rows_index"]], recorded[f"{name}.rows"], rtol=0, atol=5e-5)
    # sums over a width of 64 of values that each may be off by a little
    np.testing.assert_allclose(tokens.sum(1), recorded[f"{name}.row_sum"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("case", GEOMETRY, ids=lambda case: "x".join(map(str, case["size_wh"])))
def test_recorded_geometry(case):
    width, height = case["size_wh"]
    shape = PUBLISHED.shape_of(height, width)
    columns, rows = case["grid_wh"]
    assert list(PUBLISHED.resolution_for(width, height)) == case["best"]
    assert shape.tiles == 1 + rows * columns and PUBLISHED.grid(shape) == (27 * rows, 27 * columns)
    kept = [part.stop - part.start for part in PUBLISHED.content_region(shape)]
    assert kept == case["unpadded_hw"]
    assert list(PUBLISHED.shrunk_size(*kept)) == case["final_hw"]
    assert PUBLISHED.tokens(shape) == case["n_tokens"]


@pytest.mark.parametrize("merge_type", ["spatial_unpad", "spatial", "flat"])
@pytest.mark.parametrize(("height", "width", "alone"), [(30, 500, True), (90, 40, True), (3, 500, True), (7, 7, False)])
def test_tokens_are_counted_as_they_are_laid_out(merge_type, height, width, alone):
    pinpoints = [[126, 42], [42, 84], [42, 42]]
    settings = {"image_grid_pinpoints": pinpoints, "image_merge_type": merge_type}
    small_config = config(image_size=42, **settings)
    shape = small_config.tiling.shape_of(height, width, alone)
    vision = Vision(small_config)
    torch.nn.init.constant_(vision.newline, 7)
    tokens = vision.lay_out_image(torch.randn(shape.tiles, 9, 64), shape)
    assert len(tokens) == small_config.visual_tokens(shape)
    assert (tokens == 7).all(-1).tolist() == small_config.newlines(shape)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (383, 385), (2, 3000)])
def test_thin_images_keep_a_row(size):
    pictures, shape = PUBLISHED.cut(np.full((*size, 3), 200, np.uint8))
    rows, columns = PUBLISHED.content_region(shape)
    assert len(pictures) == shape.tiles and rows.stop > rows.start and columns.stop > columns.start
    assert PUBLISHED.tokens(shape) >= 729 + 2
