"""Conversations of data files: one, its media, and millions of them in little memory."""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import NamedTemporaryFile
from typing import Any, overload

import numpy as np

from vidlada.video import IMAGE_SUFFIXES

COPIED_AT_ONCE = 2**20  # bytes


@dataclass(frozen=True)
class TarMember:
    """A file inside a tar, found again without reading the tar from its start."""

    tar: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    @property
    def suffix(self) -> str:
        """How its name ends, as paths have it."""
        return PurePosixPath(self.name).suffix

    @contextmanager
    def as_file(self) -> Iterator[Path]:
        """A temporary file of its content, for readers that need one; a video is never read into memory as a whole."""
        with NamedTemporaryFile(suffix=self.suffix) as copy, self.tar.open("rb") as file:
            file.seek(self.offset)
            for start in range(0, self.size, COPIED_AT_ONCE):
                copy.write(file.read(min(COPIED_AT_ONCE, self.size - start)))
            copy.flush()
            yield Path(copy.name)

    def __str__(self) -> str:
        return f"{self.tar}:{self.name}"


Media = Path | TarMember


def is_image(media: Media) -> bool:
    """Whether a name is an image's; else it is a video's."""
    return media.suffix.lower() in IMAGE_SUFFIXES


def as_path(media: Media) -> AbstractContextManager[Path]:
    """A file to read, for as long as it is needed."""
    return media.as_file() if isinstance(media, TarMember) else nullcontext(media)


def problem_with(media: Media, error: Exception) -> str:
    """What is wrong with a file; of a tar's member the error knows only a temporary copy, if any name."""
    return f"{media}: {error}" if isinstance(media, TarMember) else str(error)


@dataclass(frozen=True)
class Entry:
    """One conversation.

    Attributes:
        id: of the file, or its number.
        media: a video, or images in order.
        questions, answers: of its turns; `<image>` marks are kept.
        process: reasoning that leads to the last answer.
        system: message of the conversation; None for the model's own.
        problem: why the entry cannot be used; empty if it can.
        origin: file, number and line, for messages.
    """

    id: str
    media: tuple[Media, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    process: str = ""
    system: str | None = None
    problem: str = ""
    origin: str = field(default="", compare=False)


# Where an entry begins and ends in the packed content, and its size
PLACE = np.dtype([("start", np.int64), ("end", np.int64), ("characters", np.int64), ("videos", int), ("images", int)])


class Entries(Sequence[Entry]):
    """Entries packed into one block of bytes, made anew whenever one is asked for.

    As objects they would take more, and again as much in every process that prepares batches: reading an object
    writes its reference count, and with it a copy of the memory that a forked process shares.

    Args:
        content: packed entries.
        places: (entries,) of `PLACE`; an entry that is taken several times is packed once.
    """

    def __init__(self, content: bytes, places: np.ndarray):
        self.content, self.places = content, places

    @classmethod
    def pack(cls, entries: Iterable[Entry]) -> "Entries":
        """Pack entries, one after the other."""
        content, places = bytearray(), []
        for entry in entries:
            start = len(content)
            content += pickle.dumps(_plain(entry))
            characters = sum(map(len, (*entry.questions, *entry.answers, entry.process, entry.system or "")))
            images = sum(map(is_image, entry.media))
            places.append((start, len(content), characters, len(entry.media) - images, images))
        return cls(bytes(content), np.array(places, PLACE))

    @classmethod
    def join(cls, parts: Sequence["Entries"]) -> "Entries":
        """The entries of all parts."""
        places, start = [], 0
        for part in parts:
            moved = part.places.copy()
            moved["start"] += start
            moved["end"] += start
            places.append(moved)
            start += len(part.content)
        return cls(b"".join(part.content for part in parts), np.concatenate(places))

    def take(self, numbers: Sequence[int]) -> "Entries":
        """Some entries, in another order or several times."""
        return Entries(self.content, self.places[np.array(numbers, np.int64)])

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, number: int) -> Entry: ...
    @overload
    def __getitem__(self, number: slice) -> "Entries": ...
    def __getitem__(self, number: int | slice) -> "Entry | Entries":
        if isinstance(number, slice):
            return Entries(self.content, self.places[number])
        place = self.places[number]
        entry_id, media, *rest = pickle.loads(self.content[place["start"] : place["end"]])
        return Entry(entry_id, tuple(map(_media, media)), *rest)


def _plain(entry: Entry) -> tuple[Any, ...]:
    """An entry without classes, which take more to pack than what they hold."""
    media = [
        (str(one.tar), one.name, one.offset, one.size) if isinstance(one, TarMember) else str(one)
        for one in entry.media
    ]
    texts = entry.questions, entry.answers, entry.process, entry.system
    return entry.id, media, *texts, entry.problem, entry.origin


def _media(plain: str | tuple[str, str, int, int]) -> Media:
    return Path(plain) if isinstance(plain, str) else TarMember(Path(plain[0]), *plain[1:])
