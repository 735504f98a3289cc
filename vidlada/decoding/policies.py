"""Cache policies: for every step, which segments are recomputed and from which layer on.

A policy is only a schedule. It does not know what tokens mean, and the loop does not know which policy runs.
Policies are chosen by name, with settings after a colon: `dual`, `interval:prompt=25,response=7`, `mars:ratio=2`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, Protocol, get_args, get_type_hints

from vidlada.errors import InputError

# The segments of a request's sequence. Text is the prompt's text and a fixed suffix; before and after are the answer
# slots on either side of the current block.
SEGMENTS = ("text", "visual", "before", "block", "after")


@dataclass(frozen=True)
class Plan:
    """What one step recomputes.

    Attributes:
        start: segment → first layer that is recomputed; a segment left out is read from the store alone.
        chunked: visual queries see only the frames around their own, the anchors and all text.
        search: look for anchors while the visual tokens are recomputed.
        select: choose the keys that the following steps see.
        narrow: share of the answer's positions that go on after the first layer, those whose values changed most.
        probes: positions of each segment of the prompt that are recomputed just to see how far they moved.
    """

    start: dict[str, int]
    chunked: bool = False
    search: bool = False
    select: bool = False
    narrow: float | None = None
    probes: int = 0


@dataclass(frozen=True)
class Moment:
    """When a plan is asked for.

    Attributes:
        step: counted over the request, from 0.
        step_in_block: counted within the current block, from 0.
        layers: of the language model.
        drift: segment → for each entry of the policy, 0 included, how far the probed positions' values there have moved
            since the segment was renewed (1 - cosine). Only of policies with probes.
    """

    step: int
    step_in_block: int
    layers: int
    drift: Mapping[str, Sequence[float]] = field(default_factory=dict)


EVERYTHING = dict.fromkeys(SEGMENTS, 0)
ANSWER = dict.fromkeys(("before", "block", "after"), 0)


class Policy(Protocol):
    """A schedule. The first step of a request always recomputes everything."""

    name: ClassVar[str]

    def plan(self, moment: Moment) -> Plan:
        """The plan of a step."""

    def entries(self, layers: int) -> list[int]:
        """Layers above 0 at which segments may join."""


class _FromTheBottom:
    """Policies whose segments all start at layer 0."""

    def entries(self, layers: int) -> list[int]:
        """None."""
        return []


@dataclass(frozen=True)
class Full(_FromTheBottom):
    """Everything in every step, through the store: the oracle of the others. (`none` does without a store.)"""

    name: ClassVar[str] = "full"

    def plan(self, moment: Moment) -> Plan:
        """Everything."""
        return Plan(EVERYTHING)


@dataclass(frozen=True)
class Prefix(_FromTheBottom):
    """Fast-dLLM's prefix cache: all at a block's start, then the block and what follows it.

    Args:
        every: renew all again after so many steps within a block; 0 never.
    """

    name: ClassVar[str] = "prefix"
    every: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0, "every")

    def plan(self, moment: Moment) -> Plan:
        """All, or block and after."""
        if moment.step_in_block % (self.every or moment.step_in_block + 1) == 0:
            return Plan(EVERYTHING)
        return Plan({"block": 0, "after": 0})


@dataclass(frozen=True)
class Dual(_FromTheBottom):
    """Fast-dLLM's dual cache: all at a block's start, then the block alone.

    Args:
        every: renew all again after so many steps within a block; 0 never.
    """

    name: ClassVar[str] = "dual"
    every: int = 0

    def __post_init__(self) -> None:
        _at_least(self, 0, "every")

    def plan(self, moment: Moment) -> Plan:
        """All, or the block."""
        if moment.step_in_block % (self.every or moment.step_in_block + 1) == 0:
            return Plan(EVERYTHING)
        return Plan({"block": 0})


@dataclass(frozen=True)
class Frozen(_FromTheBottom):
    """LaViDa's: the prompt once, the answer in every step."""

    name: ClassVar[str] = "frozen"

    def plan(self, moment: Moment) -> Plan:
        """All at first, then the answer."""
        return Plan(ANSWER if moment.step else EVERYTHING)


@dataclass(frozen=True)
class Interval(_FromTheBottom):
    """After dLLM-Cache: prompt and answer on clocks of their own, and in between a part of the answer.

    In between, all answer positions run through the first layer and only the `share` whose values changed most go on;
    dLLM-Cache chooses anew in every layer.

    Args:
        prompt: steps between renewals of text and frames.
        response: steps between renewals of the whole answer.
        share: of the answer's positions renewed in the other steps.
    """

    name: ClassVar[str] = "interval"
    prompt: int = 25
    response: int = 7
    share: float = 0.25

    def __post_init__(self) -> None:
        _at_least(self, 1, "prompt", "response")
        if not 0 < self.share <= 1:
            raise InputError(f"cache interval: share must be above 0 and at most 1, not {self.share}")

    def plan(self, moment: Moment) -> Plan:
        """Whatever is due."""
        if moment.step % self.prompt == 0:
            return Plan(EVERYTHING)
        if moment.step % self.response == 0 or self.share == 1:
            return Plan(ANSWER)
        return Plan(ANSWER, narrow=self.share)


@dataclass(frozen=True)
class Sparse(_FromTheBottom):
    """After Sparse-dLLM: two full steps of a block, then the block alone, looking at the keys it attended to most.

    Args:
        keep: share of the keys outside the block that stay in sight.
    """

    name: ClassVar[str] = "sparse"
    keep: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise InputError(f"cache sparse: keep must be above 0 and at most 1, not {self.keep}")

    def plan(self, moment: Moment) -> Plan:
        """All twice, selecting in the second, then the block."""
        if moment.step_in_block < 2:
            return Plan(EVERYTHING, select=moment.step_in_block == 1)
        return Plan({"block": 0})


@dataclass(frozen=True)
class Mars:
    """MARS-Cache (VidLaDA, arXiv 2601.17868): text and frames on clocks of their own, deep layers more often.

    Layers form groups. The deepest is renewed every `text` steps (frames: every `ratio` times as many); going down,
    each group's interval is `pyramid` times that of the group above it. A renewal that is due for a group starts at
    its entry and runs to the top, so it includes all deeper groups.

    Args:
        text: steps between renewals of text in the deepest group (τ_t).
        ratio: frames are renewed `ratio` times less often (R = τ_v / τ_t).
        group: layers in a group.
        pyramid: ratio of a group's interval to the next deeper one's; 1 renews all layers together.
        window: chunk attention: neighbours on either side that a visual query sees in a renewal; -1 for full attention.
        anchors: with a window, visual tokens that all visual queries see besides; 0 for none. By default 64, or all
            where there are fewer.
        queries: visual queries sampled in the search for anchors.
        per_head: anchors of each key/value head instead of each layer.
        chunk_first: restrict visual queries in the first step too.
        drift: above 0, renew by measurement instead of by the clock: a few probed positions are recomputed in every
            step, and a segment is renewed from the lowest group where their values moved further than this (1 -
            cosine) since it was last renewed.
        probes: positions probed in each segment.
        scene: above 0, a scene begins where a frame's mean embedding differs by more than this (1 - cosine) from that
            of the frame before, and every scene has anchors of its own, found by queries of its own.
        fused: chunk attention as one kernel (FlexAttention) instead of on gathered blocks, with the same result; by
            default on a GPU.
    """

    name: ClassVar[str] = "mars"
    text: int = 4
    ratio: int = 8
    group: int = 4
    pyramid: int = 2
    window: int = -1
    anchors: int | None = None
    queries: int = 32
    per_head: bool = False
    chunk_first: bool = False
    drift: float = 0.0
    probes: int = 8
    scene: float = 0.0
    fused: bool | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "text", "ratio", "group", "pyramid", "queries", "probes")
        _at_least(self, 0, "anchors", "drift", "scene")
        _at_least(self, -1, "window")
        needs_window = {name: getattr(self, name) for name in ("anchors", "per_head", "chunk_first", "scene", "fused")}
        for name, value in needs_window.items():
            if value and not self.chunks:
                raise InputError(f"cache mars: {name}={value} is part of chunk attention; give a window too: window=1")

    @property
    def chunks(self) -> bool:
        """Whether visual queries are restricted in renewals."""
        return self.window >= 0

    def entries(self, layers: int) -> list[int]:
        """Where the groups begin."""
        return list(range(self.group, layers, self.group))

    def plan(self, moment: Moment) -> Plan:
        """Answer always; text and frames from the lowest group that is due."""
        probes = self.probes if self.drift else 0
        if moment.step == 0:
            chunked, search = self.chunk_first and self.chunks, self.anchors != 0 and self.chunks
            return Plan(EVERYTHING, chunked=chunked, search=search, probes=probes)
        start = dict(ANSWER)
        for segment, interval in (("text", self.text), ("visual", self.text * self.ratio)):
            due = self._moved(moment, segment) if self.drift else self._groups(moment.layers, moment.step, interval)
            if due:
                start[segment] = min(due)
        return Plan(start, chunked=self.chunks, probes=probes)

    def _moved(self, moment: Moment, segment: str) -> list[int]:
        """Entries of the groups where a segment has drifted too far."""
        entries = [0, *self.entries(moment.layers)]
        drifts = moment.drift.get(segment, [0.0] * len(entries))
        return [entry for entry, drift in zip(entries, drifts, strict=True) if drift > self.drift]

    def _groups(self, layers: int, step: int, interval: int) -> list[int]:
        """Entries of the groups that are due at a step."""
        firsts = [0, *self.entries(layers)]
        return [
            first
            for depth, first in enumerate(reversed(firsts))  # 0 is the deepest
            if step % (interval * self.pyramid**depth) == 0
        ]


POLICIES: dict[str, type] = {kind.name: kind for kind in (Full, Prefix, Dual, Frozen, Interval, Sparse, Mars)}


def policy_from(text: str) -> Policy | None:
    """A policy from its name and settings; None for `none`.

    Args:
        text: `name` or `name:setting=value,…`.

    Raises:
        InputError: an unknown name or setting, or a value out of range.
    """
    name, _, rest = text.partition(":")
    if name == "none" and not rest:
        return None
    if name not in POLICIES:
        raise InputError(f"unknown cache {name!r}; use none, {', '.join(POLICIES)}")
    kind = POLICIES[name]
    known = [entry.name for entry in fields(kind) if entry.default is not MISSING]
    kinds = get_type_hints(kind)
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        key, _, value = pair.partition("=")
        if key not in known:
            raise InputError(f"cache {name} has no setting {key!r}; known: {', '.join(known) or 'none'}")
        settings[key] = _parsed(f"cache {name}: {key}", value, kinds[key])
    return kind(**settings)


def _parsed(what: str, value: str, kind: type) -> Any:
    """A setting's value from text."""
    (kind,) = set(get_args(kind) or (kind,)) - {NoneType}  # None stands for a default that depends on the video
    try:
        if kind is bool:
            return {"true": True, "false": False}[value.lower()]
        return kind(value)
    except (ValueError, KeyError) as error:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise InputError(f"{what} must be {expected}, not {value!r}") from error


def _at_least(policy: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(policy, name) is not None and getattr(policy, name) < least:
            raise InputError(f"cache {policy.name}: {name} must be at least {least}, not {getattr(policy, name)}")
