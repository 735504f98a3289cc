"""The recorded outputs of the published code (tests/data) and the formula model they were recorded with.

Every tensor of the model is made from its published key alone, so nothing but shapes is stored.
"""

import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vidlada.model.config import VidLaDAConfig
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

DATA = Path(__file__).parent / "data"
Variant = Literal["mha", "gqa"]
VARIANTS: tuple[Variant, ...] = ("mha", "gqa")

# Written out on purpose: the tests of vidlada.checkpoint.load compare its table with this one.
PREFIXES = {
    "model.vision_tower.vision_tower.vision_model.": "vision.tower.",
    "model.mm_projector.": "vision.projector.",
    "model.image_newline": "vision.newline",
    "lm_head.": "lm_head.",
    "model.": "language_model.",
}


@cache
def arrays(variant: Variant) -> dict[str, np.ndarray]:
    """The recorded arrays, by the names of the vectors' README."""
    with np.load(DATA / f"{variant}.npz") as stored:
        return {name: stored[name] for name in stored.files}


def preprocess_arrays() -> dict[str, np.ndarray]:
    """The recorded results of image preprocessing."""
    with np.load(DATA / "preprocess.npz") as stored:
        return {name: stored[name] for name in stored.files}


def published_config(variant: Variant) -> dict[str, Any]:
    """The published config.json of the formula model."""
    config = json.loads((DATA / "checkpoint.json").read_text())["config"]
    return {**config, "num_key_value_heads": {"mha": 4, "gqa": 2}[variant]}


def published_shapes(variant: Variant) -> dict[str, tuple[int, ...]]:
    """Every published key with its shape."""
    shapes = json.loads((DATA / "checkpoint.json").read_text())["keys"]
    grouped = {"k_proj", "v_proj"} if variant == "gqa" else set()
    return {
        key: (32, 64) if key.startswith("model.layers.") and key.split(".")[-2] in grouped else tuple(shape)
        for key, shape in shapes.items()
    }


def formula(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of a key."""
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    values = generator.standard_normal(shape).astype(np.float32)
    if key.endswith("norm.weight") or ("layer_norm" in key and key.endswith("weight")) or "layernorm" in key:
        return 1 + np.float32(0.1) * values
    if values.ndim > 1:
        return values / np.float32(np.sqrt(shape[-1]))
    return np.float32(0.1) * values


@cache
def formula_state_dict(variant: Variant) -> dict[str, Tensor]:
    """The formula model's weights in the published layout. Shared: do not write into them."""
    return {key: torch.from_numpy(formula(key, shape)) for key, shape in published_shapes(variant).items()}


def our_key(published: str) -> str:
    """A published key in our layout."""
    old, new = next((old, new) for old, new in PREFIXES.items() if published.startswith(old))
    return new + published.removeprefix(old)


@cache
@torch.inference_mode(False)  # an ordinary module even where the first caller is in inference mode
def load_reference_model(variant: Variant) -> VidLaDAForMaskedDiffusion:
    """The formula model in float32, evaluation mode. One a process: do not change it."""
    published = published_config(variant)
    text_names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta")  # fmt: skip
    config = VidLaDAConfig(
        text_config={name: published[name] for name in text_names},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 384, "patch_size": 14, "vision_use_head": False,
        },
    )  # fmt: skip
    model = VidLaDAForMaskedDiffusion(config)
    model.load_state_dict({our_key(key): tensor for key, tensor in formula_state_dict(variant).items()})
    return model.float().eval().requires_grad_(False)


def ids(seed: int, n: int) -> np.ndarray:
    """`n` token ids, (n,)."""
    return np.random.RandomState(seed).randint(0, 126000, n)


def pixels(seed: int, f: int) -> Tensor:
    """Pixel values of `f` frames, (f, 3, 384, 384)."""
    return torch.from_numpy(np.random.RandomState(seed).uniform(-1, 1, (f, 3, 384, 384)).astype(np.float32))


def expand_video(input_ids: np.ndarray, visual_tokens: int, stand_in: int = -200) -> Tensor:
    """Ids in which one stand-in means the whole video → ids with one stand-in a visual token, (1, tokens)."""
    flat = input_ids.reshape(-1)
    counts = np.where(flat == stand_in, visual_tokens, 1)
    return torch.from_numpy(np.repeat(flat, counts))[None]
