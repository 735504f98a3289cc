"""Facts about a checkpoint, the memory a run needs, and this machine."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vidlada.checkpoint.load import Checkpoint, weights_type
from vidlada.decoding.memory import PROMPT_TOKENS, decoding_bytes, merged_shape
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.machine import GIB, free_memory, processor
from vidlada.model.config import VidLaDAConfig, VidLaDATextConfig
from vidlada.model.free_memory import DeviceMemory
from vidlada.model.quantization import WEIGHT_BYTES
from vidlada.model.vision import FRAMES_PER_PASS
from vidlada.tiling import MediaShape, pictures_of

STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class MemoryNeed:
    """Estimated memory of one run, in bytes.

    Attributes:
        tokens: of the whole sequence.
        weights: of the model.
        vision: largest activations while the frames pass the tower.
        denoising: largest activations of a denoising step.
        cache: what is kept between steps.
    """

    tokens: int
    weights: int
    vision: int
    denoising: int
    cache: int

    @property
    def working(self) -> int:
        """Peak bytes besides the weights; the two phases do not overlap."""
        return max(self.vision, self.denoising + self.cache)

    def on(self, memory: DeviceMemory) -> int:
        """The same on one of the devices that the layers lie on."""
        return max(self.vision, memory.need(self.cache, self.denoising))

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.weights + self.working


def memory_need(
    config: VidLaDAConfig,
    parameters: int,
    media: int | Sequence[MediaShape],
    settings: GenerationSettings,
    value_bytes: int,
    processes: int = 1,
) -> MemoryNeed:
    """Estimate the memory of answering about videos and images, which pass the tower one after another.

    Args:
        config: of the model.
        parameters: how many weights it has.
        media: frames of each video, shape of each image; or frames of the only video.
        settings: of decoding.
        value_bytes: bytes a value in the type it runs in.
        processes: that the layers are divided among; what decoding takes is of one of them.
    """
    text, vision = config.text, config.vision
    width = text.hidden_size
    shapes = [media] if isinstance(media, int) else list(media)
    visual = sum(map(config.visual_tokens, shapes))
    shape = merged_shape(visual + PROMPT_TOKENS + settings.slots, visual, settings)
    pictures, cells = max(map(pictures_of, shapes), default=0), config.patches_per_side**2
    tower_width, tower_mlp = vision.hidden_size, vision.intermediate_size
    tower = max(4 * tower_width, 2 * tower_mlp, 2 * width) * value_bytes + 2 * tower_width * value_bytes
    through = min(pictures, FRAMES_PER_PASS) * cells * tower + pictures * cells * width * value_bytes
    decoding = decoding_bytes(text, [shape], value_bytes, processes)
    return MemoryNeed(shape[0], parameters * value_bytes, through, decoding.working, decoding.kept)


def check_memory(need: int, device: torch.device, what: str, instead: str) -> None:
    """Raise an error before a run that cannot fit.

    Args:
        need: bytes.
        device: that must have them.
        what: needs them, for the message.
        instead: what to do.

    Raises:
        InputError: less is free.
    """
    free = free_memory(device)
    if free is not None:
        check_free(need, free, device, what, instead)


def check_free(need: int, free: int, device: torch.device, what: str, instead: str) -> None:
    """The same where it is known how many bytes are free; the other arguments are those of `check_memory`."""
    if need > free:
        raise InputError(
            f"{what} needs about {need / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free on {device}; {instead}"
        )


def parameter_count(checkpoint: Checkpoint) -> int:
    """Number of parameters of a checkpoint, including its vision tower."""
    return sum(entry.count for entry in (*checkpoint.entries.values(), *checkpoint.tower.values()))


def check_memory_of_weights(
    checkpoint: Checkpoint, dtype: str | torch.dtype, device: torch.device, quantization: str | None = None
) -> None:
    """Raise an error before loading weights that cannot fit.

    Args:
        checkpoint: to be loaded.
        dtype: its weights' type once loaded; `auto` is the stored one.
        device: where to.
        quantization: of the language model's layers, one after another while they are loaded.

    Raises:
        InputError: less memory is free, or there is no such type.
    """
    each = loaded_bytes(checkpoint, dtype)
    need = parameter_count(checkpoint) * each
    if quantization is not None:
        need -= int(layer_parameters(checkpoint.config.text) * (each - WEIGHT_BYTES[quantization]))
    check_memory(need, device, f"loading {checkpoint.folder}", "use a smaller type (bfloat16) or another device")


def layer_parameters(config: VidLaDATextConfig) -> int:
    """Number of weights in the projections of all layers but one, which is whole while it is made smaller."""
    attention = 2 * config.hidden_size + 2 * config.num_key_value_heads * config.head_dim
    return (config.num_hidden_layers - 1) * config.hidden_size * (attention + 3 * config.intermediate_size)


def loaded_bytes(checkpoint: Checkpoint, dtype: str | torch.dtype) -> int:
    """Bytes of one weight once it is loaded as a type; `auto` is the stored type."""
    loaded = weights_type(dtype)
    return STORED_BYTES.get(checkpoint.dtype, 4) if loaded is None else loaded.itemsize


def checkpoint_facts(
    checkpoint: Checkpoint, frames: int, dtype: str = "auto", cache: str = "none", kv_dtype: str = "auto"
) -> dict[str, Any]:
    """Describe a checkpoint and its memory need as plain values."""
    config = checkpoint.config
    text = config.text
    entries = [*checkpoint.entries.values(), *checkpoint.tower.values()]
    parameters = parameter_count(checkpoint)
    stored = sum(entry.count * STORED_BYTES.get(entry.dtype, 4) for entry in entries)
    settings = GenerationSettings.from_dict(config.generation or {}).replace(cache=cache, kv_dtype=kv_dtype)
    value_bytes = loaded_bytes(checkpoint, dtype)
    need = memory_need(config, parameters, frames, settings, value_bytes)
    facts: dict[str, Any] = {
        "folder": str(checkpoint.folder),
        "layout": checkpoint.layout,
        "parameters": parameters,
        "stored_as": checkpoint.dtype,
        "stored_bytes": stored,
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "key_value_heads": text.num_key_value_heads,
        "vocabulary": text.vocab_size,
        "max_length": config.max_length,
    }
    if not config.text_only:
        facts["image_size"] = config.vision.image_size
        facts["tokens_per_frame"] = config.tokens_per_frame()
    facts["memory_estimate"] = {
        "frames": frames,
        "tokens": need.tokens,
        "bytes_per_value": value_bytes,
        "weights_gib": round(need.weights / GIB, 3),
        "vision_gib": round(need.vision / GIB, 3),
        "denoising_gib": round(need.denoising / GIB, 3),
        "cache": cache,
        "kv_dtype": kv_dtype,
        "cache_gib": round(need.cache / GIB, 3),
        "total_gib": round(need.total / GIB, 3),
    }
    return facts


def machine_facts() -> dict[str, Any]:
    """Describe this machine as plain values."""
    devices = [
        {
            "name": torch.cuda.get_device_name(number),
            "memory_gib": round(torch.cuda.get_device_properties(number).total_memory / GIB, 1),
            "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
        for number in range(torch.cuda.device_count())
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / GIB, 1),
        "gpus": devices,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
