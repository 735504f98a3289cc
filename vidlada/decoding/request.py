"""What the denoising loop takes, and what it reports after every step."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from torch import Tensor

from vidlada.decoding.cache import VisualCache
from vidlada.errors import VidLaDAError
from vidlada.generation import GenerationSettings


def check_predictions(values: Tensor) -> None:
    """Refuse predictions that are not numbers: their tokens would mean nothing.

    Args:
        values: probabilities or scores of one request, on the CPU.

    Raises:
        VidLaDAError: one is NaN.
    """
    if bool(values.isnan().any()):
        raise VidLaDAError(
            "the model's predictions are not numbers (NaN): its weights are damaged, or overflow in their type; try "
            "another one (dtype bfloat16 or float32, no quantization)"
        )


@dataclass(frozen=True)
class Request:
    """One answer to be decoded.

    Args:
        prompt: (tokens, width) embeddings, visual tokens spliced in.
        settings: how to decode.
        stop_sequences: token ids that end the answer; the earliest occurrence of any of them counts.
        suffix_ids: fixed tokens after the answer slots, visible from the first step.
        initial_ids: `gen_length` ids the slots start with, the mask id where they are open (infilling).
        frame_index: frame of each position of the prompt, -1 for text; none are frames by default. Only caches that
            tell frames from text need it.
        visual: what an earlier request about the same video left (`State.visual`); needs a cache.
        given_frame_index: `frame_index` before visual tokens were merged; the same by default.
    """

    prompt: Tensor
    settings: GenerationSettings = GenerationSettings()
    stop_sequences: Sequence[tuple[int, ...]] = ()
    suffix_ids: Sequence[int] = ()
    initial_ids: Sequence[int] | None = None
    frame_index: Sequence[int] | None = None
    visual: VisualCache | None = None
    given_frame_index: Sequence[int] | None = None

    @property
    def given_frames(self) -> list[int]:
        """Frame of each visual token of the videos and images as they were given."""
        given = self.frame_index if self.given_frame_index is None else self.given_frame_index
        return [frame for frame in given or () if frame >= 0]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt."""
        return sum(frame >= 0 for frame in self.frame_index or ())

    @property
    def merged(self) -> int:
        """Visual tokens that are no longer there because alike ones were merged."""
        return len(self.given_frames) - self.visual_tokens


@dataclass(frozen=True)
class Statistics:
    """What an answer cost.

    Attributes:
        steps: denoising steps.
        forward_passes: passes through the model; guidance takes two a step.
        tokens: slots committed.
        layer_tokens: positions computed, by layer.
        visual_tokens: of the prompt, as the first step sees it.
        merged: visual tokens that were merged into these before it.
        pruned: of these, dropped after the first step.
        refreshes: how often the prompt's text and frames were recomputed; empty without a cache, where every pass does.
        seconds: by phase; `denoising` is the wall time the request spent in the loop.
    """

    steps: int = 0
    forward_passes: int = 0
    tokens: int = 0
    layer_tokens: tuple[int, ...] = ()
    refreshes: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    visual_tokens: int = 0
    merged: int = 0
    pruned: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """Slots committed in a forward pass, on average."""
        return self.tokens / max(1, self.forward_passes)

    def with_seconds(self, seconds: dict[str, float]) -> "Statistics":
        """A copy with further phases in front."""
        return replace(self, seconds={**seconds, **self.seconds})

    def __add__(self, other: "Statistics") -> "Statistics":
        """What both parts of an answer cost together; they see the same videos."""
        names = {*self.refreshes, *other.refreshes}
        phases = [*self.seconds, *(phase for phase in other.seconds if phase not in self.seconds)]
        return Statistics(
            self.steps + other.steps,
            self.forward_passes + other.forward_passes,
            self.tokens + other.tokens,
            tuple(sum(counts) for counts in zip_longest(self.layer_tokens, other.layer_tokens, fillvalue=0)),
            {name: self.refreshes.get(name, 0) + other.refreshes.get(name, 0) for name in sorted(names)},
            {phase: self.seconds.get(phase, 0.0) + other.seconds.get(phase, 0.0) for phase in phases},
            max(self.visual_tokens, other.visual_tokens),
            max(self.merged, other.merged),
            max(self.pruned, other.pruned),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "steps": self.steps,
            "forward_passes": self.forward_passes,
            "tokens": self.tokens,
            "tokens_per_forward": round(self.tokens_per_forward, 4),
            "layer_tokens": list(self.layer_tokens),
            "refreshes": self.refreshes,
            "visual_tokens": self.visual_tokens,
            "merged": self.merged,
            "pruned": self.pruned,
            "seconds": {phase: round(seconds, 4) for phase, seconds in self.seconds.items()},
        }


@dataclass(frozen=True)
class State:
    """An answer after a step; all but `visual` on the CPU.

    Attributes:
        step: steps done.
        proposed: (gen_length,) final tokens, this step's proposals in the current block, the mask id elsewhere.
        committed: boolean (gen_length,): which of them are final; what a commit rule may still take back is not.
        confidence: (gen_length,) probability of each proposal of this step; 1 where final before, 0 where open.
        stop_at: slot at which a final stop sequence begins, if one was found.
        done: the answer is complete.
        statistics: so far.
        visual: when done and asked for by the settings, what a further question about the video may reuse.
    """

    step: int
    proposed: Tensor
    committed: Tensor
    confidence: Tensor
    stop_at: int | None
    done: bool
    statistics: Statistics
    visual: VisualCache | None = None

    def answer_ids(self) -> list[int]:
        """Final tokens before the stop, in order; open slots are left out."""
        kept = self.proposed[: self.stop_at][self.committed[: self.stop_at]]
        return [int(token) for token in kept]
