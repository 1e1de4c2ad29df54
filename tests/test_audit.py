"""The audit's rules on numbers whose faults are known because they were put in, and on what is shipped."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rfbench import published
from rfbench.published import Reported
from rfbench.report import audit
from rfbench.report.audit import Check
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.totals import total
from tests.test_cli import call


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Audit of tables that a test makes up: source name -> fields."""

    def run(sources: dict[str, dict[str, Any]], claims: dict[str, Any] | None = None) -> list[Check]:
        (tmp_path / "systems.yaml").write_text(yaml.safe_dump({name: {"title": name, "by": f"{name} team"} for name in "abcd"}))
        (tmp_path / "claims.yaml").write_text(yaml.safe_dump(claims or {}))
        for name, fields in sources.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"where": name, "by": f"{name} team"} | fields))
        monkeypatch.setattr(published, "FOLDER", tmp_path)
        for reader in ("systems", "sources", "reported", "statements"):
            plain = getattr(published, reader)
            monkeypatch.setattr(published, reader, functools.cache(getattr(plain, "__wrapped__", plain)))
        return audit.audit()

    return run


def broken(checks: list[Check]) -> list[str]:
    return [check.what for check in checks if check.verdict == audit.BROKEN]


def table(columns: list[str], rows: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"columns": columns, "rows": rows, **more}


def test_a_total_is_the_mean_of_its_groups(checked: Any) -> None:
    columns = ["vbench.total", "vbench.quality", "vbench.semantic"]
    rows = {"a": "84.13 84.84 81.32", "b": "84.16 84.84 81.32", "c": "84.1 84.84 81.32"}
    found = checked({"p": {"tables": {"t": table(columns, rows)}}})
    assert broken(found) == ["vbench.total of b (p/t)"]


DIMS = st.fixed_dictionaries({name: st.floats(30, 99).map(lambda value: round(value, 2)) for name in T2V.dimensions})


@given(dims=DIMS, fault=st.sampled_from(["none", "total", "quality", "semantic"]), seed=st.integers(0, 99))
def test_rounding_is_forgiven_and_nothing_else(dims: dict[str, float], fault: str, seed: int) -> None:
    """Numbers that are rounded after the totals were made of them never fail; a total moved by twice the slack always does."""
    rng = random.Random(seed)
    exact = {name: value + rng.uniform(-0.00499, 0.00499) for name, value in dims.items()}
    values = {name: value + (0.06 if name == fault else 0) for name, value in total(exact).items()} | dims
    row = {f"vbench.{name}": Reported("a", f"vbench.{name}", f"{value:.2f}", "x", "x", "p/t", "", "own") for name, value in values.items()}
    verdicts = {check.rule.split()[0]: check.verdict for check in audit.totals_of_dimensions({("p/t", "a"): row})}
    assert {name for name, verdict in verdicts.items() if verdict == audit.BROKEN} == ({fault} - {"none"})


@given(count=st.integers(20, 999), hits=st.integers(0, 999), places=st.integers(2, 5), cut=st.booleans())
def test_a_share_fits_its_own_parts_rounded_or_cut(count: int, hits: int, places: int, cut: bool) -> None:
    share = Fraction(100 * min(hits, count), count)
    scaled = share * 10**places
    digits = f"{(int(scaled) if cut else round(scaled)):0{places + 1}d}"
    one = Reported("a", "vbench.dynamic_degree", f"{digits[:-places]}.{digits[-places:]}", "x", "x", "p/t", "", "own")
    assert audit._fits(one, count, 100.0)


def test_parts_that_are_not_whole_are_found_and_the_right_number_of_them_is_told(checked: Any) -> None:
    means = {"a": 644 / 355, "b": 1279 / 355, "c": 990 / 355, "d": 713 / 355}
    rows = {name: f"{mean:.5f}" for name, mean in means.items()}
    found = checked({"p": {"tables": {"t": table(["user_study.overall"], rows, counts={"user_study.overall": 400})}}})
    assert len(broken(found)) == 5
    (told,) = [check for check in found if check.rule == "number of parts"]
    assert told.computed == "all 4 that do not fit are whole 355ths"
    # two digits say too little to tell the number of parts
    rows = {name: f"{mean:.1f}" for name, mean in means.items()}
    found = checked({"p": {"tables": {"t": table(["user_study.overall"], rows, counts={"user_study.overall": 7})}}})
    assert not [check for check in found if check.rule == "number of parts"]


@pytest.mark.parametrize(
    ("by", "unit", "verdict"), [("1.36", "times", "follows"), ("1.38", "times", "does not follow"), ("36", "percent", "follows")]
)
def test_a_printed_ratio_is_that_of_the_printed_numbers(checked: Any, by: str, unit: str, verdict: str) -> None:
    claims = {"c": {"text": "x", "said": "y", "published": {"table": "p/t", "metric": "fps", "better": "a", "than": "b", "by": by, "unit": unit}}}
    found = checked({"p": {"tables": {"t": table(["fps"], {"a": "23.10", "b": "17.00"})}}}, claims)
    assert [check.verdict for check in found if check.rule == f"{unit} over b"] == [verdict]


def test_a_difference_of_shares_is_held_against_chance(checked: Any) -> None:
    claims = {
        name: {"text": "x", "said": "y", "published": {"table": "p/t", "metric": "vbench.dynamic_degree", "better": "a", "than": name}}
        for name in "bc"
    }
    rows = {"a": "50.00", "b": "43.75", "c": "25.00"}
    found = checked({"p": {"tables": {"t": table(["vbench.dynamic_degree"], rows, counts={"vbench.dynamic_degree": 128})}}}, claims)
    chance = {check.what.rpartition(" ")[2]: (check.verdict, check.slack) for check in found if check.rule == "more than chance"}
    assert chance["b"][0] == audit.OPEN and chance["c"][0] == audit.FOLLOWS
    # 1.96 * sqrt(0.5 * 0.5 / 128 + 0.4375 * 0.5625 / 128)
    assert chance["b"][1] == "±12.20"


def test_several_numbers_of_one_thing_stand_beside_each_other_and_what_is_taken_over_is_told(checked: Any) -> None:
    columns = ["vbench.total", "vbench.quality"]
    found = checked(
        {
            "a": {"month": "2025-01", "tables": {"t": table(columns, {"a": "84.31 85.07", "b": "80.0 81.0"})}},
            "c": {"month": "2025-06", "tables": {"t": table(columns, {"a": "83.80 84.59", "b": "80.0 81.0"})}},
            "d": {"tables": {"t": table(columns, {"a": "83.80 84.59"})}},
        }
    )
    (differ,) = [check for check in found if check.verdict == audit.DIFFER]
    assert differ.printed == "84.31 (a/t), 83.80 (c/t, d/t)" and differ.slack == "widest 0.51 (total)" and differ.computed == "2 of 2 differ"
    (again,) = [check for check in found if check.verdict == audit.REPEATED]
    assert (again.what, again.computed) == ("vbench.total, vbench.quality of b (c/t)", "as in a/t")


def test_the_papers_numbers() -> None:
    """Three of five totals of Table 2 do not follow, all of Table 1 do; no mean of the user study has the stated number of ratings."""
    checks = audit.audit()
    found = {(check.rule, check.what): check for check in checks}
    totals = {what.split()[2]: check.verdict for (rule, what), check in found.items() if rule == "total of 6 dimensions"}
    assert {system for system, verdict in totals.items() if verdict == audit.BROKEN} == {"causvid", "longlive-1.0", "reward-forcing"}
    assert len(totals) == 5
    assert found["total of 6 dimensions", "vbench-long.total of reward-forcing (reward-forcing/table-2)"].computed == "81.72"
    assert all(check.verdict == audit.FOLLOWS for check in checks if "16 dimensions" in check.rule or check.rule == "total of its groups")
    assert Counter(check.verdict for check in checks if check.rule == "whole 400ths") == {audit.BROKEN: 12}
    assert {check.computed for check in checks if check.rule == "number of parts"} == {"all 4 that do not fit are whole 355ths"}
    fits = {
        what.split()[2] for (rule, what), check in found.items() if rule == "whole 128ths" and "table-3" in what and check.verdict == audit.BROKEN
    }
    assert fits == {"reward-forcing/alpha-0.99", "reward-forcing/alpha-0.9", "reward-forcing/alpha-0.5"}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "report", "--audit", "--json")
    assert (code, err) == (0, "") and len(json.loads(out)) == len(audit.audit())
    code, out, _ = call(capsys, "report", "--audit")
    assert code == 0 and "81.72" in out
    code, _, err = call(capsys, "report", "--audit", "--check")
    assert code == 2 and "--audit is about published numbers alone" in err
    code, out, _ = call(capsys, "list", "claims", "--json")
    ledger = {row["name"]: row for row in json.loads(out)}
    assert "toy-full" in ledger["redmd-dynamics"]["tested by"] and ledger["redmd-dynamics"]["published"] == "64.06 against 43.75"
    assert ledger["people-prefer"]["tested by"] == "no study" and ledger["ema-copying"]["said"] == "here"
