"""Video files, image folders and images to a few frames with their true times. Knows nothing of models.

How a long file stays cheap and a short one does not pay for it: one pass over the packets, without decoding, gives
the presentation time of every frame and the places of the keyframes. Then only what is needed is decoded: the
reader jumps to a keyframe when that skips enough frames, and otherwise simply decodes on.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from vidlada.errors import InputError
from vidlada.settings import check_settings, setting

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
PLAYLISTS = frozenset({"concat", "dash", "hls", "imf"})  # FFmpeg would open what they name, anywhere on the machine
IMAGE_FOLDER_FPS = 3.0  # of a folder of images, as the published evaluations read MVBench's
SEEK_WORTH_FRAMES = 12  # jump to a keyframe only if that skips at least so many frames; see `vidlada bench video`
MAX_FRAMES = 100_000  # of one prompt; far more than any context holds
MOST_MISSING = 0.02  # share of the announced frames a readable file may lack before it counts as truncated


@dataclass(frozen=True)
class Sampling:
    """Which frames to take. On the command line and in Python, `max_frames` is called `frames`."""

    fps: float = setting(1.0, "Candidate frames a second.", minimum=1e-6, maximum=1000, essential=True)
    max_frames: int | Literal["auto"] = setting(
        64,
        "Most frames to take; with more candidates, so many are taken evenly over the video. auto: as many as the "
        "model's context and the free memory hold.",
        choices=("auto",),
        minimum=1,
        maximum=MAX_FRAMES,
        essential=True,
        alias="frames",
    )
    force_sample: bool = setting(False, "Always take the most frames, evenly spaced.")

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def most(self) -> int:
        """Most frames, as a number."""
        if isinstance(self.max_frames, str):
            raise InputError("frames auto needs a model that says how many fit; give a number")
        return self.max_frames


@dataclass(frozen=True)
class VideoInfo:
    """What a source is.

    Attributes:
        path: as given.
        frames: how many it has.
        fps: frames a second, on average.
        duration: seconds.
        width, height: pixels as stored, before rotation.
        codec: `h264`, …; `image` for images.
    """

    path: str
    frames: int
    fps: float
    duration: float
    width: int
    height: int
    codec: str


@dataclass(frozen=True)
class Frames:
    """Sampled frames.

    Attributes:
        images: (frames, height, width, 3) uint8 RGB, upright.
        times: seconds of each frame from the first frame of the video.
        indices: number of each frame in presentation order.
        info: of the source.
    """

    images: np.ndarray
    times: tuple[float, ...]
    indices: tuple[int, ...]
    info: VideoInfo


def sample_indices(total: int, fps: float, sampling: Sampling) -> list[int]:
    """Numbers of the frames to take.

    Args:
        total: frames of the video.
        fps: of the video.
        sampling: which to take.
    """
    stride = max(1, round(fps / sampling.fps))
    indices = list(range(0, total, stride))
    if len(indices) > sampling.most or sampling.force_sample:
        indices = np.linspace(0, total - 1, sampling.most).astype(int).tolist()
    return indices


def probe(source: str | Path) -> VideoInfo:
    """What a video file, a folder of images or an image is, without decoding it.

    Raises:
        InputError: it cannot be used, and why.
    """
    path = _existing(source)
    images = _images(path)
    if images is not None:
        return _image_info(path, images)
    with _open(path) as (container, stream):
        return _index(path, container, stream).info


def sample_frames(source: str | Path, sampling: Sampling | None = None, size: int | None = None) -> Frames:
    """Take frames from a video file, a folder of images or an image.

    Args:
        source: path. Everything PyAV's FFmpeg reads counts as a video file, animated gif included.
        sampling: which frames; one a second and at most 64 by default.
        size: resize each frame to this many pixels on both sides (bicubic, aspect not kept), so that no full-size
            frame is held; None keeps the video's size.

    Raises:
        InputError: the source is missing, empty, truncated, damaged or not a video, and why.
    """
    sampling = sampling or Sampling()
    path = _existing(source)
    images = _images(path)
    if images is not None:
        info = _image_info(path, images)
        indices = sample_indices(info.frames, info.fps, sampling)
        pictures = [_shaped(_read_image(images[i]), size) for i in indices]
        if len({picture.shape for picture in pictures}) > 1:
            raise InputError(f"{path}: its images differ in size; give a size to resize them to")
        return Frames(np.stack(pictures), tuple(i / info.fps for i in indices), tuple(indices), info)
    with _open(path) as (container, stream):
        index = _index(path, container, stream)
        indices = sample_indices(index.info.frames, index.info.fps, sampling)
        wanted = sorted(set(indices))
        reader = _decode_by_order if index.times is None else _decode_by_time
        found = dict(zip(wanted, reader(path, container, stream, index, wanted, size), strict=True))
    times = [i / index.info.fps if index.times is None else index.seconds(i) for i in indices]
    return Frames(np.stack([found[i] for i in indices]), tuple(times), tuple(indices), index.info)


def _existing(source: str | Path) -> Path:
    path = Path(source)
    try:
        if path.is_dir():
            return path
        status = path.stat()
        if not S_ISREG(status.st_mode):  # opening a pipe would wait for its writer, and some devices never end
            raise InputError(f"{path}: neither a file nor a folder")
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if status.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return path


# --- images ---


def _images(path: Path) -> list[Path] | None:
    """The image files a source consists of, in natural order; None if it is a video file."""
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
        if not found:
            raise InputError(f"{path}: the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        return sorted(found, key=lambda p: natural_order(p.name))
    return [path] if path.suffix.lower() in IMAGE_SUFFIXES else None


def natural_order(name: str) -> list[tuple[int, str]]:
    """What to sort names by, so that 2 comes before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", name)]


@contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image: {error}") from error


def _image_info(path: Path, images: Sequence[Path]) -> VideoInfo:
    with _image_errors(images[0]), Image.open(images[0]) as image:
        width, height = image.size
    duration = len(images) / IMAGE_FOLDER_FPS if path.is_dir() else 0.0
    return VideoInfo(str(path), len(images), IMAGE_FOLDER_FPS, duration, width, height, "image")


def _read_image(path: Path) -> np.ndarray:
    with _image_errors(path), Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _shaped(picture: np.ndarray, size: int | None) -> np.ndarray:
    """(height, width, 3), resized if asked."""
    if size is None or picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


# --- video files ---


@dataclass(frozen=True)
class _Index:
    """Presentation times of all frames.

    Attributes:
        info: of the file.
        times: presentation time stamps in stream units, ascending; None where the file does not say.
        keyframes: numbers of the frames decoding can start at, ascending.
        time_base: seconds a stream unit.
    """

    info: VideoInfo
    times: list[int] | None
    keyframes: list[int]
    time_base: float

    def seconds(self, number: int) -> float:
        assert self.times is not None
        return (self.times[number] - self.times[0]) * self.time_base


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; FFmpeg's errors become ours."""
    try:
        with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
            if container.format.name in PLAYLISTS:
                raise InputError(f"{path}: a list of other files ({container.format.name}); give the video itself")
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                kinds = " and ".join(sorted({stream.type for stream in container.streams})) or "no"
                raise InputError(f"{path}: there is no video in it, only {kinds} streams")
            if streams[0].codec_context is None:
                raise InputError(f"{path}: this build of FFmpeg has no decoder for its video")
            streams[0].thread_type = "AUTO"
            yield container, streams[0]
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: not a readable video: {error.strerror}") from error


def _index(path: Path, container: InputContainer, stream: VideoStream) -> _Index:
    """Read every packet once, decoding none."""
    packets: list[tuple[int | None, bool]] = []
    end = None
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            packets.append((packet.pts, packet.is_keyframe))
            if packet.pts is not None:
                end = max(end or packet.pts, packet.pts + (packet.duration or 0))
    time_base = float(stream.time_base or 1)
    known = [pts for pts, _ in packets if pts is not None]
    if not packets:
        raise InputError(f"{path}: the video stream holds no frames; the file is empty or truncated")
    if len(set(known)) < len(packets):
        return _index_by_decoding(path, container, stream)
    order = sorted(range(len(packets)), key=known.__getitem__)
    times = [known[i] for i in order]
    keyframes = [number for number, i in enumerate(order) if packets[i][1]]
    span = ((end or times[-1]) - times[0]) * time_base
    _refuse_truncated(path, container, stream, len(packets), span)
    fps = float(stream.average_rate or 0) or (len(times) / span if span else 1.0)
    duration = span if span > 0 else len(times) / fps
    return _Index(_info(path, stream, len(times), fps, duration), times, keyframes, time_base)


def _index_by_decoding(path: Path, container: InputContainer, stream: VideoStream) -> _Index:
    """For files without usable time stamps (some avi, raw streams): count by decoding."""
    total = sum(1 for _ in _decoded(container, stream, start=0))
    if not total:
        raise InputError(f"{path}: none of its frames can be decoded")
    fps = float(stream.average_rate or stream.guessed_rate or 1)
    _refuse_truncated(path, container, stream, total, total / fps)
    return _Index(_info(path, stream, total, fps, total / fps), None, [], 0.0)


def _info(path: Path, stream: VideoStream, frames: int, fps: float, duration: float) -> VideoInfo:
    context = stream.codec_context
    return VideoInfo(str(path), frames, fps, duration, context.width, context.height, context.name)


def _refuse_truncated(path: Path, container: InputContainer, stream: VideoStream, frames: int, seconds: float) -> None:
    """Compare what is there with what the header announces: a silently shortened video gives wrong answers."""
    if stream.frames - frames > MOST_MISSING * stream.frames:
        raise InputError(f"{path}: the file is truncated: {frames} of {stream.frames} frames are there")
    announced = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
    if announced is None and container.duration and len(container.streams) == 1:
        announced = container.duration / av.time_base
    if announced and frames > 1 and announced - seconds > max(1.0, MOST_MISSING * announced):
        raise InputError(f"{path}: the file is truncated: {seconds:.1f} of {announced:.1f} seconds are there")


def _decoded(container: InputContainer, stream: VideoStream, start: int | None = None) -> Iterator[av.VideoFrame]:
    """Frames in presentation order; damaged packets are skipped, and what they should have given is missed later.

    Args:
        start: seek to the keyframe at or before this time stamp first; None decodes on.
    """
    if start is not None:
        container.seek(start, stream=stream, backward=True)
    for packet in container.demux(stream):
        try:
            yield from packet.decode()
        except av.error.InvalidDataError:
            continue


def _decode_by_time(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    index: _Index,
    wanted: Sequence[int],
    size: int | None,
) -> Iterator[np.ndarray]:
    """The wanted frames, found by their time stamps."""
    times = index.times
    assert times is not None
    container.seek(times[0], stream=stream, backward=True)
    frames = _decoded(container, stream)
    frame: av.VideoFrame | None = None
    position = 0  # number of the next frame the decoder will give
    for number in wanted:
        place = bisect_right(index.keyframes, number) - 1
        keyframe = index.keyframes[place] if place >= 0 else 0
        jumped = keyframe - position >= SEEK_WORTH_FRAMES
        if jumped:
            frames = _decoded(container, stream, times[keyframe])
        frame = _advance(frames, times[number])
        if jumped and (frame is None or frame.pts != times[number]):
            # the container's own index led past the frame; the start never does
            frames = _decoded(container, stream, times[0])
            frame = _advance(frames, times[number])
        if frame is None or frame.pts != times[number]:
            raise InputError(f"{path}: the frame at {index.seconds(number):.2f} s cannot be decoded; it is damaged")
        position = number + 1
        yield _upright(frame, size)


def _advance(frames: Iterator[av.VideoFrame], time: int) -> av.VideoFrame | None:
    """The first frame at or after a time stamp."""
    return next((frame for frame in frames if frame.pts is not None and frame.pts >= time), None)


def _decode_by_order(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    index: _Index,
    wanted: Sequence[int],
    size: int | None,
) -> Iterator[np.ndarray]:
    """The wanted frames, found by counting."""
    keep = set(wanted)
    for number, frame in enumerate(_decoded(container, stream, start=0)):
        if number in keep:
            yield _upright(frame, size)


def _upright(frame: av.VideoFrame, size: int | None) -> np.ndarray:
    """RGB, turned as the file's rotation metadata says."""
    picture = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # counter-clockwise quarter turns
    return _shaped(np.ascontiguousarray(np.rot90(picture, turns)), size)
