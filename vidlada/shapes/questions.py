"""What can be asked about a clip, and what is true."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vidlada.settings import as_sequence
from vidlada.shapes.captions import (
    NOTHING,
    STILL,
    caption_of,
    event_words,
    in_order,
    motion_of,
    scene_of,
    timeline_of,
)
from vidlada.shapes.world import (
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    MAX_SECONDS,
    MAX_THINGS,
    PLACES,
    SHAPES,
    SIZES,
    Clip,
    Event,
)

LETTERS = ("A", "B", "C", "D")
CHOICES_MARK = " choices : "  # before the choices of a question


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        family: of `FAMILIES`.
        question, answer: words separated by single spaces; with choices the answer is a letter.
        choices: what the letters stand for, or None for an open question.
    """

    family: str
    question: str
    answer: str
    choices: tuple[str, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


Asked = tuple[str, str, list[str]]  # question, answer, wrong answers of the same kind
Generator = np.random.Generator


def pick(generator: Generator, options: Sequence[Any]) -> Any:
    """One of several, at random."""
    return options[int(generator.integers(len(options)))]


def asked_event(clip: Clip, event: Event) -> str:
    """An event as asked after "does": "red circle turn blue"."""
    verb = {"appears": "appear", "disappears": "disappear", "turns": f"turn {event.colour}"}[event.kind]
    return f"{clip.things[event.thing].name} {verb}"


def existence(clip: Clip, generator: Generator) -> Asked | None:
    """Is there such a thing? Half of the answers are no, mostly about things that share a colour or shape.

    No is never the answer for a pair that only the test split shows: training would teach that there are none.
    """
    shown = {(colour, t.shape) for t in clip.things for colour in (t.colour, t.turns[1] if t.turns else t.colour)}
    thing = pick(generator, clip.things)
    if generator.random() < 0.5:
        return f"is there a {thing.name} in the video ?", "yes", []
    near = [(c, thing.shape) for c in COLOURS] + [(thing.colour, s) for s in SHAPES]
    absent = [pair for pair in near if pair not in shown | HELD_OUT]
    colour, shape = pick(generator, absent)
    return f"is there a {colour} {shape} in the video ?", "no", []


def count(clip: Clip, generator: Generator) -> Asked | None:
    """How many things there are over the whole clip, of a colour (at the start) or shape or in all."""
    kind = generator.integers(3)
    if kind == 0:
        number, what = len(clip.things), "things"
    elif kind == 1:
        shape = pick(generator, [t.shape for t in clip.things] if generator.random() < 0.8 else SHAPES)
        number, what = sum(t.shape == shape for t in clip.things), plural(shape)
    else:
        if any(t.turns for t in clip.things):
            return None
        colour = pick(generator, [t.colour for t in clip.things] if generator.random() < 0.8 else list(COLOURS))
        number, what = sum(t.colour == colour for t in clip.things), f"{colour} things"
    wrong = [str(n) for n in range(MAX_THINGS + 1) if n != number]
    return f"how many {what} are in the video ?", str(number), wrong


def plural(shape: str) -> str:
    """More than one of a shape."""
    return shape + ("es" if shape == "cross" else "s")


def colour(clip: Clip, generator: Generator) -> Asked | None:
    """Colour of the only thing of its shape."""
    alone = [t for t in clip.things if t.turns is None and sum(o.shape == t.shape for o in clip.things) == 1]
    if not alone:
        return None
    thing = pick(generator, alone)
    wrong = [t.colour for t in clip.things] + list(generator.permutation(list(COLOURS)))
    return f"what colour is the {thing.shape} ?", thing.colour, wrong


def shape(clip: Clip, generator: Generator) -> Asked | None:
    """Shape of the only thing of its colour."""
    colours = [c for t in clip.things for c in {t.colour, t.turns[1] if t.turns else t.colour}]
    alone = [t for t in clip.things if t.turns is None and colours.count(t.colour) == 1]
    if not alone:
        return None
    thing = pick(generator, alone)
    wrong = [t.shape for t in clip.things] + list(generator.permutation(SHAPES))
    return f"what shape is the {thing.colour} thing ?", thing.shape, wrong


def direction(clip: Clip, generator: Generator) -> Asked | None:
    """Which way a thing moves (at first, when it comes back)."""
    moving = [t for t in clip.things if t.direction]
    still = [t for t in clip.things if not t.direction]
    pool = moving if moving and (not still or generator.random() < 0.85) else still
    thing = pick(generator, pool)
    if thing in still and generator.random() < 0.5:
        return None
    answer = thing.direction or STILL
    return f"which way does the {thing.name} move first ?", answer, [*generator.permutation(list(DIRECTIONS)), STILL]


def speed(clip: Clip, generator: Generator) -> Asked | None:
    """Which of two things is faster, by at least 1.7 times."""
    pairs = [
        (one, other)
        for one in clip.things
        for other in clip.things
        if one is not other and clip.speed(one) > 1.7 * clip.speed(other) and clip.speed(one) > 0
    ]
    if not pairs:
        return None
    moving = [pair for pair in pairs if clip.speed(pair[1]) > 0]
    fast, slow = pick(generator, moving or pairs)
    first, second = (fast, slow) if generator.integers(2) else (slow, fast)
    return f"which is faster , the {first.name} or the {second.name} ?", fast.name, [slow.name]


def order(clip: Clip, generator: Generator) -> Asked | None:
    """What happens first, last, before or after."""
    events = clip.events
    if len(events) < 2:
        return None
    words = [event_words(clip, event) for event in events]
    kind = generator.integers(5)
    if kind == 0:
        return "what happens first ?", words[0], words[1:]
    if kind == 1:
        return "what happens last ?", words[-1], words[:-1]
    place = int(generator.integers(len(events) - 1))
    if kind in (2, 3):
        return *_beside(words, place, after=kind == 2), words
    earlier, later = sorted(generator.choice(len(events), 2, replace=False))
    if generator.integers(2):
        return f"does the {asked_event(clip, events[earlier])} before the {words[later]} ?", "yes", []
    return f"does the {asked_event(clip, events[later])} before the {words[earlier]} ?", "no", []


def neighbour(clip: Clip, generator: Generator) -> Asked | None:
    """What happens before or after an event, of three or more (training only)."""
    words = [event_words(clip, event) for event in clip.events]
    if len(words) < 3:
        return None
    place = int(generator.integers(len(words) - 1))
    return *_beside(words, place, after=bool(generator.integers(2))), []


def _beside(words: Sequence[str], place: int, after: bool) -> tuple[str, str]:
    """Question and answer about two events in a row, the first of them at `place`."""
    if after:
        return f"what happens after the {words[place]} ?", words[place + 1]
    return f"what happens before the {words[place + 1]} ?", words[place]


def at_second(clip: Clip, generator: Generator) -> Asked | None:
    """What happens at a second."""
    events = clip.events
    words = [event_words(clip, event) for event in events]
    if not events or generator.random() < 0.12:
        quiet = sorted(set(range(1, clip.seconds)) - {event.second for event in events})
        if not quiet or (not events and generator.random() < 0.8):
            return None
        return f"what happens at second {clip.clock_at(pick(generator, quiet))} ?", NOTHING, words
    place = int(generator.integers(len(events)))
    return f"what happens at second {clip.clock_at(events[place].second)} ?", words[place], [*words, NOTHING]


def when(clip: Clip, generator: Generator) -> Asked | None:
    """At which second something happens."""
    events = clip.events
    if not events:
        return None
    event = pick(generator, events)
    others = [str(clip.clock_at(second)) for second in generator.permutation(np.arange(1, clip.seconds))]
    return f"at which second does the {asked_event(clip, event)} ?", str(clip.clock_at(event.second)), others


def change(clip: Clip, generator: Generator) -> Asked | None:
    """Whether a thing changes its colour, and to which."""
    turning = [t for t in clip.things if t.turns]
    kind = generator.integers(3)
    if turning and kind:
        thing = pick(generator, turning)
        assert thing.turns
        wrong = [c for c in generator.permutation(list(COLOURS)) if c != thing.turns[1]]
        return f"which colour does the {thing.name} turn ?", thing.turns[1], wrong
    thing = pick(generator, turning if turning and generator.random() < 0.5 else clip.things)
    if not thing.turns and generator.random() < 0.5:
        return None
    return f"does the {thing.name} change colour ?", "yes" if thing.turns else "no", []


def caption(clip: Clip, generator: Generator) -> Asked | None:
    """Every thing with what it does."""
    return "describe the video .", caption_of(clip), []


def timeline(clip: Clip, generator: Generator) -> Asked | None:
    """What is there at the start, every event, and what is there at the end."""
    return "list the events in order .", timeline_of(clip), []


def inventory(clip: Clip, generator: Generator) -> Asked | None:
    """What is visible at a second, and where (training only)."""
    second = int(generator.integers(clip.seconds))
    return f"what is visible at second {clip.clock_at(second)} ?", scene_of(clip, second), []


def picture(clip: Clip, generator: Generator) -> Asked | None:
    """A single frame's content; the frame is the clip's only one (training only)."""
    return "describe the picture .", scene_of(clip, 0), []


def clock(clip: Clip, generator: Generator) -> Asked | None:
    """What the clock shows, in a clip at its start or end (training only)."""
    if clip.seconds == 1:
        return ("which second is it ?", str(clip.clock_at(0)), []) if clip.clock else None
    if generator.integers(2):
        return "which second is it at the start ?", str(clip.clock_at(0)), []
    return "which second is it at the end ?", str(clip.clock_at(clip.seconds - 1)), []


def quiet(clip: Clip, generator: Generator) -> Asked | None:
    """A second at which nothing happens, mostly one beside an event (training only)."""
    busy = {event.second for event in clip.events}
    free = set(range(1, clip.seconds)) - busy
    beside = free & {second + step for second in busy for step in (-1, 1)}
    if not free or (not busy and generator.random() < 0.7):
        return None
    second = pick(generator, sorted(beside if beside and generator.random() < 0.6 else free))
    return f"what happens at second {clip.clock_at(second)} ?", NOTHING, []


def everything(clip: Clip, generator: Generator) -> Asked | None:
    """All things of the clip, in the order of its caption (training only)."""
    return "list the things in the video .", " , ".join(thing.name for thing in in_order(clip)) + " .", []


def where(clip: Clip, generator: Generator) -> Asked | None:
    """Where a thing is at a second, at the start or at the end (training only)."""
    thing = pick(generator, clip.things)
    last = clip.last_second(thing)
    second = int(generator.integers(thing.appear, last + 1))
    kind = generator.integers(3)
    if kind == 0:
        return f"where is the {thing.name} at second {clip.clock_at(second)} ?", clip.place(thing, second), []
    if kind == 1:
        return f"where is the {thing.name} at the start ?", clip.place(thing, thing.appear), []
    return f"where is the {thing.name} at the end ?", clip.place(thing, last), []


def spot(clip: Clip, generator: Generator) -> Asked | None:
    """What is at a place at a second, mostly where something is (training only)."""
    second = int(generator.integers(clip.seconds))
    seen = [t for t in clip.things if clip.visible(t, second)]
    places = [clip.place(t, second) for t in seen]
    place = pick(generator, places) if places and generator.random() < 0.9 else pick(generator, pick(generator, PLACES))
    if places.count(place) > 1:
        return None
    what = NOTHING
    if place in places:
        thing = seen[places.index(place)]
        what = f"{thing.size} {thing.colour_at(second)} {thing.shape}"
    moment = f" at second {clip.clock_at(second)}" if clip.seconds > 1 else ""
    return f"what is at {place}{moment} ?", what, []


def path(clip: Clip, generator: Generator) -> Asked | None:
    """Start, end and direction of a thing (training only)."""
    thing = pick(generator, clip.things)
    return f"how does the {thing.name} move ?", motion_of(clip, thing), []


BENCHMARK_FAMILIES: dict[str, Callable[[Clip, Generator], Asked | None]] = {
    "existence": existence, "count": count, "colour": colour, "shape": shape, "direction": direction,
    "speed": speed, "order": order, "at": at_second, "when": when, "change": change,
}  # fmt: skip
LONG_FAMILIES: dict[str, Callable[[Clip, Generator], Asked | None]] = {"caption": caption, "timeline": timeline}
TRAINING_FAMILIES: dict[str, Callable[[Clip, Generator], Asked | None]] = {
    "inventory": inventory, "picture": picture, "where": where, "spot": spot, "path": path, "clock": clock,
    "quiet": quiet, "everything": everything, "neighbour": neighbour,
}  # fmt: skip
FAMILIES = BENCHMARK_FAMILIES | LONG_FAMILIES | TRAINING_FAMILIES


def ask(clip: Clip, family: str, generator: Generator, choice_share: float = 0.0) -> Question | None:
    """A question of a family, or None when the clip does not support one.

    Args:
        clip: what it is about.
        family: a key of `FAMILIES`.
        generator: of every choice.
        choice_share: probability that a short question is asked as multiple choice.
    """
    if not clip.things and family not in ("picture", "clock"):
        return None
    asked = FAMILIES[family](clip, generator)
    if asked is None:
        return None
    question, answer, wrong = asked
    wrong = list(dict.fromkeys(str(w) for w in wrong if w != answer))
    if family in BENCHMARK_FAMILIES and wrong and generator.random() < choice_share:
        options = [answer, *wrong[: len(LETTERS) - 1]]
        options = [options[i] for i in generator.permutation(len(options))]
        listed = " , ".join(f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False))
        letter = LETTERS[options.index(answer)]
        return Question(family, f"{question}{CHOICES_MARK}{listed} . answer with the letter .", letter, tuple(options))
    return Question(family, question, answer)


def questions_for(
    clip: Clip,
    generator: Generator,
    number: int,
    families: str | Iterable[str] = tuple(BENCHMARK_FAMILIES),
    choice_share: float = 0.3,
) -> list[Question]:
    """Several different questions about a clip, spread over the families that it supports.

    Args:
        clip: what they are about.
        generator: of every choice.
        number: most questions; fewer when the clip does not support so many.
        families: to choose from; a family named twice is asked twice as often.
        choice_share: share of short questions asked as multiple choice.
    """
    families = list(as_sequence(families))
    found: dict[str, Question] = {}
    for _ in range(4):
        for family in generator.permutation(families):
            question = ask(clip, str(family), generator, choice_share)
            if question is not None and question.question not in found:
                found[question.question] = question
            if len(found) == number:
                return list(found.values())
    return list(found.values())


def vocabulary() -> list[str]:
    """Every word the world can say or ask, in a fixed order."""
    words = """
        a above after and answer any appear appears are at before between bounce bounces change choices clip color
        colour count describe did disappear disappears do does end events faster first frame from go goes happen
        happens how in into is it its kind large last letter list many move moves movie name nothing now object
        objects of one or order other path picture returns scene second seconds see shape shapes show shown slower
        small start stay stays still tell than that the then there thing things this time to turn turns two video
        visible was way what when where which while with yes no you your please describe
        left right up down center top bottom . , ? : ! ;
    """.split()  # noqa: SIM905 - a list of 130 strings is no easier to read
    names = [*COLOURS, *SHAPES, *(plural(shape) for shape in SHAPES), *SIZES, *LETTERS]
    numbers = [str(number) for number in range(MAX_SECONDS + 1)]
    return list(dict.fromkeys([*words, *names, *numbers]))
