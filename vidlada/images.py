"""Picture files to upright RGB arrays: still, animated and paged ones, of every mode Pillow can open. Knows nothing of
videos or models."""

import io
import mmap
import re
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from vidlada.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})
SIGNATURES = re.compile(rb"\x89PNG\r\n\x1a\n|RIFF....WEBP|II\*\0|MM\0\*|\xff\xd8\xff", re.DOTALL)
JPEG_START, JPEGS_IN_A_ROW = b"\xff\xd8\xff", b"\xff\xd9\xff\xd8\xff"
BACKGROUNDS: dict[str, int] = {"white": 255, "black": 0}
MANY_FRAMES = frozenset({"PNG", "WEBP", "GIF", "AVIF", "TIFF"})  # others (MPO) keep previews of the one picture
UNTIMED_SECONDS = 0.1  # how long browsers show a frame whose duration is 0
SUBFILE_TYPE, REDUCED, MASK = 254, 1, 4  # TIFF pages that are a smaller copy or a mask of another


def is_picture(path: Path) -> bool:
    """Whether a file is to be read as a picture: by its suffix, or, whatever its name, by how it begins. JPEGs one
    after the other are a camera's video."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(12)
        if not SIGNATURES.match(start):
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return not start.startswith(JPEG_START) or data.find(JPEGS_IN_A_ROW) < 0


def natural_order(name: str) -> list[tuple[int, str]]:
    """Sort key of file names by which 2 comes before 10."""
    return [(int(part), "") if part[0] in "0123456789" else (-1, part) for part in re.findall(r"[0-9]+|[^0-9]+", name)]


@dataclass(frozen=True)
class ImageInfo:
    """Size and frame times of an image file.

    Attributes:
        width, height: pixels, upright.
        format: as Pillow names it, in lower case.
        pages: numbers of the pictures in the file, in order.
        seconds: when each of an animation's pictures is shown; None where the file has no times.
        duration: seconds an animation lasts.
    """

    width: int
    height: int
    format: str
    pages: tuple[int, ...]
    seconds: tuple[float, ...] | None = None
    duration: float = 0.0


def open_images(source: str | Path | bytes, background: str = "white") -> list[np.ndarray]:
    """Read all images of a file: one of a still image, several of an animation or a paged TIFF.

    Args:
        source: path or content of the file.
        background: what transparent places are laid on, `white` or `black`.

    Returns:
        Each (height, width, 3) uint8 RGB, turned as its EXIF orientation says. Of more than 8 bits, or of floating
        point, the whole range is kept (see `to_rgb`).

    Raises:
        InputError: it cannot be read, and why.
    """
    return [image for _, image in read_images(source, image_info(source).pages, background)]


def image_info(source: str | Path | bytes) -> ImageInfo:
    """Read the size of an image file and, for an animation, the times of its frames.

    Raises:
        InputError: it is not a picture Pillow can open, and why.
    """
    with _open(source) as image:
        name = (image.format or "image").lower()
        pages = _pages(image)
        seconds, duration = None, 0.0
        if len(pages) > 1 and image.format != "TIFF":
            durations = [_shown_seconds(image, page) for page in pages]
            seconds, duration = tuple(np.cumsum([0.0, *durations[:-1]]).tolist()), sum(durations)
        image.seek(pages[0])
        return ImageInfo(*_upright_size(image), name, tuple(pages), seconds, duration)


def read_images(
    source: str | Path | bytes, pages: Sequence[int], background: str = "white"
) -> Iterator[tuple[int, np.ndarray]]:
    """Read some images of a file.

    Args:
        source: path or content of the file.
        pages: numbers of the wanted pictures, ascending.
        background: what transparent places are laid on, `white` or `black`.

    Yields:
        The number of each picture and its (height, width, 3) uint8 RGB.

    Raises:
        InputError: it cannot be read, and why.
    """
    with _open(source) as image:
        for page in pages:
            image.seek(page)
            turned = ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
            yield page, to_rgb(turned, BACKGROUNDS[background])


class StrictReading:
    """Pillow refuses truncated images while this is entered, by any number of threads, although another library of this
    process (lmms-eval) lets it fill them up with grey."""

    def __init__(self) -> None:
        self.lock, self.readers, self.before = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self.lock:
            if not self.readers:
                self.before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self.readers += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.readers -= 1
            if not self.readers:
                ImageFile.LOAD_TRUNCATED_IMAGES = self.before


STRICT = StrictReading()


@contextmanager
def _open(source: str | Path | bytes) -> Iterator[Image.Image]:
    """Open an image, turning Pillow's errors into ours."""
    name = "the image" if isinstance(source, bytes) else str(source)
    try:
        with STRICT, Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except (InputError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise InputError(f"{name}: cannot be read as an image: its format is not known, or it is damaged") from error
    except Exception as error:  # the readers of damaged files raise all kinds
        raise InputError(f"{name}: cannot be read as an image: {error or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, from 1 to 8; 1 where the EXIF data is damaged, as every viewer takes it."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, TypeError, struct.error):
        return 1
    return found if found in range(1, 9) else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height after the EXIF rotation, without decoding."""
    sideways = _orientation(image) in (5, 6, 7, 8)
    if sideways and image.format != "TIFF":  # whose reader has turned the size already
        return image.height, image.width
    return image.width, image.height


def _pages(image: Image.Image) -> list[int]:
    """Numbers of the pictures a file is about, without previews, masks and an animation's stand-in."""
    if image.format not in MANY_FRAMES:
        return [0]
    count = int(getattr(image, "n_frames", 1))
    if image.format == "TIFF" and count > 1:
        kinds = []
        for page in range(count):
            image.seek(page)
            kinds.append(int(image.tag_v2.get(SUBFILE_TYPE, 0)))  # type: ignore[attr-defined]
        return [page for page in range(count) if not kinds[page] & (REDUCED | MASK)] or [0]
    # an APNG may begin with a picture for readers that know no animations
    first = int(count > 1 and bool(getattr(image, "default_image", False)))
    return list(range(first, count))


def _shown_seconds(image: Image.Image, page: int) -> float:
    """Return how long a frame of an animation is shown, in seconds."""
    image.seek(page)
    image.load()  # WebP knows it only then
    return float(image.info.get("duration") or 1000 * UNTIMED_SECONDS) / 1000


def to_rgb(image: Image.Image, background: int = 255) -> np.ndarray:
    """Convert a Pillow image of any mode to (height, width, 3) uint8 RGB.

    More than 8 bits: 0 stays black, and white is the largest number of as many bits as the brightest place needs (a
    12-bit camera's pictures come in 16 bits). Floating point: 0 to 1 is black to white, likewise. Pictures with
    negative places are stretched from their darkest to their brightest.

    Args:
        image: loaded or not.
        background: grey value that transparent places are laid on.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        grey = grey_levels(np.asarray(image))
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "LAB":
        return _lab_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (background,) * 3 + (255,))
        image = Image.alpha_composite(ground, image)
    return np.array(image.convert("RGB"))


def grey_levels(values: np.ndarray) -> np.ndarray:
    """Scale values of any range to uint8; see `to_rgb`."""
    wide = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(wide.min()), float(wide.max())
    if low < 0:
        scaled = (wide - low) / (high - low) if high > low else np.zeros_like(wide)
    elif values.dtype.kind == "f" and high <= 1:
        scaled = wide
    else:
        white = 2.0 ** max(8, int(np.ceil(np.log2(high + 1)))) - 1
        scaled = wide / white
    return np.round(255 * scaled).astype(np.uint8)


def _lab_to_rgb(image: Image.Image) -> np.ndarray:
    from PIL import ImageCms

    convert: Callable[..., Image.Image] = ImageCms.profileToProfile  # type: ignore[assignment]
    rgb = convert(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB")
    return np.array(rgb)
