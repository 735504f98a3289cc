"""Every command in README and docs names commands and options that there are."""

import re
import shlex
from pathlib import Path

import click
import pytest

from vidlada.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.match(r"\$ (?:.*[ /])?vidlada ([a-z].*)", line):
                    yield pytest.param(found[1], id=f"{page.stem}: {found[1]}"[:100])


@pytest.mark.parametrize("line", list(commands()))
def test_it_is_understood(line):
    arguments = shlex.split(re.split(r" [|&] ", line)[0], comments=True)
    command, context = main, None
    while isinstance(command, click.Group):
        # with the group's own settings: a command remembers the help option it first had
        context = click.Context(command, parent=context, **command.context_settings)
        name, command, arguments = command.resolve_command(context, arguments)
        assert command is not None, name
    try:
        command.make_context(name, arguments, parent=context)
    except click.UsageError as error:
        assert "does not exist" in str(error), error
