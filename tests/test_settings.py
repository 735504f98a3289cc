"""Settings: every value is accepted or refused by name, and every front end follows the one list."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidlada.decoding.commit import commit_rule
from vidlada.decoding.policies import parse_policy
from vidlada.errors import InputError
from vidlada.generation import SPEEDS, GenerationSettings, PromptSettings
from vidlada.settings import INT64, settings_of
from vidlada.video import Sampling

LISTS = (GenerationSettings, PromptSettings, Sampling)
FIELDS = [(cls, name) for cls in LISTS for name in settings_of(cls)]
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**18, 1e39, 5e-324, -0.0, math.nan, math.inf, INT64, -INT64 - 1])
)
VALUES = st.one_of(NUMBERS, st.text(), st.booleans(), st.none(), st.lists(st.text()), st.just("\ud83d"), st.binary())


@given(st.sampled_from(FIELDS), VALUES)
def test_any_value_is_taken_or_refused_by_name(place, value):
    cls, name = place
    _, listed, kind = settings_of(cls)[name]
    try:
        settings = cls(**{name: value})
    except InputError as error:
        assert (listed.alias or name) in str(error) and len(str(error)) < 300
        return
    taken = getattr(settings, name)
    if kind in (int, float) and taken is not None:
        assert math.isfinite(taken)
        assert listed.minimum is None or taken >= listed.minimum
        assert listed.above is None or taken > listed.above
        assert listed.maximum is not None and taken <= listed.maximum
    if isinstance(taken, str):
        taken.encode()


@pytest.mark.parametrize(("cls", "name"), FIELDS)
def test_every_setting_has_help_and_bounds(cls, name):
    _, listed, kind = settings_of(cls)[name]
    assert listed.help.endswith(".")
    assert kind not in (int, float) or listed.maximum is not None
    assert kind is not str or listed.choices or listed.max_length is not None


def test_one_text_is_one_stop_text():
    assert GenerationSettings(stop="moves").stop == ("moves",)


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_speed_chooses_cache_and_commit_rule(speed):
    checkpoint = GenerationSettings(gen_length=64, steps=64, cache="prefix")
    chosen = checkpoint.replace(speed=speed)
    assert (chosen.cache, chosen.commit, chosen.steps) == (SPEEDS[speed]["cache"], SPEEDS[speed]["commit"], None)
    commit_rule(chosen)
    parse_policy(chosen.cache)
    assert GenerationSettings.from_dict(chosen.to_dict()) == chosen


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_speed_counts_in_the_constructor_too(speed):
    assert GenerationSettings(speed=speed) == GenerationSettings().replace(speed=speed)
    assert GenerationSettings(speed=speed, cache="prefix").commit == SPEEDS[speed]["commit"]
    assert GenerationSettings(speed=speed, steps=4).commit is None


def test_what_is_given_beside_a_speed_counts():
    settings = GenerationSettings().replace(speed="fast", cache="none", threshold=0.7)
    assert (settings.cache, settings.commit, settings.threshold) == ("none", None, 0.7)
    assert GenerationSettings().replace(speed="fast").replace(steps=32, gen_length=64).commit is None
    with pytest.raises(InputError, match="speed must be exact or balanced or fast"):
        GenerationSettings(speed="slow")


def test_the_docs_list_every_generation_setting():
    table = (Path(__file__).parents[1] / "docs/decoding.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    assert listed == settings_of(GenerationSettings).keys()
