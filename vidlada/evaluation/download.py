"""Fetching a benchmark from the Hugging Face hub into the data root, only when asked."""

import io
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation.benchmarks import Benchmark
from vidlada.evaluation.data import QUESTION_KINDS, check_task
from vidlada.files import atomic_path

QUESTIONS = ("README.md", *(f"*.{kind}" for kind in QUESTION_KINDS))
ARCHIVES = ("*.zip", "*.tar*")
TERMS = "https://huggingface.co/datasets/{}"


def download(root: Path, benchmark: Benchmark) -> None:
    """Fetch what is missing of a benchmark: its questions, then its videos, unpacked where lmms-eval looks for them.

    What is there stays as it is. Archives are kept beside the questions: delete them when the check is content.

    Args:
        root: data root.
        benchmark: with a repository on the hub.

    Raises:
        VidLaDAError: the hub could not be reached, or does not let us in.
        InputError: an archive is damaged.
    """
    questions = root / benchmark.repository
    if any(check_task(root, benchmark, task).problem for task in benchmark.tasks):
        fetch(benchmark.repository, questions, allow_patterns=QUESTIONS)
    if all(check_task(root, benchmark, task).complete for task in benchmark.tasks):
        return
    videos = root / benchmark.folder
    if benchmark.unpacked:
        fetch(benchmark.repository, videos, revision=benchmark.unpacked, ignore_patterns=QUESTIONS)
        return
    fetch(benchmark.repository, questions, allow_patterns=ARCHIVES)
    for parts in archives(questions):
        unpack(parts, videos)


def fetch(repository: str, folder: Path, revision: str | None = None, **chosen: Any) -> None:
    """Files of a dataset's repository into a folder; those that are there and unchanged are not fetched again."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    hub = HfApi()
    try:
        # asked for by itself: where the list cannot be had, a snapshot is content with whatever the folder holds
        hub.list_repo_files(repository, revision=revision, repo_type="dataset")
        hub.snapshot_download(repository, revision=revision, repo_type="dataset", local_dir=folder, **chosen)
    except GatedRepoError as error:
        raise VidLaDAError(
            f"{repository} is given to those who accept its terms: do so at {TERMS.format(repository)}, "
            f"then log in with: hf auth login"
        ) from error
    except Exception as error:  # of several HTTP libraries, which the hub's client lets through
        why = str(error).splitlines()[0]
        raise VidLaDAError(f"{repository} could not be fetched from {hub.endpoint}: {why}") from error


def archives(folder: Path) -> list[list[Path]]:
    """Archives below a folder, each with its parts in order: `videos.tar.part.aa`, `videos.tar.part.ab` …"""
    by_name: dict[Path, list[Path]] = {}
    for path in sorted(path for pattern in ARCHIVES for path in folder.rglob(pattern)):
        if ".cache" not in path.relative_to(folder).parts:  # the hub's own notes
            name = path.name if path.suffix == ".zip" else path.name.split(".tar")[0]
            by_name.setdefault(path.with_name(name), []).append(path)
    return [
        group
        for paths in by_name.values()
        for group in ([[path] for path in paths] if all(map(tarfile.is_tarfile, paths)) else [paths])
    ]


def unpack(parts: Sequence[Path], folder: Path) -> None:
    """Write an archive's files into a folder, except those that are there; each appears only when complete.

    Raises:
        InputError: the archive is damaged, or names a file outside the folder.
    """
    try:
        for name, content in entries(parts):
            inside = PurePosixPath(name)
            if inside.is_absolute() or ".." in inside.parts:
                raise InputError(f"{parts[0]} holds {name!r}, which is outside of {folder}")
            target = folder / inside
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(target) as partial, partial.open("wb") as file:
                shutil.copyfileobj(content, file)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
        raise InputError(f"{parts[0]} cannot be unpacked: {error}; delete it and fetch it again") from error


def entries(parts: Sequence[Path]) -> Iterator[tuple[str, BinaryIO]]:
    """Names and contents of the files in an archive, whose parts are read as one."""
    if parts[0].suffix == ".zip":
        with zipfile.ZipFile(parts[0]) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as packed:
                        yield entry.filename, cast(BinaryIO, packed)
        return
    with ExitStack() as stack:
        stream = Joined([stack.enter_context(path.open("rb")) for path in parts])
        with tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                if (content := tar.extractfile(member) if member.isfile() else None) is not None:
                    with closing(content):
                        yield member.name, cast(BinaryIO, content)


class Joined(io.RawIOBase):
    """Files read as one, so that no joined copy takes disk space."""

    def __init__(self, files: Sequence[BinaryIO]):
        self.files = list(files)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.files:
            piece = self.files[0].read(len(buffer))
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            self.files.pop(0)
        return 0
