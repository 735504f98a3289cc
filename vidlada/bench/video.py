"""Sampling frames from a long and a short file, against decoding everything and against seeking every frame."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidlada.machine import machine
from vidlada.markdown import table
from vidlada.video import Sampling, probe, sample_frames, sample_indices

FPS, KEYFRAME_EVERY = 24, 48
CHUNK_SECONDS = 30  # of fresh pictures; a long file repeats them, which costs a reader just the same
SIZE = 384


def video_figures(minutes: int, frames: int, repeats: int) -> dict[str, Any]:
    """Seconds to sample a long and a short file in four ways.

    Args:
        minutes: length of the long file (640 × 360 at 24 frames a second, H.264).
        frames: to sample from the long file; 16 are sampled from the short one (5 s of 1280 × 720).
        repeats: of every way, interleaved.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {
            f"{minutes} minutes, {frames} frames": (
                write_clip(Path(folder) / "long.mp4", 60 * minutes, 640, 360),
                Sampling(max_frames=frames, force_sample=True),
            ),
            "5 seconds, 16 frames": (
                write_clip(Path(folder) / "short.mp4", 5, 1280, 720),
                Sampling(max_frames=16, force_sample=True),
            ),
        }
        results = {}
        for name, (path, sampling) in files.items():
            ways: dict[str, Callable[[], Any]] = {
                "decode everything": lambda path=path, sampling=sampling: decode_everything(path, sampling),  # type: ignore[misc]
                "seek every frame": lambda path=path, sampling=sampling: seek_every_frame(path, sampling),  # type: ignore[misc]
                "vidlada": lambda path=path, sampling=sampling: sample_frames(path, sampling, SIZE).images,  # type: ignore[misc]
            }
            results[name] = time_interleaved(ways, repeats)
    return {"machine": machine("cpu"), "repeats": repeats, "files": results}


def time_interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of each way, and how often faster than the first it is.

    Raises:
        AssertionError: two ways give different pictures.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pictures: list[np.ndarray] = []
    for repeat in range(repeats):
        for name, way in ways.items():
            started = time.perf_counter()
            picture = way()
            seconds[name].append(time.perf_counter() - started)
            if repeat == 0:
                pictures.append(picture)
        assert all(np.array_equal(picture, pictures[0]) for picture in pictures), "the ways disagree on the pictures"
    baseline = statistics.median(next(iter(seconds.values())))
    return {
        name: {
            "median_s": statistics.median(taken),
            "least_s": min(taken),
            "most_s": max(taken),
            "times_faster": baseline / statistics.median(taken),
        }
        for name, taken in seconds.items()
    }


def video_table(figures: dict[str, Any]) -> str:
    """Markdown of `video_figures`."""
    rows = [
        [name, way, f"{row['median_s']:.3f}", f"{row['least_s']:.3f} to {row['most_s']:.3f}",
         f"{row['times_faster']:.1f}"]
        for name, ways in figures["files"].items()
        for way, row in ways.items()
    ]  # fmt: skip
    title = f"machine: {figures['machine']}, {figures['repeats']} interleaved repeats"
    return "\n".join([title, "", *table(("file", "way", "median, s", "range, s", "times faster"), rows)])


def write_clip(path: Path, seconds: int, width: int, height: int) -> Path:
    """A moving pattern in H.264; a long one repeats the packets of its first chunk under later time stamps."""
    chunk = min(seconds, CHUNK_SECONDS)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = KEYFRAME_EVERY
        stream.time_base = stream.codec_context.time_base = Fraction(1, FPS)
        packets = []
        for picture in pattern(chunk * FPS, width, height):
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode()
        stamps = [(packet.pts or 0, packet.dts or 0, bytes(packet), packet.is_keyframe) for packet in packets]
        for shift in range(0, seconds * FPS, chunk * FPS):
            for pts, dts, data, is_keyframe in stamps:
                packet = av.Packet(data)
                packet.pts, packet.dts = pts + shift, dts + shift
                packet.is_keyframe = is_keyframe
                packet.time_base, packet.stream = Fraction(1, FPS), stream
                container.mux(packet)
    return path


def pattern(frames: int, width: int, height: int) -> Iterator[np.ndarray]:
    """Waves that drift, with noise, so that the file has a bit rate like a real one's."""
    noise = np.random.default_rng(0).integers(0, 24, (height, width, 3), dtype=np.uint8)
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    for number in range(frames):
        wave = 100 + 90 * np.sin(x / 23 + number / 9) * np.cos(y / 31 - number / 13)
        yield wave[..., None].astype(np.uint8) + np.roll(noise, number, axis=1)


def decode_everything(path: Path, sampling: Sampling) -> np.ndarray:
    """The plain way: decode all frames, keep the wanted ones."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        wanted = sample_indices(stream.frames, float(stream.average_rate or FPS), sampling)
        keep = set(wanted)
        found = {i: resize(frame) for i, frame in enumerate(container.decode(stream)) if i in keep}
    return np.stack([found[i] for i in wanted])


def seek_every_frame(path: Path, sampling: Sampling) -> np.ndarray:
    """What readers that know no keyframes do: seek before each wanted frame."""
    info = probe(path)
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        unit = float(stream.time_base or 1)
        for index in sample_indices(info.frames, info.fps, sampling):
            stamp = round(index / info.fps / unit)
            container.seek(stamp, stream=stream, backward=True)
            found.append(resize(next(f for f in container.decode(stream) if f.pts is not None and f.pts >= stamp)))
    return np.stack(found)


def resize(frame: av.VideoFrame) -> np.ndarray:
    """(SIZE, SIZE, 3), as `sample_frames` makes it."""
    image = frame.to_image()
    return np.asarray(image.resize((SIZE, SIZE), 3))
