"""Which parameters are trained, by which optimizer, at which learning rate."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidlada.training.config import ModelPart, TrainingConfig
from vidlada.training.precision import multiplies_bfloat16

# The published model reads the tower's features before its last norm, which therefore never gets a gradient.
UNUSED = "vision.tower.post_layernorm"


def part_of(name: str) -> ModelPart:
    """The part of the model a parameter belongs to, by its name, adapters included."""
    if "vision.tower." in name:
        return "tower"
    return "projector" if "vision." in name else "language_model"


@dataclass
class Optimizers:
    """The optimizers that share a model's parameters.

    Attributes:
        optimizers: Muon's come second.
        parts: for each optimizer, the part each of its groups belongs to.
    """

    optimizers: list[torch.optim.Optimizer]
    parts: list[list[ModelPart]]

    def set_rate(self, config: TrainingConfig, step: int) -> float:
        """Set a step's learning rates; returns the language model's."""
        stage, _ = config.stage_at(step)
        rate = config.learning_rate(step)
        for optimizer, parts in zip(self.optimizers, self.parts, strict=True):
            for group, part in zip(optimizer.param_groups, parts, strict=True):
                group["lr"] = rate * stage.rate_ratio(part)
        return rate

    def begin(self) -> None:
        """Give every parameter AdamW's first state, which it would get with its first gradient.

        A sharded checkpoint is only read where it holds the state of all of them, those that are frozen so far too.
        """
        for optimizer in self.optimizers:
            for parameter in (each for group in optimizer.param_groups for each in group["params"]):
                if parameter.requires_grad:
                    moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}

    def step(self) -> None:
        """Update every parameter that has a gradient, and forget the gradients."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon` with products in float32: torch's are in bfloat16, which takes 20 times as long on processors
    without instructions for it. Its step is scaled to AdamW's (`match_rms_adamw`)."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                scale = 0.2 * math.sqrt(max(parameter.shape))
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring all singular values near 1 by Newton and Schulz's iteration.

    Args:
        matrix: ``(rows, columns)``.
        coefficients, steps, eps: see `torch.optim.Muon`.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T  # (rows, rows)
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if tall else wide


def make_optimizers(model: nn.Module, config: TrainingConfig) -> Optimizers:
    """The optimizers of a run; parts that no stage trains are frozen for good.

    Args:
        model: its parameters that do not require gradients are left out.
        config: of the run.
    """
    one_rate = {stage.rate_ratio(part) for stage in config.stages for part in ("tower", "projector")} <= {1.0}
    matrices: dict[ModelPart, list[nn.Parameter]] = defaultdict(list)
    others: dict[ModelPart, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if part_of(name) in config.frozen:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            is_matrix = config.optimizer == "muon" and parameter.ndim == 2 and ".layers." in name
            (matrices if is_matrix else others)["language_model" if one_rate else part_of(name)].append(parameter)
        if UNUSED in name:
            parameter.requires_grad_(False)
    muon = torch.optim.Muon if multiplies_bfloat16() else Float32Muon
    rate, decay = config.stages[0].learning_rate, config.weight_decay
    kinds: list[tuple[Any, dict[ModelPart, list[nn.Parameter]], dict[str, Any]]] = [
        (torch.optim.AdamW, others, {"betas": (config.beta1, config.beta2)}),
        (muon, matrices, {"adjust_lr_fn": "match_rms_adamw"}),
    ]
    built, parts = [], []
    for kind, groups, options in kinds:
        if groups:
            listed = [{"params": parameters} for parameters in groups.values()]
            built.append(kind(listed, lr=rate, weight_decay=decay, **options))
            parts.append(list(groups))
    return Optimizers(built, parts)


def drop_gradients(model: nn.Module, frozen: tuple[ModelPart, ...]) -> None:
    """Forget the gradients of parts that only this stage freezes: the optimizer then passes them over."""
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.grad = None
