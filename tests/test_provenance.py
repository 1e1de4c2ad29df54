"""The life of a run directory: one writer, one set of inputs, and a state from which the same command goes on."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfbench import provenance, records
from rfbench.errors import UserError
from rfbench.provenance import differences, session

ROOT = Path(provenance.__file__).parent.parent

WORK = """
import sys, time
from pathlib import Path
from rfbench import provenance, records
from rfbench.errors import UserError

def work(directory, count, pause=0.0, gate=None, **how):
    '''A verb in small: `count` artefacts, a row for each after its rename, nothing done twice.'''
    inputs = {"count": count}
    with provenance.session(directory, "generate", "a/b", inputs, **how) as run:
        if run.done:
            return
        writer = how.get("writer")
        mine = [i for i in range(count) if writer is None or i % 2 == int(writer)]
        rows = directory / (f"rows.{writer}.jsonl" if writer else "rows.jsonl")
        made = {row["i"] for row in records.read_rows(rows, dict)}
        with records.appending(rows) as append:
            for i in mine:
                if i not in made:
                    with records.atomic(directory / "videos" / f"{i}.mp4") as temporary:
                        temporary.write_bytes(bytes([i]) * 20_000)
                        time.sleep(pause)
                        while gate is not None and not gate.exists():
                            time.sleep(0.01)
                    append({"i": i})
        found = [row for path in directory.glob("rows*.jsonl") for row in records.read_rows(path, dict)]
        run.complete = len(found) == count
        run.result["count"] = len(found)
"""
exec(WORK)
work = globals()["work"]


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"{WORK}\n{code}", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(directory: Path) -> dict[str, object]:
    """Everything under a directory; of run.json, all but what a clock says."""
    found: dict[str, object] = {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}
    run = json.loads((directory / "run.json").read_text())
    found["run.json"] = {key: value for key, value in run.items() if key not in ("started", "ended", "seconds")}
    return found


def wait_until(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def is_held_by(lock: Path, pid: int) -> bool:
    return lock.exists() and lock.read_text() == str(pid)


def test_an_undisturbed_run(tmp_path):
    work(tmp_path / "a" / "b", 3)
    run = records.read_run(tmp_path / "a" / "b")
    assert (run.verb, run.name, run.status, run.result, run.error) == ("generate", "a/b", "done", {"count": 3}, None)
    assert run.fingerprint == records.fingerprint({"count": 3})
    assert run.ended is not None and run.started <= run.ended and run.started.endswith("Z")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["rows.jsonl", "run.json", "videos"]
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "b"]


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_ends_with_the_same_files(tmp_path, seed):
    """SIGKILL at a random moment, again and again, from the making of the directory to the last artefact."""
    assert child("work(Path(sys.argv[1]), 8)", tmp_path / "whole").wait() == 0
    directory = tmp_path / "killed"
    rng = random.Random(seed)
    for _ in range(2):
        process = child("work(Path(sys.argv[1]), 8, pause=0.05)", directory)  # so that neither is over before it is killed
        wait_until(process, functools.partial(is_held_by, directory / ".lock", process.pid))
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert child("work(Path(sys.argv[1]), 8)", directory).wait() == 0
    assert files(directory) == files(tmp_path / "whole")


def test_a_run_that_is_done_is_left_alone(tmp_path):
    work(tmp_path / "x", 2)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    work(tmp_path / "x", 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")} == before


def test_a_run_that_is_done_can_be_taken_up_again(tmp_path):
    work(tmp_path / "x", 2)
    with session(tmp_path / "x", "generate", "a/b", {"count": 2}) as run:
        assert run.done and run.resumed
        run.reopen()
        assert records.read_run(tmp_path / "x").status == "running"
        run.result["repaired"] = 1
    assert records.read_run(tmp_path / "x").status == "done"
    assert records.read_run(tmp_path / "x").result == {"count": 2, "repaired": 1}


def test_other_inputs_are_refused_and_named(tmp_path):
    with session(tmp_path / "x", "train", "x", {"sampler": {"steps": (1000, 500), "shift": 5.0}, "seed": 0}):
        pass
    before = files(tmp_path / "x")
    with pytest.raises(UserError) as caught, session(tmp_path / "x", "train", "x", {"sampler": {"steps": (1000, 250), "shift": 5}, "batch": 8}):
        pass
    assert "(batch: absent -> 8; sampler.shift: 5.0 -> 5; sampler.steps[1]: 500 -> 250; seed: 0 -> absent)" in str(caught.value)
    assert "--fresh" in str(caught.value) and "--name" in str(caught.value) and caught.value.code == 2
    with pytest.raises(UserError, match="holds a train run, not a generate run"), session(tmp_path / "x", "generate", "x", {"seed": 0}):
        pass
    assert files(tmp_path / "x") == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, "a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
)


@given(old=st.dictionaries(st.sampled_from("xyz"), JSON), new=st.dictionaries(st.sampled_from("xyz"), JSON))
def test_differences_are_found_exactly_where_fingerprints_differ(old, new):
    assert bool(differences(old, new)) == (records.fingerprint(old) != records.fingerprint(new))
    for line in differences(old, new):
        key = line.split(":")[0].split(".")[0].split("[")[0]
        assert key not in old or key not in new or records.canonical(old[key]) != records.canonical(new[key])


def test_a_failure_is_written_down_in_one_line_and_gone_after_success(tmp_path):
    for error, line in ((ValueError("two\nlines"), "ValueError: two lines"), (UserError("the clip broke", code=1), "the clip broke")):
        with pytest.raises(type(error)), session(tmp_path / "x", "train", "x", {}) as run:
            run.result["loss"] = 0.1
            raise error
        failed = records.read_run(tmp_path / "x")
        assert (failed.status, failed.error, failed.result) == ("failed", line, {})
    with session(tmp_path / "x", "train", "x", {}) as run:
        assert run.resumed and not run.done
    assert (records.read_run(tmp_path / "x").status, records.read_run(tmp_path / "x").error) == ("done", None)


def test_ctrl_c_leaves_it_running_with_its_seconds(tmp_path):
    with pytest.raises(KeyboardInterrupt), session(tmp_path / "x", "train", "x", {}):
        time.sleep(0.02)
        raise KeyboardInterrupt
    run = records.read_run(tmp_path / "x")
    assert run.status == "running" and run.error is None and run.ended is None and run.seconds >= 0.02


def test_a_second_writer_is_told_who_writes(tmp_path):
    process = child("work(Path(sys.argv[1]), 100, gate=Path('nowhere'))", tmp_path / "x")
    wait_until(process, (tmp_path / "x" / "videos").exists)
    for how in ({}, {"fresh": True}, {"writer": "1"}):
        with pytest.raises(UserError, match=f"is being written by process {process.pid}") as caught:
            work(tmp_path / "x", 100, **how)
        assert caught.value.code == 1
    process.kill()
    process.communicate()
    with session(tmp_path / "x", "generate", "a/b", {"count": 100}) as run:
        assert run.resumed


def test_shards_share_a_directory_and_the_last_one_closes_it(tmp_path):
    assert child("work(Path(sys.argv[1]), 6)", tmp_path / "whole").wait() == 0
    directory = tmp_path / "shards"
    gate = tmp_path / "gate"
    started = child("work(Path(sys.argv[1]), 6, gate=Path(sys.argv[2]), writer='0')", directory, gate)
    wait_until(started, (directory / "videos").exists)
    with pytest.raises(UserError, match="is being written by process"):
        work(directory, 6, writer="0")
    with pytest.raises(UserError, match="is being written by process"):
        work(directory, 6)
    assert child("work(Path(sys.argv[1]), 6, writer='1')", directory).wait() == 0
    assert records.read_run(directory).status == "running"
    gate.touch()
    assert started.wait() == 0
    assert records.read_run(directory).status == "done"
    left, right = files(directory), files(tmp_path / "whole")
    rows = b"".join(str(left.pop(f"rows.{writer}.jsonl")).encode() for writer in "01")
    assert rows.count(b'"i"') == 6 and right.pop("rows.jsonl")
    assert left == right


def test_fresh_and_shard_together_are_refused(tmp_path):
    with pytest.raises(UserError, match="would remove what other shards have made"):
        work(tmp_path / "x", 6, fresh=True, writer="1")


def test_fresh_starts_over_even_with_other_inputs(tmp_path):
    work(tmp_path / "x", 5)
    work(tmp_path / "x", 2, fresh=True)
    work(tmp_path / "y", 2)
    assert files(tmp_path / "x") == files(tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_fresh_that_is_killed_while_it_removes_leaves_nothing_of_the_old_run(tmp_path, monkeypatch):
    work(tmp_path / "x", 3)

    def killed(path: Path, **_: object) -> None:
        (path / "rows.jsonl").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            work(tmp_path / "x", 2, fresh=True)
    assert not (tmp_path / "x").exists()
    work(tmp_path / "x", 2)
    work(tmp_path / "y", 2)
    assert files(tmp_path / "x") == files(tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_what_is_not_a_run_is_neither_used_nor_removed(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("dear")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"holds files but no run\.json"):
            work(tmp_path / "x", 2, fresh=fresh)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "", "a//b", ".hidden", "a b", "a\nb", "a/"])
def test_a_name_that_could_leave_its_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot be called"), session(tmp_path / "x", "train", name, {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not make") as caught, session(tmp_path / "file" / "x", "train", "x", {}):
        pass
    assert caught.value.code == 1


def test_a_machine_is_described_without_its_name_or_paths():
    text = json.dumps(provenance.environment())
    assert os.uname().nodename not in text and str(Path.home()) not in text and str(ROOT) not in text
    assert provenance.machine()["cores"] >= 1 and provenance.machine()["memory_gib"] >= 1
    assert provenance.packages()["torch"].startswith("2.") and "flask" not in provenance.packages()


def test_describing_a_machine_does_not_load_torch():
    process = child("provenance.environment(); print('torch' in sys.modules, 'pandas' in sys.modules)")
    assert process.communicate()[0].split() == ["False", "False"]


def test_the_commit_and_whether_it_is_what_runs(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(provenance, "HOME", tmp_path)
    described = provenance.code.__wrapped__
    assert (described()["commit"], described()["dirty"]) == (None, None)
    git("init", "-q")
    (tmp_path / "reports").mkdir()
    for name in ("code.py", "reports/table.md"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "-qm", "x")
    assert (described()["commit"], described()["dirty"]) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "reports" / "table.md").write_text("2")
    assert described()["dirty"] is False
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook
    (tmp_path / "code.py").write_text("2")
    assert described()["dirty"] is True


def test_going_on_with_other_code_is_written_down(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), session(tmp_path / "x", "train", "x", {}):
        raise KeyboardInterrupt
    assert "continued_on" not in records.read_run(tmp_path / "x").recorded
    monkeypatch.setattr(provenance, "code", lambda: {"version": "9", "commit": "f" * 40, "dirty": True})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), session(tmp_path / "x", "train", "x", {}) as run:
            run.record(attention="sdpa")
            raise KeyboardInterrupt
    recorded = records.read_run(tmp_path / "x").recorded
    assert [other["code"]["version"] for other in recorded["continued_on"]] == ["9"]
    assert recorded["attention"] == "sdpa" and recorded["code"]["version"] != "9"
