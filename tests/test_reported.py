"""Printed numbers beside measured ones: a difference where both followed one protocol, the reason where they did not."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import subprocess

import pytest

from rfbench import published, suites
from rfbench.published import Reported
from rfbench.report import checking, leaderboard, page, reported
from rfbench.report.leaderboard import Board
from tests import fake_runs

OWN = Reported("reward-forcing", "drift.drift", "2.50", "its authors", "a paper", "a/table-1", "30 s", "own", suite="short")
RIVAL = Reported("reward-forcing", "drift.drift", "7", "others", "their paper", "b/table-9", "60 s", "competitor", suite="long")
FPS = Reported("reward-forcing", "fps", "23.1", "its authors", "a paper", "a/table-1", "", "own")
ABSENT = Reported("reward-forcing", "vbench.total", "84.13", "its authors", "a paper", "a/table-1", "", "own", suite="short")


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Board:
    root = tmp_path_factory.mktemp("reported")
    directory = fake_runs.write_bench(root, "a", "short", ["a red disc moves left", "a blue square"], plain=fake_runs.baseline("a"))
    fake_runs.write_scores(directory)
    found = leaderboard.read_runs([directory, fake_runs.write_profile(root, "a", {"a": 20.0}, chunks=6)])
    (row,) = found.rows
    return dataclasses.replace(found, rows=(dataclasses.replace(row, reported=(OWN, RIVAL, FPS, ABSENT)),))


def test_a_difference_only_within_one_protocol(board):
    own, rival, fps, absent = reported.beside(board)
    drift = board.cells["a", "short", "drift.drift"].value
    assert drift is not None and own.difference == pytest.approx(drift - 2.5) and own.why == ""
    assert rival.measured == own.measured and rival.difference is None and rival.why == "other protocol: 60 s"
    assert fps.metric == "profile.e2e_fps" and fps.measured == board.cells["a", fps.column, "profile.e2e_fps"].value
    assert fps.difference is None and fps.why == "other protocol: prompts and length are not stated"
    assert absent.column is None and absent.measured is None and absent.why == "not in this table"


def test_tables_say_who_printed_what(board):
    own = board.cells["a", "short", "drift.drift"].value
    assert own is not None
    text = reported.to_markdown(board)
    sign = "+" if own > 2.5 else "−"
    assert f"| 2.50 | its authors, table-1 of a paper | {own:.2f} | {sign}{abs(own - 2.5):.2f} |" in text
    assert "| 7 | others, table-9 of their paper ‡ |" in text and "84.13" not in text
    assert text in checking.texts(board, ())["README.md"]
    rows = list(csv.DictReader(checking.texts(board, ())["reported.csv"].splitlines()))
    assert [row["reported"] for row in rows] == ["2.50", "7", "23.1", "84.13"]
    assert float(rows[0]["difference"]) == pytest.approx(own - 2.5, abs=1e-5) and rows[1]["difference"] == "" and rows[1]["whose"] == "competitor"
    html = page.to_html(board, (), (), "", ())
    assert "their paper ‡" in html and f"{sign}{abs(own - 2.5):.2f}</td>" in html


def test_latex_has_printed_numbers_beside_measured_ones_and_compiles(board, tmp_path):
    text = checking.texts(board, ())["leaderboard.tex"]
    (line,) = [line for line in text.splitlines() if "& 2.50 &" in line]
    own = board.cells["a", "short", "drift.drift"].value
    assert own is not None
    sign = "+" if own > 2.5 else "$-$"
    wanted = ["a", "drift, short", "2.50", "its authors, table-1 of a paper", f"{own:.2f}", f"{sign}{abs(own - 2.5):.2f}"]
    assert [cell.strip().removesuffix(" \\\\") for cell in line.split(" & ")] == wanted
    assert r"their paper $\ddagger$" in text and text.count("\\begin{tabular}") == text.count("\\bottomrule") == 3
    if shutil.which("pdflatex"):
        (tmp_path / "all.tex").write_text("\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + text + "\\end{document}\n")
        command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60).returncode == 0


def test_a_report_about_which_nothing_was_printed_has_no_such_table(board):
    plain = dataclasses.replace(board, rows=tuple(dataclasses.replace(row, reported=()) for row in board.rows))
    assert reported.to_markdown(plain) == "" and "reported.csv" not in checking.texts(plain, ())


def test_printed_tables_name_suites_that_there_are_and_notes_take_them_away():
    named = {table.suite for source in published.sources().values() for table in source.tables.values()} - {None}
    assert named == {"vbench-forcing", "moviegen-60s"} <= set(suites.SUITES)
    assert published.cell("reward-forcing/table-1", "reward-forcing", "vbench.total").suite == "vbench-forcing"
    assert published.cell("reward-forcing/table-2", "reward-forcing", "vbench-long.drift").suite is None  # another formula than the printed one
    assert published.cell("self-forcing/table-1", "nova", "vbench.total").suite is None  # at another size
