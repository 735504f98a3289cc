"""Questions about long videos, made by language models and kept only if the video is needed to answer them.

For every video (VidLaDA's data engine, arXiv 2601.17868): cut it into equal strata of time; let a writer model ask
about the frames of each; drop what a model answers without the frames (the text gives it away); keep what enough
models, each shown the frames, answer as the writer did. Every prompt, reply and vote stays in an audit file, from
which the output is made: an interrupted build continues where it was.
"""

import base64
import fcntl
import io
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, field
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from functools import cached_property
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, TextIO
from urllib.parse import urlsplit

import av
import numpy as np
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError, VidLaDAError
from vidlada.training.mixture import VIDEO_SUFFIXES
from vidlada.training.samples import STRICT
from vidlada.training.settings import build, expanded, read_yaml
from vidlada.video import Frames, Sampling, sample_frames

LETTERS = "ABCDEFGH"
MOST_REPLY_BYTES = 2**24
# How a reply chooses, the surest first: the letter alone or before its choice, after the word for it, or anywhere,
# where an article is none.
CHOSEN = (
    re.compile(rf"\W*([{LETTERS}])(?=[.:,)\]*]|\W*$)", re.IGNORECASE),
    re.compile(rf".*\b(?:answer|choice|option)\b\W*(?:is\b)?\W*([{LETTERS}])\b", re.IGNORECASE | re.DOTALL),
    re.compile(rf".*?\b(?!A [a-z])([{LETTERS}])\b", re.DOTALL),
)
END_OF_THOUGHT = "</think>"  # before it, reasoning models say what is not their reply
# Statuses that are not about the request: the key, the credit, the address, the load. Another would fare no better.
NOT_THE_REQUEST = (401, 402, 403, 404, 405, 407, 408, 409, 425, 429)
REACHED_BY = ("url", "key_variable", "timeout", "tries")  # how an endpoint is called does not change what it says
NOT_MADE_BY = ("videos", "output", "refusals", "parallel")
WRITE = (
    "These {frames} frames show seconds {start:.0f} to {end:.0f} of a video, in order. Write {questions} "
    "multiple-choice questions about what happens in them, which nobody can answer without seeing them, and which do "
    'not name the frames. Reply with JSON alone: [{{"question": "…", "answer": "…", "wrong": ["…", "…", "…"]}}]'
)
ANSWER = "{question}\n{choices}\nAnswer with the letter of the right choice alone."
CHOICE = "{letter}. {choice}"
WITHOUT = "You do not see the video. Guess. "


@dataclass(frozen=True, config=STRICT)
class Endpoint:
    """A model behind an OpenAI-compatible interface.

    Args:
        url: up to and without `/chat/completions`, e.g. `http://localhost:8000/v1`.
        model: its name there.
        key_variable: environment variable that holds its API key; sent only if set.
        timeout: seconds for a whole reply.
        tries: after errors of the network or the server.
        shown: `frames` as OpenAI's `image_url` parts, or as one `video_url` part (as vLLM and `vidlada serve` take it),
            for models that were trained on videos.
        prompt: of a question to be answered, with {question} and {choices}.
        choice, between: how a choice is written, with {letter} and {choice}, and what stands between two. Small models
            know one wording alone.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: PositiveFloat = 120.0
    tries: PositiveInt = 3
    shown: Literal["frames", "video"] = "frames"
    prompt: str = ANSWER
    choice: str = CHOICE
    between: str = "\n"

    def __post_init__(self) -> None:
        try:
            address = urlsplit(self.url)
            reachable = address.scheme in ("http", "https") and address.hostname and address.port != 0
        except ValueError:  # no port that can be
            reachable = False
        if not reachable:
            raise InputError(f"url: {self.url!r} is no address such as http://localhost:8000/v1")
        for name, template, places in (
            ("prompt", self.prompt, {"question", "choices"}), ("choice", self.choice, {"letter", "choice"}),
        ):  # fmt: skip
            try:
                found = {place for _, place, _, _ in Formatter().parse(template) if place is not None}
            except ValueError as error:
                raise InputError(f"{name}: {template!r}: {error}") from error
            if found != places:
                raise InputError(f"{name}: {template!r} must hold {' and '.join(f'{{{p}}}' for p in sorted(places))}")


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
            for name in REACHED_BY:
                del endpoint[name]
        values["voters"] = list(values["voters"])
        return {name: value for name, value in values.items() if name not in NOT_MADE_BY}

    @property
    def audit(self) -> Path:
        """File of every prompt, reply and vote."""
        return self.output.with_suffix(".audit.jsonl")


@dataclass(config=STRICT)
class Candidate:
    """A question on its way.

    Attributes:
        question, answer, wrong: as written.
        asked: every call: role, model, prompt, reply, and whether it was right.
        verdict: `kept`, or why not.
    """

    question: str
    answer: str
    wrong: list[str]
    asked: list[dict[str, Any]] = field(default_factory=list)
    verdict: str = ""


class RefusedError(VidLaDAError):
    """An endpoint will not answer this one request, as for its content or its size."""


def load_build(path: Path) -> BuildConfig:
    """Read a build from YAML; `InputError` names what is wrong in it."""
    return build(BuildConfig, expanded(read_yaml(path), str(path)), str(path))


@plain_dataclass(frozen=True)
class Segment:
    """What is shown of a stretch of video.

    Attributes:
        frames: (frames, height, width, 3).
        seconds: where it starts and ends.
    """

    frames: np.ndarray
    seconds: tuple[float, float]

    def parts(self, shown: Literal["frames", "video"]) -> list[dict[str, Any]]:
        """As parts of a message."""
        if shown == "frames":
            return [{"type": "image_url", "image_url": {"url": url}} for url in self._pictures]
        return [{"type": "video_url", "video_url": {"url": self._video}}]

    @cached_property
    def _pictures(self) -> list[str]:
        return [data_url("image/jpeg", jpeg(frame)) for frame in self.frames]

    @cached_property
    def _video(self) -> str:
        rate = Fraction(len(self.frames) / max(self.seconds[1] - self.seconds[0], 0.1)).limit_denominator(1000)
        return data_url("video/mp4", mp4(self.frames, rate))


def complete(endpoint: Endpoint, prompt: str, segment: Segment | None = None) -> str:
    """A model's reply.

    Args:
        endpoint: which.
        prompt: text.
        segment: shown before the text.

    Raises:
        RefusedError: it will not answer this request; the message is what it says and not where it is, which may hold
            a password.
        VidLaDAError: it does not answer.
    """
    try:
        import httpx2
    except ImportError as error:
        raise InputError("vidlada data build needs httpx2: pip install vidlada[train]") from error
    content: Any = prompt
    if segment is not None:
        content = [*segment.parts(endpoint.shown), {"type": "text", "text": prompt}]
    body = {"model": endpoint.model, "messages": [{"role": "user", "content": content}], "temperature": 0}
    key = os.environ.get(endpoint.key_variable)
    if key and not (key.isascii() and key.isprintable()):
        raise InputError(f"{endpoint.key_variable} holds a character that no API key may have, such as a line's end")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    where = f"{endpoint.url.rstrip('/')}/chat/completions"
    problem = ""
    for attempt in range(endpoint.tries):
        if attempt:
            time.sleep(2**attempt / 2)
        try:
            end = time.monotonic() + endpoint.timeout
            received = bytearray()
            with httpx2.stream("POST", where, json=body, headers=headers, timeout=endpoint.timeout) as reply:
                for piece in reply.iter_bytes():
                    received += piece
                    if time.monotonic() > end or len(received) > MOST_REPLY_BYTES:
                        limits = f"{endpoint.timeout:g} seconds and {MOST_REPLY_BYTES >> 20} MB"
                        raise httpx2.ReadTimeout(f"no whole reply in {limits}")
            if reply.status_code < 300:
                return content_of(json.loads(received))
            problem = f"status {reply.status_code}: {' '.join(received[:500].decode(errors='replace').split())}"
            if 400 <= reply.status_code < 500 and reply.status_code not in NOT_THE_REQUEST:
                raise RefusedError(f"{endpoint.model} refuses: {problem}")
            if reply.status_code not in (408, 409, 425, 429) and reply.status_code < 500:
                break
        except httpx2.HTTPError as error:
            problem = f"{type(error).__name__}: {error}"
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            problem = "its reply is not a chat completion"
    raise VidLaDAError(f"{where} ({endpoint.model}): {problem}; run again to continue")


def content_of(completion: Any) -> str:
    """What a chat completion says; a model that says nothing has no content."""
    content = completion["choices"][0]["message"]["content"]
    if not isinstance(content, str | None):
        raise TypeError("content is a text")
    return content or ""


def candidates_in(reply: str) -> list[Candidate]:
    """The questions in a writer's reply; what is not as asked for is left out."""
    found = re.search(r"\[\s*\{", reply.rpartition(END_OF_THOUGHT)[2])
    try:
        values = json.JSONDecoder().raw_decode(found.string, found.start())[0] if found else []
    except (ValueError, RecursionError):
        values = []
    kept = []
    for value in values:
        if not isinstance(value, dict):
            continue
        question, answer, wrong = (value.get(name) for name in ("question", "answer", "wrong"))
        texts = [question, answer, *(wrong if isinstance(wrong, list) else [None])]
        usable = all(isinstance(text, str) and text.strip() and is_unicode(text) for text in texts)
        if usable and 2 <= len(texts) - 1 <= len(LETTERS) and len(set(texts[1:])) == len(texts) - 1:
            first, second, *others = (str(text).strip() for text in texts)
            kept.append(Candidate(first, second, others))
    return kept


def with_choices(candidate: Candidate, endpoint: Endpoint, seed: Sequence[int]) -> tuple[str, str]:
    """The question with its choices in a random order, worded for an endpoint, and the letter of the right one."""
    choices = [candidate.answer, *candidate.wrong]
    order = np.random.default_rng(list(seed)).permutation(len(choices))
    listed = endpoint.between.join(
        endpoint.choice.format(letter=letter, choice=choices[place])
        for letter, place in zip(LETTERS, order, strict=False)
    )
    return endpoint.prompt.format(question=candidate.question, choices=listed), LETTERS[order.tolist().index(0)]


def letter_in(reply: str) -> str:
    """The letter a reply chooses; empty if it chooses none."""
    said = reply.rpartition(END_OF_THOUGHT)[2]
    found = next(filter(None, (pattern.match(said) for pattern in CHOSEN)), None)
    return found[1].upper() if found else ""


def is_unicode(text: str) -> bool:
    """Whether a text can be sent and written; JSON can hold halves of characters, which cannot."""
    return text.encode("utf-8", "ignore").decode() == text


def judge(candidate: Candidate, config: BuildConfig, segment: Segment, seed: Sequence[int]) -> None:
    """Ask the blind model and the voters; the verdict and every call are kept in the candidate.

    Raises:
        RefusedError: one of them will not answer.
    """

    def ask(role: str, endpoint: Endpoint, number: int, shown: Segment | None) -> bool:
        prompt, right = with_choices(candidate, endpoint, [*seed, number])
        prompt = WITHOUT * (role == "blind") + prompt
        call = {"role": role, "model": endpoint.model, "prompt": prompt, "reply": "", "right": right, "agrees": False}
        candidate.asked.append(call)  # before it is answered: a refused prompt is kept as well
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
        InputError: there are no videos, or the output exists and is not from this build, or another is at work on it.
        VidLaDAError: an endpoint fails or refuses everything, or nothing can be written; what is done so far is kept.
    """
    if not config.videos.is_dir():
        raise InputError(f"videos: {config.videos} is not a folder")
    videos = sorted(path for path in config.videos.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise InputError(f"videos: no video below {config.videos}")
    if config.output.exists() and not config.audit.exists():
        raise InputError(f"{config.output} exists without its audit file; choose another output")
    try:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with config.audit.open("a", encoding="utf-8") as audit:
            write_entries(config.output, audited(config, videos, audit, report))
    except OSError as error:
        raise VidLaDAError(f"{error.filename or config.audit}: cannot be written: {error.strerror}") from error
    return config.output


def audited(
    config: BuildConfig, videos: Sequence[Path], audit: TextIO, report: Callable[[str], Any]
) -> list[dict[str, Any]]:
    """All audit records: those of earlier runs, and those of what was left to do, which are added to the file."""
    try:
        fcntl.flock(audit, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"{config.audit}: another build is at work on it") from error
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
    held: list[dict[str, Any]] = []  # of which nothing is known yet: an endpoint may refuse all there is

    def keep() -> None:
        for record in held:
            audit.write(json.dumps(record) + "\n")
            audit.flush()
            records.append(record)
            verdicts = [candidate["verdict"] for candidate in record["candidates"]]
            report(f"{record['video']} segment {record['segment'] + 1}/{config.segments}: "
                   f"{verdicts.count('kept')} kept of {len(verdicts)}"
                   f"{' – ' + record['problem'] if record['problem'] else ''}")  # fmt: skip
        held.clear()

    # concurrent.futures would wait for its threads at exit: an error or Ctrl-C would last as long as a request
    with ThreadPool(config.parallel) as pool:
        for record in made(config, videos, done, pool):
            held.append(record)
            refused = [one for one in held if one["refused"]]
            if len(refused) >= config.refusals:
                raise all_refused(refused)
            if not refused or answered(record):
                keep()
    if held and not any(answered(record) for record in records):
        raise all_refused([record for record in held if record["refused"]])
    keep()
    return records


def answered(record: dict[str, Any]) -> bool:
    """Whether the endpoints were asked about a segment and refused nothing."""
    return bool(record["prompt"]) and not record.get("refused")


def all_refused(records: Sequence[dict[str, Any]]) -> VidLaDAError:
    """What ends a build whose requests are refused, not one, but all."""
    return VidLaDAError(
        f"{records[-1]['problem']}; {len(records)} segments in a row were refused, and will be asked again: mend the "
        "cause and run again, or raise refusals"
    )


def made(
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
        "candidates": [vars_of(candidate) for candidate in candidates],
        "refused": bool(refusals),
        "problem": refusals[0] if refusals else unusable,
    }


def vars_of(candidate: Candidate) -> dict[str, Any]:
    """Plain values, for JSON."""
    return {name: getattr(candidate, name) for name in ("question", "answer", "wrong", "asked", "verdict")}


def data_url(kind: str, content: bytes) -> str:
    """A file's content as a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def jpeg(image: np.ndarray) -> bytes:
    """A frame, (height, width, 3), as a file."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "jpeg", quality=90)
    return content.getvalue()


def mp4(frames: np.ndarray, rate: Fraction) -> bytes:
    """Frames, (frames, height, width, 3), as an H.264 file of so many a second."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
