"""Run the commands of docs/benchmarks.md and put what they print in the place of the tables below them.

    python scripts/update_benchmarks.py                   all of them: some hours on two cores
    python scripts/update_benchmarks.py quality fidelity  those with one of these words

A command stands in a console block. Its output stands between the block and a comment, `<!-- end of output -->`; the
words around both are a person's. Datasets (DATA …) are written to a temporary folder; plots are drawn anew.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
BLOCK = re.compile(r"(```console\n(?P<commands>(?:\$ [^\n]*\n)+)```\n).*?(?P<end><!-- end of output -->)", re.DOTALL)
DATA = re.compile(r"^DATA\w*")


def run(command: str, folder: Path) -> str:
    """What a command prints."""
    _, *arguments = shlex.split(command)  # vidlada, of this Python
    arguments = [str(folder / argument) if DATA.match(argument) else argument for argument in arguments]
    if "--plot" in arguments:
        (ROOT / arguments[arguments.index("--plot") + 1]).unlink(missing_ok=True)
    print(command, file=sys.stderr)
    found = subprocess.run(
        [sys.executable, "-m", "vidlada", *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return found.stdout.strip()


def main(words: list[str]) -> None:
    """Bring the page up to date, block by block."""
    written: set[str] = set()
    with TemporaryDirectory() as folder:

        def update(block: re.Match[str]) -> str:
            *datasets, measured = [line.removeprefix("$ ") for line in block["commands"].splitlines()]
            if words and not any(word in measured for word in words):
                return block[0]
            for dataset in datasets:
                if dataset not in written:
                    run(dataset, Path(folder))
                    written.add(dataset)
            return f"{block[1]}\n{run(measured, Path(folder))}\n\n{block['end']}"

        for block in list(BLOCK.finditer(PAGE.read_text(encoding="utf-8"))):
            output = update(block)
            text = PAGE.read_text(encoding="utf-8")  # as it is by now: commands take long
            PAGE.write_text(text.replace(block[0], output), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
