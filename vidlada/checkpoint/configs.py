"""The config.json of every layout, read into ours.

Sizes come from the tensors where these say them; what a file says besides is checked against them. A value that
changes what the model computes in a way that is not implemented here is refused; everything else that a file holds is
kept in `VidLaDAConfig.source`, and written again by a conversion back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from vidlada import files
from vidlada.checkpoint.layouts import LAYER_PREFIXES, Entry, Layout, count_layers, tensor_name, tower_prefix
from vidlada.checkpoint.tower import (
    TOWER_FOLDER_VARIABLE,
    cut,
    stored_tower,
    tower_inside,
    vision_arguments,
)
from vidlada.checkpoint.values import ConfigValues
from vidlada.errors import InputError
from vidlada.messages import BOS, END_HEADER, END_OF_TEXT, END_OF_TURN, MASK, START_HEADER
from vidlada.model.config import NewlinePosition, PoolMode, VidLaDAConfig

TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "initializer_range",
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
    "initializer_range": "init_std",
}
# What the other layouts' config.json has no place for: an entry of its own in the files that we write.
OURS = "vidlada"
OWN_FIELDS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "suppressed_token_ids", "stop_token_ids",
    "spatial_pool_stride", "spatial_pool_mode", "newline_position", "video_token_id", "max_length", "system_message",
    "multi_turn", "generation", "image_aspect_ratio", "image_grid_pinpoints", "image_merge_type",
)  # fmt: skip
ALL_PINPOINTS = "(1x1),...,(6x6)"  # as the published training script writes the default ones
# of a source's config.json: they name files or programs that a conversion does not carry along
NOT_KEPT = ("auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype", OURS)
MERGE_TYPES = ("spatial_unpad", "spatial", "flat")


@dataclass(frozen=True)
class Weights:
    """The tensors that a configuration has to fit.

    Attributes:
        folder: of the checkpoint.
        layout: of its names.
        sees: it has a visual half.
        entries: its tensors.
        tokens: ids of the tokens that its tokenizer adds by name; empty without a tokenizer.
        tower_folder: of its vision tower by itself, where the configuration names one that is on this machine.
    """

    folder: Path
    layout: Layout
    sees: bool
    entries: dict[str, Entry]
    tokens: dict[str, int]
    tower_folder: Path | None

    @property
    def tower_inside(self) -> bool:
        """Whether the checkpoint itself holds the vision tower."""
        prefix = tower_prefix(self.layout)
        return any(key.startswith(prefix) for key in self.entries)


def read_config(stored: ConfigValues, weights: Weights) -> VidLaDAConfig:
    """Read the configuration of a checkpoint.

    Args:
        stored: its config.json.
        weights: that it goes with.

    Raises:
        InputError: a value is none of its field's, does not fit the weights, or asks for what is not implemented.
    """
    readers: dict[Layout, Callable[[ConfigValues, Weights], dict[str, Any]]] = {
        "vidlada": _read_vidlada,
        "published": _read_published,
        "llada": _read_llada,
    }
    stored.refuse_unless("quantization_config")
    arguments = readers[weights.layout](stored, weights)
    try:
        config = VidLaDAConfig(**arguments, text_only=not weights.sees)
    except InputError as error:
        raise InputError(f"{stored.place}: {error}") from error
    except Exception as error:  # what transformers' classes raise for values they cannot use is not one kind
        raise InputError(f"{stored.place}: {' '.join(str(error).split())}") from error
    if weights.sees and not 1 <= config.spatial_pool_stride <= config.patches_per_side:
        raise InputError(f"{stored.place}: spatial_pool_stride {config.spatial_pool_stride} does not fit the frames' "
                         f"{config.patches_per_side} patches a side")  # fmt: skip
    vocabulary = config.text.vocab_size
    ids = {"mask_token_id": [config.mask_token_id], "suppressed_token_ids": config.suppressed_token_ids,
           "stop_token_ids": config.stop_token_ids}  # fmt: skip
    for name, values in ids.items():
        if any(not 0 <= value < vocabulary for value in values):
            raise InputError(f"{stored.place}: {name} {list(values)} is not within the {vocabulary} tokens")
    return config


def _read_vidlada(stored: ConfigValues, weights: Weights) -> dict[str, Any]:
    names = {name: name for name in TEXT_FIELDS}
    arguments = {
        "text_config": _read_text(stored.inner("text_config"), names, weights),
        "tie_word_embeddings": _is_tied(stored, "tie_word_embeddings", weights),
        **_own_settings(stored),
    }
    if weights.sees:
        arguments["vision_config"] = vision_arguments(stored.inner("vision_config"))
    if "source" in stored:
        arguments["source"] = dict(stored.inner("source").values)
    return arguments


def _read_published(stored: ConfigValues, weights: Weights) -> dict[str, Any]:
    stored.refuse_unless("hidden_act", "silu", "swish")
    for name in ("attention_bias", "mlp_bias"):
        stored.refuse_unless(name, False, 0)
    names = {name: name for name in TEXT_FIELDS}
    text = _read_text(stored, names, weights)
    _check_rotary(stored, text)
    arguments = {
        "text_config": text,
        "tie_word_embeddings": _is_tied(stored, "tie_word_embeddings", weights),
        "max_length": stored.length("tokenizer_model_max_length", 32768),
        "source": _unused_fields(stored, "published"),
    }
    own = stored.inner(OURS)
    if weights.sees:
        arguments |= _read_visual(stored)
        own_tower = "vision_config" in own  # written by us: the tower as it is kept
        arguments["vision_config"] = (
            vision_arguments(own.inner("vision_config")) if own_tower else _read_tower(stored, weights)
        )
    else:
        arguments["system_message"] = ""
    return arguments | _role_tokens(stored, own, weights, text["vocab_size"]) | _own_settings(own)


def _read_visual(stored: ConfigValues) -> dict[str, Any]:
    """How visual tokens are laid out. The published code pools with stride 2 whatever mm_spatial_pool_stride says."""
    stored.refuse_unless("mm_projector_type", "mlp2x_gelu")
    stored.refuse_unless("mm_resampler_type", "identity")
    for name in ("add_faster_video", "mm_use_im_start_end"):
        stored.refuse_unless(name, False, 0)
    newline = stored.choice("mm_newline_position", get_args(NewlinePosition), "grid")
    merge_type = stored.choice("mm_patch_merge_type", MERGE_TYPES, "spatial_unpad")
    return {
        "image_aspect_ratio": stored.text("image_aspect_ratio", "anyres_max_4"),
        "image_grid_pinpoints": _pinpoints(stored),
        "image_merge_type": merge_type,
        "spatial_pool_mode": stored.choice("mm_spatial_pool_mode", get_args(PoolMode), "bilinear"),
        "newline_position": "no_token" if merge_type == "flat" else newline,
    }


def _pinpoints(stored: ConfigValues) -> list[list[int]] | None:
    """The resolutions images are tiled to; None for the default ones."""
    name = "image_grid_pinpoints"
    values = stored.values.get(name)
    if values is None or values == ALL_PINPOINTS:
        return None
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(pair, list) and len(pair) == 2 for pair in values)
    ):
        raise stored.error(name, "it must be a list of [width, height]")
    if not all(isinstance(side, int) and 0 < side < 2**20 for pair in values for side in pair):
        raise stored.error(name, "it must be a list of [width, height] in pixels")
    return values


def _read_tower(stored: ConfigValues, weights: Weights) -> dict[str, Any]:
    """Arguments of SiglipVisionConfig for the tower without its last layer."""
    own = None if weights.tower_folder is None else stored_tower(read_json(weights.tower_folder / "config.json"))
    if weights.tower_inside:
        return tower_inside(weights.folder, weights.entries, own)
    if own is None:
        raise InputError(
            f"{weights.folder}: the checkpoint holds no vision tower, and {stored.text('mm_vision_tower') or 'none'} "
            f"was not found; put its folder under ${TOWER_FOLDER_VARIABLE}"
        )
    return cut(own)


def _read_llada(stored: ConfigValues, weights: Weights) -> dict[str, Any]:
    stored.refuse_unless("activation_type", "silu", "swiglu")
    stored.refuse_unless("block_type", "llama")
    stored.refuse_unless("layer_norm_type", "rms")
    stored.refuse_unless("rope", True, 1)
    stored.refuse_unless("block_group_size", 1)
    stored.refuse_unless("clip_qkv")
    for name in ("alibi", "include_bias", "include_qkv_bias", "attention_layer_norm", "scale_logits", "input_emb_norm"):
        stored.refuse_unless(name, False, 0)
    names = LLADA_FIELDS
    if stored.flag("multi_query_attention") and "n_kv_heads" not in stored:
        stored = ConfigValues({**stored.values, "n_kv_heads": 1}, stored.place)
    text = _read_text(stored, names, weights)
    _check_rotary(stored, text)
    return {
        "text_config": text,
        "system_message": "",
        "tie_word_embeddings": _is_tied(stored, "weight_tying", weights),
        "source": _unused_fields(stored, "llada"),
        **_role_tokens(stored, stored.inner(OURS), weights, text["vocab_size"]),
        **_own_settings(stored.inner(OURS)),
    }


def _read_text(stored: ConfigValues, names: dict[str, str], weights: Weights) -> dict[str, Any]:
    """Arguments of `VidLaDATextConfig`.

    Args:
        stored: the file's fields.
        names: what the file calls ours.
        weights: for the sizes.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        name = tensor_name(weights.layout, key)
        if name not in weights.entries:
            raise InputError(f"{weights.folder}: the weights do not fit the configuration: missing keys: {name}")
        found = weights.entries[name].shape
        if len(found) != dimensions or 0 in found:
            raise InputError(f"{weights.folder}: wrong shapes: {name} is {list(found)}")
        return found

    vocabulary, width = shape("language_model.embed_tokens.weight", 2)
    found = {
        "hidden_size": width,
        "intermediate_size": shape("language_model.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": count_layers(weights.entries, LAYER_PREFIXES[weights.layout]),
    }
    text: dict[str, Any] = {"vocab_size": vocabulary}
    for name, size in found.items():
        stated = stored.integer(names[name], size)
        # more layers in the file than it says are unknown keys, which are named where the keys are compared
        if stated != size and not (name == "num_hidden_layers" and stated < size):
            raise InputError(f"{stored.place}: {names[name]} is {stated}, but the weights' is {size}")
        text[name] = stated
    heads = stored.optional_integer(names["num_attention_heads"])
    if heads is None:
        raise stored.error(names["num_attention_heads"], "the weights do not tell it, so it must be there")
    text["num_attention_heads"] = heads
    text["num_key_value_heads"] = stored.integer(names["num_key_value_heads"], heads)
    if stored.integer("head_dim", width // heads) != width // heads:
        raise stored.error("head_dim", f"only hidden size / heads is implemented, {width // heads}")
    defaults = VidLaDAConfig().text
    text["max_position_embeddings"] = stored.length(names["max_position_embeddings"], defaults.max_position_embeddings)
    for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
        text[name] = stored.number(names[name], getattr(defaults, name))
    return text


def _check_rotary(stored: ConfigValues, text: dict[str, Any]) -> None:
    """Plain rotary positions, as transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes them."""
    for field in ("rope_scaling", "rope_parameters"):
        if not stored.values.get(field):  # absent, null, or an empty object
            stored.refuse_unless(field, {})
            continue
        rotary = stored.inner(field)
        plain = set(rotary.values) <= {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        kinds = [rotary.values.get(name) for name in ("rope_type", "type")]
        part = rotary.values.get("partial_rotary_factor")
        if not plain or any(kind not in (None, "default") for kind in kinds) or part not in (None, 1):
            raise stored.error(field, "scaled rotary positions are not implemented")
        if "rope_theta" in rotary and "rope_theta" not in stored:
            text["rope_theta"] = rotary.number("rope_theta", text["rope_theta"])


def _is_tied(stored: ConfigValues, name: str, weights: Weights) -> bool:
    """Whether the output head is the embedding: where the file says so and holds no head of its own."""
    return stored.flag(name) and tensor_name(weights.layout, "lm_head.weight") not in weights.entries


def _own_settings(stored: ConfigValues) -> dict[str, Any]:
    """The arguments of `VidLaDAConfig` beside the two networks, as far as the fields are there."""
    default = VidLaDAConfig()
    settings: dict[str, Any] = {}
    for name in OWN_FIELDS:
        if name not in stored.values:
            continue
        if name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            settings[name] = next(iter(stored.integers(name)), None)
        elif name in ("suppressed_token_ids", "stop_token_ids"):
            settings[name] = stored.integers(name, getattr(default, name))
        elif name == "spatial_pool_mode":
            settings[name] = stored.choice(name, get_args(PoolMode), default.spatial_pool_mode)
        elif name == "newline_position":
            settings[name] = stored.choice(name, get_args(NewlinePosition), default.newline_position)
        elif name == "image_merge_type":
            settings[name] = stored.choice(name, MERGE_TYPES, default.image_merge_type)
        elif name == "image_grid_pinpoints":
            settings[name] = _pinpoints(stored)
        elif name in ("system_message", "image_aspect_ratio"):
            settings[name] = stored.text(name, getattr(default, name))
        elif name == "multi_turn":
            settings[name] = stored.flag(name, default.multi_turn)
        elif name == "generation":
            settings[name] = dict(stored.inner(name).values)
        elif name == "video_token_id":
            settings[name] = next(iter(stored.integers(name)), default.video_token_id)
            if settings[name] >= 0:
                raise stored.error(name, "it must be negative: it is no token of the vocabulary")
        elif name == "mask_token_id":
            settings[name] = stored.integer(name, default.mask_token_id, least=0)
        elif name == "max_length":
            settings[name] = stored.length(name, default.max_length)
        else:
            settings[name] = stored.integer(name, getattr(default, name))
    return settings


def _role_tokens(stored: ConfigValues, own: ConfigValues, weights: Weights, vocabulary: int) -> dict[str, Any]:
    """The tokens with a role: as config.json names them, else the tokenizer, else the published tokenizer.

    Ids outside of the vocabulary are passed over: the published config.json has such a bos_token_id.

    Raises:
        InputError: nothing names the mask token.
    """
    default = VidLaDAConfig()
    bos, end_of_text = default.bos_token_id, default.eos_token_id
    *_, start, end = default.suppressed_token_ids

    def first(token: str, published: int | None, field: str | None = None) -> int | None:
        stated = stored.integers(field)[:1] if field is not None else []
        found = [*stated, *([weights.tokens[token]] if token in weights.tokens else []), published]
        return next((number for number in found if number is not None and 0 <= number < vocabulary), None)

    eos = first(END_OF_TEXT, end_of_text, "eos_token_id")
    ids = {
        "bos_token_id": first(BOS, bos, "bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": first(END_OF_TEXT, eos, "pad_token_id"),
        "mask_token_id": first(MASK, default.mask_token_id, "mask_token_id"),
    }
    if ids["mask_token_id"] is None and "mask_token_id" not in own:
        raise InputError(
            f"{stored.place}: no mask_token_id within the {vocabulary} tokens, and no tokenizer.json that has {MASK}"
        )
    suppressed = (eos, ids["bos_token_id"], first(START_HEADER, start), first(END_HEADER, end))
    stop = first(END_OF_TURN, default.stop_token_ids[0])
    return {
        **ids,
        "suppressed_token_ids": [number for number in suppressed if number is not None],
        "stop_token_ids": [] if stop is None else [stop],
    }


def _unused_fields(stored: ConfigValues, layout: Layout) -> dict[str, Any]:
    """Return the part of a config.json that `VidLaDAConfig.source` keeps."""
    return {"layout": layout, "config": {key: v for key, v in stored.values.items() if key not in NOT_KEPT}}


def read_json(path: Path) -> ConfigValues:
    """The JSON object in a file of a model folder.

    Raises:
        InputError: there is no such file, or it holds anything else.
    """
    if not path.is_file():
        raise InputError(f"{path.parent}: no {path.name}; this is not a model folder")
    values = files.read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold one JSON object")
    return ConfigValues(values, str(path))
