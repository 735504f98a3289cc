"""Checkpoint folders: what they hold, loading them, and converting between the layouts.

Layouts:
- `vidlada`: ours, as `save_pretrained` writes it;
- `published`: VidLaDA-8B and LLaDA-V, a Llama-style naming with `model.vision_tower`, `model.mm_projector`;
- `llada`: the text-only ancestor LLaDA-8B, with its `model.transformer.blocks` naming.

Only safetensors are read: other formats can run code when opened.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, SiglipVisionConfig

from vidlada.config import VidLaDAConfig
from vidlada.errors import InputError
from vidlada.model import VidLaDAForMaskedDiffusion

Layout = Literal["vidlada", "published", "llada"]

# Ours → theirs. In the published layout everything else keeps its name.
PUBLISHED_PREFIXES = {
    "vision.tower.": "model.vision_tower.vision_tower.vision_model.",
    "vision.projector.": "model.mm_projector.",
    "vision.newline": "model.image_newline",
    "language_model.": "model.",
}
LLADA_NAMES = {
    "lm_head": "model.transformer.ff_out",
    "language_model.embed_tokens": "model.transformer.wte",
    "language_model.norm": "model.transformer.ln_f",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range",
)  # fmt: skip
# What the published config.json has no place for: an entry of its own in the files that we write.
OURS = "vidlada"
OWN_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "suppressed_token_ids", "stop_token_ids",
    "system_message", "multi_turn", "generation",
)  # fmt: skip
LLADA_FIELDS = {
    "vocab_size": "embedding_size",
    "hidden_size": "d_model",
    "intermediate_size": "mlp_hidden_size",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}
TOWER_PREFIX = "vision_model."  # of a vision tower in a folder of its own
TOWER_FOLDER_VARIABLE = "VISION_TOWER_CACHE_DIR"
SIGLIP_HEAD_DIM = 72  # of the so400m tower, whose head count no published config records
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_TYPES = ("float32", "bfloat16", "float16")
MOST_NAMED_KEYS = 5  # an error names this many keys and counts the rest


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: where it stands, its shape and type, without its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


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


def config_from_published(published: dict[str, Any], vision: dict[str, Any]) -> VidLaDAConfig:
    """Our configuration of a VidLaDA or LLaDA-V checkpoint.

    Args:
        published: its config.json.
        vision: arguments of SiglipVisionConfig for the tower as kept.
    """
    return VidLaDAConfig(
        text_config={name: published[name] for name in TEXT_FIELDS if published.get(name) is not None},
        vision_config={**vision, "vision_use_head": False},
        # the published code pools with stride 2 whatever mm_spatial_pool_stride says
        spatial_pool_mode=published.get("mm_spatial_pool_mode", "bilinear"),
        newline_position=published.get("mm_newline_position", "grid"),
        max_length=published.get("tokenizer_model_max_length") or 32768,
        **published.get(OURS, {}),
    )


def tower_arguments(stored: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SiglipVisionConfig from a tower's own config.json, less the last layer, which is never used."""
    vision = {name: value for name, value in stored.get("vision_config", stored).items() if name != "model_type"}
    config = SiglipVisionConfig(**vision)  # fills in what the file leaves to the defaults
    return {**vision, "num_hidden_layers": config.num_hidden_layers - 1}


def tower_shape(folder: Path, entries: dict[str, Entry], stored: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SiglipVisionConfig for the tower inside a published checkpoint.

    Its shape is read from the tensors, since published configs do not record it; the number of heads from the
    tower's own config.json if there is one, else it is the so400m tower's.
    """
    prefix = PUBLISHED_PREFIXES["vision.tower."]
    names = ("embeddings.patch_embedding.weight", "embeddings.position_embedding.weight",
             "encoder.layers.0.mlp.fc1.weight")  # fmt: skip
    patch, position, mlp = (entries.get(prefix + name) for name in names)
    if patch is None or position is None or mlp is None:
        raise InputError(f"{folder}: the vision tower is incomplete; {', '.join(names)} are needed below {prefix}")
    width, _, patch_size, _ = patch.shape
    layers = {key.split(".layers.")[1].split(".")[0] for key in entries if key.startswith(prefix) and ".layers." in key}
    if stored:
        heads = SiglipVisionConfig(**tower_arguments(stored)).num_attention_heads
    elif width % SIGLIP_HEAD_DIM == 0:
        heads = width // SIGLIP_HEAD_DIM
    else:
        raise InputError(
            f"{folder}: no config says how many heads its vision tower of width {width} has; "
            f"put the tower's folder with its config.json under ${TOWER_FOLDER_VARIABLE}"
        )
    return {
        "hidden_size": width,
        "intermediate_size": mlp.shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": heads,
        "patch_size": patch_size,
        "image_size": _published_image_size(patch_size, position.shape[0]),
    }


def _published_image_size(patch_size: int, patches: int) -> int:
    """384 for the published tower, whose 27 patches of 14 leave 6 pixels over; else the patches' own extent."""
    side = int(patches**0.5)
    return 384 if 384 // patch_size == side else side * patch_size


def config_from_llada(llada: dict[str, Any]) -> VidLaDAConfig:
    """Our configuration of a text-only LLaDA checkpoint: no vision at all."""
    text = {ours: llada[theirs] for ours, theirs in LLADA_FIELDS.items() if llada.get(theirs) is not None}
    text.setdefault("num_key_value_heads", text.get("num_attention_heads", 32))
    return VidLaDAConfig(text_config=text, text_only=True, system_message="")


def published_config(config: VidLaDAConfig) -> dict[str, Any]:
    """The config.json of the published layout."""
    text = config.text_config
    return {
        "architectures": ["LlavaLLaDAVideoModelLM"],
        "model_type": "llava_llada_video",
        **{name: getattr(text, name) for name in TEXT_FIELDS},
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        OURS: {name: getattr(config, name) for name in OWN_FIELDS},
        "mm_vision_tower": "google/siglip2-so400m-patch14-384",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,  # type: ignore[union-attr]
        "mm_vision_select_layer": -2,
        "mm_spatial_pool_stride": config.spatial_pool_stride,
        "mm_spatial_pool_mode": config.spatial_pool_mode,
        "mm_newline_position": config.newline_position,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_4",
        "tokenizer_model_max_length": config.max_length,
        "use_cache": False,
    }


def llada_config(config: VidLaDAConfig) -> dict[str, Any]:
    """The config.json of the text-only layout."""
    text = config.text_config
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **{theirs: getattr(text, ours) for ours, theirs in LLADA_FIELDS.items()},
        "vocab_size": text.vocab_size,  # type: ignore[union-attr]
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "include_bias": False,
        "weight_tying": False,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "mask_token_id": config.mask_token_id,
    }


def name_in(layout: Layout, key: str) -> str:
    """How a layout calls our tensor `key`."""
    if layout == "published":
        for ours, theirs in PUBLISHED_PREFIXES.items():
            if key.startswith(ours):
                return theirs + key.removeprefix(ours)
    if layout == "llada":
        found = re.fullmatch(r"(language_model\.layers\.(\d+)\.)?(.+)\.weight", key)
        assert found is not None
        block = "" if found[1] is None else f"model.transformer.blocks.{found[2]}."
        return f"{block}{LLADA_NAMES[found[3]]}.weight"
    return key


def is_unused(layout: Layout, key: str, config: VidLaDAConfig) -> bool:
    """Whether a tensor belongs to what the published model never runs: the tower's last layer and pooling head."""
    prefix = {"published": PUBLISHED_PREFIXES["vision.tower."], "llada": None}.get(layout, TOWER_PREFIX)
    if prefix is None or not key.startswith(prefix):
        return False
    rest = key.removeprefix(prefix)
    layer = re.match(r"encoder\.layers\.(\d+)\.", rest)
    kept = config.vision_config.num_hidden_layers  # type: ignore[union-attr]
    return rest.startswith("head.") or (layer is not None and int(layer[1]) >= int(kept))


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
        name, entries = name_in(checkpoint.layout, key), checkpoint.entries
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
        from vidlada.adapter import load_with_adapter

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


def convert(source: Path, target: Path, layout: Layout) -> None:
    """Write a checkpoint in another layout; values are not changed. Memory stays near one shard.

    Args:
        source: folder of any layout.
        target: new or empty folder; it appears only when complete.
        layout: to write.

    Raises:
        InputError: the source is unusable, the target is in use, or the layout cannot hold the model.
    """
    if layout not in get_args(Layout):
        raise InputError(f"unknown layout {layout!r}; use one of {', '.join(get_args(Layout))}")
    if (source / ADAPTER_CONFIG).is_file():
        raise InputError(f"{source} is an adapter; write the whole model first: vidlada merge {source} NEW")
    checkpoint = describe(source)
    if (layout == "llada") != checkpoint.config.text_only and layout != "vidlada":
        held = "no vision" if checkpoint.config.text_only else "a vision tower"
        raise InputError(f"{source} has {held}; the {layout} layout cannot hold that")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in use; give a new folder")
    places = sources(checkpoint)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        raise InputError(f"{partial} is left from an interrupted conversion; remove it and try again")
    partial.mkdir(parents=True)
    write_shards(partial, places, layout)
    if layout == "vidlada":
        checkpoint.config.architectures = [VidLaDAForMaskedDiffusion.__name__]
        checkpoint.config.save_pretrained(partial)
    else:
        values = published_config(checkpoint.config) if layout == "published" else llada_config(checkpoint.config)
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for file in tokenizer_files(source):
        shutil.copy(file, partial / file.name)
    if target.exists():
        target.rmdir()
    partial.replace(target)


def write_shards(folder: Path, places: dict[str, tuple[str, Entry]], layout: Layout) -> None:
    """Write tensors under a layout's names, one file for every file they come from, and the index."""
    files = sorted({entry.file for _, entry in places.values()})
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        own = {key: place for key, place in places.items() if place[1].file == file}
        tensors = {name_in(layout, key): tensor for key, tensor in read_tensors(own)}
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def tokenizer_files(folder: Path) -> Iterable[Path]:
    """The files of a tokenizer and processor, where present."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
             "processor_config.json")  # fmt: skip
    return [folder / name for name in names if (folder / name).is_file()]
