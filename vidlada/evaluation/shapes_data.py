"""The shapes world's questions as a dataset of lmms-eval, written where they are missing."""

import json
from pathlib import Path

import yaml

from vidlada.files import read_json, read_json_lines, write_text
from vidlada.shapes.dataset import question_of, write_dataset

REPOSITORY, SPLIT_FILE = "vidlada/shapes", "test.jsonl"


def write_shapes(root: Path, clips: int, number: int = 10, seconds: int | None = None, size: int = 224) -> None:
    """Write the dataset of the task `shapes` below a data root.

    Args:
        root: data root.
        clips: of the test split.
        number: most short questions a clip; a caption and a timeline are added.
        seconds: length of the clips; random by default.
        size: pixels along a side.
    """
    folder = root / REPOSITORY
    written = write_dataset(folder, "test", clips, number, seconds=seconds, size=size)
    documents = [
        {
            "id": entry["id"],
            "video": entry["video"],
            "family": entry["family"],
            "question": question_of(entry),
            "choices": entry["choices"],
            "answer": entry["conversations"][1]["value"],
            "clip": json.dumps(entry["clip"]),
        }
        for entry in read_json(written)
    ]
    write_text(folder / SPLIT_FILE, "".join(json.dumps(document) + "\n" for document in documents))
    configs = [{"config_name": "questions", "data_files": [{"split": "test", "path": SPLIT_FILE}]}]
    write_text(folder / "README.md", f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def count_clips(folder: Path) -> int:
    """Clips of a dataset that was written before."""
    return len({document["video"] for document in read_json_lines(folder / SPLIT_FILE)})
