"""The published namings of tensors and configurations, and how they map to ours.

Layouts:
- `vidlada`: ours, as `save_pretrained` writes it;
- `published`: VidLaDA-8B and LLaDA-V, a Llama-style naming with `model.vision_tower`, `model.mm_projector`;
- `llada`: the text-only ancestor LLaDA-8B, with its `model.transformer.blocks` naming.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import SiglipVisionConfig

from vidlada.errors import InputError
from vidlada.model.config import VidLaDAConfig

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


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: where it stands, its shape and type, without its values."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


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
        image_aspect_ratio=published.get("image_aspect_ratio") or "anyres_max_4",
        image_grid_pinpoints=published.get("image_grid_pinpoints"),
        image_merge_type=published.get("mm_patch_merge_type") or "spatial_unpad",
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
        "mm_patch_merge_type": config.image_merge_type,
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": config.image_grid_pinpoints,
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


def tensor_name(layout: Layout, key: str) -> str:
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
