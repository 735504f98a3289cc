"""Clips and questions as files: real mp4 and the LLaVA json format."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vidlada.errors import InputError
from vidlada.files import write_text
from vidlada.shapes.questions import BENCHMARK_FAMILIES, FAMILIES, LONG_FAMILIES, Question, questions_for
from vidlada.shapes.render import write_mp4
from vidlada.shapes.world import SPLITS, Clip, clip_for, shift_clock

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
    shifted_clock: bool = False,
    families: Sequence[str] = (*BENCHMARK_FAMILIES, *LONG_FAMILIES),
    progress: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write numbered clips of a split and questions about them.

    Args:
        folder: gets `videos/*.mp4` and `{split}.json`; clips that are already there are kept, so an interrupted
            run continues.
        split: train, validation or test.
        clips: how many, from number `first`.
        questions: most questions a clip of the families but captions and timelines, which come on top, one each.
        first: number of the first clip.
        seconds: length of every clip; drawn by default.
        size: pixels along a side.
        fps: frames a second.
        clock: draw the running clock.
        shifted_clock: let every clip's clock start at a random second; questions and answers name what it shows.
        families: of the questions, keys of `vidlada.shapes.questions.FAMILIES`.
        progress: called with the number of finished clips.

    Returns:
        The json file.

    Raises:
        InputError: the json file exists with other content, or an argument is out of range.
    """
    if clips < 1 or questions < 0:
        raise InputError(f"give at least 1 clip and 0 questions, not {clips} and {questions}")
    unknown = [family for family in families if family not in FAMILIES]
    if unknown:
        raise InputError(f"no questions are called {', '.join(unknown)}; use {', '.join(FAMILIES)}")
    if shifted_clock and not clock:
        raise InputError("a clock that is left out cannot start at another second; give one of the two")
    short = [family for family in families if family not in LONG_FAMILIES]
    long = [family for family in families if family in LONG_FAMILIES]
    ending = "-shifted-clock" * shifted_clock + "-no-clock" * (not clock)
    videos = Path(folder) / "videos"
    try:
        videos.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror}") from error
    entries = []
    for done, index in enumerate(range(first, first + clips), start=1):
        clip = clip_for(split, index, seconds)
        if not clock:
            clip = replace(clip, clock=False)
        if shifted_clock:
            clip = shift_clock(clip, np.random.default_rng([SPLITS[split], index, 2]))
        name = f"{split}-{index:06d}-{clip.seconds:02d}s{ending}.mp4"
        if not (videos / name).exists():
            write_mp4(clip, videos / name, size=size, fps=fps)
        questions_of_clip = clip_questions(clip, split, index, questions, short)
        questions_of_clip += clip_questions(clip, split, index, len(long), long)
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
