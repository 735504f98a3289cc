"""Many questions about many videos from a file: one line out for every line in, in the same order.

The answers go through the server's engine and worker processes, so videos are decoded beside the model's work and one
bad file costs one line. What is in the output is never done again: a run that was ended goes on where it stopped.
"""

import asyncio
import json
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from vidlada.api import VidLaDA, split_options
from vidlada.errors import InputError, VidLaDAError
from vidlada.fetch import is_url
from vidlada.files import lock
from vidlada.media import media_list
from vidlada.serve.limits import Limits
from vidlada.serve.schema import ChatRequest
from vidlada.serve.service import Service
from vidlada.settings import half_character, texts_of

ECHOED = ("line", "id", "video", "question")
MEDIA = ("image", "video")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
UNBOUNDED = 2**40  # whoever runs a batch vouches for its files; only time and memory of decoding stay bounded


@dataclass(frozen=True)
class Line:
    """A line of the questions.

    Attributes:
        number: counted from 1.
        content: what it says; empty if it cannot be used.
        error: why it cannot be used.
    """

    number: int
    content: dict[str, Any]
    error: str | None = None

    def echo(self) -> dict[str, Any]:
        """What the output repeats of a line."""
        return {"line": self.number, **{name: repeatable(self.content.get(name)) for name in ECHOED[1:]}}


def repeatable(value: Any) -> Any:
    """A value as it can be written: halves of characters and bytes in no encoding replaced, NaN and infinities null."""
    text = LONE_SURROGATE.sub("\ufffd", json.dumps(value, ensure_ascii=False))
    return json.loads(text, parse_constant=lambda _: None)


def read_line(number: int, raw: bytes) -> Line:
    """A line as JSON. Whatever its texts hold, what it says is kept, for the output to repeat."""
    try:
        content = json.loads(raw.decode("utf-8-sig", "surrogateescape"))
        repeatable(content)
    except (ValueError, RecursionError) as error:
        return Line(number, {}, f"not valid JSON: {LONE_SURROGATE.sub(chr(0xFFFD), str(error))}")
    if not isinstance(content, dict):
        return Line(number, {}, "not a JSON object")
    for name, text in texts_of(content, ""):
        if problem := half_character(text):
            return Line(number, content, f"{name} has {problem}")
    if content.get("id") != repeatable(content.get("id")):
        return Line(number, content, "'id' holds NaN or an infinity, which JSON does not know")
    if not isinstance(content.get("question"), str):
        return Line(number, content, "'question' must be a text")
    for kind in MEDIA:
        if not all(isinstance(source, str) for source in media_list(content.get(kind))):
            return Line(number, content, f"{kind!r} must be a path or an address, or a list of such")
    return Line(number, content)


def request_of(line: Line, folder: Path, defaults: dict[str, Any]) -> ChatRequest:
    """A line as a request.

    Args:
        line: of the questions.
        folder: that relative paths of videos start from.
        defaults: settings that the line may change.
    """
    settings = {**defaults, **{n: value for n, value in line.content.items() if n not in (*ECHOED, *MEDIA)}}
    system = settings.pop("system", None)
    parts: list[dict[str, Any]] = [
        {
            "type": f"{kind}_url",
            f"{kind}_url": {"url": source if is_url(source) else Path(folder, source).absolute().as_uri()},
        }
        for kind in MEDIA
        for source in media_list(line.content.get(kind) or None)
    ]
    parts.append({"type": "text", "text": line.content["question"]})
    messages = [{"role": "user", "content": parts}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return ChatRequest.model_validate({"model": "", "messages": messages, **settings})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InputError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


class Answerer:
    """A model that answers lines, many at a time.

    Args:
        vidlada: the model.
        folder: that relative paths of videos start from.
        defaults: settings that lines may change.
        concurrency: answers denoised together.

    Raises:
        InputError: the settings do not go together.
    """

    def __init__(self, vidlada: VidLaDA, folder: Path, defaults: dict[str, Any], concurrency: int):
        *_, generation = split_options(dict(defaults))
        vidlada.settings(**generation)
        limits = Limits(
            max_running=concurrency, max_tokens=UNBOUNDED, max_thought=UNBOUNDED, max_media=UNBOUNDED,
            max_frames=UNBOUNDED, max_duration=float(UNBOUNDED), max_pixels=UNBOUNDED, max_upload_mb=UNBOUNDED,
            decode_seconds=3600.0,
        )  # fmt: skip
        self.folder, self.defaults = folder, defaults
        temporary = Path(tempfile.gettempdir())  # for what is fetched
        self.service = Service(vidlada, limits, temporary, allowed=Path("/"), private_urls=True)

    async def answer(self, line: Line) -> dict[str, Any]:
        """The output line of a line."""
        if line.error is not None:
            return {**line.echo(), "error": line.error}
        try:
            (submitted,) = await self.service.submit(request_of(line, self.folder, self.defaults))
            async for update in submitted.handle.updates():
                last = update
        except VidLaDAError as error:
            return {**line.echo(), "error": str(error)}
        statistics = last.state.statistics.with_seconds({**submitted.seconds, **last.seconds})
        return {
            **line.echo(),
            "answer": last.stable.text + submitted.handle.job.settings.suffix,
            **({"reasoning": last.stable.reasoning} if last.stable.reasoning else {}),
            "finish_reason": last.stable.finish_reason,
            "prompt_tokens": submitted.prompt_tokens(statistics),
            "completion_tokens": last.stable.tokens,
            "statistics": statistics.to_dict(),
        }


async def answer_all(
    answerer: Answerer, lines: Iterable[Line], ahead: int, write: Callable[[dict[str, Any]], None]
) -> None:
    """Answer lines, a few at a time, and write the answers in order.

    Args:
        answerer: of lines; closed in the end.
        lines: to answer.
        ahead: lines begun before the first of them is written.
        write: takes the output lines.
    """
    pending: deque[asyncio.Task[dict[str, Any]]] = deque()
    try:
        for line in lines:
            pending.append(asyncio.create_task(answerer.answer(line)))
            if len(pending) >= ahead:
                write(await pending.popleft())
        while pending:
            write(await pending.popleft())
    finally:
        for task in pending:
            task.cancel()
        await answerer.service.close()


class Output:
    """The file of answers.

    Args:
        file: open for reading and appending.
        path: its name.

    Attributes:
        written: lines in the file, those of earlier runs included.
        failed: how many of them are errors.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.written = self.failed = 0

    def resume(self, questions: Iterator[Line]) -> None:
        """Skip the questions that are answered; cut off a line that was being written when the last run ended.

        Raises:
            InputError: the file does not belong to these questions.
        """
        end = 0
        for raw in self.file:
            if not raw.endswith(b"\n"):
                break
            line = next(questions, None)
            try:
                answer = json.loads(raw)
                found = {name: answer[name] for name in ECHOED}
            except (ValueError, KeyError, TypeError):
                found = None
            if line is None or found != line.echo():
                message = f"line {self.written + 1} answers no such question; give another --out, or move it away"
                raise InputError(f"{self.path}: {message}")
            end += len(raw)
            self.written += 1
            self.failed += "error" in answer
        self.file.truncate(end)
        self.file.seek(end)

    def write(self, line: dict[str, Any]) -> None:
        """Add the next line at once and whole."""
        assert line["line"] == self.written + 1, "lines are written once and in order"
        self.file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self.file.flush()
        self.written += 1
        self.failed += "error" in line


@contextmanager
def open_output(path: Path) -> Iterator[Output]:
    """The output, for one run at a time."""
    try:
        with path.open("a+b") as file:
            lock(file, f"{path}: another run is writing to it")
            file.seek(0)
            yield Output(file, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """The questions, one after another."""
    for number, raw in enumerate(file, start=1):
        yield read_line(number, raw)
