"""The audit file of a build of questions, and the data set made from it."""

import json
from pathlib import Path
from typing import Any

from vidlada.errors import InputError
from vidlada.files import write_text


def read_audit(path: Path) -> list[dict[str, Any]]:
    """Records of an earlier run; a last line cut short by a kill is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    try:
        records = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        if not all({"video", "segment", "prompt", "candidates", "settings"} <= set(record) for record in records):
            raise ValueError("a line is no record of a segment and of the settings it was made with")
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not an audit file of vidlada data build: {error}") from error
    return records


def write_entries(path: Path, records: list[dict[str, Any]]) -> None:
    """The kept questions as LLaVA entries."""
    lines = []
    for record in records:
        kept = [candidate for candidate in record["candidates"] if candidate["verdict"] == "kept"]
        for number, candidate in enumerate(kept):
            entry_id = f"{record['video']}-{record['segment']}-{number}"
            prompt = {"from": "human", "value": f"<image>\n{candidate['question']}"}
            answer = {"from": "gpt", "value": candidate["answer"]}
            entry = {"id": entry_id, "video": record["video"], "conversations": [prompt, answer]}
            lines.append(json.dumps({**entry, "seconds": record["seconds"], "wrong": candidate["wrong"]}))
    write_text(path, "".join(line + "\n" for line in lines))


def is_answered(record: dict[str, Any]) -> bool:
    """Whether the endpoints were asked about a segment and refused nothing."""
    return bool(record["prompt"]) and not record.get("refused")
