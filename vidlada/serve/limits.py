"""How much a request may ask for, and how much the server takes on. One source for the command line and Python."""

from dataclasses import dataclass

from vidlada.engine.limits import EngineLimits, limit


@dataclass(frozen=True)
class Limits(EngineLimits):
    """The engine's limits and the server's own."""

    max_queue: int = limit(64, "Requests that may wait; more are refused with 429.")
    max_tokens: int = limit(1024, "Answer slots of a request.")
    max_thought: int = limit(4096, "Slots of a request's thought.")
    max_media: int = limit(128, "Videos and images in a request.")
    max_frames: int = limit(256, "Frames sampled from a video.")
    max_duration: float = limit(7200.0, "Seconds a video may last.")
    max_pixels: int = limit(4096 * 4096, "Width times height of a video or an image.")
    max_upload_mb: int = limit(512, "MiB of an upload or a fetched video.")
    max_body_mb: int = limit(64, "MiB of a JSON request, data URIs included.")
    max_arriving: int = limit(256, "Bodies being received; the one that takes longest makes way for one more.")
    max_bodies_mb: int = limit(1024, "MiB of all JSON requests being received or answered.")
    max_fetches: int = limit(32, "URLs being fetched; more are refused with 503.")
    max_stored_mb: int = limit(4096, "MiB of all uploads and fetched files together.")
    upload_seconds: float = limit(3600.0, "How long an upload is kept.")
    body_seconds: float = limit(
        60.0, "A client may take to send a request's head, and its body (longer for a large one)."
    )
    reader_seconds: float = limit(30.0, "A client may take nothing of its answer.")
    fetch_seconds: float = limit(30.0, "Fetching a URL may take.")
    decode_seconds: float = limit(60.0, "Decoding a video may take.")
    request_seconds: float = limit(600.0, "A request may take, waiting included.")
    drain_seconds: int = limit(60, "Running requests are given after SIGTERM.")
    decode_workers: int = limit(2, "Processes that decode videos.")
    decode_memory_mb: int = limit(4096, "MiB of address space of each of them.")
    frame_store_mb: int = limit(256, "MiB of decoded frames kept for further questions.")

    @property
    def max_admitted(self) -> int:
        """Requests being answered or waiting."""
        return self.max_running + self.max_queue
