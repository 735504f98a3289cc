"""What shapes.yaml refers to."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from vidlada.shapes.benchmark import matches, open_question, points, right_choice
from vidlada.shapes.dataset import question_of

FOLDER = "vidlada/shapes"  # below HF_HOME


def doc_to_visual(document: dict[str, Any]) -> list[str]:
    """Path of the clip."""
    path = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / FOLDER / document["video"]
    if not path.exists():
        sys.exit(f"{path}: no such file; write it with vidlada eval run --tasks shapes")
    return [str(path)]


def entry_of(document: dict[str, Any]) -> dict[str, Any]:
    """A question as the rest of the package knows it."""
    return {
        "family": document["family"],
        "choices": document["choices"],
        "conversations": [{"value": document["question"]}, {"value": document["answer"]}],
        "clip": json.loads(document["clip"]),
    }


def doc_to_messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The clip and the question, put as `vidlada shapes evaluate` puts it: the answers to choose from, if there are
    any, stand beside the text instead of in it."""
    entry = entry_of(document)
    text = {"type": "text", "text": open_question(entry) if entry["choices"] else question_of(entry)}
    if entry["choices"]:
        text["choices"] = entry["choices"]
    return [{"role": "user", "content": [{"type": "video", "url": path} for path in doc_to_visual(document)] + [text]}]


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """Points of an answer: 1 or 0, or the F1 of the clauses of a caption or timeline. Of choices, the chosen one or
    (where the model was asked without messages) its letter is right."""
    entry, answer = entry_of(document), results[0]
    reached = max(points(entry, answer), matches(answer, right_choice(entry)) if entry["choices"] else 0.0)
    return {"shapes_score": {"family": document["family"], "video": document["video"], "points": reached}}


def mean_points(results: list[dict[str, Any]]) -> float:
    """Mean over samples, 0 to 1."""
    return sum(judged["points"] for judged in results) / len(results)
