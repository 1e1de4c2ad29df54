"""The worker's rules, readers and operators without vbench: against brute force, numpy and loops. With vbench: test_vbench_drivers.py."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfbench.errors import UserError
from rfbench.vbench_worker import networks, official, rules, torchvision_ops
from rfbench.vbench_worker.__main__ import read
from rfbench.vbench_worker.jobs import Item
from rfbench.vbench_worker.video import Footage, UnreadableError
from rfbench.vbench_worker.work import DIMENSIONS


def test_middle_frames_are_those_of_numpy():
    for length, count in itertools.product(range(1, 1000), (8, 16)):
        cuts = np.linspace(0, length, min(count, length) + 1).astype(int)
        wanted = [(low + high - 1) // 2 for low, high in itertools.pairwise(cuts.tolist())]
        assert rules.middle_frames(length, count) == wanted + wanted[-1:] * (count - len(wanted))


@given(st.lists(st.booleans(), max_size=40), st.integers(0, 12))
def test_a_clip_moves_when_enough_pairs_do(hits, needed):
    """Counting all of them, as one would; and nothing that was left out could have changed it."""
    counts = list(itertools.accumulate(hits))
    wanted = any(count >= needed for count in counts)
    verdict, asked = rules.moves(len(hits), needed, lambda pair: hits[pair])
    assert verdict == wanted
    for rest in ([True] * (len(hits) - asked), [False] * (len(hits) - asked)):
        assert any(count >= needed for count in itertools.accumulate([*hits[:asked], *rest])) == wanted


def test_a_clip_of_one_frame_does_not_move_and_one_of_two_frames_always_does():
    assert rules.moves(0, rules.moves_threshold(480, 832, 1)[1], lambda pair: True) == (False, 0)
    assert rules.moves(1, rules.moves_threshold(480, 832, 2)[1], lambda pair: False) == (True, 0)


@given(st.lists(st.floats(0, 10), max_size=40), st.tuples(st.floats(0, 40), st.floats(0, 40)), st.integers(0, 6))
def test_a_static_clip_is_static_however_it_is_asked(speeds, wraps, allowed):
    wanted = sum(speed > 3.0 for speed in speeds) <= allowed and all(wrap <= 3.0 * allowed * 2 for wrap in wraps)
    scores = [*speeds, *wraps]
    verdict, asked = rules.stays(len(speeds), allowed, 3.0, lambda pair: scores[pair])
    assert verdict == wanted and asked <= len(scores)


def test_thresholds_round_halves_to_even():
    assert [rules.flow_stride(fps) for fps in (4, 8, 12, 16, 20, 24, 28, 30, 29.97, 60)] == [1, 1, 2, 2, 2, 3, 4, 4, 4, 8]
    assert rules.moves_threshold(480, 832, 40) == (6.0 * 480 / 256, 10)
    assert [rules.moves_threshold(8, 8, count)[1] for count in (1, 2, 3, 6, 10)] == [0, 0, 1, 2, 2]


def test_an_action_is_read_as_from_a_file_name():
    assert rules.action_of("A person is riding or walking with horse") == "riding or walking with horse"
    assert rules.action_of("A person is push up") == "push up"
    assert rules.recognised("push up", ["squat", "push up"], [0.99, 0.84996])
    assert not rules.recognised("push up", ["squat", "push up"], [0.99, 0.84994])


def test_colours_count_where_the_object_is_named():
    frames = [[("a red car", "car"), ("a blue sky", "sky")], [("a car", "car")], [("a blue car", "car")], [("red", "bus")]]
    assert rules.colored_object("a red car", "red") == "car"
    assert rules.color_counts("red", "car", frames) == (1, 2)


def test_boxes_beside_each_other_are_placed_on_either_side():
    a, b, c = (0, 0, 10, 10), (20, 2, 30, 12), (0, 40, 10, 50)
    assert rules.placed("on the left of", a, b) == rules.placed("on the left of", b, a) == 1
    assert rules.placed("on the top of", a, b) == 0 and rules.placed("on the bottom of", a, c) == 1
    assert rules.placed("on the left of", (0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(0.1 / (50 / 150))
    assert rules.best_placed("on the left of", ("cat", "dog"), [("cat", a), ("cup", b), ("dog", c)]) == 0
    assert rules.best_placed("on the left of", ("cat", "dog"), [("cat", a), ("cat", b)]) == 1
    assert rules.best_placed("on the left of", ("cat", "dog"), []) == 0


@given(st.integers(0, 30), st.floats(0.1, 0.9), st.integers(0, 99))
def test_suppression_keeps_the_best_of_what_overlaps(count, limit, seed):
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 20, (count, 2)).astype(float)
    boxes, scores = np.concatenate([corner, corner + rng.integers(1, 15, (count, 2))], 1), rng.permutation(count).astype(float)
    wanted: list[int] = []
    for index in np.argsort(-scores):
        if all(iou(boxes[index], boxes[other]) <= limit for other in wanted):
            wanted.append(int(index))
    assert torchvision_ops.nms(torch.from_numpy(boxes).reshape(-1, 4), torch.from_numpy(scores), limit).tolist() == wanted


def iou(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling", [0, 2])
def test_roi_align_is_the_mean_of_bilinear_samples(aligned, sampling):
    rng = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, 11, 9, generator=rng, dtype=torch.float64)
    boxes = torch.rand(8, 4, generator=rng, dtype=torch.float64) * 100 - 10
    boxes[:, 2:] = boxes[:, :2] + torch.rand(8, 2, generator=rng, dtype=torch.float64) * 90
    boxes[0, 2], boxes[1, 3] = boxes[0, 0], boxes[1, 1]  # of a proposal that was clipped away nothing is left in one direction
    rois = torch.cat([torch.tensor([[0.0], [1.0]] * 4, dtype=torch.float64), boxes], 1)
    found = torchvision_ops.roi_align(image, rois, 0.1, 3, 2, sampling, aligned)
    for out, (index, *box) in zip(found, rois.tolist(), strict=True):
        torch.testing.assert_close(out, sampled(image[int(index)], box, 0.1, sampling, aligned))


def sampled(image, box, scale, sampling, aligned):
    """Sample by sample, for a grid of 3 x 2."""
    left, top, right, bottom = (edge * scale - (0.5 if aligned else 0.0) for edge in box)
    least = -math.inf if aligned else 1.0
    size = (max(bottom - top, least) / 3, max(right - left, least) / 2)
    grid = [sampling or math.ceil(extent) for extent in size]
    out = torch.zeros(image.shape[0], 3, 2, dtype=image.dtype)
    for row, column, i, j in itertools.product(range(3), range(2), range(grid[0]), range(grid[1])):
        y = top + (row + (i + 0.5) / grid[0]) * size[0]
        x = left + (column + (j + 0.5) / grid[1]) * size[1]
        if -1 <= y <= image.shape[1] and -1 <= x <= image.shape[2]:
            out[:, row, column] += bilinear(image, y, x) / (grid[0] * grid[1])
    return out


def bilinear(image, y, x):
    y, x = (min(max(place, 0.0), length - 1) for place, length in ((y, image.shape[1]), (x, image.shape[2])))
    rows, columns = ({math.floor(place): 1 - place % 1, math.ceil(place): place % 1} if place % 1 else {int(place): 1.0} for place in (y, x))
    return sum(image[:, i, j] * a * b for i, a in rows.items() for j, b in columns.items())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.mp4", None, "does not exist"),
        ("a.mp4", b"", "0 bytes"),
        ("a.webm", b"x", "not an .mp4 file"),
        ("façade.mp4", b"not a video", "not a video that OpenCV can decode"),
    ],
)
def test_what_is_no_clip_is_refused_in_words(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableError, match=words):
        Footage(tmp_path / name).bgr  # noqa: B018


def test_segments_are_cut_in_memory_and_lengths_are_checked(tmp_path):
    import cv2

    path = str(tmp_path / "a.mp4")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"mp4v"), 16, (32, 24))
    for shade in range(12):
        writer.write(np.full((24, 32, 3), 20 * shade, np.uint8))
    writer.release()
    whole, part = Footage(tmp_path / "a.mp4", frames=12), Footage(tmp_path / "a.mp4", 4, 7)
    assert whole.bgr.shape == (12, 24, 32, 3) and whole.fps == 16
    assert np.array_equal(part.bgr, whole.bgr[4:7]) and np.array_equal(part.rgb, part.bgr[..., ::-1])
    for footage, words in (
        (Footage(tmp_path / "a.mp4", frames=13), "truncated: 12 of 13"),
        (Footage(tmp_path / "a.mp4", frames=11), "has 12 frames, 11 were expected"),
        (Footage(tmp_path / "a.mp4", 12, 14), "no segment from 12 to 14"),
    ):
        with pytest.raises(UnreadableError, match=words):
            footage.bgr  # noqa: B018


def test_vbenchs_own_functions_get_no_segments(tmp_path):
    (item, why), *rest = official.score("temporal_flickering", [Item("a", "a.mp4", "temporal_flickering", begin=3)], torch.device("cpu"))
    assert item.id == "a" and "whole files" in str(why) and not rest


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"items": [{"id": "a", "path": "a.mp4", "dimension": "flicker"}]}, "the dimension flicker"),
        ({"items": [], "driver": "fats"}, "the driver fats"),
        ({"items": [{"id": "a"}]}, "item 0"),
        ({"items": [], "seed": 1}, "Job"),
    ],
)
def test_a_job_that_cannot_be_done_is_refused(tmp_path, job, words):
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(UserError, match=words):
        read(tmp_path / "job.json")


def test_every_dimension_has_a_scorer_and_its_files(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "no such folder"))
    assert list(DIMENSIONS) == list(networks.NEEDS)
    for name, assets in networks.NEEDS.items():
        for asset in assets:
            assert networks.fetch_command(asset).split()[0] in {"mkdir", "git", "python"}, name


def test_a_file_is_named_with_the_command_that_fetches_it(monkeypatch, tmp_path):
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path))
    command = networks.fetch_command(networks.AMT)
    assert f"-o {tmp_path}/amt_model/amt-s.pth https://huggingface.co/" in command
    assert networks.AMT.found() is None
    (tmp_path / "amt_model").mkdir()
    (tmp_path / "amt_model/amt-s.pth").write_bytes(b"x")
    assert networks.AMT.found() == tmp_path / "amt_model/amt-s.pth"
