"""The server's temporary folder: gone when the server ends, and after a crash when the next one starts."""

import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        with unlocked.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unlocked.rename(Path(name, LOCK))  # under this name it is never seen without its holder
            files = Path(name, "files")
            files.mkdir()
            yield files


def is_abandoned(folder: Path) -> bool:
    """Whether nobody holds a folder's lock."""
    try:
        with (folder / LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False
