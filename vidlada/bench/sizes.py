"""What is measured: models of several shapes, each with a request as large as a real one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vidlada.decoding.sampler import Request
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.model.config import VidLaDAConfig
from vidlada.model.hub import SHIPPED
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

TEXT_TOKENS = 32  # on either side of the video
SHIPPED_QUESTION = "describe the video ."


@dataclass(frozen=True)
class Size:
    """Shape of a random model and of its input.

    Attributes:
        text_config: of the language model, where it differs from VidLaDA-8B's.
        tokens_per_frame: visual tokens of a frame.
        frames: of the video, by default.
    """

    text_config: dict[str, Any]
    tokens_per_frame: int
    frames: int


SIZES = {
    "mid": Size(
        {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 8},
        tokens_per_frame=200, frames=30,
    ),
    "8b": Size({}, tokens_per_frame=210, frames=64),
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model and how to ask it.

    Attributes:
        model: in evaluation mode.
        request: settings → the request to decode.
        frames, visual_tokens: of its video.
        trained: whether its confidence means something.
    """

    model: VidLaDAForMaskedDiffusion
    request: Callable[[GenerationSettings], Request]
    frames: int
    visual_tokens: int
    trained: bool


def subject(name: str, frames: int | None, device: str, dtype: torch.dtype) -> Subject:
    """What a size is measured on.

    Args:
        name: `tiny`, the shipped weights on a clip of the shapes world, or a key of `SIZES`, random weights.
        frames: of the video; the size's own number by default.
        device, dtype: where and in which type to run.

    Raises:
        InputError: an unknown size, or more frames than it can see.
    """
    if name == SHIPPED:
        return _shipped_subject(frames or 60, device, dtype)
    if name not in SIZES:
        raise InputError(f"unknown size {name!r}; use {SHIPPED}, {', '.join(SIZES)}")
    size = SIZES[name]
    count = frames or size.frames
    model = random_model(size.text_config, device, dtype)
    model.language_model.pack()  # as `vidlada.load` does
    return Subject(
        model,
        lambda settings: random_request(model, size.tokens_per_frame, count, settings),
        count,
        count * size.tokens_per_frame,
        trained=False,
    )


def _shipped_subject(frames: int, device: str, dtype: torch.dtype) -> Subject:
    from vidlada.loading import load
    from vidlada.shapes.render import render_frames
    from vidlada.shapes.world import MAX_SECONDS, MIN_SECONDS, clip_for

    if not MIN_SECONDS <= frames <= MAX_SECONDS:
        raise InputError(f"size tiny sees a frame a second of {MIN_SECONDS} to {MAX_SECONDS} s, not {frames} frames")
    vidlada = load(SHIPPED, dtype=dtype, device=device)
    images = render_frames(clip_for("test", 0, seconds=frames), range(frames), vidlada.processor.image_size)
    video = vidlada.encode_video(images)
    return Subject(
        vidlada.model,
        lambda settings: vidlada.chat(video, generation=settings.to_dict()).request(SHIPPED_QUESTION),
        frames,
        len(video.visual_tokens),
        trained=True,
    )


def size_config(text_config: dict[str, Any]) -> VidLaDAConfig:
    """The configuration of a model without a visual half, of VidLaDA-8B's shape but for `text_config`."""
    text = {**VidLaDAConfig().text.to_dict(), **text_config}
    special = {"mask_token_id": 0, "suppressed_token_ids": (), "stop_token_ids": ()}
    return VidLaDAConfig(text_config=text, text_only=True, **special)


def random_model(text_config: dict[str, Any], device: str, dtype: torch.dtype) -> VidLaDAForMaskedDiffusion:
    """A model without its visual half, of VidLaDA-8B's shape but for `text_config`."""
    config = size_config(text_config)
    torch.manual_seed(0)
    with torch.device(device):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return VidLaDAForMaskedDiffusion(config).eval()
        finally:
            torch.set_default_dtype(previous)


def random_request(
    model: VidLaDAForMaskedDiffusion, tokens_per_frame: int, frames: int, settings: GenerationSettings
) -> Request:
    """A prompt of text, frames and text, as large as a real one's."""
    frame_index = [-1] * TEXT_TOKENS + [n for n in range(frames) for _ in range(tokens_per_frame)]
    frame_index += [-1] * TEXT_TOKENS
    generator = torch.Generator().manual_seed(1)
    width = model.language_model.config.hidden_size
    prompt = torch.randn(len(frame_index), width, generator=generator) * model.config.text.initializer_range
    weight = model.language_model.embed_tokens.weight
    return Request(prompt.to(weight.device, weight.dtype), settings, frame_index=frame_index)
