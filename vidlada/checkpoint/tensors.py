"""The files that hold a checkpoint's tensors: what is in them, and their values, shard by shard.

Safetensors, or PyTorch's pickles where there are none. Those can run code when opened, so they are read by torch's
restricted unpickler, which knows tensors and nothing else.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidlada.checkpoint.configs import read_json
from vidlada.checkpoint.layouts import Entry
from vidlada.errors import InputError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PICKLED = ".bin"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
READ_ERRORS = (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights, all of them there; safetensors go first.

    Raises:
        InputError: one is missing.
    """
    files = [folder / WEIGHTS]
    for single, index in ((WEIGHTS, INDEX), (PICKLED_WEIGHTS, PICKLED_INDEX)):
        if (folder / index).is_file():
            stored = read_json(folder / index)
            names = list(stored.inner("weight_map").values.values())
            if not names or not all(isinstance(name, str) for name in names):
                raise stored.error("weight_map", "it must name the file of every tensor")
            files = [folder / name for name in sorted(set(names))]
            break
        if (folder / single).is_file():
            files = [folder / single]
            break
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder}: {file.name} is missing")
    return files


def read_entries(folder: Path) -> dict[str, Entry]:
    """The tensors in a folder's weights, sharded or not, by name."""
    entries: dict[str, Entry] = {}
    for file in weight_files(folder):
        if file.suffix == PICKLED:
            for key, tensor in read_pickle(file).items():
                entries[key] = Entry(file, tuple(tensor.shape), DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype)))
            continue
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a mapping
                    part = tensors.get_slice(key)
                    entries[key] = Entry(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or not safetensors ({error})") from error
    return entries


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors in a pickled state dictionary, mapped from the file where its format allows it.

    Raises:
        InputError: it is damaged, or holds anything but tensors.
    """
    try:
        try:
            values: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # PyTorch's format before 1.6, which cannot be mapped
            values = torch.load(file, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        reason = " ".join(str(error).split())[:100]
        raise InputError(
            f"{file}: damaged, or holds more than tensors, which could run code when opened ({reason}); where you "
            f"trust it, save its tensors as safetensors"
        ) from error
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise InputError(f"{file}: must hold tensors by their names, and nothing else")
    return {str(key): value for key, value in values.items()}


def read_tensors(places: dict[str, tuple[str, Entry]]) -> Iterator[tuple[str, Tensor]]:
    """Values one after another, file by file."""
    for file in sorted({entry.file for _, entry in places.values()}):
        own = {key: name for key, (name, entry) in places.items() if entry.file == file}
        if file.suffix == PICKLED:
            values = read_pickle(file)
            yield from ((key, values[name].clone(memory_format=torch.contiguous_format)) for key, name in own.items())
            continue
        with safe_open(file, "pt") as tensors:
            for key, name in own.items():
                yield key, tensors.get_tensor(name)
