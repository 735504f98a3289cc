"""What the stages of `vidlada.bench.gpu` share: the model, its requests and what is predicted of them."""

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vidlada.bench.devices import GPUS, Device
from vidlada.bench.paper import BLOCK, SLOTS
from vidlada.bench.roofline import steps_of
from vidlada.bench.sizes import SIZES, TEXT_TOKENS, Size, random_model, random_request, size_config
from vidlada.decoding.memory import decoding_bytes
from vidlada.decoding.sampler import Denoiser, Request
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings
from vidlada.machine import GIB
from vidlada.model.config import VidLaDAConfig, VidLaDATextConfig
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

SMALL = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
TINY = Size({**SMALL, "num_hidden_layers": 2}, tokens_per_frame=6, frames=4)
WARM_STEPS = 3


@dataclass(frozen=True)
class Figure:
    """One row of the report.

    Attributes:
        what: was measured.
        unit: of both.
        predicted: without the device; None if nothing was.
        measured: on it.
    """

    what: str
    unit: str
    predicted: float | int | None
    measured: float | int | str | None


Case = tuple[str, Callable[[], Sequence[Figure]]]


@dataclass
class Session:
    """What all stages share.

    Attributes:
        device, dtype: measured.
        size_name, size: of the model.
        frames: of the video.
        tests: folder with the recorded answers and how to make their model.
        slots, block: of answers.
        device_rates: what predictions are made from.
    """

    device: str
    dtype: torch.dtype
    size_name: str
    size: Size
    frames: int
    tests: Path
    slots: int
    block: int
    device_rates: Device = field(init=False)
    kept: VidLaDAForMaskedDiffusion | None = None

    @classmethod
    def of(cls, device: str, size: str, frames: int | None, tests: Path) -> "Session":
        """With the lengths of the paper's protocol, or shorter ones for a tiny model."""
        if size != "tiny" and size not in SIZES:
            raise InputError(f"unknown size {size!r}; use tiny, {', '.join(SIZES)}")
        shape = SIZES.get(size, TINY)
        slots, block = (16, 8) if size == "tiny" else (SLOTS, BLOCK)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        return cls(device, dtype, size, shape, frames or shape.frames, tests, slots, block)

    @property
    def known_gpu(self) -> str | None:
        """The device among those whose rates are known."""
        if not self.device.startswith("cuda"):
            return None
        name = torch.cuda.get_device_name(self.device).lower().replace(" ", "")
        return next((known for known in GPUS if known in name), None)

    @property
    def config(self) -> VidLaDAConfig:
        """Of the model."""
        return size_config(self.size.text_config)

    @property
    def text(self) -> VidLaDATextConfig:
        """Of its language model."""
        return self.config.text

    @property
    def visual(self) -> int:
        """Visual tokens of the video."""
        return self.frames * self.size.tokens_per_frame

    @property
    def model(self) -> VidLaDAForMaskedDiffusion:
        """The model, made once."""
        if self.kept is None:
            self.kept = random_model(self.size.text_config, self.device, self.dtype)
            self.kept.language_model.pack()
        return self.kept

    def settings(self, cache: str, tokens_per_step: int = 1) -> GenerationSettings:
        """At so many tokens a step."""
        blocks = self.slots // self.block
        steps = blocks * -(-self.block // tokens_per_step)
        return GenerationSettings(gen_length=self.slots, block_length=self.block, cache=cache, steps=steps)

    def request(self, settings: GenerationSettings, frames: int | None = None) -> Request:
        """A prompt of text, frames and text."""
        return random_request(self.model, self.size.tokens_per_frame, frames or self.frames, settings)

    def predict(self, settings: GenerationSettings, requests: int = 1, frames: int | None = None) -> list[float]:
        """Seconds of every step."""
        visual = (frames or self.frames) * self.size.tokens_per_frame
        size, layers = self.device_rates.value_bytes, self.text.num_hidden_layers
        steps = steps_of(self.config, visual, settings, requests, size, 2 * TEXT_TOKENS)
        return [step.seconds(self.device_rates, layers) for step in steps]

    def predict_peak(self, settings: GenerationSettings, requests: int = 1, frames: int | None = None) -> float:
        """GiB of weights and of requests that all take their first step together."""
        visual, size = (frames or self.frames) * self.size.tokens_per_frame, self.dtype.itemsize
        tokens = visual + 2 * TEXT_TOKENS + settings.gen_length
        weights = sum(weight.numel() for weight in self.model.parameters()) * size
        return (weights + decoding_bytes(self.text, [(tokens, visual, settings)] * requests, size).peak) / GIB

    def warm(self, settings: GenerationSettings, requests: int = 1) -> None:
        """A few steps that are not counted: libraries load, kernels are chosen."""
        denoiser = Denoiser(self.model)
        for _ in range(requests):
            denoiser.add(self.request(settings))
        for _ in range(WARM_STEPS):
            denoiser.step()

    def release(self) -> None:
        """Return what a case leaves to the device."""
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        title: what it tells.
        minutes: its budget.
        cases: of a session.
    """

    title: str
    minutes: float
    cases: Callable[[Session], Iterator[Case]]
