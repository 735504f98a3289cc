"""A small world: coloured shapes that stand, move, bounce, overtake, appear, disappear and change colour."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from vidlada.errors import InputError

WORLD_VERSION = 2
COLOURS = {
    "red": (225, 45, 45),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 210, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.095, "large": 0.135}  # radius, as a share of the frame's side
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
CELLS = (0.19, 0.5, 0.81)  # centres of the three columns and rows
JITTER = 0.04
# Pairs that only the test split may show; every colour and every shape is common elsewhere.
HELD_OUT = frozenset(
    {("red", "star"), ("green", "ring"), ("blue", "triangle"), ("yellow", "cross"), ("purple", "circle"),
     ("orange", "square")}
)  # fmt: skip
UNSEEN_SHARE = 0.5  # of the test split's clips that show such a pair; the others tell how much it matters
SPLITS = {"train": 0, "validation": 1, "test": 2}
MIN_SECONDS, MAX_SECONDS = 2, 60
MAX_THINGS = 4
THINGS_WEIGHTS = (0.12, 0.23, 0.35, 0.30)  # of clips with 1, 2, 3 and 4 things


@dataclass(frozen=True)
class Thing:
    """One shape and all that happens to it.

    Attributes:
        colour, shape, size: as named in `COLOURS`, `SHAPES`, `SIZES`; the colour is the one at the start.
        appear: second of its first frame; 0 when it is there from the start.
        disappear: first second without it; None when it stays.
        motion: "still", "move" from start to end, or "bounce" to the end and back.
        start, end: centres, x and y as shares of the side.
        turns: second and colour of its change of colour, or None.
    """

    colour: str
    shape: str
    size: str
    appear: int
    disappear: int | None
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    turns: tuple[int, str] | None = None

    @property
    def name(self) -> str:
        """How questions call it: colour at the start, and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def direction(self) -> str | None:
        """Where it moves (first), or None when it stands still."""
        if self.motion == "still":
            return None
        x, y = self.end[0] - self.start[0], self.end[1] - self.start[1]
        if abs(x) > abs(y):
            return "right" if x > 0 else "left"
        return "down" if y > 0 else "up"

    def colour_at(self, second: float) -> str:
        """Its colour at a time."""
        return self.turns[1] if self.turns and second >= self.turns[0] else self.colour


@dataclass(frozen=True)
class Event:
    """Something that happens at a second: kind is appears, disappears, turns (a colour) or bounces."""

    second: int
    kind: str
    thing: int
    colour: str | None = None


@dataclass(frozen=True)
class Clip:
    """A whole clip; everything about its frames follows from it.

    Attributes:
        seconds: length; with one frame a second also the number of frames.
        seed: of background and noise.
        things: what is in it.
        clock: whether a running clock of whole seconds stands in the top left corner.
        first_second: what the clock shows in the first frame.
    """

    seconds: int
    seed: int
    things: tuple[Thing, ...]
    clock: bool = True
    first_second: int = 0

    def clock_at(self, second: float) -> int:
        """The whole second the clock shows at a time: what questions and answers call that time."""
        return int(self.first_second + second + 1e-6)

    def visible(self, thing: Thing, second: float) -> bool:
        """Whether a thing is in the picture at a time."""
        return thing.appear <= second < (self.seconds if thing.disappear is None else thing.disappear)

    def last_second(self, thing: Thing) -> int:
        """Second of the last whole-second frame that shows a thing."""
        return (self.seconds if thing.disappear is None else thing.disappear) - 1

    def position(self, thing: Thing, second: float) -> tuple[float, float]:
        """Centre of a thing at a time."""
        if thing.motion == "still":
            return thing.start
        span = max(1, self.last_second(thing) - thing.appear)
        progress = min(1.0, max(0.0, (second - thing.appear) / span))
        if thing.motion == "bounce":
            progress = 1 - abs(2 * progress - 1)
        (x0, y0), (x1, y1) = thing.start, thing.end
        return x0 + (x1 - x0) * progress, y0 + (y1 - y0) * progress

    def place(self, thing: Thing, second: float) -> str:
        """Name of the ninth of the picture a thing is in at a time."""
        x, y = self.position(thing, second)
        return PLACES[_third(y)][_third(x)]

    def speed(self, thing: Thing) -> float:
        """Sides a second."""
        if thing.motion == "still":
            return 0.0
        distance = abs(thing.end[0] - thing.start[0]) + abs(thing.end[1] - thing.start[1])
        distance *= 2 if thing.motion == "bounce" else 1
        return distance / max(1, self.last_second(thing) - thing.appear)

    @property
    def events(self) -> list[Event]:
        """What happens, in order of time."""
        found = []
        for number, thing in enumerate(self.things):
            if thing.appear:
                found.append(Event(thing.appear, "appears", number))
            if thing.turns:
                found.append(Event(thing.turns[0], "turns", number, thing.turns[1]))
            if thing.disappear is not None:
                found.append(Event(thing.disappear, "disappears", number))
        return sorted(found, key=lambda event: event.second)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Clip":
        """The inverse of `to_dict`."""
        things = [
            Thing(
                **{**t, "start": tuple(t["start"]), "end": tuple(t["end"]), "turns": t["turns"] and tuple(t["turns"])}
            )
            for t in values["things"]
        ]
        return cls(**{**values, "things": tuple(things)})


def still(clip: Clip, second: int) -> Clip:
    """One frame of a clip as a clip of its own: a picture with everything standing still."""
    things = tuple(
        replace(
            thing, colour=thing.colour_at(second), motion="still", appear=0, disappear=None, turns=None,
            start=clip.position(thing, second), end=clip.position(thing, second),
        )
        for thing in clip.things if clip.visible(thing, second)
    )  # fmt: skip
    return Clip(1, clip.seed, things, clip.clock, first_second=second + clip.first_second)


def shift_clock(clip: Clip, generator: np.random.Generator) -> Clip:
    """The same clip, whose clock starts at any second that lets it end at the latest second there is."""
    return replace(clip, first_second=int(generator.integers(MAX_SECONDS + 1 - clip.seconds + 1)))


def slow_down(clip: Clip, factor: int) -> Clip:
    """The same clip, in which everything takes `factor` times as long, up to the last whole second's frame."""
    things = tuple(
        replace(
            thing,
            appear=thing.appear * factor,
            disappear=None if thing.disappear is None else thing.disappear * factor,
            turns=thing.turns and (thing.turns[0] * factor, thing.turns[1]),
        )
        for thing in clip.things
    )
    return replace(clip, seconds=(clip.seconds - 1) * factor + 1, things=things)


def _third(coordinate: float) -> int:
    return min(2, int(3 * coordinate))


def clip_for(split: str, index: int, seconds: int | None = None, max_things: int = MAX_THINGS) -> Clip:
    """The clip of a number in a split: always the same one.

    Args:
        split: train, validation or test; their random streams never meet, and only test clips show the
            held-out pairs of colour and shape, at least one each.
        index: any number from 0.
        seconds: length; drawn by default.
        max_things: most things in it.
    """
    if split not in SPLITS:
        raise InputError(f"unknown split {split!r}; use {', '.join(SPLITS)}")
    generator = np.random.default_rng(np.random.SeedSequence([SPLITS[split], index, WORLD_VERSION]))
    return generate_clip(generator, split, seconds, max_things)


def generate_clip(
    generator: np.random.Generator, split: str, seconds: int | None = None, max_things: int = MAX_THINGS
) -> Clip:
    """A random clip; see `clip_for`."""
    if seconds is None:
        low, high = [(4, 16), (17, 32), (33, 60)][generator.choice(3, p=[0.7, 0.2, 0.1])]
        seconds = int(generator.integers(low, high + 1))
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InputError(f"a clip lasts {MIN_SECONDS} to {MAX_SECONDS} seconds, not {seconds}")
    if not 1 <= max_things <= MAX_THINGS:
        raise InputError(f"a clip holds 1 to {MAX_THINGS} things, not {max_things}")
    weights = THINGS_WEIGHTS[:max_things]
    count = 1 + int(generator.choice(max_things, p=np.array(weights) / sum(weights)))
    while True:
        clip = _attempt(generator, split, seconds, count)
        if clip is not None:
            return clip


def _attempt(generator: np.random.Generator, split: str, seconds: int, count: int) -> Clip | None:
    """One try; None when things hide each other or share a look."""
    looks = _looks(generator, split, count)
    moments = _moments(generator, seconds)
    overtake = count >= 2 and seconds >= 4 and generator.random() < 0.12
    lanes = generator.permutation(3)
    axis = int(generator.integers(2))
    way = int(generator.integers(2))
    things = []
    for number, (colour, shape) in enumerate(looks):
        size = str(generator.choice(list(SIZES)))
        runner = overtake and number < 2
        appear, disappear, turns = (0, None, None) if runner else _fate(generator, moments, colour)
        if turns and (turns[1], shape) in HELD_OUT:
            return None
        visible = (seconds if disappear is None else disappear) - appear
        if runner:
            motion, (start, end) = "move", _overtaking(number, int(lanes[number]), axis, way)
        else:
            motion = str(generator.choice(["still", "move", "bounce"], p=[0.35, 0.55, 0.1]))
            if visible < 2 or (motion == "bounce" and visible < 5):
                motion = "still"
            start, end = _path(generator, motion)
        things.append(Thing(colour, shape, size, appear, disappear, motion, start, end, turns))
    clip = Clip(seconds, int(generator.integers(2**31)), tuple(things))
    return clip if _is_clear(clip) else None


def _looks(generator: np.random.Generator, split: str, count: int) -> list[tuple[str, str]]:
    """Distinct pairs of colour and shape."""
    pairs = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    held_out = [pair for pair in pairs if pair in HELD_OUT]
    common = [pair for pair in pairs if pair not in HELD_OUT]
    if split != "test" or generator.random() >= UNSEEN_SHARE:
        return [common[i] for i in generator.choice(len(common), count, replace=False)]
    chosen = [held_out[int(generator.integers(len(held_out)))]]
    others = [pair for pair in pairs if pair != chosen[0]]
    chosen += [others[i] for i in generator.choice(len(others), count - 1, replace=False)]
    return [chosen[i] for i in generator.permutation(count)]


def _moments(generator: np.random.Generator, seconds: int) -> list[int]:
    """Distinct seconds at which events may happen, to be taken one after the other."""
    return [int(second) for second in generator.permutation(np.arange(1, seconds))]


def _fate(
    generator: np.random.Generator, moments: list[int], colour: str
) -> tuple[int, int | None, tuple[int, str] | None]:
    """When a thing appears, disappears and turns another colour; each moment is used once."""
    plans = ["none", "appear", "disappear", "turn", "appear turn", "appear disappear", "turn disappear"]
    weights = np.array([0.22, 0.24, 0.15, 0.2, 0.07, 0.07, 0.05])
    plan = str(generator.choice(plans, p=weights / weights.sum())).split()
    if plan == ["none"] or len(moments) < 1 + len(plan):
        return 0, None, None
    taken = sorted(moments.pop() for _ in plan)
    if len(taken) == 2 and taken[1] - taken[0] < 2:
        return 0, None, None
    when = dict(zip(plan, taken, strict=True))
    appear, disappear = when.get("appear", 0), when.get("disappear")
    turns = None
    if "turn" in when:
        turns = (when["turn"], str(generator.choice([c for c in COLOURS if c != colour])))
    return appear, disappear, turns


def _path(generator: np.random.Generator, motion: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Start and end of a still or straight path."""
    lane = CELLS[int(generator.integers(3))] + generator.uniform(-JITTER, JITTER)
    here, there = generator.choice(3, 2, replace=False)
    if motion == "bounce":
        here, there = (0, 2) if here < there else (2, 0)
    first, last = (CELLS[i] + generator.uniform(-JITTER, JITTER) for i in (here, there))
    if motion == "still":
        last = first
    if generator.integers(2):
        return (first, lane), (last, lane)
    return (lane, first), (lane, last)


def _overtaking(number: int, lane: int, axis: int, way: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Path of the fast (number 0) or the slow thing on its own lane."""
    across = CELLS[lane]
    first, last = (CELLS[0], CELLS[2]) if number == 0 else (CELLS[0] + 0.14, CELLS[0] + 0.34)
    if way:
        first, last = 1 - first, 1 - last
    return ((first, across), (last, across)) if axis == 0 else ((across, first), (across, last))


def _is_clear(clip: Clip) -> bool:
    """No two things ever look the same, and none hides another for long, or at its first, last or event frames."""
    things = clip.things
    for i, one in enumerate(things):
        for other in things[:i]:
            looks = {(one.colour, one.shape), (one.turns[1] if one.turns else one.colour, one.shape)}
            if looks & {(other.colour, other.shape), (other.turns[1] if other.turns else other.colour, other.shape)}:
                return False
            together = [s for s in range(clip.seconds) if clip.visible(one, s) and clip.visible(other, s)]
            if not together:
                continue
            reach = SIZES[one.size] + SIZES[other.size]
            near = []
            for second in together:
                (x0, y0), (x1, y1) = clip.position(one, second), clip.position(other, second)
                near.append(max(abs(x0 - x1), abs(y0 - y1)) < 0.9 * reach)
            if near[0] or near[-1] or sum(near) > 0.25 * len(near):
                return False
    return True
