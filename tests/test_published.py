"""Published numbers as data: whole, attributed, and said once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rfbench import config, published
from rfbench.config import Baseline
from rfbench.errors import UserError

ROWS = published.reported()


def test_a_number_is_of_a_quantity_that_is_known_and_possible() -> None:
    names = r"fps|latency_s|(vbench|vbench-long|vbench_i2v|drift|qwen3vl|videoreward|user_study|hpsv3|visual_stability|dynamic)\.\w+"
    for row in ROWS:
        assert re.fullmatch(names, row.metric), row
        assert 0 <= row.value <= 100 if row.metric.startswith("vbench") else row.value > 0
        assert not row.metric.startswith("qwen3vl") or 1 <= row.value <= 5


def test_every_number_stands_once_in_its_table_and_says_who_measured_it() -> None:
    assert len({(row.table, row.system, row.metric) for row in ROWS}) == len(ROWS)
    assert all(row.by and row.where for row in ROWS)
    assert {row.whose for row in ROWS} == {"own", "competitor", "independent"}


@pytest.mark.parametrize(
    ("system", "metric", "wanted"),
    [
        ("reward-forcing", "vbench.total", {"84.13"}),
        ("self-forcing", "vbench.total", {"84.31", "83.80", "83.00"}),
        ("longlive-1.0", "vbench.total", {"84.87", "83.22"}),
        ("causvid", "vbench.total", {"81.20", "82.88"}),
        ("wan2.1-1.3b", "vbench.total", {"84.26", "83.31", "84.67", "82.78"}),
        ("wan2.1-14b", "vbench.total", {"83.69", "83.7"}),
        ("rolling-forcing", "fps", {"16", "15.79", "17.5"}),
        ("reward-forcing", "fps", {"23.1", "13.7"}),
        ("longlive-1.0", "fps", {"20.7", "18.16", "8.4", "15.7"}),
        ("longlive-2.0-5b", "fps", {"24.8", "14.1", "18.6"}),
        ("reward-forcing", "videoreward.MQ", {"1.65"}),
        ("self-forcing", "videoreward.MQ", {"1.65"}),
        ("infinite-forcing", "vbench.total", set()),
    ],
)
def test_papers_that_contradict_each_other_stand_side_by_side(system: str, metric: str, wanted: set[str]) -> None:
    assert {row.text for row in published.about(system) if row.metric == metric} == wanted


def test_who_measured_a_number_is_seen_from_the_system() -> None:
    assert published.cell("reward-forcing/table-1", "reward-forcing", "vbench.total").whose == "own"
    assert published.cell("reward-forcing/table-1", "self-forcing", "vbench.total").whose == "competitor"
    assert published.cell("users/reward-forcing-13", "self-forcing", "fps").whose == "independent"


def test_digits_are_kept_as_printed() -> None:
    total, speed = (
        published.cell("reward-forcing/table-1", system, metric) for system, metric in (("ltx-video", "vbench.total"), ("pyramid-flow-384p", "fps"))
    )
    assert (total.text, speed.text) == ("80.00", "6.7")
    assert [total.low, total.high] == pytest.approx([79.995, 80.01])  # rounded to it, or cut off
    assert [speed.low, speed.high] == pytest.approx([6.65, 6.8])
    assert published.cell("self-forcing/table-1", "wan2.1-1.3b", "latency_s").low == 102.5


def test_a_baseline_finds_its_system_by_its_name() -> None:
    assert published.system_of("wan/self-forcing") == published.system_of("self-forcing") == "self-forcing"
    assert published.system_of("toy/teacher") is None
    of_paper = {"reward-forcing", "self-forcing", "causvid", "longlive-1.0", "rolling-forcing", "wan2.1-1.3b", "skyreels-v2-df-1.3b"}
    assert {published.system_of(name) for name in config.names_of(Baseline)} >= of_paper


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ({"columns": ["fps"], "rows": {"self-forcng": "1.0"}}, "there is no system 'self-forcng'"),
        ({"columns": ["fps", "latency_s"], "rows": {"self-forcing": "1.0"}}, "'self-forcing' has 1 numbers for 2 columns"),
        ({"columns": ["fps"], "rows": {"self-forcing": "about"}}, "'about' of 'self-forcing' is no printed number"),
        ({"columns": ["fps"], "rows": {"self-forcing": 1.5}}, "expected str, found 1.5"),
        ({"columns": ["fps"], "rows": {"self-forcing": "1"}, "notes": {"fsp": "x"}}, "the note on 'fsp' is about no column and no row"),
        ({"columns": ["fps"], "rows": {"self-forcing": "1"}, "counts": {"latency_s": 3}}, "'counts' names 'latency_s', which is no column"),
        ({"columns": ["fps"], "rows": {"self-forcing": "1"}, "details_of": "b"}, "there is no table 'b'"),
        ({"columns": ["fps"], "rows": {"self-forcing": "1"}, "colums": []}, "unknown key 'colums'"),
    ],
)
def test_a_table_that_cannot_be_right_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], sentence: str) -> None:
    (tmp_path / "systems.yaml").write_text(yaml.safe_dump({"self-forcing": {"title": "Self Forcing"}}))
    (tmp_path / "paper.yaml").write_text(yaml.safe_dump({"where": "a paper", "by": "its authors", "tables": {"a": table}}))
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    for cached in (published.systems, published.sources):
        monkeypatch.setattr(published, cached.__name__, cached.__wrapped__)
    with pytest.raises(UserError, match=re.escape(sentence)):
        published.sources()
