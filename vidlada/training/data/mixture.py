"""Files of conversations: LLaVA json and jsonl, WebDataset tars, and mixtures of several with sampling strategies."""

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.training.data.conversations import Value, entry_of, read_values
from vidlada.training.data.entries import Entries, Entry, TarMember, is_image
from vidlada.training.data.samples import STRICT
from vidlada.training.settings import build, read_yaml
from vidlada.video import natural_order

STRATEGY = re.compile(r"(all|(first|end|random):(\d+(?:\.\d+)?)(%?))(?:,(\d+))?")
DATA_SUFFIXES = {".json", ".jsonl", ".ndjson", ".tar"}
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".ogv", ".gif"}
)


@dataclass(frozen=True, config=STRICT)
class Dataset:
    """One part of a mixture.

    Args:
        json_path: a json, jsonl or tar file; a pattern (`part-*.tar`) names several.
        sampling_strategy: `all`, `first:1000`, `end:20%`, `random:999`; `,N` behind it repeats what was taken N times.
        video_folder: where relative paths of its videos and images start; the mixture's, or the file's own folder,
            by default.
    """

    json_path: Path
    sampling_strategy: str = "all"
    video_folder: Path | None = None

    def __post_init__(self) -> None:
        choose_entries(0, self.sampling_strategy, np.random.default_rng(0))


def choose_entries(total: int, strategy: str, generator: np.random.Generator) -> list[int]:
    """Numbers of the entries a strategy takes.

    Args:
        total: entries there are.
        strategy: see `Dataset`. A percentage is rounded up, as in the published code.
        generator: of `random`, which takes entries without repetition, in random order.

    Raises:
        InputError: there is no such strategy.
    """
    found = STRATEGY.fullmatch(strategy.strip())
    if found is None:
        raise InputError(
            f"unknown sampling_strategy {strategy!r}; use all, first:1000, end:20% or random:999, with ,N to repeat"
        )
    _, kind, amount, percent, times = found.groups()
    if kind is None:
        chosen = list(range(total))
    else:
        count = int(np.ceil(float(amount) * total / 100)) if percent else int(float(amount))
        count = min(count, total)
        if kind == "first":
            chosen = list(range(count))
        elif kind == "end":
            chosen = list(range(total - count, total))
        else:
            chosen = generator.permutation(total)[:count].tolist()
    return chosen * int(times or 1)


def read_mixture(path: Path) -> list[Dataset]:
    """Datasets of a mixture YAML, whose relative paths start at its folder; a data file stands for itself.

    Raises:
        InputError: the file cannot be read, or an entry is unknown, missing or invalid.
    """
    if {suffix.lower() for suffix in Path(path).suffixes} & DATA_SUFFIXES:
        return [Dataset(path)]
    values = read_yaml(path)
    listed = values.get("datasets")
    if not isinstance(listed, list) or not listed or set(values) != {"datasets"}:
        raise InputError(f"{path}: expected one entry, datasets, with a list of json_path and sampling_strategy")
    datasets = [build(Dataset, value, f"{path}: datasets[{number}]") for number, value in enumerate(listed)]
    folder = Path(path).parent
    return [
        Dataset(
            folder / dataset.json_path,
            dataset.sampling_strategy,
            None if dataset.video_folder is None else folder / dataset.video_folder,
        )
        for dataset in datasets
    ]


def read_dataset(dataset: Dataset, video_folder: Path | None, generator: np.random.Generator) -> Entries:
    """The entries a dataset contributes.

    Args:
        dataset: which.
        video_folder: used where the dataset names none.
        generator: of a random strategy.

    Raises:
        InputError: a file or folder is missing, or a file damaged or without any usable entry.
    """
    folder = dataset.video_folder or video_folder
    if folder is not None and not folder.is_dir():
        raise InputError(f"video_folder: {folder} is not a folder")
    files = files_of(dataset.json_path)
    entries = Entries.join(
        [read_tar(path) if path.suffix.lower() == ".tar" else read_llava(path, folder) for path in files]
    )
    return entries.take(choose_entries(len(entries), dataset.sampling_strategy, generator))


def files_of(pattern: Path) -> list[Path]:
    """The files a path or pattern names, in order of their names; `InputError` if there are none."""
    if not any(mark in pattern.name for mark in "*?["):
        return [pattern]
    found = sorted(pattern.parent.glob(pattern.name))
    if not found:
        raise InputError(f"{pattern}: no file fits this pattern")
    return found


def read_llava(path: Path, video_folder: Path | None = None) -> Entries:
    """Entries of a LLaVA json or jsonl file; `InputError` names the file, and the first problem if all are broken."""
    folder = video_folder or Path(path).parent
    return pack_usable(path, (entry_of(value, folder, str(path)) for value in read_values(path)))


def pack_usable(path: Path, entries: Iterable[Entry]) -> Entries:
    """Entries of a file, broken ones among them; `InputError` if none can be used."""
    total, usable, first = 0, 0, ""

    def count_entries() -> Iterator[Entry]:
        nonlocal total, usable, first
        for entry in entries:
            total, usable = total + 1, usable + (not entry.problem)
            first = first or entry.problem and f"{entry.origin}: {entry.problem}"
            yield entry

    packed = Entries.pack(count_entries())
    if not total:
        raise InputError(f"{path}: expected a list of at least one entry")
    if not usable:
        raise InputError(f"{first} (none of the file's {total} entries can be used)")
    return packed


def read_tar(path: Path) -> Entries:
    """Entries of a WebDataset tar: files of one name up to the first dot belong together, one json and its images
    or videos.

    Raises:
        InputError: the tar is missing or damaged, or none of its entries can be used.
    """
    try:
        return pack_usable(path, _tar_entries(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (tarfile.TarError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged, or not a tar: {error}") from error


def _tar_entries(path: Path) -> Iterator[Entry]:
    groups: dict[str, list[TarMember]] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile():
                folder, _, name = member.name.rpartition("/")
                key = f"{folder}/{name.split('.')[0]}"
                groups.setdefault(key, []).append(TarMember(path, member.name, member.offset_data, member.size))
    for key, members in groups.items():
        described = [member for member in members if member.suffix.lower() == ".json"]
        if len(described) != 1:
            problem = f"{key.strip('/')} needs one json file, and has {len(described)}"
            yield entry_of(Value("", None, problem), path.parent, f"{path}:{key.strip('/')}")
            continue
        try:
            content = described[0].read().decode("utf-8-sig", "surrogateescape")
            value = Value("", json.loads(content))
        except (ValueError, RecursionError) as error:
            value = Value("", None, f"not valid json: {error}")
        media = [member for member in members if is_image(member) or member.suffix.lower() in VIDEO_SUFFIXES]
        media.sort(key=lambda member: natural_order(member.name))
        yield entry_of(value, path.parent, str(described[0]), media)
