"""The commands: parse, call, print. Nothing else lives here."""

import click

from vidlada import __version__
from vidlada.cli.ask import ask, chat
from vidlada.cli.batch import batch
from vidlada.cli.bench import bench
from vidlada.cli.checkpoint import convert, info, merge, push
from vidlada.cli.data import data
from vidlada.cli.eval import evaluate
from vidlada.cli.plan import plan
from vidlada.cli.serve import serve
from vidlada.cli.shapes import shapes
from vidlada.cli.train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vidlada")
def main() -> None:
    """Ask videos questions with VidLaDA, a video language model built on masked diffusion."""


@main.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell, e.g. for bash: source <(vidlada completion bash)"""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(main, {}, "vidlada", "_VIDLADA_COMPLETE").source())


for command in (ask, chat, info, convert, merge, push, train, data, shapes, bench, plan, evaluate, serve, batch):
    main.add_command(command)
