"""Checkpoints on the Hugging Face hub: a model card, and the upload of a folder."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from vidlada.checkpoint.convert import TOKENIZER_FILES, convert, whole_model, write_our_config
from vidlada.checkpoint.load import Checkpoint, describe, load_tokenizer, sources
from vidlada.checkpoint.tensors import INDEX, PICKLED, weight_files
from vidlada.errors import InputError, VidLaDAError
from vidlada.model.hub import HUB_NAME

CARD = "README.md"


def push(source: Path, repository: str, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a checkpoint in our layout; one of another layout is converted first, in a temporary folder.

    Args:
        source: folder of any layout.
        repository, private, revision: as `upload`.

    Returns:
        The commit's address.

    Raises:
        InputError: the checkpoint is incomplete, or the name cannot be one of the hub's.
        VidLaDAError: the hub cannot be reached, or does not let us in.
    """
    check_name(repository)
    checkpoint = whole_model(source)
    sources(checkpoint)
    load_tokenizer(source)  # nobody can use a checkpoint without one
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if checkpoint.layout == "vidlada" and not any(file.suffix == PICKLED for file in weight_files(source)):
            link_files(checkpoint, folder)
        else:
            convert(source, folder, "vidlada")
        if (source / CARD).is_file():
            shutil.copyfile(source / CARD, folder / CARD)
        return upload(folder, repository, private, revision)


def link_files(checkpoint: Checkpoint, folder: Path) -> None:
    """A folder for the hub of a checkpoint that is in our layout: its weights are linked, not copied."""
    folder.mkdir()
    for file in (*weight_files(checkpoint.folder), checkpoint.folder / INDEX):
        if file.is_file():
            (folder / file.name).symlink_to(file.resolve())
    for name in TOKENIZER_FILES:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    write_our_config(checkpoint, folder)


def upload(folder: Path, repository: str, private: bool | None = None, revision: str | None = None) -> str:
    """Upload a folder as one commit, with a model card if it has none.

    Args:
        folder: in our layout.
        repository: `owner/name`; it is created if need be.
        private: whether a new repository is; as the hub decides by default.
        revision: branch to upload to; it is created if need be.

    Returns:
        The commit's address.

    Raises:
        InputError, VidLaDAError: as `push`.
    """
    from huggingface_hub import HfApi

    check_name(repository)
    if not (folder / CARD).exists():
        (folder / CARD).write_text(model_card(describe(folder), repository), encoding="utf-8")
    hub = HfApi()
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        if revision is not None:
            hub.create_branch(repository, branch=revision, exist_ok=True)
        return str(hub.upload_folder(repo_id=repository, folder_path=folder, revision=revision).commit_url)
    except Exception as error:  # of several HTTP libraries, which the hub's client lets through
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VidLaDAError(
            f"{repository} could not be uploaded to {hub.endpoint}: {reason}; to be let in, log in (hf auth login) or "
            f"set HF_TOKEN to a token that may write"
        ) from error


def check_name(repository: str) -> None:
    """Refuse what cannot be a repository's name."""
    found = HUB_NAME.fullmatch(repository)
    if found is None or found["revision"] is not None:
        raise InputError(f"{repository!r} is no name of a repository of the hub; it has the form owner/name")


def model_card(checkpoint: Checkpoint, repository: str) -> str:
    """A model card that says what the checkpoint is and how to use it; a licence is its author's to add."""
    config = checkpoint.config
    text = config.text
    seen = (
        "It is text-only."
        if config.text_only
        else f"It sees videos as frames of {config.vision.image_size} x {config.vision.image_size} pixels, "
        f"{config.tokens_per_frame()} visual tokens each."
    )
    pipeline = "text-generation" if config.text_only else "video-text-to-text"
    command = f"""```console
$ vidlada ask "video.mp4" "What happens?" --model {repository}
```

"""
    video = "None" if config.text_only else '"video.mp4"'
    return f"""---
library_name: vidlada
pipeline_tag: {pipeline}
tags:
- vidlada
- masked-diffusion
---

# {repository.split("/")[1]}

A masked-diffusion language model of the VidLaDA family ([arXiv 2601.17868](https://arxiv.org/abs/2601.17868)):
{text.num_hidden_layers} layers of width {text.hidden_size}, {text.vocab_size} tokens. {seen}

It runs with the `vidlada` package:

{"" if config.text_only else command}```python
import vidlada

model = vidlada.load("{repository}")
print(model.ask({video}, "What happens?").text)
```

Where `vidlada` is installed, transformers loads it too, with `trust_remote_code=True`:
`AutoModel.from_pretrained("{repository}", trust_remote_code=True)`.
"""
