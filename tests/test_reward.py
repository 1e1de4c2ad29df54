"""The toy reward against the world's ground truth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rfbench import world
from rfbench.backbones.toy import fit_autoencoder
from rfbench.registry import pick
from rfbench.reward import REWARDS, SPEED_UNIT, centres, toy_motion

FRAMES = 41


def scene(speed: float, direction: str = "right", shape: str = "disc", colour: str = "red") -> world.Scene:
    x, y = world.DIRECTIONS[direction]
    return world.Scene(colour, shape, 7.0, (60.0, 44.0), (x * speed, y * speed))


def clip(scene: world.Scene) -> Tensor:
    return torch.from_numpy(world.render(scene, FRAMES))[None]


def reward(pixel_BTCHW: Tensor) -> float:
    (found,) = toy_motion(pixel_BTCHW, ["a red disc"]).tolist()
    return float(found)


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("direction", world.DIRECTIONS)
def test_the_centre_is_where_the_sprite_is(shape: str, direction: str) -> None:
    """Across the edges of the torus, too: the sprite starts in a corner."""
    moving = scene(0.7, direction, shape, "cyan")
    xy, area = centres(clip(moving))
    size = np.array([world.WIDTH, world.HEIGHT])
    gap = (xy[0].double().numpy() - moving.positions(FRAMES) + size / 2) % size - size / 2
    assert np.abs(gap).max() < 0.6
    assert float(area.std() / area.mean()) < 0.03
    assert 0.6 < float(area.mean()) / (math.pi * 49) < 1.5


@pytest.mark.parametrize("shape", world.SHAPES)
@pytest.mark.parametrize("colour", world.COLOURS)
def test_faster_is_better_and_frozen_is_worst(shape: str, colour: str) -> None:
    speeds = (0.0, 0.1, 0.2, 0.4, 0.6)
    found = [reward(clip(scene(speed, "down", shape, colour))) for speed in speeds]
    assert found == sorted(found)
    assert found[0] == pytest.approx(-1, abs=0.1)
    assert found[-1] - found[0] == pytest.approx(0.6 / SPEED_UNIT, abs=0.5)  # a square's centre wobbles on the pixel grid


def test_no_speed_is_worth_more_than_three_points() -> None:
    assert reward(clip(scene(6.0))) <= 2.0
    assert reward(clip(scene(6.0))) == pytest.approx(reward(clip(scene(5.0))), abs=0.1)


def shaken(pixel_BTCHW: Tensor, reach: int) -> Tensor:
    """Every frame moved at random by up to `reach` pixels each way."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([np.roll(frame, rng.integers(-reach, reach + 1, 2), (1, 2)) for frame in pixel_BTCHW[0].numpy()]))[None]


@pytest.mark.parametrize("reach", [1, 2, 6])
@pytest.mark.parametrize("speed", [0.0, 0.2, 0.4])
def test_jitter_is_not_motion(reach: int, speed: float) -> None:
    smooth = clip(scene(speed))
    assert reward(shaken(smooth, reach)) < reward(smooth) - 0.2


def test_a_jump_is_not_motion() -> None:
    """A sprite that flashes up elsewhere covers a long way in one frame."""
    steady, elsewhere = clip(scene(0.3)), clip(replace(scene(0.3), start_xy=(30.0, 20.0)))
    late = torch.arange(FRAMES)[None, :, None, None, None] >= FRAMES // 2
    assert reward(torch.where(late, elsewhere, steady)) < reward(steady) - 0.2


def test_a_sprite_that_fades_or_splits_costs() -> None:
    steady = clip(scene(0.4))
    grey = 2 * world.BACKGROUND - 1
    share = torch.linspace(1, 0.2, FRAMES)[None, :, None, None, None]
    fading = grey + share * (steady - grey)
    assert reward(fading) < reward(steady) - 0.5
    second = clip(replace(scene(0.4), start_xy=(20.0, 10.0)))
    doubled = torch.where(torch.arange(FRAMES)[None, :, None, None, None] >= FRAMES // 2, torch.maximum(steady, second), steady)
    assert reward(doubled) < reward(steady) - 0.5


def test_a_turn_costs_less_than_jitter() -> None:
    turning = replace(scene(0.4), then_velocity_xy=(0.0, 0.4))
    with_turn = torch.from_numpy(world.render(turning, 81))[None]
    straight = torch.from_numpy(world.render(scene(0.4), 81))[None]
    assert reward(straight) - 0.1 < reward(with_turn) < reward(straight)


def test_an_empty_clip_has_a_reward_and_not_a_good_one() -> None:
    empty = torch.full((1, FRAMES, 3, world.HEIGHT, world.WIDTH), 2 * world.BACKGROUND - 1)
    assert -1.1 <= reward(empty) <= -0.9


def test_clips_are_judged_one_by_one_and_whatever_the_prompt() -> None:
    speeds = (0.0, 0.6, 0.3)
    batch = torch.cat([clip(scene(speed)) for speed in speeds])
    together = toy_motion(batch, ["a red disc"] * 3)
    assert together.shape == (3,)
    assert together.tolist() == pytest.approx([reward(clip(scene(speed))) for speed in speeds], abs=1e-5)
    assert torch.equal(together, toy_motion(batch, ["a blue square moves up"] * 3))


def test_what_the_autoencoder_leaves_does_not_change_the_order() -> None:
    """Training sees decoded latents, not rendered frames."""
    autoencoder = fit_autoencoder(0, clips=12)
    found = [reward(autoencoder.decode(autoencoder.encode(clip(scene(speed))), None)) for speed in (0.0, 0.2, 0.4, 0.6)]
    assert found == sorted(found) and found[-1] > found[0] + 0.8


def test_the_reward_is_found_by_its_name() -> None:
    assert pick(REWARDS, "toy_motion", what="reward") is toy_motion
