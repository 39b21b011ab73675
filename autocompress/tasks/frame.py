"""From a stored image to one of the network's size; shifted, cropped and mirrored for training.

Random numbers come in from outside, one row per image, so that an image comes out the same whoever decodes it and in
whatever order: columns AREA, SHAPE, ACROSS, DOWN, MIRROR, each uniform in [0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

Draws = NDArray[np.float64]
AREA, SHAPE, ACROSS, DOWN, MIRROR = range(5)
PAD = 4
"""Pixels by which small images are shifted at most (He et al. 2016, "Deep residual learning", section 4.2)."""
SMALLEST, NARROWEST = 0.25, 3 / 4
"""Of a random crop: share of the image, width over height (Szegedy et al. 2015, section 6, who begin at 8 %)."""
BILINEAR = 2
"""PIL.Image.Resampling.BILINEAR, without importing PIL."""


@dataclass(frozen=True)
class Frame:
    """What the network is fed, in pixels. `margin`: how much larger an image is made before its centre is cut out."""

    height: int
    width: int
    margin: float = 1.0

    def picture(self, image: Any, draw: Draws | None = None) -> NDArray[np.uint8]:
        """A PIL image as (height, width[, channels]): its centre, or a random crop where there is a draw (5,).

        The centre as torchvision's Resize and CenterCrop cut it.
        """
        if draw is not None:
            box = self._box(image.width, image.height, draw)
            return np.asarray(image.resize((self.width, self.height), BILINEAR, box=box))
        wide, high, left, top = self._centre(image.width, image.height)
        if (wide, high) != image.size:
            image = image.resize((wide, high), BILINEAR)
        return np.asarray(image.crop((left, top, left + self.width, top + self.height)))

    def pictures(self, images: NDArray[Any], draws: Draws | None = None) -> NDArray[Any]:
        """The same for images (n, h, w, channels) of one size, uint8 or float32; as they are if they fit."""
        high, wide = images.shape[1:3]
        if draws is None:
            if (high, wide) == (self.height, self.width) and self.margin == 1:
                return images
            wide, high, left, top = self._centre(wide, high)
            resized = _resized(images, high, wide)
            return resized[:, top : top + self.height, left : left + self.width]
        cropped: list[NDArray[Any]] = []
        for image, draw in zip(images, draws, strict=True):
            left, top, right, bottom = (round(edge) for edge in self._box(wide, high, draw))
            part = image[None, top : max(bottom, top + 1), left : max(right, left + 1)]
            cropped.append(_resized(part, self.height, self.width))
        return np.concatenate(cropped)

    def _centre(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Width and height to resize to, and the left and top edge of the centre in it."""
        scale = self.margin * max(self.width / width, self.height / height)
        wide, high = max(self.width, int(width * scale + 1e-6)), max(self.height, int(height * scale + 1e-6))
        return wide, high, round((wide - self.width) / 2), round((high - self.height) / 2)

    def _box(self, width: int, height: int, draw: Draws) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of a random crop, as close to the frame's shape as drawn and as fits."""
        area = (SMALLEST + (1 - SMALLEST) * draw[AREA]) * width * height
        shape = exp((2 * draw[SHAPE] - 1) * log(1 / NARROWEST)) * self.width / self.height
        wide, high = min(sqrt(area * shape), width), min(sqrt(area / shape), height)
        left, top = draw[ACROSS] * (width - wide), draw[DOWN] * (height - high)
        return left, top, left + wide, top + high


def shifted(images: NDArray[Any], draws: Draws) -> NDArray[Any]:
    """Images (n, h, w, c) moved by up to PAD pixels, black coming in, and mirrored: one gather in all."""
    count, high, wide, _ = images.shape
    padded = np.pad(images, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
    offsets = (draws[:, [DOWN, ACROSS]] * (2 * PAD + 1)).astype(np.intp)
    rows = offsets[:, :1] + np.arange(high)
    columns = offsets[:, 1:] + _mirrored(wide, draws)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def mirrored(images: NDArray[Any], draws: Draws) -> NDArray[Any]:
    """Images (n, h, w, c), half of them from right to left."""
    return np.where(_coins(draws)[:, None, None, None], images[:, :, ::-1], images)


def _coins(draws: Draws) -> NDArray[np.bool_]:
    return draws[:, MIRROR] < 0.5


def _mirrored(wide: int, draws: Draws) -> NDArray[np.intp]:
    """Columns to read, per image (n, wide)."""
    columns = np.arange(wide)
    return np.where(_coins(draws)[:, None], columns[::-1], columns)


def _resized(images: NDArray[Any], high: int, wide: int) -> NDArray[Any]:
    """Bilinear with antialiasing, of the same type."""
    if images.shape[1:3] == (high, wide):
        return images
    planes = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    found: Tensor = functional.interpolate(planes, size=(high, wide), mode="bilinear", antialias=True)
    found = found.permute(0, 2, 3, 1)
    return (found.round().clamp(0, 255).to(torch.uint8) if images.dtype == np.uint8 else found).numpy()
