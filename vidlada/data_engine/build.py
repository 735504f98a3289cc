"""Questions about long videos, made by language models and kept only if the video is needed to answer them.

For every video (VidLaDA's data engine, arXiv 2601.17868): cut it into equal strata of time; let a writer model ask
about the frames of each; drop what a model answers without the frames (the text gives it away); keep what enough
models, each shown the frames, answer as the writer did. Every prompt, reply and vote stays in an audit file, from
which the output is made: an interrupted build continues where it was.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Annotated, Any, TextIO

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.data_engine.audit import is_answered, read_audit, write_entries
from vidlada.data_engine.endpoints import Endpoint, RefusedError, Segment, complete
from vidlada.data_engine.questions import Candidate, candidates_in, letter_in, with_choices
from vidlada.errors import InputError, VidLaDAError
from vidlada.files import lock
from vidlada.settings import check_unicode
from vidlada.training.data.mixture import VIDEO_SUFFIXES
from vidlada.training.data.samples import STRICT
from vidlada.training.settings import build, expand_variables, read_yaml
from vidlada.video import Frames, Sampling, sample_frames

TRANSPORT = ("url", "key_variable", "timeout", "tries")  # how an endpoint is called does not change what it says
UNRELATED = ("videos", "output", "refusals", "parallel")  # to what a question is like
WRITE = (
    "These {frames} frames show seconds {start:.0f} to {end:.0f} of a video, in order. Write {questions} "
    "multiple-choice questions about what happens in them, which nobody can answer without seeing them, and which do "
    'not name the frames. Reply with JSON alone: [{{"question": "…", "answer": "…", "wrong": ["…", "…", "…"]}}]'
)
WITHOUT = "You do not see the video. Guess. "


@dataclass(frozen=True, config=STRICT)
class BuildConfig:
    """A build.

    Args:
        videos: a folder; all videos below it are used.
        output: jsonl of LLaVA entries; the audit file is beside it.
        writer: asks the questions.
        blind: tries to answer without frames.
        voters: answer with frames.
        agreement: so many voters must answer as the writer did.
        segments: strata of time a video is cut into.
        frames: shown of each.
        questions: asked for about each.
        size: pixels along a side of a frame, an even number.
        blind_tries: a question is dropped if any of so many blind answers, with the choices in another order each,
            is right.
        seed: of the order of choices.
        refusals: so many segments in a row of which an endpoint refuses a request end the build.
        parallel: segments worked on at once, each with one request at a time; what is written does not depend on it.
            A few keep a model of one's own busy and stay below the limits of those that are paid for.
    """

    videos: Path
    output: Path
    writer: Endpoint
    blind: Endpoint
    voters: tuple[Endpoint, ...]
    agreement: PositiveInt = 2
    segments: PositiveInt = 4
    frames: PositiveInt = 8
    questions: PositiveInt = 3
    size: Annotated[int, Field(gt=0, multiple_of=2)] = 384
    blind_tries: PositiveInt = 1
    seed: NonNegativeInt = 0
    refusals: PositiveInt = 20
    parallel: Annotated[int, Field(gt=0, le=256)] = 4

    def __post_init__(self) -> None:
        if self.agreement > len(self.voters):
            raise InputError(f"agreement {self.agreement} needs as many voters; there are {len(self.voters)}")
        if self.output.suffix != ".jsonl" or self.output.is_dir():
            raise InputError(f"output: {self.output} is no name of a .jsonl file")

    @property
    def settings(self) -> dict[str, Any]:
        """All that bears on what is made, as plain values."""
        values = asdict(self)
        for endpoint in (values["writer"], values["blind"], *values["voters"]):
            for name in TRANSPORT:
                del endpoint[name]
        values["voters"] = list(values["voters"])
        return {name: value for name, value in values.items() if name not in UNRELATED}

    @property
    def audit(self) -> Path:
        """File of every prompt, reply and vote."""
        return self.output.with_suffix(".audit.jsonl")


def load_build(path: Path) -> BuildConfig:
    """Read a build from YAML; `InputError` names what is wrong in it."""
    return build(BuildConfig, expand_variables(read_yaml(path), str(path)), str(path))


def judge(candidate: Candidate, config: BuildConfig, segment: Segment, seed: Sequence[int]) -> None:
    """Ask the blind model and the voters; the verdict and every call are kept in the candidate.

    Raises:
        RefusedError: one of them will not answer.
    """

    def ask(role: str, endpoint: Endpoint, number: int, shown: Segment | None) -> bool:
        prompt, right = with_choices(candidate, endpoint, [*seed, number])
        prompt = WITHOUT * (role == "blind") + prompt
        call = {"role": role, "model": endpoint.model, "prompt": prompt, "reply": "", "right": right, "agrees": False}
        candidate.calls.append(call)  # before it is answered: a refused prompt is kept as well
        reply = complete(endpoint, prompt, shown)
        agrees = letter_in(reply) == right
        call.update(reply=reply, agrees=agrees)
        return agrees

    if any(ask("blind", config.blind, number, None) for number in range(config.blind_tries)):
        candidate.verdict = "answered without the video"
        return
    votes = sum(ask("voter", voter, number, segment) for number, voter in enumerate(config.voters))
    candidate.verdict = "kept" if votes >= config.agreement else f"{votes} of {len(config.voters)} voters agree"


def build_dataset(config: BuildConfig, report: Callable[[str], Any] = print) -> Path:
    """Run a build, or continue one; returns the output file.

    Args:
        config: what to do.
        report: called with a line for every segment.

    Raises:
        InputError: there are no videos, or one has a name that is not in UTF-8; or the output exists and is not from
            this build, or another is at work on it.
        VidLaDAError: an endpoint fails or refuses everything, or nothing can be written; what is done so far is kept.
    """
    if not config.videos.is_dir():
        raise InputError(f"videos: {config.videos} is not a folder")
    videos = sorted(path for path in config.videos.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise InputError(f"videos: no video below {config.videos}")
    for path in videos:  # data files name it, which are text
        check_unicode(f"videos: the name {path.name!a}", path.relative_to(config.videos).as_posix())
    if config.output.exists() and not config.audit.exists():
        raise InputError(f"{config.output} exists without its audit file; choose another output")
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.audit.open("a", encoding="utf-8") as audit:
            write_entries(config.output, all_records(config, videos, audit, report))
    except OSError as error:
        raise VidLaDAError(f"{error.filename or config.audit}: cannot be written: {error.strerror}") from error
    return config.output


def all_records(
    config: BuildConfig, videos: Sequence[Path], audit: TextIO, report: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """All audit records: those of earlier runs, and those of what was left to do, which are added to the file."""
    lock(audit, f"{config.audit}: another build is at work on it")
    records = read_audit(config.audit)
    settings = config.settings
    for record in records:
        changed = [name for name, value in settings.items() if record["settings"].get(name) != value]
        if changed:
            raise InputError(
                f"{config.audit} was made with other settings: {', '.join(changed)}; set them back, or choose another "
                "output"
            )
    done = {(record["video"], record["segment"]) for record in records}
    pending: list[dict[str, Any]] = []  # of which nothing is known yet: an endpoint may refuse all there is

    def keep() -> None:
        for record in pending:
            audit.write(json.dumps(record) + "\n")
            audit.flush()
            records.append(record)
            verdicts = [candidate["verdict"] for candidate in record["candidates"]]
            report(f"{record['video']} segment {record['segment'] + 1}/{config.segments}: "
                   f"{verdicts.count('kept')} kept of {len(verdicts)}"
                   f"{' – ' + record['problem'] if record['problem'] else ''}")  # fmt: skip
        pending.clear()

    # concurrent.futures would wait for its threads at exit: an error or Ctrl-C would last as long as a request
    with ThreadPool(config.parallel) as pool:
        for record in new_records(config, videos, done, pool):
            pending.append(record)
            refused = [one for one in pending if one["refused"]]
            if len(refused) >= config.refusals:
                raise refusal_error(refused)
            if not refused or is_answered(record):
                keep()
    if pending and not any(is_answered(record) for record in records):
        raise refusal_error([record for record in pending if record["refused"]])
    keep()
    return records


def refusal_error(records: Sequence[dict[str, Any]]) -> VidLaDAError:
    """What ends a build whose requests are refused, not one, but all."""
    return VidLaDAError(
        f"{records[-1]['problem']}; {len(records)} segments in a row were refused, and will be asked again: mend the "
        "cause and run again, or raise refusals"
    )


def new_records(
    config: BuildConfig, videos: Sequence[Path], done: set[tuple[str, int]], pool: ThreadPool
) -> Iterator[dict[str, Any]]:
    """Audit records of all segments that are not done, in order; an error of any of them is raised at once."""
    waiting: deque[AsyncResult[dict[str, Any]]] = deque()
    errors: list[BaseException] = []

    def first() -> dict[str, Any]:
        while not waiting[0].ready():
            if errors:
                raise errors[0]
            waiting[0].wait(0.1)  # how late an error of another is seen
        return waiting.popleft().get()

    most = 2 * config.parallel - 1  # so that one slow segment does not leave the others idle; with 1, one by one
    for number, path in enumerate(videos):
        name = path.relative_to(config.videos).as_posix()
        left = [segment for segment in range(config.segments) if (name, segment) not in done]
        if not left:
            continue
        frames = pool.apply_async(frames_of, (config, path))  # starts before the segments that wait for it
        for segment in left:
            work = (config, name, number, segment, frames)
            waiting.append(pool.apply_async(segment_record, work, error_callback=errors.append))
            if len(waiting) == most:
                yield first()
    while waiting:
        yield first()


def frames_of(config: BuildConfig, path: Path) -> Frames | str:
    """What is shown of a video, or why it cannot be read."""
    sampling = Sampling(max_frames=config.segments * config.frames, force_sample=True)
    try:
        return sample_frames(path, sampling, size=config.size)
    except InputError as error:
        return str(error)


def segment_record(
    config: BuildConfig, name: str, number: int, segment: int, found: "AsyncResult[Frames | str]"
) -> dict[str, Any]:
    """Audit record of a segment of the video of that name and number."""
    record: dict[str, Any] = {
        "video": name, "segment": segment, "seconds": [0.0, 0.0], "prompt": "", "reply": "", "candidates": [],
        "refused": False, "problem": "", "settings": config.settings,
    }  # fmt: skip
    frames = found.get()
    if isinstance(frames, str):
        return {**record, "problem": frames}
    start, end = (frames.info.duration * edge / config.segments for edge in (segment, segment + 1))
    images = frames.images[segment * config.frames : (segment + 1) * config.frames]
    shown = Segment(images, (start, end))
    prompt = WRITE.format(frames=len(images), start=start, end=end, questions=config.questions)
    record.update(seconds=[start, end], prompt=prompt)
    try:
        reply = complete(config.writer, prompt, shown)
    except RefusedError as error:
        return {**record, "refused": True, "problem": str(error)}
    candidates = candidates_in(reply)[: config.questions]
    refusals = []
    for place, candidate in enumerate(candidates):
        try:
            judge(candidate, config, shown, [config.seed, number, segment, place])
        except RefusedError as error:
            candidate.verdict = str(error)
            refusals.append(str(error))
    unusable = "" if candidates else "no usable question in the writer's reply"
    return {
        **record,
        "reply": reply,
        "candidates": [asdict(candidate) for candidate in candidates],
        "refused": bool(refusals),
        "problem": refusals[0] if refusals else unusable,
    }
