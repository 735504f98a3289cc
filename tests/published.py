"""Small models with random weights in the published namings, written without the package's own tables."""

import json
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import save_file
from vectors import PREFIXES

LLADA_BLOCK = {
    "self_attn.q_proj": "q_proj", "self_attn.k_proj": "k_proj", "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ff_norm",
}  # fmt: skip
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta",
)  # fmt: skip


def published_key(ours):
    """Our key in the published naming."""
    theirs, prefix = next((theirs, prefix) for theirs, prefix in PREFIXES.items() if ours.startswith(prefix))
    return theirs + ours.removeprefix(prefix)


def published_state(model):
    """Weights in the naming of VidLaDA-8B and LLaDA-V; of a text-only model, of its language model."""
    return {published_key(key): tensor.clone() for key, tensor in model.state_dict().items()}


def llada_state(model):
    """The language model's weights in LLaDA-8B's naming."""
    ours = model.state_dict()
    state = {
        "model.transformer.wte.weight": ours["language_model.embed_tokens.weight"],
        "model.transformer.ln_f.weight": ours["language_model.norm.weight"],
        "model.transformer.ff_out.weight": ours["lm_head.weight"],
    }
    for layer in range(model.config.text.num_hidden_layers):
        for name, theirs in LLADA_BLOCK.items():
            tensor = ours[f"language_model.layers.{layer}.{name}.weight"]
            state[f"model.transformer.blocks.{layer}.{theirs}.weight"] = tensor
    return {key: tensor.clone() for key, tensor in state.items()}


def published_json(config, **changes):
    """A config.json with the fields of the published one, as its training script writes it."""
    values = {
        "architectures": ["LlavaLLaDAVideoModelLM"], "model_type": "llada",
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        **{name: getattr(config.text, name) for name in TEXT_FIELDS},
        "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
        "pretraining_tp": 1, "tie_word_embeddings": False, "bos_token_id": 128000,
        "eos_token_id": config.eos_token_id, "initializer_range": 0.02, "torch_dtype": "float32",
        "transformers_version": "4.43.4", "use_cache": True, "mm_vision_tower": "google/siglip-small",
        "use_mm_proj": True, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": config.vision.hidden_size,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "spatial_unpad",
        "mm_resampler_type": None, "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": None,
        "mm_newline_position": "grid", "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[config.vision.image_size * n for n in sides] for sides in product((1, 2), (1, 2))],
        "image_crop_resolution": None,
        "tokenizer_padding_side": "right", "tokenizer_model_max_length": 32768, "add_faster_video": False,
        "faster_token_stride": 10, "add_time_instruction": True, "force_sample": True, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "mm_vision_tower_lr": 2e-06, "use_pos_skipping": False,
    }  # fmt: skip
    return {**values, **changes}


def llada_json(config, **changes):
    """A config.json with the fields of LLaDA-8B's."""
    text = config.text
    values = {
        "activation_type": "silu", "alibi": False, "architectures": ["LLaDAModelLM"], "attention_layer_norm": False,
        "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": text.hidden_size,
        "embedding_size": text.vocab_size, "eos_token_id": config.eos_token_id, "include_bias": False,
        "include_qkv_bias": False, "init_device": "meta", "init_std": 0.02, "input_emb_norm": False,
        "layer_norm_type": "rms", "mask_token_id": config.mask_token_id, "max_sequence_length": 4096,
        "mlp_hidden_size": text.intermediate_size, "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None,
        "n_heads": text.num_attention_heads, "n_kv_heads": text.num_key_value_heads, "n_layers": text.num_hidden_layers,
        "pad_token_id": config.pad_token_id, "rms_norm_eps": 1e-5, "rope": True, "rope_theta": text.rope_theta,
        "scale_logits": False, "vocab_size": text.vocab_size, "weight_tying": False,
    }  # fmt: skip
    return {**values, **changes}


def write_tower_config(folder, config, **changes):
    """config.json of the vision tower by itself, with the last layer that is never used."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = {name: getattr(config.vision, name) for name in
              ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")}  # fmt: skip
    vision |= {"model_type": "siglip_vision_model", "num_hidden_layers": config.vision.num_hidden_layers + 1}
    (folder / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": {**vision, **changes}}))
    return folder


def write_folder(folder, state, config, shards=1, pickled=False, dtype=None):
    """A checkpoint's weights and config.json."""
    folder.mkdir(parents=True)
    if dtype is not None:
        state = {key: tensor.to(dtype) for key, tensor in state.items()}
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    keys = sorted(state)
    names = [
        f"{stem}-{n + 1:05d}-of-{shards:05d}.{ending}" if shards > 1 else f"{stem}.{ending}" for n in range(shards)
    ]
    for n, name in enumerate(names):
        part = {key: state[key].contiguous() for key in keys[n::shards]}
        if pickled:
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {key: names[number % shards] for number, key in enumerate(keys)}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return Path(folder)
