"""The shapes world's questions as a dataset of lmms-eval, written where they are missing."""

import json
from pathlib import Path

import yaml

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
            "answer": entry["conversations"][1]["value"],
            "clip": json.dumps(entry["clip"]),
        }
        for entry in json.loads(written.read_text(encoding="utf-8"))
    ]
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    (folder / SPLIT_FILE).write_text("".join(lines), encoding="utf-8")
    configs = [{"config_name": "questions", "data_files": [{"split": "test", "path": SPLIT_FILE}]}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
