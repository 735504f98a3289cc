"""How the samples of a step become tensors."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidlada.errors import InputError
from vidlada.messages import END_OF_TEXT, END_OF_TURN, MASK, VIDEO_PLACE, Message, place_media
from vidlada.model.masks import PackedMask, RowMask, SharedPrefixMask
from vidlada.processor import VidLaDAProcessor
from vidlada.tiling import ImageShape, MediaShape
from vidlada.training.config import CollateSettings
from vidlada.training.data.event_labels import latest_events
from vidlada.training.data.samples import Item, Sample, Source
from vidlada.training.objective import IGNORED, conversation_mask

Row = dict[str, list[int]]  # what is known of every token, by name
PADDING = -2  # sample index of positions that belong to nothing
MOST_REPLACEMENTS = 20  # for one broken sample


class Collator:
    """Turns the samples of a step into one batch.

    Args:
        processor: of the model in training.
        settings: see `CollateSettings`.
        stand_in: size of the frame that stands in, behind the attention mask, where a batch has no video. Processes
            that train together must all run the vision tower in every step. None: no frame stands in.
        events: find the tokens that should know an event, where samples know theirs and have rows of their own.
    """

    def __init__(
        self,
        processor: VidLaDAProcessor,
        settings: CollateSettings,
        stand_in: int | None = None,
        events: bool = False,
    ):
        self.events = events
        self.processor = processor
        self.settings = settings
        self.stand_in = stand_in
        self.end_of_text = processor.token_id(END_OF_TEXT)
        self.end_of_turn = processor.token_id(END_OF_TURN)
        self.mask = processor.token_id(MASK)
        self.ends = settings.end_targets + settings.end_slots  # most that may follow an answer
        self.budget: int | None = None  # tokens of a sample that has a packed row for itself
        if settings.tokens_per_row is not None:
            unseen = 0 if stand_in is None else len(processor.media_frame_index(1))
            self.budget = settings.tokens_per_row - self.ends - unseen
        self.padding = {
            "input_ids": processor.tokenizer.pad_token_id,
            "labels": IGNORED,
            "sample_index": PADDING,
            "position_ids": 0,
            "turn": 0,
            "in_answer": 0,
        }

    def __call__(self, samples: Sequence[Sample], generator: np.random.Generator) -> dict[str, Any]:
        """Tensors of one step.

        Returns:
            `input_ids`, `labels`, `sample_index`, `position_ids` (batch, tokens); `attention_mask` (batch, tokens)
            or (batch, 1, tokens, tokens), or of rows that share a prefix or are packed, or None when nothing is padded
            or separate; `force` (samples,); `sample_weight` (samples,) where samples are weighed; with videos
            `pixel_values` and `media_shapes`; `stands_in` where they are only a stand-in. With events:
            `frame_events`, `question_events`, `previous_events` and `next_events` (events, 6), the row and position of
            a token and the labels it should know.
        """
        samples = [self.cut(sample) for sample in samples]
        counts = [len(sample.exchanges) if sample.separate else 1 for sample in samples]
        *starts, total = accumulate(counts, initial=0)
        rows_of_parts = [self._parts(sample, start, generator) for sample, start in zip(samples, starts, strict=True)]
        sizes = sizes_of(rows_of_parts)
        sizes = (*sizes[:-1], sizes[-1] + -sum(sizes) % self.settings.pad_to_multiple_of)
        rows = [self._join(parts, sizes if len(sizes) > 2 else None) for parts in rows_of_parts]
        packed = [len(row["input_ids"]) for row in rows] if self.settings.packing else []
        if packed:
            if len(sizes) > 2:
                raise InputError("packing: questions about one video share a row already")
            rows = [{name: list(chain.from_iterable(row[name] for row in rows)) for name in self.padding}]
        length = max(len(row["input_ids"]) for row in rows)
        length += -length % self.settings.pad_to_multiple_of
        if self.settings.pad_targets:
            rows = [self._fill(row, length) for row in rows]
        videos = [video for sample in samples for video in sample.videos]
        shapes = [shape for sample in samples for shape in sample.shapes]
        unseen = self.processor.media_frame_index(1) if self.stand_in is not None and not videos else []
        length += len(unseen)
        batch: dict[str, Any] = {
            name: torch.tensor([row[name] + [padding] * (length - len(row[name])) for row in rows])
            for name, padding in self.padding.items()
        }
        valid = batch["sample_index"] != PADDING
        turn, in_answer = batch.pop("turn"), batch.pop("in_answer") == 1
        if packed:
            padding = length - sum(packed)
            batch["attention_mask"] = PackedMask((*packed, *[padding] * bool(padding)))
        elif len(sizes) > 2:
            batch["attention_mask"] = SharedPrefixMask((*sizes, *[len(unseen)] * bool(unseen)), valid)
        else:
            mask = conversation_mask(turn, valid) if self.settings.conversation_mask else valid
            batch["attention_mask"] = None if mask is valid and valid.all() else mask
        batch["force"] = torch.bincount(batch["sample_index"][in_answer], minlength=total) <= self.settings.force_up_to
        if self.settings.weigh_every:
            targets = torch.bincount(batch["sample_index"][batch["labels"] != IGNORED], minlength=total)
            batch["sample_weight"] = (targets / self.settings.weigh_every).clamp(min=1)
        if unseen:
            assert self.stand_in is not None
            batch["input_ids"][0, length - len(unseen) :] = self.processor.video_token_id
            batch["stands_in"] = True
            videos, shapes = [np.zeros((1, self.stand_in, self.stand_in, 3), np.uint8)], [1]
        if videos:
            batch["pixel_values"] = torch.cat([self.processor.pixel_values(video) for video in videos])
            batch["media_shapes"] = shapes
        if self.events and not packed:
            batch |= self._events(samples, starts, batch)
        return batch

    def _events(self, samples: Sequence[Sample], starts: Sequence[int], batch: dict[str, Any]) -> dict[str, Tensor]:
        """Tokens that should know an event: the first of each frame, which should know the last event before it and
        the next after it too, and the word in a question that means a moment."""
        found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
        for row, (sample, first) in enumerate(zip(samples, starts, strict=True)):
            ids, owner = batch["input_ids"][row], batch["sample_index"][row]
            places = (ids == self.processor.video_token_id).nonzero()[:, 0].tolist()
            own = list(sample.frame_events)
            firsts = places[:: len(places) // len(own)] if own else []  # tokens of the frames
            kinds = {"frame": own, "previous": latest_events(own), "next": latest_events(own[::-1])[::-1]}
            for kind, events in kinds.items():
                found[f"{kind}_events"] += [(row, place, *labels) for place, labels in zip(firsts, events, strict=True)]
            for event in sample.question_events:
                token = self.processor.tokenizer.convert_tokens_to_ids(event.word)
                number = first + event.exchange if sample.separate else first
                found["question_events"] += [
                    (row, place, *event.labels)
                    for place in ((owner == number) & (ids == token)).nonzero()[:1, 0].tolist()
                ]
        return {name: torch.tensor(events) for name, events in found.items() if events}

    def rows(self, samples: Sequence[Sample], generator: np.random.Generator) -> list[tuple[int, dict[str, Any]]]:
        """The samples as one batch or, where packed rows may have so many tokens only, several: the number of the first
        sample of each, and its tensors."""
        if self.budget is None:
            return [(0, self(samples, generator))]
        groups: list[tuple[int, list[Sample]]] = []
        left = 0
        for number, sample in enumerate(self.cut(sample) for sample in samples):
            length = self._length(sample) + self.ends
            if not groups or length > left:
                groups.append((number, []))
                left = self.budget + self.ends
            groups[-1][1].append(sample)
            left -= length
        return [(first, self(group, generator)) for first, group in groups]

    def cut(self, sample: Sample) -> Sample:
        """The sample with its images as the pictures that pass the vision tower; a single image is tiled."""
        if len(sample.shapes) == len(sample.videos):
            return sample
        alone = sum(video.ndim == 3 for video in sample.videos) == 1
        media: list[tuple[np.ndarray, MediaShape]] = [
            self.processor.image_pictures(video, alone) if video.ndim == 3 else (video, len(video))
            for video in sample.videos
        ]
        return replace(sample, videos=[pictures for pictures, _ in media], shapes=[shape for _, shape in media])

    def check(self, sample: Sample) -> None:
        """Raise `InputError` if a sample has nothing to learn, or more tokens than the model or the stage takes."""
        if not any(answer.strip() for _, answer in sample.exchanges):
            raise InputError("every answer is empty")
        length, most = self._length(sample), self.settings.max_length
        if most is not None and length > most:
            raise InputError(f"the sample has {length} tokens, more than the stage's {most}")
        if self.budget is not None and length > self.budget:
            raise InputError(f"the sample has {length} tokens, more than the {self.budget} of a packed row")

    def _length(self, sample: Sample) -> int:
        """Tokens of a sample."""
        messages = messages_of(sample.shapes, sample.exchanges, sample.system)
        return len(self.processor.encode(messages, sample.shapes, add_generation_prompt=False).input_ids)

    def _fill(self, row: Row, length: int) -> Row:
        """A row filled up with end-of-text targets."""
        more = length - len(row["input_ids"])
        return {
            "input_ids": row["input_ids"] + [self.end_of_text] * more,
            "labels": row["labels"] + [self.end_of_text] * more,
            "sample_index": row["sample_index"] + row["sample_index"][-1:] * more,
            "position_ids": list(range(length)),
            "turn": row["turn"] + row["turn"][-1:] * more,
            "in_answer": row["in_answer"] + [0] * more,
        }

    def _parts(self, sample: Sample, first: int, generator: np.random.Generator) -> list[Row]:
        """One row: what exchanges share, then every exchange with positions as if it stood alone, longest first."""
        if not sample.separate:
            return [self._exchange(sample, sample.exchanges, first, generator)]
        shared: Row = {}
        parts: list[Row] = []
        for number, exchange in enumerate(sample.exchanges):
            alone = self._exchange(sample, [exchange], first + number, generator)
            length = self._shared_length(alone["input_ids"])
            if not shared:
                shared = {name: values[:length] for name, values in alone.items()}
                shared["sample_index"] = [-1] * length
                shared["labels"] = [IGNORED] * length  # what all samples share is hidden in none
            parts.append({name: values[length:] for name, values in alone.items()})
        return [shared, *sorted(parts, key=lambda part: -len(part["input_ids"]))]

    def _join(self, parts: list[Row], sizes: Sequence[int] | None) -> Row:
        """The parts of a row in one piece; with sizes, each part is padded to its own."""
        row: Row = {name: [] for name in self.padding}
        for number, size in enumerate(sizes or [0] * len(parts)):
            part = parts[number] if number < len(parts) else {name: [] for name in self.padding}
            for name, values in part.items():
                row[name] += values + [self.padding[name]] * (size - len(values))
        return row

    def _shared_length(self, input_ids: list[int]) -> int:
        """Tokens up to the end of the video."""
        places = [i for i, token in enumerate(input_ids) if token == self.processor.video_token_id]
        return places[-1] + 1 if places else 0

    def _exchange(
        self, sample: Sample, exchanges: Sequence[tuple[str, str]], sample_number: int, generator: np.random.Generator
    ) -> Row:
        messages = messages_of(sample.shapes, exchanges, sample.system)
        encoded = self.processor.encode(messages, sample.shapes, add_generation_prompt=False)
        targets = [
            answer or (control and self.settings.control_targets)
            for answer, control in zip(encoded.is_answer, encoded.is_control, strict=True)
        ]
        labels = [t if is_target else IGNORED for t, is_target in zip(encoded.input_ids, targets, strict=True)]
        extra_targets = int(generator.integers(self.settings.end_targets + 1))
        extra_slots = int((self.settings.end_slots + 2) ** generator.random()) - 1
        if self.settings.end_slots_share < 1 and generator.random() >= self.settings.end_slots_share:
            extra_slots = 0
        input_ids = encoded.input_ids + [self.end_of_turn] * extra_targets + [self.mask] * extra_slots
        labels += [self.end_of_turn] * extra_targets + [IGNORED] * extra_slots
        return {
            "input_ids": input_ids,
            "labels": labels,
            "sample_index": [sample_number] * len(input_ids),
            "position_ids": list(range(len(input_ids))),
            "turn": encoded.turn + [encoded.turn[-1]] * (extra_targets + extra_slots),
            "in_answer": [*map(int, encoded.is_answer), *[1] * extra_targets, *[0] * extra_slots],
        }


def sizes_of(rows: Sequence[Sequence[Row]]) -> tuple[int, ...]:
    """Tokens of the longest first, second, … part of several rows."""
    lengths = [[len(part["input_ids"]) for part in parts] for parts in rows]
    return tuple(max(column) for column in zip_longest(*lengths, fillvalue=0))


def messages_of(
    shapes: Sequence[MediaShape], exchanges: Sequence[tuple[str, str]], system: str | None = None
) -> list[Message]:
    """A conversation for the processor; see `Sample` for where videos and images stand.

    Args:
        shapes: of the videos and images.
        exchanges: pairs of question and answer.
        system: message that comes first; None for the model's own.
    """
    media = [{"type": "image" if isinstance(shape, ImageShape) else "video"} for shape in shapes]
    marks = [question.count(VIDEO_PLACE) for question, _ in exchanges]
    marked = sum(marks) == len(media)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for number, (question, answer) in enumerate(exchanges):
        if media and not marked:
            question = question.replace(VIDEO_PLACE, "").strip()
        here = marks[number] if marked else len(media) if number == 0 else 0
        content = place_media(question, media[:here])
        media = media[here:]
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return messages


@dataclass(frozen=True)
class Part:
    """One of the equal parts of a step's samples: what one device works on in one forward pass."""

    step: int
    number: int = 0
    parts: int = 1


class PartSampler:
    """The parts of steps that one process works on, in order.

    Args:
        steps: numbers within the stage.
        source: tells how many items a step has.
        per_device_batch: most items of a part; None for one part a process.
        processes, process: how many there are, and which this is.
    """

    def __init__(self, steps: range, source: Source, per_device_batch: int | None, processes: int, process: int):
        self.all_steps, self.source, self.per_device_batch = steps, source, per_device_batch
        self.processes, self.process = processes, process

    def __iter__(self) -> Iterator[Part]:
        for step in self.all_steps:
            passes = 1
            if self.per_device_batch is not None:
                passes = math.ceil(len(self.source.plan(step)) / (self.per_device_batch * self.processes))
            for number in range(passes):
                yield Part(step, number * self.processes + self.process, passes * self.processes)


class StepDataset:
    """A part of a step in, batch out: deterministic, so that workers, restarts and ranks agree.

    Args:
        source: the samples of each step.
        collator: samples to tensors.
        seed: of the collator's random choices.
    """

    def __init__(self, source: Source, collator: Collator, seed: int):
        self.source, self.collator, self.seed = source, collator, seed

    def __getitem__(self, part: Part) -> dict[str, Any]:
        """The batch of a part; besides the collator's entries, how it stands in the step:

        `step`, `part`, `parts`, `row`; `first_sample`, `total_samples` (numbers of samples before it and in the whole
        step); `weight`, 0 for a part that only keeps its process in step, since the step has fewer items than parts or
        all it found is broken; `skipped`: a message for each broken sample that another was taken for; `more_rows`:
        batches like this one, where packed rows are bounded.
        """
        items = self.source.plan(part.step)
        first, end = (len(items) * number // part.parts for number in (part.number, part.number + 1))
        own = items[first:end]
        skipped: list[str] = []
        samples = [self._load(item, skipped) for item in own or items[:1]]
        usable = bool(own) and None not in samples
        # as many samples, of almost nothing: what is broken may be too long as well
        blind = [Sample([], [("-", "-")] * len(item.exchanges), item.separate) for item in own or items[:1]]
        seeds = [self.seed, part.step, 1] + ([part.number] if part.parts > 1 else [])
        before = sum(item.samples for item in items[:first]) if own else 0
        rows = self.collator.rows(samples if usable else blind, np.random.default_rng(seeds))  # type: ignore[arg-type]
        batches = [
            {
                **row,
                "step": part.step,
                "part": part.number,
                "parts": part.parts,
                "row": number,
                "first_sample": before + start,
                "total_samples": sum(item.samples for item in items),
                "weight": float(usable),
                "skipped": [] if number else skipped,
            }
            for number, (start, row) in enumerate(rows)
        ]
        return {**batches[0], "more_rows": batches[1:]}

    def sample(self, item: Item) -> Sample:
        """The sample of an item; `InputError` where it is broken or unfit."""
        sample = self.collator.cut(self.source.load(item, self.collator.processor.image_size))
        if not sample.separate:
            self.collator.check(sample)
        return sample

    def _load(self, item: Item, skipped: list[str]) -> Sample | None:
        """The sample of an item, or of another if it is broken or unfit; None if no other was found."""
        for attempt in range(MOST_REPLACEMENTS):
            try:
                return self.sample(item)
            except InputError as error:
                skipped.append(f"{item.origin}: {error}" if item.origin else str(error))
                item = self.source.instead_of(item, attempt)
        return None


def rows_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """A batch of `StepDataset` and its further rows: what passes the model at once."""
    return [batch, *batch.get("more_rows", ())]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor | RowMask) else value for name, value in batch.items()}
