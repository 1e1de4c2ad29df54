"""The toy world: what a caption says is what is drawn, and a scene's pixels are where its numbers say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfbench import world
from rfbench.errors import UserError
from rfbench.world import Caption, Scene

seeds = st.integers(0, 2**32 - 1)


def every_caption() -> list[Caption]:
    """The grammar spelled out, independently of the expression that reads it."""
    found = []
    for colour, shape in itertools.product(world.COLOURS, world.SHAPES):
        found.append(Caption(colour, shape))
        for direction in world.DIRECTIONS:
            for speed in (None, *world.SPEEDS):
                found.append(Caption(colour, shape, direction, speed))
                found += [Caption(colour, shape, direction, speed, then_direction=then) for then in world.DIRECTIONS]
                if speed:
                    found += [Caption(colour, shape, direction, speed, then_speed=then) for then in world.SPEEDS]
    return found


def test_every_caption_reads_as_it_is_written():
    captions = every_caption()
    assert len({str(caption) for caption in captions}) == len(captions)
    for caption in captions:
        assert world.parse(str(caption)) == caption
        assert set(str(caption).split()) <= set(world.WORDS)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not a sentence"),
        ("a", "not a sentence"),
        ("a disc red", "not a sentence"),
        ("a red left", "not a sentence"),
        ("red disc", "not a sentence"),
        ("a red disc moves", "not a sentence"),
        ("a red disc slowly", "not a sentence"),
        ("a red disc then left", "not a sentence"),
        ("a red disc moves left then", "not a sentence"),
        ("a red disc moves left then slowly", "not a sentence"),  # no first speed that could change
        ("a red disc moves left slowly then red", "not a sentence"),
        ("a red disc moves slowly left", "not a sentence"),
        ("a red  disc", "not a sentence"),
        ("a red disc\n", "not a sentence"),
        ("A red disc", "does not know the word 'A'"),
        ("a rde disc", "did you mean 'red'"),
        ("../../x", "does not know the word '../../x'"),
        ("a red disc 🙂", "does not know the word '🙂'"),
        ("x" * 10_000, r"x\.\.\."),
    ],
)
def test_any_other_sentence_is_refused_in_one_short_line(text, told):
    with pytest.raises(UserError, match=told) as caught:
        world.parse(text)
    assert caught.value.code == 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@given(seed=seeds)
def test_a_scene_obeys_its_caption(seed):
    rng = np.random.default_rng(seed)
    caption = world.draw_caption(rng)
    assert world.parse(str(caption)) == caption
    scene = world.draw_scene(caption, rng)
    assert (scene.colour, scene.shape) == (caption.colour, caption.shape)
    assert 6.5 <= scene.radius <= 7.5
    before, after = np.asarray(scene.velocity_xy), np.asarray(scene.then_velocity_xy or scene.velocity_xy)
    assert np.count_nonzero(before) <= 1 and np.count_nonzero(after) <= 1
    assert max(np.abs(before).max(), np.abs(after).max()) <= world.MAX_OPEN_SPEED
    for velocity, direction, speed in (
        (before, caption.direction, caption.speed),
        (after, caption.then_direction or caption.direction, caption.then_speed or caption.speed),
    ):
        if direction:
            assert velocity @ world.DIRECTIONS[direction] == pytest.approx(np.linalg.norm(velocity))
        if speed:
            assert abs(np.linalg.norm(velocity) / world.SPEEDS[speed] - 1) <= 0.1 + 1e-9
    assert (scene.then_velocity_xy is not None) == bool(caption.then_direction or caption.then_speed)


def test_captions_are_mixed_and_open_speeds_skewed_towards_stillness_as_documented():
    rng = np.random.default_rng(0)
    captions = [world.draw_caption(rng) for _ in range(4000)]
    kinds = [
        bool(c.direction) + bool(c.speed and not (c.then_direction or c.then_speed)) + 2 * bool(c.then_direction or c.then_speed) for c in captions
    ]
    assert np.bincount(kinds) / 4000 == pytest.approx([0.25, 0.25, 0.25, 0.25], abs=0.03)
    speeds = [float(np.linalg.norm(world.draw_scene(Caption("red", "disc"), rng).velocity_xy)) for _ in range(4000)]
    assert np.median(speeds) == pytest.approx(world.MAX_OPEN_SPEED / 4, abs=0.02)
    assert np.mean(np.array(speeds) < 0.05) == pytest.approx(math.sqrt(0.05 / world.MAX_OPEN_SPEED), abs=0.03)


def test_the_same_seed_draws_the_same_clips():
    captions = [Caption("red", "disc"), Caption("blue", "square", "up", "quickly", then_direction="left")]
    scenes, clips = world.draw_clips(7, captions, 9)
    again, same = world.draw_clips(7, captions, 9)
    other, _ = world.draw_clips(8, captions, 9)
    assert scenes == again and np.array_equal(clips, same)
    assert scenes != other
    assert clips.shape == (2, 9, 3, world.HEIGHT, world.WIDTH) and clips.dtype == np.float32
    assert np.array_equal(clips[1], world.render(scenes[1], 9))


@given(
    start=st.tuples(st.floats(0, 64), st.floats(0, 48)),
    velocity=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    then=st.none() | st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    frames=st.integers(1, 90),
)
def test_positions_are_a_walk(start, velocity, then, frames):
    x, y = start
    walked = []
    for t in range(frames):
        if t > 0:
            dx, dy = then if then is not None and t >= 41 else velocity
            x, y = x + dx, y + dy
        walked.append((x, y))
    assert Scene("red", "disc", 7.0, start, velocity, then).positions(frames) == pytest.approx(np.array(walked))


def test_a_change_begins_with_a_latent_frame_in_the_middle_of_the_short_suite():
    assert (world.CHANGE_FRAME - 1) % 4 == 0 and world.CHANGE_FRAME == 81 // 2 + 1


@pytest.mark.parametrize("shape", world.SHAPES)
@settings(max_examples=20)
@given(radius=st.floats(6.5, 7.5), fraction=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_sprite_lies_around_its_centre_and_has_the_area_of_a_disc(shape, radius, fraction):
    centre = np.array([32, 24]) + fraction
    alpha = world.coverage(shape, radius, centre[None])[0].astype(np.float64)
    assert alpha.min() >= 0 and alpha.max() <= 1
    assert alpha.sum() == pytest.approx(math.pi * radius**2, rel=0.06)
    rows, columns = np.indices(alpha.shape)
    assert [(alpha * columns).sum() / alpha.sum(), (alpha * rows).sum() / alpha.sum()] == pytest.approx(centre, abs=0.06)


def test_shapes_are_what_they_are_called():
    grids = {shape: world.coverage(shape, 7.0, np.array([[32, 24]]))[0] > 0.5 for shape in world.SHAPES}
    rows, columns = np.indices((world.HEIGHT, world.WIDTH))
    assert np.array_equal(grids["disc"], np.hypot(rows - 24, columns - 32) < 7)
    assert np.array_equal(grids["square"], np.maximum(abs(rows - 24), abs(columns - 32)) < 0.886 * 7)
    widths = grids["triangle"].sum(axis=1)
    used = widths[widths > 0]
    assert np.all(np.diff(used) >= 0) and used[0] <= 3 and used[-1] >= 16  # apex up
    with pytest.raises(ValueError, match="unknown shape"):
        world.coverage("star", 7.0, np.array([[32, 24]]))


@given(x=st.floats(-200, 200), y=st.floats(-200, 200), dx=st.integers(-70, 70), dy=st.integers(-70, 70), shape=st.sampled_from(world.SHAPES))
def test_space_is_a_torus(x, y, dx, dy, shape):
    here = world.coverage(shape, 7.0, np.array([[x, y]]))
    there = world.coverage(shape, 7.0, np.array([[x + dx, y + dy]]))
    assert np.allclose(np.roll(here, (dy, dx), axis=(1, 2)), there, atol=1e-3)


def test_pixels_are_the_colour_inside_and_the_background_outside():
    for colour, rgb in world.COLOURS.items():
        clip = world.render(Scene(colour, "disc", 7.0, (32.0, 24.0), (0.0, 0.0)), 2)
        assert clip.dtype == np.float32 and np.abs(clip).max() <= 1
        assert clip[1, :, 24, 32] == pytest.approx(2 * np.array(rgb) - 1, abs=1e-3)
        assert clip[1, :, 0, 0] == pytest.approx(2 * world.BACKGROUND - 1, abs=1e-3)
