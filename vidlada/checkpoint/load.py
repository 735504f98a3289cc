"""Describe, load and save checkpoint folders."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vidlada.checkpoint.configs import Weights, read_config, read_json
from vidlada.checkpoint.layouts import (
    TOWER_PREFIX,
    Entry,
    Layout,
    is_unused,
    layout_of,
    may_be_missing,
    tensor_name,
    tower_prefix,
)
from vidlada.checkpoint.tensors import DTYPES, PICKLED, read_entries, read_tensors
from vidlada.checkpoint.tower import find_tower
from vidlada.checkpoint.values import ConfigValues
from vidlada.errors import InputError
from vidlada.files import write_text
from vidlada.messages import END_OF_TEXT
from vidlada.model.config import VidLaDAConfig
from vidlada.model.hub import SHIPPED, is_hub_name, local_folder, model_folder
from vidlada.model.language_model import Layer
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.noise import quiet_libraries
from vidlada.processor import VidLaDAProcessor

ADAPTER_CONFIG = "adapter_config.json"
REMOTE_CODE = "modeling_vidlada.py"
AUTO_MAP = {
    "AutoConfig": "modeling_vidlada.VidLaDAConfig",
    "AutoModel": "modeling_vidlada.VidLaDAForMaskedDiffusion",
    "AutoModelForImageTextToText": "modeling_vidlada.VidLaDAForMaskedDiffusion",
    "AutoProcessor": "modeling_vidlada.VidLaDAProcessor",
}
WEIGHT_TYPES = ("float32", "bfloat16", "float16")
MOST_NAMED_KEYS = 5  # an error names this many keys and counts the rest
LOADING_REPORT = "transformers.modeling_utils"  # the logger that lists tensors the model does not use


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, described by its headers.

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
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.count
        return max(sizes, key=lambda name: sizes[name])


def base_of(folder: Path) -> Path:
    """Return the folder of the base model of an adapter, from the hub if needed."""
    named = read_json(folder / ADAPTER_CONFIG).text("base_model_name_or_path")
    if not named:
        raise InputError(f"{folder}: {ADAPTER_CONFIG} names no base model (base_model_name_or_path)")
    for place in (Path(named), folder / named, folder.parent / Path(named).name):
        if _is_file(place / "config.json"):
            return place
    if named == SHIPPED or is_hub_name(named):
        return model_folder(named, what="base model")
    raise InputError(f"{folder}: its base model {named} is not there; put it there, or correct {ADAPTER_CONFIG}")


def _is_file(path: Path) -> bool:
    """Whether a file is there; a path that none can have is not."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def describe(folder: Path) -> Checkpoint:
    """Read a checkpoint folder's configuration and headers.

    Args:
        folder: with config.json and weights; of a LoRA adapter, its base is described.

    Raises:
        InputError: it is not a checkpoint of this family, or files are missing or damaged.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return describe(base_of(folder))
    stored = read_json(folder / "config.json")
    entries = read_entries(folder)
    layout, sees = layout_of(entries, str(folder))
    inside = any(key.startswith(tower_prefix(layout)) for key in entries)
    tower_folder = _tower_folder(folder, stored, inside) if layout == "published" and sees else None
    weights = Weights(folder, layout, sees, entries, _token_ids(folder), tower_folder)
    config = read_config(stored, weights)
    tower = {} if inside or tower_folder is None else read_entries(tower_folder)
    return Checkpoint(folder, layout, config, entries, tower)


def _tower_folder(folder: Path, stored: ConfigValues, inside: bool) -> Path | None:
    """Folder of the tower that a published checkpoint names; from the hub where the checkpoint holds none."""
    name = stored.text("mm_vision_tower")
    found = find_tower(folder, name)
    return local_folder(name, "vision tower") if found is None and not inside and is_hub_name(name) else found


def _token_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokens that a folder's tokenizer adds to its vocabulary, by their text; none without a tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    added = read_json(folder / "tokenizer.json").values.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return {str(token["content"]): token["id"] for token in tokens if isinstance(token.get("id"), int)}


def sources(checkpoint: Checkpoint) -> dict[str, tuple[str, Entry]]:
    """Map every tensor of our model to the name and place of its values.

    Raises:
        InputError: keys are missing, left over, or have another shape than the configuration says.
    """
    try:
        with torch.device("meta"):
            expected = VidLaDAForMaskedDiffusion(checkpoint.config).state_dict()
    except Exception as error:  # of torch and transformers, for values that fit no network
        reason = " ".join(str(error).split())
        raise InputError(f"{checkpoint.folder}: config.json describes no network: {reason}") from error
    found: dict[str, tuple[str, Entry]] = {}
    missing, misshaped = [], []
    for key, tensor in expected.items():
        name, entries = tensor_name(checkpoint.layout, key), checkpoint.entries
        if checkpoint.tower and key.startswith("vision.tower."):
            name, entries = TOWER_PREFIX + key.removeprefix("vision.tower."), checkpoint.tower
        if name not in entries:
            if not may_be_missing(key, checkpoint.config):
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
    """Return the dtype of a name; None for `auto`; `InputError` if there is no such type."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in ("auto", *WEIGHT_TYPES):
        raise InputError(f"unknown type of weights {dtype!r}; use auto, {' or '.join(WEIGHT_TYPES)}")
    return None if dtype == "auto" else getattr(torch, dtype)


def stored_type(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype a checkpoint is stored in; `InputError` if it cannot be loaded."""
    dtype = DTYPES.get(checkpoint.dtype)
    if dtype is None or not dtype.is_floating_point:
        raise InputError(
            f"{checkpoint.folder}: its weights are stored as {checkpoint.dtype}, which is not read; convert them to "
            f"{' or '.join(WEIGHT_TYPES)}"
        )
    return dtype


def load_model(
    folder: Path, dtype: str | torch.dtype = "auto", device: str | None = None, device_map: Any = None,
    checkpoint: Checkpoint | None = None, finish: Callable[[nn.Module], None] | None = None,
) -> VidLaDAForMaskedDiffusion:  # fmt: skip
    """Load a checkpoint of any layout. The weights are read shard by shard into one copy.

    Args:
        folder: of the checkpoint, or of a LoRA adapter, which is merged into its base.
        dtype: of the weights; `auto` keeps the stored type.
        device: where to put it; the CPU by default.
        device_map: as in transformers, to spread it over devices; excludes `device`.
        checkpoint: what `describe` found in the folder, where that is known; else it is read.
        finish: called with every layer of the language model once it is loaded, before the next one is: to make it
            smaller, so that there never is a whole copy as stored.

    Raises:
        InputError: the folder is not a checkpoint of this family, or a tensor is missing, unknown or mis-shaped.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return load_with_adapter(
            folder, dtype=dtype, device=device, device_map=device_map, checkpoint=checkpoint, finish=finish
        )
    checkpoint = checkpoint or describe(folder)
    places = sources(checkpoint)
    inside = {key: name for key, (name, entry) in places.items() if entry.file.parent == folder}
    pickled = any(entry.file.suffix == PICKLED for entry in checkpoint.entries.values())
    one_by_one = finish is not None and device_map is None
    with quiet_libraries(LOADING_REPORT):  # what it would say has been checked
        model = VidLaDAForMaskedDiffusion.from_pretrained(
            folder,
            config=with_one_layer(checkpoint.config) if one_by_one else checkpoint.config,
            key_mapping={f"^{re.escape(name)}$": key for key, name in inside.items() if name != key},
            dtype=weights_type(dtype) or stored_type(checkpoint),
            device_map=device_map or device,
            local_files_only=True,
            use_safetensors=not pickled,
        )
    # transformers would write the layout it read; `save_pretrained` always writes ours
    model._weight_conversions = None
    if checkpoint.tower:
        tower = model.vision.tower
        parameter = next(tower.parameters())
        values = {key.removeprefix("vision.tower."): places[key] for key in places if key.startswith("vision.tower.")}
        tensors = read_tensors({key: (name, entry) for key, (name, entry) in values.items()})
        tower.load_state_dict({key: tensor.to(parameter.device, parameter.dtype) for key, tensor in tensors})
    if one_by_one:
        load_layers(model, checkpoint.config, places, finish)  # type: ignore[arg-type]
    elif finish is not None:
        for layer in model.language_model.layers:
            finish(layer)
    return model


def with_one_layer(config: VidLaDAConfig) -> VidLaDAConfig:
    """A configuration whose language model has a single layer."""
    config = copy.deepcopy(config)
    config.text.num_hidden_layers = 1
    return config


def load_layers(
    model: VidLaDAForMaskedDiffusion,
    config: VidLaDAConfig,
    places: dict[str, tuple[str, Entry]],
    finish: Callable[[nn.Module], None],
) -> None:
    """Add the layers that a model loaded by `with_one_layer` lacks, one after another.

    Args:
        model: with the lowest layer of its language model.
        config: of the whole model.
        places: as of `sources`.
        finish: as of `load_model`.
    """
    language_model = model.language_model
    finish(language_model.layers[0])
    weight = language_model.embed_tokens.weight
    for number in range(1, config.text.num_hidden_layers):
        with torch.device("meta"):
            layer = Layer(config.text)
        prefix = f"language_model.layers.{number}."
        own = {key.removeprefix(prefix): place for key, place in places.items() if key.startswith(prefix)}
        layer.load_state_dict(
            {key: tensor.to(weight.device, weight.dtype) for key, tensor in read_tensors(own)}, assign=True
        )
        language_model.layers.append(layer)
        finish(layer)
    model.config, language_model.config = config, config.text


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored beside the weights.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no tokenizer.json; copy the tokenizer's files there")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of tokenizers, which raises bare exceptions, and of transformers
        raise InputError(f"{folder}: its tokenizer cannot be read: {' '.join(str(error).split())}") from error
    if tokenizer.pad_token_id is None and END_OF_TEXT in tokenizer.get_added_vocab():
        tokenizer.pad_token = END_OF_TEXT
    return tokenizer


def load_with_adapter(
    folder: Path,
    dtype: str | torch.dtype = "auto",
    base_folder: Path | None = None,
    finish: Callable[[nn.Module], None] | None = None,
    **places: Any,
) -> VidLaDAForMaskedDiffusion:
    """Load the base model with an adapter merged into its weights.

    Args:
        folder: of the adapter.
        dtype: of the weights.
        base_folder: of the base model; by default the one the adapter names.
        finish: called with every layer of the language model once the adapter is merged into the whole model.
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
    if finish is not None:
        for layer in merged.language_model.layers:
            finish(layer)
    return merged


def save_model(
    model: Any,
    processor: VidLaDAProcessor,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Weights (of the adapters alone, if there are any), configuration and processor, as `vidlada.load` reads them.

    Args:
        model: unwrapped.
        processor: of the model.
        folder: new.
        state_dict: the weights, where the model does not hold them whole.
        dtype: to write them in; by default as they are.
    """
    if dtype is not None:
        state_dict = cast(model.state_dict() if state_dict is None else state_dict, dtype)
    # peft would look for the base model on the hub, to see whether its embeddings have changed: adapters freeze them
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, state_dict=state_dict, **options)
    if dtype is not None:  # transformers names the type of the model in memory
        config = read_json(folder / "config.json").values
        write_text(folder / "config.json", json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2))
    processor.save_pretrained(folder)
    write_auto_map(folder)


def cast(state_dict: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another type; those that share memory still do."""
    done: dict[tuple[int, torch.Size], Tensor] = {}
    result = {}
    for name, tensor in state_dict.items():
        place = (tensor.data_ptr(), tensor.shape)
        if place not in done:
            done[place] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        result[name] = done[place]
    return result


def write_auto_map(folder: Path) -> None:
    """Let transformers' Auto classes load a folder in our layout with `trust_remote_code=True`, by this package.

    Args:
        folder: with config.json and processor_config.json as far as it has them; an adapter's has none.
    """
    if not (folder / "config.json").is_file():
        return
    shutil.copyfile(Path(__file__).with_name(REMOTE_CODE), folder / REMOTE_CODE)
    for name in ("config.json", "processor_config.json"):
        if (folder / name).is_file():
            values = {**read_json(folder / name).values, "auto_map": AUTO_MAP}
            (folder / name).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
