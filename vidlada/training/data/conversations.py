"""Conversations as data files have them: LLaVA's form and its relatives, each with one meaning."""

import json
import re
import zlib
from collections.abc import Iterator, Sequence
from gzip import decompress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vidlada.errors import InputError
from vidlada.settings import format_value, half_character
from vidlada.training.data.entries import Entry, Media, TarMember

GZIP_MAGIC = b"\x1f\x8b"
LINES = (".jsonl", ".ndjson")
IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
MEDIA_KEYS = ("video", "videos", "image", "images")
TURN_KEYS = ("conversations", "conversation", "messages")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TEXT_PARTS, MEDIA_PARTS = ("text", "input_text", "output_text"), ("image", "video", "image_url", "video_url")
ADDRESS = re.compile(r"(?i)https?://|data:[^/]*/[^/]*[;,]")
BLANK = " \t\r\n"


class Malformed(Exception):  # noqa: N818 - of one entry; never leaves this file
    """An entry has no meaning; the message says why."""


class Value(NamedTuple):
    """One entry of a file, before its meaning is known.

    Attributes:
        place: its number and line, for messages.
        value: parsed JSON.
        problem: why it could not be parsed; empty if it could.
    """

    place: str
    value: Any
    problem: str = ""


def entry_of(found: Value, folder: Path, file: str, attached: Sequence[TarMember] = ()) -> Entry:
    """The conversation in a value, or a broken entry that says why there is none.

    Args:
        found: `{"id", "video" or "image", "conversations", "process"}`. Turns name their speaker as `from` or `role`
            (human or user, gpt or assistant, system) and what is said as `value` or `content`: a text, or a list of
            parts as of OpenAI's interface, whose paths follow those of the entry. An opening turn of the assistant
            and a last one of the user are dropped; `<video>` marks are `<image>` marks.
        folder: where relative paths start.
        file: for messages.
        attached: media that came with it in a tar, in the order of their names; if the entry names all of them, its
            order counts.
    """
    origin = f"{file}: {found.place}" if found.place else file
    try:
        if found.problem:
            raise Malformed(found.problem)
        return _entry_of(found.value, folder, origin, attached)
    except Malformed as error:
        return Entry(origin, (), ("",), ("",), problem=str(error), origin=origin)


def _entry_of(value: Any, folder: Path, origin: str, attached: Sequence[TarMember]) -> Entry:
    if not isinstance(value, dict):
        raise Malformed(f"expected a mapping, got {format_value(value)}")
    paths = media_paths(value)
    key = next((key for key in TURN_KEYS if value.get(key)), TURN_KEYS[0])
    system, turns = turns_of(value.get(key), key, paths)
    process = value.get("process") or ""
    if not isinstance(process, str):
        raise Malformed(f"process must be a text, not {format_value(process)}")
    check_text("process", process)
    media: tuple[Media, ...] = tuple(attached) or tuple(folder / path for path in paths)
    by_name = {PurePosixPath(member.name).name: member for member in attached}
    if sorted(by_name) == sorted(PurePosixPath(path).name for path in paths):
        media = tuple(by_name[PurePosixPath(path).name] for path in paths)
    if media:
        turns = [text.replace(VIDEO_MARK, IMAGE_MARK) for text in turns]
    entry_id = origin if value.get("id") is None else str(value["id"])
    check_text("id", entry_id)
    return Entry(entry_id, media, tuple(turns[::2]), tuple(turns[1::2]), process, system, origin=origin)


def media_paths(value: dict[str, Any]) -> list[str]:
    """Paths of the videos and images that an entry names, in order; an empty text, list or null is none."""
    paths = []
    for key in MEDIA_KEYS:
        named = value.get(key) or []
        paths += [check_path(key, path) for path in (named if isinstance(named, list) else [named])]
    return paths


def check_path(name: str, path: Any) -> str:
    """A path, if it can be one."""
    if not isinstance(path, str) or not path.strip():
        raise Malformed(f"{name} must be a path or a list of paths, not {format_value(path)}")
    check_text(name, path)
    if "\0" in path:
        raise Malformed(f"{name} has a NUL in its path {format_value(path)}")
    if ADDRESS.match(path):
        raise Malformed(f"{name} must be the path of a file, not the address {format_value(path)}")
    return path.removeprefix("file://")


def turns_of(turns: Any, key: str, paths: list[str]) -> tuple[str | None, list[str]]:
    """The system turn, if there is one, and the texts of user and assistant in turn, of whole exchanges.

    Args:
        turns: as the entry has them.
        key: where, for messages.
        paths: of media; those that stand in parts of the turns are appended.
    """
    if not isinstance(turns, list) or not turns:
        raise Malformed(f"{key} must be a list of turns, not {format_value(turns)}")
    pairs: list[tuple[str, str]] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Malformed(f"{key}[{number}] must be a mapping, not {format_value(turn)}")
        speaker = turn.get("from", turn.get("role"))
        role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None:
            raise Malformed(f"{key}[{number}] is said by {format_value(speaker)}; known are {', '.join(ROLES)}")
        text = turn.get("value", turn.get("content"))
        if isinstance(text, list) and text:
            text = text_of_parts(text, f"{key}[{number}]", paths if role == "user" else None)
        if not isinstance(text, str):
            raise Malformed(f"{key}[{number}] needs a text as its value, not {format_value(text)}")
        check_text(f"{key}[{number}]", text)
        pairs.append((role, text))
    system = pairs.pop(0)[1] if pairs[0][0] == "system" else None
    if pairs and pairs[0][0] == "assistant":
        pairs.pop(0)
    if pairs and pairs[-1][0] == "user":
        pairs.pop()
    roles = [role for role, _ in pairs]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise Malformed(f"{key} must alternate user and assistant, got {format_value(roles)}")
    return system, [text for _, text in pairs]


def text_of_parts(parts: list[Any], name: str, paths: list[str] | None) -> str:
    """What a list of parts says, with a mark and a line's end in the place of each video and image, as at inference.

    Args:
        parts: `{"type": "text", "text": …}`; `{"type": "image_url", "image_url": {"url": …}}`, or without a path where
            the entry names it: `{"type": "image"}`; the same of videos.
        name: of the turn, for messages.
        paths: get those of the parts; None where the speaker shows nothing.
    """
    text = ""
    for number, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind in MEDIA_PARTS and paths is not None:
            place = part.get(kind)
            path = place.get("url") if isinstance(place, dict) else place
            if path is not None:
                paths.append(check_path(f"{name}[{number}]", path))
            text += IMAGE_MARK + "\n"
        else:
            raise Malformed(
                f"{name}[{number}] must be a part with a text, or of the user with media, not {format_value(part)}"
            )
    return text


def check_text(name: str, text: str) -> None:
    """Refuse halves of characters, and bytes that were not UTF-8 (`read_values` leaves those as lone surrogates)."""
    if problem := half_character(text):
        raise Malformed(f"{name} has {problem}")


def read_values(path: Path) -> Iterator[Value]:
    """The entries of a json or jsonl file, which may be compressed by gzip, and begin with a byte order mark.

    The content tells which of the two it is: a list, or an entry a line. A line that cannot be parsed is one broken
    entry; what follows an error in a list cannot be separated into entries, so that the file is refused.

    Raises:
        InputError: the file is missing, damaged, or holds neither.
    """
    text = read_text(path)
    first = text.lstrip(BLANK)[:1]
    if first == "[" and not (is_lines(path) and not is_json(text)):
        return _list_values(path, text)
    if first != "{":
        raise InputError(f"{path}: not valid json: expected a list of entries, or an entry a line")
    if is_json(text):
        return iter([Value(place_of(0, text, text.index("{")), json.loads(text))])
    return _line_values(text)


def is_lines(path: Path) -> bool:
    """Whether a file is named as one of an entry a line."""
    return bool({suffix.lower() for suffix in Path(path).suffixes} & {*LINES})


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def read_text(path: Path) -> str:
    """What a file says; bytes that are not UTF-8 become lone surrogates."""
    try:
        content = Path(path).read_bytes()
        if content.startswith(GZIP_MAGIC):
            content = decompress(content)
        encoding = json.detect_encoding(content)
        return content.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid json: {error}") from error


def place_of(number: int, text: str, start: int) -> str:
    """Number and line of an entry that starts somewhere in a text."""
    return f"entry {number}, line {text.count(chr(10), 0, start) + 1}"


def _line_values(text: str) -> Iterator[Value]:
    number = 0
    for line_number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"entry {number}, line {line_number}"
        number += 1
        try:
            yield Value(place, json.loads(line))
        except (ValueError, RecursionError) as error:
            yield Value(place, None, f"not valid json: {error}")


def _list_values(path: Path, text: str) -> Iterator[Value]:
    decoder, number, line, counted = json.JSONDecoder(), 0, 1, 0
    here = text.index("[") + 1

    def skip(start: int) -> int:
        while text[start : start + 1] in BLANK and start < len(text):
            start += 1
        return start

    here = skip(here)
    try:
        while text[here : here + 1] != "]":
            if number:
                if text[here : here + 1] != ",":
                    raise json.JSONDecodeError("expected , or ]", text, here)
                here = skip(here + 1)
            line += text.count("\n", counted, here)
            counted = here
            value, end = decoder.raw_decode(text, here)
            yield Value(f"entry {number}, line {line}", value)
            number, here = number + 1, skip(end)
        if rest := text[here + 1 :].strip():
            raise json.JSONDecodeError(f"{format_value(rest)} follows the list", text, here + 1)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid json: {error}") from error
