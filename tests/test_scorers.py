"""The scorers against the world's ground truth: clips whose defects are known, because they were put there."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rfbench import world
from rfbench.registry import pick
from rfbench.scorers.base import LIGHT, SCORERS, read_video
from rfbench.scorers.sprite import track
from tests.filming import GREY, SIZE, blurred, dimmed, draw, measured, numbers, over_time, pixels, rows_of, save, scene_of, true_speed

PROMPTS = ("a red triangle moves left quickly", "a blue disc moves down quickly then up", "a yellow square moves right quickly then slowly")
WORST: dict[str, float] = {  # a clip without a sprite
    "motion.dynamic_degree": 0,
    "motion.speed": 0,
    "motion.motion_smoothness": 0,
    "subject.subject_consistency": 0,
    "subject.first_frame_copying": 100,
    "caption.caption_agreement": 0,
    "caption.colour_agreement": 0,
    "caption.shape_agreement": 0,
    "caption.direction_agreement": 0,
    "caption.speed_agreement": 0,
    "drift.imaging_quality": 0,
    "drift.drift": 100,
    "drift.quality_change": -100,
}


def trailing(clip: np.ndarray) -> np.ndarray:
    clip = clip.copy()
    for t in range(1, len(clip)):
        clip[t] = np.maximum(clip[t], dimmed(clip[t - 1], 0.85))
    return clip


def defect(name: str, scene: world.Scene, frames: int = 81) -> np.ndarray:
    """The scene's clip with one thing wrong."""
    rng = np.random.default_rng(1)
    path = scene.positions(frames)
    clip = draw(scene, path)
    clock = np.arange(frames)
    jitter = rng.normal(0, 0.5, path.shape)
    other_colour = draw(scene, path, colour="green")
    other_shape = draw(scene, path, shape="disc" if scene.shape == "square" else "square")
    late = over_time(np.linspace(0, 1, frames))
    flash = ((clock < 50) | (clock >= 62))[:, None]
    return {
        "none": lambda: clip,
        "frozen": lambda: np.repeat(clip[:1], frames, axis=0),
        "jittering": lambda: draw(scene, path + jitter),
        "frozen, jittering": lambda: draw(scene, path[:1] + jitter),
        "flipping": lambda: draw(scene, path + np.where(clock % 2, 1.0, 0.0)[:, None]),
        "teleporting": lambda: draw(scene, path + np.where(clock < 40, 0, 20)[:, None]),
        "everywhere": lambda: draw(scene, rng.uniform(0, 64, path.shape)),
        "flashing back": lambda: draw(scene, np.where(flash, path, path[:1])),
        "starting over": lambda: draw(scene, path[clock % 24]),
        "first frame shines through": lambda: np.maximum(clip, dimmed(clip[:1], 0.4)),
        "ghost": lambda: np.maximum(clip, dimmed(np.roll(clip, (20, 25), (2, 3)), 0.4)),
        "trailing": lambda: trailing(clip),
        "fading": lambda: dimmed(clip, over_time(np.linspace(1, 0.3, frames))),
        "blurred": lambda: blurred(clip, 3),
        "blurring": lambda: np.stack([blurred(frame, t // 10) for t, frame in enumerate(clip)]),
        "noisy": lambda: clip + rng.normal(0, 0.15, clip.shape),
        "changing colour": lambda: clip * (1 - late) + other_colour * late,
        "changing shape": lambda: clip * (1 - late) + other_shape * late,
        "growing": lambda: np.concatenate([draw(scene, path[t : t + 1], radius=scene.radius * (1 + 0.5 * t / frames)) for t in clock]),
        "flickering": lambda: np.where(over_time(clock % 10 < 8), clip, GREY),
        "vanishing": lambda: np.where(over_time(clock < 40), clip, GREY),
        "wrong colour": lambda: other_colour,
        "wrong shape": lambda: other_shape,
        "wrong direction": lambda: draw(scene, path[0] - (path - path[0])),
        "half the speed": lambda: draw(scene, path[0] + 0.5 * (path - path[0])),
    }[name]()


# The ground truth


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_clip_of_the_world_is_measured_as_it_was_drawn(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    caption = world.draw_caption(rng)
    scene = world.draw_scene(caption, rng)
    frames = pixels(world.render(scene, 81))
    run = tmp_path_factory.mktemp("run")
    clip = save(frames, run, str(caption))
    seen = track(read_video(run, clip))
    off = (seen.path.xy - scene.positions(81) + SIZE / 2) % SIZE - SIZE / 2
    assert np.abs(off).max() < 0.2
    got = {name: value for name, segment, value in rows_of(clip, run) if segment is None}
    assert got["motion.speed"] == pytest.approx(true_speed(scene, 81), rel=0.01, abs=0.01)
    assert got["motion.motion_smoothness"] > 99
    assert got["subject.subject_consistency"] > 98
    assert got["subject.first_frame_copying"] < 0.5
    assert got["caption.colour_agreement"] == got["caption.shape_agreement"] == 100
    assert got["drift.imaging_quality"] > 85
    assert got["drift.drift"] < 1
    if caption.speed:
        assert got["caption.speed_agreement"] > 97
    if caption.direction and true_speed(scene, 81) > 0.04:
        assert got["caption.direction_agreement"] > 98
    if caption.then_speed or (caption.then_direction and true_speed(scene, 81) > 0.04):
        assert got["caption.change_agreement"] > 97


@settings(max_examples=25)
@given(
    speed=st.floats(0, 1.3),
    angle=st.floats(0, 2 * math.pi),
    turn=st.floats(0, 2 * math.pi),
    start=st.tuples(st.floats(0, 64), st.floats(0, 48)),
    radius=st.floats(6.5, 7.5),
    colour=st.sampled_from(list(world.COLOURS)),
    shape=st.sampled_from(world.SHAPES),
)
def test_speed_in_any_direction_with_any_turn_is_exact_without_a_codec(speed, angle, turn, start, radius, colour, shape):
    first, then = (speed * np.cos(angle), speed * np.sin(angle)), (speed * np.cos(turn), speed * np.sin(turn))
    scene = world.Scene(colour, shape, radius, start, first, then)
    seen = track(pixels(world.render(scene, 81)))
    assert seen.path.speed.mean() == pytest.approx(speed, rel=0.01, abs=0.004)
    assert np.abs(seen.path.velocity[:40] - first).max() < 0.05
    assert np.abs(seen.path.velocity[41:] - then).max() < 0.05
    assert seen.path.surprise(1).max() < 0.15


# Defects are ranked below what they spoil

BELOW: dict[str, dict[str, float]] = {  # defect -> metrics that must be worse than the real clip's, by at least so much
    "frozen": {
        "motion.dynamic_degree": 100,
        "motion.speed": 0.3,
        "caption.direction_agreement": 90,
        "caption.speed_agreement": 90,
        "caption.caption_agreement": 40,
    },
    "jittering": {"motion.motion_smoothness": 40},
    "frozen, jittering": {"motion.dynamic_degree": 100, "motion.motion_smoothness": 40, "motion.speed": 0.3, "caption.direction_agreement": 50},
    "flipping": {"motion.motion_smoothness": 5},
    "teleporting": {"motion.motion_smoothness": 3},
    "everywhere": {"motion.dynamic_degree": 100, "motion.motion_smoothness": 90, "motion.speed": 0.3, "caption.direction_agreement": 90},
    "flashing back": {"motion.motion_smoothness": 5, "subject.first_frame_copying": 4},
    "starting over": {"motion.motion_smoothness": 15, "subject.first_frame_copying": 15},
    "first frame shines through": {"subject.first_frame_copying": 5, "drift.imaging_quality": 8},
    "ghost": {"drift.imaging_quality": 15},
    "trailing": {"drift.imaging_quality": 4},
    "fading": {"subject.subject_consistency": 5, "drift.imaging_quality": 20, "drift.drift": 10, "drift.quality_change": 20},
    "blurred": {"drift.imaging_quality": 4},
    "blurring": {"drift.imaging_quality": 4, "drift.drift": 3, "drift.quality_change": 4},
    "noisy": {"drift.imaging_quality": 10},
    "changing colour": {"subject.subject_consistency": 4, "caption.colour_agreement": 40},
    "changing shape": {"subject.subject_consistency": 0.2, "caption.shape_agreement": 25},
    "growing": {"subject.subject_consistency": 3, "drift.imaging_quality": 1, "drift.drift": 1},
    "flickering": {"subject.subject_consistency": 20, "motion.motion_smoothness": 50, "drift.imaging_quality": 10},
    "vanishing": {"subject.subject_consistency": 40, "drift.quality_change": 70, "drift.drift": 40, "caption.caption_agreement": 25},
    "wrong colour": {"caption.colour_agreement": 100, "caption.caption_agreement": 15},
    "wrong shape": {"caption.shape_agreement": 100, "caption.caption_agreement": 15},
    "wrong direction": {"caption.direction_agreement": 95, "caption.caption_agreement": 15},
    "half the speed": {"caption.speed_agreement": 30, "motion.speed": 0.1},
}
UNTOUCHED: dict[str, dict[str, float]] = {  # defect -> metrics that must stay what they are for the real clip, within so much
    "frozen": {"motion.motion_smoothness": 0.5, "subject.first_frame_copying": 0, "subject.subject_consistency": 2, "drift.imaging_quality": 2},
    "jittering": {"motion.speed": 0.1, "subject.first_frame_copying": 1, "caption.direction_agreement": 5, "subject.subject_consistency": 1},
    "frozen, jittering": {"subject.first_frame_copying": 1},
    "teleporting": {"motion.speed": 0.03, "subject.first_frame_copying": 1, "drift.imaging_quality": 2},
    "flashing back": {"motion.speed": 0.2, "drift.imaging_quality": 1, "caption.shape_agreement": 0},
    "ghost": {"motion.speed": 0.02, "subject.first_frame_copying": 1, "caption.shape_agreement": 0, "caption.direction_agreement": 3},
    "fading": {"motion.speed": 0.02, "caption.colour_agreement": 0, "caption.shape_agreement": 0, "motion.motion_smoothness": 1},
    "blurred": {"motion.speed": 0.02, "caption.colour_agreement": 0, "caption.shape_agreement": 0, "subject.subject_consistency": 1},
    "noisy": {"motion.speed": 0.02, "caption.colour_agreement": 0, "caption.shape_agreement": 0, "motion.motion_smoothness": 1},
    "wrong colour": {"motion.speed": 0.02, "drift.imaging_quality": 4, "caption.shape_agreement": 0, "subject.subject_consistency": 1},
    "wrong shape": {"motion.speed": 0.02, "drift.imaging_quality": 4, "caption.colour_agreement": 0, "subject.subject_consistency": 1},
    "wrong direction": {"motion.speed": 0.02, "motion.motion_smoothness": 0.5, "caption.colour_agreement": 0},
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return {prompt: numbers(defect("none", scene_of(prompt)), tmp_path_factory.mktemp("real"), prompt) for prompt in PROMPTS}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", BELOW)
def test_a_defect_costs_what_it_spoils_and_nothing_else(tmp_path, real, name, prompt):
    got = numbers(defect(name, scene_of(prompt)), tmp_path, prompt)
    for public, least in BELOW[name].items():
        scorer, metric = public.split(".")
        better = pick(SCORERS, scorer, what="scorer").metrics[metric].higher_is_better
        loss = real[prompt][public] - got[public] if better else got[public] - real[prompt][public]
        assert loss >= least, f"{public}: {got[public]:.2f}, of the real clip {real[prompt][public]:.2f}"
    for public, most in UNTOUCHED.get(name, {}).items():
        assert got[public] == pytest.approx(real[prompt][public], abs=most + 1e-6), public


def test_more_jitter_is_less_smooth_and_hardly_more_speed(tmp_path):
    scene = scene_of("a cyan square moves up slowly")
    noise = np.random.default_rng(0).normal(0, 1, (81, 2))
    got = [numbers(draw(scene, scene.positions(81) + strength * noise), tmp_path) for strength in (0, 0.1, 0.25, 0.5, 1)]
    smooth = [each["motion.motion_smoothness"] for each in got]
    assert smooth == sorted(smooth, reverse=True)
    assert smooth[1] > 85 and smooth[-1] < 20
    assert all(each["motion.dynamic_degree"] == 0 for each in got)


def test_stronger_ghosts_are_worse_pictures_and_more_of_a_copy(tmp_path):
    scene = scene_of("a green disc moves right quickly")
    clip = world.render(scene, 81)
    got = [numbers(np.maximum(clip, dimmed(clip[:1], strength)), tmp_path) for strength in (0, 0.15, 0.3, 0.6)]
    quality = [each["drift.imaging_quality"] for each in got]
    copied = [each["subject.first_frame_copying"] for each in got]
    assert quality == sorted(quality, reverse=True) and quality[0] - quality[-1] > 20
    assert copied == sorted(copied) and copied[0] == 0 and copied[-1] > 20


def test_the_share_of_frames_that_flash_back_is_the_amount_of_copying():
    scene = world.Scene("red", "disc", 7.0, (10.0, 20.0), (0.7, 0.0))
    for begin, length in ((30, 4), (40, 9), (27, 20)):
        path = scene.positions(81)
        path[begin : begin + length] = path[0]
        got = measured(pixels(draw(scene, path)), "a red disc")
        assert got["subject.first_frame_copying"] == pytest.approx(100 * length / 81, rel=0.03)


def test_coming_round_the_torus_is_no_copy():
    scene = world.Scene("red", "disc", 7.0, (10.0, 20.0), (1.0, 0.0))
    frames = pixels(world.render(scene, 193))  # three times round: frames 64, 128 and 192 equal frame 0
    assert np.array_equal(frames[64], frames[0])
    assert measured(frames, "a red disc")["subject.first_frame_copying"] == 0


def test_a_clean_change_of_direction_is_smooth_and_jumping_at_the_same_frame_is_not(tmp_path):
    turning = scene_of("a magenta triangle moves left quickly then right")
    path = turning.positions(81)
    path[world.CHANGE_FRAME :] += 9
    assert numbers(world.render(turning, 81), tmp_path)["motion.motion_smoothness"] > 99.5
    assert numbers(draw(turning, path), tmp_path)["motion.motion_smoothness"] < 97


@pytest.mark.parametrize(("share", "dynamic"), [(0.0, 0), (0.25, 0), (0.48, 0), (0.52, 100), (1.0, 100)])
def test_a_clip_is_dynamic_from_halfway_between_slow_and_quick(share, dynamic):
    slow, quick = world.SPEEDS["slowly"], world.SPEEDS["quickly"]
    scene = world.Scene("blue", "square", 7.0, (30.0, 30.0), (0.0, -slow * (quick / slow) ** share if share else 0.0))
    assert measured(pixels(world.render(scene, 81)), "a blue square")["motion.dynamic_degree"] == dynamic


@pytest.mark.parametrize(("fast_frames", "dynamic"), [(12, 0), (16, 0), (26, 100), (40, 100)])
def test_a_quarter_of_the_frames_must_be_fast(fast_frames, dynamic):
    scene = world.Scene("blue", "square", 7.0, (30.0, 30.0), (0.0, 0.0))
    path = scene.positions(81)
    path[:, 0] += np.minimum(np.arange(81), fast_frames)
    assert measured(pixels(draw(scene, path)), "a blue square")["motion.dynamic_degree"] == dynamic


# Captions


@pytest.mark.parametrize(
    ("prompt", "shown", "change"),
    [
        ("a red disc moves left quickly then up", "a red disc moves left quickly then up", (99, 100)),
        ("a red disc moves left quickly then up", "a red disc moves left quickly", (0, 1)),
        ("a red disc moves left quickly then up", "a red disc moves left quickly then down", (0, 1)),
        ("a red disc moves left quickly then slowly", "a red disc moves left quickly then slowly", (97, 100)),
        ("a red disc moves left quickly then slowly", "a red disc moves left quickly", (0, 15)),
    ],
)
def test_the_change_after_then_is_judged_apart_from_what_came_before(prompt, shown, change):
    got = measured(pixels(world.render(scene_of(shown), 81)), prompt)
    assert change[0] <= got["caption.change_agreement"] <= change[1]
    assert got["caption.direction_agreement"] > 98
    assert got["caption.speed_agreement"] > 97
    parts = [value for name, value in got.items() if name.startswith("caption.") and name != "caption.caption_agreement"]
    assert len(parts) == 5
    assert got["caption.caption_agreement"] == pytest.approx(statistics.fmean(parts))


def test_only_what_the_caption_fixes_is_judged():
    frames = pixels(world.render(scene_of("a red disc moves left quickly then up"), 81))
    judged = {
        "a red disc": {"colour", "shape"},
        "a red disc moves left": {"colour", "shape", "direction"},
        "a red disc moves left quickly": {"colour", "shape", "direction", "speed"},
        "a red disc moves left then up": {"colour", "shape", "direction", "change"},
    }
    for prompt, parts in judged.items():
        got = {name.removeprefix("caption.").removesuffix("_agreement") for name in measured(frames, prompt) if name.startswith("caption.")}
        assert got == parts | {"caption"}
    too_short_for_the_change = measured(frames[:40], "a red disc moves left then up")
    assert "caption.change_agreement" not in too_short_for_the_change and too_short_for_the_change["caption.caption_agreement"] > 98


@pytest.mark.parametrize("colour", world.COLOURS)
@pytest.mark.parametrize("shape", world.SHAPES)
def test_every_colour_and_shape_is_recognised_through_chroma_subsampling_and_blur(tmp_path, colour, shape):
    scene = scene_of(f"a {colour} {shape} moves down", seed=5)
    prompt = f"a {colour} {shape}"
    for clip in (world.render(scene, 21), dimmed(blurred(world.render(scene, 21), 2), 0.6)):
        got = numbers(clip, tmp_path, prompt)
        assert got["caption.caption_agreement"] == 100
        assert got["caption.colour_agreement"] == 100


def test_a_prompt_of_another_world_is_refused(tmp_path):
    clip = save(pixels(world.render(scene_of("a red disc"), 9)), tmp_path, prompt="a cat on a sofa")
    for name in LIGHT:
        (answer,) = pick(SCORERS, name, what="scorer").score([clip], tmp_path)
        assert answer.rows == () and "does not know the word 'cat'" in str(answer.refused)


# Invariance


@pytest.mark.parametrize("name", ["none", "jittering", "flashing back", "ghost", "fading"])
def test_where_on_the_torus_it_happens_does_not_matter(name):
    prompt = PROMPTS[1]
    frames = pixels(defect(name, scene_of(prompt)))
    here = measured(frames, prompt)
    for shift in ((4, 8), (24, 32), (13, 51)):
        there = measured(np.roll(frames, shift, axis=(1, 2)), prompt)
        assert there == pytest.approx(here, rel=1e-3, abs=0.05)


def test_colour_changes_no_number_but_its_own_and_mirroring_only_the_direction():
    scene = scene_of("a red square moves left quickly")
    red = measured(pixels(world.render(scene, 81)), "a red square moves left quickly")
    for colour in world.COLOURS:
        other = measured(pixels(world.render(dataclasses.replace(scene, colour=colour), 81)), f"a {colour} square moves left quickly")
        assert other == pytest.approx(red, abs=0.5)
    mirrored = measured(pixels(world.render(scene, 81))[:, :, ::-1], "a red square moves left quickly")
    assert mirrored["caption.direction_agreement"] < 1
    assert mirrored["motion.speed"] == pytest.approx(red["motion.speed"], rel=1e-3)


# Nothing to see


@pytest.mark.parametrize("strength", [0.0, 0.2])
def test_a_clip_without_a_sprite_gets_the_worst_numbers(tmp_path, strength):
    clip = GREY + np.random.default_rng(0).normal(0, strength, (81, 3, 48, 64))
    assert numbers(clip, tmp_path, "a red disc moves left quickly") == WORST


def test_frames_without_a_sprite_agree_with_nothing():
    prompt = PROMPTS[2]
    got = measured(pixels(defect("vanishing", scene_of(prompt))), prompt)
    assert got["caption.colour_agreement"] == got["caption.shape_agreement"] == pytest.approx(100 * 40 / 81)
    assert got["motion.speed"] == pytest.approx(true_speed(scene_of(prompt), 40) * 40 / 81, rel=0.02)
