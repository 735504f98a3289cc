"""What samples cost and which failed: written beside lmms-eval's own files by every process, read by the report."""

import json
from pathlib import Path
from typing import Any

# In the environment rather than among the model arguments, which lmms-eval's response cache takes for the model's name.
RECORD_FOLDER = "VIDLADA_EVAL_RECORD"


def record_path(folder: Path, rank: int) -> Path:
    """File of a process."""
    return folder / f"record-{rank}.jsonl"


def read_record(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The latest entry of every task and sample; a line cut short by an interruption is left out."""
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("record-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            key = entry["task"], entry["doc_id"]
            if key not in entries or entries[key]["time"] <= entry["time"]:
                entries[key] = entry
    return entries
