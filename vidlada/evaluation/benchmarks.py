"""The benchmarks of the paper as lmms-eval 0.7 has them: where their data lies, how a sample is judged, what counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vidlada.errors import InputError

Document = dict[str, Any]
UNSENT = "egoschema"  # lmms-eval sends its answers to a public server
LMMS_EVAL_VERSION = "0.7.3"  # scores moved between versions, because the extraction of answers changed


@dataclass(frozen=True)
class Task:
    """One task of lmms-eval.

    Attributes:
        name: in lmms-eval.
        config: of the dataset; None where it has only one.
        expected: published number of samples, where known.
    """

    name: str
    config: str | None = None
    expected: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """One or several tasks that give one score.

    Attributes:
        name: what `--tasks` takes; in lmms-eval a task or a group.
        title: in reports.
        repository: of the questions, on the Hugging Face hub and below the data root.
        split: of the dataset.
        folder: of the videos, below the data root; where lmms-eval unpacks what it downloads.
        tasks: what it consists of.
        videos: candidate paths of a document's video below the folder, with the name of the task.
        metric: key of a logged sample that judges it.
        right: points of what stands there, 0 to 1.
        kind: question type of what stands there.
        kinds: all types there are; absent ones are reported as absent.
        mean: what the score averages: samples, question types or tasks.
        scale: lmms-eval's own score times this is in percent.
        paper: VidLaDA-8B at 64 frames (arXiv 2601.17868), where the figure is known.
        unpacked: revision of the repository that holds the videos as files instead of archives.
        beside: further folder below that of the videos, without which lmms-eval would ask something else.
        letters: of its choices; empty where nothing is chosen.
    """

    name: str
    title: str
    repository: str
    split: str
    folder: str
    tasks: tuple[Task, ...]
    videos: Callable[[Document, str], Sequence[str]]
    metric: str
    right: Callable[[Any], float]
    kind: Callable[[Any], str | None] = lambda judged: None
    kinds: tuple[str, ...] = ()
    mean: Literal["samples", "kinds", "tasks"] = "samples"
    scale: float = 100
    paper: float | None = None
    unpacked: str | None = None
    beside: str | None = None
    letters: str = "ABCDE"


DISCIPLINES = {
    "Art": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Engineering": ("Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics",
                    "Energy_and_Power", "Materials", "Mechanical_Engineering"),
    "Humanities": ("History", "Literature", "Sociology", "Psychology"),
    "Medicine": ("Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
                 "Public_Health"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
}  # fmt: skip
MVBENCH_FOLDERS = {
    "action_sequence": "star/Charades_segment", "moving_count": "clevrer/video_validation",
    "action_prediction": "star/Charades_segment", "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "action_antonym": "ssv2_video_mp4", "action_count": "perception/videos", "scene_transition": "scene_qa/video",
    "object_shuffle": "perception/videos", "object_existence": "clevrer/video_validation",
    "fine_grained_pose": "nturgbd_convert", "unexpected_action": "FunQA_test/test",
    "moving_direction": "clevrer/video_validation", "state_change": "perception/videos",
    "object_interaction": "star/Charades_segment", "character_order": "perception/videos",
    "action_localization": "sta/sta_video_segment", "counterfactual_inference": "clevrer/video_validation",
    "fine_grained_action": "Moments_in_Time_Raw/videos", "moving_attribute": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
}  # fmt: skip


def discipline(identifier: str) -> str:
    """Folder of a Video-MMMU video, by the subject in its id: `validation_Art_Theory_3`."""
    subject = "_".join(identifier.split("_")[1:-1])
    for folder, subjects in DISCIPLINES.items():
        if subject in subjects:
            return folder
    raise InputError(f"Video-MMMU has no subject {subject!r} (in the id {identifier!r})")


def same(first: str, second: str) -> Callable[[Any], float]:
    """Points where two fields agree."""
    return lambda judged: float(str(judged[first]) == str(judged[second]))


def video_mmmu_right(judged: dict[str, Any]) -> float:
    """Choices have to be equal; an open answer has to hold the true text or number (the rule of MMMU).

    lmms-eval 0.7.3 reads the letters of questions of the type `perception` as if they were open answers, in lower case
    and with spaces, and then compares them with the true letter: all are wrong there, but not here.
    """
    truths = judged["answer"] if isinstance(judged["answer"], list) else [judged["answer"]]
    if judged["question_type"] in ("multiple-choice", "perception"):
        parsed = judged["parsed_pred"] if isinstance(judged["parsed_pred"], list) else [judged["parsed_pred"]]
        letters = {str(form).strip().upper() for form in parsed}
        return float(any(str(truth).strip().upper() in letters for truth in truths))
    wanted = [form for truth in truths for form in _forms(str(truth))]
    parsed = judged["parsed_pred"] if isinstance(judged["parsed_pred"], list) else [judged["parsed_pred"]]
    return float(
        any(form in answer if isinstance(form, str) and isinstance(answer, str) else form == answer
            for answer in parsed for form in wanted)
    )  # fmt: skip


def _forms(text: str) -> list[str | float]:
    """A number to two decimals, or lower-case text; a single letter has to stand beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def field(name: str) -> Callable[[Any], str]:
    """A field as text."""
    return lambda judged: str(judged[name])


VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv")
VIDEO_MMMU_TRACKS = ("Adaptation", "Comprehension", "Perception")
MLVU_DEV = ("anomaly_reco", "count", "ego", "needle", "order", "plotQA", "topic_reasoning")
MLVU_TEST = ("anomaly_reco", "count", "ego", "needleQA", "order", "plotQA", "sportsQA", "topic_reasoning",
             "tutorialQA")  # fmt: skip


def _videomme(name: str, title: str, beside: str | None = None) -> Benchmark:
    return Benchmark(
        name, title, "lmms-eval/Video-MME", "test", "videomme", (Task(name, expected=2700),),
        lambda document, task: [f"data/{document['videoID']}{suffix}" for suffix in VIDEO_SUFFIXES],
        "videomme_perception_score", lambda judged: float(judged["score"]), field("duration"),
        ("short", "medium", "long"), scale=1, beside=beside,
    )  # fmt: skip


def _egoschema(name: str, title: str, config: str, expected: int) -> Benchmark:
    return Benchmark(
        name, title, "lmms-eval/egoschema", "test", "egoschema", (Task(name, config, expected),),
        lambda document, task: [f"videos/{document['video_idx']}{suffix}" for suffix in (".mp4", ".MP4")],
        "score", same("pred", "ground_truth"),
    )  # fmt: skip


def _mlvu(
    name: str, title: str, repository: str, folder: str, kinds: tuple[str, ...], paper: float | None
) -> Benchmark:
    return Benchmark(
        name, title, repository, "test", folder, (Task(name),), lambda document, task: [document["video_name"]],
        "mlvu_percetion_score", same("pred_answer", "answer"), field("task_type"), kinds, "kinds", 1, paper,
    )  # fmt: skip


def _longvideobench(name: str, title: str, beside: str | None, paper: float | None) -> Benchmark:
    return Benchmark(
        name, title, "longvideobench/LongVideoBench", "validation", "datasets/longvideobench",
        (Task(name, expected=1337),), lambda document, task: [f"videos/{document['video_path']}"], "lvb_acc",
        same("answer", "parsed_pred"), field("duration_group"), ("15", "60", "600", "3600"), paper=paper, beside=beside,
    )  # fmt: skip


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        _videomme("videomme", "Video-MME"),
        _videomme("videomme_w_subtitle", "Video-MME with subtitles", "subtitle"),
        _egoschema("egoschema_subset", "EgoSchema, subset", "Subset", 500),
        _egoschema("egoschema", "EgoSchema", "GENERATION", 5031),
        _mlvu("mlvu_dev", "MLVU, dev", "sy1998/MLVU_dev", "mlvu", MLVU_DEV, None),
        _mlvu("mlvu_test", "MLVU, test", "sy1998/MLVU_Test", "mlvu_test", MLVU_TEST, 53.4),
        Benchmark(
            "lvbench", "LVBench", "lmms-eval/LVBench", "train", "lvbench", (Task("lvbench", expected=1549),),
            lambda document, task: [document["video_path"]], "lvbench_score", float, paper=44.7,
        ),
        Benchmark(
            "video_mmmu", "Video-MMMU", "lmms-eval/VideoMMMU", "test", "video_mmmu",
            tuple(Task(f"video_mmmu_{track.lower()}", track, 300) for track in VIDEO_MMMU_TRACKS),
            lambda document, task: [f"{discipline(document['id'])}/{document['id']}.mp4"],
            "mmmu_acc", video_mmmu_right, mean="tasks", paper=46.6, letters="ABCDEFGHIJ",
        ),
        _longvideobench("longvideobench_val_v", "LongVideoBench, val", None, 61.4),
        _longvideobench("longvideobench_val_i", "LongVideoBench, val, with subtitles", "subtitles", None),
        Benchmark(
            "mvbench", "MVBench", "OpenGVLab/MVBench", "train", "mvbench_video",
            tuple(Task(f"mvbench_{kind}", kind, 200) for kind in MVBENCH_FOLDERS),
            lambda document, task: [f"{MVBENCH_FOLDERS[task.removeprefix('mvbench_')]}/{document['video']}"],
            "mvbench_accuracy", lambda judged: float(judged["score"]), mean="tasks", scale=1, paper=59.4,
            unpacked="video",
        ),
        Benchmark(
            "shapes", "Shapes", "vidlada/shapes", "test", "vidlada/shapes", (Task("shapes"),),
            lambda document, task: [document["video"]], "shapes_score", lambda judged: float(judged["points"]),
            field("family"), letters="",
        ),
    )
}  # fmt: skip
PAPER_TASKS = ("videomme", "egoschema", "mlvu_dev", "mlvu_test", "lvbench", "video_mmmu", "longvideobench_val_v",
               "mvbench")  # fmt: skip


def video_of(task: str, document: Document) -> str | None:
    """Where a task of the benchmarks looks for a document's video, below the data root; None for other tasks."""
    for benchmark in BENCHMARKS.values():
        if any(each.name == task for each in benchmark.tasks):
            return f"{benchmark.folder}/{benchmark.videos(document, task)[0]}"
    return None


def select_benchmarks(names: str) -> list[Benchmark]:
    """Benchmarks of a comma-separated list; `paper` stands for the eight of the published evaluation."""
    listed = [name.strip() for name in names.split(",") if name.strip()]
    listed = list(dict.fromkeys(each for name in listed for each in (PAPER_TASKS if name == "paper" else (name,))))
    unknown = [name for name in listed if name not in BENCHMARKS]
    if unknown or not listed:
        raise InputError(
            f"unknown task {', '.join(unknown) or repr(names)}; known: {', '.join(BENCHMARKS)}, or paper for the "
            f"published eight; any other task of lmms-eval runs with: lmms-eval --model vidlada"
        )
    return [BENCHMARKS[name] for name in listed]
