"""From rows to dimensions: against running sums as VBench keeps them, and properties that the number of workers must not touch."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfbench.errors import UserError
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.rows import STATIC, Asked, Row, of_version, static, value

UNIT = st.floats(0, 1)


def asked_of(rows, dimension="subject_consistency"):
    return [Asked(f"{i:04d}-0", i, 0, row.sha256, row.asked) for i, row in enumerate(rows) if row.dimension == dimension]


def rows_of(values, dimension="subject_consistency", weights=None):
    return [Row(f"sha{i}", dimension, "1", v, (weights or [1.0] * len(values))[i]) for i, v in enumerate(values)]


def valued(dimension, rows, **how):
    return value(dimension, asked_of(rows, dimension), of_version(rows, dimension, "1"), **how)


@given(clips=st.lists(st.lists(UNIT, min_size=1, max_size=9), min_size=1, max_size=9))
def test_consistency_is_the_running_sum_over_all_pairs_of_frames(clips):
    total, count = 0.0, 0
    for frames in clips:
        for similarity in frames:
            total, count = total + similarity, count + 1
    rows = rows_of([sum(frames) / len(frames) for frames in clips], weights=[float(len(frames)) for frames in clips])
    assert valued("subject_consistency", rows).percent == pytest.approx(100 * total / count)
    by_clip = sum(sum(frames) / len(frames) for frames in clips) / len(clips)
    assert valued("subject_consistency", rows, distributed=True).percent == pytest.approx(100 * by_clip)


def test_the_rule_of_one_process_and_that_of_several_differ():
    rows = rows_of([0.9, 0.5], weights=[80.0, 16.0])
    assert valued("subject_consistency", rows).percent == pytest.approx(100 * (80 * 0.9 + 16 * 0.5) / 96)
    assert valued("subject_consistency", rows, distributed=True).percent == pytest.approx(70)
    background = [dataclasses.replace(row, dimension="background_consistency") for row in rows]
    assert valued("background_consistency", background, distributed=True) == valued("background_consistency", background)


def test_appearance_in_several_processes_is_that_of_last_frames():
    rows = [
        Row(f"sha{i}", "appearance_style", "1", sum(f) / len(f), float(len(f)), extra={"frames": f}) for i, f in enumerate(([0.1, 0.3], [0.2] * 4))
    ]
    assert valued("appearance_style", rows).percent == pytest.approx(100 * (0.1 + 0.3 + 4 * 0.2) / 6)
    assert valued("appearance_style", rows, distributed=True).percent == pytest.approx(25)


@given(
    values=st.lists(UNIT, min_size=1, max_size=20),
    workers=st.integers(1, 5),
    seed=st.integers(0, 999),
    dimension=st.sampled_from([name for name in T2V.dimensions if name != "color"]),
)
def test_workers_order_and_repetition_change_nothing(values, workers, seed, dimension):
    rng = random.Random(seed)
    rows = rows_of(values, dimension, [float(rng.randint(1, 99)) for _ in values])
    shares = [rows[i::workers] for i in range(workers)]
    rng.shuffle(shares)
    mixed = [row for share in shares for row in share] + rng.choices(rows, k=3)
    found = of_version(mixed, dimension, "1")
    asked = asked_of(rows, dimension)
    alone = value(dimension, asked, of_version(rows, dimension, "1"))
    rng.shuffle(asked)
    assert value(dimension, asked, found) == alone, "to the last bit"


def test_color_drops_what_it_did_not_see_and_says_so():
    rows = [Row("a", "color", "1", 0.5, 1.0, "red car"), Row("b", "color", "1", None, 0.0, "red car"), Row("c", "color", "1", 1.0, 1.0, "red car")]
    found = valued("color", rows)
    assert (found.percent, found.clips, found.asked, found.partial) == (75.0, 2, 3, False) and "1 clips do not count" in found.note
    with pytest.raises(UserError, match="says something about none of 1 clips"):
        valued("color", rows[1:2])


def test_one_video_is_asked_about_two_texts():
    rows = [Row("a", "overall_consistency", "1", 0.2, 1.0, "a bird"), Row("a", "overall_consistency", "1", 0.4, 1.0, "a cat")]
    assert valued("overall_consistency", rows).percent == pytest.approx(30)


@given(values=st.lists(UNIT, min_size=2, max_size=9), gone=st.integers(0, 8))
def test_whatever_is_missing_refuses(values, gone):
    rows = rows_of(values)
    asked = asked_of(rows)
    found = of_version([row for i, row in enumerate(rows) if i != gone % len(rows)], "subject_consistency", "1")
    with pytest.raises(UserError, match=rf"of {len(rows)} clips {len(rows) - 1} have a value \(not {asked[gone % len(rows)].clip}\)"):
        value("subject_consistency", asked, found)
    some = value("subject_consistency", asked, found, partial=True)
    assert some.partial and (some.clips, some.asked) == (len(rows) - 1, len(rows))


def test_nothing_at_all_is_refused_even_in_part():
    nobody: list[Asked] = []
    for asked in (asked_of(rows_of([0.5])), nobody):
        with pytest.raises(UserError, match="clips 0 have a value"):
            value("subject_consistency", asked, {}, partial=True)


def test_rows_of_another_version_dimension_or_segment_are_not_looked_at():
    row = rows_of([0.5])[0]
    others = [dataclasses.replace(row, value=0.1, **change) for change in ({"version": "2"}, {"dimension": "scene"}, {"begin": 0, "end": 32})]
    assert valued("subject_consistency", [*others, row]).percent == 50


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": float("nan")}, "is nan with weight 1.0, which cannot be"),
        ({"value": 3.2399}, "is 3.2399 with weight 1.0"),
        ({"value": -0.1}, "is -0.1"),
        ({"weight": -1.0}, "with weight -1.0"),
        ({"weight": float("nan")}, "with weight nan"),
        ({"weight": float("inf")}, "with weight inf"),
        ({"value": None}, "has no value or no weight"),
        ({"weight": 0.0}, "has no value or no weight"),
        ({"value": None, "weight": 0.0}, "has no value or no weight"),
    ],
)
def test_a_row_that_cannot_be_is_refused(change, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        valued("subject_consistency", [dataclasses.replace(rows_of([0.5])[0], **change)])
    assert caught.value.code == 1


def test_two_answers_to_one_question_are_refused():
    row = rows_of([0.5])[0]
    with pytest.raises(UserError, match="two different values"):
        of_version([row, dataclasses.replace(row, value=0.6)], row.dimension, "1")


def test_the_first_five_static_clips_are_first_by_file_name():
    """As `sorted` orders the names of 25 videos: -0.mp4, -1.mp4, -10.mp4, ..."""
    asked = [Asked(f"{p:04d}-{i}", p, i, f"{p}/{i}") for p in (7, 8) for i in range(25)]
    moving = {"7/0", "7/10", *(f"8/{i}" for i in range(25) if i not in (3, 21))}
    rows = of_version([Row(one.sha256, STATIC, "1", float(one.sha256 not in moving), 1.0) for one in asked], STATIC, "1")
    kept, short = static(asked, rows)
    names = sorted(f"x-{i}.mp4" for i in range(25) if i not in (0, 10))[:5]
    assert [f"x-{one.sample}.mp4" for one in kept if one.prompt == 7] == names == ["x-1.mp4", "x-11.mp4", "x-12.mp4", "x-13.mp4", "x-14.mp4"]
    assert [one.sample for one in kept if one.prompt == 8] == [21, 3] and short == 1
    with pytest.raises(UserError, match="has not been through the static filter"):
        static([*asked, Asked("0009-0", 9, 0, "9/0")], rows)
