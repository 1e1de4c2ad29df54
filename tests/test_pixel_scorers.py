"""The scorers that need nothing but frames, against OpenCV, scipy, closed forms and clips that are spoiled in the way that they measure."""

from __future__ import annotations

import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from rfbench import evaluate, records, world
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.registry import pick
from rfbench.scorers import appearance, flow, similarity
from rfbench.scorers.base import SCORERS, PixelScorer, read_video
from rfbench.scorers.flicker import stillness
from tests import fake_runs
from tests.filming import answered, blurred, pixels, save, scene_of


def texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth noise of strong contrast: [H, W, 3] bytes."""
    rough = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = ndimage.gaussian_filter(rough, (3, 3, 0), mode="wrap")
    return (127.5 + 55 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def drifting(count: int, step: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A texture that moves by (rows, columns) per frame: [T, 96, 128, 3]."""
    large = texture(192, 256, seed)
    return np.stack([np.roll(large, (t * step[0], t * step[1]), axis=(0, 1))[48:144, 64:192] for t in range(count)])


def values(scorer: str, frames: np.ndarray, run: Path) -> dict[str, float]:
    found = answered(pick(SCORERS, scorer, what="scorer"), [save(frames, run)], run)
    return {row.metric: row.value for row in found if row.segment is None}


# Flicker


def test_flicker_is_vbenchs_to_the_last_bit_on_a_file(tmp_path):
    """VBench reads by OpenCV, takes the mean of absdiff of float32 pictures in its order of channels, and the mean of these."""
    for seed, frames in enumerate([drifting(9, (3, 5)), pixels(world.render(scene_of("a red disc moves left quickly"), 33))]):
        clip = save(frames, tmp_path, name=f"{seed:04}-0")
        file = cv2.VideoCapture(str(tmp_path / clip.file))
        pictures = [file.read()[1].astype(np.float32) for _ in frames]
        steps = [np.mean(cv2.absdiff(a, b)) for a, b in itertools.pairwise(pictures)]
        wanted = (255.0 - np.mean(np.array(steps)).item()) / 255.0
        assert stillness(read_video(tmp_path, clip)) == wanted
        assert values("flicker", frames, tmp_path) == {"temporal_flickering": 100 * wanted}


@given(st.integers(2, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_flicker_is_one_less_the_mean_difference(count, height, width, seed):
    frames = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)
    assert stillness(frames) == pytest.approx(1 - np.abs(np.diff(frames.astype(float), axis=0)).mean() / 255, abs=1e-6)


# Similarity


@given(st.integers(11, 40), st.integers(11, 40), st.integers(0, 60), st.integers(0, 99))
def test_structural_similarity_is_its_formula(height, width, noise, seed):
    a = texture(height, width, seed)
    b = (a + np.random.default_rng(seed).normal(size=a.shape) * noise).clip(0, 255).astype(np.uint8)
    x, y = (picture.astype(float) @ [0.299, 0.587, 0.114] for picture in (a, b))

    def mean(picture: np.ndarray) -> np.ndarray:
        return ndimage.gaussian_filter(picture, 1.5, truncate=5 / 1.5)[5:-5, 5:-5]

    spread = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    top = (2 * mean(x) * mean(y) + 6.5025) * (2 * (mean(x * y) - mean(x) * mean(y)) + 58.5225)
    wanted = (top / ((mean(x) ** 2 + mean(y) ** 2 + 6.5025) * (spread + 58.5225))).mean()
    assert similarity.ssim(a, b) == pytest.approx(wanted, abs=1e-9)
    assert similarity.ssim(a, a) == pytest.approx(1)


def test_signal_to_noise_is_opencvs_and_has_an_end():
    a, b = drifting(3, (0, 0)), drifting(3, (1, 2))
    assert similarity.psnr(a, b) == pytest.approx(cv2.PSNR(a.reshape(-1, 128, 3), b.reshape(-1, 128, 3)))
    assert similarity.psnr(a, a) == 100
    b = a.copy()
    b[0, 0, 0, 0] += 1
    assert similarity.psnr(a, b) == pytest.approx(10 * np.log10(255**2 * a.size))


# Appearance


def test_colours_are_those_of_opencv():
    rgb = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    wanted = cv2.cvtColor((rgb / 255).astype(np.float32), cv2.COLOR_RGB2LAB)
    assert np.abs(appearance.lab(rgb) - wanted).max() < 0.3  # OpenCV goes by tables


def test_a_clip_that_fades_loses_its_look(tmp_path):
    frames = drifting(65, (0, 0))
    ramp = np.linspace(0, 1, 65)[:, None, None, None]
    warmer = (frames * (1 - ramp * np.array([0, 0.3, 0.6]))).astype(np.uint8)
    kept, faded = values("appearance", frames, tmp_path), values("appearance", warmer, tmp_path)
    assert kept["first_frame_similarity"] > 99 and kept["colour_drift"] < 0.5
    assert faded["first_frame_similarity"] < kept["first_frame_similarity"] - 1 and faded["colour_drift"] > 10
    clip = Clip("0000-0", 0, 0, "", "", 0, 65, 16, 96, 128, "", "")
    away = [row.value for row in appearance.measure(clip, warmer) if row.metric == "colour_drift" and row.segment is not None]
    assert away[0] == 0 and away == sorted(away)
    first, last = (appearance.lab(warmer[part][:, ::4, ::4]).reshape(-1, 3).mean(axis=0) for part in (slice(0, 32), slice(32, 65)))
    assert away[-1] == pytest.approx(np.linalg.norm(last - first))


# Flow


@pytest.mark.parametrize("step", [(0, 2), (-3, 1), (4, -3)])
def test_the_flow_of_a_texture_is_its_step(tmp_path, step):
    found = values("flow", drifting(6, step), tmp_path)
    assert found["flow"] == pytest.approx(np.hypot(*step), rel=0.1)
    assert found["fastest_flow"] >= found["flow"]
    still = np.abs(np.diff(drifting(2, step).astype(float), axis=0)).mean() / 2.55
    assert found["warping_error"] < still / 2


def test_flicker_is_what_flow_cannot_explain(tmp_path):
    frames = drifting(17, (1, 2))
    flashing = frames.copy()
    flashing[::2] = (flashing[::2] * 0.8).astype(np.uint8)
    assert values("flow", flashing, tmp_path)["warping_error"] > 3 * values("flow", frames, tmp_path)["warping_error"]


def test_faster_sprites_flow_faster(tmp_path):
    slow, quick = (values("flow", pixels(world.render(scene_of(f"a red disc moves left {pace}"), 33)), tmp_path) for pace in ("slowly", "quickly"))
    assert quick["flow"] > slow["flow"] and quick["fastest_flow"] > slow["fastest_flow"]


def test_without_opencv_the_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(UserError, match=r"scorer 'flow' needs OpenCV .*: pip install -c constraints.txt opencv-python-headless"):
        _ = flow.SCORER.version


# Reference


def test_a_run_is_compared_with_another_clip_by_clip(tmp_path):
    prompts = ["a red disc", "a blue square"]
    exact = fake_runs.write_bench(tmp_path, "exact", "short", prompts, samples=1)
    near = fake_runs.write_bench(tmp_path, "near", "short", prompts, samples=1)
    clips = records.read_clips(near)
    scene = scene_of("a red disc", seed=3)
    ours, theirs = pixels(blurred(world.render(scene, 17), 1)), pixels(world.render(scene, 17))
    for run, frames in ((near, ours), (exact, theirs)):
        fake_runs.write_video(run / clips[0].file, frames)
        rows = [Clip(**{**vars(clip), "sha256": records.sha256_of(run / clip.file)}) for clip in clips]
        records.write_rows(run / "clips.jsonl", rows)
    with pytest.raises(UserError, match="name that with --against RUN"):
        evaluate.evaluate(near, ["reference"])
    with pytest.raises(UserError, match="--against is for a scorer that compares"):
        evaluate.evaluate(near, ["flicker"], against=exact)
    evaluate.evaluate(near, ["reference"], against=exact)
    found = {(row.clip, row.metric): row.value for row in records.read_rows(near / "scores" / "reference.jsonl", Score)}
    a, b = (read_video(run, records.read_clips(run)[0]) for run in (near, exact))
    assert found["0000-0", "psnr"] == pytest.approx(cv2.PSNR(a.reshape(-1, 64, 3), b.reshape(-1, 64, 3)))
    assert 50 < found["0000-0", "ssim"] < 99.9
    assert found["0001-0", "psnr"] == 100
    assert found["0001-0", "ssim"] == pytest.approx(100)
    before = (near / "scores" / "reference.json").read_text()
    evaluate.evaluate(near, ["reference"], against=near)  # another run to compare with is another version
    assert (near / "scores" / "reference.json").read_text() != before
    found = {(row.clip, row.metric): row.value for row in records.read_rows(near / "scores" / "reference.jsonl", Score)}
    assert found["0000-0", "psnr"] == 100


@pytest.mark.parametrize("name", ["flicker", "appearance", "flow"])
def test_the_contract_is_kept(tmp_path, name):
    scorer = pick(SCORERS, name, what="scorer")
    assert scorer.name == name and scorer.version and (name == "flow" or isinstance(scorer, PixelScorer))
    rows = answered(scorer, [save(drifting(33, (0, 1)), tmp_path)], tmp_path)
    assert {row.metric for row in rows} == set(scorer.metrics)
    assert all(type(row.value) is float for row in rows)
    assert len({(row.metric, row.segment) for row in rows}) == len(rows)
