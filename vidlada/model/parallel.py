"""Tensor parallelism: every layer's heads and intermediate features divided among processes, its code unchanged.

All processes run the same program on the same input, and give the same answer. Each holds its share of the layers'
projections and of the KV cache's heads; embeddings, norms, head and vision tower are whole everywhere. Two sums a layer
(after the attention and after the MLP) are all that they exchange.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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


def free_port() -> int:
    """A port of this machine that nobody listens on, where processes of a launch may meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `python -m vidlada` with the same arguments in several processes of this machine, the first of which prints.

    Returns:
        The first's exit code, or that of another that failed before it.
    """
    common = {
        **os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    running = []
    for rank in range(processes):
        silent: dict[str, Any] = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen([sys.executable, "-m", "vidlada", *arguments], env=environment, **silent))
    try:
        while running[0].poll() is None and not any(each.poll() for each in running):
            time.sleep(POLL_SECONDS)
        if running[0].poll() is None:  # the first may be about to say why it failed too
            try:
                running[0].wait(10)
            except subprocess.TimeoutExpired:
                return next(code for each in running if (code := each.poll()))
        return running[0].returncode
    finally:
        for each in running:
            if each.poll() is None:
                each.terminate()
        for each in running:
            each.wait()
