"""How alike two pictures are: peak signal-to-noise ratio and structural similarity.

Shapes: T pixel frames, H rows, W columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rfbench.scorers.base import Pixels

Floats = npt.NDArray[np.float64]

RADIUS, SIGMA = 5, 1.5  # of the window of structural similarity: 11x11 (Wang et al. 2004)
SIDE = 2 * RADIUS + 1
STEADY = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # C1 and C2 there
SAME = 100.0  # dB, of two videos without any difference and at most
LUMA = np.array([0.299, 0.587, 0.114])  # BT.601


def psnr(a: Pixels, b: Pixels) -> float:
    """10 log10(255^2 / mean squared difference) in dB over all of [T, H, W, 3], at most SAME."""
    squared = np.mean([np.mean((one.astype(np.float64) - other) ** 2) for one, other in zip(a, b, strict=True)])
    return SAME if squared == 0 else min(SAME, float(10 * np.log10(255**2 / squared)))


def ssim(a: Pixels, b: Pixels) -> float:
    """Mean structural similarity of the luma of two pictures [H, W, 3], over the places where the whole window fits: H, W >= SIDE."""
    x, y = a @ LUMA, b @ LUMA
    mean_x, mean_y = _windowed(x), _windowed(y)
    var_x, var_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    both = _windowed(x * y) - mean_x * mean_y
    c1, c2 = STEADY
    alike = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(alike.mean())


def _windowed(picture: Floats) -> Floats:
    """Gaussian means of [H, W] in windows of SIDE: [H - 2 RADIUS, W - 2 RADIUS]."""
    taps = np.exp(-(np.arange(-RADIUS, RADIUS + 1) ** 2) / (2 * SIGMA**2))
    taps /= taps.sum()
    rows = sum(tap * picture[k : len(picture) - 2 * RADIUS + k] for k, tap in enumerate(taps))
    return np.asarray(sum(tap * rows[:, k : picture.shape[1] - 2 * RADIUS + k] for k, tap in enumerate(taps)))
