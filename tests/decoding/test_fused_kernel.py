"""The Triton kernel of chunk attention at the 8B's shape, compiled for GPUs. It is not run."""

import json
import re
import shutil

import pytest
from processes import Command

pytest.importorskip("triton", reason="Triton is not installed: make test-all")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake GPU needs a C++ compiler"),
]

COMPILE = """
import sys
from pathlib import Path

import torch
from fake_cuda import install_fake_cuda
from torch._inductor import async_compile
from torch._subclasses.fake_tensor import FakeTensorMode

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.fused import FusedChunks
from vidlada.model.config import VidLaDATextConfig

def compile_kernel(self, name, source, device_str):
    async_compile._load_triton_kernel_from_source(name, source).precompile(warm_cache_only=True)
    sys.exit()  # else it would be run

folder, *gpu = sys.argv[1:]
install_fake_cuda(*map(int, gpu), Path(folder))
async_compile.AsyncCompile.triton = compile_kernel
config = VidLaDATextConfig()
heads, width, anchors = config.num_attention_heads, config.head_dim, 64
index = [-1] * 20 + [frame for frame in range(6) for _ in range(210)] + [-1] * 60
with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
    frames = FrameMap.from_frame_index(index, "cuda:0")
    states = {"device": "cuda:0", "dtype": torch.bfloat16}
    queries = torch.empty(heads, 6 * 210, width, **states)
    keys, values = torch.empty(2, config.num_key_value_heads, len(index), width, **states)
    chosen = torch.empty(config.num_key_value_heads, anchors, device="cuda:0", dtype=torch.long)
    FusedChunks(frames, 1, heads, anchors)(queries, keys, values, chosen)
"""


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "shared_memory", "target", "product"),
    [(80, 108, 163 * 1024, "sm_80", "mma.sync"), (90, 132, 227 * 1024, "sm_90a", "wgmma.mma_async")],
    ids=["A100", "H100"],
)
def test_compiles_for_gpus(capability, multiprocessors, shared_memory, target, product, tmp_path):
    kernels = tmp_path / "kernels"
    command = Command(
        tmp_path, capability, multiprocessors, shared_memory, code=COMPILE, TRITON_CACHE_DIR=kernels,
        TORCHINDUCTOR_CACHE_DIR=tmp_path / "inductor",
    )  # fmt: skip
    assert command.wait(300) == 0, command.errors
    binary, assembly, description = (
        next(kernels.rglob(f"triton_tem_fused_flex_attention*.{kind}")) for kind in ("cubin", "ptx", "json")
    )
    assert binary.read_bytes().startswith(b"\x7fELF")
    text = assembly.read_text()
    assert f".target {target}\n" in text
    assert re.search(rf"{product}\S*\.f32\.bf16\.bf16", text)  # on tensor cores
    assert json.loads(description.read_text())["shared"] <= shared_memory  # else no block could start


EAGER_LAUNCHES = 11  # of both parts of a layer, as `vidlada bench count` counts them
COUNT = """
import json
import sys
from pathlib import Path

import torch
from fake_cuda import install_fake_cuda
from torch._dynamo.utils import counters
from torch._inductor import async_compile
from torch._subclasses.fake_tensor import FakeTensorMode

from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import Layer

folder, *gpu = sys.argv[1:]
install_fake_cuda(*map(int, gpu), Path(folder))
config = VidLaDATextConfig()
with torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True):
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda:0"):
        layer = Layer(config)
        layer.pack()
        hidden, rotation = torch.empty(32, config.hidden_size), torch.empty(2, 32, config.head_dim)
    torch.set_default_dtype(torch.float32)
    for part, other in (Layer.enter_rows, rotation), (Layer.leave, torch.empty_like(hidden)):
        kernels = []
        async_compile.AsyncCompile.triton = lambda self, name, source, device_str: kernels.append(name)
        counters.clear()
        try:
            torch.compile(part, dynamic=True)(layer, hidden, other)
        except AttributeError as error:
            if "_cuda_setDevice" not in str(error):  # which is where it would be run
                raise
        print(len(kernels), counters["inductor"]["extern_calls"])
"""


def test_what_compiled_layers_launch(tmp_path):
    """Fewer kernels than eager layers, and more than graphs, which launch each part once: see docs/benchmarks.md."""
    command = Command(
        tmp_path, 90, 132, 227 * 1024, code=COUNT, TORCHINDUCTOR_CACHE_DIR=tmp_path / "inductor",
        TORCHINDUCTOR_FORCE_DISABLE_CACHES=1,
    )  # fmt: skip
    assert command.wait(300) == 0, command.errors
    parts = [[int(number) for number in line.split()] for line in command.output.splitlines()]
    assert [products for _, products in parts] == [1, 3]
    assert 2 < sum(map(sum, parts)) < EAGER_LAUNCHES
