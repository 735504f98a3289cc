"""Files of conversations: LLaVA json and jsonl, WebDataset tars, and mixtures of several with sampling strategies."""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.training.data.entries import Entries, Entry, Media, TarMember, is_image
from vidlada.training.data.samples import STRICT
from vidlada.training.settings import build, read_yaml
from vidlada.video import natural_order

STRATEGY = re.compile(r"(all|(first|end|random):(\d+(?:\.\d+)?)(%?))(?:,(\d+))?")
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
        sampled(0, self.sampling_strategy, np.random.default_rng(0))


def sampled(total: int, strategy: str, generator: np.random.Generator) -> list[int]:
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
    """Datasets of a mixture YAML; relative paths start at its folder.

    Raises:
        InputError: the file cannot be read, or an entry is unknown, missing or invalid.
    """
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
        InputError: a file or folder is missing, or a file malformed; it names the entry.
    """
    folder = dataset.video_folder or video_folder
    if folder is not None and not folder.is_dir():
        raise InputError(f"video_folder: {folder} is not a folder")
    files = files_of(dataset.json_path)
    entries = Entries.join([read_tar(path) if path.suffix == ".tar" else read_llava(path, folder) for path in files])
    return entries.take(sampled(len(entries), dataset.sampling_strategy, generator))


def files_of(pattern: Path) -> list[Path]:
    """The files a path or pattern names, in order of their names; `InputError` if there are none."""
    if not any(mark in pattern.name for mark in "*?["):
        return [pattern]
    found = sorted(pattern.parent.glob(pattern.name))
    if not found:
        raise InputError(f"{pattern}: no file fits this pattern")
    return found


def read_llava(path: Path, video_folder: Path | None = None) -> Entries:
    """Entries of a LLaVA json or jsonl file; `InputError` names the file, and the entry that is malformed."""
    folder = video_folder or Path(path).parent
    return Entries.pack(
        entry_of(value, folder, f"{path}: entry {number}") for number, value in enumerate(read_values(path))
    )


def read_values(path: Path) -> list[Any]:
    """The list in a json or jsonl file; `InputError` if there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            values = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            values = json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid json: {error}") from error
    if not isinstance(values, list) or not values:
        raise InputError(f"{path}: expected a list of at least one entry")
    return values


def entry_of(value: Any, folder: Path, origin: str, attached: Sequence[TarMember] = ()) -> Entry:
    """A validated entry.

    Args:
        value: `{"id", "video" or "image", "conversations": [{"from", "value"}, …], "process"}`.
        folder: where relative paths start.
        origin: file and number, for messages.
        attached: media that came with it in a tar, in the order of their names; if the entry names all of them, its
            order counts.

    Raises:
        InputError: something about it is malformed.
    """
    if not isinstance(value, dict):
        raise InputError(f"{origin}: expected a mapping, got {value!r}")
    named = [value[name] for name in ("video", "image") if value.get(name)]  # "video": "" is none
    paths = [path for entry in named for path in (entry if isinstance(entry, list) else [entry])]
    if not all(isinstance(path, str) for path in paths):
        raise InputError(f"{origin}: video must be a path, and image a path or a list of paths; got {named}")
    turns = value.get("conversations")
    turns = [turn if isinstance(turn, dict) else {} for turn in turns] if isinstance(turns, list) else []
    speakers = [turn.get("from") for turn in turns]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        raise InputError(f"{origin}: conversations must alternate human and gpt, got {speakers}")
    said = [turn.get("value") for turn in turns]
    process = value.get("process") or ""
    if not all(isinstance(text, str) for text in [*said, process]):
        raise InputError(f"{origin}: every turn of its conversation needs a text as its value, and process is a text")
    media: tuple[Media, ...] = tuple(attached) or tuple(folder / path for path in paths)
    by_name = {PurePosixPath(member.name).name: member for member in attached}
    if sorted(by_name) == sorted(PurePosixPath(path).name for path in paths):
        media = tuple(by_name[PurePosixPath(path).name] for path in paths)
    entry_id = origin if value.get("id") is None else str(value["id"])
    return Entry(entry_id, media, tuple(said[::2]), tuple(said[1::2]), process, origin)


def read_tar(path: Path) -> Entries:
    """Entries of a WebDataset tar: files of one name up to the first dot belong together, one json and its images
    or videos.

    Raises:
        InputError: the tar is missing or damaged, or an entry is malformed.
    """
    try:
        return Entries.pack(_tar_entries(path))
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
        described = [member for member in members if member.name.endswith(".json")]
        if len(described) != 1:
            raise InputError(f"{path}: {key} needs one json file, and has {len(described)}")
        try:
            value = json.loads(described[0].read())
        except ValueError as error:
            raise InputError(f"{described[0]}: not valid json: {error}") from error
        media = [member for member in members if is_image(member) or member.suffix.lower() in VIDEO_SUFFIXES]
        media.sort(key=lambda member: natural_order(member.name))
        yield entry_of(value, path.parent, str(described[0]), media)
