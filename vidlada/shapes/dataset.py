"""Clips and questions as files: real mp4 and the LLaVA json format."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vidlada.errors import InputError
from vidlada.files import write_text
from vidlada.shapes.questions import BENCHMARK_FAMILIES, LONG_FAMILIES, Question, questions_for
from vidlada.shapes.render import write_mp4
from vidlada.shapes.world import SPLITS, Clip, clip_for

IMAGE_MARK = "<image>\n"  # where LLaVA's format puts the video


def entry_of(clip: Clip, question: Question, video: str, number: int) -> dict[str, Any]:
    """One question in the LLaVA format, with what is needed to score an answer."""
    return {
        "id": f"{Path(video).stem}-{number:02d}",
        "video": video,
        "conversations": [
            {"from": "human", "value": f"{IMAGE_MARK}{question.question}"},
            {"from": "gpt", "value": question.answer},
        ],
        "family": question.family,
        "choices": question.choices,
        "clip": clip.to_dict(),
    }


def question_of(entry: dict[str, Any]) -> str:
    """The question of an entry as a user asks it."""
    text: str = entry["conversations"][0]["value"]
    return text.removeprefix(IMAGE_MARK)


def clip_questions(clip: Clip, split: str, index: int, number: int, families: Iterable[str]) -> list[Question]:
    """The fixed questions of a numbered clip."""
    generator = np.random.default_rng([SPLITS[split], index, 1])
    return questions_for(clip, generator, number, families)


def write_dataset(
    folder: Path,
    split: str,
    clips: int,
    questions: int = 10,
    first: int = 0,
    seconds: int | None = None,
    size: int = 224,
    fps: int = 8,
    clock: bool = True,
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write numbered clips of a split and questions about them.

    Args:
        folder: gets `videos/*.mp4` and `{split}.json`; clips that are already there are kept, so an interrupted
            run continues.
        split: train, validation or test.
        clips: how many, from number `first`.
        questions: most short questions a clip; a caption and a timeline come on top.
        first: number of the first clip.
        seconds: length of every clip; drawn by default.
        size: pixels along a side.
        fps: frames a second.
        clock: draw the running clock.
        progress: called with the number of finished clips.

    Returns:
        The json file.

    Raises:
        InputError: the json file exists with other content, or an argument is out of range.
    """
    if clips < 1 or questions < 0:
        raise InputError(f"give at least 1 clip and 0 questions, not {clips} and {questions}")
    videos = Path(folder) / "videos"
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    entries = []
    for done, index in enumerate(range(first, first + clips), start=1):
        clip = clip_for(split, index, seconds)
        if not clock:
            clip = Clip.from_dict({**clip.to_dict(), "clock": False})
        name = f"{split}-{index:06d}-{clip.seconds:02d}s{'' if clock else '-no-clock'}.mp4"
        if not (videos / name).exists():
            write_mp4(clip, videos / name, size=size, fps=fps)
        questions_of_clip = clip_questions(clip, split, index, questions, BENCHMARK_FAMILIES)
        questions_of_clip += clip_questions(clip, split, index, len(LONG_FAMILIES), LONG_FAMILIES)
        video = f"videos/{name}"
        entries += [entry_of(clip, question, video, number) for number, question in enumerate(questions_of_clip)]
        progress(done)
    return _write_json(Path(folder) / f"{split}.json", entries)


def _write_json(path: Path, entries: list[dict[str, Any]]) -> Path:
    text = json.dumps(entries, indent=1)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(f"{path} exists with other questions; choose another folder, or move the file away")
    write_text(path, text)
    return path
