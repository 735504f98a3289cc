"""Writing a checkpoint in another layout, and an adapter merged into its base."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from safetensors.torch import save_file

from vidlada.checkpoint.layouts import (
    Entry,
    Layout,
    llada_config,
    published_config,
    tensor_name,
)
from vidlada.checkpoint.load import (
    ADAPTER_CONFIG,
    INDEX,
    WEIGHTS,
    describe,
    load_tokenizer,
    load_with_adapter,
    read_tensors,
    save_model,
    sources,
)
from vidlada.errors import InputError
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.processor import VidLaDAProcessor


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
    if (source / ADAPTER_CONFIG).is_file():
        raise InputError(f"{source} is an adapter; write the whole model first: vidlada merge {source} NEW")
    checkpoint = describe(source)
    if (layout == "llada") != checkpoint.config.text_only and layout != "vidlada":
        held = "no vision" if checkpoint.config.text_only else "a vision tower"
        raise InputError(f"{source} has {held}; the {layout} layout cannot hold that")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in use; give a new folder")
    places = sources(checkpoint)
    partial = target.with_name(target.name + ".partial")
    if partial.exists():
        raise InputError(f"{partial} is left from an interrupted conversion; remove it and try again")
    partial.mkdir(parents=True)
    write_shards(partial, places, layout)
    if layout == "vidlada":
        checkpoint.config.architectures = [VidLaDAForMaskedDiffusion.__name__]
        checkpoint.config.save_pretrained(partial)
    else:
        values = published_config(checkpoint.config) if layout == "published" else llada_config(checkpoint.config)
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    for file in tokenizer_files(source):
        shutil.copy(file, partial / file.name)
    if target.exists():
        target.rmdir()
    partial.replace(target)


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
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
             "processor_config.json")  # fmt: skip
    return [folder / name for name in names if (folder / name).is_file()]


def merge(folder: Path, target: Path) -> None:
    """Write base and adapter as one checkpoint, in the base's stored type.

    Args:
        folder: of the adapter.
        target: new or empty folder; it appears only when complete.

    Raises:
        InputError: the adapter cannot be used, or the target is in use.
    """

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in use; give a new folder")
    model = load_with_adapter(folder)
    partial = target.with_name(target.name + ".partial")
    save_model(model, VidLaDAProcessor.from_config(load_tokenizer(folder), model.config), partial)
    if target.exists():
        target.rmdir()
    partial.replace(target)
