"""The folder a run starts from, looked at before torch is imported."""

from pathlib import Path

from vidlada.errors import InputError
from vidlada.files import read_json
from vidlada.model.hub import model_folder

# vidlada.processor.MASK, whose module imports torch
MASK = "<|mdm_mask|>"


def origin(init_from: str) -> Path:
    """The folder a run starts from, downloaded first where it is named by the hub; `InputError` if there is none."""
    try:
        return model_folder(init_from)
    except InputError as error:
        raise InputError(f"init_from: {error}") from error


def is_llama(folder: Path) -> bool:
    """Whether a folder holds an autoregressive Llama-family language model: by its config.json, or a single GGUF file.

    Masked-diffusion models of this family may call themselves llama too; their tokenizers have a mask token.
    """
    if gguf_file(folder) is not None:
        return True
    try:
        values = read_json(folder / "config.json")
        tokenizer = folder / "tokenizer.json"
        masked = tokenizer.is_file() and MASK in tokenizer.read_text(encoding="utf-8")
    except (InputError, OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == "llama" and not masked


def gguf_file(folder: Path) -> str | None:
    """Name of the GGUF file, where a folder has one and no config.json."""
    found = sorted(folder.glob("*.gguf"))
    return found[0].name if len(found) == 1 and not (folder / "config.json").exists() else None
