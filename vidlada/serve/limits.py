"""How much a request may ask for, and how much the server takes on. One source for the command line and Python."""

from dataclasses import dataclass, field, fields
from typing import TypeVar

from vidlada.errors import InputError

MEBI = 2**20
Number = TypeVar("Number", int, float)


def limit(default: Number, text: str) -> Number:
    """A limit with its default and its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Limits:
    """Everything is at least 1; the type of the default is the type of the limit."""

    max_running: int = limit(16, "Requests decoded together.")
    max_running_tokens: int = limit(262144, "Tokens, prompts included, decoded together.")
    max_queue: int = limit(64, "Requests that may wait; more are refused with 429.")
    max_tokens: int = limit(1024, "Answer slots of a request.")
    max_media: int = limit(8, "Videos and images in a request.")
    max_frames: int = limit(256, "Frames sampled from a video.")
    max_duration: float = limit(7200.0, "Seconds a video may last.")
    max_pixels: int = limit(4096 * 4096, "Width times height of a video or an image.")
    max_upload_mb: int = limit(512, "MiB of an upload or a fetched video.")
    max_body_mb: int = limit(64, "MiB of a JSON request, data URIs included.")
    max_stored_mb: int = limit(4096, "MiB of all uploads and fetched files together.")
    upload_seconds: float = limit(3600.0, "How long an upload is kept.")
    body_seconds: float = limit(60.0, "A client may take to send a request's head, and its body.")
    reader_seconds: float = limit(30.0, "A client may take nothing of its answer.")
    fetch_seconds: float = limit(30.0, "Fetching a URL may take.")
    decode_seconds: float = limit(60.0, "Decoding a video may take.")
    request_seconds: float = limit(600.0, "A request may take, waiting included.")
    drain_seconds: int = limit(60, "Running requests are given after SIGTERM.")
    decode_workers: int = limit(2, "Processes that decode videos.")
    decode_memory_mb: int = limit(4096, "MiB of address space of each of them.")
    frame_store_mb: int = limit(256, "MiB of decoded frames kept for further questions.")
    feature_store_mb: int = limit(512, "MiB of vision features kept for further questions.")
    visual_store_mb: int = limit(1024, "MiB of the frames' keys and values kept for questions that say `reuse`.")

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not value >= 1:
                raise InputError(f"{entry.name} must be at least 1, not {value!r}")

    @property
    def max_admitted(self) -> int:
        """Requests being answered or waiting."""
        return self.max_running + self.max_queue
