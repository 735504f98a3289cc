"""The model of a run: new, from a checkpoint, from an autoregressive ancestor, with adapters; and saving it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_seed
from transformers import PreTrainedConfig, SiglipVisionConfig

from vidlada.errors import InputError
from vidlada.machine import free_memory
from vidlada.model.config import VidLaDAConfig, VidLaDATextConfig
from vidlada.model.hub import SHIPPED, is_hub_name
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.noise import quiet_libraries
from vidlada.processor import VidLaDAProcessor
from vidlada.settings import format_value
from vidlada.shapes.questions import vocabulary
from vidlada.training.config import Lora, TrainingConfig
from vidlada.training.growth import insert_layers
from vidlada.training.initialization import initialize
from vidlada.training.origin import is_llama, origin
from vidlada.training.precision import RUN_TYPES, run_precision
from vidlada.training.settings import hint
from vidlada.training.tokenizer import role_tokens, word_tokenizer
from vidlada.training.vocabulary import add_think_tokens, add_think_tokens_to

# of transformers' configurations, and what the tokenizer or a source's file says
NOT_DESCRIBED = {entry.name for entry in fields(PreTrainedConfig)} | {
    "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "video_token_id", "suppressed_token_ids",
    "stop_token_ids", "vocab_size", "tie_word_embeddings", "source",
}  # fmt: skip


def initial_model(
    config: TrainingConfig,
    weights: bool = True,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """The model a run starts from, and its processor.

    Args:
        config: of the run.
        weights: needed; if not, because another process will send them, a checkpoint's are not read.
        device: a checkpoint's weights are loaded to, if it has room; the CPU by default.
        dtype: of a checkpoint's weights, but for frozen ones.

    Raises:
        InputError: `init_from` is not a usable checkpoint.
    """
    model, processor = _first_model(config, weights, device or torch.device("cpu"), dtype)
    return model, add_think_tokens(model, processor) if config.think_tokens else processor


def _first_model(
    config: TrainingConfig, weights: bool, device: torch.device, dtype: torch.dtype
) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """The same without the tokens that stages ask for."""
    from vidlada.training.adapt import adapt_llama

    if config.init_from is None:
        model, processor = new_model(config.new_model, config.seed)
        initialize(model)
        return model, processor
    folder = origin(config.init_from)
    if is_llama(folder):
        return adapt_llama(folder, config.new_model, config.seed, dtype)
    from vidlada.checkpoint.load import describe, load_model, load_tokenizer

    # frozen weights under adapters are of the run's type, where autocast bridges it; what is trained is float32. Stored
    # in that type they are mapped from the file: processes share that memory
    frozen = RUN_TYPES.get(run_precision(config)) if config.lora is not None else None
    checkpoint = describe(folder)
    if weights or frozen is not None:
        kind = frozen or dtype
        need = kind.itemsize * sum(entry.count for entry in (*checkpoint.entries.values(), *checkpoint.tower.values()))
        fits = weights and device.type != "cpu" and need < (free_memory(device) or need)
        model = load_model(folder, dtype=kind, device=str(device) if fits else None, checkpoint=checkpoint)
    else:
        model = empty_model(checkpoint.config)
    insert_layers(model, config.new_layers)
    return model, VidLaDAProcessor.from_config(load_tokenizer(folder), model.config)


def empty_model(config: VidLaDAConfig) -> VidLaDAForMaskedDiffusion:
    """A model in float32 whose weights are reserved but never written: pages nobody touches take no memory."""
    with init_empty_weights(include_buffers=False):
        model = VidLaDAForMaskedDiffusion(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
    return model


def initial_processor(config: TrainingConfig) -> VidLaDAProcessor:
    """The processor of the model a run starts from, without its weights."""
    from vidlada.checkpoint.load import load_tokenizer
    from vidlada.training.adapt import adapt_tokenizer

    model_config = initial_config(config)
    if config.init_from is None:
        tokenizer = word_tokenizer(vocabulary())
    elif is_llama(origin(config.init_from)):
        tokenizer = adapt_tokenizer(origin(config.init_from))
    else:
        tokenizer = load_tokenizer(origin(config.init_from))
    if config.think_tokens:
        add_think_tokens_to(tokenizer)
    return VidLaDAProcessor.from_config(tokenizer, model_config)


def initial_config(config: TrainingConfig) -> VidLaDAConfig:
    """The configuration of the model a run starts from, without its weights."""
    if config.init_from is None or is_llama(origin(config.init_from)):
        return build_config(config.new_model)
    from vidlada.checkpoint.configs import read_json
    from vidlada.checkpoint.load import describe

    folder = origin(config.init_from)
    checkpoint = describe(folder)
    if config.vision_tower is not None and checkpoint.layout == "published":
        named = read_json(checkpoint.folder / "config.json").text("mm_vision_tower")
        if named and Path(named).name != Path(config.vision_tower).name:
            raise InputError(f"vision_tower: {config.vision_tower}, but {folder} was made with {named}")
    return checkpoint.config


def save_dtype(config: TrainingConfig) -> torch.dtype | None:
    """The type a run's model folders are written in; None for adapters, which stay as they are."""
    if config.lora is not None:
        return None
    if config.save_dtype != "auto":
        found: torch.dtype = getattr(torch, config.save_dtype)
        return found
    if config.init_from is None or is_llama(origin(config.init_from)):
        return torch.float32
    from vidlada.checkpoint.load import describe, stored_type

    stored = stored_type(describe(origin(config.init_from)))
    return stored if stored.itemsize == 2 else torch.float32


def build_config(arguments: dict[str, Any]) -> VidLaDAConfig:
    """The configuration that a run's `model` describes.

    Raises:
        InputError: an entry is unknown or invalid, or they describe no network.
    """
    parts: list[tuple[str, type]] = [
        ("", VidLaDAConfig), ("text_config", VidLaDATextConfig), ("vision_config", SiglipVisionConfig),
    ]  # fmt: skip
    for place, kind in parts:
        values = arguments.get(place) or {} if place else arguments
        if not isinstance(values, dict):
            raise InputError(f"model: {place} must be a mapping, not {format_value(values)}")
        known = {entry.name for entry in fields(kind)} - NOT_DESCRIBED
        for name in values:  # transformers' configurations keep whatever they are given
            if name not in known:
                where = f"{place}.{name}".lstrip(".")
                raise InputError(f"model: {where}: unknown entry; {hint(str(name), known)}")
    if (arguments.get("vision_config") or {}).get("vision_use_head"):
        raise InputError("model: vision_config.vision_use_head: the tower's pooling head would never be used")
    try:
        config = VidLaDAConfig(**arguments)
        with torch.device("meta"):
            VidLaDAForMaskedDiffusion(config)
    except Exception as error:  # of torch and transformers, for values that fit no network
        raise InputError(f"model: {' '.join(str(error).split())}") from error
    if not config.text_only and not config.patches_per_side:
        raise InputError(f"model: image_size {config.vision.image_size} holds no patch of {config.vision.patch_size}")
    return config


def new_model(arguments: dict[str, Any], seed: int) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """A model with random weights and a word-level tokenizer of the shapes world.

    Args:
        arguments: of `VidLaDAConfig`; ids of tokens with a role come from the tokenizer.
        seed: of the weights.
    """
    tokenizer = word_tokenizer(vocabulary())
    config = VidLaDAConfig(**{**role_tokens(tokenizer), **arguments})
    config.text.vocab_size = len(tokenizer)
    set_seed(seed)
    model = VidLaDAForMaskedDiffusion(config)
    return model, VidLaDAProcessor.from_config(tokenizer, config)


def add_lora(model: VidLaDAForMaskedDiffusion, settings: Lora, base: str, seed: int) -> Any:
    """The model with fresh low-rank adapters; all other weights are frozen.

    Args:
        model: to adapt, in place.
        settings: of the adapters.
        base: folder of the model, or its name on the hub, recorded in the adapter for those who load it.
        seed: of the adapters' weights.

    Raises:
        InputError: peft is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("lora needs peft: pip install vidlada[train]") from error
    set_seed(seed)
    adapters = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"language_model\.layers\.\d+\..*\.({'|'.join(settings.modules)})",
        modules_to_save=["projector"] if settings.train_projector and not model.config.text_only else None,
    )
    with quiet_libraries():
        adapted = peft.get_peft_model(model, adapters)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    named = base == SHIPPED or is_hub_name(base)
    adapted.peft_config["default"].base_model_name_or_path = base if named else str(Path(base).resolve())
    return adapted
