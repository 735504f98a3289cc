"""The config.json of the published and the text-only layout, written from ours."""

from typing import Any

from vidlada.checkpoint.configs import LLADA_FIELDS, OURS, OWN_FIELDS, TEXT_FIELDS
from vidlada.checkpoint.layouts import Layout
from vidlada.checkpoint.tower import SO400M, SO400M_NAME, VISION_FIELDS
from vidlada.model.config import VidLaDAConfig

TORCH_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def config_for_layout(config: VidLaDAConfig, layout: Layout, dtype: str) -> dict[str, Any]:
    """The config.json of the published or the text-only layout.

    Fields of the file that the model came from stay as they were; what we compute with is written over them.

    Args:
        config: ours.
        layout: `published` or `llada`.
        dtype: of the weights, as safetensors spells it.
    """
    source = config.source or {}
    kept = source.get("config", {}) if source.get("layout") == layout else {}
    defaults, ours = (_published_fields if layout == "published" else _llada_fields)(config)
    own: dict[str, Any] = {name: getattr(config, name) for name in OWN_FIELDS}
    if not config.text_only:
        own["vision_config"] = {name: getattr(config.vision, name) for name in VISION_FIELDS}
    return {**defaults, **kept, **ours, "torch_dtype": TORCH_NAMES.get(dtype, "float32"), OURS: own}


def _published_fields(config: VidLaDAConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defaults for a model that came from elsewhere, and the fields we compute with."""
    defaults: dict[str, Any] = {
        "architectures": ["LLaDAModelLM" if config.text_only else "LlavaLLaDAVideoModelLM"],
        "model_type": "llada" if config.text_only else "llava_llada_video",
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "use_cache": False,
    }
    ours: dict[str, Any] = {
        **{name: getattr(config.text, name) for name in TEXT_FIELDS},
        "tie_word_embeddings": config.tie_word_embeddings,
        "tokenizer_model_max_length": config.max_length,
    }
    if config.text_only:
        return defaults, ours
    shape = {name: getattr(config.vision, name) for name in SO400M}
    defaults |= {
        **({"mm_vision_tower": SO400M_NAME} if shape == SO400M else {}),
        "mm_vision_select_layer": -2,
        "mm_spatial_pool_stride": config.spatial_pool_stride,
    }
    ours |= {
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision.hidden_size,
        "mm_spatial_pool_mode": config.spatial_pool_mode,
        "mm_newline_position": config.newline_position,
        "mm_patch_merge_type": config.image_merge_type,
        "image_aspect_ratio": config.image_aspect_ratio,
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }
    return defaults, ours


def _llada_fields(config: VidLaDAConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defaults for a model that came from elsewhere, and the fields we compute with."""
    defaults = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "include_bias": False,
    }
    ours = {
        **{theirs: getattr(config.text, ours) for ours, theirs in LLADA_FIELDS.items()},
        "vocab_size": config.text.vocab_size,
        "weight_tying": config.tie_word_embeddings,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "mask_token_id": config.mask_token_id,
    }
    return defaults, ours
