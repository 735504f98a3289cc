"""How much arithmetic a training step is, and what part of the machine's peak that is."""

import torch
from torch import nn

from vidlada.model.config import VidLaDAConfig
from vidlada.training.optimizers import part_of

# Dense bfloat16 peaks from the makers' data sheets, in FLOP/s; the first name found in the device's counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class FlopCount:
    """Model FLOPs of batches: what must be computed; recomputed activations do not count, nor does the head, which is
    applied to a few positions only.

    A trained weight takes 6 a token (forward, both halves of backward), a frozen one that gradients flow through 4, a
    frozen tower 2. Attention takes 2 · 2 · length · width a token forward, and as much again twice backward.

    Args:
        model: with its frozen parameters marked.
        config: of the model.
    """

    def __init__(self, model: nn.Module, config: VidLaDAConfig):
        weights = {"tower": [0.0, 0.0], "projector": [0.0, 0.0], "language_model": [0.0, 0.0]}  # frozen, trained
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "lm_head" not in name:
                weights[part_of(name)][parameter.requires_grad] += parameter.numel()
        tower_trained = weights["tower"][1] > 0
        self.token = 4 * weights["language_model"][0] + 6 * weights["language_model"][1]
        self.patch = (2 * weights["tower"][0] + 6 * weights["tower"][1]) + (
            4 * weights["projector"][0] + 6 * weights["projector"][1]
        )
        text, vision = config.text, config.vision
        self.attention = 12 * text.num_hidden_layers * text.hidden_size
        self.patches = 0 if config.text_only else config.patches_per_side**2
        layers, width = vision.num_hidden_layers, vision.hidden_size
        self.patch += (12 if tower_trained else 4) * layers * width * self.patches

    def __call__(self, rows: int, length: int, frames: int) -> float:
        """FLOPs of a batch of rows of one length, and its frames."""
        return rows * length * (self.token + self.attention * length) + frames * self.patches * self.patch


def peak_of(device: torch.device) -> float | None:
    """FLOP/s the device can do at most in bfloat16; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)
