"""Turn the videos and images a user gives into pictures for the vision tower."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidlada.errors import InputError
from vidlada.fetch import Fetching, Progress, download, is_url
from vidlada.images import BACKGROUNDS, open_images, to_rgb
from vidlada.model.video_model import VidLaDAForMaskedDiffusion
from vidlada.model.vision import FRAMES_PER_PASS
from vidlada.processor import VidLaDAProcessor
from vidlada.tiling import MediaShape
from vidlada.video import IMAGE_SUFFIXES, Frames, Sampling, VideoInfo, probe, sample_frames


@dataclass(frozen=True)
class Pictures:
    """The pictures of a medium that go through the vision tower.

    Attributes:
        images: (pictures, height, width, 3) uint8.
        shape: of the medium.
        times: seconds of each frame; 0 for an image.
        info: of a file.
        numbers: of each frame in its video; the same frame may be shown several times.
    """

    images: np.ndarray
    shape: MediaShape
    times: tuple[float, ...]
    info: VideoInfo | None = None
    numbers: tuple[int, ...] = ()


class FrameEncoder:
    """Runs frames through the vision tower while the next ones are decoded; a GPU works meanwhile.

    Args:
        model, processor: that see them.

    Attributes:
        seconds: spent on it so far.
    """

    def __init__(self, model: VidLaDAForMaskedDiffusion, processor: VidLaDAProcessor):
        self.model, self.processor = model, processor
        self.waiting: dict[int, np.ndarray] = {}
        self.pooled: dict[int, Tensor] = {}  # (cells, width), by the frame's number
        self.seconds = 0.0

    def take(self, number: int, image: np.ndarray) -> None:
        """Take a frame; one of a number that was taken before replaces it.

        Args:
            number: of the frame in its video.
            image: (height, width, 3) uint8.
        """
        self.waiting[number] = image
        if len(self.waiting) == FRAMES_PER_PASS:
            self.encode_waiting()

    @torch.inference_mode()
    def encode_waiting(self) -> None:
        """Run the frames that wait through the tower."""
        if not self.waiting:
            return
        started = time.perf_counter()
        images = np.stack(list(self.waiting.values()))
        pixels = self.processor.pixel_values(images, self.model.device, self.model.dtype)
        pooled = self.model.vision.pool(self.model.vision.project(pixels))
        self.pooled.update(zip(self.waiting, pooled, strict=True))
        self.waiting.clear()
        self.seconds += time.perf_counter() - started

    @torch.inference_mode()
    def tokens(self, numbers: Sequence[int]) -> Tensor:
        """(visual tokens, width) of these frames, in reading order."""
        self.encode_waiting()
        return self.model.vision.with_newlines(torch.stack([self.pooled[number] for number in numbers]))


def media_list(media: Any) -> list[Any]:
    """Return one medium, several, or none as a list."""
    if media is None:
        return []
    return list(media) if isinstance(media, list | tuple) else [media]


def is_image(medium: Any) -> bool:
    """Return whether a medium is one image: a Pillow image, an array (height, width, 3), or an image file.

    Raises:
        InputError: the file is missing or cannot be read.
    """
    if isinstance(medium, np.ndarray):
        return medium.ndim == 3
    if not isinstance(medium, str | Path):
        return isinstance(medium, Image.Image)
    path = Path(medium)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir() and probe(path).frames == 1


@contextmanager
def local(media: Sequence[Any], fetching: Fetching, progress: Progress | None) -> Iterator[list[Any]]:
    """Replace URLs by temporary files for as long as the context is open; errors name the URL."""
    names: dict[str, str] = {}
    with ExitStack() as stack:
        found = []
        for medium in media:
            if is_url(medium):
                path = stack.enter_context(download(medium, fetching, progress))
                names[str(path)] = medium
                medium = path
            found.append(medium)
        try:
            yield found
        except InputError as error:
            text = str(error)
            for path_name, url in names.items():
                text = text.replace(path_name, url)
            raise InputError(text) from error


def read_image(medium: Any, processor: VidLaDAProcessor, alone: bool, background: str = "white") -> Pictures:
    """Read an image, tiled as the model expects.

    Args:
        medium: for which `is_image` holds.
        processor: of the model.
        alone: it is the only image of its conversation.
        background: what transparent places are laid on.
    """
    info = None
    if isinstance(medium, np.ndarray):
        image = medium
    elif isinstance(medium, Image.Image):
        image = to_rgb(medium, BACKGROUNDS[background])
    else:
        info = probe(medium)
        image = open_images(medium, background)[0]
        info = replace(info, duration=0.0, width=image.shape[1], height=image.shape[0])
    pictures, shape = processor.image_pictures(image, alone)
    return Pictures(pictures, shape, (0.0,), info)


def read_video(
    medium: Any, sampling: Sampling, size: int, check: Callable[[int], Any], take: Callable[[int, np.ndarray], None]
) -> Pictures:
    """Read the sampled frames of a video.

    Args:
        medium: a file or folder, frames already sampled, or an array (frames, height, width, 3) taken at the
            sampling's `fps`.
        sampling: which to take.
        size: pixels along a side of a frame.
        check: called with the number of frames before they are decoded; it may raise.
        take: called with each frame's number and picture as soon as it is there.
    """
    if isinstance(medium, np.ndarray):
        if medium.ndim != 4 or len(medium) == 0:
            raise InputError(
                "the video array holds no frames" if medium.ndim == 4 else
                f"frames must be uint8 of shape (frames, height, width, 3), not {medium.dtype} {medium.shape}"
            )  # fmt: skip
        times = tuple(number / sampling.fps for number in range(len(medium)))
        found = Pictures(medium, len(medium), times, None, tuple(range(len(medium))))
    elif isinstance(medium, Frames):
        found = Pictures(medium.images, len(medium.images), medium.times, medium.info, medium.indices)
    elif isinstance(medium, str | Path):
        frames = sample_frames(medium, sampling, size, lambda _, count: check(count), take)
        return Pictures(frames.images, len(frames.images), frames.times, frames.info, frames.indices)
    else:
        raise InputError(f"a medium must be a path, an address, an image or an array, not {type(medium).__name__}")
    check(len(found.images))
    for number, image in zip(found.numbers, found.images, strict=True):
        take(number, image)
    return found
