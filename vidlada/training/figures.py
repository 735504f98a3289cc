"""What steps of a run came to: summed over processes, as one line for people and as figures for trackers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from vidlada.machine import peak_memory
from vidlada.training.flops import peak_of


@dataclass
class Figures:
    """What one step, or several, came to, over all processes."""

    loss: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    skipped: float = 0.0
    signals: float = 0.0
    frames: float = 0.0
    samples: float = 0.0
    gradient_norm: float = 0.0
    steps: int = 0
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = time.monotonic()

    def add(self, other: "Figures") -> None:
        """Count a step in."""
        for name in ("loss", "tokens", "flops", "skipped", "samples", "gradient_norm", "steps"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what happens meanwhile out: evaluations and checkpoints are no part of a step."""
        since = time.monotonic()
        yield
        self.started += time.monotonic() - since


@dataclass
class Progress:
    """Where a run stands, as checkpoints keep it.

    Attributes:
        step: finished steps.
        seen, skipped: samples looked at so far, and broken ones among them.
    """

    step: int = 0
    seen: int = 0
    skipped: int = 0


def figures_of(
    window: Figures, learning_rate: float, waiting: float, epoch: float | None, device: torch.device, devices: int
) -> dict[str, float]:
    """Figures of the steps since the last report, by name.

    Args:
        window: those steps.
        learning_rate: of the last.
        waiting: seconds among theirs in which the device waited for data.
        epoch: passes over the stage's data so far; None where these never end.
        device, devices: what computes, and how many there are.
    """
    seconds = time.monotonic() - window.started
    flops = window.flops / seconds / devices
    figures = {
        "loss": window.loss / window.steps,
        "learning_rate": learning_rate,
        "tokens_per_second": window.tokens / seconds,
        "samples_per_second": window.samples / seconds,
        "seconds_per_step": seconds / window.steps,
        "data_waiting_share": waiting / seconds,
        "tflops_per_device": flops / 1e12,
        "peak_memory_gib": peak_memory(str(device)) / 2**30,
    }
    if window.gradient_norm:  # known before the update, which DeepSpeed's and fp16's are not
        figures["gradient_norm"] = window.gradient_norm / window.steps
    if epoch is not None:
        figures["epoch"] = epoch
    if (peak := peak_of(device)) is not None:
        figures["mfu"] = flops / peak
    return figures


def line_of(figures: dict[str, float], done: int, total: int, stage: str) -> str:
    """The same as a line.

    Args:
        figures: from `figures_of`.
        done, total: steps of the run.
        stage: name of the current one.
    """
    named = "".join(
        f"{label} {figures[name]:.2f} " for name, label in (("gradient_norm", "norm"), ("epoch", "epoch"))
        if name in figures
    )  # fmt: skip
    mfu = f" MFU {figures['mfu']:.1%}" if "mfu" in figures else ""
    return (
        f"step {done}/{total} {stage} loss {figures['loss']:.4f} lr {figures['learning_rate']:.2e} {named}"
        f"{figures['tokens_per_second']:.0f} tokens/s {figures['samples_per_second']:.2f} samples/s "
        f"{figures['seconds_per_step']:.2f} s/step waiting {figures['data_waiting_share']:.0%} "
        f"{figures['tflops_per_device']:.3g} TFLOP/s{mfu} peak {figures['peak_memory_gib']:.1f} GiB "
        f"left {(total - done) * figures['seconds_per_step'] / 60:.0f} min"
    )


def parameter_counts(model: torch.nn.Module) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many are not."""
    counts = {True: 0, False: 0}
    for parameter in model.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[True], counts[False]
