"""From an autoregressive language model to the start of a masked-diffusion one."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_seed
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from vidlada.errors import InputError
from vidlada.messages import BOS, END_HEADER, END_OF_TEXT, END_OF_TURN, MASK, START_HEADER
from vidlada.model.config import VidLaDAConfig
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor
from vidlada.training.origin import gguf_file
from vidlada.training.tokenizer import role_tokens
from vidlada.training.vocabulary import add_rows

EMBEDDINGS = ("language_model.embed_tokens.weight", "lm_head.weight")
CONTROL_TOKENS = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN, MASK)


def adapt_llama(
    folder: Path, arguments: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32
) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """The same layers without the causal mask, rows for the control tokens added, a new vision half.

    New rows of both embeddings start at the mean of the old ones: a token the model treats as any other.

    Args:
        folder: of the autoregressive model: Hugging Face files, or one GGUF file (needs the gguf package).
        arguments: of `VidLaDAConfig` for everything but the language model; `text_only: true` for no vision.
        seed: of the new weights.
        dtype: of all weights; those of the language model are in memory once.

    Raises:
        InputError: the model has something our layers do not.
    """
    named = {} if gguf_file(folder) is None else {"gguf_file": gguf_file(folder)}
    try:
        source = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, **named)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
    llama = source.config
    check_adaptable(folder, llama)
    tokenizer = adapt_tokenizer(folder)
    rows = max(len(tokenizer), llama.vocab_size)
    config = VidLaDAConfig(
        **{
            **role_tokens(tokenizer),
            "system_message": "",
            "max_length": llama.max_position_embeddings,
            **arguments,
            "text_config": {
                "vocab_size": rows,
                **{name: getattr(llama, name) for name in (
                    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range",
                )},
                "rope_theta": llama.rope_parameters["rope_theta"],
            },
        }
    )  # fmt: skip
    with init_empty_weights(include_buffers=False):
        model = VidLaDAForMaskedDiffusion(config)
    state = {f"language_model.{name}": tensor for name, tensor in source.model.state_dict().items()}
    state["lm_head.weight"] = source.lm_head.weight.detach()
    state |= {name: add_rows(state[name], rows) for name in EMBEDDINGS}
    if not config.text_only:
        state |= new_vision(config, seed, dtype)
    model.load_state_dict(state, assign=True)
    return model, VidLaDAProcessor.from_config(tokenizer, config)


def new_vision(config: VidLaDAConfig, seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights of the vision half, by their names in the model."""
    set_seed(seed)
    small = copy.deepcopy(config)
    small.text.num_hidden_layers = 0
    small.text.vocab_size = 1
    vision = VidLaDAForMaskedDiffusion(small).vision.to(dtype)
    return {f"vision.{name}": tensor for name, tensor in vision.state_dict().items()}


def check_adaptable(folder: Path, llama: Any) -> None:
    """`InputError` if the model has something our layers do not."""
    problems = {
        "attention biases": getattr(llama, "attention_bias", False),
        "MLP biases": getattr(llama, "mlp_bias", False),
        f"heads of {llama.head_dim}": llama.head_dim * llama.num_attention_heads != llama.hidden_size,
        f"{llama.hidden_act} activations": llama.hidden_act != "silu",
        "scaled rotary positions": (llama.rope_parameters or {}).get("rope_type", "default") != "default",
    }
    if any(problems.values()):
        named = " and ".join(what for what, wrong in problems.items() if wrong)
        raise InputError(f"{folder}: a Llama with {named} cannot be adapted")


def adapt_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer with the control tokens added; `InputError` if there is none."""
    named = {} if gguf_file(folder) is None else {"gguf_file": gguf_file(folder)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **named)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    tokens = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.pad_token, tokenizer.mask_token = END_OF_TEXT, MASK
    # SmolLM2's is the end of text, which would then pass for a token that is missing; bytes are never unknown
    tokenizer.unk_token = None
    return tokenizer
