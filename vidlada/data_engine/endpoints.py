"""Models behind OpenAI-compatible interfaces: what they are, what they are shown, and what they reply."""

import base64
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass as plain_dataclass
from fractions import Fraction
from functools import cache, cached_property
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
# Statuses that are not about the request: the key, the credit, the address, the load. Another would fare no better.
NOT_THE_REQUEST = (401, 402, 403, 404, 405, 407, 408, 409, 425, 429)
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
        tries: most requests for one reply, where the network or the server fails or is busy.
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
    """A model's reply. The client asks again after errors of the network or the server, when the server says.

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
        import openai
    except ImportError as error:
        raise InputError("vidlada data build needs openai: pip install vidlada[train]") from error
    content: Any = prompt
    if segment is not None:
        content = [*segment.parts(endpoint.shown), {"type": "text", "text": prompt}]
    key = os.environ.get(endpoint.key_variable, "")
    if key and not (key.isascii() and key.isprintable()):
        raise InputError(f"{endpoint.key_variable} holds a character that no API key may have, such as a line's end")
    try:
        reply = client_of(endpoint, key).chat.completions.with_raw_response.create(
            model=endpoint.model,
            messages=[{"role": "user", "content": content}],
            temperature=0,
            extra_headers=None if key else {"Authorization": openai.Omit()},
        )
    except openai.APIStatusError as error:
        problem = f"status {error.status_code}: {' '.join(error.response.text[:500].split())}"
        if 400 <= error.status_code < 500 and error.status_code not in NOT_THE_REQUEST:
            raise RefusedError(f"{endpoint.model} refuses: {problem}") from error
    except openai.APIConnectionError as error:
        problem = f"{type(error.__cause__).__name__}: {error.__cause__}"
    else:
        try:
            return content_of(json.loads(reply.http_response.content))
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            problem = "its reply is not a chat completion"
    raise VidLaDAError(f"{endpoint.url} ({endpoint.model}): {problem}; run again to continue")


@cache
def client_of(endpoint: Endpoint, key: str) -> Any:
    """A client of OpenAI's package that waits for a whole reply only so long, and only for so many bytes."""
    import openai

    def start(request: Any) -> None:
        request.extensions["deadline"] = time.monotonic() + endpoint.timeout

    def bound(response: Any) -> None:
        response.stream = bounded_stream(response.stream, response.request.extensions["deadline"], endpoint.timeout)

    hooks: dict[str, list[Any]] = {"request": [start], "response": [bound]}
    client = openai.OpenAI(
        base_url=endpoint.url,
        api_key=key or "none",
        timeout=endpoint.timeout,
        max_retries=endpoint.tries - 1,
        http_client=openai.DefaultHttpxClient(event_hooks=hooks, follow_redirects=False),
    )
    client.organization = client.project = None  # of OpenAI, from the environment
    return client


def bounded_stream(stream: Any, deadline: float, timeout: float) -> Any:
    """A reply's bytes, until a time and a size are reached; the client's own time limit is between two of them."""
    import httpx2

    class Bounded(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            received = 0
            for piece in stream:
                received += len(piece)
                if time.monotonic() > deadline or received > MOST_REPLY_BYTES:
                    limits = f"{timeout:g} seconds and {MOST_REPLY_BYTES >> 20} MB"
                    raise httpx2.ReadTimeout(f"no whole reply in {limits}")
                yield piece

        def close(self) -> None:
            stream.close()

    return Bounded()


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
