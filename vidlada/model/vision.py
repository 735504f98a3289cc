"""From pixel values to visual tokens: SigLIP tower, projector, pooling, newline vectors."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionModel

from vidlada.model.config import VidLaDAConfig

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
        """Visual tokens without newlines.

        Args:
            pixel_values: (frames, 3, image_size, image_size).

        Returns:
            (frames, pooled_per_side ** 2, language width).
        """
        if not torch.is_grad_enabled() and len(pixel_values) > FRAMES_PER_PASS:
            return torch.cat([self(part) for part in pixel_values.split(FRAMES_PER_PASS)])
        projected = self.projector(self.features(pixel_values))
        config = self.config
        return pool(projected, config.pooled_per_side, config.spatial_pool_stride, config.spatial_pool_mode)

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
