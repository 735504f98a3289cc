"""The notebook runs from its first cell to its last."""

import json
import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    notebook = json.loads(Path("ask.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "commit the notebook without outputs"
            exec(compile(cell["source"], os.fspath(EXAMPLES / "ask.ipynb"), "exec"), names)
            ran += 1
    assert ran >= 5 and names["answer"].text
