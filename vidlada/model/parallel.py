"""Tensor parallelism: every layer's heads and intermediate features divided among processes, its code unchanged.

All processes run the same program on the same input, and give the same answer. Each holds its share of the layers'
projections and of the KV cache's heads; embeddings, norms, head and vision tower are whole everywhere. Two sums a layer
(after the attention and after the MLP) are all that they exchange.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from vidlada.errors import InputError
from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import Layer

PLAN: dict[str, type[ParallelStyle]] = {
    "self_attn.q_proj": ColwiseParallel, "self_attn.k_proj": ColwiseParallel, "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel, "mlp.gate_proj": ColwiseParallel, "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}  # fmt: skip
POLL_SECONDS = 0.1  # between looks whether one of the processes has ended
SECONDS_TO_FAIL = 10  # that the first has to end after another


def world_size() -> int:
    """Number of processes of this launch, as torchrun and `launch` tell them; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process of a launch that prints."""
    return os.environ.get("RANK", "0") == "0"


def check_shares(config: VidLaDATextConfig, processes: int) -> None:
    """Refuse a number of processes that does not divide a layer.

    Raises:
        InputError: that is so.
    """
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(config, name) % processes:
            raise InputError(
                f"tensor parallelism over {processes} processes: {name} {getattr(config, name)} is not divisible by it"
            )


def make_mesh(processes: int, device: str) -> DeviceMesh:
    """The processes of this launch, joined.

    Args:
        processes: that were asked for.
        device: `cpu` or `cuda`; each process takes the GPU of its number.

    Raises:
        InputError: this process was not launched together with so many.
    """
    if world_size() != processes:
        raise InputError(
            f"tensor parallelism over {processes} processes was asked for, and {world_size()} run; start them with "
            f"torchrun --nproc-per-node {processes}"
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    return init_device_mesh(device, (processes,))


def shard(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this process its share of a layer, in place.

    Args:
        layer: of a language model, its projections not packed.
        mesh: of all processes.
    """
    assert isinstance(layer, Layer)
    parallelize_module(layer, mesh, {name: style() for name, style in PLAN.items()})
    queries, keys, values = (count // mesh.size() for count in layer.self_attn.heads_of)
    layer.self_attn.heads_of = queries, keys, values


def least_of_processes(layer: nn.Module, number: int) -> int:
    """The least of the numbers that the processes give which have a share of a layer; all must call this."""
    assert isinstance(layer, Layer)
    weight = layer.self_attn.q_proj.weight
    assert isinstance(weight, DTensor)
    found = torch.tensor(number, device=weight.device)
    distributed.all_reduce(found, distributed.ReduceOp.MIN, group=weight.device_mesh.get_group())
    return int(found)


def free_port() -> int:
    """A port of this machine that nobody listens on, where processes of a launch may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def check_devices(processes: int, device: str | None) -> None:
    """Refuse, before anything is started, more processes than this machine has GPUs.

    Args:
        processes: that are asked for.
        device: as `vidlada.load` takes it.

    Raises:
        InputError: they are more.
    """
    gpus = torch.cuda.device_count()
    on_gpu = gpus > 0 if device is None else device.startswith("cuda")
    if on_gpu and processes > gpus:
        raise InputError(
            f"tensor parallelism over {processes} processes needs a GPU for each, and there are {gpus}; use fewer "
            f"processes, or device cpu"
        )


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m vidlada` with the same arguments in several processes of this machine, the first of which prints.
    Of another that fails before it the last line is printed, unless the first has refused the same input.

    Returns:
        The first's exit code, or that of another that failed before it.
    """
    common = {
        **os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        running: list[subprocess.Popen[bytes]] = []
        stack.callback(end, running)
        for rank in range(processes):
            silent: dict[str, Any] = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": said[rank]}
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(subprocess.Popen([sys.executable, "-m", "vidlada", *arguments], env=environment, **silent))
        while running[0].poll() is None and not any(each.poll() for each in running):
            time.sleep(POLL_SECONDS)
        failed = next((rank for rank, each in enumerate(running) if rank and each.poll()), None)
        with suppress(subprocess.TimeoutExpired):  # the first may be about to say why it failed too
            running[0].wait(SECONDS_TO_FAIL)
        code = running[0].returncode
        if failed is None or code in (0, InputError.exit_code):
            return code
        said[failed].seek(0)
        lines = [line for line in said[failed].read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        line = [f"ended with {running[failed].returncode}", *lines[-1:], *errors][-1]
        print(f"error: process {failed}: {line}", file=sys.stderr)
        return code or running[failed].returncode


def end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes that still run, and wait for all."""
    for each in running:
        if each.poll() is None:
            each.terminate()
    for each in running:
        each.wait()
