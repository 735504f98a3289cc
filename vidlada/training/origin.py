"""The folder a run starts from, looked at before torch is imported."""

import json
from pathlib import Path

from vidlada.errors import InputError


def origin(init_from: str) -> Path:
    """The folder a run starts from; `InputError` if there is none."""
    folder = Path(init_from)
    if not folder.is_dir():
        raise InputError(f"init_from: {folder} is not a folder; download the checkpoint and give its path")
    return folder


def is_llama(folder: Path) -> bool:
    """Whether a folder holds a Llama-family language model: by its config.json, or a single GGUF file."""
    if gguf_file(folder) is not None:
        return True
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type") == "llama"
    except (OSError, ValueError, AttributeError):
        return False


def gguf_file(folder: Path) -> str | None:
    """Name of the GGUF file, where a folder has one and no config.json."""
    found = sorted(folder.glob("*.gguf"))
    return found[0].name if len(found) == 1 and not (folder / "config.json").exists() else None
