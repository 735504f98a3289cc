"""The number type of a run's forward pass, and what this machine multiplies in hardware."""

import torch

from vidlada.training.config import TrainingConfig

RUN_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by the precision of a run


def run_precision(config: TrainingConfig) -> str:
    """`no`, `bf16` or `fp16`: what `auto` means on this machine, or the precision that the run asks for."""
    if config.precision != "auto":
        return config.precision
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return "bf16" if multiplies_bfloat16(device) else "no"


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are not slower than in float32: 20 times so on a CPU without instructions for them
    (x86 without AVX-512)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return True
