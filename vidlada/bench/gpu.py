"""One command for the day a GPU is there: what was predicted without one, beside what it measures.

    python -m vidlada.bench.gpu --out DIR

Needs a Python with torch and transformers, and nothing else: weights are random and made on the device, frames are
synthetic. Every case is written to DIR at once, and one that is there already is kept, so a run that was cut off goes
on where it was. A stage that has used up its time leaves its other cases for the next run.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vidlada import __version__
from vidlada.bench.calibration import calibrate
from vidlada.bench.devices import GPUS
from vidlada.bench.gpu_session import Session
from vidlada.bench.gpu_stages import STAGES
from vidlada.bench.sizes import SIZES
from vidlada.errors import InputError, VidLaDAError
from vidlada.files import read_json, write_json, write_text
from vidlada.machine import machine
from vidlada.markdown import table

TINY = "tiny"


@dataclass
class Results:
    """What is known of a stage, kept in a file.

    Attributes:
        path: of the file.
        rows: figures: case, what, unit, predicted, measured.
        errors: case → why it gave no figures.
        left: cases that there was no time for.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """What an earlier run left.

        Raises:
            InputError: the file holds something else.
        """
        kept = read_json(path) if path.exists() else {"rows": [], "errors": {}, "left": []}
        try:
            return cls(path, kept["rows"], kept["errors"], kept["left"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} holds no results of a stage; delete it, or give an empty folder") from error

    @property
    def cases(self) -> set[str]:
        """Those that have figures."""
        return {row["case"] for row in self.rows}

    def save(self) -> None:
        """Write the file."""
        write_json(self.path, {"rows": self.rows, "errors": self.errors, "left": self.left})


def run_stage(name: str, session: Session, folder: Path, minutes: float | None = None) -> Results:
    """Run the cases of a stage that have no figures yet, those that failed before among them.

    Args:
        name: a key of `STAGES`.
        session: with the model.
        folder: of the results.
        minutes: that it may take; its own budget by default.
    """
    stage, results = STAGES[name], Results.read(folder / f"{name}.json")
    results.errors, results.left = {}, []
    ends = time.monotonic() + 60 * (stage.minutes if minutes is None else minutes)
    for case, figures in stage.cases(session):
        if case in results.cases:
            continue
        if time.monotonic() > ends:
            results.left.append(case)
            continue
        print(f"{name}: {case}", file=sys.stderr, flush=True)
        try:
            results.rows += [{"case": case, **asdict(figure)} for figure in figures()]
        except Exception as error:  # a case that cannot run must not cost the others
            results.errors[case] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        session.release()
        results.save()
    results.save()
    return results


def environment(session: Session) -> dict[str, Any]:
    """Name the machine and what runs on it."""
    found: dict[str, Any] = {
        "machine": machine(session.device), "vidlada": __version__, "torch": torch.__version__,
        "python": platform.python_version(), "size": session.size_name, "frames": session.frames,
        "visual_tokens": session.visual, "dtype": str(session.dtype).removeprefix("torch."),
        "predicted_for": session.known_gpu or "rates measured on this machine",
    }  # fmt: skip
    if session.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(session.device)
        found |= {"memory_gb": round(properties.total_memory / 1e9, 1), "cuda": torch.version.cuda,
                  "capability": f"{properties.major}.{properties.minor}"}  # fmt: skip
        with suppress(RuntimeError):
            found["cudnn"] = torch.backends.cudnn.version()
    return found


def report_text(facts: dict[str, Any], stages: dict[str, Results]) -> str:
    """Markdown of everything, predictions and measurements in columns of their own."""
    lines = ["# What was predicted, and what this machine measures", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    for name, results in stages.items():
        stage = STAGES[name]
        lines += ["", f"## {name}", "", stage.title, ""]
        if results.rows:
            cells = [
                [
                    row["case"],
                    row["what"],
                    *map(format_figure, (row["predicted"], row["measured"])),
                    row["unit"],
                ]
                for row in results.rows
            ]
            lines += table(["case", "figure", "predicted", "measured", "unit"], cells)
        lines += [f"- {case}: failed: {error}" for case, error in results.errors.items()]
        lines += [f"- no time was left for {case}: run the command again" for case in results.left]
    return "\n".join([*lines, ""])


def format_figure(value: Any) -> str:
    """A figure with four digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bench_gpu(
    out: Path, device: str = "cuda", size: str = "8b", frames: int | None = None, stages: Sequence[str] = (),
    minutes: float | None = None, vectors: Path | None = None,
) -> Path:  # fmt: skip
    """Run all stages, and write `report.md` and `report.json`.

    Args:
        out: folder of the results; those in it are kept.
        device: to be measured.
        size: a key of `vidlada.bench.sizes.SIZES`, or `tiny` for a try on a CPU.
        frames: of the video.
        stages: keys of `STAGES`; all by default.
        minutes: of each stage; its own budget by default.
        vectors: the folder `tests` of a checkout, for the recorded answers; the one beside the package by default.

    Returns:
        The report.

    Raises:
        InputError: an unknown stage, size or device, no frames, or a folder that cannot be used or has results of
            another machine.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise InputError(f"unknown stage {', '.join(unknown)}; known: {', '.join(STAGES)}")
    if frames is not None and frames < 1:
        raise InputError(f"a video has at least 1 frame, not {frames}")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; use cuda, cuda:1 or cpu") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} cannot be used here; try the command with --device cpu --size {TINY}")
    session = Session.of(device, size, frames, vectors or Path(__file__).parents[2] / "tests")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be used as a folder ({error.strerror})") from error
    facts = environment(session)
    report = out / "report.json"
    if report.exists():
        earlier = read_json(report)["facts"]
        other = [name for name in ("machine", "size", "frames", "torch") if earlier.get(name) != facts[name]]
        if other:
            raise InputError(f"{out} has results of another {', '.join(other)}; give an empty folder")
    session.device_rates = (
        GPUS[session.known_gpu] if session.known_gpu else calibrate(session.text, device, session.dtype)
    )
    done = {}
    for name in STAGES:
        path = out / f"{name}.json"
        if not stages or name in stages:
            done[name] = run_stage(name, session, out, minutes)
        elif path.exists():
            done[name] = Results.read(path)
        write_json(report, {"facts": facts, "stages": {name: vars(found) | {"path": found.path.name}
                                                      for name, found in done.items()}})  # fmt: skip
        write_text(out / "report.md", report_text(facts, done))
    return out / "report.md"


def arguments(given: Sequence[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m vidlada.bench.gpu", description=(__doc__ or "").partition("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; what is in it is kept")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--size", choices=(TINY, *SIZES), default="8b" if cuda else TINY, help="of the random model")
    parser.add_argument("--frames", type=int, help="of the video; the size's own by default")
    parser.add_argument("--stage", dest="stages", action="append", default=[], help=f"of {', '.join(STAGES)}; all")
    parser.add_argument("--minutes", type=float, help="for each stage; its own budget by default")
    yield from vars(parser.parse_args(given)).items()


if __name__ == "__main__":
    try:
        print(bench_gpu(**dict(arguments())).read_text())
    except VidLaDAError as error:
        raise SystemExit(f"Error: {error}") from None
    except json.JSONDecodeError as error:
        raise SystemExit(f"Error: a result cannot be read ({error}); delete it, or give an empty folder") from None
