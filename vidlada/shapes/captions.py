"""True sentences about a clip: scenes, motions, captions, timelines, and how many of them a text recovers."""

from vidlada.shapes.world import PLACES, Clip, Event, Thing

STILL = "it stays still"
NOTHING = "nothing"


def event_words(clip: Clip, event: Event) -> str:
    """An event in words: "red circle turns blue"."""
    what = f"turns {event.colour}" if event.kind == "turns" else event.kind
    return f"{clip.things[event.thing].name} {what}"


def scene_of(clip: Clip, second: float) -> str:
    """All that is visible at a time, in reading order of the places."""
    order = [place for row in PLACES for place in row]
    seen = [t for t in clip.things if clip.visible(t, second)]
    seen.sort(key=lambda t: (order.index(clip.place(t, second)), t.name))
    listed = [f"{t.size} {t.colour_at(second)} {t.shape} at {clip.place(t, second)}" for t in seen]
    return " , ".join(listed) + " ." if listed else f"{NOTHING} ."


def motion_of(clip: Clip, thing: Thing) -> str:
    """How a thing moves: "moves right from left to center"."""
    start = clip.place(thing, thing.appear)
    if thing.motion == "still":
        return f"stays at {start}"
    if thing.motion == "bounce":
        return f"goes {thing.direction} from {start} and returns"
    return f"moves {thing.direction} from {start} to {clip.place(thing, clip.last_second(thing))}"


def in_order(clip: Clip) -> list[Thing]:
    """Things in order of appearance, then of place."""
    order = [place for row in PLACES for place in row]
    return sorted(clip.things, key=lambda t: (t.appear, order.index(clip.place(t, t.appear)), t.name))


def caption_clauses(clip: Clip) -> list[str]:
    """One clause for each thing, in order of appearance, then of place."""
    clauses = []
    for thing in in_order(clip):
        clause = f"{thing.size} {thing.name} "
        if thing.appear:
            clause += f"appears at {clip.clock_at(thing.appear)} and "
        clause += motion_of(clip, thing)
        if thing.turns:
            clause += f" , turns {thing.turns[1]} at {clip.clock_at(thing.turns[0])}"
        if thing.disappear is not None:
            clause += f" , disappears at {clip.clock_at(thing.disappear)}"
        clauses.append(clause)
    return clauses


def timeline_clauses(clip: Clip) -> list[str]:
    """The first scene, every event with its second, the last scene."""
    last = clip.seconds - 1
    events = [f"{clip.clock_at(event.second)} : {event_words(clip, event)}" for event in clip.events]
    scenes = [f"{clip.clock_at(second)} : {scene_of(clip, second).removesuffix(' .')}" for second in (0, last)]
    return [scenes[0], *events, scenes[1]]


def caption_of(clip: Clip) -> str:
    """The caption that is true of a clip."""
    return " . ".join(caption_clauses(clip)) + " ."


def timeline_of(clip: Clip) -> str:
    """The timeline that is true of a clip."""
    return " . ".join(timeline_clauses(clip)) + " ."


def events_recovered(answer: str, clip: Clip) -> tuple[float, float, float]:
    """How much of a clip a caption or timeline covers.

    Args:
        answer: the model's text.
        clip: what was shown.

    Returns:
        Precision, recall and F1 over clauses that are exactly right, against the caption's or the timeline's
        true clauses, whichever the answer fits better.
    """
    clauses = [clause.strip() for clause in answer.split(" .") if clause.strip()]
    best = (0.0, 0.0, 0.0)
    for truth in (caption_clauses(clip), timeline_clauses(clip)):
        left = list(truth)
        hits = 0
        for clause in clauses:
            if clause in left:
                left.remove(clause)
                hits += 1
        precision, recall = hits / max(1, len(clauses)), hits / len(truth)
        score = 2 * precision * recall / (precision + recall) if hits else 0.0
        best = max(best, (precision, recall, score), key=lambda scores: scores[2])
    return best
