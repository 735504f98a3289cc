"""Running lmms-eval, unmodified and in processes of its own, and what a run folder holds.

A run folder belongs to one model and its settings; the same command in it continues where it was interrupted.
"""

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from vidlada.checkpoint.load import ADAPTER_CONFIG, base_of
from vidlada.errors import InputError, VidLaDAError
from vidlada.evaluation.arguments import PACES, ModelArguments, generation_settings
from vidlada.evaluation.benchmarks import BENCHMARKS, LMMS_EVAL_VERSION, UNSENT, Benchmark
from vidlada.evaluation.data import Gap, question_files, repository_folder
from vidlada.evaluation.folder import (
    CACHE_FOLDER,
    LOG_FILE,
    ORIGINAL_FOLDER,
    RECORD_FOLDER,
    RUN_FILE,
    lock_run,
    read_run_file,
    results_files,
)
from vidlada.evaluation.presets import PresetName, generation_arguments, model_arguments
from vidlada.evaluation.submission import write_submission
from vidlada.files import read_json, write_json, write_text
from vidlada.generation import GenerationSettings
from vidlada.model.hub import SHIPPED, model_folder

TASKS_FOLDER = Path(__file__).parent / "tasks"
PACKAGES = ("vidlada", "lmms-eval", "torch", "transformers", "av", "datasets")
FINGERPRINT_BYTES = 2**20  # from both ends of a file
LOG_LINES = 15  # shown when lmms-eval fails


@dataclass(frozen=True)
class RunSettings:
    """What is evaluated, and how.

    Args:
        model: name or folder.
        preset: where the settings come from.
        model_changes: `ModelArguments` that differ from the preset.
        generation_changes: generation arguments that differ.
        batch_size: questions answered together.
        limit: samples of each task; all by default.
    """

    model: str
    preset: PresetName = "paper"
    model_changes: Mapping[str, Any] = field(default_factory=dict)
    generation_changes: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    limit: int | None = None

    def __post_init__(self) -> None:
        for place in self.folders:
            if "," in place or "=" in place:
                raise InputError(f"{place}: lmms-eval cannot be given a path with a comma or equals sign in it")

    @cached_property  # the hub is asked once
    def location(self) -> str:
        """Of the model, from any working directory."""
        return SHIPPED if self.model == SHIPPED else str(model_folder(self.model).absolute())

    @property
    def folders(self) -> list[str]:
        """Of the model and, if there is one, its adapter."""
        return [self.location, *([self.model_changes["adapter"]] if "adapter" in self.model_changes else [])]

    def model_arguments(self, benchmark: Benchmark) -> dict[str, Any]:
        """For one benchmark, validated."""
        arguments = {"pretrained": self.location, **model_arguments(self.preset, benchmark), **self.model_changes}
        ModelArguments.from_dict({**arguments, "batch_size": self.batch_size})
        return arguments

    def generation_arguments(self, benchmark: Benchmark) -> dict[str, Any]:
        """For one benchmark, validated."""
        arguments = generation_arguments(self.preset, benchmark)
        changed = {*self.generation_changes, *self.model_changes}
        replaced = {*(PACES if changed & {*PACES, "gen_length"} else ()),
                    *(("block_length",) if "gen_length" in changed else ())}  # fmt: skip
        arguments = {name: value for name, value in arguments.items() if name not in replaced}
        arguments |= self.generation_changes
        if arguments.get("temperature"):
            arguments.setdefault("do_sample", True)  # tasks say false
        decoding = ModelArguments.from_dict(self.model_arguments(benchmark)).decoding
        generation_settings(GenerationSettings().replace(**decoding), arguments, decoding)
        return arguments

    def to_dict(self) -> dict[str, Any]:
        """What has to agree between the parts of a run."""
        return {
            "model": self.model,
            "weights": weights_fingerprint(*map(model_folder, self.folders)),
            "preset": self.preset,
            "model_arguments": dict(self.model_changes),
            "generation_arguments": dict(self.generation_changes),
            "batch_size": self.batch_size,
            "limit": self.limit,
        }


def weights_fingerprint(*folders: Path) -> str:
    """Tells one model from another in the same place: lmms-eval's response cache knows only the place.

    Args:
        folders: of a checkpoint and its adapters; an adapter's base is added.
    """
    digest = hashlib.sha256()
    adapters = [folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()]
    if len(adapters) == len(folders):
        folders = (base_of(folders[0]), *folders)
    for folder in folders:
        for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / ADAPTER_CONFIG]):
            if not path.is_file():
                continue
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(file.read())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Launch:
    """Tasks that lmms-eval runs together because all their settings agree."""

    tasks: tuple[str, ...]
    model_arguments: dict[str, Any]
    generation_arguments: dict[str, Any]
    predict_only: bool


def plan_launches(benchmarks: Sequence[Benchmark], settings: RunSettings, skipped: Container[str] = ()) -> list[Launch]:
    """How often lmms-eval has to be started, and with what. Its own scoring of EgoSchema would send the answers.

    Args:
        benchmarks: which.
        settings: how.
        skipped: names of tasks to leave out.
    """
    grouped: dict[str, Launch] = {}
    for benchmark in benchmarks:
        left = [task.name for task in benchmark.tasks if task.name not in skipped]
        names = [benchmark.name] if len(left) == len(benchmark.tasks) else left
        if not names:
            continue
        predict_only = benchmark.name == UNSENT
        parts = (settings.model_arguments(benchmark), settings.generation_arguments(benchmark), predict_only)
        key = json.dumps(parts, sort_keys=True)
        tasks = grouped[key].tasks if key in grouped else ()
        grouped[key] = Launch((*tasks, *names), *parts)
    return list(grouped.values())


def join_arguments(arguments: Mapping[str, Any]) -> str:
    """Arguments as lmms-eval reads them; it splits at commas."""
    return ",".join(f"{name}={str(value).replace(',', ';')}" for name, value in arguments.items())


def command(launch: Launch, settings: RunSettings, output: Path, processes: int = 1) -> list[str]:
    """The command line of a launch."""
    start = [sys.executable, "-m", "lmms_eval"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes),
                 "-m", "lmms_eval"]  # fmt: skip
    generation = ["--gen_kwargs", join_arguments(launch.generation_arguments)] if launch.generation_arguments else []
    return [
        *start, "--model", "vidlada", "--model_args", join_arguments(launch.model_arguments), *generation,
        "--tasks", ",".join(launch.tasks), "--include_path", str(TASKS_FOLDER),
        "--batch_size", str(settings.batch_size), "--log_samples", "--output_path", str(output / ORIGINAL_FOLDER),
        "--use_cache", str(output / CACHE_FOLDER / "answers"),
        *(["--limit", str(settings.limit)] if settings.limit else []),
        *(["--predict_only"] if launch.predict_only else []),
    ]  # fmt: skip


def environment(home: Path, output: Path, device: str | None = None) -> dict[str, str]:
    """What lmms-eval finds its data by. It fetches nothing, and writes nothing into the data root."""
    on_cpu = {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    return {
        **os.environ,
        **on_cpu,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(home),
        "HF_DATASETS_CACHE": str(output / CACHE_FOLDER / "datasets"),
        # its cache holds answers for one commit of the checkout that it lies in: with .venv inside, that would be ours
        "GIT_DIR": os.devnull,
        "LMMS_EVAL_GIT_COMMIT": versions()["lmms-eval"],
        "PYTHONSAFEPATH": "1",  # folders of the data root are no modules
        "TOKENIZERS_PARALLELISM": "false",
        RECORD_FOLDER: str(output),
    }


def require_lmms_eval() -> None:
    """`InputError` where it is not installed, or its registry does not know us."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise InputError(
            f"lmms-eval is not installed; run: make eval-env (or: pip install 'vidlada[eval]', then "
            f"pip install --no-deps lmms-eval=={LMMS_EVAL_VERSION})"
        )


def versions() -> dict[str, str]:
    """Of what computes a score."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def start_run(
    output: Path, settings: RunSettings, benchmarks: Sequence[Benchmark], skipped: Mapping[str, Gap] | None = None
) -> None:
    """Make or reopen a run folder.

    Args:
        output: the folder.
        settings: how the benchmarks are run.
        benchmarks: which.
        skipped: what of their tasks is missing and left out.

    Raises:
        InputError: it holds something else, or a run with other settings.
    """
    path = output / RUN_FILE
    tasks = [benchmark.name for benchmark in benchmarks]
    if path.exists():
        before = read_run_file(output)
        if before["settings"] != settings.to_dict():
            changed = [name for name, value in settings.to_dict().items() if before["settings"].get(name) != value]
            raise InputError(f"{output} holds a run with another {', '.join(changed)}; choose another folder")
        tasks = list(dict.fromkeys([*before["tasks"], *tasks]))
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is in use and holds no run; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    arguments = {
        benchmark.name: {
            "model": settings.model_arguments(benchmark),
            "generation": settings.generation_arguments(benchmark),
        }
        for benchmark in benchmarks
    }
    gaps = {name: asdict(gap) for name, gap in (skipped or {}).items()}
    if path.exists():
        arguments = {**before["arguments"], **arguments}
        now = {task.name for benchmark in benchmarks for task in benchmark.tasks}
        gaps = {name: gap for name, gap in before["skipped"].items() if name not in now} | gaps
    values = {"settings": settings.to_dict(), "tasks": tasks, "arguments": arguments, "skipped": gaps}
    write_json(path, {**values, "versions": versions()})


def run(
    benchmarks: Sequence[Benchmark],
    settings: RunSettings,
    output: Path,
    root: Path,
    processes: int = 1,
    skipped: Mapping[str, Gap] | None = None,
) -> None:
    """Run lmms-eval on benchmarks.

    Args:
        benchmarks: which.
        settings: how.
        output: run folder, new or of the same settings.
        root: data root.
        processes: started by torchrun, each with a share of the samples.
        skipped: tasks with a gap that is left out of the scores; without its questions or all videos, a task is not
            run at all.

    Raises:
        InputError: something is missing.
        VidLaDAError: lmms-eval failed.
    """
    require_lmms_eval()
    output = output.absolute()
    absent = {name for name, gap in (skipped or {}).items() if gap.problem is not None}
    planned = plan_launches(benchmarks, settings, absent)
    if not planned:
        raise InputError("nothing is left to evaluate: no task has its questions and a video")
    start_run(output, settings, benchmarks, skipped)
    with lock_run(output) as lock, lmms_home(root, benchmarks) as home:
        questions = link_questions(output, root, benchmarks)
        for launch in planned:
            keep_interrupted(output / CACHE_FOLDER / "answers")
            before = results_files(output)
            variables = environment(home, output, launch.model_arguments.get("device"))
            execute(command(launch, settings, output, processes), questions, output, variables, lock)
            done = {task for file in results_files(output) - before for task in read_json(file)["results"]}
            groups = {benchmark.name: [task.name for task in benchmark.tasks] for benchmark in benchmarks}
            expected = {task for name in launch.tasks for task in groups.get(name, [name])}
            if names := expected - done:
                raise VidLaDAError(f"lmms-eval gave no results for {', '.join(sorted(names))}: {reason(output)}")
    if any(benchmark.name == UNSENT for benchmark in benchmarks) and UNSENT not in absent:
        write_submission(output, root)


def link_questions(output: Path, root: Path, benchmarks: Sequence[Benchmark]) -> Path:
    """A folder with nothing but links to the local questions, where lmms-eval finds them by their datasets' names.

    It takes a local folder of a dataset's name before the hub's. Run in the data root itself, it would take the folder
    of videos `egoschema` for the task of that name, and miss what lies in the hub's cache or has no README.
    """
    folder = output / CACHE_FOLDER / "questions"
    for repository in dict.fromkeys(benchmark.repository for benchmark in benchmarks):
        source, target = repository_folder(root, repository), folder / repository
        if target.is_symlink():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)
        if source is None:
            continue
        configs = {}
        parts = {(task.config, each.split) for each in BENCHMARKS.values() if each.repository == repository
                 for task in each.tasks}  # fmt: skip
        for config, split in sorted(parts, key=str):
            try:
                files = question_files(source, config, split)
            except InputError:  # those that are asked for have been checked
                continue
            place = target / (config or "default")
            place.mkdir(parents=True)
            for number, file in enumerate(files):
                (place / f"{split}-{number:05d}{file.suffix}").symlink_to(file.resolve())
            configs[place.name] = [{"split": split, "path": f"{place.name}/*"}]
        listed = [{"config_name": name, "data_files": files} for name, files in configs.items()]
        write_text(target / "README.md", f"---\n{yaml.safe_dump({'configs': listed})}---\n")
    return folder


@contextmanager
def lmms_home(root: Path, benchmarks: Sequence[Benchmark]) -> Iterator[Path]:
    """What HF_HOME has to be: the data root. lmms-eval replaces some folders that are links: for those, a folder of
    links to all that is there."""
    replaced = {each.folder for each in benchmarks if each.unpacked and (root / each.folder).is_symlink()}
    if not replaced:
        yield root
        return
    with TemporaryDirectory(prefix="vidlada-eval-") as name:
        home = Path(name)
        for path in root.iterdir():
            if path.name not in replaced:
                (home / path.name).symlink_to(path)
                continue
            (home / path.name).mkdir()
            for inside in path.iterdir():
                (home / path.name / inside.name).symlink_to(inside)
        yield home


def execute(arguments: Sequence[str], place: Path, output: Path, variables: dict[str, str], lock: int) -> None:
    """Run a command somewhere, its output in the log of a run; its progress also on a terminal. It keeps the lock of
    the run folder even if this process is killed."""
    with (output / LOG_FILE).open("a", encoding="utf-8") as log:
        shown = None if sys.stderr.isatty() else log
        finished = subprocess.run(
            arguments, cwd=place, env=variables, stdout=log, stderr=shown, check=False, pass_fds=[lock]
        )
    if finished.returncode:
        raise VidLaDAError(f"lmms-eval ended with code {finished.returncode}: {reason(output)}")


def reason(output: Path) -> str:
    """Why lmms-eval failed: the last error in its log."""
    lines = (output / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line or "does not exist" in line]
    cause = errors[-1].split(" - ")[-1].strip() if errors else " ".join(lines[-LOG_LINES:])
    return f"{cause} (all of it: {output / LOG_FILE})"


def keep_interrupted(cache: Path) -> None:
    """Add the answers of interrupted runs to the response cache; lmms-eval itself adds those of finished runs only."""
    shards = [str(path) for path in sorted((cache / "runs").glob("*/rank_*.db"))]
    if shards:
        from lmms_eval.caching.response_cache import ResponseCache

        ResponseCache.merge_shards(shards, str(cache / "cache.db"))
        shutil.rmtree(cache / "runs")
