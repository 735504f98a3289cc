"""How many kernels a function launches on a device, and how often the host waits for it."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from vidlada.bench.pretend import VIEWS


class OperationCount(TorchDispatchMode):
    """Counts operations that are more than views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.split("::")[1] not in VIEWS
        return func(*args, **(kwargs or {}))


def launches_of(run: Callable[[], object], device: str) -> tuple[int, int]:
    """Count what a function asks of a device.

    Args:
        run: the function.
        device: a GPU, or a CPU, where operations stand for kernels and nobody waits.

    Returns:
        Kernels (copies included) and waits of the host.
    """
    if not device.startswith("cuda"):
        with OperationCount() as operations:
            run()
        return operations.count, 0
    torch.cuda.synchronize(device)
    with warnings.catch_warnings(record=True) as caught, profile(activities=[ProfilerActivity.CUDA]) as profiled:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    on_device = [event for event in profiled.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device), waits
