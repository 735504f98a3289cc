"""Where training samples come from, and how a batch of them becomes tensors."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import torch
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from vidlada.errors import InputError
from vidlada.processor import END_OF_TURN, MASK, Message, VidLaDAProcessor
from vidlada.shapes.questions import BENCHMARK_FAMILIES, FAMILIES, questions_for
from vidlada.shapes.render import render_frames
from vidlada.shapes.world import Clip, clip_for, still
from vidlada.training.objective import IGNORED, conversation_mask, separate_samples_mask
from vidlada.video import Sampling, sample_frames

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Share = Annotated[float, Field(ge=0, le=1)]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One video and what is said about it.

    Attributes:
        frames: (frames, height, width, 3) uint8, or None for text alone.
        exchanges: pairs of question and answer.
        separate: each exchange is a sample of its own that shares the video with the others, instead of one
            conversation of several turns. Rendering and the vision tower are then paid once for all.
    """

    frames: np.ndarray | None
    exchanges: list[tuple[str, str]]
    separate: bool = False


class Source(Protocol):
    """Samples of any training step, always the same for the same step: a killed run continues where it was."""

    def batch(self, step: int) -> list[Sample]:
        """The samples of one step."""


@dataclass(frozen=True, config=STRICT)
class ShapesSource:
    """Clips of the shapes world, rendered as they are needed and never repeated.

    Args:
        seed: of the choice of clips and questions.
        frames_per_batch: a batch holds as many clips as fit into this many frames, all of one length.
        seconds: shortest and longest clip; None for the world's own distribution.
        families: question families to choose from; one named twice is asked twice as often.
        questions: exchanges a clip.
        choice_share: share of short questions asked as multiple choice.
        pictures: single frames at a random second instead of whole clips.
        max_things: most things in a clip.
        single_share: share of steps with one exchange a clip, where the video's tokens see the question.
        text_only_share: share of clips left out, so that the model also learns to do without.
        image_size: pixels along a side.
    """

    image_size: PositiveInt
    seed: NonNegativeInt = 0
    frames_per_batch: PositiveInt = 256
    seconds: tuple[PositiveInt, PositiveInt] | None = None
    families: tuple[str, ...] = tuple(BENCHMARK_FAMILIES)
    questions: PositiveInt = 6
    choice_share: Share = 0.3
    pictures: bool = False
    max_things: PositiveInt = 4
    single_share: Share = 0.0
    text_only_share: Share = 0.0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.families) - set(FAMILIES))
        if unknown or not self.families:
            raise InputError(f"unknown question families {unknown}; use some of {', '.join(FAMILIES)}")

    def batch(self, step: int) -> list[Sample]:
        """Clips of one random length, with fresh questions; those that no family fits are left out."""
        generator = np.random.default_rng([self.seed, step])
        questions = 1 if generator.random() < self.single_share else self.questions
        seconds = None if self.seconds is None else int(generator.integers(self.seconds[0], self.seconds[1] + 1))
        first = self._clip(generator, seconds)
        count = self.frames_per_batch if self.pictures else max(1, self.frames_per_batch // first.seconds)
        clips = [first, *(self._clip(generator, first.seconds) for _ in range(count - 1))]
        samples = [self._sample(clip, questions, generator) for clip in clips]
        samples = [sample for sample in samples if sample.exchanges]
        if not samples:
            raise InputError(
                f"none of {len(clips)} clips supports a question of {', '.join(self.families)}; add families"
            )
        return samples

    def _clip(self, generator: np.random.Generator, seconds: int | None) -> Clip:
        return clip_for("train", int(generator.integers(2**62)), seconds=seconds, max_things=self.max_things)

    def _sample(self, clip: Clip, questions: int, generator: np.random.Generator) -> Sample:
        seconds = list(range(clip.seconds))
        if self.pictures:
            clip, seconds = still(clip, int(generator.integers(clip.seconds))), [0]
        asked = questions_for(clip, generator, questions, self.families, self.choice_share)
        text_only = generator.random() < self.text_only_share
        frames = None if text_only else render_frames(clip, seconds, self.image_size)
        return Sample(frames, [(question.question, question.answer) for question in asked], separate=True)


@dataclass(frozen=True, config=STRICT)
class LlavaSource:
    """Videos and conversations in the LLaVA json or jsonl format.

    Args:
        json_path: list of `{"id", "video", "conversations": [{"from", "value"}, …]}`.
        video_folder: where relative video paths start; the json's own folder by default.
        batch_size: samples a step.
        seed: of the order, new for every pass over the data.
        sampling: how frames are taken.
        size: pixels along a side of a frame.
    """

    json_path: Path
    size: PositiveInt
    video_folder: Path | None = None
    batch_size: PositiveInt = 8
    seed: NonNegativeInt = 0
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        _ = self.entries  # a malformed file is refused before the run starts

    @cached_property
    def entries(self) -> list[dict[str, Any]]:
        """The file's entries."""
        return read_llava(self.json_path)

    def batch(self, step: int) -> list[Sample]:
        """The next samples of the shuffled list."""
        entries = self.entries
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self.sample(entries[self._order(n // len(entries))[n % len(entries)]]) for n in numbers]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.entries))

    def sample(self, entry: dict[str, Any]) -> Sample:
        """Decode one entry's video and split its conversation into exchanges."""
        values = [turn["value"].replace("<image>", "").strip() for turn in entry["conversations"]]
        frames = None
        if "video" in entry:
            folder = self.video_folder or Path(self.json_path).parent
            frames = sample_frames(folder / entry["video"], self.sampling, size=self.size).images
        return Sample(frames, list(zip(values[::2], values[1::2], strict=True)))


def read_llava(path: Path) -> list[dict[str, Any]]:
    """Entries of a LLaVA json or jsonl file; `InputError` names the file, and the entry that is malformed."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if Path(path).suffix == ".jsonl":
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid json: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: expected a list of at least one entry")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("video", ""), str):
            raise InputError(f"{path}: entry {number}: expected a mapping whose video is a path, got {entry!r}")
        turns = entry.get("conversations")
        turns = [turn if isinstance(turn, dict) else {} for turn in turns] if isinstance(turns, list) else []
        speakers = [turn.get("from") for turn in turns]
        if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
            raise InputError(f"{path}: entry {number}: conversations must alternate human and gpt, got {speakers}")
        if not all(isinstance(turn.get("value"), str) for turn in turns):
            raise InputError(f"{path}: entry {number}: every turn of its conversation needs a text as its value")
    return entries


@dataclass(frozen=True, config=STRICT)
class CollateSettings:
    """How samples become tensors.

    Args:
        control_targets: also train the control tokens (bos, header marks, end of turn) wherever they stand, the
            prompt included: a quirk of the published recipe.
        conversation_mask: turn a attends to turn b only if b ≤ a.
        end_targets: at most this many extra end-of-turn targets follow an answer. Answers are decoded in a fixed
            number of slots, so the model must know that after the end comes nothing.
        end_slots: at most this many further slots follow, always hidden and never a target; their number is drawn
            log-uniformly. At inference every answer has `gen_length` slots: a model that never saw more slots than
            an answer needs reads the answer's length, and so its kind, from their number.
        force_up_to: answers of at most this many tokens (end of turn included) are always fully hidden.
    """

    control_targets: bool = False
    conversation_mask: bool = False
    end_targets: NonNegativeInt = 0
    end_slots: NonNegativeInt = 0
    force_up_to: NonNegativeInt = 0


class Collator:
    """Turns the samples of a step into one batch.

    Args:
        processor: of the model in training.
        settings: see `CollateSettings`.
    """

    def __init__(self, processor: VidLaDAProcessor, settings: CollateSettings):
        self.processor = processor
        self.settings = settings
        self.end_of_turn = processor.token_id(END_OF_TURN)
        self.mask = processor.token_id(MASK)

    def __call__(self, samples: Sequence[Sample], generator: np.random.Generator) -> dict[str, Any]:
        """Tensors of one step.

        Returns:
            `input_ids`, `labels`, `sample_index`, `position_ids` (batch, tokens); `attention_mask` (batch, tokens)
            or (batch, 1, tokens, tokens), or None when nothing is padded or separate; `force` (samples,); with
            videos `pixel_values` and `frame_counts`.
        """
        rows, first = [], 0
        for sample in samples:
            row = self._row(sample, first, generator)
            first += len(sample.exchanges) if sample.separate else 1
            rows.append(row)
        length = max(len(row["input_ids"]) for row in rows)
        pad = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED, "sample_index": -2}
        batch: dict[str, Any] = {
            name: torch.tensor([row[name] + [pad.get(name, 0)] * (length - len(row[name])) for row in rows])
            for name in ("input_ids", "labels", "sample_index", "position_ids", "turn")
        }
        valid = batch["sample_index"] != -2
        turn = batch.pop("turn")
        if any(sample.separate and len(sample.exchanges) > 1 for sample in samples):
            batch["attention_mask"] = separate_samples_mask(batch["sample_index"], valid)
        elif self.settings.conversation_mask:
            batch["attention_mask"] = conversation_mask(turn, valid)
        else:
            batch["attention_mask"] = None if valid.all() else valid
        targets = torch.bincount(batch["sample_index"][batch["labels"] != IGNORED], minlength=first)
        batch["force"] = targets <= self.settings.force_up_to
        videos = [sample.frames for sample in samples if sample.frames is not None]
        if videos:
            batch["pixel_values"] = torch.cat([self.processor.pixel_values(video) for video in videos])
            batch["frame_counts"] = [len(video) for video in videos]
        return batch

    def _row(self, sample: Sample, first: int, generator: np.random.Generator) -> dict[str, list[int]]:
        """One row: the shared part once, then every exchange with positions as if it stood alone."""
        if not sample.separate:
            return self._exchange(sample, sample.exchanges, first, generator)
        row: dict[str, list[int]] = {}
        for number, exchange in enumerate(sample.exchanges):
            alone = self._exchange(sample, [exchange], first + number, generator)
            if not row:
                shared = self._shared_length(alone["input_ids"])
                row = {name: values[:shared] for name, values in alone.items()}
                row["sample_index"] = [-1] * shared
                row["labels"] = [IGNORED] * shared  # what all samples share is hidden in none
            for name, values in alone.items():
                row[name] = row[name] + values[shared:]
        return row

    def _shared_length(self, input_ids: list[int]) -> int:
        """Tokens up to the end of the video."""
        places = [i for i, token in enumerate(input_ids) if token == self.processor.video_token_id]
        return places[-1] + 1 if places else 0

    def _exchange(
        self, sample: Sample, exchanges: Sequence[tuple[str, str]], sample_number: int, generator: np.random.Generator
    ) -> dict[str, list[int]]:
        messages: list[Message] = []
        for number, (question, answer) in enumerate(exchanges):
            content: Any = [{"type": "text", "text": question}]
            if number == 0 and sample.frames is not None:
                content.insert(0, {"type": "video"})
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        counts = [] if sample.frames is None else [len(sample.frames)]
        encoded = self.processor.encode(messages, counts, add_generation_prompt=False)
        targets = [
            answer or (control and self.settings.control_targets)
            for answer, control in zip(encoded.is_answer, encoded.is_control, strict=True)
        ]
        labels = [t if is_target else IGNORED for t, is_target in zip(encoded.input_ids, targets, strict=True)]
        extra_targets = int(generator.integers(self.settings.end_targets + 1))
        extra_slots = int((self.settings.end_slots + 2) ** generator.random()) - 1
        input_ids = encoded.input_ids + [self.end_of_turn] * extra_targets + [self.mask] * extra_slots
        labels += [self.end_of_turn] * extra_targets + [IGNORED] * extra_slots
        return {
            "input_ids": input_ids,
            "labels": labels,
            "sample_index": [sample_number] * len(input_ids),
            "position_ids": list(range(len(input_ids))),
            "turn": encoded.turn + [encoded.turn[-1]] * (extra_targets + extra_slots),
        }


class StepDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Step number in, batch out: deterministic, so that workers, restarts and ranks agree.

    Args:
        source: the samples of each step.
        collator: samples to tensors.
        seed: of the collator's random choices.
    """

    def __init__(self, source: Source, collator: Collator, seed: int):
        self.source, self.collator, self.seed = source, collator, seed

    def __getitem__(self, step: int) -> dict[str, Any]:
        return self.collator(self.source.batch(step), np.random.default_rng([self.seed, step, 1]))


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
