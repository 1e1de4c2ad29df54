"""Totals against every row that was printed with all its dimensions, and refusals of everything else."""

from __future__ import annotations

import io
import json
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfbench import published
from rfbench.errors import UserError
from rfbench.vbench.dimensions import I2V, T2V
from rfbench.vbench.totals import read, total
from tests.test_cli import call

BOARDS = {"vbench": T2V, "vbench-long": T2V, "vbench_i2v": I2V}


def printed() -> dict[tuple[str, str], dict[str, float]]:
    """(table, system) -> its numbers, of every row that was printed with all its dimensions; keys begin with the board's name."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for one in published.reported():
        rows.setdefault((one.table, one.system), {})[one.metric] = one.value
    whole = {f"{name}.{dimension}" for name, board in BOARDS.items() for dimension in board.dimensions}
    return {key: row for key, row in rows.items() if len(whole & row.keys()) in (len(T2V.dimensions), len(I2V.dimensions)) and len(row) > 9}


ROWS = printed()


def of_board(row: dict[str, float]) -> tuple[str, dict[str, float]]:
    kind = next(iter(row)).partition(".")[0]
    return kind, {name.partition(".")[2]: value for name, value in row.items()}


WAN = {name: value for name, value in of_board(ROWS["vbench-leaderboard/snapshot", "wan2.1"])[1].items() if name in T2V.dimensions}


@pytest.mark.parametrize("key", ROWS, ids=" | ".join)
def test_totals_are_the_printed_ones(key):
    """A printed dimension is rounded to 0.005 and a printed total too; together they stay below a hundredth of a point."""
    kind, row = of_board(ROWS[key])
    got = total({name: row[name] for name in BOARDS[kind].dimensions}, BOARDS[kind])
    assert got == pytest.approx({name: row[name] for name in got}, abs=0.01)


def test_there_are_rows_of_both_boards():
    assert Counter(of_board(row)[0] for row in ROWS.values()) == {"vbench": 28, "vbench-long": 2, "vbench_i2v": 7}


def test_the_ends_of_the_scale():
    """All at `high` is 100, all at `low` is 0; beyond them nothing is clamped. All zero is the leaderboard's row of -57.17."""
    for board in (T2V, I2V):
        high = total({name: 100 * one.high for name, one in board.dimensions.items()}, board)
        low = total({name: 100 * one.low for name, one in board.dimensions.items()}, board)
        assert list(high.values()) == pytest.approx([100] * 3) and list(low.values()) == pytest.approx([0] * 3, abs=1e-12)
    assert total(dict.fromkeys(T2V.dimensions, 0.0))["total"] == pytest.approx(-57.17, abs=0.005)
    assert total(dict.fromkeys(T2V.dimensions, 100.0))["semantic"] > 100


@given(name=st.sampled_from(list(T2V.dimensions)), by=st.floats(0.01, 1))
def test_a_dimension_moves_the_total_by_its_leverage(name, by):
    """Closed form of the slope: group weight / sum * weight / (high - low) / sum of weights."""
    one = T2V.dimensions[name]
    share = 0.8 / 6.5 if one.group == "quality" else 0.2 / 9
    moved = total(WAN | {name: WAN[name] - by})["total"]
    assert total(WAN)["total"] - moved == pytest.approx(by * share * one.weight / (one.high - one.low), rel=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scene": None}, "there is no VBench total: one of its dimensions is missing (scene); evaluate it"),
        ({"scene": None, "color": None}, "2 of its 16 dimensions are missing (color, scene); evaluate them"),
        ({"colour": 80.0}, "'colour' is no dimension of VBench; did you mean 'color'?"),
        ({"scene": math.nan}, "'scene' is nan %, and it can only be from 0 to 100"),
        ({"scene": math.inf}, "'scene' is inf %"),
        ({"scene": 100.01}, "'scene' is 100.01 %, and it can only be from 0 to 100"),
        ({"scene": -0.1}, "'scene' is -0.1 %"),
        ({"overall_consistency": -101.0}, "it can only be from -100 to 100"),
        ({"scene": True}, "'scene' is true, which is not a number"),
        ({"scene": "50"}, """'scene' is "50", which is not a number"""),
        ({"scene": [0.5, []]}, "'scene' is [0.5, []], which is not a number"),
    ],
)
def test_what_is_missing_or_doubtful_is_refused(change, sentence):
    dims = {name: value for name, value in (WAN | change).items() if value is not None}
    with pytest.raises(UserError) as caught:
        total(dims)
    assert sentence in str(caught.value) and caught.value.code == 2 and "\n" not in str(caught.value)


def test_the_command_prints_one_line_of_json(tmp_path, capsys, monkeypatch):
    path = tmp_path / "dims.json"
    path.write_text(json.dumps(WAN))
    code, out, err = call(capsys, "total", str(path))
    assert (code, err, out.count("\n")) == (0, "", 1)
    found = json.loads(out)
    assert found == pytest.approx({"total": 84.70, "quality": 85.64, "semantic": 80.95}, abs=0.01)

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps({name: value / 100 for name, value in WAN.items()}).encode())))
    code, out, err = call(capsys, "total", "-", "--fractions")
    assert (code, err) == (0, "") and json.loads(out) == pytest.approx(found, abs=1e-5)

    row = of_board(ROWS["vbench-leaderboard/i2v", "dreamx-world-1.0"])[1]
    path.write_text(json.dumps({name: row[name] for name in I2V.dimensions}))
    assert json.loads(call(capsys, "total", str(path), "--i2v")[1]) == pytest.approx({"total": 90.49, "i2v": 97.74, "quality": 83.24}, abs=0.01)
    assert call(capsys, "total", str(path))[0] == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (json.dumps({name: value / 100 for name, value in WAN.items()}), "looks like a fraction"),
        (json.dumps(WAN | {"scene": 0.5367}), "'scene' is 0.5367, which looks like a fraction"),
        (json.dumps(WAN | {"scene": 1}), "'scene' is 1.0, which looks like a fraction"),
        (json.dumps(WAN | {"scene": math.nan}), "'scene' is nan %"),
        (json.dumps(WAN).replace("53.67", "1e999"), "'scene' is inf %"),
        (json.dumps(WAN).replace("53.67", "9" * 5000), "'scene' is inf %"),
        (json.dumps(WAN)[:-1] + ', "scene": 53.67}', "'scene' is there twice"),
        (json.dumps(WAN)[:-1], "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (json.dumps([WAN]), "expected one JSON object"),
        ("{}", "16 of its 16 dimensions are missing"),
        (json.dumps(WAN).replace("_", " "), "'subject consistency' is no dimension of VBench; did you mean 'subject_consistency'?"),
    ],
    ids=range(13),
)
def test_a_file_that_is_not_sixteen_percentages_is_exit_2_and_one_sentence(tmp_path, capsys, text, sentence):
    path = tmp_path / "dims.json"
    path.write_text(text)
    code, out, err = call(capsys, "total", str(path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert sentence in err and len(err) < 500


def test_percent_is_refused_as_fractions_and_a_missing_file_is_named(tmp_path, capsys):
    (tmp_path / "dims.json").write_text(json.dumps(WAN))
    (tmp_path / "latin.json").write_bytes(b'{"caf\xe9": 1}')
    for arguments, sentence in (
        (["dims.json", "--fractions"], "'subject_consistency' is 95.92, which is no fraction"),
        (["nowhere.json"], "nowhere.json cannot be read (No such file or directory)"),
        (["latin.json"], "is not JSON"),
    ):
        code, out, err = call(capsys, "total", str(tmp_path / arguments[0]), *arguments[1:])
        assert (code, out) == (2, "") and sentence in err and err.count("\n") == 1


def test_fractions_and_percent_are_the_same_row(tmp_path):
    for name, values in (("percent", WAN), ("fractions", {name: value / 100 for name, value in WAN.items()})):
        (tmp_path / name).write_text(json.dumps(values))
    assert read(str(tmp_path / "fractions"), fractions=True) == pytest.approx(read(str(tmp_path / "percent")))


def test_as_vbench_itself_what_is_missing_counts_as_0_and_is_named(tmp_path, capsys):
    """Wan2.1-1.3B without temporal flickering: 84.26 becomes 51.23, as on the leaderboard."""
    row = of_board(ROWS["vbench-leaderboard/snapshot", "wan2.1-1.3b"])[1]
    dims = {name: row[name] for name in T2V.dimensions if name != "temporal_flickering"}
    (tmp_path / "dims.json").write_text(json.dumps(dims))
    assert call(capsys, "total", str(tmp_path / "dims.json"))[0] == 2
    code, out, _ = call(capsys, "total", str(tmp_path / "dims.json"), "--compat")
    found = json.loads(out)
    assert code == 0 and found.pop("missing_as_0") == ["temporal_flickering"] and found["total"] == pytest.approx(51.23, abs=0.01)
    (tmp_path / "dims.json").write_text(json.dumps(dims | {"temporal_flickering": row["temporal_flickering"]}))
    assert "missing_as_0" not in call(capsys, "total", str(tmp_path / "dims.json"), "--compat")[1]
    (tmp_path / "dims.json").write_text("{}")
    assert json.loads(call(capsys, "total", str(tmp_path / "dims.json"), "--compat")[1])["total"] == pytest.approx(-57.17, abs=0.005)
    (tmp_path / "dims.json").write_text(json.dumps(dims | {"colour": 1}))
    assert call(capsys, "total", str(tmp_path / "dims.json"), "--compat")[0] == 2, "what is unknown is refused all the same"
