"""Training samples from files: conversations about videos and images, shuffled, decoded as they are needed."""

from collections.abc import Callable, Sequence
from dataclasses import field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.images import image_info, open_images
from vidlada.messages import THINK_MODES, VIDEO_PLACE, time_instruction
from vidlada.training.data.entries import Entries, as_path, is_image, problem_with
from vidlada.training.data.mixture import Dataset, read_dataset, read_mixture
from vidlada.training.data.samples import STRICT, BrokenMedia, Item, Sample
from vidlada.video import Sampling, VideoInfo, sample_frames

GROUPED_BATCHES = 50  # lengths are sorted within so many batches at a time
CHARACTERS_PER_TOKEN = 4  # roughly; only to put samples of like length together


@dataclass(frozen=True, config=STRICT)
class LlavaSource:
    """Videos, images and conversations in the LLaVA format.

    Args:
        json_path: one json, jsonl or tar file, or a pattern; or
        mixture: a YAML file of several, see `vidlada.training.data.mixture.Dataset`; or
        datasets: the same, written here.
        video_folder: where relative paths start; the data file's own folder by default.
        batch_size: samples a step, over all devices.
        seed: of the order, new for every pass over the data, and of random sampling strategies.
        sampling: how frames are taken.
        group_by_length: batches of samples of like length, which wastes less on padding.
        time_instruction: tell the model when the frames of a video were taken (the published sentence).
        think: also train on reasoning, as published: the first question of a conversation with a `process` ends in
            /think, and its answer is `<think>{process}</think>` and, on a new line, what it was; that of all others
            ends in /no_think. Off, `process` is not used.
    """

    json_path: Path | None = None
    mixture: Path | None = None
    datasets: tuple[Dataset, ...] = ()
    video_folder: Path | None = None
    batch_size: PositiveInt = 8
    seed: NonNegativeInt = 0
    sampling: Sampling = field(default_factory=Sampling)
    group_by_length: bool = False
    time_instruction: bool = False
    think: bool = False

    def __post_init__(self) -> None:
        if sum((self.json_path is not None, self.mixture is not None, bool(self.datasets))) != 1:
            raise InputError("give one of json_path, mixture and datasets")
        if not self.entries:  # a malformed file is refused before the run starts
            raise InputError("the sampling strategies take no entry at all")

    @cached_property
    def entries(self) -> Entries:
        """What the files hold, after sampling."""
        datasets: list[Dataset] = list(self.datasets)
        if self.json_path is not None:
            datasets = [Dataset(self.json_path)]
        elif self.mixture is not None:
            datasets = read_mixture(self.mixture)
        generators = (np.random.default_rng([self.seed, number, 2]) for number in range(len(datasets)))
        return Entries.join(
            [
                read_dataset(dataset, self.video_folder, generator)
                for dataset, generator in zip(datasets, generators, strict=True)
            ]
        )

    @property
    def has_videos(self) -> bool:
        """Whether any entry names a file."""
        places = self.entries.places
        return bool(places["videos"].any() or places["images"].any())

    @property
    def shares_rows(self) -> bool:
        """Every conversation has a row of its own."""
        return False

    def plan(self, step: int) -> list[Item]:
        """The next entries of the shuffled list."""
        total = len(self.entries)
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.item(int(self._order_of(n // total)[n % total])) for n in numbers]

    def load(self, item: Item, size: int) -> Sample:
        """Decode the videos and images of one entry."""
        arrays: list[np.ndarray] = []
        videos: list[tuple[Sequence[float], VideoInfo]] = []
        entry = self.entries[item.media]
        if entry.problem:
            raise BrokenMedia(entry.problem)
        for media in entry.media:
            try:
                with as_path(media) as path:
                    if is_image(media) and len(image_info(path).pages) == 1:
                        arrays.append(open_images(path)[0])
                    else:
                        frames = sample_frames(path, self.sampling, size=size)
                        videos.append((frames.times, frames.info))
                        arrays.append(frames.images)
            except (InputError, OSError) as error:
                raise BrokenMedia(problem_with(media, error)) from error
        return Sample(arrays, self.exchanges_of(item, videos), system=entry.system)

    def exchanges_of(self, item: Item, videos: Sequence[tuple[Sequence[float], VideoInfo]]) -> list[tuple[str, str]]:
        """The exchanges of an item, with the times of its frames if the model is to know them.

        Args:
            item: from `plan`.
            videos: seconds of the frames of each of its videos, and what it is; images may be among them.
        """
        exchanges = list(item.exchanges)
        videos = [(times, info) for times, info in videos if info.codec != "image"]
        if self.time_instruction and len(videos) == len(self.entries[item.media].media) == 1:
            times, info = videos[0]
            question = exchanges[0][0].replace(VIDEO_PLACE, "").strip()
            exchanges[0] = (f"{time_instruction(times, info.duration)}\n{question}", exchanges[0][1])
        return exchanges

    def instead_of(self, item: Item, attempt: int) -> Item:
        """An entry from anywhere: neighbours often share the broken video."""
        generator = np.random.default_rng([self.seed, item.media, attempt, 3])
        return self.item(int(generator.integers(len(self.entries))))

    def steps_of(self, epochs: float) -> int:
        """Steps of so many passes, the last one filled up from the next pass."""
        return int(np.ceil(epochs * len(self.entries) / self.batch_size))

    def item(self, number: int) -> Item:
        """What is asked and answered in an entry."""
        entry = self.entries[number]
        questions, answers = list(entry.questions), list(entry.answers)
        if self.think:
            if questions[0].count(VIDEO_PLACE) == 1:  # as published: in front first, then the mark behind the text
                questions[0] = f"{VIDEO_PLACE}\n{questions[0].replace(VIDEO_PLACE, '').strip()}"
            questions[0] += THINK_MODES[bool(entry.process)]
            if entry.process:
                answers[0] = f"<think>{entry.process.strip()}</think>\n{answers[0].strip()}"
        return Item(list(zip(questions, answers, strict=True)), number, origin=entry.origin)

    @cached_property
    def _order_of(self) -> Callable[[int], np.ndarray]:
        return lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        """Numbers of the entries in the order of one pass."""
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.entries))
        if not self.group_by_length:
            return order
        window = GROUPED_BATCHES * self.batch_size
        order = np.concatenate(
            [
                part[np.argsort(-self._lengths[part], kind="stable")]
                for part in np.split(order, range(window, len(order), window))
            ]
        )
        whole = len(order) // self.batch_size * self.batch_size
        batches = generator.permutation(order[:whole].reshape(-1, self.batch_size))
        return np.concatenate([batches.ravel(), order[whole:]])

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Rough lengths; a video outweighs any text, so that text, images and videos are also kept apart."""
        places = self.entries.places
        frames = places["videos"] * self.sampling.max_frames + places["images"]
        return places["characters"] / CHARACTERS_PER_TOKEN + frames * 10**6
