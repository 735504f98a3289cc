"""Clips to frames: anti-aliased shapes over a background, a clock, noise; and to H.264 files."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from PIL import Image

from vidlada.errors import InputError
from vidlada.files import atomic_path
from vidlada.shapes.world import COLOURS, SIZES, Clip, Thing

NOISE_LEVELS = 3.0  # standard deviation of the noise, out of 255
MIN_SIZE = 49  # pixels along a side: fewer do not hold the clock's digits
CLOCK_SIDE = 1 / 7  # of the frame
CLOCK_CELLS = 8  # along the clock's side; a digit is 3 × 5 of them
DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001001001", "111101111101111", "111101111001111",
)  # 3 × 5 bitmaps  # fmt: skip


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 0.95


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.74) - 0.22


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.894 * np.abs(x) - 0.447 * y - 0.447, y - 0.85)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    wide = np.maximum(np.abs(x) - 0.95, np.abs(y) - 0.32)
    tall = np.maximum(np.abs(y) - 0.95, np.abs(x) - 0.32)
    return np.minimum(wide, tall)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    angle = np.arctan2(x, -y)
    sector = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    # the edge from the tip (radius 1, angle 0) to the notch (radius 0.42, angle 36°)
    tip, notch = np.array([1.0, 0.0]), 0.42 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([notch[1] - tip[1], tip[0] - notch[0]])
    normal /= np.hypot(*normal)
    return (radius * np.cos(sector) - 1) * normal[0] + radius * np.sin(sector) * normal[1]


# Signed distance of a unit shape: negative inside; x to the right, y down.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "ring": _ring,
}  # fmt: skip


def background(clip: Clip, size: int) -> np.ndarray:
    """The picture behind the things: plain or a soft gradient, dark to middle grey, with little colour.

    Returns:
        (size, size, 3) float32.
    """
    generator = np.random.default_rng([clip.seed, 0])
    first = generator.uniform(15, 115) + generator.uniform(-12, 12, 3)
    if generator.random() < 0.5:
        return np.broadcast_to(first.astype(np.float32), (size, size, 3)).copy()
    last = generator.uniform(15, 115) + generator.uniform(-12, 12, 3)
    angle = generator.uniform(0, 2 * np.pi)
    axis = np.linspace(-0.5, 0.5, size)
    ramp = 0.5 + (axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)) / np.sqrt(2)
    return (first + (last - first) * ramp[..., None]).astype(np.float32)


@cache
def _noise_tile(size: int) -> np.ndarray:
    """Noise twice as wide and high as a frame; frames take windows of it."""
    tile = np.random.default_rng(size).normal(0, NOISE_LEVELS, (2 * size, 2 * size, 3))
    tile.setflags(write=False)
    return tile.astype(np.float32)


def _paint(frame: np.ndarray, clip: Clip, thing: Thing, second: float) -> None:
    """Draw one thing into its bounding box."""
    size = frame.shape[0]
    x, y = clip.position(thing, second)
    radius = SIZES[thing.size] * size
    left, top = max(0, int(x * size - radius) - 1), max(0, int(y * size - radius) - 1)
    right, bottom = min(size, int(x * size + radius) + 2), min(size, int(y * size + radius) + 2)
    across = (np.arange(left, right, dtype=np.float32) + 0.5 - x * size) / radius
    down = (np.arange(top, bottom, dtype=np.float32) + 0.5 - y * size) / radius
    distance = OUTLINES[thing.shape](across[None, :], down[:, None]) * radius  # in pixels
    cover = np.clip(0.5 - distance, 0, 1)[..., None]
    box = frame[top:bottom, left:right]
    box += cover * (np.array(COLOURS[thing.colour_at(second)], np.float32) - box)


@cache
def _clock(number: int, side: int) -> np.ndarray:
    """The clock's picture, (side, side, 3): two white digits on black, alike at every size but for sharpness."""
    cells = np.zeros((CLOCK_CELLS, CLOCK_CELLS), np.uint8)
    for place, digit in enumerate(divmod(number, 10)):
        bitmap = np.array([int(bit) for bit in DIGITS[digit]], np.uint8).reshape(5, 3)
        cells[1:6, 4 * place : 4 * place + 3] = 255 * bitmap
    large = Image.fromarray(np.kron(cells, np.ones((8, 8), np.uint8)))
    picture = np.asarray(large.resize((side, side), Image.Resampling.BOX), np.float32)[..., None].repeat(3, axis=2)
    picture.setflags(write=False)
    return picture


def render_frames(clip: Clip, seconds: Sequence[float], size: int) -> np.ndarray:
    """Frames of a clip.

    Args:
        clip: what to draw.
        seconds: a time for each frame.
        size: pixels along a side.

    Returns:
        (frames, size, size, 3) uint8 RGB.

    Raises:
        InputError: `size` is below `MIN_SIZE`.
    """
    if size < MIN_SIZE:
        raise InputError(f"frames of the shapes world have at least {MIN_SIZE} pixels a side, not {size}")
    behind = background(clip, size)
    tile = _noise_tile(size)
    generator = np.random.default_rng([clip.seed, 1])
    offsets = generator.integers(0, size, (len(seconds), 2))
    frames = np.empty((len(seconds), size, size, 3), np.uint8)
    for number, (second, (row, column)) in enumerate(zip(seconds, offsets, strict=True)):
        frame = behind.copy()
        for thing in clip.things:
            if clip.visible(thing, second + 1e-6):
                _paint(frame, clip, thing, second)
        frame += tile[row : row + size, column : column + size]
        if clip.clock:
            picture = _clock(clip.clock_at(second), int(size * CLOCK_SIDE))
            frame[: len(picture), : len(picture)] = picture
        frames[number] = np.clip(frame, 0, 255)
    return frames


def write_mp4(clip: Clip, path: Path, size: int = 224, fps: int = 8, crf: int = 23, overwrite: bool = False) -> Path:
    """Encode a clip as H.264.

    Args:
        clip: what to draw.
        path: of the file; written under a temporary name first.
        size: pixels along a side, even.
        fps: frames a second; frame k shows the time k / fps.
        crf: quality; larger is smaller and worse.
        overwrite: replace an existing file instead of refusing.

    Raises:
        InputError: the file exists, or the size is odd.
    """
    path = Path(path)
    if size % 2:
        raise InputError(f"H.264 files have an even number of pixels a side, not {size}; use {size + 1}")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or overwrite it explicitly")
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, fps)
        times = [k / fps for k in range(clip.seconds * fps)]
        for start in range(0, len(times), 64):
            for image in render_frames(clip, times[start : start + 64], size):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path
