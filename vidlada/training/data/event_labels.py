"""What happens in a frame of the shapes world, or at the moment a question asks about, as class labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vidlada.shapes.captions import event_words
from vidlada.shapes.questions import NOTHING
from vidlada.shapes.world import COLOURS, SHAPES, Clip, Event
from vidlada.training.objective import IGNORED

KINDS = ("nothing", "appears", "disappears", "turns")
CLASSES = (len(KINDS), len(COLOURS), len(SHAPES), len(COLOURS))  # of the four labels of an event


class EventLabels(NamedTuple):
    """Classes of an event: its kind, the colour and shape of its thing, the colour it turns; `IGNORED` for none."""

    kind: int = 0
    colour: int = IGNORED
    shape: int = IGNORED
    new_colour: int = IGNORED


@dataclass(frozen=True)
class QuestionEvent:
    """The event that answers a question.

    Attributes:
        exchange: number of the question in its sample.
        word: of the question, whose token stands for the moment asked about: the second, or the question mark.
        labels: of the event.
    """

    exchange: int
    word: str
    labels: EventLabels


def labels_of(clip: Clip, event: Event | None) -> EventLabels:
    """The labels of an event, or of nothing."""
    if event is None:
        return EventLabels()
    thing, colours = clip.things[event.thing], list(COLOURS)
    new_colour = IGNORED if event.colour is None else colours.index(event.colour)
    return EventLabels(KINDS.index(event.kind), colours.index(thing.colour), SHAPES.index(thing.shape), new_colour)


def frame_events(clip: Clip, times: Sequence[float]) -> list[EventLabels]:
    """Labels of every frame, of what happens at its time; of the first event where there are several."""
    events: dict[float, Event] = {event.second: event for event in reversed(clip.events)}
    return [labels_of(clip, events.get(time)) for time in times]


def latest_events(events: Sequence[EventLabels]) -> list[EventLabels]:
    """The last event before each of some frames, from what happens in them; nothing where there was none."""
    latest, found = EventLabels(), []
    for labels in events:
        found.append(latest)
        latest = labels if labels.kind else latest
    return found


def question_events(clip: Clip, exchanges: Sequence[tuple[str, str]]) -> list[QuestionEvent]:
    """The events that answer questions of what happens, at a second or before or after another event."""
    events: dict[str, Event | None] = {NOTHING: None, **{event_words(clip, event): event for event in clip.events}}
    found = []
    for number, (question, answer) in enumerate(exchanges):
        words = question.split()
        if words[:2] == ["what", "happens"] and answer in events:
            word = words[4] if words[2:4] == ["at", "second"] else words[-1]
            found.append(QuestionEvent(number, word, labels_of(clip, events[answer])))
    return found
