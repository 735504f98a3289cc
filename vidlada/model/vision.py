"""From pixel values to visual tokens: SigLIP tower, projector, pooling, newline vectors."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionModel

from vidlada.model.config import VidLaDAConfig
from vidlada.tiling import ImageShape, MediaShape, pictures_of

FRAMES_PER_PASS = 16  # through the tower at once, where no gradients are needed: bounds the memory of long videos


def pool(features: Tensor, side: int, stride: int, mode: str) -> Tensor:
    """Pool each frame's grid.

    Args:
        features: (frames, patches, width).
        side: cells along a side of the result.
        stride: pooling stride; only average and max pooling use it.
        mode: bilinear (align_corners False, no antialiasing), average or max.

    Returns:
        (frames, side * side, width).
    """
    grid_side = int(features.shape[1] ** 0.5)
    grid = features.unflatten(1, (grid_side, grid_side)).permute(0, 3, 1, 2)  # (frames, width, rows, columns)
    if mode == "bilinear":
        grid = F.interpolate(grid, size=(side, side), mode="bilinear")
    elif mode == "average":
        grid = F.avg_pool2d(grid, stride)
    else:
        grid = F.max_pool2d(grid, stride)
    return grid.flatten(2).transpose(1, 2)


class Vision(nn.Module):
    """The visual half of the model.

    Args:
        config: the whole model's configuration.
    """

    def __init__(self, config: VidLaDAConfig):
        super().__init__()
        self.config = config
        vision_width, width = config.vision.hidden_size, config.text.hidden_size
        self.tower = SiglipVisionModel(config.vision_config)
        self.projector = nn.Sequential(nn.Linear(vision_width, width), nn.GELU(), nn.Linear(width, width))
        self.newline = nn.Parameter(torch.zeros(width))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Patch features of the last kept encoder layer, before the tower's final norm (which is not used).

        Args:
            pixel_values: (frames, 3, image_size, image_size).

        Returns:
            (frames, patches, tower width).
        """
        embedded = self.tower.embeddings(pixel_values.to(self.tower.embeddings.patch_embedding.weight.dtype))
        return self.tower.encoder(inputs_embeds=embedded).last_hidden_state

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Visual tokens of frames, without newlines.

        Args:
            pixel_values: (frames, 3, image_size, image_size).

        Returns:
            (frames, pooled_per_side ** 2, language width).
        """
        return self.pool(self.project(pixel_values))

    def project(self, pixel_values: Tensor) -> Tensor:
        """Patch features in the language model's space, not pooled: (pictures, patches, language width)."""
        if not torch.is_grad_enabled() and len(pixel_values) > FRAMES_PER_PASS:
            return torch.cat([self.project(part) for part in pixel_values.split(FRAMES_PER_PASS)])
        return self.projector(self.features(pixel_values))

    def pool(self, projected: Tensor) -> Tensor:
        """Pool frames from `project`: (frames, pooled_per_side ** 2, width)."""
        config = self.config
        return pool(projected, config.pooled_per_side, config.spatial_pool_stride, config.spatial_pool_mode)

    def encode(self, pixel_values: Tensor, shapes: Sequence[MediaShape]) -> list[Tensor]:
        """Visual tokens of several videos and images whose pictures are stacked; all pass the tower at once.

        Args:
            pixel_values: (all pictures, 3, image_size, image_size).
            shapes: of each medium, in order.

        Returns:
            One (visual tokens, width) tensor a medium.
        """
        parts = self.project(pixel_values).split([pictures_of(shape) for shape in shapes])
        return [self.lay_out(part, shape) for part, shape in zip(parts, shapes, strict=True)]

    def lay_out(self, projected: Tensor, shape: MediaShape) -> Tensor:
        """The visual tokens of one medium in reading order, newline vectors included.

        Args:
            projected: (pictures, patches, width), from `project`.
            shape: of the medium.

        Returns:
            (visual tokens, width).
        """
        if isinstance(shape, ImageShape):
            return self.lay_out_image(projected, shape)
        return self.with_newlines(self.pool(projected))

    def lay_out_image(self, projected: Tensor, shape: ImageShape) -> Tensor:
        """The tokens of the whole image, then those of the grid that its tiles form.

        Args:
            projected: (pictures, patches, width): the whole image, then its tiles row by row.
            shape: of the image.

        Returns:
            (visual tokens, width).
        """
        tiling, newline = self.config.tiling, self.newline.to(projected.dtype)
        whole, tiles = projected[0], projected[1:]
        unpad = self.config.image_merge_type == "spatial_unpad"
        if self.config.image_merge_type == "flat" or shape.tiles == 1:
            return torch.cat((projected.flatten(0, 1), newline[None])) if unpad else projected.flatten(0, 1)
        side = tiling.patches
        rows, columns = tiling.grid(shape)
        grid = tiles.unflatten(1, (side, side)).unflatten(0, (rows // side, columns // side))
        grid = grid.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # (rows, columns, width)
        if not unpad:
            return torch.cat((whole, grid.flatten(0, 1)))
        grid = grid[tiling.content_region(shape)]
        size = tiling.shrunk_size(grid.shape[0], grid.shape[1])
        if size != grid.shape[:2]:
            grid = F.interpolate(grid.permute(2, 0, 1)[None], size=size, mode="bilinear")[0].permute(1, 2, 0)
        grid = torch.cat((grid, newline.expand(grid.shape[0], 1, -1)), dim=1)
        return torch.cat((whole, grid.flatten(0, 1)))

    def with_newlines(self, pooled: Tensor) -> Tensor:
        """Lay one video's tokens out in reading order, newline vectors included.

        Args:
            pooled: (frames, cells, width), from `forward`.

        Returns:
            (visual tokens, width): frame after frame, row after row.
        """
        position = self.config.newline_position
        newline = self.newline.to(pooled.dtype)
        if position == "grid":
            rows = pooled.unflatten(1, (self.config.pooled_per_side, -1))  # (frames, rows, columns, width)
            column = newline.expand(*rows.shape[:2], 1, -1)
            return torch.cat((rows, column), dim=2).flatten(0, 2)
        if position == "frame":
            return torch.cat((pooled, newline.expand(pooled.shape[0], 1, -1)), dim=1).flatten(0, 1)
        tokens = pooled.flatten(0, 1)
        return torch.cat((tokens, newline[None])) if position == "one_token" else tokens
