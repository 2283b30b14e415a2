"""Loggers whose backend takes images and figures."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch

from fabric_lite.collectives import rank
from fabric_lite.errors import FabricTypeError, FabricValueError
from fabric_lite.loggers.logger import Logger

__all__ = ["PictureLogger", "drawn", "pixels"]


class PictureLogger(Logger):
    """A logger that takes images and figures besides scalars."""

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Log one image; on other ranks than 0 this does nothing.

        Args:
            name: Under which it stands.
            image: A tensor or array ``(height, width)`` or ``(channels, height, width)`` with 1, 3 or 4 channels:
                floats from 0 to 1, or uint8.
            step: Which it is of; None: the last that was logged.

        Raises:
            FabricTypeError, FabricValueError: It is no such image.
        """
        if rank() == 0:
            array, at = pixels(image), max(self._step, 0) if step is None else int(step)
            self.guard.attempt(self.write_image, name, array, at)

    def log_figure(self, name: str, figure: Any, step: int | None = None) -> None:
        """Log a figure of matplotlib; on other ranks than 0 this does nothing."""
        if rank() == 0:
            self.guard.attempt(self.write_figure, name, figure, max(self._step, 0) if step is None else int(step))

    @abc.abstractmethod
    def write_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Write an image ``(height, width, channels)`` of uint8; on rank 0."""

    @abc.abstractmethod
    def write_figure(self, name: str, figure: Any, step: int) -> None:
        """Write a figure of matplotlib; on rank 0."""


def pixels(image: Any) -> np.ndarray:
    """An image as ``(height, width, channels)`` of uint8.

    Raises:
        FabricTypeError: It is neither a tensor nor an array, or of another dtype than floats and uint8.
        FabricValueError: It has another shape.
    """
    array = image.detach().cpu() if isinstance(image, torch.Tensor) else image
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.is_floating_point() else array).numpy()
    if not isinstance(array, np.ndarray) or not (array.dtype == np.uint8 or np.issubdtype(array.dtype, np.floating)):
        raise FabricTypeError(
            "An image is a tensor or array of floats from 0 to 1, or of uint8.",
            given=f"{type(image).__name__} of {getattr(image, 'dtype', 'no dtype')}",
            fix="(channels, height, width), such as image / 255",
        )
    if array.ndim == 2:
        array = array[None]
    if array.ndim != 3 or array.shape[0] not in (1, 3, 4):
        raise FabricValueError(
            "An image is (height, width), or (channels, height, width) with 1, 3 or 4 channels.",
            given=f"shape {tuple(array.shape)}",
            fix="image.permute(2, 0, 1) where the channels are last",
        )
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array).clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(array.transpose(1, 2, 0))


def drawn(figure: Any) -> np.ndarray:
    """A figure of matplotlib as ``(height, width, 4)`` of uint8; where it was to be drawn before does not change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    before = figure.canvas
    try:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()
    finally:
        figure.set_canvas(before)
