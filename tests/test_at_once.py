"""Whole commands that are started at once on one directory: each item is done once, nothing is torn, and whoever comes late is told so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rfbench import generate, records
from tests import models
from tests.test_generate import PROMPTS, bytes_of, write_suite

NOTING = """
import os, sys
log = os.open(os.environ["NOTED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(event, arguments):
    if event == "os.rename":
        os.write(log, f"{os.getpid()} {arguments[1]}\\n".encode())
sys.addaudithook(note)
"""  # every file appears by a rename; so it is noted who has put which one there


def started(folder: Path, *commands: list[str]) -> tuple[list[int], list[str], Counter[str]]:
    """Exit codes and talk of commands that run at once, and how many times each file below the run directory was put in its place."""
    (folder / "hook").mkdir(exist_ok=True)
    (folder / "hook" / "sitecustomize.py").write_text(NOTING)
    environment = os.environ | {"PYTHONPATH": f"{folder / 'hook'}:{os.environ.get('PYTHONPATH', '')}", "NOTED": str(folder / "noted")}
    (folder / "noted").write_text("")
    how: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes: list[Any] = [subprocess.Popen([sys.executable, "-m", "rfbench.cli", *command], **how) for command in commands]
    talk = [process.communicate()[1] for process in processes]
    noted = [line.split(" ", 1)[1] for line in (folder / "noted").read_text().splitlines()]
    return [process.returncode for process in processes], talk, Counter(noted)


def check_answers(codes: list[int], talk: list[str]) -> None:
    """Somebody did it; whoever came while another one was at it was told, and whoever came later had nothing to do."""
    assert 0 in codes and set(codes) <= {0, 1}, talk
    for code, told in zip(codes, talk, strict=True):
        assert "Traceback" not in told
        assert code == 0 or "is being written by process" in told


def left_over(directory: Path) -> list[Path]:
    """What only somebody who is at work may have there."""
    return [path for path in directory.rglob(".*") if path.name != ".seen.json"]


@pytest.mark.parametrize("shards", [("", ""), ("1/2", "1/2", "2/2")], ids=["two", "two of one shard and the other"])
def test_clips_are_made_once(shards: tuple[str, ...], tmp_path: Path, folders: Path) -> None:
    student, suite = models.write(tmp_path, sampler=models.STUDENT | {"steps": [1000, 500]}), write_suite(tmp_path, prompts=PROMPTS[:3])
    alone = generate.generate(student, suite, name="alone")
    asked = ["generate", student, "--suite", suite, "--name", "shared"]
    codes, talk, placed = started(tmp_path, *([*asked, *(["--shard", shard] if shard else [])] for shard in shards))
    check_answers(codes, talk)
    directory = alone.parent.parent / "shared" / alone.name
    videos = {path: count for path, count in placed.items() if path.startswith(str(directory)) and path.endswith(".mp4")}
    assert sorted(videos.values()) == [1] * 6, "each video was put in its place once"
    rows = [clip.id for path in records.clip_files(directory) for clip in records.read_rows(path, records.Clip)]
    assert len(rows) == len(set(rows)) == 6
    assert not left_over(directory)
    if shards[0]:
        generate.generate(student, suite, name="shared")  # takes the rows of the shards together
    assert records.read_run(directory).status == records.DONE
    if models.products_do_not_depend_on_their_rows():
        assert bytes_of(directory) == bytes_of(alone)


def test_scores_are_given_once(tmp_path: Path, folders: Path) -> None:
    directory = generate.generate(models.write(tmp_path), write_suite(tmp_path, prompts=PROMPTS[:2]))
    codes, talk, placed = started(tmp_path, *[["eval", str(directory), "-s", "motion,subject"]] * 2)
    check_answers(codes, talk)
    for name in ("motion.jsonl", "motion.json", "subject.jsonl", "subject.json"):
        assert placed[str(directory / "scores" / name)] == 1
    for scorer in ("motion", "subject"):
        kept: list[dict[str, object]] = records.read_rows(directory / "scores" / f"{scorer}.ledger.jsonl", dict)
        assert sorted(str(row["clip"]) for row in kept) == [clip.id for clip in records.read_clips(directory)]
    assert not left_over(directory)


@pytest.mark.slow  # a cluster
def test_workers_beside_a_plain_process(tmp_path: Path, folders: Path) -> None:
    student, suite = models.write(tmp_path), write_suite(tmp_path, prompts=PROMPTS[:3])
    alone = generate.generate(student, suite, name="alone")
    asked = ["generate", student, "--suite", suite, "--name", "shared"]
    codes, talk, _ = started(tmp_path, asked, [*asked, "--engine", "ray", "--workers", "2"])
    check_answers(codes, talk)
    directory = alone.parent.parent / "shared" / alone.name
    assert records.read_run(directory).status == records.DONE and not left_over(directory)
    if models.products_do_not_depend_on_their_rows():
        assert bytes_of(directory) == bytes_of(alone)
