"""Training samples from the shapes world."""

import math
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError
from vidlada.shapes.questions import BENCHMARK_FAMILIES, FAMILIES, questions_for
from vidlada.shapes.render import render_frames
from vidlada.shapes.world import MAX_SECONDS, MAX_THINGS, MIN_SECONDS, Clip, clip_for, shift_clock, slow_down, still
from vidlada.training.data.event_labels import frame_events, question_events
from vidlada.training.data.samples import STRICT, Item, OneOrMore, Sample, Share
from vidlada.training.settings import hint

Seconds = Annotated[int, Field(ge=MIN_SECONDS, le=MAX_SECONDS)]

MOST_CLIPS = 400  # are drawn until one supports a question; of all families some clip in ten does, or none


@dataclass(frozen=True, config=STRICT)
class ShapesSource:
    """Clips of the shapes world, rendered as they are needed and never repeated.

    Args:
        seed: of the choice of clips and questions.
        split: whose clips; `validation` for evaluation during training.
        frames_per_batch: a batch holds as many clips as fit into this many frames, all of one length.
        seconds: shortest and longest clip; None for the world's own distribution.
        families: question families to choose from; one named twice is asked twice as often.
        questions: exchanges a clip.
        choice_share: share of short questions asked as multiple choice.
        pictures: single frames at a random second instead of whole clips.
        picture_share: share of steps with single frames, one question each, of `picture_families`.
        picture_families: as `families`, for these steps.
        max_things: most things in a clip.
        single_share: share of steps with one exchange a clip, where the video's tokens see the question.
        text_only_share: share of clips left out, so that the model also learns to do without.
        rates: frames a second, one drawn for each step: 1, a whole number, or one over a whole number. At 1/k, clips
            are k times as slow, so that every event still falls on a frame.
        shifted_share: share of clips whose clock does not start at 0; seconds are what the clock shows.
        no_clock_share: share of clips without a clock, whose frames are a second apart and counted from 0.
        draws: each clip is the one with the most events of so many that are drawn.
    """

    seed: NonNegativeInt = 0
    split: Literal["train", "validation"] = "train"
    frames_per_batch: PositiveInt = 256
    seconds: tuple[Seconds, Seconds] | None = None
    families: Annotated[tuple[str, ...], OneOrMore] = tuple(BENCHMARK_FAMILIES)
    questions: PositiveInt = 6
    choice_share: Share = 0.3
    pictures: bool = False
    picture_share: Share = 0.0
    picture_families: Annotated[tuple[str, ...], OneOrMore] = ("clock",)
    max_things: Annotated[int, Field(ge=1, le=MAX_THINGS)] = MAX_THINGS
    single_share: Share = 0.0
    text_only_share: Share = 0.0
    rates: tuple[PositiveFloat, ...] = (1.0,)
    shifted_share: Share = 0.0
    no_clock_share: Share = 0.0
    draws: PositiveInt = 1

    def __post_init__(self) -> None:
        unknown = [family for family in (*self.families, *self.picture_families) if family not in FAMILIES]
        if unknown or not self.families:
            meant = hint("".join(unknown[:1]), FAMILIES)
            raise InputError(f"families: {unknown or 'none'} are no families of questions; {meant}")
        if self.seconds is not None and self.seconds[0] > self.seconds[1]:
            raise InputError(f"seconds: the shortest clip comes first, not {list(self.seconds)}")
        odd = [rate for rate in self.rates if (rate if rate >= 1 else 1 / rate) % 1]
        if odd or not self.rates:
            raise InputError(f"rates: {odd or 'none'} cannot be used; give whole numbers, or one over whole numbers")
        self.plan(0)  # families that no clip of this kind supports are refused before the run starts

    @property
    def has_videos(self) -> bool:
        """Unless all clips are left out."""
        return self.text_only_share < 1

    @property
    def shares_rows(self) -> bool:
        """Questions about one clip do."""
        return self.questions > 1 and self.single_share < 1

    def plan(self, step: int) -> list[Item]:
        """Clips of one random length, with fresh questions; those that no family fits are left out."""
        generator = np.random.default_rng([self.seed, step])
        if self.picture_share and generator.random() < self.picture_share:
            return self._pictures.plan(step)
        questions = 1 if generator.random() < self.single_share else self.questions
        seconds = None if self.seconds is None else int(generator.integers(self.seconds[0], self.seconds[1] + 1))
        rate = self.rates[int(generator.integers(len(self.rates)))] if len(self.rates) > 1 else self.rates[0]
        if rate < 1:  # slowed down, it must still fit into the clock
            longest = int((MAX_SECONDS - 1) * rate) + 1
            seconds = min(seconds or longest, longest) if self.seconds else int(generator.integers(4, longest + 1))
        first = self._clip(generator, seconds)
        frames = 1 if self.pictures else int(first.seconds * max(1, rate))
        count = max(1, self.frames_per_batch // frames)
        clips = [first, *(self._clip(generator, first.seconds) for _ in range(count - 1))]
        for _ in range(math.ceil(MOST_CLIPS / count)):
            items = [self._item(clip, questions, rate, generator) for clip in clips]
            items = [item for item in items if item.exchanges]
            if items:
                return items
            clips = [self._clip(generator, first.seconds) for _ in range(count)]
        raise InputError(f"no clip of {first.seconds} seconds supports a question of {', '.join(self.families)}")

    @cached_property
    def _pictures(self) -> "ShapesSource":
        """The source of steps with single frames."""
        families, frames = self.picture_families, math.ceil(self.frames_per_batch / 3)  # as many tokens as of clips
        return replace(
            self, pictures=True, picture_share=0.0, families=families, questions=1, frames_per_batch=frames, rates=(1,)
        )

    def load(self, item: Item, size: int) -> Sample:
        """Render the clip."""
        clip, times = item.media
        if not times:
            return Sample([], item.exchanges, item.separate)
        return Sample(
            [render_frames(clip, times, size)],
            item.exchanges,
            item.separate,
            frame_events=frame_events(clip, times),
            question_events=question_events(clip, item.exchanges),
        )

    def instead_of(self, item: Item, attempt: int) -> Item:
        """Nothing rendered is ever broken."""
        return item

    def steps_of(self, epochs: float) -> int:
        """The world has no end."""
        raise InputError("clips of the shapes world never repeat; give steps instead of epochs")

    def _clip(self, generator: np.random.Generator, seconds: int | None) -> Clip:
        clips = [
            clip_for(self.split, int(generator.integers(2**62)), seconds=seconds, max_things=self.max_things)
            for _ in range(self.draws)
        ]
        return max(clips, key=lambda clip: len(clip.events))

    def _item(self, clip: Clip, questions: int, rate: float, generator: np.random.Generator) -> Item:
        times: list[float]
        clip, times = self._with_times(clip, rate, generator)
        if self.pictures:
            clip, times = still(clip, int(generator.integers(clip.seconds))), [0]
        questions_of_clip = questions_for(clip, generator, questions, self.families, self.choice_share)
        text_only = generator.random() < self.text_only_share
        exchanges = [(question.question, question.answer) for question in questions_of_clip]
        return Item(exchanges, (clip, [] if text_only else times), separate=True)

    def _with_times(self, clip: Clip, rate: float, generator: np.random.Generator) -> tuple[Clip, list[float]]:
        """A clip with its clock, and the times of its frames."""
        if rate == 1 and self.no_clock_share and generator.random() < self.no_clock_share:
            return replace(clip, clock=False), list(range(clip.seconds))
        if rate < 1:
            step = round(1 / rate)
            clip = slow_down(clip, step)
            times = [float(second) for second in range(0, clip.seconds, step)]
        else:
            times = [frame / rate for frame in range(int(clip.seconds * rate))]
        if self.shifted_share and generator.random() < self.shifted_share:
            clip = shift_clock(clip, generator)
        return clip, times
