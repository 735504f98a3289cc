"""Settings of decoding, validated on construction; torch is not needed to read them."""

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from vidlada.errors import InputError

Remasking = Literal["low_confidence", "random"]


@dataclass(frozen=True)
class GenerationSettings:
    """How an answer is decoded (LLaDA sampling).

    Args:
        gen_length: answer slots, in tokens.
        block_length: slots decoded together, blocks left to right; divides `gen_length`.
        steps: denoising steps for the whole answer; None is one token a step. A multiple of the number of blocks.
        temperature: of the Gumbel noise; 0 is greedy.
        cfg_scale: classifier-free guidance; 0 is off (one pass a step instead of two).
        remasking: how proposals are ranked: by their probability, or at random.
        threshold: commit every proposal at least this confident, at least one a step (Fast-dLLM); None: by `steps`.
        factor: commit the largest n with (n + 1)(1 - confidence_n) < factor (Fast-dLLM); None: by `steps`.
        stop: strings that end the answer, besides the checkpoint's end-of-turn token.
        suffix: fixed text after the answer slots, visible from the first step and returned with the answer.
        seed: of every random choice of this answer.
        cache: what is reused between steps: `none`, or a policy of `vidlada.decoding.policies` by name, with settings
            after a colon.
        reuse: let further questions about a video start from the frames' keys and values of the question before, which
            were computed beside another question; needs a cache.
    """

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    factor: float | None = None
    stop: tuple[str, ...] = field(default=())
    suffix: str = ""
    seed: int = 0
    cache: str = "none"
    reuse: bool = False

    def __post_init__(self) -> None:
        for name in ("gen_length", "block_length", "steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
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
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be at least 0, not {self.temperature!r}")
        if not 0 <= self.cfg_scale < float("inf"):
            raise InputError(f"cfg_scale must be at least 0, not {self.cfg_scale!r}")
        if self.remasking not in ("low_confidence", "random"):
            raise InputError(f"remasking must be low_confidence or random, not {self.remasking!r}")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise InputError(f"threshold must be above 0 and at most 1, not {self.threshold!r}")
        if self.factor is not None and not self.factor > 0:
            raise InputError(f"factor must be above 0, not {self.factor!r}")
        if self.threshold is not None and self.factor is not None:
            raise InputError("threshold and factor exclude each other; give one of them")
        if self.steps is not None and (self.threshold is not None or self.factor is not None):
            raise InputError("steps is fixed in advance; it cannot be combined with threshold or factor")
        if self.remasking == "random" and (self.threshold is not None or self.factor is not None):
            raise InputError("threshold and factor compare probabilities; they need remasking low_confidence")
        if self.reuse and self.cache == "none":
            raise InputError("reuse takes over what a cache has kept; choose a cache, e.g. mars")
        object.__setattr__(self, "stop", tuple(self.stop))
        if any(not word for word in self.stop):
            raise InputError("a stop string must not be empty")

    @property
    def num_blocks(self) -> int:
        """Blocks the answer is decoded in."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Steps each block may take; one token a step unless `steps` says otherwise."""
        return self.block_length if self.steps is None else self.steps // self.num_blocks

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationSettings":
        """Settings from a mapping; an unknown name is an `InputError` that lists the known ones."""
        return cls().updated(**values)

    def updated(self, **changes: Any) -> "GenerationSettings":
        """A copy with some settings changed; None leaves a setting as it is.

        A `gen_length` that the default `block_length` does not divide takes the largest block that does, unless
        `block_length` is given too. `threshold`, `factor` and `steps` replace each other.
        """
        known = {entry.name for entry in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise InputError(f"unknown generation setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        given = {name: value for name, value in changes.items() if value is not None}
        paces = {"threshold", "factor", "steps"}
        if paces & set(given):
            given = dict.fromkeys(paces) | given
        gen_length = given.get("gen_length")
        if "block_length" not in given and isinstance(gen_length, int) and gen_length > 0:
            given["block_length"] = max(n for n in range(1, self.block_length + 1) if gen_length % n == 0)
        return replace(self, **given)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return asdict(self)
