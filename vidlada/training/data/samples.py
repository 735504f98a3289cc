"""What training samples are, and what a source of them must do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BeforeValidator, ConfigDict, Field

from vidlada.errors import InputError
from vidlada.settings import as_sequence
from vidlada.tiling import MediaShape
from vidlada.training.data.event_labels import EventLabels, QuestionEvent

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
Share = Annotated[float, Field(ge=0, le=1)]
OneOrMore = BeforeValidator(as_sequence)


class BrokenMedia(InputError):  # noqa: N818 - a kind of input, named for what it is
    """One sample has no meaning, or a file of it is missing or unreadable; the run can go on without it."""


@dataclass(frozen=True)
class Sample:
    """Videos and images, and what is said about them.

    Attributes:
        videos: each (frames, height, width, 3) uint8, or an image (height, width, 3); empty for text alone.
        exchanges: pairs of question and answer. Where the questions hold as many `<image>` marks as there are
            videos and images, each stands at its mark (a single one of a question in front of it), else all stand
            before the first question.
        separate: each exchange is a sample of its own that shares the videos with the others, instead of one
            conversation of several turns. Rendering and the vision tower are then paid once for all.
        shapes: of the videos and images, once images are cut into tiles (`Collator.cut`).
        system: message of the conversation; None for the model's own.
        frame_events, question_events: what happens in each frame of the only video, and what answers questions of that,
            as far as the source knows.
    """

    videos: Sequence[np.ndarray]
    exchanges: Sequence[tuple[str, str]]
    separate: bool = False
    shapes: Sequence[MediaShape] = ()
    system: str | None = None
    frame_events: Sequence[EventLabels] = ()
    question_events: Sequence[QuestionEvent] = ()


@dataclass(frozen=True)
class Item:
    """A sample before its video is rendered or decoded: cheap, so that every process can hold those of a whole step.

    Attributes:
        exchanges, separate: as in `Sample`.
        media: what the source needs to make the videos.
        origin: where it comes from, for messages.
    """

    exchanges: Sequence[tuple[str, str]]
    media: Any
    separate: bool = False
    origin: str = ""

    @property
    def samples(self) -> int:
        """Samples of the objective: each has a masking time of its own."""
        return len(self.exchanges) if self.separate else 1


class Source(Protocol):
    """Samples of any training step, always the same for the same step: a killed run continues where it was, and all
    processes agree on what a step holds without talking to each other."""

    @property
    def has_videos(self) -> bool:
        """Whether any sample comes with a video or an image."""

    @property
    def shares_rows(self) -> bool:
        """Whether samples may share a row with others about the same video."""

    def plan(self, step: int) -> list[Item]:
        """All items of one step."""

    def load(self, item: Item, size: int) -> Sample:
        """Render or decode, in frames of so many pixels a side; `BrokenMedia` if a file is missing or unreadable."""

    def instead_of(self, item: Item, attempt: int) -> Item:
        """Another item for one that is broken, always the same for the same attempt."""

    def steps_of(self, epochs: float) -> int:
        """Steps that so many passes over the data take; `InputError` if the data never end."""
