"""`vidlada info` and `vidlada convert`."""

import json
from pathlib import Path
from typing import Any

import click

from vidlada.cli.options import one_line_errors, progress


@click.command()
@click.argument("model", default="tiny")
@click.option("--frames", type=click.IntRange(1), default=64, show_default=True, help="Estimate memory for so many.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
              show_default=True, help="Estimate memory in this type.")  # fmt: skip
@click.option("--cache", default="none", show_default=True, help="Estimate memory with this cache.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@one_line_errors
def info(model: str, frames: int, dtype: str, cache: str, as_json: bool) -> None:
    """Tell what checkpoint MODEL is, what memory a run needs, and what this machine has. Loads no weights."""
    from vidlada.api import model_folder
    from vidlada.checkpoint.load import describe
    from vidlada.info import checkpoint_facts, machine_facts

    facts = {
        "checkpoint": checkpoint_facts(describe(model_folder(model)), frames, dtype, cache),
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


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", "layout", type=click.Choice(["vidlada", "published", "llada"]), default="vidlada",
              show_default=True, help="Layout to write.")  # fmt: skip
@one_line_errors
def convert(source: Path, target: Path, layout: Any) -> None:
    """Write checkpoint SOURCE in another layout as TARGET, a new folder."""
    from vidlada.checkpoint.convert import convert as convert_checkpoint

    with progress(f"converting {source}"):
        convert_checkpoint(source, target, layout)
    click.echo(f"{target}: written in the {layout} layout", err=True)
