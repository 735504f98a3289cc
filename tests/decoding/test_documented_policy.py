"""The worked example of docs/architecture.md is followed: one file, one line, and everything knows the policy."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

import vidlada.decoding.policies as policies
from vidlada.cli import main
from vidlada.errors import InputError
from vidlada.generation import GenerationSettings

DOCS = Path(__file__).parents[2] / "docs/architecture.md"


@pytest.fixture
def alternate(monkeypatch):
    """The class as the page has it, put into the table."""
    page = DOCS.read_text(encoding="utf-8")
    source = re.search(r'```python title="vidlada/decoding/policies/alternate.py"\n(.*?)```', page, re.DOTALL)
    module = ModuleType("vidlada.decoding.policies.alternate")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source[1], module.__dict__)
    monkeypatch.setitem(policies.POLICIES, "alternate", module.Alternate)
    return module.Alternate


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
    told = json.loads(ended.stdout)
    assert told["settings"]["cache"] == "alternate:every=2"
    assert told["statistics"]["refreshes"]["visual"] == -(-told["statistics"]["steps"] // 2)
