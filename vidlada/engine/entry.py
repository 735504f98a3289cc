"""A request on its way to its answer: what the engine's core keeps of it, and what it reports of every step."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vidlada.decoding.memory import decoding_bytes
from vidlada.decoding.request import Request, State
from vidlada.decoding.streaming import StableText
from vidlada.decoding.thinking import Turn
from vidlada.engine.choosing import ChoosingTurn
from vidlada.engine.forms import FormTurn
from vidlada.engine.scheduler import Task
from vidlada.errors import VidLaDAError
from vidlada.generation import GenerationSettings
from vidlada.model.video_model import VidLaDAForMaskedDiffusion

AnyTurn = Turn | ChoosingTurn | FormTurn


@dataclass(frozen=True)
class Update:
    """What a step brought.

    Attributes:
        state: after the step.
        stable: the part of the answer that can no longer change; the last update's is the whole answer.
        seconds: waiting in the queue, and in the vision tower.
        confidence: (gen_length,) probability with which each final slot was committed; 1 where it was given.
        choices: log-probabilities of the job's choices among each other.
    """

    state: State
    stable: StableText
    seconds: dict[str, float]
    confidence: Tensor
    choices: tuple[float, ...] = ()


class Entry(ABC):
    """A request in the engine.

    Args:
        settings: of decoding.
        tokens: positions it takes, prompt, thought and answer slots.
        visual: how many of them are visual.
        model: that answers.
        frames: to be encoded before it can join.
        chooses: it takes one step.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        tokens: int,
        visual: int,
        model: VidLaDAForMaskedDiffusion,
        frames: int = 0,
        chooses: bool = False,
    ):
        self.settings, self.tokens, self.frames, self.chooses = settings, tokens, frames, chooses
        processes = model.language_model.processes
        self.memory = decoding_bytes(model.config.text, [(tokens, visual, settings)], model.dtype.itemsize, processes)
        self.cancelled = False
        self.retried = False  # after it had run out of memory alone
        self.seconds: dict[str, float] = {}
        self.submitted = time.perf_counter()
        self.reset()

    @abstractmethod
    def prepare(self) -> Iterator[None]:
        """Make `turn`, piece by piece."""

    @abstractmethod
    def put(self, update: "Update | VidLaDAError") -> None:
        """Take what a step brought, or why there will be no answer."""

    def reset(self) -> None:
        """Be as before the first step, perhaps for a second time."""
        settings = self.settings
        pace = settings.block_length / min(settings.steps_per_block, settings.block_length)
        self.task = Task(
            tokens=self.tokens,
            slots=settings.slots,
            pace=settings.slots if self.chooses else pace,
            passes=2 if settings.cfg_scale > 0 else 1,
            frames=self.frames,
            kept=self.memory.kept,
            working=self.memory.working,
        )
        self.turn: AnyTurn | None = None  # while it runs
        self.begin_decoding()

    def begin_decoding(self) -> None:
        """Forget the slots so far: those of an answer behind a thought are others."""
        self.confidence: Tensor | None = None
        self.committed: Tensor | None = None

    def confidence_after(self, state: State) -> Tensor:
        """Probability with which each final slot was committed; a state tells it of those of its step alone."""
        before = self.committed if self.committed is not None else torch.zeros_like(state.committed)
        known = self.confidence if self.confidence is not None else state.confidence
        self.confidence, self.committed = torch.where(before, known, state.confidence), state.committed
        return self.confidence


class ReadyEntry(Entry):
    """A request whose prompt is embedded already, of a caller that waits for its answer.

    Args:
        request: to be decoded.
        model: that answers.
        turn: makes its turn.
        chooses: it takes one step.
    """

    def __init__(
        self,
        request: Request,
        model: VidLaDAForMaskedDiffusion,
        turn: Callable[[], AnyTurn],
        chooses: bool = False,
    ):
        tokens = len(request.prompt) + request.settings.slots + len(request.suffix_ids)
        visual = sum(frame >= 0 for frame in request.frame_index or ())
        super().__init__(request.settings, tokens, visual, model, chooses=chooses)
        self.make_turn = turn
        self.updates: deque[Update | VidLaDAError] = deque()

    def prepare(self) -> Iterator[None]:
        """Nothing is left to do but to make the turn."""
        self.turn = self.make_turn()
        yield from ()

    def put(self, update: Update | VidLaDAError) -> None:
        self.updates.append(update)
