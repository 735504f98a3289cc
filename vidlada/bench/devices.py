"""What devices reach, for predictions (`vidlada.bench.roofline`)."""

from dataclasses import dataclass

# Counted (`vidlada bench count`), and of launching one by others' measurements
KERNELS_PER_LAYER, SECONDS_PER_KERNEL = 13.5, 5e-6
SECONDS_PER_STEP = 3e-4  # proposals to the host, commit rule, ids back
CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """What a device reaches.

    Attributes:
        memory: bytes.
        bandwidth: bytes a second.
        products, attention: operations a second.
        few_products, few_attention: the same for up to `FEW_QUERIES` positions, bytes included; None where bytes and
            the rates above tell it, as on a GPU.
        per_layer: seconds of launching a layer's kernels.
        per_step: seconds of a step outside the layers.
        overlapped: the host launches while the device computes.
        value_bytes: bytes of a weight and of a state.
    """

    memory: float
    bandwidth: float
    products: float
    attention: float
    few_products: float | None = None
    few_attention: float | None = None
    per_layer: float = KERNELS_PER_LAYER * SECONDS_PER_KERNEL
    per_step: float = SECONDS_PER_STEP
    overlapped: bool = True
    value_bytes: int = 2


GPUS = {
    "a100": Device(80e9, 1.7e12, 220e12, 160e12),
    "h100": Device(80e9, 2.9e12, 600e12, 400e12),
    "h200": Device(141e9, 4.3e12, 650e12, 450e12),
    "rtx4090": Device(24e9, 0.9e12, 150e12, 110e12),
}
DEVICES = (*GPUS, CPU)
