"""A Ray cluster of this machine's own: the same clips and scores as one process makes, whoever dies on the way; refusals."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rfbench import evaluate, fleet, generate, records
from rfbench.errors import UserError
from tests import models
from tests.test_generate import PROMPTS, bytes_of, write_suite

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for several tests: starting it takes longer than they do."""
    with fleet._cluster():
        yield


def scores_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "scores").glob("*.jsonl")) if "ledger" not in path.name}


def opener(folder: Path, mortal: int | None) -> Callable[[list[int]], list[int]]:
    """Squares; each worker says that it lives, and the first ones die over `mortal`."""
    (folder / f"{os.getpid()}").touch()

    def square(batch: list[int]) -> list[int]:
        if batch == [3]:
            raise UserError("three is not a number", code=1)
        if mortal in batch and len(list(folder.iterdir())) < 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return [number**2 for number in batch]

    return square


def test_batches_are_done_once_each_and_a_death_costs_its_own(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [[1, 2], [4], [5, 6], [7]]
    found = list(fleet.spread(functools.partial(opener, tmp_path, 5), batches, workers=2))
    assert sorted(found) == [[1, 4], [16], [25, 36], [49]]
    assert "a worker died over batch 3 of 4; another one takes it" in capsys.readouterr().err
    with pytest.raises(UserError, match="three is not a number") as raised:
        list(fleet.spread(functools.partial(opener, tmp_path, None), [[1], [3]], workers=1))
    assert raised.value.code == 1


def test_workers_are_as_urgent_as_the_asker(cluster: None) -> None:
    assert list(fleet.spread(lambda: os.nice, [0], workers=1)) == [os.nice(0)]


def test_a_batch_that_kills_every_worker_is_given_up(cluster: None) -> None:
    with pytest.raises(UserError, match=r"3 workers died over batch 1 of 1, one after another: .") as raised:
        list(fleet.spread(functools.partial(_deadly, None), [[1]], workers=1))
    assert raised.value.code == 1


def test_a_preempted_job_ends_as_by_ctrl_c(cluster: None) -> None:
    """SLURM sends SIGTERM, for which Ray has a handler of its own that prints pages."""
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def _deadly(_: Any) -> Callable[[Any], Any]:
    return lambda batch: os.kill(os.getpid(), signal.SIGKILL)


def workers_of(parent: int) -> list[int]:
    """Processes of Ray's workers below a process."""
    found, grown = {parent}, True
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = path.read_text().rpartition(")")
        except OSError:
            continue
        parents[int(path.parent.name)] = int(rest.split()[1]), name.partition("(")[2]
    while grown:
        more = {pid for pid, (above, _) in parents.items() if above in found} - found
        found |= more
        grown = bool(more)
    return [pid for pid in found if pid in parents and parents[pid][1].startswith("ray::_Worker")]


@pytest.mark.slow  # each death is a new worker that imports everything
def test_scores_are_those_of_one_process_whoever_is_killed(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that judge are killed at random, and the asker stops in the middle; what it was told by then is not asked again."""
    monkeypatch.setattr(evaluate, "AT_ONCE", 1)
    alone = generate.generate(models.write(tmp_path), write_suite(tmp_path, prompts=PROMPTS, samples=3))
    spread = Path(shutil.copytree(alone, tmp_path / "spread"))
    evaluate.evaluate(alone, ["motion"])
    rng, deaths, told = random.Random(0), 0, fleet.spread

    def deadly(*arguments: Any) -> Iterator[Any]:
        nonlocal deaths
        answers: Any = told(*arguments)
        with contextlib.closing(answers):  # its workers go with it
            for number, answer in enumerate(answers):
                if deaths == 2 and number > 4:
                    deaths += 1
                    raise KeyboardInterrupt
                yield answer
                if deaths < 2 and (living := workers_of(os.getpid())):
                    os.kill(rng.choice(living), signal.SIGKILL)
                    deaths += 1

    monkeypatch.setattr(fleet, "spread", deadly)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(spread, ["motion"], engine="ray", workers=2)
    assert deaths == 3 and not (spread / "scores" / "motion.json").exists()
    evaluate.evaluate(spread, ["motion"], engine="ray", workers=2)
    assert scores_of(spread) == scores_of(alone) and len(scores_of(alone)) == 1
    kept: list[dict[str, Any]] = records.read_rows(spread / "scores" / "motion.ledger.jsonl", dict)
    assert len({row["clip"] for row in kept}) == len(kept) == 12, "each clip once"


def test_clips_and_scores_are_those_of_one_process_whoever_is_killed(tmp_path: Path, folders: Path) -> None:
    """Workers are killed at random, then the process that asked; the same command goes on, and ends with the same bytes."""
    with (folders / "rfbench.toml").open("a") as file:
        file.write("[fast]\ntokens = 1\n")  # a clip is a batch
    student, suite = models.write(tmp_path), write_suite(tmp_path, prompts=PROMPTS, samples=3)
    alone = generate.generate(student, suite, name="alone")
    evaluate.evaluate(alone, ["motion", "subject"])
    code = (
        "from rfbench import generate, evaluate\n"
        f"run = generate.generate({student!r}, {suite!r}, name='spread', engine='ray', workers=2)\n"
        "evaluate.evaluate(run, ['motion', 'subject'], engine='ray', workers=2)"
    )
    directory, rng, deaths = alone.parent.parent / "spread" / alone.name, random.Random(0), 0
    for attempt in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            there = len(records.read_clips(directory)) if directory.exists() else 0
            living = workers_of(process.pid)
            if living and there > 2 * attempt and deaths < 2 * attempt + 2:
                os.kill(rng.choice(living), signal.SIGKILL)
                deaths += 1
            if attempt == 0 and there > 4:
                process.kill()
            time.sleep(0.1)
        _, told = process.communicate()
        assert process.returncode == (-signal.SIGKILL if attempt == 0 else 0), told
    assert deaths > 0
    assert records.read_run(directory).status == "done"
    assert bytes_of(directory)["clips.jsonl"] == bytes_of(alone)["clips.jsonl"]
    videos = {name for name in bytes_of(alone) if name.startswith("videos")}
    assert len(videos) == 12 and all(bytes_of(directory)[name] == bytes_of(alone)[name] for name in videos)
    assert scores_of(directory) == scores_of(alone) and len(scores_of(alone)) == 2
