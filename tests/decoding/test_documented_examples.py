"""The worked examples of docs/architecture.md: one class and one name in a table, and everything knows it."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner

from vidlada.cli import main
from vidlada.decoding import commit, policies
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings

DOCS = Path(__file__).parents[2] / "docs/architecture.md"


def source_of(name):
    """The code block of a class on the page."""
    blocks = re.findall(r"```python title=[^\n]*\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if f"class {name}(" in block)


@pytest.fixture
def alternate(monkeypatch):
    """The policy as the page has it, put into the table."""
    module = ModuleType("vidlada.decoding.policies.alternate")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source_of("Alternate"), module.__dict__)
    monkeypatch.setitem(policies.POLICIES, "alternate", module.Alternate)
    return module.Alternate


@pytest.fixture
def left(monkeypatch):
    """The commit rule as the page has it, put into the table."""
    names = {**vars(commit)}
    exec(source_of("LeftToRight"), names)
    monkeypatch.setitem(commit.RULES, "left", names["LeftToRight"])
    return names["LeftToRight"]


def test_it_runs_by_name_and_as_an_object(alternate, small):
    options = {"gen_length": 16, "block_length": 8}
    named = small.ask(None, "is it red ?", cache="alternate:every=4", **options)
    given = small.ask(None, "is it red ?", cache=alternate(every=4), **options)
    assert named.text == given.text and named.settings.to_dict() == given.settings.to_dict() | {
        "cache": "alternate:every=4"
    }
    assert given.settings.to_dict()["cache"] == "alternate"  # 4 is the default
    assert named.statistics.refreshes["text"] == -(-named.statistics.steps // 4)


def test_every_step_in_full_is_full_recompute(alternate, small):
    options = {"gen_length": 16, "block_length": 8}
    assert small.ask(None, "is it red ?", cache="alternate:every=1", **options).token_ids == (
        small.ask(None, "is it red ?", cache="full", **options).token_ids
    )


def test_wrong_settings_are_refused(alternate):
    for cache, message in (("alternate:every=0", "at least 1"), ("alternate:often=2", "no setting 'often'")):
        with pytest.raises(InputError, match=message):
            policies.parse_policy(GenerationSettings(cache=cache).cache)


def test_the_command_line_knows_it(alternate, small_folder):
    clip = DOCS.parents[1] / "examples/shapes.mp4"
    options = [
        "--model",
        str(small_folder),
        "--frames",
        "2",
        "--gen-length",
        "8",
        "--cache",
        "alternate:every=2",
        "--json",
    ]
    ended = CliRunner().invoke(main, ["ask", str(clip), "is it red ?", *options])
    assert ended.exit_code == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["settings"]["cache"] == "alternate:every=2"
    assert result["statistics"]["refreshes"]["visual"] == -(-result["statistics"]["steps"] // 2)


def test_the_rule_commits_the_first_confident_run(left):
    confidence = torch.tensor([0.0, 0.2, 0.95, 0.99, 0.5, 0.97], dtype=torch.float64)
    open_slots = torch.tensor([False, True, True, True, True, True])
    proposals = commit.Proposals(torch.zeros(6, dtype=torch.long), confidence, open_slots)
    assert left().choose(proposals).tolist() == [False, True, True, True, False, False]
    assert left(confidence=0.999).choose(proposals).tolist() == [False, True, False, False, False, False]


def test_a_cautious_rule_commits_one_token_a_step(left, small):
    options = {"gen_length": 16, "block_length": 8, "cache": "dual"}
    answer = small.ask(None, "is it red ?", commit="left:confidence=1", **options)
    assert answer.statistics.steps == 16
    drafts = [d.state.committed.tolist() for d in small.stream(None, "is it red ?", commit="left", **options)]
    assert all(committed == sorted(committed, reverse=True) for committed in drafts)  # no gap on the way
    with pytest.raises(InputError, match="no setting 'often'"):
        small.ask(None, "is it red ?", commit="left:often=2", **options)
