"""`vidlada info`, `vidlada convert`, `vidlada merge` and `vidlada push`."""

import json
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import name_with_revision, one_line_errors, progress, revision_option, without_progress_bars
from vidlada.video import Sampling


@click.command(short_help="Show a checkpoint, its memory need and this machine.")
@click.argument("model", default="tiny")
@revision_option
@click.option("--frames", type=click.IntRange(1), default=Sampling.max_frames, show_default=True,
              help="Estimate memory for a video of so many.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Estimate memory in this type.")  # fmt: skip
@click.option("--cache", default="none", show_default=True, help="Estimate memory with this cache.")
@click.option("--kv-dtype", type=click.Choice(["auto", "int8", "float8"]), default="auto", show_default=True,
              help="Of its keys and values.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def info(model: str, revision: str | None, frames: int, dtype: str, cache: str, kv_dtype: str, as_json: bool) -> None:
    """Show what checkpoint MODEL is, how much memory a run needs, and what this machine has. Loads no weights.

    MODEL is a folder, or a name of the Hugging Face hub (owner/name, owner/name@revision), which is downloaded.
    """
    from vidlada.checkpoint.load import describe
    from vidlada.info import checkpoint_facts, machine_facts
    from vidlada.model.hub import model_folder

    facts = {
        "checkpoint": checkpoint_facts(
            describe(model_folder(name_with_revision(model, revision))), frames, dtype, cache, kv_dtype
        ),
        "machine": machine_facts(),
    }
    if as_json:
        click.echo(json.dumps(facts))
        return
    for group, values in facts.items():
        click.echo(group)
        for name, value in values.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            elif isinstance(value, int) and not isinstance(value, bool):
                value = f"{value:,}"
            click.echo(f"  {name.replace('_', ' ')}: {value if value != [] else 'none'}")


@click.command(short_help="Write a checkpoint in another layout.")
@click.argument("source")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=click.Choice(["vidlada", "published", "llada"]), default="vidlada",
              show_default=True, help="Layout to write.")  # fmt: skip
@revision_option
@one_line_errors
def convert(source: str, target: Path, layout: Any, revision: str | None) -> None:
    """Write checkpoint SOURCE in another layout as TARGET, a new folder.

    SOURCE is a folder, or a name of the Hugging Face hub (owner/name, owner/name@revision).
    """
    from vidlada.checkpoint.convert import convert as convert_checkpoint
    from vidlada.model.hub import model_folder

    folder = model_folder(name_with_revision(source, revision))
    with progress(f"converting {source}"):
        convert_checkpoint(folder, target, layout)
    click.echo(f"{target}: written in the {layout} layout", err=True)


@click.command(short_help="Merge a LoRA adapter into its base model.")
@click.argument("adapter")
@click.argument("target", type=click.Path(path_type=Path))
@one_line_errors
def merge(adapter: str, target: Path) -> None:
    """Merge LoRA folder ADAPTER into its base and write the model to TARGET, a new folder.

    ADAPTER and the base it names may also be names of the Hugging Face hub (owner/name, owner/name@revision).
    """
    from vidlada.checkpoint.convert import merge as merge_adapter
    from vidlada.model.hub import model_folder

    folder = model_folder(adapter, what="adapter")
    without_progress_bars()
    merge_adapter(folder, target)
    click.echo(f"{target}: written", err=True)


@click.command(short_help="Upload a checkpoint to the Hugging Face hub.")
@click.argument("source")
@click.argument("repository")
@click.option("--revision", help="Branch to upload to; it is created if need be.")
@click.option("--private/--public", default=None, help="Whether a new repository is private; as the hub decides.")
@one_line_errors
def push(source: str, repository: str, revision: str | None, private: bool | None) -> None:
    """Upload checkpoint SOURCE to the Hugging Face hub as REPOSITORY (owner/name), in the vidlada layout.

    Weights, configuration, processor and tokenizer go up, and SOURCE's README.md or else a model card. Log in before
    (hf auth login), or set HF_TOKEN.
    """
    from vidlada.checkpoint.publish import push as push_checkpoint
    from vidlada.model.hub import model_folder

    click.echo(push_checkpoint(model_folder(source), repository, private, revision))
