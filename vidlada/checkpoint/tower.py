"""The vision tower of a published checkpoint: where it is, and what shape it has.

Published configurations say neither its number of heads nor of layers, and its last layer is never used: a checkpoint
may have it or not. So the shape is taken from the tensors, and the rest from the tower's own config.json, or from the
one tower the family is known to use. Nothing is guessed beyond that.
"""

import os
from pathlib import Path
from typing import Any

from transformers import SiglipVisionConfig

from vidlada.checkpoint.layouts import PUBLISHED_PREFIXES, Entry, count_layers
from vidlada.checkpoint.values import ConfigValues
from vidlada.errors import InputError

TOWER_FOLDER_VARIABLE = "VISION_TOWER_CACHE_DIR"
SO400M_NAME = "google/siglip2-so400m-patch14-384"
SO400M = {"hidden_size": 1152, "intermediate_size": 4304}
SO400M_LAYERS, SO400M_HEADS = 27, 16
VISION_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps",
)  # fmt: skip


def find_tower(folder: Path, name: str) -> Path | None:
    """Folder of the tower that a checkpoint names, on this machine.

    Looked for are the path as it is, its last two parts (owner and name, where it was a folder of another machine) and
    its last part; under VISION_TOWER_CACHE_DIR, in the checkpoint, and in the working directory.

    Args:
        folder: of the checkpoint.
        name: `mm_vision_tower`.
    """
    parts = Path(name).parts
    roots = [os.environ.get(TOWER_FOLDER_VARIABLE), folder, "."]
    names = dict.fromkeys((name, str(Path(*parts[-2:])), *parts[-1:]))
    places = [Path(root) / part for root in roots if root for part in names if part]
    # os.path: a name that no file can have is no file, and no error
    return next((place for place in places if os.path.isfile(place / "config.json")), None)  # noqa: PTH113


def vision_arguments(values: ConfigValues) -> dict[str, Any]:
    """Checked arguments of SiglipVisionConfig, from our own configuration or SigLIP's; other fields are left out."""
    defaults = SiglipVisionConfig()
    arguments: dict[str, Any] = {}
    for name in VISION_FIELDS:
        default = getattr(defaults, name)
        if isinstance(default, str):
            arguments[name] = values.text(name, default)
        elif isinstance(default, float):
            arguments[name] = values.number(name, default)
        else:
            arguments[name] = values.integer(name, default)
    return {**arguments, "vision_use_head": False}


def stored_tower(values: ConfigValues) -> dict[str, Any]:
    """Arguments of SiglipVisionConfig from a tower's own config.json, all its layers included."""
    return vision_arguments(values.inner("vision_config") if "vision_config" in values else values)


def cut(arguments: dict[str, Any]) -> dict[str, Any]:
    """A whole tower without its last layer."""
    return {**arguments, "num_hidden_layers": arguments["num_hidden_layers"] - 1}


def tower_inside(folder: Path, entries: dict[str, Entry], stored: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments of SiglipVisionConfig for the tower inside a published checkpoint, without its last layer.

    Args:
        folder: of the checkpoint, for errors.
        entries: its tensors.
        stored: arguments of the whole tower from its own config.json; None where that was not found.

    Raises:
        InputError: tensors are missing, or nothing says how many heads or layers the tower has.
    """
    prefix = PUBLISHED_PREFIXES["vision.tower."]
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
             "encoder.layers.0.mlp.fc1.weight")  # fmt: skip
    patch, position, mlp = (entries.get(prefix + name) for name in names)
    if patch is None or position is None or mlp is None or len(patch.shape) != 4:
        raise InputError(f"{folder}: the vision tower is incomplete; {', '.join(names)} are needed below {prefix}")
    width, channels, patch_size, _ = patch.shape
    shape = {
        "hidden_size": width,
        "intermediate_size": mlp.shape[0],
        "num_channels": channels,
        "patch_size": patch_size,
        "image_size": _image_size(patch_size, position.shape[0]),
        "vision_use_head": False,
    }
    found = count_layers(entries, f"{prefix}encoder.layers.")
    if stored is not None:
        whole, heads = stored["num_hidden_layers"], stored["num_attention_heads"]
        shape = {**stored, **shape, "image_size": stored["image_size"]}
    elif SO400M.items() <= shape.items():
        whole, heads = SO400M_LAYERS, SO400M_HEADS
    else:
        raise InputError(
            f"{folder}: no config says how many heads its vision tower of width {width} has, nor how many layers; "
            f"put the tower's folder with its config.json under ${TOWER_FOLDER_VARIABLE}"
        )
    if found not in (whole, whole - 1):
        raise InputError(
            f"{folder}: its vision tower has {found} layers; the tower it is has {whole}, the last of which is not used"
        )
    return {**shape, "num_hidden_layers": whole - 1, "num_attention_heads": heads}


def _image_size(patch_size: int, patches: int) -> int:
    """384 for the published tower, whose 27 patches of 14 leave 6 pixels over; else the patches' own extent."""
    side = int(patches**0.5)
    return 384 if 384 // patch_size == side else side * patch_size
