"""What a cache policy is: a plan for every step, and the attention pattern of the passes that carry it out.

A plan says which segments are recomputed and from which layer on; everything else is read from the KV cache. A policy
does not know what tokens mean, and the sampler does not know which policy runs. To add one, write a file beside this
one with a subclass of `SegmentPolicy` (or anything that fits `Policy`), and add it to the table in `__init__.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np
from torch import Tensor

from vidlada.decoding.attention import FrameMap
from vidlada.decoding.kv_cache import KVCache, attend_grouped
from vidlada.decoding.named import check_named
from vidlada.generation import MAX_SLOTS, GenerationSettings
from vidlada.model.config import VidLaDATextConfig
from vidlada.model.language_model import LanguageModel

MAX_STEPS = MAX_SLOTS  # no answer takes more

# The segments of a request's sequence. Text is the prompt's text and a fixed suffix; before and after are the answer
# slots on either side of the current block. A plan may also name `undecided`: slots open now or in the step before.
SEGMENTS = ("text", "visual", "before", "block", "after")


@dataclass(frozen=True)
class Plan:
    """What one step recomputes.

    Attributes:
        start: segment → first layer that is recomputed; a segment left out is only read from the KV cache.
        chunked: visual queries see only the frames around their own, the anchors and all text.
        search: look for anchors while the visual tokens are recomputed.
        select: choose the keys that the following steps see.
        layerwise: share of the answer that its own pass recomputes in every layer, after the common one (`dllm`).
        narrow: share of the answer's positions that go on after the first layer, those whose values changed most.
        probes: positions of each segment of the prompt that are recomputed just to see how far they moved.
        store_states: keep the states that enter the policy's `entries`. Only of positions that are always recomputed
            from the first layer on may they be left out.
    """

    start: dict[str, int]
    chunked: bool = False
    search: bool = False
    select: bool = False
    narrow: float | None = None
    probes: int = 0
    layerwise: float | None = None
    store_states: bool = True


@dataclass(frozen=True)
class StepContext:
    """What a policy knows when it plans a step.

    Attributes:
        step: counted over the request, from 0.
        step_in_block: counted within the current block, from 0.
        layers: of the language model.
        drift: segment → for each entry of the policy, 0 included, how far the probed positions' values there have moved
            since the segment's last refresh (1 - cosine). Only of policies with probes.
    """

    step: int
    step_in_block: int
    layers: int
    drift: Mapping[str, Sequence[float]] = field(default_factory=dict)


EVERYTHING = dict.fromkeys(SEGMENTS, 0)
ANSWER = dict.fromkeys(("before", "block", "after"), 0)


class AttentionPattern:
    """How the queries of a pass see the KV cache: here, everything.

    Attributes:
        anchors: layer → positions of its anchors, kept between steps; empty for patterns without any.
        joins: of the pass that runs, layer → positions that join there; a pattern may add to the layers above.
        compact: as of `vidlada.decoding.kv_cache.PartialPass`; empty for most.
    """

    whole: ClassVar[bool] = False  # every position of a pass asks in the last layer too, not the answer's alone

    def __init__(self) -> None:
        self.anchors: dict[int, Tensor] = {}
        self.joins: dict[int, Tensor] = {}
        self.compact: dict[int, Tensor] = {}

    def prune(self, frames: FrameMap, numbers: np.ndarray) -> None:
        """Take note that visual tokens were dropped, so that remembered positions are void.

        Args:
            frames: where the rest stands now.
            numbers: ascending, of the visual tokens that are left, among those before.
        """
        self.anchors.clear()
        self.compact.clear()

    def begin_pass(self, plan: Plan, block: Tensor) -> None:
        """Prepare for the next pass.

        Args:
            plan: what it recomputes.
            block: (block,) positions of the current block.
        """

    def finish_pass(self, language_model: LanguageModel, kv_cache: KVCache, answer: Tensor) -> None:
        """Do what is left after the pass; nothing, for most.

        Args:
            language_model: whose pass it was.
            kv_cache: of the request.
            answer: (slots,) positions of the answer.
        """

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, layer: int, active: Tensor) -> Tensor:
        """Attention of one layer.

        Args:
            queries: (heads, active, head_dim), rotated.
            keys, values: (key/value heads, tokens, head_dim) of the whole sequence.
            layer: number of the layer.
            active: (active,) positions that are being recomputed; in the last layer only those of the answer, if the
                pass begins with them.

        Returns:
            (heads, active, head_dim).
        """
        return attend_grouped(queries, keys, values)


class Policy(Protocol):
    """A cache policy. The first step of a request always recomputes everything."""

    name: ClassVar[str]

    def plan(self, context: StepContext) -> Plan:
        """The plan of a step."""

    def check(self, frames: int, visual: int) -> None:
        """Refuse videos and images that the settings do not fit.

        Args:
            frames: of all together, as they were given; fewer may be left once alike tokens are merged.
            visual: their visual tokens, likewise.

        Raises:
            InputError: they do not fit.
        """

    def entries(self, layers: int) -> list[int]:
        """Layers above 0 at which segments may join."""

    def attention(self, frames: FrameMap, prompt: Tensor) -> AttentionPattern:
        """The attention pattern of a request.

        Args:
            frames: where its frames are.
            prompt: (tokens, width) embeddings.
        """

    def pattern_bytes(
        self, config: VidLaDATextConfig, tokens: int, settings: GenerationSettings, value_bytes: int
    ) -> int:
        """What the attention pattern keeps between steps; the arguments are those of `kept_bytes` (`memory.py`)."""


class SegmentPolicy:
    """Base of policies: dataclasses of listed settings. By itself it recomputes whole segments from layer 0, with full
    attention."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_named("cache", self)

    def check(self, frames: int, visual: int) -> None:  # noqa: B027
        """Anything fits."""

    def entries(self, layers: int) -> list[int]:
        """None."""
        return []

    def attention(self, frames: FrameMap, prompt: Tensor) -> AttentionPattern:
        """Full attention."""
        return AttentionPattern()

    def pattern_bytes(
        self, config: VidLaDATextConfig, tokens: int, settings: GenerationSettings, value_bytes: int
    ) -> int:
        """Nothing."""
        return 0
