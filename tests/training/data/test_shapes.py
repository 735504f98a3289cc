"""Clips of the shapes world at other rates, starting times and with single frames between them."""

import numpy as np
import pytest

from vidlada.errors import InputError
from vidlada.shapes.captions import NOTHING, event_words
from vidlada.training.data.shapes import ShapesSource


def plan_of(steps=20, **settings):
    source = ShapesSource(seconds=(4, 8), frames_per_batch=40, questions=6, **settings)
    return [item for step in range(steps) for item in source.plan(step)]


@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_every_event_falls_on_a_frame_at_any_rate(rate):
    events = 0
    for item in plan_of(rates=(rate,)):
        clip, times = item.media
        assert {round(later - earlier, 6) for earlier, later in zip(times, times[1:], strict=False)} == {1 / rate}
        assert {event.second for event in clip.events} <= set(times)
        events += len(clip.events)
    assert events > 20


def test_seconds_are_what_the_clock_shows():
    shifted = 0
    for item in plan_of(shifted_share=1.0, families=("when", "at", "caption")):
        clip, times = item.media
        shown = {str(clip.clock_at(event.second)) for event in clip.events}
        assert clip.clock_at(times[-1]) <= 60
        for question, answer in item.exchanges:
            if question.startswith("at which second") and "choices" not in question:
                assert answer in shown
                shifted += answer not in {str(event.second) for event in clip.events}
            if question.startswith("describe"):
                spoken = {word for word, before in zip(answer.split()[1:], answer.split(), strict=False)
                          if before == "at" and word.isdigit()}  # fmt: skip
                assert spoken <= shown
    assert shifted > 10


def test_a_clip_without_a_clock_counts_from_nought():
    clips = [item.media[0] for item in plan_of(no_clock_share=1.0, shifted_share=1.0)]
    assert not any(clip.clock or clip.first_second for clip in clips)


def test_steps_with_single_frames():
    source = ShapesSource(seconds=(4, 8), frames_per_batch=40, picture_share=0.5, picture_families=("clock",))
    steps = [source.plan(step) for step in range(40)]
    pictures = [items for items in steps if items[0].media[0].seconds == 1]
    assert 10 < len(pictures) < 30
    for item in (item for items in pictures for item in items):
        assert item.exchanges == [("which second is it ?", str(item.media[0].first_second))]


def test_nothing_happens_at_a_quiet_second():
    beside = 0
    for item in plan_of(families=("quiet",)):
        clip, _ = item.media
        events = {event.second for event in clip.events}
        for question, answer in item.exchanges:
            second = int(question.split()[4])
            assert answer == NOTHING and second not in events
            beside += bool({second - 1, second + 1} & events)
    assert beside > 20


def test_neighbours_of_an_event_are_those_of_its_clip():
    asked = 0
    for item in plan_of(families=("neighbour", "count"), choice_share=0.0):
        words = [event_words(item.media[0], event) for event in item.media[0].events]
        for question, answer in item.exchanges:
            if question.startswith("what happens"):
                _, _, side, _, *event = question.removesuffix(" ?").split()
                place = words.index(" ".join(event)) + (1 if side == "after" else -1)
                assert len(words) >= 3 and answer == words[place]
                asked += 1
    assert asked > 20


def test_clips_with_the_most_events_of_several_draws():
    events = [len(item.media[0].events) for item in plan_of(families=("count",))]
    of_four = [len(item.media[0].events) for item in plan_of(families=("count",), draws=4)]
    assert np.mean(of_four) > np.mean(events) + 1


@pytest.mark.parametrize("rates", [(), (0.3,), (1.5,)])
def test_rates_that_no_clip_can_have_are_refused(rates):
    with pytest.raises(InputError, match="rates"):
        ShapesSource(rates=rates)
