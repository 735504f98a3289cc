"""The model of a run: new, from a checkpoint, from an autoregressive ancestor, with adapters; and saving it."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vidlada.config import VidLaDAConfig
from vidlada.errors import InputError
from vidlada.model import VidLaDAForMaskedDiffusion
from vidlada.noise import quiet_libraries
from vidlada.processor import BOS, END_HEADER, END_OF_TEXT, END_OF_TURN, MASK, START_HEADER, VidLaDAProcessor
from vidlada.shapes.questions import vocabulary
from vidlada.training.config import Lora, TrainingConfig
from vidlada.training.growth import insert_layers
from vidlada.training.initialization import initialize
from vidlada.training.origin import is_llama, origin
from vidlada.training.tokenizer import word_tokenizer


def starting_model(config: TrainingConfig, weights: bool = True) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """The model a run starts from, and its processor.

    Args:
        config: of the run.
        weights: needed; if not, because another process will send them, a checkpoint's are not read.

    Raises:
        InputError: `init_from` is not a usable checkpoint.
    """
    from vidlada.training.adapt import adapted_llama

    if config.init_from is None:
        model, processor = new_model(config.new_model, config.seed)
        initialize(model)
        return model, processor
    folder = origin(config.init_from)
    if is_llama(folder):
        return adapted_llama(folder, config.new_model, config.seed)
    from vidlada.checkpoint import describe, load_model, load_tokenizer

    # frozen weights under adapters keep their stored type, where autocast bridges it; what is trained is float32
    stored = config.lora is not None and config.precision != "no"
    if weights or stored:  # weights in their stored type are mapped from the file: processes share that memory
        model = load_model(folder, dtype="auto" if stored else torch.float32)
    else:
        model = unread_model(describe(folder).config)
    insert_layers(model, config.new_layers)
    return model, VidLaDAProcessor.from_config(load_tokenizer(folder), model.config)


def unread_model(config: VidLaDAConfig) -> VidLaDAForMaskedDiffusion:
    """A model in float32 whose weights are reserved but never written: pages nobody touches take no memory."""
    with init_empty_weights(include_buffers=False):
        model = VidLaDAForMaskedDiffusion(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
    return model


def starting_processor(config: TrainingConfig) -> VidLaDAProcessor:
    """The processor of the model a run starts from, without its weights."""
    from vidlada.checkpoint import load_tokenizer
    from vidlada.training.adapt import adapted_tokenizer

    model_config = starting_config(config)
    if config.init_from is None:
        tokenizer = word_tokenizer(vocabulary())
    elif is_llama(origin(config.init_from)):
        tokenizer = adapted_tokenizer(Path(config.init_from))
    else:
        tokenizer = load_tokenizer(Path(config.init_from))
    return VidLaDAProcessor.from_config(tokenizer, model_config)


def starting_config(config: TrainingConfig) -> VidLaDAConfig:
    """The configuration of the model a run starts from, without its weights."""
    if config.init_from is None or is_llama(origin(config.init_from)):
        return described_config(config.new_model)
    from vidlada.checkpoint import describe, read_json

    folder = origin(config.init_from)
    checkpoint = describe(folder)
    if config.vision_tower is not None and checkpoint.layout == "published":
        named = str(read_json(checkpoint.folder / "config.json").get("mm_vision_tower", ""))
        if Path(named).name != Path(config.vision_tower).name:
            raise InputError(f"vision_tower: {config.vision_tower}, but {folder} was made with {named or 'none'}")
    return checkpoint.config


def described_config(arguments: dict[str, Any]) -> VidLaDAConfig:
    """The configuration that a run's `model` describes; `InputError` where its entries do not fit together."""
    try:
        return VidLaDAConfig(**arguments)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise InputError(f"model: {' '.join(str(error).split())}") from error


def new_model(arguments: dict[str, Any], seed: int) -> tuple[VidLaDAForMaskedDiffusion, VidLaDAProcessor]:
    """A model with random weights and a word-level tokenizer of the shapes world.

    Args:
        arguments: of `VidLaDAConfig`; ids of tokens with a role come from the tokenizer.
        seed: of the weights.
    """
    tokenizer = word_tokenizer(vocabulary())
    config = VidLaDAConfig(**{**role_tokens(tokenizer), **arguments})
    config.text_config.vocab_size = len(tokenizer)  # type: ignore[union-attr]
    set_seed(seed)
    model = VidLaDAForMaskedDiffusion(config)
    return model, VidLaDAProcessor.from_config(tokenizer, config)


def role_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokens with a role, as arguments of `VidLaDAConfig`."""
    names = (BOS, END_OF_TEXT, START_HEADER, END_HEADER, MASK, END_OF_TURN)
    bos, end_of_text, start_header, end_header, mask, end_of_turn = tokenizer.convert_tokens_to_ids(list(names))
    return {
        "bos_token_id": bos,
        "eos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "mask_token_id": mask,
        "suppressed_token_ids": [end_of_text, bos, start_header, end_header],
        "stop_token_ids": [end_of_turn],
    }


def with_adapters(model: VidLaDAForMaskedDiffusion, settings: Lora, base: str, seed: int) -> Any:
    """The model with fresh low-rank adapters; all other weights are frozen.

    Args:
        model: to adapt, in place.
        settings: of the adapters.
        base: folder of the model, recorded in the adapter for those who load it.
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
    adapted.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    return adapted


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
