"""The page in a browser: sorting, filtering, provenance and players work by keyboard, without a complaint or a request."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from rfbench import report, statistics
from rfbench.report import tradeoffs
from tests import browser, test_report


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    test_report.write_runs(root, test_report.PROMPTS[:3])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("RFBENCH_TOML", raising=False)
        return report.report([], study="study.yaml", out=root / "reports").resolve()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Tab]:
    if browser.CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with browser.tab(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(chromium: browser.Tab, written: Path) -> Iterator[browser.Tab]:
    chromium.complaints.clear()
    chromium.requests.clear()
    chromium.open(written)
    yield chromium
    assert chromium.complaints == []
    assert {url for url in chromium.requests if not url.startswith("data:")} == {written.as_uri()}


def test_a_link_to_a_claim_shows_it_alone_with_what_decides_it(tab: browser.Tab) -> None:
    seen = "[...document.querySelectorAll('.finding')].filter(one => one.checkVisibility()).map(one => one.id)"
    assert len(tab.js(seen)) == 8 and not tab.js("[...document.querySelectorAll('.deciding')].some(one => one.open)")
    tab.js("location.hash = '#claim-steadier'")
    tab.until("document.querySelector('#claim-steadier details').open")
    assert tab.js(seen) == ["claim-steadier"]
    told = tab.js("document.querySelector('#claim-steadier').innerText")
    for word in ("Prompt by prompt", "The interval that decides", "5.08 of reward-forcing/no-sink", "better on", "would change it"):
        assert word in told
    tab.js("document.querySelector('#claim-steadier a[href=\"#claims\"]').click()")
    tab.until(f"{seen}.length === 8")


NAMES = "[...document.querySelectorAll('.board')[0].tBodies].flatMap(body => [...body.rows]).filter(row => row.dataset.name && row.checkVisibility())"
SPEED = "[...document.querySelectorAll('.board')[0].querySelectorAll('.sort')].find(one => one.textContent.startsWith('speed'))"


def names(tab: browser.Tab) -> list[str]:
    found: list[str] = tab.js(NAMES + ".map(row => row.querySelector('th > span').textContent)")
    return found


def test_a_heading_sorts_by_keyboard_and_says_so(tab: browser.Tab) -> None:
    before = names(tab)
    tab.js(SPEED + ".focus()")
    tab.press("Enter")
    assert tab.js(SPEED + ".closest('th').ariaSort") == "descending"
    best_first = names(tab)
    assert sorted(best_first) == sorted(before) and best_first[-2:] == ["teacher", "absent"]  # what has no number stays below
    tab.press(" ")
    assert tab.js(SPEED + ".closest('th').ariaSort") == "ascending"
    assert names(tab)[0] == "teacher" and names(tab)[-1] == "absent"


def test_the_filter_keeps_the_rows_that_hold_every_word(tab: browser.Tab) -> None:
    tab.js("document.getElementById('filter').focus()")
    tab.do("Input.insertText", text="STUD")
    assert names(tab) == ["student"]
    assert tab.js("document.getElementById('filtered').textContent") == "1 of 4 contenders"
    tab.do("Input.insertText", text=" nothing of this name")
    assert names(tab) == [] and tab.js("[...document.querySelectorAll('.board tbody')].every(body => body.hidden)")


def test_a_number_says_where_it_came_from_and_gives_the_focus_back(tab: browser.Tab) -> None:
    tab.js("window.cell = " + NAMES + ".find(row => row.dataset.name.startsWith('student')).querySelector('.cell'); cell.focus()")
    tab.press("Enter")
    told = tab.js("document.getElementById('source').innerText")
    assert tab.js("document.getElementById('source').open")
    for word in ("study/student-s0/short", "study/student-s1/short", "training seed", "fingerprint", "commit"):
        assert word in told
    tab.press("Escape")
    tab.until("!document.getElementById('source').open")
    assert tab.js("document.activeElement === window.cell")


def test_players_show_the_same_frame_of_everybody_and_step_by_one(tab: browser.Tab) -> None:
    tab.js("document.getElementById('play').textContent === 'Pause' && document.getElementById('play').click()")
    assert tab.js("document.querySelectorAll('#films canvas').length") == 3
    picture = "[...document.querySelectorAll('#films canvas')].map(one => one.toDataURL())"
    tab.js("document.getElementById('time').focus()")
    tab.until("document.querySelector('#films canvas').getContext('2d').getImageData(9, 9, 1, 1).data[3] === 255")
    tab.js("const slider = document.getElementById('time'); slider.value = 3; slider.dispatchEvent(new Event('input'))")
    third = tab.js(picture)
    tab.js("document.getElementById('next').click()")
    assert tab.js("document.getElementById('clock').textContent") == "0.25 s"  # frame 4 at 16 FPS
    fourth = tab.js(picture)
    assert all(one != other for one, other in zip(third, fourth, strict=True))
    tab.js("document.getElementById('back').click()")
    assert tab.js(picture) == third


def test_players_link_the_videos_that_they_show(tab: browser.Tab, written: Path) -> None:
    links = tab.js("[...document.querySelectorAll('#films figcaption a')].map(one => one.href)")
    paths = [Path(unquote(urlparse(link).path)) for link in links]
    assert len(paths) == 3 and all(path.is_file() and written.parent.parent in path.parents for path in paths)


def test_embedded_videos_are_whole_and_step_together(chromium: browser.Tab, written: Path, tmp_path: Path) -> None:
    chromium.complaints.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(written.parent.parent)
        patch.delenv("RFBENCH_TOML", raising=False)
        page = report.report([], study="study.yaml", out=tmp_path / "embedded", embed=True)
    chromium.open(page)
    scene = json.loads(chromium.js("document.getElementById('data').textContent"))["scenes"][0]
    whole = {path.read_bytes() for path in (written.parent.parent / "runs").rglob("0000-0.mp4")}
    assert {base64.b64decode(film["video"].partition(",")[2]) for film in scene["films"]} <= whole and not any(
        film["sheet"] for film in scene["films"]
    )
    chromium.js("document.getElementById('play').textContent === 'Pause' && document.getElementById('play').click()")
    videos = "[...document.querySelectorAll('#films video')]"
    chromium.until(f"{videos}.length === 3 && {videos}.every(one => one.readyState >= 2)")
    for _ in range(3):
        chromium.js("document.getElementById('next').click()")
    chromium.until(f"{videos}.every(one => !one.seeking && Math.abs(one.currentTime - 3.5 / {scene['fps']}) < 0.001)")
    assert chromium.js("document.getElementById('clock').textContent") == f"{3 / scene['fps']:.2f} s"
    assert chromium.complaints == []


@pytest.mark.parametrize("width", [320, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_need_not_scroll_sideways_and_text_can_be_read(width: int, scheme: str, tab: browser.Tab, written: Path) -> None:
    tab.open(written, width=width, scheme=scheme)
    assert tab.js("document.documentElement.scrollWidth") <= width
    ink, ground = tab.js("(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))")
    assert contrast(ink, ground) > 7
    soft = tab.js("getComputedStyle(document.querySelector('.intro')).color")
    assert contrast(soft, ground) > 4.5  # WCAG AA


def test_the_front_is_what_nobody_passes_in_both() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (1.5, 4.0), (3.0, 1.0), (0.5, 5.0)]
    assert tradeoffs.front(points) == [0, 1, 3]
    one, other = statistics.sample([1, 2, 3, 4], list("abcd")), statistics.sample([0, 2, 9, 1], list("abcd"))
    assert tradeoffs.wins(one, other) == 0.625 == 1 - tradeoffs.wins(other, one)


def test_every_section_of_plots_is_there_and_drawn(tab: browser.Tab) -> None:
    titles = tab.js("[...document.querySelectorAll('.plots figcaption')].map(one => one.textContent)")
    for title in ("All metrics, short", "How long the next chunk takes, cpu"):
        assert title in titles
    assert tab.js("[...document.querySelectorAll('.plots svg')].every(one => one.getBoundingClientRect().height > 80)")


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_latex_tables_compile(written: Path, tmp_path: Path) -> None:
    text = (written.parent / "leaderboard.tex").read_text()
    (tmp_path / "all.tex").write_text("\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + text + "\\end{document}\n")
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "all.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout[-600:]
    assert (tmp_path / "all.pdf").stat().st_size > 1000


def contrast(one: str, other: str) -> float:
    """WCAG 2: relative luminances of two `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
