"""How much a device carries: the search against counting up, a machine of known speed, and streams that take turns against each by itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rfbench import baselines, cli, load, records, sampler, stopwatch, video
from rfbench.errors import UserError
from rfbench.load import Trial, largest
from rfbench.timing import Chunk
from tests import models
from tests.test_profiling import switch_off
from tests.test_timing import steady


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_search_finds_what_counting_up_finds(limit, most):
    asked: list[int] = []

    def carried(count: int) -> bool:
        asked.append(count)
        return count <= limit

    assert largest(carried, most) == min(limit, most)
    assert len(asked) == len(set(asked)) <= 2 * most.bit_length() + 1 and max(asked) <= most


@given(st.sets(st.integers(1, 40)))
def test_what_is_found_is_carried_and_one_more_is_not(good):
    found = largest(lambda count: count in good, 40)
    assert (found in good or found == 0) and (found + 1 not in good or found == 40)


def in_turn(count: int, chunks: int, seconds: float) -> tuple[tuple[Chunk, ...], ...]:
    """Streams on a device that takes `seconds` for a chunk, whosever it is."""
    rows: list[list[Chunk]] = [[] for _ in range(count)]
    now = 0.0
    for index in range(chunks):
        for row in rows:
            begin, now = now, now + seconds
            row.append(Chunk(index, 9 if index == 0 else 12, begin, now, now, now))
    return tuple(tuple(row) for row in rows)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of streams that were tried on a machine that takes 0.125 s for a chunk of 0.75 s, or 0.1 s for each of several together
    (negative), and has memory for twelve."""
    found: list[int] = []

    def time_streams(backbone: Any, cfg: Any, lean: Any, prompts: Sequence[str], chunks: int, seeds: Sequence[int], *, together: bool = False) -> Any:
        count = len(prompts)
        assert count == len(seeds)
        found.append(-count if together else count)
        if count > 12:
            raise torch.OutOfMemoryError
        return in_turn(1, chunks, 0.1 * count) * count if together else in_turn(count, chunks, 0.125)

    monkeypatch.setattr(stopwatch, "time_streams", time_streams)
    return found


def test_a_machine_of_known_speed_carries_what_it_has_time_for(tmp_path, folders, asked):
    path = models.write(tmp_path)
    directory = load.profile(path, [], chunks=12, repeats=2)
    found = load.document(directory)
    assert found["streams"] == 7 and found["by"] == {"in turn": 6, "together": 7}  # of 0.125 s or of 0.1 s in 0.75 s
    turns = [1, 1, 1, 2, 2, 2, 4, 4, 4, 8, 8, 6, 6, 6, 7, 7]  # each number first to warm up; one that does not do needs no second try
    assert asked == [*turns, -1, -1, -1, -2, -2, -2, -4, -4, -4, -8, -8, -6, -6, -6, -7, -7, -7]
    rows = {row["count"]: row for row in found["tried"] if row["how"] == "in turn"}
    assert rows[6]["fps"] == pytest.approx([16, 16]) and rows[6]["in_time"] == [1, 1] and rows[6]["meets"]
    assert rows[7]["fps"] == pytest.approx([12 / 0.875]) and not rows[7]["meets"]
    assert [row["carried"] for row in load.table(found)] == ["yes", "yes", "yes", "yes", "no", "no", "yes", "yes", "yes", "yes", "yes", "no"]
    stamp = (directory / "trials.jsonl").read_bytes()
    load.profile(path, [], chunks=12, repeats=2)
    assert len(asked) == 33 and (directory / "trials.jsonl").read_bytes() == stamp
    switch_off(folders, "joint")
    with pytest.raises(UserError, match=r"other inputs \(settings\.shortcuts\.joint: true -> false\)"):
        load.profile(path, [], chunks=12, repeats=2)


def test_trials_that_were_made_are_not_made_again(tmp_path, folders, asked, monkeypatch):
    path, made = models.write(tmp_path), stopwatch.time_streams

    def dies(backbone: Any, cfg: Any, lean: Any, prompts: Sequence[str], chunks: int, seeds: Sequence[int], **how: bool) -> Any:
        if len(prompts) == 8:
            raise KeyboardInterrupt
        return made(backbone, cfg, lean, prompts, chunks, seeds, **how)

    monkeypatch.setattr(stopwatch, "time_streams", dies)
    with pytest.raises(KeyboardInterrupt):
        load.profile(path, [], chunks=12, repeats=1)
    monkeypatch.setattr(stopwatch, "time_streams", made)
    asked.clear()
    directory = load.profile(path, [], chunks=12, repeats=1)
    assert (
        asked == [number for tried in (8, 6, 7, -1, -2, -4, -8, -6, -7) for number in (tried, tried)]
        and records.read_run(directory).result["streams"] == 7
    )
    assert [trial.count for trial in load.read_trials(directory)] == [1, 2, 4, 8, 6, 7, 1, 2, 4, 8, 6, 7]


def test_a_batch_of_a_new_size_is_warmed_up_where_the_run_goes_on(tmp_path, folders, monkeypatch):
    """Killed between two repetitions: the second is the first of its process, and not slower for that."""
    made, killed = list[tuple[int, int]](), list[bool]()

    def time_streams(backbone: Any, cfg: Any, lean: Any, prompts: Sequence[str], chunks: int, seeds: Sequence[int], *, together: bool = False) -> Any:
        if together and list(seeds) == [1] and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        made.append((len(prompts), chunks))
        return in_turn(1, chunks, 0.7 * len(prompts)) * len(prompts)

    monkeypatch.setattr(stopwatch, "time_streams", time_streams)
    path = models.write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        load.profile(path, [], chunks=12, repeats=2)
    made.clear()
    load.profile(path, [], chunks=12, repeats=2)
    assert made == [(1, 12), (1, 12), (2, 12), (2, 12)], "each size before it is timed"


def test_a_store_does_not_hide_a_device_that_is_too_slow():
    late = Trial(1, 0, (steady(12, steps=0.62),), 0)  # 0.77 s for 0.75 s of video: eleven chunks end 0.22 s late, less than a chunk in store
    assert load.in_time(late, 16) == 1 and load.pace(late) < 16 and not load.meets(late, 16)
    uneven = Trial(2, 0, (steady(12), steady(12, steps=0.9)), 0)
    assert load.meets(Trial(1, 0, (steady(12),), 0), 16) and not load.meets(uneven, 16)


def test_too_many_clips_for_the_memory_are_said_to_be():
    def fails() -> Any:
        raise torch.OutOfMemoryError

    trial = load.tried(9, 2, fails)
    assert (trial.count, trial.repeat, trial.streams) == (9, 2, ()) and not load.meets(trial, 16)
    row = {"count": 9, "peak_bytes": 5, "out_of_memory": True, "clips_per_second": [load.clips_per_second(trial)]}
    (shown,) = load.table({"tried": [row]})
    assert shown["peak MB"] == "out of memory" and shown["frames per second"] == "0"


def test_streams_that_take_turns_make_what_each_makes_by_itself(tmp_path, monkeypatch):
    ready = baselines.prepare(models.write(tmp_path))
    backbone, cfg = ready.open(), ready.cfg.sampler
    shown: list[torch.Tensor] = []

    def keeping(pixels: torch.Tensor) -> torch.Tensor:
        shown.append(plain(pixels))
        return shown[-1]

    plain = video.as_uint8
    monkeypatch.setattr(video, "as_uint8", keeping)
    prompts, lean = ["a red disc moves right", "a blue square moves left"], sampler.lean_of(backbone, cfg)
    together = stopwatch.time_streams(backbone, cfg, lean, prompts, 5, [3, 4])
    mixed, alone = shown[:], []
    for prompt, seed in zip(prompts, (3, 4), strict=True):
        shown.clear()
        stopwatch.time_streams(backbone, cfg, lean, [prompt], 5, [seed])
        alone.append(shown[:])
    for stream in (0, 1):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(mixed[stream::2], alone[stream], strict=True))
    shown.clear()
    both = stopwatch.time_streams(backbone, cfg, lean, prompts, 5, [3, 4], together=True)
    for stream in (0, 1):
        assert all(torch.equal(ours[stream], theirs[0]) for ours, theirs in zip(shown, alone[stream], strict=True))
    assert len(both) == 2 and both[0] == both[1] and [chunk.frames for chunk in both[0]] == [9, 12, 12, 12, 12]
    begun = [chunk.readable for pair in zip(*together, strict=True) for chunk in pair]
    assert begun == sorted(begun) and [chunk.frames for chunk in together[1]] == [9, 12, 12, 12, 12]


def outcome(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(ended.value.code or 0)


def test_clips_per_second_from_the_command_line(tmp_path, folders, capsys):
    path = models.write(tmp_path, sampler=models.STUDENT | {"steps": [1000]})
    assert outcome(["profile", path, "--batch", "2,1", "--repeats", "1", "--name", "many"]) == 0
    told = capsys.readouterr().out.splitlines()
    found = json.loads(told[-1])
    assert found["asked"] == {"batches": [1, 2], "repeats": 1} and [row["count"] for row in found["tried"]] == [1, 2]
    one, two = load.read_trials(folders / "runs" / "batch" / "many" / "cpu")
    for row, trial in zip(found["tried"], (one, two), strict=True):
        assert sum(chunk.frames for chunk in trial.streams[0]) == 81 and len(trial.streams) == 1
        assert row["clips_per_second"] == [pytest.approx(trial.count / trial.streams[0][-1].readable)]
    assert "text encoder included" in told[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "--batch", "1,x"], "--batch '1,x' is not a list of different numbers"),
        (["a", "--batch", "0"], "--batch '0' is not a list"),
        (["a", "--batch", ""], "--batch '' is not a list"),
        (["a", "--batch", "2,2"], "--batch '2,2' is not a list"),
        (["a", "--batch", "1", "--streams"], "each by itself"),
        (["a", "b", "--streams"], "each by itself"),
        (["toy/teacher", "--streams", "--random-weights"], "cannot make a stream of 20 chunks; --batch times whole clips"),
        (["toy/ode-init", "--streams", "--random-weights", "--chunks", "4"], "never gets steady"),
    ],
)
def test_a_wrong_request_is_refused(words, sentence, capsys):
    assert outcome(["profile", *words]) == 2
    assert sentence in capsys.readouterr().err
