"""The server's temporary folder: gone when the server ends, and after a crash when the next one starts."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidlada.errors import InputError
from vidlada.files import lock

PREFIX = "vidlada-serve-"
LOCK = "lock"  # held by the folder's server for as long as it lives


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for uploads and fetched files; those that dead servers left behind are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        unlocked = Path(name, f"{LOCK}.new")
        with unlocked.open("w") as file:
            lock(file, f"{unlocked}: it is locked")
            unlocked.rename(Path(name, LOCK))  # under this name it is never seen without its holder
            files = Path(name, "files")
            files.mkdir()
            yield files


def is_abandoned(folder: Path) -> bool:
    """Whether the server of a folder has ended."""
    try:
        with (folder / LOCK).open() as file:
            lock(file, f"{folder}: its server runs")
            return True
    except (OSError, InputError):
        return False
