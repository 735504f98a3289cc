"""The machine a benchmark runs on: name, clock, memory."""

import ctypes
import platform
import resource
import sys
import time
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MAPPED = Path("/proc/self/statm")
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
MEBI, GIB = 2**20, 2**30
RESET_PEAK = "5"  # proc(5): resets the peak resident set size


def machine(device: str) -> str:
    """Return the name of the GPU or processor."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """Return the processor's name, on Linux from /proc/cpuinfo."""
    listing = Path("/proc/cpuinfo")
    names = (
        [line for line in listing.read_text().splitlines() if line.startswith("model name")] if listing.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def now(device: str) -> float:
    """Return a time in seconds after synchronising the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak_memory(device: str) -> None:
    """Reset the peak memory, where the system supports it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text(RESET_PEAK)


def peak_memory(device: str) -> int:
    """Most bytes in use since the reset, or since the start where the system knows no reset: allocated on a GPU, else
    resident of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def resident_memory() -> int:
    """Return the resident memory of this process in bytes; 0 where the system does not report it."""
    return int(MAPPED.read_text().split()[1]) * resource.getpagesize() if MAPPED.exists() else 0


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None where the system does not report it."""
    if device.type == "cuda":
        # what PyTorch's allocator keeps of freed tensors can be had again
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    listing = Path("/proc/meminfo")
    if device.type != "cpu" or not listing.exists():
        return None
    found = [line for line in listing.read_text().splitlines() if line.startswith("MemAvailable:")]
    return int(found[0].split()[1]) * 1024 if found else None


def keep_freed_memory() -> None:
    """Let glibc keep freed memory.

    By default every large activation is mapped anew and given back, and its pages are zeroed each time they are
    touched: a fifth of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


def return_free_memory() -> None:
    """Return the memory that glibc keeps to the system.

    oneDNN keeps a compiled kernel for every shape it has met, up to 1024. Between those small blocks, which stay, the
    holes left by activations of one shape do not fit the next: without this the heap grows for hours.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
