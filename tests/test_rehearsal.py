"""Scorers are tried on two tiny clips: what works, what does not and why, and that one of them does not stop the next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rfbench import cli, rehearsal
from rfbench.errors import UserError
from rfbench.records import Clip, Score
from rfbench.scorers import base
from rfbench.scorers.base import LIGHT, Answer, Metric


class Failing:
    """A scorer that raises what a test wants, or answers if that is None."""

    name, version, metrics, weights, together = "failing", "7", {"speed": Metric(True, "px", "A number.")}, {"a": "b"}, False
    error: Exception | None = None

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        if self.error is not None:
            raise self.error
        yield from (Answer(clip.id, (Score(clip.id, "speed", 1.0),)) for clip in clips)


FAILING = Failing()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    monkeypatch.setitem(base.SCORERS, "failing", "tests.test_rehearsal:FAILING")
    return FAILING


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval", "--check-setup", "--json", *arguments])
    said = capsys.readouterr()
    return int(caught.value.code or 0), json.loads(said.out) if said.out else None, said.err


def test_what_needs_nothing_works():
    checks = rehearsal.rehearse([*LIGHT, "flicker", "appearance", "flow", "reference"])
    assert [check.state for check in checks] == ["ok"] * 8
    assert "rows in" in checks[0].found and "version 1" in checks[0].found


def test_what_lacks_something_says_what_and_the_next_is_tried(folders, capsys):
    code, checks, _ = call(capsys, "-s", "judge,videoreward,flicker")
    assert code == 1 and [check["state"] for check in checks] == ["missing", "missing", "ok"]
    assert "add [judge] with model" in checks[0]["found"] and "`rfbench fetch videoreward` brings it" in checks[1]["found"]


@pytest.mark.parametrize(
    ("error", "state", "found"),
    [
        (None, "ok", "2 rows in"),
        (UserError("weights are missing; fetch them"), "missing", "weights are missing; fetch them"),
        (UserError("the server broke", code=1), "broken", "the server broke"),
        (ModuleNotFoundError("No module named 'spoken'", name="spoken"), "missing", "No module named 'spoken'"),
        (ZeroDivisionError("division\nby zero"), "broken", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_is_told_apart(failing, folders, capsys, error, state, found):
    failing.error = error
    code, checks, _ = call(capsys, "-s", "failing", "-s", "flicker")
    assert [check["state"] for check in checks] == [state, "ok"] and checks[0]["found"].startswith(found)
    assert code == (state != "ok") and bool(checks[0]["fix"]) == (state != "ok")


def test_wrong_requests_are_refused(capsys, folders):
    assert call(capsys, "-s", "flickr")[::2] == (2, "error: there is no scorer 'flickr'; did you mean 'flicker'?\n")
    assert call(capsys, "some/run")[0] == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["eval"])
    assert caught.value.code == 2 and "say which run to score" in capsys.readouterr().err
