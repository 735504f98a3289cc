"""The number type of a run's forward pass, and what this machine multiplies in hardware."""

import torch

from vidlada.training.config import TrainingConfig

RUN_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the precision of a run


def run_precision(config: TrainingConfig) -> str:
    """`no`, `bf16` or `fp16`: what `auto` means on this machine, or the precision that the run asks for."""
    if config.precision != "auto":
        return config.precision
    return "bf16" if multiplies_bfloat16() else "no"


def multiplies_bfloat16() -> bool:
    """Whether the device that runs train on, the accelerator or else the CPU, has instructions for products in
    bfloat16. On a CPU without them (x86 without AVX-512) they take 20 times as long as in float32."""
    if not torch.accelerator.is_available():
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
