"""Convert a checkpoint to another layout; merge an adapter into its base."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from safetensors.torch import save_file

from vidlada.checkpoint.export import config_for_layout
from vidlada.checkpoint.layouts import Entry, Layout, tensor_name
from vidlada.checkpoint.load import (
    ADAPTER_CONFIG,
    Checkpoint,
    describe,
    load_tokenizer,
    load_with_adapter,
    save_model,
    sources,
    stored_type,
    write_auto_map,
)
from vidlada.checkpoint.tensors import INDEX, WEIGHTS, read_tensors
from vidlada.errors import InputError
from vidlada.files import atomic_folder
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "processor_config.json",
)  # fmt: skip


def convert(source: Path, target: Path, layout: Layout) -> None:
    """Write a checkpoint in another layout; values are not changed. Memory stays near one shard.

    Args:
        source: folder of any layout.
        target: new or empty folder; it appears only when complete.
        layout: to write.

    Raises:
        InputError: the source is unusable, the target is in use, or the layout cannot hold the model.
    """
    if layout not in get_args(Layout):
        raise InputError(f"unknown layout {layout!r}; use one of {', '.join(get_args(Layout))}")
    checkpoint = whole_model(source)
    if layout == "llada" and not checkpoint.config.text_only:
        raise InputError(f"{source} has a vision tower; the llada layout cannot hold that")
    places = sources(checkpoint)
    with atomic_folder(target) as folder:
        write_shards(folder, places, layout)
        for file in tokenizer_files(source):
            shutil.copy(file, folder / file.name)
        if layout == "vidlada":
            write_our_config(checkpoint, folder)
        else:
            values = config_for_layout(checkpoint.config, layout, checkpoint.dtype)
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def whole_model(folder: Path) -> Checkpoint:
    """Describe a checkpoint; `InputError` if it is an adapter."""
    if (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"{folder} is an adapter; write the whole model first: vidlada merge {folder} NEW")
    return describe(folder)


def write_our_config(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json in our layout, and the processor's files where the checkpoint has a tokenizer."""
    config = checkpoint.config
    config.architectures = [VidLaDAForMaskedDiffusion.__name__]
    config.dtype = stored_type(checkpoint)
    config.save_pretrained(folder)
    if (checkpoint.folder / "tokenizer.json").is_file():
        VidLaDAProcessor.from_config(load_tokenizer(checkpoint.folder), config).save_pretrained(folder)
    write_auto_map(folder)


def write_shards(folder: Path, places: dict[str, tuple[str, Entry]], layout: Layout) -> None:
    """Write tensors under a layout's names, one file for every file they come from, and the index."""
    files = sorted({entry.file for _, entry in places.values()})
    weight_map: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        own = {key: place for key, place in places.items() if place[1].file == file}
        tensors = {tensor_name(layout, key): tensor for key, tensor in read_tensors(own)}
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def tokenizer_files(folder: Path) -> Iterable[Path]:
    """The files of a tokenizer and processor, where present."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def merge(folder: Path, target: Path) -> None:
    """Write base and adapter as one checkpoint, in the base's stored type.

    Args:
        folder: of the adapter.
        target: new or empty folder; it appears only when complete.

    Raises:
        InputError: the adapter cannot be used, or the target is in use.
    """
    with atomic_folder(target) as partial:
        model = load_with_adapter(folder)
        save_model(model, VidLaDAProcessor.from_config(load_tokenizer(folder), model.config), partial)
