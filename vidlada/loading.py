"""Load models by name: the one in the package, a folder, or one of the Hugging Face hub."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vidlada.api import VidLaDA
from vidlada.checkpoint.load import (
    Checkpoint,
    describe,
    load_model,
    load_tokenizer,
    load_with_adapter,
    stored_type,
    weights_type,
)
from vidlada.errors import InputError
from vidlada.info import check_memory_of_weights
from vidlada.model.hub import SHIPPED, model_folder, with_revision
from vidlada.model.language_model import Layer
from vidlada.model.parallel import check_shares, make_mesh, shard
from vidlada.model.quantization import Quantization, check_quantization, quantize
from vidlada.processor import VidLaDAProcessor


def load(
    name_or_folder: str | Path = SHIPPED, dtype: str | torch.dtype = "auto", device: str | None = None,
    device_map: Any = None, quantization: Quantization | None = None, compiled: bool = False,
    graphs: bool | None = None, adapter: str | Path | None = None, revision: str | None = None,
    tensor_parallel: int = 1,
) -> VidLaDA:  # fmt: skip
    """Load a model.

    Args:
        name_or_folder: `tiny`, the model in the package; a folder in our, the published or the text-only layout; or a
            name of the Hugging Face hub, `owner/name` or `owner/name@revision`.
        dtype: of the weights; `auto` is float32 on a CPU, and the stored type elsewhere.
        device: `cuda`, `cpu`, …; the first GPU by default, else the CPU.
        device_map: as in transformers, to spread a model over devices.
        quantization: of the language model's projections; see `vidlada.model.quantization`. Each layer is made smaller
            before the next is loaded, unless there is an adapter or a device map. On a GPU it compiles too, as it is
            slower than none without.
        compiled: let torch.compile fuse what cached steps run; the first steps take seconds longer.
        graphs: replay repeated cached passes as CUDA graphs; by default on a GPU. Elsewhere they run over the same
            fixed buffers without one, which is of use only in tests.
        adapter: folder or name of a LoRA adapter for this model, to be merged into it. (An adapter may also be loaded
            by its own name; its base is then the one it names.)
        revision: of a name of the hub: a branch, tag or commit.
        tensor_parallel: processes, started together by torchrun, that divide every layer among them. All must make the
            same calls; see `vidlada.model.parallel`.

    Raises:
        InputError: there is no such folder, or it is not a checkpoint of this family.
        VidLaDAError: the hub cannot be reached.
    """
    device = usable_device(device)
    folder = model_folder(name_or_folder, revision)
    if dtype == "auto" and device == "cpu":
        dtype = torch.float32
    checkpoint = describe(folder)
    if quantization is not None:  # before anything is loaded
        check_quantization(quantization, torch.device(device), weights_type(dtype) or stored_type(checkpoint))
    places: dict[str, Any] = {"device": device, "device_map": device_map, "checkpoint": checkpoint}
    if tensor_parallel > 1:
        if quantization is not None or device_map is not None or compiled:
            raise InputError("tensor_parallel excludes quantization, device_map and compiled")
        graphs, places = False, places | _shares(checkpoint, tensor_parallel, device)
    elif device_map is None:
        check_memory_of_weights(checkpoint, dtype, torch.device(device), quantization if adapter is None else None)
    if quantization is not None:
        places["finish"] = partial(_pack, quantization=quantization)
    if adapter is None:
        model = load_model(folder, dtype, **places)
    else:
        model = load_with_adapter(model_folder(adapter, what="adapter"), dtype, folder, **places)
    if "finish" not in places:
        model.language_model.pack()
    model.language_model.static = graphs
    # uncompiled, int8 turns every weight into its wide type in every product: slower than none on a GPU
    if compiled or (quantization is not None and model.device.type == "cuda"):
        model.language_model.compile_layers()
    processor = VidLaDAProcessor.from_config(load_tokenizer(folder), model.config)
    return VidLaDA(model.eval(), processor, with_revision(str(name_or_folder), revision))


def _shares(checkpoint: Checkpoint, processes: int, device: str) -> dict[str, Any]:
    """Return where this process loads its share of every layer, and what makes the share."""
    check_shares(checkpoint.config.text, processes)
    mesh = make_mesh(processes, torch.device(device).type)
    device = f"cuda:{torch.cuda.current_device()}" if torch.device(device).type == "cuda" else device
    return {"device": device, "finish": partial(shard, mesh=mesh)}


def _pack(layer: nn.Module, quantization: Quantization) -> None:
    """Join a layer's projections and quantise them."""
    assert isinstance(layer, Layer)
    layer.pack()
    quantize(layer, quantization)


def usable_device(device: str | None) -> str:
    """Return the requested device, else the first GPU, else the CPU; `InputError` if this machine lacks it."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
