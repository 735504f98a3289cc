"""Worker processes that decode videos, so that a hostile file harms nobody but its own request."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vidlada.machine import MEBI
from vidlada.serve.errors import RequestError
from vidlada.serve.limits import Limits
from vidlada.tiling import ImageShape, Tiling
from vidlada.video import IMAGE_SUFFIXES, MAX_FRAMES, Frames, Sampling, VideoInfo

MOST_HEADER_BYTES = 2**20
MOST_TILES = 1 + 36 * 36  # of an image, whatever its pinpoints
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")  # no keys or tokens


class WorkerDeathError(Exception):
    """The process ended before it answered."""


class Decoders:
    """A few worker processes, started when first needed and replaced when they die.

    Args:
        limits: of videos, time and memory.
        size: pixels along a side of the decoded frames.
        most_frames: that fit in a prompt; more are refused before they are decoded.
    """

    def __init__(self, limits: Limits, size: int, most_frames: int = MAX_FRAMES):
        self.limits, self.size, self.most_frames = limits, size, most_frames
        self.idle: asyncio.Queue[Process | None] = asyncio.Queue()
        for _ in range(limits.decode_workers):
            self.idle.put_nowait(None)
        self.processes: set[Process] = set()
        self.deaths = 0

    async def decode(self, path: Path, sampling: Sampling) -> Frames:
        """Sample a file's frames.

        Raises:
            RequestError: see `run`.
        """
        return frames_of(*await self.run(path, sampling))

    async def is_image(self, path: Path) -> bool:
        """Whether a file is a single picture, as Python judges it (`vidlada.media`); its suffix may rule it out.

        Raises:
            RequestError: see `run`.
        """
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            return False
        header, _ = await self.run(path, Sampling(), {"probe": True})
        return bool(header["frames"] == 1)

    async def tile(self, path: Path, tiling: Tiling, alone: bool, background: str) -> tuple[Frames, ImageShape]:
        """An image's tiles, as frames, and its shape.

        Args:
            path: of the file.
            tiling: how the model takes images.
            alone: it is the only image of its conversation.
            background: what transparent places are laid on.

        Raises:
            RequestError: see `run`.
        """
        more = {"tiling": asdict(tiling), "alone": alone}
        header, pixels = await self.run(path, Sampling(max_frames=1, background=background), more)
        frames = frames_of(header, pixels)
        shape = ImageShape(**header["image"])
        if len(frames.images) != shape.tiles or shape != tiling.shape_of(shape.height, shape.width, alone):
            raise RequestError(422, "the image cannot be decoded", "undecodable_video")
        return frames, shape

    async def run(
        self, path: Path, sampling: Sampling, more: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Have a worker process open a file; what it says about it, and pixels.

        Args:
            path: of the file.
            sampling: which frames.
            more: entries of the order.

        Raises:
            RequestError: it cannot be used (422), it took too long (504), or it killed its worker (422).
        """
        order = {
            "path": str(path),
            "sampling": asdict(sampling),
            "size": self.size,
            "max_duration": self.limits.max_duration,
            "max_pixels": self.limits.max_pixels,
            "max_frames": self.most_frames,
            **(more or {}),
        }
        process = await self.idle.get()
        try:
            if process is None or process.returncode is not None:
                await self._kill(process)
                process = await self._start()
            async with asyncio.timeout(self.limits.decode_seconds):
                header, pixels = await self._exchange(process, order)
        except TimeoutError:
            await self._kill(process)
            seconds = self.limits.decode_seconds
            raise RequestError(504, f"the video took longer than {seconds:g} s to decode", "decoding_timeout") from None
        except WorkerDeathError:
            self.deaths += 1
            await self._kill(process)
            message = "the video cannot be decoded: it crashed its decoder, or needs more memory than is allowed"
            raise RequestError(422, message, "undecodable_video") from None
        except BaseException:
            await self._kill(process)
            raise
        finally:
            self.idle.put_nowait(process if process is not None and process.returncode is None else None)
        if "error" in header:
            raise RequestError(422, f"the video cannot be used: {header['error']}", "unusable_video")
        return header, pixels

    async def _exchange(self, process: Process, order: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
            if not line.endswith(b"\n"):
                raise WorkerDeathError
            header = json.loads(line)
            if "error" in header or "probe" in order:
                return header, b""
            frames, height, width, channels = header["shape"]
            most = MOST_TILES if "tiling" in order else order["sampling"]["max_frames"]
            if not (0 < frames <= most and (height, width, channels) == (self.size, self.size, 3)):
                raise WorkerDeathError
            return header, await process.stdout.readexactly(frames * height * width * channels)
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise WorkerDeathError from error

    async def _start(self) -> Process:
        environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vidlada.serve.worker", str(self.limits.decode_memory_mb * MEBI),
            stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, limit=MOST_HEADER_BYTES,
            start_new_session=True,  # a Ctrl-C in the terminal is the server's, which closes them in its own time
        )  # fmt: skip
        self.processes.add(process)
        return process

    async def _kill(self, process: Process | None) -> None:
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self.processes.discard(process)

    async def close(self) -> None:
        """End all processes."""
        for process in list(self.processes):
            await self._kill(process)


def frames_of(header: dict[str, Any], pixels: bytes) -> Frames:
    """A worker's answer as frames."""
    images = np.frombuffer(pixels, np.uint8).reshape(header["shape"])
    return Frames(images, tuple(header["times"]), tuple(header["indices"]), VideoInfo(**header["info"]))
