"""From pixels to a track: where the sprite is in each frame, what it looks like, and how clean the picture is.

The sprite is what differs from the background. Frames are a torus, so is every position. What generated clips really show
must not fool the tracker: a faint second sprite (the brighter one is followed, and it must become clearly brighter before
the track jumps to it), blur, fading, noise (the threshold follows the frame's own noise), chroma subsampling.

Shapes: T pixel frames, H rows, W columns, P side of the patch around the sprite, S shapes of the world.
Colours are RGB in [0, 1], positions (x, y) in pixels with y downwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rfbench import world
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.scorers.base import Answer, ClipError, Metric, Pixels, each, read_video, verify_video
from rfbench.scorers.trajectory import Trajectory, straighten

Array = npt.NDArray[np.float32]

BLOCK = 4  # pixels: the coarse grid on which the brightest blob is looked for
REACH = 13  # pixels from the centroid that belong to the sprite: the tip of the largest triangle is 11.7 away, plus its soft edge
FLOOR = 0.06  # colour distance from the background that is never counted: autoencoder ringing, codec noise
NOISE = 2.5  # times the frame's median distance is not counted either
MASS = 12.0  # colour distance summed over the patch below which there is no sprite; a full one has 130 to 200
SWITCH = 0.6  # the track stays with its blob until that has less than this share of the brightest blob's mass
EDGE = 0.12  # pixels by which the soft edge makes the radius of the equal area too large
RADII = (6.0, 8.0)  # the world's are 6.5 to 7.5; anything further away is a flaw that must show

PALETTE = np.array(list(world.COLOURS.values()), dtype=np.float32)
PALETTE_CONTRAST = PALETTE - np.float32(world.BACKGROUND)


@dataclass(frozen=True)
class Track:
    """What one clip shows.

    path                 positions, the straight pieces they lie on, and where there is a sprite at all
    colour       [T]     index into the world's COLOURS of the nearest hue, -1 where there is no sprite
    shape        [T]     index into the world's SHAPES of the best fit, -1 where there is no sprite
    fidelity     [T]     1 for a frame that is exactly a clean sprite on the clean background, 0 for one without a sprite
    like_first   [T]     likeness of the re-centred sprite to that of the first frame that has one, 0 to 1
    like_last    [T]     likeness of the re-centred sprite to that of the frame before, 0 to 1 (frame 0: to itself)
    first_seen   [T]     share of the first frame's sprite that is found in place, 0 to 1, be it as the sprite or as a ghost
    first_overlap [H, W] the share that would be found, had the sprite moved by (y, x)
    """

    path: Trajectory
    colour: npt.NDArray[np.int64]
    shape: npt.NDArray[np.int64]
    fidelity: Array
    like_first: Array
    like_last: Array
    first_seen: Array
    first_overlap: Array


@dataclass(frozen=True)
class SpriteScorer:
    """A scorer that judges each clip alone, from its track. The track is kept, so that the next scorer need not decode again."""

    name: str
    version: str
    metrics: Mapping[str, Metric]
    measure: Callable[[Clip, Track], Iterator[Score]]
    elsewhere: str = ""  # the scorer of the same for other videos
    weights: Mapping[str, str] = field(default_factory=dict)
    together: bool = False

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """An answer for each clip; refused are those of other worlds, and videos that are missing, altered, broken or too short."""

        def judge(clip: Clip) -> Iterator[Score]:
            try:
                world.parse(clip.prompt)
            except UserError as error:
                hint = f"; -s {self.elsewhere} is for any video" if self.elsewhere else ""
                raise ClipError(f"clip {clip.id} is not of the toy world: {error}{hint}") from None
            verify_video(out, clip)  # at each call: the kept track must not outlive the file
            return self.measure(clip, _track_of(out.resolve(), clip))

        return each(clips, judge)


@functools.lru_cache(maxsize=512)  # about 50 kB each for 30 s clips
def _track_of(run: Path, clip: Clip) -> Track:
    side = 2 * REACH + 2
    if clip.frames < 3 or clip.height % BLOCK or clip.width % BLOCK or min(clip.height, clip.width) < side:
        raise ClipError(
            f"clip {clip.id} is {clip.frames} frames of {clip.width}x{clip.height}; the toy scorers need at least 3 frames "
            f"of {side}x{side} or more, with sides that are multiples of {BLOCK}"
        )
    return track(read_video(run, clip))


def track(frames: Pixels) -> Track:
    """Follow the sprite through uint8 [T, H, W, 3], T >= 3."""
    picture = frames.astype(np.float32) * np.float32(1 / 255)
    sample = picture[:, ::2, ::2].reshape(len(picture), -1, 3)  # a quarter of the pixels is enough for medians
    ground = np.median(sample, axis=1)[:, None, None]
    noise = np.median(_norm(sample - ground[:, 0]), axis=1)
    contrast = picture - ground  # [T, H, W, 3]
    weight = np.maximum(_norm(contrast) - (FLOOR + NOISE * noise)[:, None, None], 0)

    centre = _centroids(weight)  # [T, 2]
    corner = np.floor(centre).astype(np.int64)
    shift = (centre - corner).astype(np.float32)
    patch_weight = _patches(weight, corner)
    visible = patch_weight.sum(axis=(1, 2)) >= MASS
    patch = _patches(contrast, corner) * visible[:, None, None, None]

    core = patch_weight**6  # the middle of the sprite: its edge is a mixture with the background
    ink = np.einsum("tyx,tyxc->tc", core, patch) / np.maximum(core.sum(axis=(1, 2)), 1e-6)[:, None]
    colour = _nearest_colour(ink)
    alpha = np.clip(np.einsum("tyxc,tc->tyx", patch, ink / np.maximum((ink**2).sum(axis=1, keepdims=True), 1e-6)), 0, 1.2)
    shape, template = _best_shape(alpha, shift)
    fidelity = _fidelity(picture, _patches(picture, corner), template, colour) * visible

    first = int(np.argmax(visible))
    first_seen, first_overlap = _first_frame_again(contrast, patch, corner[first], first)
    aligned = _align(patch, shift)
    return Track(
        path=straighten(centre, visible, (frames.shape[2], frames.shape[1])),
        colour=np.where(visible, colour, -1),
        shape=np.where(visible, shape, -1),
        fidelity=fidelity,
        like_first=_likeness(aligned, aligned[first]),
        like_last=_likeness(aligned, np.concatenate([aligned[:1], aligned[:-1]])),
        first_seen=first_seen,
        first_overlap=first_overlap,
    )


def _norm(difference: Array) -> Array:
    return np.sqrt(np.einsum("...c,...c->...", difference, difference))


def _patches(of: Array, corner: npt.NDArray[np.int64]) -> Array:
    """Cut out [T, P, P, ...] with P = 2 REACH + 2: from REACH before the corner pixel to REACH + 1 after it."""
    side = np.arange(-REACH, REACH + 2)
    rows = (corner[:, 1, None] + side) % of.shape[1]
    columns = (corner[:, 0, None] + side) % of.shape[2]
    flat = rows[:, :, None] * of.shape[2] + columns[:, None, :] + (np.arange(len(of)) * of.shape[1] * of.shape[2])[:, None, None]
    return np.take(of.reshape(-1, *of.shape[3:]), flat, axis=0)


def _centroids(weight: Array) -> npt.NDArray[np.float64]:
    """Centre of the followed blob, [T, 2] in the frame's range: the blob on a coarse grid, then the centroid around it."""
    count, height, width = weight.shape
    grid = weight.reshape(count, height // BLOCK, BLOCK, width // BLOCK, BLOCK).sum(axis=(2, 4))
    grid = sum(np.roll(grid, k, axis=1) for k in (-1, 0, 1))
    grid = sum(np.roll(grid, k, axis=2) for k in (-1, 0, 1))
    rows, columns = grid.shape[1:]
    brightest = grid.reshape(count, -1).argmax(axis=1)
    near = np.arange(-1, 2)
    centre = np.empty((count, 2))
    row, column = divmod(int(brightest[0]), columns)
    for t in range(count):
        around_rows, around_columns = (row + near) % rows, (column + near) % columns
        around = grid[t][around_rows[:, None], around_columns]
        best = int(around.argmax())
        if around.flat[best] >= SWITCH * grid[t].flat[brightest[t]]:
            row, column = int(around_rows[best // 3]), int(around_columns[best % 3])
        else:
            row, column = divmod(int(brightest[t]), columns)
        centre[t] = (column + 0.5) * BLOCK - 0.5, (row + 0.5) * BLOCK - 0.5
    offset = np.arange(-REACH, REACH + 2, dtype=np.float32)
    for _ in range(3):  # the patch moves to where its mass is, until all of the sprite is inside
        corner = np.floor(centre).astype(np.int64)
        mass = _patches(weight, corner)
        total = np.maximum(mass.sum(axis=(1, 2)), 1e-6)
        centre = corner + np.stack([mass.sum(axis=1) @ offset, mass.sum(axis=2) @ offset], axis=1) / total[:, None]
    return centre % (width, height)


def _nearest_colour(ink: Array) -> npt.NDArray[np.int64]:
    """The colour whose difference from the background points most nearly the same way, however faint: [T, 3] -> [T]."""
    unit = PALETTE_CONTRAST / _norm(PALETTE_CONTRAST)[:, None]
    return np.asarray((ink @ unit.T).argmax(axis=1))


def _best_shape(alpha: Array, shift: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Which shape of the measured area fits the coverage [T, P, P] best, and the coverage of a clean sprite of that shape."""
    offset = np.arange(-REACH, REACH + 2, dtype=np.float32)
    dx = (offset - shift[:, 0, None])[:, None, :]
    dy = (offset - shift[:, 1, None])[:, :, None]
    radius = (np.sqrt(alpha.sum(axis=(1, 2)) / np.pi) - EDGE)[:, None, None].astype(np.float32)
    misfit = np.stack([((world.sprite(name, radius, dx, dy) - alpha) ** 2).sum(axis=(1, 2)) for name in world.SHAPES])
    shape = misfit.argmin(axis=0)
    clean = np.empty_like(alpha)
    for index, name in enumerate(world.SHAPES):
        chosen = shape == index
        clean[chosen] = world.sprite(name, np.clip(radius[chosen], *RADII), dx[chosen], dy[chosen])
    return shape, clean


def _fidelity(picture: Array, patch: Array, template: Array, colour: npt.NDArray[np.int64]) -> Array:
    """One minus the root of the energy of what a clean frame does not explain, over the energy of both frames: [T] in [0, 1]."""
    ground = np.float32(world.BACKGROUND)
    all_of_it = picture - ground
    seen = patch - ground
    clean = template[..., None] * PALETTE_CONTRAST[colour][:, None, None]
    total = np.einsum("tyxc,tyxc->t", all_of_it, all_of_it)
    ideal = np.einsum("tyxc,tyxc->t", clean, clean)
    shared = np.einsum("tyxc,tyxc->t", seen, clean)
    return np.asarray(1 - np.sqrt(np.clip((total + ideal - 2 * shared) / (total + ideal), 0, 1)), dtype=np.float32)


def _first_frame_again(contrast: Array, patch: Array, corner: npt.NDArray[np.int64], first: int) -> tuple[Array, Array]:
    """`first_seen` [T] and `first_overlap` [H, W] of a Track, from the patch of frame `first` that was cut out at `corner`.

    A share is a projection on the first frame's sprite. It is divided by the energy of either sprite, whichever is larger, so
    that one that has become brighter is no more of a copy.
    """
    start = np.zeros_like(contrast[0])
    side = np.arange(-REACH, REACH + 2)
    start[np.ix_((corner[1] + side) % start.shape[0], (corner[0] + side) % start.shape[1])] = patch[first]
    energy = np.maximum((patch**2).sum(axis=(1, 2, 3)), 1e-6)
    seen = np.einsum("tyxc,yxc->t", contrast, start) / np.maximum(energy, energy[first])
    spectrum = np.abs(np.fft.rfft2(start, axes=(0, 1))) ** 2  # of the autocorrelation
    overlap = np.fft.irfft2(spectrum, start.shape[:2], axes=(0, 1)).sum(axis=-1) / energy[first]
    return np.clip(seen, 0, 1), overlap.astype(np.float32)


def _align(patch: Array, shift: Array) -> Array:
    """Move each patch by the fraction of a pixel that puts its centroid on the grid: [T, P, P, 3] -> [T, P-1, P-1, 3]."""
    fx, fy = shift[:, 0, None, None, None], shift[:, 1, None, None, None]
    across = patch[:, :, :-1] * (1 - fx) + patch[:, :, 1:] * fx
    return np.asarray(across[:, :-1] * (1 - fy) + across[:, 1:] * fy, dtype=np.float32)


def _likeness(a: Array, b: Array) -> Array:
    """2 <a, b> / (|a|^2 + |b|^2) of patches [T, P, P, 3], clipped to [0, 1]; 0 where both are empty."""
    b = np.broadcast_to(b, a.shape)
    both = np.einsum("tyxc,tyxc->t", a, a) + np.einsum("tyxc,tyxc->t", b, b)
    return np.clip(2 * np.einsum("tyxc,tyxc->t", a, b) / np.maximum(both, 1e-6), 0, 1)
