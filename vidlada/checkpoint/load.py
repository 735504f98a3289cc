"""Checkpoint folders: what they hold, loading and saving them.

Only safetensors are read: other formats can run code when opened.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vidlada.checkpoint.layouts import (
    PUBLISHED_PREFIXES,
    TOWER_FOLDER_VARIABLE,
    TOWER_PREFIX,
    Entry,
    Layout,
    config_from_llada,
    config_from_published,
    is_unused,
    tensor_name,
    tower_arguments,
    tower_shape,
)
from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.noise import quiet_libraries
from vidlada.processor import VidLaDAProcessor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_TYPES = ("float32", "bfloat16", "float16")
MOST_NAMED_KEYS = 5  # an error names this many keys and counts the rest


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds, read from its headers.

    Attributes:
        folder: the folder.
        layout: how its tensors are named.
        config: of the model, in our terms.
        entries: its tensors by their own names.
        tower: tensors of a vision tower found outside the folder, by their names there; empty if it is inside.
    """

    folder: Path
    layout: Layout
    config: VidLaDAConfig
    entries: dict[str, Entry]
    tower: dict[str, Entry]

    @property
    def dtype(self) -> str:
        """Type most values are stored in, as safetensors spells it."""
        sizes: dict[str, int] = {}
        for entry in self.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + int(torch.Size(entry.shape).numel())
        return max(sizes, key=lambda name: sizes[name])


def base_of(folder: Path) -> Path:
    """Folder of the model an adapter was trained on; `InputError` if it is not there."""
    try:
        named = Path(json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: {ADAPTER_CONFIG} is missing or damaged") from error
    for place in (named, folder / named, folder.parent / named.name):
        if (place / "config.json").is_file():
            return place
    raise InputError(f"{folder}: its base model {named} is not there; put it there, or correct {ADAPTER_CONFIG}")


def describe(folder: Path) -> Checkpoint:
    """Read a checkpoint folder's configuration and headers.

    Args:
        folder: with config.json and safetensors; of a LoRA adapter, its base is described.

    Raises:
        InputError: it is not a checkpoint of this family, or files are missing or damaged.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return describe(base_of(folder))
    config = read_json(folder / "config.json")
    entries = read_entries(folder)
    model_type = str(config.get("model_type", ""))
    if model_type == "vidlada":
        return Checkpoint(folder, "vidlada", VidLaDAConfig.from_pretrained(folder), entries, {})
    if any(key.startswith("model.transformer.") for key in entries):
        return Checkpoint(folder, "llada", config_from_llada(config), entries, {})
    if not model_type.startswith("llava_llada"):
        raise InputError(
            f"{folder}: config.json says model_type {model_type!r}; known are vidlada, llava_llada_video, llava_llada "
            f"and LLaDA's own"
        )
    inside = any(key.startswith(PUBLISHED_PREFIXES["vision.tower."]) for key in entries)
    tower_folder = find_tower(folder, str(config.get("mm_vision_tower", "")))
    if tower_folder is None and not inside:
        raise InputError(
            f"{folder}: the checkpoint holds no vision tower, and {config.get('mm_vision_tower')} was not found; "
            f"put its folder under ${TOWER_FOLDER_VARIABLE}"
        )
    stored = {} if tower_folder is None else read_json(tower_folder / "config.json")
    vision = tower_shape(folder, entries, stored) if inside else tower_arguments(stored)
    tower = {} if inside or tower_folder is None else read_entries(tower_folder)
    return Checkpoint(folder, "published", config_from_published(config, vision), entries, tower)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent}: no {path.name}; this is not a model folder") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one JSON object")
    return values


def read_entries(folder: Path) -> dict[str, Entry]:
    """The tensors in a folder's safetensors, sharded or not, by name."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = [folder / WEIGHTS]
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.is_file():
            other = [path.name for path in folder.glob("*.bin")]
            hint = f"; it has {other[0]}, which is not read: convert it to safetensors" if other else ""
            raise InputError(f"{folder}: {file.name} is missing{hint}")
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(key)
                    entries[key] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or not safetensors ({error})") from error
    return entries


def find_tower(folder: Path, name: str) -> Path | None:
    """Folder of the vision tower a checkpoint names: under VISION_TOWER_CACHE_DIR, in its folder, or by its path."""
    roots = [os.environ.get(TOWER_FOLDER_VARIABLE), folder, "."]
    places = [Path(root) / part for root in roots if root for part in (name, Path(name).name) if part]
    return next((place for place in places if (place / "config.json").is_file()), None)


def sources(checkpoint: Checkpoint) -> dict[str, tuple[str, Entry]]:
    """For every tensor of our model, the name and place of its values.

    Raises:
        InputError: keys are missing, left over, or have another shape than the configuration says.
    """
    with torch.device("meta"):
        expected = VidLaDAForMaskedDiffusion(checkpoint.config).state_dict()
    found: dict[str, tuple[str, Entry]] = {}
    missing, misshaped = [], []
    for key, tensor in expected.items():
        name, entries = tensor_name(checkpoint.layout, key), checkpoint.entries
        if checkpoint.tower and key.startswith("vision.tower."):
            name, entries = TOWER_PREFIX + key.removeprefix("vision.tower."), checkpoint.tower
        if name not in entries:
            missing.append(name)
        elif entries[name].shape != tuple(tensor.shape):
            misshaped.append(f"{name} is {list(entries[name].shape)}, not {list(tensor.shape)}")
        else:
            found[key] = (name, entries[name])
    used = {name for name, _ in found.values()}
    extra = [k for k in checkpoint.entries if k not in used and not is_unused(checkpoint.layout, k, checkpoint.config)]
    extra = [] if misshaped else extra
    problems = [
        f"{what} {', '.join(keys[:MOST_NAMED_KEYS])}"
        + (f" and {len(keys) - MOST_NAMED_KEYS} more" if len(keys) > MOST_NAMED_KEYS else "")
        for what, keys in (("missing keys:", missing), ("wrong shapes:", misshaped), ("unknown keys:", extra))
        if keys
    ]
    if problems:
        raise InputError(f"{checkpoint.folder}: the weights do not fit the configuration: {'; '.join(problems)}")
    return found


def weights_type(dtype: str | torch.dtype) -> torch.dtype | None:
    """A type of weights by its name; None for `auto`, the stored one; `InputError` if there is no such type."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("auto", *WEIGHT_TYPES):
        raise InputError(f"unknown type of weights {dtype!r}; use auto, {' or '.join(WEIGHT_TYPES)}")
    return None if dtype == "auto" else getattr(torch, dtype)


def load_model(
    folder: Path, dtype: str | torch.dtype = "auto", device: str | None = None, device_map: Any = None,
    checkpoint: Checkpoint | None = None,
) -> VidLaDAForMaskedDiffusion:  # fmt: skip
    """Load a checkpoint of any layout. The weights are read shard by shard into one copy.

    Args:
        folder: of the checkpoint, or of a LoRA adapter, which is merged into its base.
        dtype: of the weights; `auto` keeps the stored type.
        device: where to put it; the CPU by default.
        device_map: as in transformers, to spread it over devices; excludes `device`.
        checkpoint: what `describe` found in the folder, where that is known; else it is read.

    Raises:
        InputError: the folder is not a checkpoint of this family, or a tensor is missing, unknown or mis-shaped.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return load_with_adapter(folder, dtype=dtype, device=device, device_map=device_map, checkpoint=checkpoint)
    checkpoint = checkpoint or describe(folder)
    places = sources(checkpoint)
    inside = {key: name for key, (name, entry) in places.items() if entry.file.parent == folder}
    model = VidLaDAForMaskedDiffusion.from_pretrained(
        folder,
        config=checkpoint.config,
        key_mapping={f"^{re.escape(name)}$": key for key, name in inside.items() if name != key},
        dtype=weights_type(dtype) or "auto",
        device_map=device_map or device,
        local_files_only=True,
    )
    # transformers would write the layout it read; `save_pretrained` always writes ours
    model._weight_conversions = None
    if checkpoint.tower:
        tower = model.vision.tower
        parameter = next(tower.parameters())
        values = {key.removeprefix("vision.tower."): places[key] for key in places if key.startswith("vision.tower.")}
        tensors = read_tensors({key: (name, entry) for key, (name, entry) in values.items()})
        tower.load_state_dict({key: tensor.to(parameter.device, parameter.dtype) for key, tensor in tensors})
    return model


def read_tensors(places: dict[str, tuple[str, Entry]]) -> Iterator[tuple[str, Tensor]]:
    """Values one after another, file by file."""
    for file in sorted({entry.file for _, entry in places.values()}):
        with safe_open(file, "pt") as tensors:
            for key, (name, entry) in places.items():
                if entry.file == file:
                    yield key, tensors.get_tensor(name)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer stored beside the weights.

    Raises:
        InputError: there is none.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json; copy the tokenizer's files there")
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def load_with_adapter(
    folder: Path, dtype: str | torch.dtype = "auto", base_folder: Path | None = None, **places: Any
) -> VidLaDAForMaskedDiffusion:
    """The base model with an adapter merged into its weights: as fast as the base model.

    Args:
        folder: of the adapter.
        dtype: of the weights.
        base_folder: of the base model; by default the one the adapter names.
        places: `device`, `device_map`, `checkpoint` (of the base) of `vidlada.checkpoint.load.load_model`.

    Raises:
        InputError: the adapter or its base is missing or damaged, or peft is not installed.
    """
    base = load_model(base_folder or base_of(folder), dtype=dtype, **places)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{folder} is an adapter; it needs peft: pip install vidlada[train]") from error
    try:
        with quiet_libraries():
            adapted = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: does not fit its base model: {str(error).splitlines()[0]}") from error
    merged: VidLaDAForMaskedDiffusion = adapted.merge_and_unload()
    return merged


def save_model(
    model: Any, processor: VidLaDAProcessor, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Weights (of the adapters alone, if there are any), configuration and processor, as `vidlada.load` reads them.

    Args:
        model: unwrapped.
        processor: of the model.
        folder: new.
        state_dict: the weights, where the model does not hold them whole.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)
