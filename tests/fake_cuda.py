"""A GPU as far as compilers ask for one: Inductor generates its Triton kernels and Triton compiles them, without any.

Nothing can be run on it. torch caches what it is told, and nothing here is undone: only for a process of its own.
"""

import ctypes
import subprocess
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._inductor.config
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.fx_passes import joint_graph
from torch._subclasses import fake_tensor
from torch.utils import _triton as triton_support
from torch.utils.cpp_extension import include_paths, library_paths
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

# even a tensor without contents is indexed under a guard of its device, and a build without CUDA has none
DEVICE_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""


def install_fake_cuda(capability: int, multiprocessors: int, shared_memory: int, folder: Path) -> None:
    """Make torch and Triton see one GPU in this process.

    Args:
        capability: compute capability, 80 for sm_80.
        multiprocessors: how many the GPU has.
        shared_memory: bytes that one block may use.
        folder: for a compiled library.
    """
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        type="cuda", index=0, name="fake", major=major, minor=minor, warp_size=32, total_memory=80 * 2**30,
        multi_processor_count=multiprocessors, regs_per_multiprocessor=65536, max_threads_per_block=1024,
        max_threads_per_multi_processor=2048, shared_memory_per_block_optin=shared_memory,
    )  # fmt: skip
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "get_rng_state": lambda device=None: torch.zeros(1),
        "set_rng_state": lambda state, device=None: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        if hasattr(CudaInterface, name):
            setattr(CudaInterface, name, staticmethod(answer))
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    fake_tensor.init_gpu_context = joint_graph.lazy_init = lambda device: None  # they would make tensors there
    triton_support.has_triton.cache_clear()
    torch._inductor.config.compile_threads = 1  # processes that compile would know nothing of it
    driver.set_active(FakeDriver(capability))
    _load_device_guard(folder)


class FakeDriver(CudaDriver):
    """What Triton asks of a GPU's driver while it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def _load_device_guard(folder: Path) -> None:
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(DEVICE_GUARD)
    includes = [f"-I{path}" for path in include_paths()]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", *includes, str(source), "-o", str(library), *libraries, "-lc10"]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(library))
