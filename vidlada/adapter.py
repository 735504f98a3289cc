"""LoRA folders: the whole model they stand for."""

from pathlib import Path
from typing import Any

import torch

from vidlada.checkpoint import base_of, load_model
from vidlada.errors import InputError
from vidlada.model import VidLaDAForMaskedDiffusion
from vidlada.noise import quiet_libraries


def load_with_adapter(
    folder: Path, dtype: str | torch.dtype = "auto", base_folder: Path | None = None, **places: Any
) -> VidLaDAForMaskedDiffusion:
    """The base model with an adapter merged into its weights: as fast as the base model.

    Args:
        folder: of the adapter.
        dtype: of the weights.
        base_folder: of the base model; by default the one the adapter names.
        places: `device`, `device_map`, `checkpoint` (of the base) of `vidlada.checkpoint.load_model`.

    Raises:
        InputError: the adapter or its base is missing or damaged, or peft is not installed.
    """
    base = load_model(base_folder or base_of(folder), dtype=dtype, **places)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError(f"{folder} is an adapter; it needs peft: pip install vidlada[train]") from error
    try:
        with quiet_libraries():
            adapted = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: does not fit its base model: {str(error).splitlines()[0]}") from error
    merged: VidLaDAForMaskedDiffusion = adapted.merge_and_unload()
    return merged


def merge(folder: Path, target: Path) -> None:
    """Write base and adapter as one checkpoint, in the base's stored type.

    Args:
        folder: of the adapter.
        target: new or empty folder; it appears only when complete.

    Raises:
        InputError: the adapter cannot be used, or the target is in use.
    """
    from vidlada.checkpoint import load_tokenizer
    from vidlada.processor import VidLaDAProcessor
    from vidlada.training.models import save_model

    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is in use; give a new folder")
    model = load_with_adapter(folder)
    partial = target.with_name(target.name + ".partial")
    save_model(model, VidLaDAProcessor.from_config(load_tokenizer(folder), model.config), partial)
    if target.exists():
        target.rmdir()
    partial.replace(target)
