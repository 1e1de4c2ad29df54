"""The toy world: one soft sprite that drifts over a torus, and the captions that describe it.

A clip is drawn from a `Scene`; a `Scene` is drawn from a caption, which may leave the direction or the speed open. Open
speeds are wide and skewed towards stillness, so that "more motion at the same fidelity" is a region of the data that a
reward can move a student towards. Frames wrap around at the edges, so a direction holds for a clip of any length.

Units: pixels, pixel frames (16 per second), pixels per frame. The origin is the top left pixel; y grows downwards.
Shapes: T pixel frames, H rows, W columns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rfbench.errors import UserError, did_you_mean

HEIGHT, WIDTH, FPS = 48, 64, 16
CHANGE_FRAME = 41  # a "then" takes effect here: the first frame of latent 11 of 21, the middle of a 5 s clip
START = 4.0  # a clip begins within so many pixels of the middle, so that where a sprite is tells how it has moved
BACKGROUND = 0.12  # grey level in [0, 1]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.95, 0.20, 0.20),
    "green": (0.20, 0.90, 0.25),
    "blue": (0.25, 0.35, 1.00),
    "yellow": (0.95, 0.90, 0.15),
    "cyan": (0.15, 0.90, 0.95),
    "magenta": (0.95, 0.25, 0.90),
}
SHAPES = ("disc", "square", "triangle")
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
SPEEDS = {"slowly": 0.15, "quickly": 0.6}  # pixels per frame, +-10 % from clip to clip
MAX_OPEN_SPEED = 0.8  # an open speed is MAX_OPEN_SPEED * u**2 for uniform u: median 0.2, a quarter below 0.05
WORDS = ("a", *COLOURS, *SHAPES, "moves", *DIRECTIONS, *SPEEDS, "then")

Frames = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Caption:
    """What a caption fixes; `None` is left open. `then_*` takes effect at CHANGE_FRAME."""

    colour: str
    shape: str
    direction: str | None = None
    speed: str | None = None
    then_direction: str | None = None
    then_speed: str | None = None

    def __str__(self) -> str:
        words = ["a", self.colour, self.shape]
        if self.direction:
            words += ["moves", self.direction]
        if self.speed:
            words.append(self.speed)
        if self.then_direction or self.then_speed:
            words += ["then", self.then_direction or self.then_speed or ""]
        return " ".join(words)


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip's pixels: the ground truth that scorers are tested against."""

    colour: str
    shape: str
    radius: float
    start_xy: tuple[float, float]
    velocity_xy: tuple[float, float]
    then_velocity_xy: tuple[float, float] | None = None

    def positions(self, frames: int) -> npt.NDArray[np.float64]:
        """Centre of the sprite in each frame, unwrapped: [T, 2] as (x, y)."""
        step = np.tile(np.asarray(self.velocity_xy), (frames, 1))
        if self.then_velocity_xy is not None:
            step[CHANGE_FRAME:] = self.then_velocity_xy
        step[0] = 0.0
        return np.asarray(self.start_xy) + np.cumsum(step, axis=0)


_GRAMMAR = re.compile(
    r"a (?P<colour>\w+) (?P<shape>\w+)"
    r"(?: moves (?P<direction>\w+)(?: (?P<speed>slowly|quickly))?(?: then (?P<then>\w+))?)?"
)


def parse(text: str) -> Caption:
    """Read a caption of the grammar `a COLOUR SHAPE [moves DIRECTION [SPEED] [then DIRECTION|SPEED]]`.

    Raises:
        UserError: the sentence is not of that form; the message names the first word that does not fit.
    """
    for word in text.split():
        if word not in WORDS:
            raise UserError(f"prompt {_short(text)}: the toy world does not know the word {_short(word)}{did_you_mean(word, WORDS)}")
    match = _GRAMMAR.fullmatch(text)
    known = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS}
    if match and all(match[group] is None or match[group] in names for group, names in known.items()):
        then = match["then"]
        if then is None or then in DIRECTIONS or (then in SPEEDS and match["speed"]):
            return Caption(
                match["colour"],
                match["shape"],
                match["direction"],
                match["speed"],
                then if then in DIRECTIONS else None,
                then if then in SPEEDS else None,
            )
    raise UserError(
        f"prompt {_short(text)}: not a sentence of the toy world; write 'a COLOUR SHAPE [moves DIRECTION "
        "[slowly|quickly] [then DIRECTION|SPEED]]', for example 'a red disc moves left quickly then right'"
    )


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "...")


def draw_caption(rng: np.random.Generator) -> Caption:
    """A caption of the training mix: a quarter each fix only the subject, the direction, the speed, or a change."""
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    kind = int(rng.integers(4))
    if kind == 0:
        return Caption(colour, shape)
    direction = str(rng.choice(list(DIRECTIONS)))
    if kind == 1:
        return Caption(colour, shape, direction)
    speed = str(rng.choice(list(SPEEDS)))
    if kind == 2:
        return Caption(colour, shape, direction, speed)
    if rng.random() < 0.5:
        other = str(rng.choice([name for name in DIRECTIONS if name != direction]))
        return Caption(colour, shape, direction, speed if rng.random() < 0.5 else None, then_direction=other)
    return Caption(colour, shape, direction, speed, then_speed="quickly" if speed == "slowly" else "slowly")


def draw_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """A scene that the caption describes, with everything it leaves open drawn at random."""

    def speed_of(word: str | None) -> float:
        if word is None:
            return MAX_OPEN_SPEED * float(rng.random()) ** 2
        return SPEEDS[word] * float(rng.uniform(0.9, 1.1))

    def velocity(direction: str, speed: float) -> tuple[float, float]:
        unit = DIRECTIONS[direction]
        return unit[0] * speed, unit[1] * speed

    direction = caption.direction or str(rng.choice(list(DIRECTIONS)))
    speed = speed_of(caption.speed)
    then = None
    if caption.then_direction:
        then = velocity(caption.then_direction, speed)
    elif caption.then_speed:
        then = velocity(direction, speed_of(caption.then_speed))
    return Scene(
        colour=caption.colour,
        shape=caption.shape,
        radius=float(rng.uniform(6.5, 7.5)),
        start_xy=(WIDTH / 2 + float(rng.uniform(-START, START)), HEIGHT / 2 + float(rng.uniform(-START, START))),
        velocity_xy=velocity(direction, speed),
        then_velocity_xy=then,
    )


def coverage(shape: str, radius: float, centres_xy: npt.ArrayLike) -> Frames:
    """How much of each pixel the sprite covers on the torus: [T, H, W] in [0, 1]."""
    centres = np.asarray(centres_xy, dtype=np.float32)
    dx = np.arange(WIDTH, dtype=np.float32)[None, :] - centres[:, 0, None]
    dy = np.arange(HEIGHT, dtype=np.float32)[None, :] - centres[:, 1, None]
    dx = ((dx + WIDTH / 2) % WIDTH - WIDTH / 2)[:, None, :]
    dy = ((dy + HEIGHT / 2) % HEIGHT - HEIGHT / 2)[:, :, None]
    return sprite(shape, radius, dx, dy)


def sprite(shape: str, radius: float | Frames, dx: Frames, dy: Frames) -> Frames:
    """Coverage in [0, 1] at an offset (dx, dy) from the sprite's centroid, with a one pixel soft edge; arguments broadcast.

    The three shapes have about the same area, so that area alone does not tell them apart.
    """
    if shape == "disc":
        distance = np.sqrt(dx**2 + dy**2) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.886 * radius
    elif shape == "triangle":  # equilateral, apex up; the centroid lies 0.78 r from each of the three sides
        inner = radius * 0.78
        distance = np.maximum(dy - inner, 0.8660254 * np.abs(dx) - 0.5 * dy - inner)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return 1.0 / (1.0 + np.exp(np.clip(distance, -20, 20) * 2.5))


def render(scene: Scene, frames: int) -> Frames:
    """The clip's pixels: [T, 3, H, W] in [-1, 1]."""
    alpha = coverage(scene.shape, scene.radius, scene.positions(frames))[:, None]
    colour = np.asarray(COLOURS[scene.colour], dtype=np.float32)[None, :, None, None]
    return (alpha * colour + (1 - alpha) * np.float32(BACKGROUND)) * 2 - 1


def draw_clips(seed: int, captions: Sequence[Caption], frames: int) -> tuple[list[Scene], Frames]:
    """One scene per caption and its pixels: scenes, [B, T, 3, H, W] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    scenes = [draw_scene(caption, rng) for caption in captions]
    return scenes, np.stack([render(scene, frames) for scene in scenes])
