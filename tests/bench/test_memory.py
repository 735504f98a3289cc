"""Freed memory that the C library keeps goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest

from vidlada.machine import return_free_memory

pytestmark = pytest.mark.slow

BLOCKS, SIZE = 1000, 100_000  # below the size from which glibc maps every block by itself
KEPT = 4000  # larger than the free blocks of a process that has run for a while, which would be taken instead


def resident():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc can")
def test_holes_between_blocks_in_use_go_back_to_the_system():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    holes, kept = [], []
    for _ in range(BLOCKS):
        holes.append(library.malloc(SIZE))
        kept.append(library.malloc(KEPT))  # stays, so that the heap cannot shrink from its end
        ctypes.memset(holes[-1], 1, SIZE)
    before = resident()
    for block in holes:
        library.free(block)
    return_free_memory()
    assert resident() < before - BLOCKS * SIZE / 2
    for block in kept:
        library.free(block)
