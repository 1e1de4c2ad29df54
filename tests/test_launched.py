"""The environment that torchrun leaves is read as it is meant, and half of it is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rfbench.errors import UserError
from rfbench.launched import Place, place

SAID = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SAID:
        monkeypatch.delenv(name, raising=False)


def test_nobody_launched_it() -> None:
    assert place() == Place() and place().first and not place().launched


def test_what_torchrun_says(tmp_path) -> None:
    code = """
import os
from rfbench.launched import place
here = place()
os.write(1, f"{here.rank} {here.size} {here.local_rank} {here.local_size}\\n".encode())
"""
    (tmp_path / "tell.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "tell.py")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert sorted(told) == ["0 2 0 2", "1 2 1 2"]


def test_of_a_node_that_is_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in zip(SAID, ("5", "8", "1", "4"), strict=True):
        monkeypatch.setenv(name, text)
    assert place() == Place(5, 8, 1, 4, True) and not place().first


@pytest.mark.parametrize(
    ("said", "sentence"),
    [({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but there is no RANK"), ({"RANK": "x"}, "RANK is 'x', which is not a number")],
)
def test_half_of_it_is_refused(said: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in said.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=sentence):
        place()
