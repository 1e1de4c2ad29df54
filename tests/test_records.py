"""Files appear whole or not at all, whatever happens to the process that writes them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfbench import records
from rfbench.errors import UserError
from rfbench.records import Clip, Run, Score

ROOT = Path(records.__file__).parent.parent
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
SCORES = st.lists(
    st.builds(Score, clip=ANY_TEXT, metric=ANY_TEXT, value=st.floats(allow_nan=False, allow_infinity=False), segment=st.none() | st.integers())
)


def child(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A process with nothing but the standard library and rfbench.records; killed processes start quickly that way."""
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pathlib import Path\nfrom rfbench import records\n{code}"
    return subprocess.Popen([sys.executable, "-I", "-S", "-c", lines, *map(str, arguments)])


def kill_once_it_writes(process: subprocess.Popen[bytes], path: Path, delay: float) -> None:
    before = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size <= before:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()


@given(rows=SCORES, more=SCORES, data=st.data())
def test_a_torn_tail_costs_the_torn_row_only(tmp_path_factory, rows, more, data):
    path = tmp_path_factory.mktemp("rows") / "scores.jsonl"
    with records.appending(path) as append:
        for row in rows:
            append(row)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    survivors = rows[: whole[:cut].count(b"\n")]
    assert records.read_rows(path, Score) == survivors
    with records.appending(path) as append:
        for row in more:
            append(row)
    assert records.read_rows(path, Score) == survivors + more
    assert path.read_bytes().count(b"\n") == len(survivors) + len(more)


@given(rows=SCORES)
def test_appending_one_by_one_equals_writing_at_once(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    with records.appending(folder / "a.jsonl") as append:
        for row in rows:
            append(row)
    records.write_rows(folder / "b.jsonl", rows)
    assert (folder / "a.jsonl").read_bytes() == (folder / "b.jsonl").read_bytes()


@given(prompt=ANY_TEXT)
def test_any_prompt_survives_the_disk(tmp_path_factory, prompt):
    path = tmp_path_factory.mktemp("rows") / "clips.jsonl"
    clip = Clip("0000-0", 0, 0, prompt, prompt, 1, 81, 16, 48, 64, "videos/0000-0.mp4", "0" * 64)
    records.write_rows(path, [clip])
    assert records.read_rows(path, Clip) == [clip]


def test_a_killed_appender_leaves_whole_rows_and_the_next_one_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    code = """
rows = len(records.read_rows(Path(sys.argv[1]), dict))
with records.appending(Path(sys.argv[1])) as append:
    while True:
        append({"n": rows, "padding": "x" * (rows * 37 % 5000)})
        rows += 1
"""
    rng = random.Random(0)
    for _ in range(4):
        kill_once_it_writes(child(code, path), path, rng.uniform(0, 0.02))
        found: list[dict[str, Any]] = records.read_rows(path, dict)
        assert [row["n"] for row in found] == list(range(len(found)))
    assert len(found) > 4


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "run.json"
    code = """
size = 0
while True:
    size += 1
    records.write_json(Path(sys.argv[1]), {"size": size, "body": list(range(size % 3000))})
"""
    rng = random.Random(1)
    for _ in range(3):
        path.unlink(missing_ok=True)
        kill_once_it_writes(child(code, path), path, rng.uniform(0, 0.05))
        found = json.loads(path.read_text())
        assert found["body"] == list(range(found["size"] % 3000))


def test_a_file_that_may_not_grow_fails_with_a_sentence_and_keeps_the_old_content(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse a write in the middle, as a full disk does."""
    records.write_json(tmp_path / "run.json", {"old": True})
    code = """
import resource
from rfbench.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
folder, sentences = Path(sys.argv[1]), []
try:
    records.write_json(folder / "run.json", {"new": "x" * 100_000})
except UserError as error:
    sentences.append((error.code, str(error)))
try:
    with records.appending(folder / "rows.jsonl") as append:
        for n in range(100_000):
            append({"n": n})
except UserError as error:
    sentences.append((error.code, str(error)))
assert len(sentences) == 2 and all(code == 1 and "could not write" in text for code, text in sentences), sentences
"""
    assert child(code, tmp_path).wait() == 0
    assert records.read_json(tmp_path / "run.json") == {"old": True}
    rows: list[dict[str, Any]] = records.read_rows(tmp_path / "rows.jsonl", dict)
    assert rows and [row["n"] for row in rows] == list(range(len(rows)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "run.json"]
    with records.appending(tmp_path / "rows.jsonl") as append:
        append({"n": len(rows)})
    assert len(records.read_rows(tmp_path / "rows.jsonl", dict)) == len(rows) + 1


def test_a_full_disk_is_a_sentence_with_code_1(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        records.write_text(tmp_path / "x.txt", "text")
    assert caught.value.code == 1
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), records.atomic(tmp_path / "clip.mp4") as temporary:
        assert temporary.suffix == ".mp4"  # writers go by the ending
        temporary.write_bytes(b"half")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_damage_before_the_last_line_is_refused_by_line_number(tmp_path):
    path = tmp_path / "scores.jsonl"
    records.write_rows(path, [Score("0000-0", "m", 1.0), Score("0000-1", "m", 2.0)])
    path.write_bytes(b"{broken}\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"scores\.jsonl line 1 is damaged"):
        records.read_rows(path, Score)


@pytest.mark.parametrize("change", [{"extra": 1}, {"value": None, "valeu": 1.0}])
def test_a_row_of_another_schema_is_refused(tmp_path, change):
    row = dataclasses.asdict(Score("0000-0", "m", 1.0)) | change
    (tmp_path / "scores.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 1: not a Score"):
        records.read_rows(tmp_path / "scores.jsonl", Score)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=20,
)


@given(value=st.dictionaries(ANY_TEXT, JSON), seed=st.randoms())
def test_a_fingerprint_knows_values_and_not_the_order_of_keys(value, seed):
    keys = list(value)
    seed.shuffle(keys)
    shuffled = {key: value[key] for key in keys}
    assert records.fingerprint(shuffled) == records.fingerprint(value)
    assert json.loads(records.canonical(value)) == value
    assert records.fingerprint({**value, "another key": 1}) != records.fingerprint({**value, "another key": 2})


def test_nan_has_no_fingerprint_and_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        records.fingerprint({"x": float("nan")})
    with pytest.raises(ValueError, match="Out of range"), records.appending(tmp_path / "scores.jsonl") as append:
        append(Score("0000-0", "m", float("nan")))
    assert records.read_rows(tmp_path / "scores.jsonl", Score) == []


def test_a_run_survives_the_disk(tmp_path):
    run = Run("train", "toy/x", {"steps": [1, 2]}, "f" * 64, {"code": {"commit": None}}, result={"loss": 0.5})
    records.write_run(tmp_path, run)
    assert records.read_run(tmp_path) == run
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o644


def test_what_is_no_run_is_said_to_be_none(tmp_path):
    with pytest.raises(UserError, match=r"has no run\.json"):
        records.read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        records.read_run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not a Run of schema 1"):
        records.read_run(tmp_path)
