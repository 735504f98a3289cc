"""Images of any shape as tiles for the vision tower (LLaVA's anyres), and the grid their visual tokens form.

Knows nothing of models or files, and imports no torch: the processes that decode strangers' files use it too. Pillow is
imported where an image is cut, so that a model runs without it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from vidlada.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

MergeType = Literal["spatial_unpad", "spatial", "flat"]
ASPECT_RATIO = re.compile(r"frame|pad|anyres(?:_max_([1-9]\d{0,2}))?")
PINPOINTS_PER_SIDE = 6  # the published pinpoints are all grids of 1 to 6 tiles on each side
SHRINK_ABOVE = 1.1  # times the side a grid may have; only beyond that it is shrunk, as published
GREY = 127  # what an image is padded with to a square, as published


@dataclass(frozen=True)
class ImageShape:
    """What the layout of an image's visual tokens depends on.

    Attributes:
        height, width: pixels.
        tiles: pictures that pass the tower: the whole image first; an untiled image has no further one.
    """

    height: int
    width: int
    tiles: int = 1


# What a medium is to the layout of its visual tokens: the number of a video's frames, or an image's shape.
MediaShape = int | ImageShape


def pictures_of(shape: MediaShape) -> int:
    """How many pictures of a medium pass the vision tower."""
    return shape.tiles if isinstance(shape, ImageShape) else shape


@dataclass(frozen=True)
class Tiling:
    """How a checkpoint takes images.

    Args:
        aspect_ratio: `anyres_max_N` (published, N = 4): tiles of the best-fitting pinpoint, their grid shrunk to about
            N tiles' worth of tokens; `anyres`: the same without shrinking; `pad`: squares without tiles; `frame`: an
            image is a video of one frame.
        tile: pixels along a side of a tile.
        patches: along a side of a tile.
        pinpoints: (width, height) resolutions to choose from; all grids of up to 6 × 6 tiles by default.
        merge_type: `spatial_unpad` (published): the grid of all tiles, less the padding, a newline after each row;
            `spatial`: that grid with its padding and without newlines; `flat`: tile after tile.

    Raises:
        InputError: there is no such aspect ratio.
    """

    aspect_ratio: str
    tile: int
    patches: int
    pinpoints: tuple[tuple[int, int], ...] | None = None
    merge_type: MergeType = "spatial_unpad"

    def __post_init__(self) -> None:
        if ASPECT_RATIO.fullmatch(self.aspect_ratio) is None:
            raise InputError(
                f"image_aspect_ratio {self.aspect_ratio!r} is unknown; use frame, pad, anyres or anyres_max_4"
            )
        if self.pinpoints is not None:  # lists where it was read from JSON
            object.__setattr__(self, "pinpoints", tuple(tuple(pinpoint) for pinpoint in self.pinpoints))

    @property
    def as_frames(self) -> bool:
        """An image is a video of one frame."""
        return self.aspect_ratio == "frame"

    @property
    def resolutions(self) -> tuple[tuple[int, int], ...]:
        """The pinpoints, (width, height)."""
        if self.pinpoints is not None:
            return self.pinpoints
        sides = [self.tile * number for number in range(1, PINPOINTS_PER_SIDE + 1)]
        return tuple((width, height) for width in sides for height in sides)

    def resolution_for(self, width: int, height: int) -> tuple[int, int]:
        """The pinpoint that keeps most of an image's pixels, and of those the one that wastes least.

        Raises:
            InputError: it is not made of whole tiles.
        """

        def rank(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[0] / width, pinpoint[1] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        best = max(self.resolutions, key=rank)
        if any(side < self.tile or side % self.tile for side in best):
            raise InputError(f"image_grid_pinpoints: {list(best)} is not made of whole tiles of {self.tile} pixels")
        return best

    def shape_of(self, height: int, width: int, alone: bool = True) -> ImageShape:
        """The shape an image of so many pixels will have; see `cut`."""
        if not alone or not self.aspect_ratio.startswith("anyres"):
            return ImageShape(height, width)
        columns, rows = (side // self.tile for side in self.resolution_for(width, height))
        return ImageShape(height, width, 1 + columns * rows)

    def cut(self, image: np.ndarray, alone: bool = True) -> tuple[np.ndarray, ImageShape]:
        """The pictures of an image that pass the vision tower.

        Args:
            image: (height, width, 3) uint8 RGB.
            alone: it is the only image of its conversation; each of several is padded to a square instead of tiled.

        Returns:
            (pictures, tile, tile, 3) uint8, and its shape.
        """
        from PIL import Image

        shape = self.shape_of(image.shape[0], image.shape[1], alone)
        picture = Image.fromarray(image)
        if shape.tiles == 1:
            return self._resize(_square(picture))[None], shape
        target = self.resolution_for(shape.width, shape.height)
        scale = min(target[0] / shape.width, target[1] / shape.height)
        fitted = [min(math.ceil(side * scale), most) for side, most in zip(picture.size, target, strict=True)]
        canvas = Image.new("RGB", target)
        place = ((target[0] - fitted[0]) // 2, (target[1] - fitted[1]) // 2)
        canvas.paste(picture.resize((fitted[0], fitted[1]), Image.Resampling.BICUBIC), place)
        rows, columns = target[1] // self.tile, target[0] // self.tile
        tiles = np.asarray(canvas).reshape(rows, self.tile, columns, self.tile, 3).swapaxes(1, 2)
        return np.concatenate((self._resize(picture)[None], tiles.reshape(-1, self.tile, self.tile, 3))), shape

    def _resize(self, picture: Image.Image) -> np.ndarray:
        from PIL import Image

        return np.asarray(picture.resize((self.tile, self.tile), Image.Resampling.BICUBIC))

    # --- the grid of visual tokens ---

    def grid(self, shape: ImageShape) -> tuple[int, int]:
        """Rows and columns of the patches of all tiles together."""
        width, height = self.resolution_for(shape.width, shape.height)
        return height // self.tile * self.patches, width // self.tile * self.patches

    def content_region(self, shape: ImageShape) -> tuple[slice, slice]:
        """Rows and columns of the grid that show the image and not its padding."""
        rows, columns = self.grid(shape)
        if shape.width / shape.height > columns / rows:
            return _middle(rows, int(shape.height * (columns / shape.width))), slice(0, columns)
        return slice(0, rows), _middle(columns, int(shape.width * (rows / shape.height)))

    def shrunk_size(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of an unpadded grid once it is shrunk, where it is too large."""
        found = ASPECT_RATIO.fullmatch(self.aspect_ratio)
        if found is None or found[1] is None:
            return rows, columns
        times = math.sqrt(rows * columns / (int(found[1]) * self.patches**2))
        if times <= SHRINK_ABOVE:
            return rows, columns
        return max(1, int(rows // times)), max(1, int(columns // times))

    def tokens(self, shape: ImageShape) -> int:
        """Visual tokens of an image."""
        return len(self.newlines(shape))

    def newlines(self, shape: ImageShape) -> list[bool]:
        """Which of the visual tokens of an image, in reading order, are newlines."""
        whole = [False] * self.patches**2
        if self.merge_type != "spatial_unpad":
            return whole * shape.tiles
        if shape.tiles == 1:
            return [*whole, True]
        rows, columns = (part.stop - part.start for part in self.content_region(shape))
        rows, columns = self.shrunk_size(rows, columns)
        return whole + ([False] * columns + [True]) * rows


def _middle(total: int, kept: int) -> slice:
    """The middle of so many rows or columns, at least one; both sides lose the same, as published."""
    cut = min((total - kept) // 2, (total - 1) // 2)
    return slice(cut, total - cut)


def _square(picture: Image.Image) -> Image.Image:
    """An image in the middle of a grey square."""
    from PIL import Image

    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = Image.new("RGB", (side, side), (GREY, GREY, GREY))
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
