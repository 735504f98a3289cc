"""File helpers: atomic writes, locks, JSON."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vidlada.errors import InputError

PARTIAL = ".partial"  # ends the names of files and folders that are being written


def partial_of(path: Path) -> Path:
    """Name of a file or folder while it is being written, or a folder deleted."""
    return path.with_name(path.name + PARTIAL)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it replaces `path` in the end, or is removed where an error ends the block."""
    partial = partial_of(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to fill; in the end it becomes `folder`, which must be missing or empty.

    Raises:
        InputError: `folder` is in use, or a run that was killed left a partial one.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use; give a new folder")
    partial = partial_of(folder)
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(f"{partial} is left from an interrupted run; remove it and try again") from error
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all; halves of characters, as in names of files, become escapes."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def lock(file: IO[Any] | int, busy: str, shared: bool = False, inherited: bool = True) -> None:
    """Lock an open file, or the descriptor of a folder, until it is closed.

    Args:
        file: to lock.
        busy: message of the error.
        shared: allow other shared locks.
        inherited: processes that inherit the file share the lock; else it is of this process alone.

    Raises:
        InputError: somebody else has locked it.
    """
    try:
        (fcntl.flock if inherited else fcntl.lockf)(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(busy) from error


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """Open a descriptor of a folder, to lock it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def json_line(value: Any) -> str:
    """A value as JSON on one line, readable where UTF-8 holds it: names of files may hold halves of characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or text.encode("utf-8", "ignore").decode() == text else json.dumps(value)


def read_json(path: Path, what: str = "JSON") -> Any:
    """Read a JSON file.

    Args:
        path: of the file.
        what: it should be, for the error.

    Raises:
        InputError: it is missing, or no JSON in UTF-8.
    """
    return _parse(path, json.loads, what)


def read_json_lines(path: Path) -> list[Any]:
    """Read a file of JSON lines, without the empty ones; errors as for `read_json`."""
    # not `splitlines`: it also splits at characters that may stand inside JSON's texts
    return _parse(path, lambda text: [json.loads(line) for line in text.split("\n") if line.strip()], "lines of JSON")


def _parse(path: Path, parse: Callable[[str], Any], what: str) -> Any:
    """Parse a file in UTF-8, turning what can go wrong into an `InputError`."""
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not {what} ({error})") from error
