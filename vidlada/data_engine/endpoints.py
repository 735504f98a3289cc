"""Models behind OpenAI-compatible interfaces: what they are, what they are shown, and what they reply."""

import base64
import io
import json
import os
import time
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from functools import cached_property
from string import Formatter
from typing import Any, Literal
from urllib.parse import urlsplit

import av
import numpy as np
from PIL import Image
from pydantic import PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from vidlada.errors import InputError, VidLaDAError
from vidlada.training.data.samples import STRICT

MOST_REPLY_BYTES = 2**24
LOAD = (408, 409, 425, 429)  # statuses that may be others a moment later, as may all from 500 on
# Statuses that are not about the request: the key, the credit, the address, the load. Another would fare no better.
NOT_THE_REQUEST = (401, 402, 403, 404, 405, 407, *LOAD)
ANSWER = "{question}\n{choices}\nAnswer with the letter of the right choice alone."
CHOICE = "{letter}. {choice}"


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


class RefusedError(VidLaDAError):
    """An endpoint will not answer this one request, as for its content or its size."""


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
            if reply.status_code not in LOAD and reply.status_code < 500:
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
