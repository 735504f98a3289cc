"""Free memory where a model's layers lie: on one device, spread over several, or divided among processes.

What is kept of an answer lies beside its layers; the working memory of a pass is needed on every device in turn. Where
processes divide the layers, all of them see what the fullest has left, so that they come to the same decisions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vidlada.machine import free_memory
from vidlada.model.language_model import LanguageModel
from vidlada.model.parallel import least_of_processes

UNKNOWN = 2**62  # bytes, more than any


@dataclass(frozen=True)
class DeviceMemory:
    """Free memory of a device that some of a model's layers lie on.

    Attributes:
        device: that one.
        share: of the layers that lie on it.
        free: bytes.
    """

    device: torch.device
    share: float
    free: int

    def need(self, kept: int, working: int) -> int:
        """Bytes needed here of what all layers keep together, and of what a pass needs wherever it is."""
        return round(self.share * kept) + working


def free_memory_of(language_model: LanguageModel) -> list[DeviceMemory]:
    """The devices of a model whose free memory is known. With tensor parallelism all processes must call this."""
    devices, found = language_model.devices, []
    for device, layers in Counter(devices).items():
        free = free_memory(device)
        if language_model.processes > 1:
            free = least_of_processes(language_model.layers[0], UNKNOWN if free is None else free)
        if free is not None and free < UNKNOWN:
            found.append(DeviceMemory(device, layers / len(devices), free))
    return found


def fits(memory: Sequence[DeviceMemory], kept: int, working: int) -> bool:
    """Whether every device has room for its part of what is kept, and for a pass."""
    return all(each.need(kept, working) <= each.free for each in memory)
