"""Miniature benchmarks: the published layout and fields of each, with clips of the shapes world and known answers.

They try a whole evaluation where the data is not at hand; their scores say nothing about a real model.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from vidlada.errors import InputError
from vidlada.evaluation.benchmarks import MLVU_DEV, MLVU_TEST, MVBENCH_FOLDERS, Benchmark, Document
from vidlada.evaluation.shapes_data import write_shapes
from vidlada.shapes.questions import BENCHMARK_FAMILIES, LETTERS, ask
from vidlada.shapes.render import render_frames, write_mp4
from vidlada.shapes.world import Clip, clip_for
from vidlada.video import IMAGE_FOLDER_FPS

SECONDS, SIZE, FPS = 4, 128, 4  # decord2 3.4, which some tasks read with, fails at a width of 96
SPOKEN = "shapes move"  # in subtitles
FIVE = 5  # options of EgoSchema and fields of LongVideoBench
LETTERS_OF_FIVE = "ABCDE"
PARQUET = "{config}/{split}-00000-of-00001.parquet"


@dataclass(frozen=True)
class Choice:
    """A question with its options; `answer` is the place of the right one."""

    text: str
    options: tuple[str, ...]
    answer: int

    @property
    def letter(self) -> str:
        """Of the right option."""
        return LETTERS[self.answer]

    def lettered(self, form: str) -> list[str]:
        """The options with letters, in a form like `{}. {}`."""
        return [form.format(letter, option) for letter, option in zip(LETTERS, self.options, strict=False)]


def choices_about(clip: Clip, seed: int, number: int) -> list[Choice]:
    """Different multiple-choice questions about a clip."""
    generator = np.random.default_rng([seed, 7])
    found: dict[str, Choice] = {}
    for family in generator.permutation(list(BENCHMARK_FAMILIES) * 20):
        question = ask(clip, str(family), generator, choice_share=1.0)
        if question is not None and question.choices:
            text = question.question  # lists its options too: the small model knows no other wording
            key = text.split(" choices :")[0]
            found.setdefault(key, Choice(text, question.choices, LETTERS.index(question.answer)))
        if len(found) == number:
            break
    return list(found.values())


def questions(first: int, clips: int, number: int) -> Iterator[tuple[int, Choice]]:
    """Numbers of clips with questions about them."""
    for index in range(first, first + clips):
        for choice in choices_about(clip_for("test", index, SECONDS), index, number):
            yield index, choice


class Miniature:
    """A data root being written.

    Args:
        root: new or empty folder.
        clips: of each task.
        number: of questions about each.
    """

    def __init__(self, root: Path, clips: int, number: int):
        self.root, self.clips, self.number = root, clips, number
        self.rendered: dict[int, Path] = {}

    def choices(self, first: int = 0) -> list[tuple[int, Choice]]:
        """Clips from a number on, and the questions about them."""
        return list(questions(first, self.clips, self.number))

    def video(self, index: int, path: str) -> None:
        """Put a clip's video where a benchmark expects it."""
        target = self.root / path
        if target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if index in self.rendered:
            shutil.copyfile(self.rendered[index], target)
        else:
            write_mp4(clip_for("test", index, SECONDS), target, size=SIZE, fps=FPS)
            self.rendered[index] = target

    def frames(self, index: int, path: str) -> None:
        """Put a clip's frames there as images, three a second."""
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        times = [i / IMAGE_FOLDER_FPS for i in range(int(SECONDS * IMAGE_FOLDER_FPS))]
        for number, frame in enumerate(render_frames(clip_for("test", index, SECONDS), times, SIZE), start=1):
            Image.fromarray(frame).save(folder / f"{number:05d}.jpg")

    def dataset(
        self, repository: str, configs: Mapping[str, tuple[str, Sequence[Document]]], place: str = PARQUET,
        listed: bool = True,
    ) -> None:  # fmt: skip
        """Write questions as the hub lays them out.

        Args:
            configs: split and documents by name of configuration.
            place: of a file, with `{config}` and `{split}`; its ending says how it is written.
            listed: name the configurations in the README.
        """
        folder = self.root / repository
        entries = []
        for config, (split, documents) in configs.items():
            path = place.format(config=config, split=split)
            write_rows(folder / path, documents)
            entries.append({"config_name": config, "data_files": [{"split": split, "path": path}]})
        head = yaml.safe_dump({"configs": entries} if listed else {"license": "other"})
        (folder / "README.md").write_text(f"---\n{head}---\n", encoding="utf-8")


def write_rows(file: Path, documents: Sequence[Document]) -> None:
    """A table of questions: parquet, json or jsonl, by its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        try:
            import pyarrow
            from pyarrow.parquet import write_table
        except ImportError as error:
            raise InputError(f"{file}: writing it needs pyarrow; install vidlada[eval]") from error
        write_table(pyarrow.Table.from_pylist(list(documents)), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(documents, ensure_ascii=False), encoding="utf-8")
    else:
        lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
        file.write_text("".join(lines), encoding="utf-8")


def videomme(mini: Miniature) -> None:
    documents = []
    for number, (index, choice) in enumerate(mini.choices()):
        name = f"clip{index:07d}"
        mini.video(index, f"videomme/data/{name}.mp4")
        documents.append({
            "video_id": f"{index:03d}", "duration": ("short", "medium")[index % 2], "domain": "Knowledge",
            "sub_category": "Astronomy", "url": f"https://www.youtube.com/watch?v={name}", "videoID": name,
            "question_id": f"{index:03d}-{number}", "task_type": "Temporal Reasoning", "question": choice.text,
            "options": choice.lettered("{}. {}"), "answer": choice.letter,
        })  # fmt: skip
        subtitle = mini.root / f"videomme/subtitle/{name}.srt"
        subtitle.parent.mkdir(parents=True, exist_ok=True)
        spoken = f'<font color="white" size=".72c">{SPOKEN}</font>'
        subtitle.write_text(f"1\n00:00:00,000 --> 00:00:03,000\n{spoken}\n\n", encoding="utf-8")
    mini.dataset("lmms-eval/Video-MME", {"videomme": ("test", documents)})


def egoschema(mini: Miniature) -> None:
    documents = []
    for number, (index, choice) in enumerate(mini.choices()):
        name = f"{index:08d}-{number:04d}"  # one question a video
        mini.video(index, f"egoschema/videos/{name}.mp4")
        options = [*choice.options, "nothing", "it stays still", "none of them"][:FIVE]
        lettered = [f"{letter}. {option}" for letter, option in zip(LETTERS_OF_FIVE, options, strict=True)]
        documents.append({"question_idx": str(number), "question": choice.text, "video_idx": name,
                          "option": lettered, "answer": str(choice.answer)})  # fmt: skip
    hidden = [{**document, "answer": None} for document in documents]
    mini.dataset("lmms-eval/egoschema", {"GENERATION": ("test", hidden), "Subset": ("test", documents)})


def mlvu(repository: str, folder: str, kinds: Sequence[str]) -> Callable[[Miniature], None]:
    """MLVU's two splits differ in their question types; the last one is left out here."""

    def write(mini: Miniature) -> None:
        documents = []
        for number, (index, choice) in enumerate(mini.choices()):
            kind = kinds[number % (len(kinds) - 1)]
            path = f"{kind}/{kind}_{index}.mp4"
            mini.video(index, f"{folder}/{path}")
            documents.append({
                "video_name": path, "duration": float(SECONDS), "task_type": kind,
                "question": "\n".join([choice.text, *choice.lettered("({}) {}")]),
                "candidates": list(choice.options), "answer": choice.letter,
            })  # fmt: skip
        mini.dataset(repository, {"default": ("test", documents)}, "data/{split}-00000-of-00001.parquet")

    return write


def lvbench(mini: Miniature) -> None:
    documents = []
    for number, (index, choice) in enumerate(mini.choices()):
        path = f"clip{index}.mp4"
        mini.video(index, f"lvbench/{path}")
        documents.append({
            "key": f"clip{index}", "type": "cartoon", "video_path": path, "uid": str(number),
            "question": "\n".join([choice.text, *choice.lettered("({}) {}")]), "answer": choice.letter,
            "question_type": ["event understanding"], "time_reference": "00:00-00:04",
        })  # fmt: skip
    mini.dataset("lmms-eval/LVBench", {"default": ("train", documents)}, "data/{split}-00000-of-00001.parquet")


def video_mmmu(mini: Miniature) -> None:
    configs = {}
    tracks = {"Adaptation": "multiple-choice", "Comprehension": "multiple-choice", "Perception": "perception"}
    for place, (track, kind) in enumerate(tracks.items()):
        documents: list[Document] = []
        for number, (index, choice) in enumerate(mini.choices(place)):
            subject = ("Art_Theory", "Biology")[number % 2]
            identifier = f"validation_{subject}_{place * 100 + number}"
            mini.video(index, f"video_mmmu/{('Art', 'Science')[number % 2]}/{identifier}.mp4")
            opened = track == "Adaptation" and number % 2 == 1
            documents.append({
                "id": identifier, "question": choice.text, "options": [] if opened else list(choice.options),
                "answer": choice.options[choice.answer] if opened else choice.letter,
                "question_type": "open" if opened else kind, "qa_type": "ASR", "link_selected": "",
            })  # fmt: skip
        configs[track] = ("test", documents)
    mini.dataset("lmms-eval/VideoMMMU", configs)


def longvideobench(mini: Miniature) -> None:
    documents = []
    for number, (index, choice) in enumerate(mini.choices()):
        path = f"clip{index}.mp4"
        mini.video(index, f"datasets/longvideobench/videos/{path}")
        options = [*choice.options, *["N/A"] * FIVE][:FIVE]
        documents.append({
            "video_id": f"clip{index}", "question": choice.text, "question_wo_referring_query": choice.text,
            **{f"option{place}": option for place, option in enumerate(options)}, "correct_choice": choice.answer,
            "topic_category": "KG-Knowledge-Geography", "question_category": ("S2E", "T3O")[number % 2],
            "level": "L1-Perception", "id": f"clip{index}_{number}", "video_path": path, "subtitle_path": "clip.json",
            "duration_group": (15, 60)[index % 2], "starting_timestamp_for_subtitles": 0.0,
            "duration": float(SECONDS), "view_count": 1,
        })  # fmt: skip
    spoken = [{"start": "00:00:00.0", "end": "00:00:02.0", "line": SPOKEN}]
    write_rows(mini.root / "datasets/longvideobench/subtitles/clip.json", spoken)
    name = "longvideobench/LongVideoBench"
    mini.dataset(name, {"default": ("validation", documents)}, "{split}-00000-of-00001.parquet", listed=False)
    write_rows(mini.root / name / "lvb_val.json", documents)  # the same again, published beside


def mvbench(mini: Miniature) -> None:
    configs = {}
    for place, (kind, folder) in enumerate(MVBENCH_FOLDERS.items()):
        documents: list[Document] = []
        for index, choice in mini.choices(place % 5):
            name = f"clip{index}" if kind == "episodic_reasoning" else f"clip{index}.mp4"
            (mini.frames if kind == "episodic_reasoning" else mini.video)(index, f"mvbench_video/{folder}/{name}")
            documents.append({"video": name, "question": choice.text, "candidates": list(choice.options),
                              "answer": choice.options[choice.answer]})  # fmt: skip
        configs[kind] = ("train", documents)
    mini.dataset("OpenGVLab/MVBench", configs, "json/{config}.json")


def shapes(mini: Miniature) -> None:
    write_shapes(mini.root, mini.clips, mini.number, seconds=SECONDS, size=SIZE)


WRITERS: dict[str, Callable[[Miniature], None]] = {
    "lmms-eval/Video-MME": videomme, "lmms-eval/egoschema": egoschema,
    "sy1998/MLVU_dev": mlvu("sy1998/MLVU_dev", "mlvu", MLVU_DEV),
    "sy1998/MLVU_Test": mlvu("sy1998/MLVU_Test", "mlvu_test", MLVU_TEST),
    "lmms-eval/LVBench": lvbench, "lmms-eval/VideoMMMU": video_mmmu,
    "longvideobench/LongVideoBench": longvideobench, "OpenGVLab/MVBench": mvbench, "vidlada/shapes": shapes,
}  # by repository  # fmt: skip


def write_miniatures(root: Path, benchmarks: Sequence[Benchmark], clips: int = 2, number: int = 2) -> None:
    """Write a data root of miniature benchmarks.

    Args:
        root: new or empty folder.
        benchmarks: which.
        clips: of each task.
        number: of questions about each clip.

    Raises:
        InputError: the folder is in use.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} is in use; give a new folder")
    miniature = Miniature(root, clips, number)
    for repository in dict.fromkeys(benchmark.repository for benchmark in benchmarks):
        WRITERS[repository](miniature)
