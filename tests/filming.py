"""Clips of the toy world with something done to them, as files and as what the scorers say about them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from rfbench import world
from rfbench.records import Clip, Score, sha256_of
from rfbench.registry import pick
from rfbench.scorers.base import LIGHT, SCORERS, Scorer
from rfbench.scorers.sprite import track
from rfbench.video import writing

GREY = 2 * world.BACKGROUND - 1
SIZE = np.array([world.WIDTH, world.HEIGHT])


def scene_of(prompt: str, seed: int = 0) -> world.Scene:
    return world.draw_scene(world.parse(prompt), np.random.default_rng(seed))


def draw(scene: world.Scene, positions: np.ndarray, **other) -> np.ndarray:
    """A clip of the scene's sprite, perhaps with another colour, shape or radius, at any positions: [T, 3, H, W]."""
    scene = dataclasses.replace(scene, **other)
    alpha = world.coverage(scene.shape, scene.radius, positions)[:, None]
    colour = np.asarray(world.COLOURS[scene.colour], np.float32)[:, None, None]
    return (alpha * colour + (1 - alpha) * np.float32(world.BACKGROUND)) * 2 - 1


def pixels(clip: np.ndarray) -> np.ndarray:
    return (np.clip(clip.transpose(0, 2, 3, 1) + 1, 0, 2) * 127.5).round().astype(np.uint8)


def save(frames: np.ndarray, run: Path, prompt: str = "a red disc", name: str = "0000-0") -> Clip:
    """A video file of uint8 frames, encoded as generated clips are, and the row that describes it."""
    path = run / f"{name}.mp4"
    count, height, width = frames.shape[:3]
    with writing(path, fps=world.FPS, height=height, width=width) as write:
        write(frames)
    return Clip(name, 0, 0, prompt, prompt, 0, count, world.FPS, height, width, path.name, sha256_of(path))


def answered(scorer: Scorer, clips: list[Clip], run: Path) -> list[Score]:
    """The rows of all answers, none of which may be a refusal."""
    answers = list(scorer.score(clips, run))
    assert [answer.refused for answer in answers] == [None] * len(clips)
    return [row for answer in answers for row in answer.rows]


def rows_of(clip: Clip, run: Path) -> list[tuple[str, int | None, float]]:
    """All rows of one clip as (public name, segment, value)."""
    scorers = [pick(SCORERS, name, what="scorer") for name in LIGHT]
    return [(f"{scorer.name}.{row.metric}", row.segment, row.value) for scorer in scorers for row in answered(scorer, [clip], run)]


def numbers(clip: np.ndarray, run: Path, prompt: str = "a red disc") -> dict[str, float]:
    """Public name -> value of a clip [T, 3, H, W] that goes through the codec and all the scorers."""
    return {name: value for name, segment, value in rows_of(save(pixels(clip), run, prompt), run) if segment is None}


def measured(frames: np.ndarray, prompt: str) -> dict[str, float]:
    """The same without files and codec, for properties that must hold exactly."""
    count, height, width = frames.shape[:3]
    clip = Clip("0000-0", 0, 0, prompt, prompt, 0, count, world.FPS, height, width, "", "")
    seen = track(frames)
    scorers = [pick(SCORERS, name, what="scorer") for name in LIGHT]
    return {f"{scorer.name}.{row.metric}": row.value for scorer in scorers for row in scorer.measure(clip, seen) if row.segment is None}


def true_speed(scene: world.Scene, frames: int) -> float:
    return float(np.linalg.norm(np.diff(scene.positions(frames), axis=0), axis=1).mean())


def dimmed(clip: np.ndarray, share: object) -> np.ndarray:
    return GREY + (clip - GREY) * np.asarray(share, np.float32)


def over_time(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32)[:, None, None, None]


def blurred(clip: np.ndarray, times: int) -> np.ndarray:
    """Smoothed on the torus with (1 2 1) / 4 in both directions, so many times."""
    for _ in range(times):
        for axis in (-1, -2):
            clip = (np.roll(clip, 1, axis) + 2 * clip + np.roll(clip, -1, axis)) / 4
    return clip
