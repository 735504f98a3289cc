"""Video files, image folders and images to a few frames with their true times. Knows nothing of models.

How a long file stays cheap and a short one does not pay for it: one pass over the packets, without decoding, gives
the presentation time of every frame and the places of the key pictures (`video_index`). Which frames to take is
decided on those times; only then, what is needed is decoded (`video_decoding`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Discard, Disposition
from av.video.stream import VideoStream
from PIL import Image

from vidlada.errors import InputError
from vidlada.images import (
    BACKGROUNDS,
    IMAGE_SUFFIXES,
    image_info,
    is_picture,
    natural_order,
    read_images,
)
from vidlada.settings import check_settings, setting
from vidlada.truncation import is_cut
from vidlada.video_decoding import LateStartError, WrongTimesError, decode_frames
from vidlada.video_index import Timeline, VideoInfo, index_file, rate_of
from vidlada.video_losses import with_losses

__all__ = ["MAX_FRAMES", "IMAGE_SUFFIXES", "Frames", "Sampling", "VideoInfo", "natural_order", "probe", "sample_frames"]

PLAYLISTS = frozenset({"concat", "dash", "hls", "imf"})  # FFmpeg would open what they name, anywhere on the machine
MERE_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
TILES = Disposition.dependent  # of one picture, as telephones write HEIC
IMAGE_FOLDER_FPS = 3.0  # of a folder of images, as the published evaluations read MVBench's; of a paged TIFF too
MAX_FRAMES = 100_000  # of one prompt; far more than any context holds
FREES_TWICE = frozenset({"png", "apng"})  # PyAV and FFmpeg both free the side data of their frames: it must stay unread
CLOCK_SECONDS = 2e-3  # time stamps may be rounded to milliseconds


@dataclass(frozen=True)
class Sampling:
    """Which frames to take. On the command line and in Python, `max_frames` is called `frames`.

    Candidates are every round(video fps / fps)-th frame; where frames do not come evenly, those shown at every
    1 / fps seconds. An image is one frame, whatever the settings.
    """

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
    background: str = setting(
        "white", "What transparent places are laid on: white or black.", choices=("white", "black")
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def most(self) -> int:
        """Most frames, as a number."""
        if isinstance(self.max_frames, str):
            raise InputError("frames auto needs a model that says how many fit; give a number")
        return self.max_frames


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


Check = Callable[[VideoInfo, int], None]
Take = Callable[[int, np.ndarray], None]


def sample_indices(total: int, fps: float, sampling: Sampling) -> list[int]:
    """Numbers of the frames to take of a video whose frames come evenly.

    Args:
        total: frames of the video.
        fps: of the video.
        sampling: which to take.
    """
    stride = max(1, round(fps / sampling.fps))
    if sampling.force_sample or -(-total // stride) > sampling.most:
        return np.linspace(0, total - 1, sampling.most).astype(int).tolist()
    return list(range(0, total, stride))


def sample_times(seconds: np.ndarray, duration: float, sampling: Sampling) -> list[int]:
    """Numbers of the frames to take of a video whose frames do not come evenly: those shown at even times.

    Args:
        seconds: (frames,) when each is shown, from 0.
        duration: seconds until the last one ends.
        sampling: which to take.
    """
    most, total = sampling.most, len(seconds)
    evenly = _shown_at(seconds, np.linspace(0, seconds[-1], most))
    if sampling.force_sample:
        return evenly.tolist() if total > most else np.linspace(0, total - 1, most).astype(int).tolist()
    # a frame is a candidate if one of the even times comes before the next frame; of a long one, one is enough
    first_times = np.ceil((np.append(seconds, duration) - CLOCK_SECONDS) * sampling.fps)
    candidates = np.flatnonzero(np.diff(first_times) > 0)
    if len(candidates) <= most:
        return candidates.tolist()
    if len(np.unique(evenly)) == most:
        return evenly.tolist()
    return candidates[np.linspace(0, len(candidates) - 1, most).astype(int)].tolist()


def _shown_at(seconds: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Numbers of the frames shown at some times."""
    return np.maximum(np.searchsorted(seconds, times + CLOCK_SECONDS, side="right") - 1, 0)


def probe(source: str | Path) -> VideoInfo:
    """What a video file, a folder of images or an image is, without decoding it.

    Raises:
        InputError: it cannot be used, and why.
    """
    path = _existing(source)
    if _is_picture(path):
        return _Pictures(path).info
    return _index(path)[1].info


def sample_frames(
    source: str | Path,
    sampling: Sampling | None = None,
    size: int | None = None,
    check: Check | None = None,
    take: Take = lambda number, image: None,
) -> Frames:
    """Take frames from a video file, a folder of images or an image.

    Args:
        source: path. Everything PyAV's FFmpeg reads counts as a video file, animated gif, webp and png included; the
            pages of a paged TIFF count as a folder of images.
        sampling: which frames; one a second and at most 64 by default.
        size: resize each frame to this many pixels on both sides (bicubic, aspect not kept), so that no full-size
            frame is in memory; None keeps the video's size.
        check: called with what the source is and how many frames will be taken, before the first is decoded; it may
            raise.
        take: called with the number and the picture, (height, width, 3), of each frame as soon as it is decoded; again
            with all of them where a file has to be read anew.

    Raises:
        InputError: the source is missing, empty, truncated, damaged or not a video, and why.
    """
    sampling = sampling or Sampling()
    path = _existing(source)
    if _is_picture(path):
        pictures = _Pictures(path)
        last = pictures.info.duration - float(pictures.seconds[-1])
        constant = rate_of(pictures.seconds, [pictures.info.fps], last)[1]
        wanted = [0] if pictures.is_still else choose_frames(pictures.seconds, pictures.info, constant, sampling)
        read = partial(pictures.read, sampling.background)
        return _frames(pictures.info, pictures.seconds, wanted, read, size, check, take)
    stream, timeline = _index(path)
    while True:
        wanted = choose_frames(timeline.seconds, timeline.info, timeline.constant, sampling)
        read = partial(_decode, path, stream, timeline, BACKGROUNDS[sampling.background])
        try:
            return _frames(timeline.info, timeline.seconds, wanted, read, size, check, take)
        except WrongTimesError:
            timeline = timeline.in_decoder_order()
        except LateStartError as late:
            timeline = timeline.starting_at(late.number)


def _frames(
    info: VideoInfo,
    seconds: np.ndarray,
    wanted: Sequence[int],
    read: Callable[[Sequence[int]], Iterator[tuple[int, np.ndarray]]],
    size: int | None,
    check: Check | None,
    take: Take,
) -> Frames:
    """Read, resize and collect the wanted frames of a source.

    Args:
        info: of the source.
        seconds: (all frames,) when each is shown.
        wanted: numbers of frames, ascending; the same may come several times.
        read: gives for each of some numbers, each once, the number of the frame that is shown, and its picture.
        size, check, take: as for `sample_frames`.
    """
    if check is not None:
        check(info, len(wanted))
    each = sorted(set(wanted))
    found: dict[int, tuple[int, np.ndarray]] = {}
    for number, (own, image) in zip(each, read(each), strict=True):
        found[number] = own, _resize(image, size)
        take(*found[number])
    images = [found[number][1] for number in wanted]
    if len({image.shape for image in images}) > 1:
        raise InputError(f"{info.path}: its pictures differ in size; give a size to resize them to")
    shown = [found[number][0] for number in wanted]
    return Frames(np.stack(images), tuple(seconds[shown].tolist()), tuple(shown), info)


def choose_frames(seconds: np.ndarray, info: VideoInfo, constant: bool, sampling: Sampling) -> list[int]:
    """Numbers of the frames to take.

    Args:
        seconds: (frames,) when each is shown, from 0.
        info: of the video.
        constant: its frames come evenly.
        sampling: which to take.
    """
    if constant:
        return sample_indices(info.frames, info.fps, sampling)
    return sample_times(seconds, info.duration, sampling)


def _existing(source: str | Path) -> Path:
    if not os.fspath(source):
        raise InputError("the path is empty; give a video file, a folder of images or an image")
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


def _resize(picture: np.ndarray, size: int | None) -> np.ndarray:
    """(height, width, 3), resized if asked."""
    if size is None or picture.shape[:2] == (size, size):
        return picture
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))


# --- images ---


def _is_picture(path: Path) -> bool:
    return path.is_dir() or is_picture(path)


class _Pictures:
    """A folder of images, a still image, an animation or a paged TIFF.

    Args:
        path: of it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: list[Path] = _images_in(path) if path.is_dir() else []
        first = image_info(self.files[0] if self.files else path)
        count = len(self.files) or len(first.pages)
        self.pages = first.pages
        self.is_still = not self.files and count == 1
        self.seconds = np.arange(count) / IMAGE_FOLDER_FPS
        duration, fps, codec = (0.0 if self.is_still else count / IMAGE_FOLDER_FPS), IMAGE_FOLDER_FPS, "image"
        if first.seconds is not None and not self.files:
            self.seconds = np.array(first.seconds)
            duration, fps, codec = first.duration, count / first.duration, first.format
        self.info = VideoInfo(str(path), count, fps, duration, first.width, first.height, codec)

    def read(self, background: str, wanted: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers and pictures of the wanted ones."""
        if not self.files:
            number_of = {page: number for number, page in enumerate(self.pages)}
            for page, image in read_images(self.path, [self.pages[number] for number in wanted], background):
                yield number_of[page], image
        for number in wanted if self.files else ():
            pages = image_info(self.files[number]).pages
            if len(pages) > 1:
                raise InputError(f"{self.files[number]}: it holds {len(pages)} pictures; in a folder, each holds one")
            yield from ((number, image) for _, image in read_images(self.files[number], pages, background))


def _images_in(folder: Path) -> list[Path]:
    """The image files of a folder, in natural order."""
    try:
        found = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")]
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {error.strerror}") from error
    found = [path for path in found if path.is_file()]
    if not found:
        raise InputError(f"{folder}: the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(found, key=lambda path: natural_order(path.name))


# --- video files ---


@contextmanager
def _open(path: Path) -> Iterator[InputContainer]:
    """The container; FFmpeg's errors become ours."""
    try:
        # with its protocol a name is only a name: `12:30.mp4` is not a protocol, nor `%03d.jp2` a pattern
        options = {"protocol_whitelist": "file", "pattern_type": "none"}
        with av.open(f"file:{path}", options=options, metadata_errors="replace") as container:
            if container.format.name in PLAYLISTS:
                raise InputError(f"{path}: a list of other files ({container.format.name}); give the video itself")
            yield container
    except av.error.FFmpegError as error:
        if is_cut(path, "mov") and path.read_bytes()[4:8] == b"ftyp":
            raise InputError(
                f"{path}: the file is truncated: its index, which stands at its end, is missing"
            ) from error
        raise InputError(f"{path}: not a readable video: {error.strerror}") from error


def _streams(path: Path, container: InputContainer) -> list[VideoStream]:
    """The video streams that can be decoded and are not mere pictures (covers, thumbnails)."""
    streams = [stream for stream in container.streams.video if not stream.disposition & (MERE_PICTURES | TILES)]
    if not streams:
        if any(stream.disposition & TILES for stream in container.streams.video):
            raise InputError(f"{path}: a picture in tiles (HEIC, AVIF) cannot be read; convert it to JPEG or PNG")
        if not container.streams:
            raise InputError(f"{path}: there is no video in it, nor anything else; the file is empty or truncated")
        kinds = {"cover" if stream.type == "video" else stream.type for stream in container.streams}
        raise InputError(f"{path}: there is no video in it, only {' and '.join(sorted(kinds))} streams")
    decodable = [stream for stream in streams if stream.codec_context is not None]
    if not decodable:
        raise InputError(f"{path}: this build of FFmpeg has no decoder for its video")
    return decodable


def _index(path: Path) -> tuple[int, Timeline]:
    """Number of the stream to show, and its frames."""
    with _open(path) as container:
        streams = _streams(path, container)
        _read_only(container, streams)
        stream, timeline = index_file(path, container, streams)
        return stream.index, with_losses(path, container.format.name, timeline)


def _read_only(container: InputContainer, streams: Sequence[VideoStream]) -> None:
    for stream in container.streams:
        if stream not in streams:
            stream.discard = Discard.all


def _decode(
    path: Path, number: int, timeline: Timeline, background: int, wanted: Sequence[int]
) -> Iterator[tuple[int, np.ndarray]]:
    """Numbers and upright RGB pictures of the wanted frames."""

    @contextmanager
    def opener() -> Iterator[tuple[InputContainer, VideoStream]]:
        with _open(path) as container:
            stream = container.streams[number]
            assert isinstance(stream, VideoStream)
            _read_only(container, [stream])
            stream.thread_type = "AUTO"
            if timeline.instant:
                stream.codec_context.options = {"err_detect": "explode"}  # else decoders invent what damage took away
            yield container, stream

    for shown, frame in decode_frames(opener, timeline, wanted):
        yield shown, upright(frame, background, timeline.info.codec in FREES_TWICE)


def upright(frame: av.VideoFrame, background: int = 255, only_angle: bool = False) -> np.ndarray:
    """(height, width, 3) uint8 RGB, turned as the display matrix says.

    Args:
        frame: decoded.
        background: grey value that transparent places are laid on.
        only_angle: turn it, but do not mirror it.
    """
    if any(component.is_alpha for component in frame.format.components):
        layers = frame.to_ndarray(format="rgba").astype(np.uint16)
        colors, alpha = layers[..., :3], layers[..., 3:]
        picture = ((colors * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)
    else:
        picture = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    try:
        side_data: Iterable[Any] = [] if only_angle else frame.side_data
    except ValueError:  # kinds that PyAV does not know, as the views of spatial videos and EXIF
        only_angle, side_data = True, []
    if only_angle:
        return np.ascontiguousarray(np.rot90(picture, round(frame.rotation / 90)))
    matrices = [bytes(data) for data in side_data if data.type == Type.DISPLAYMATRIX]
    return orient(picture, np.frombuffer(matrices[0], np.int32)) if matrices else picture


def orient(picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn or mirror a picture as a display matrix says, to the nearest of the eight upright orientations.

    Args:
        picture: (height, width, 3) as stored.
        matrix: (9,) of FFmpeg: x' = m0 x + m3 y, y' = m1 x + m4 y.
    """
    across, down = matrix[0], matrix[4]
    if abs(int(matrix[0])) + abs(int(matrix[4])) < abs(int(matrix[1])) + abs(int(matrix[3])):
        picture = picture.transpose(1, 0, 2)
        across, down = matrix[3], matrix[1]
    return np.ascontiguousarray(picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])
