"""What shapes.yaml refers to."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vidlada.shapes.benchmark import points

FOLDER = "vidlada/shapes"  # below HF_HOME


def doc_to_visual(document: dict[str, Any]) -> list[str]:
    """Path of the clip."""
    path = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / FOLDER / document["video"]
    if not path.exists():
        sys.exit(f"{path}: no such file; write it with vidlada eval --tasks shapes")
    return [str(path)]


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Points of an answer: 1 or 0, or the F1 of the clauses of a caption or timeline."""
    entry = {
        "family": document["family"],
        "conversations": [{}, {"value": document["answer"]}],
        "clip": json.loads(document["clip"]),
    }
    judged = {"family": document["family"], "video": document["video"], "points": points(entry, results[0])}
    return {"shapes_score": judged}


def mean_points(results: list[dict[str, Any]]) -> float:
    """Mean over samples, 0 to 1."""
    return sum(judged["points"] for judged in results) / len(results)
