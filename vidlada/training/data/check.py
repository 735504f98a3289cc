"""What is wrong with a run's data, before hours are spent on it."""

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vidlada.errors import InputError
from vidlada.images import open_images
from vidlada.messages import VIDEO_PLACE
from vidlada.processor import VidLaDAProcessor
from vidlada.tiling import MediaShape
from vidlada.training.data.collate import messages_of
from vidlada.training.data.entries import Media, as_path, is_image, problem_with
from vidlada.training.data.llava import LlavaSource
from vidlada.video import Sampling, VideoInfo, sample_frames

Decoded = tuple[tuple[float, ...], VideoInfo]


class Problem(NamedTuple):
    """A kind of problem with a file, and a message."""

    kind: str
    message: str


BARS = 12  # of the histogram
BAR_WIDTH = 40


@dataclass
class DataReport:
    """Findings about one stage's data.

    Attributes:
        stage: its name.
        entries: how many it has.
        problems: by kind, a line for each entry concerned.
        lengths: tokens of every usable entry.
    """

    stage: str
    entries: int
    problems: dict[str, list[str]] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)

    def note(self, kind: str, line: str) -> None:
        """Add a problem."""
        printable = line.encode(errors="backslashreplace").decode()  # names may hold bytes that are not UTF-8
        self.problems.setdefault(kind, []).append(printable)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    def text(self, most: int | None = None) -> str:
        """For people.

        Args:
            most: lines shown of each kind of problem; None for all.
        """
        lines = [f"{self.stage}: {self.entries} entries"]
        for kind, found in self.problems.items():
            lines.append(f"  {kind}: {len(found)}")
            lines += [f"    {line}" for line in found[:most]]
            lines += [f"    … and {len(found) - most} more"] if most is not None and len(found) > most else []
        return "\n".join([*lines, *histogram(self.lengths)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"stage": self.stage, "entries": self.entries, "problems": self.problems, "lengths": self.lengths}


def check_source(
    name: str,
    source: LlavaSource,
    processor: VidLaDAProcessor,
    workers: int = 4,
    progress: Callable[[int], None] = lambda done: None,
) -> DataReport:
    """Look at every entry of a source. Videos and images are decoded as training does.

    Args:
        name: of the stage.
        source: its data.
        processor: counts tokens as training will.
        workers: threads that open files.
        progress: called with the number of finished entries.
    """
    entries = source.entries
    report = DataReport(name, len(entries))
    # what a strategy repeats on purpose is one entry; two entries of one id are two
    counts = Counter(entry.id for entry in {entry.origin: entry for entry in entries if not entry.problem}.values())
    for entry_id, count in counts.items():
        if count > 1:
            report.note("duplicate ids", f"{entry_id}: {count} times")
    files = list(dict.fromkeys(media for entry in entries for media in entry.media))
    with ThreadPoolExecutor(workers) as pool:
        known = dict(zip(files, pool.map(partial(try_media, sampling=source.sampling), files), strict=True))
    for number in range(len(entries)):
        check_entry(source, number, known, processor, report)
        progress(number + 1)
    return report


def check_entry(
    source: LlavaSource,
    number: int,
    known: dict[Media, Decoded | Problem],
    processor: VidLaDAProcessor,
    report: DataReport,
) -> None:
    """Add what is wrong with one entry to the report, or its length."""
    entry, videos = source.entries[number], []
    if entry.problem:
        report.note("malformed entries", f"{entry.origin}: {entry.problem}")
        return
    for media in entry.media:
        found = known[media]
        if isinstance(found, Problem):
            report.note(found.kind, f"{entry.origin}: {found.message}")
        else:
            videos.append(found)
    if not any(answer.strip() for answer in entry.answers):
        report.note("without labels", f"{entry.origin}: every answer is empty")
    if not entry.media and any(VIDEO_PLACE in question for question in entry.questions):
        report.note("without media", f"{entry.origin}: {VIDEO_PLACE} stands in it, but it names no video or image")
    if len(videos) < len(entry.media):
        return
    images = [is_image(media) and info.frames == 1 for media, (_, info) in zip(entry.media, videos, strict=True)]
    tiling, alone = processor.tiling, sum(images) == 1
    shapes: list[MediaShape] = [
        tiling.shape_of(info.height, info.width, alone) if image and not tiling.as_frames else len(times)
        for image, (times, info) in zip(images, videos, strict=True)
    ]
    messages = messages_of(shapes, source.exchanges_of(source.item(number), videos), entry.system)
    try:
        encoded = processor.encode(messages, shapes, add_generation_prompt=False)
    except InputError as error:
        report.note("too long", f"{entry.origin}: {error}")
    else:
        report.lengths.append(len(encoded.input_ids))


def try_media(media: Media, sampling: Sampling) -> Decoded | Problem:
    """Decode a file as training does: the times of its frames and what it is, or the kind of problem with it and a
    message."""
    try:
        with as_path(media) as path:
            frames = sample_frames(path, sampling, size=1)
            info = frames.info
            if is_image(media) and info.frames == 1:
                height, width = open_images(path)[0].shape[:2]
                info = replace(info, height=height, width=width)  # upright
            return frames.times, info
    except (InputError, OSError) as error:
        missing = isinstance(error.__cause__, FileNotFoundError)
        return Problem("missing files" if missing else "unreadable files", problem_with(media, error))


def histogram(lengths: Iterable[int]) -> list[str]:
    """Lines of a histogram of tokens."""
    values = np.array(list(lengths))
    if not len(values):
        return ["  no usable entry"]
    counts, edges = np.histogram(values, bins=min(BARS, int(np.ptp(values)) + 1))
    lines = [f"  tokens: median {int(np.median(values))}, most {values.max()}, sum {values.sum()}"]
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        bar = "█" * round(BAR_WIDTH * count / counts.max())
        lines.append(f"  {round(low):>7}–{round(high):<7} {bar} {count}")
    return lines
