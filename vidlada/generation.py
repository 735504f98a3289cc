"""Settings of prompts and decoding, listed once; the command line, the server and the docs follow this list."""

from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, fields, is_dataclass, replace
from types import NoneType
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from vidlada.errors import InputError
from vidlada.settings import INT64, as_sequence, check_settings, format_value, setting

Remasking = Literal["low_confidence", "random"]
# Cache and commit rule of each speed, from what `vidlada bench quality` measured (docs/benchmarks.md)
SPEEDS: dict[str, dict[str, str | None]] = {
    "exact": {"cache": "none", "commit": None},
    "balanced": {"cache": "mars", "commit": "credit:confidence=0.9"},
    "fast": {"cache": "dual", "commit": "credit:confidence=0.9"},
}
PACES = ("commit", "threshold", "factor", "steps")  # settings that replace each other
Noise = Literal["auto", "torch", "counter"]
MAX_SLOTS = 2**17  # more answer slots or steps than any model of the family has positions


@dataclass(frozen=True)
class PromptSettings:
    """What the prompt contains besides the video and the question."""

    time_instruction: bool = setting(False, "Tell the model when its frames were taken.")
    system: str | None = setting(None, "System message instead of the checkpoint's own.", max_length=100_000)

    def __post_init__(self) -> None:
        check_settings(self)


@runtime_checkable
class CachePolicy(Protocol):
    """Interface of a cache policy; see `vidlada.decoding.policies.base.Policy`."""

    name: ClassVar[str]

    def plan(self, context: Any) -> Any:
        """Return the plan of a step."""

    def entries(self, layers: int) -> list[int]:
        """Return the layers above 0 at which segments may join."""


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is decoded (LLaDA sampling). Every setting is described where it is listed.

    Raises:
        InputError: a value is out of bounds, or two settings exclude each other.
    """

    gen_length: int = setting(
        128, "Answer slots, in tokens.", minimum=1, maximum=MAX_SLOTS, essential=True, metavar="TOKENS"
    )
    block_length: int = setting(
        32, "Slots decoded together, blocks left to right; divides gen_length.", minimum=1, maximum=MAX_SLOTS
    )
    steps: int | None = setting(
        None,
        "Denoising steps for the whole answer, a multiple of the number of blocks; by default one token a step.",
        minimum=1,
        maximum=MAX_SLOTS,
        essential=True,
    )
    temperature: float = setting(0.0, "Of the Gumbel noise; 0 is greedy.", minimum=0, maximum=10, essential=True)
    top_p: float = setting(
        1.0,
        "At a temperature, sample only from the likeliest tokens that together are this probable.",
        above=0,
        maximum=1,
    )
    cfg_scale: float = setting(
        0.0, "Classifier-free guidance; 0 is off, else a step takes two passes.", minimum=0, maximum=100
    )
    remasking: Remasking = setting(
        "low_confidence",
        "How proposed tokens are ranked: by their probability, or at random.",
        choices=("low_confidence", "random"),
    )
    threshold: float | None = setting(
        None,
        "Commit every token more confident than this, at least one a step, e.g. 0.9 (Fast-dLLM).",
        above=0,
        maximum=1,
        essential=True,
    )
    factor: float | None = setting(
        None,
        "Commit the largest n with (n + 1)(1 - confidence of the n-th) below this (Fast-dLLM).",
        above=0,
        maximum=10**6,
    )
    commit: str | None = setting(
        None,
        "Which proposals become final in a step: topk, threshold, factor, credit, prophet, entropy, stable or wino, "
        "with settings after a colon, e.g. credit:decay=0.8; replaces steps, threshold and factor.",
        max_length=200,
        metavar="RULE",
    )
    stop: tuple[str, ...] = setting(
        (),
        "A text that ends the answer, as the end-of-turn token does; may be given several times.",
        max_length=1000,
        max_items=16,
        metavar="TEXT",
    )
    suffix: str = setting(
        "", "Fixed text after the answer slots, visible from the first step and returned.", max_length=10_000
    )
    seed: int = setting(0, "Of every random choice of this answer.", minimum=-INT64, maximum=INT64 - 1, essential=True)
    noise: Noise = setting(
        "auto",
        "Random numbers: torch, drawn on the CPU in the published order; counter, computed from seed and place where "
        "the model is, much faster on a GPU; auto, torch on a CPU and counter elsewhere.",
        choices=("auto", "torch", "counter"),
    )
    cache: str | CachePolicy = setting(
        "none",
        "What is reused between steps: none, prefix, dual, frozen, interval, dllm, dkv, elastic, sparse or mars, "
        "with settings after a colon, e.g. mars:text=8,ratio=2.",
        max_length=200,
        essential=True,
        metavar="POLICY",
    )
    speed: Literal["exact", "balanced", "fast"] | None = setting(
        None,
        "Chooses cache and commit rule where they are not given.",
        choices=tuple(SPEEDS),
        essential=True,
    )
    reuse: int = setting(
        0,
        "Layers, from the lowest, whose keys and values of the frames a further question about a video reuses; 0 is "
        "off. Needs a cache; vidlada chat with a cache takes a third of the layers by default.",
        minimum=0,
        maximum=1024,
        metavar="LAYERS",
    )
    visual_keep: float = setting(
        1.0,
        "Share of the visual tokens that is left; alike ones are merged over time and space (after FlashVID, HoliTom).",
        above=0,
        maximum=1,
        metavar="SHARE",
    )

    visual_prune: str | None = setting(
        None,
        "Which visual tokens are dropped after the first step: none, or those that the answer attends to least, e.g. "
        "redvtp:keep=0.25 (RedVTP).",
        max_length=200,
        metavar="PRUNING",
    )
    kv_dtype: Literal["auto", "int8", "float8"] = setting(
        "auto",
        "Type of a cache's keys and values: auto, as the weights, or int8 or float8 with a scale for every token and "
        "head: about half of the memory, and slower. Needs a cache.",
        choices=("auto", "int8", "float8"),
    )

    think: bool | None = setting(
        None,
        "Let the model think before it answers, or tell it not to; by default as the checkpoint was made.",
        essential=True,
    )
    think_length: int = setting(
        1024, "Slots of a thought, before those of the answer.", minimum=1, maximum=MAX_SLOTS, metavar="TOKENS"
    )

    def __post_init__(self) -> None:
        stop = as_sequence(self.stop)
        if isinstance(stop, Sequence):
            object.__setattr__(self, "stop", tuple(stop))
        check_settings(self, skip=() if isinstance(self.cache, str | NoneType) else ("cache",))
        if not isinstance(self.cache, str | CachePolicy):
            raise InputError(f"cache must be a text or a cache policy, not {format_value(self.cache)}")
        if self.gen_length % self.block_length:
            raise InputError(
                f"block_length {self.block_length} does not divide gen_length {self.gen_length}; "
                f"choose a block_length that does"
            )
        if self.steps is not None and self.steps % self.num_blocks:
            raise InputError(
                f"steps {self.steps} is not a multiple of the {self.num_blocks} blocks "
                f"(gen_length {self.gen_length} / block_length {self.block_length})"
            )
        if self.speed is not None and all(getattr(self, name) is None for name in PACES):  # not made by `replace`
            preset = SPEEDS[self.speed]
            object.__setattr__(self, "commit", preset["commit"])
            if self.cache == "none":
                object.__setattr__(self, "cache", preset["cache"])
        paces = [name for name in ("threshold", "factor", "commit") if getattr(self, name) is not None]
        if len(paces) > 1:
            raise InputError(f"{' and '.join(paces)} exclude each other; give one of them")
        if self.steps is not None and (self.threshold is not None or self.factor is not None):
            raise InputError("steps is fixed in advance; it cannot be combined with threshold or factor")
        if self.remasking == "random" and (self.threshold is not None or self.factor is not None):
            raise InputError("threshold and factor compare probabilities; they need remasking low_confidence")
        if self.reuse and self.cache == "none":
            raise InputError("reuse needs a cache to reuse; choose one, e.g. mars")
        if self.kv_dtype != "auto" and self.cache == "none":
            raise InputError(f"kv_dtype {self.kv_dtype} needs a cache whose type it is; choose one, e.g. mars")
        if any(not word for word in self.stop):
            raise InputError("a stop string must not be empty")

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the answer."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Denoising steps per block; one token a step unless `steps` is set."""
        return self.block_length if self.steps is None else self.steps // self.num_blocks

    @property
    def slots(self) -> int:
        """Slots of the answer and of its thought, if there is one."""
        return self.gen_length + (self.think_length if self.think else 0)

    def of_thought(self) -> "GenerationSettings":
        """Return the settings for decoding the thought: the same pace, in its own slots."""
        length = self.think_length
        block = max(n for n in range(1, min(self.block_length, length) + 1) if length % n == 0)
        steps = self.steps
        if steps is not None:
            blocks = length // block
            steps = blocks * max(1, round(steps * length / self.gen_length / blocks))
        return replace(self, gen_length=length, block_length=block, steps=steps, stop=(), suffix="")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationSettings":
        """Build settings from a mapping; an unknown name raises an `InputError` that lists the known ones."""
        return cls().replace(**values)

    def replace(self, **changes: Any) -> "GenerationSettings":
        """Return a copy with some settings changed; None leaves a setting unchanged.

        A `gen_length` that the default `block_length` does not divide takes the largest block that does, unless
        `block_length` is given too. `commit`, `threshold`, `factor` and `steps` replace each other. `speed` sets cache
        and commit rule, as far as they are not among the changes.
        """
        known = {entry.name for entry in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown generation setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        given = {name: value for name, value in changes.items() if value is not None}
        speed = given.get("speed")
        preset = SPEEDS.get(speed, {}) if isinstance(speed, str) else {}
        if any(pace in given for pace in PACES):
            given = dict.fromkeys(PACES) | given
        elif preset:
            given = dict.fromkeys(PACES) | {"commit": preset["commit"]} | given
        if preset:
            given = {"cache": preset["cache"]} | given
        gen_length = given.get("gen_length")
        if "block_length" not in given and isinstance(gen_length, int) and gen_length > 0:
            given["block_length"] = max(n for n in range(1, self.block_length + 1) if gen_length % n == 0)
        return replace(self, **given)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON; a cache policy becomes its text."""
        return {**asdict(self), "cache": policy_text(self.cache)}


def policy_text(cache: str | CachePolicy) -> str:
    """Format a cache policy as the command line takes it: `name:setting=value,…`, without default settings."""
    if isinstance(cache, str):
        return cache
    entries: tuple[Field[Any], ...] = fields(cache) if is_dataclass(cache) else ()
    pairs = [
        f"{entry.name}={getattr(cache, entry.name)}" for entry in entries if getattr(cache, entry.name) != entry.default
    ]
    return f"{cache.name}:{','.join(pairs)}" if pairs else cache.name
