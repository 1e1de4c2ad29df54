"""Contenders in turn on a machine whose drift is known, runs that are cut short, and real processes that are timed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import pytest
import torch

from benchmarks import gpu
from rfbench import baselines, cli, hardware, ladder, profiling, records, rungs, sampler, stopwatch, timing
from rfbench.backbones.toy import ToyBackbone
from rfbench.backbones.wan import graphs, lean
from rfbench.backbones.wan.dit import DiTCfg
from rfbench.backbones.wan.text import WanText
from rfbench.errors import UserError
from rfbench.report import evidence
from rfbench.settings import FastCfg, Shortcuts, settings
from rfbench.timing import Round, Turn
from tests import models
from tests.test_timing import steady, turn
from tests.tiny import Remembered, recordings


@dataclass
class Machine:
    """A machine on which every turn takes `drift` times as long as the one before; `dies_at` that turn."""

    drift: float = 1.0
    dies_at: int | None = None
    turns: int = 0
    started: int = 0

    def turn(self, name: str, seconds: float, cold: float | None) -> Turn:
        if self.turns == self.dies_at:
            raise KeyboardInterrupt
        factor = seconds * self.drift**self.turns
        self.turns += 1
        stream = steady(8, steps=0.4 * factor, decode=0.05 * factor, context=0.1 * factor)
        return turn(stream, name=name, cold_start_s=cold)


def replace_processes(monkeypatch: pytest.MonkeyPatch, machine: Machine, seconds: dict[str, float]) -> None:
    """Workers of a fake machine, in which contenders take this many times the usual."""

    class Fake:
        def __init__(self, ready: baselines.Prepared, chunks: int) -> None:
            machine.started += 1
            self.name, self.about, self.cold = ready.name, {"chunks": chunks}, True

        def told(self) -> dict[str, Any]:
            return self.about | {"left_out": {}}

        def turn(self, number: int) -> Turn:
            cold, self.cold = (2.0 if self.cold else None), False
            return machine.turn(self.name, seconds[self.name], cold)

        def __enter__(self) -> Fake:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr(profiling, "Worker", Fake)


def prepared(folder: Path, *names: str) -> list[baselines.Prepared]:
    return [baselines.prepare(models.write(folder, name)) for name in names]


def test_drift_of_the_machine_does_not_decide_who_is_faster(tmp_path, monkeypatch):
    """Each turn takes 5 % longer than the one before, and one contender 10 % longer than the other."""
    seconds = {"slow": 1.1, "fast": 1.0}
    machine = Machine(drift=1.05)
    replace_processes(monkeypatch, machine, seconds)
    directory = profiling.in_turn("pair", prepared(tmp_path, "slow", "fast"), chunks=8, repeats=8)
    rounds = timing.read_rounds(directory)
    assert [[one.contender for one in each.turns] for each in rounds[:4]] == [["slow", "fast"], ["fast", "slow"], ["fast", "slow"], ["slow", "fast"]]
    found = profiling.ratios(rounds, "fast", "slow")["dit_fps"]
    assert found.value == pytest.approx(1.1, rel=0.002)
    assert found.low is not None and 1 < found.low < 1.1 < found.high  # type: ignore[operator]
    # one after another on the same machine, the slow one first: the fast one seems to be the slower
    alone = Machine(drift=1.05)
    after = {name: [measured(alone.turn(name, taken, None)) for _ in range(8)] for name, taken in seconds.items()}
    assert median(after["fast"]) < 0.8 * median(after["slow"])


def measured(one: Turn) -> float:
    fps = timing.TIMINGS["dit_fps"].of(one)
    assert fps is not None
    return fps


def test_a_run_that_is_cut_short_goes_on_with_whole_rounds(tmp_path, folders, monkeypatch):
    ready, seconds = prepared(tmp_path, "a", "b", "c"), {"a": 1.0, "b": 2.0, "c": 3.0}
    asked: dict[str, Any] = {"chunks": 8, "repeats": 2, "processes": 2}
    machine = Machine(dies_at=7)  # in the middle of the third round, which is the first of the second processes
    replace_processes(monkeypatch, machine, seconds)
    with pytest.raises(KeyboardInterrupt):
        profiling.in_turn("three", ready, **asked)
    directory = folders / "runs" / "profile" / "three" / "cpu"
    assert records.read_run(directory).status == "running"
    half = (directory / "rounds.jsonl").read_bytes()
    assert len(timing.read_rounds(directory)) == 2
    with (directory / "rounds.jsonl").open("ab") as file:
        file.write(half[: len(half) // 3])  # a line that was being written when the power went
    again = Machine()
    replace_processes(monkeypatch, again, seconds)
    assert profiling.in_turn("three", ready, **asked) == directory
    assert (again.turns, again.started) == (6, 3)
    assert (directory / "rounds.jsonl").read_bytes().startswith(half)
    rounds = timing.read_rounds(directory)
    assert [(each.process, each.number) for each in rounds] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [tuple(one.contender for one in each.turns) for each in rounds] == [timing.order("abc", number) for number in range(4)]
    assert set(evidence.read_timings(directory)) == {"a", "b", "c"}
    files = {file: file.read_bytes() for file in directory.iterdir()}
    profiling.in_turn("three", ready, **asked)
    assert {file: file.read_bytes() for file in directory.iterdir()} == files and again.started == 3
    (directory / "rounds.jsonl").unlink()
    profiling.in_turn("three", ready, **asked)
    assert again.started == 9 and evidence.read_timings(directory)


def test_other_contenders_in_the_same_place_are_refused(tmp_path, monkeypatch):
    replace_processes(monkeypatch, Machine(), {"a": 1.0, "b": 1.0, "c": 1.0})
    profiling.in_turn("pair", prepared(tmp_path, "a", "b"), chunks=8, repeats=1)
    with pytest.raises(UserError, match=r"holds a run with other inputs \(contenders\.b: .* contenders\.c: absent"):
        profiling.in_turn("pair", prepared(tmp_path, "a", "c"), chunks=8, repeats=1)


def switch_off(folders: Path, *shortcuts: str) -> None:
    """Write rfbench.toml without these shortcuts."""
    path = folders / "rfbench.toml"
    path.write_text(path.read_text().partition("[fast")[0] + "[fast.shortcuts]\n" + "".join(f"{name} = false\n" for name in shortcuts))


def test_what_was_timed_by_other_settings_is_not_given_for_these_nor_mixed_with_them(tmp_path, folders, monkeypatch):
    """A run that is done, and one that is cut short and would go on."""
    replace_processes(monkeypatch, Machine(), {"a": 1.0})
    ready = prepared(tmp_path, "a")
    asked: dict[str, Any] = {"chunks": 8, "repeats": 2}
    profiling.in_turn("done", ready, **asked)
    replace_processes(monkeypatch, Machine(dies_at=1), {"a": 1.0})
    with pytest.raises(KeyboardInterrupt):
        profiling.in_turn("half", ready, **asked)
    replace_processes(monkeypatch, Machine(), {"a": 1.0})
    switch_off(folders, "joint", "merged")
    for name in ("done", "half"):
        rows = (folders / "runs" / "profile" / name / "cpu" / "rounds.jsonl").read_bytes()
        with pytest.raises(UserError, match=r"settings\.shortcuts\.joint: true -> false; settings\.shortcuts\.merged: true -> false\); add --fresh"):
            profiling.in_turn(name, ready, **asked)
        assert (folders / "runs" / "profile" / name / "cpu" / "rounds.jsonl").read_bytes() == rows
    profiling.in_turn("done", ready, **asked, fresh=True)
    switch_off(folders)
    assert len(timing.read_rounds(profiling.in_turn("half", ready, **asked))) == 2
    (folders / "rfbench.toml").write_text("[hardware.cpu]\ntitle = 'CPU'\nmatch = 'cpu'\n[fast]\ntokens = 7\n")
    profiling.in_turn("half", ready, **asked)  # nothing of it is timed
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(UserError, match=r"settings\.threads: 1 -> 7"):
        profiling.in_turn("half", ready, **asked)


def changed(rounds: list[Round], **how: Any) -> list[Any]:
    plain = [dataclasses.asdict(each) for each in rounds]
    plain[0]["turns"][0]["stream"][3].update(how)
    return plain


def test_rounds_that_are_not_whole_are_refused(tmp_path, monkeypatch):
    replace_processes(monkeypatch, Machine(), {"a": 1.0, "b": 1.0})
    directory = profiling.in_turn("pair", prepared(tmp_path, "a", "b"), chunks=8, repeats=2)
    rounds, run = timing.read_rounds(directory), records.read_run(directory)
    good = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]

    def refused(rows: list[Any], sentence: str) -> None:
        (directory / "rounds.jsonl").unlink()
        with pytest.raises(UserError, match="not what was written"):
            evidence.read_timings(directory)
        (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match="not what was written"):
            evidence.read_timings(directory)
        result = run.result | {"rounds_sha256": records.sha256_of(directory / "rounds.jsonl")}
        records.write_json(directory / "run.json", records.read_json(directory / "run.json") | {"result": result})
        with pytest.raises(UserError, match=sentence):
            evidence.read_timings(directory)

    refused(good[:1], "does not have the 2 rounds that were asked for")
    refused([good[0], good[0]], "each once")
    refused([good[0] | {"turns": good[0]["turns"][:1]}, good[1]], "round 0 does not have every contender once")
    refused(changed(rounds, readable=0.01), "the stream has a chunk 3 whose times do not go forward")
    refused(changed(rounds, readable=float("nan")), "chunk 3 whose times do not go forward")
    refused(changed(rounds, cached=None), "the stream lacks a context pass")
    refused(changed(rounds, index=4), "chunk 4 whose times")
    short = json.loads(json.dumps(good))
    short[1]["turns"][1]["clip"].pop()
    refused(short, "the clip does not have 81 frames")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["a"], [("a", [])]),
        (["a", "x=1", "y.z=2", "b"], [("a", ["x=1", "y.z=2"]), ("b", [])]),
        (["a", "a", "x=1"], [("a", []), ("a", ["x=1"])]),
    ],
)
def test_fields_belong_to_the_name_before_them(words, found):
    assert profiling.grouped(words) == found


def test_a_wrong_request_is_refused_before_any_work(tmp_path, folders):
    path = models.write(tmp_path)
    how: dict[str, Any] = {"chunks": 5, "repeats": 1}
    for words, sentence in (
        ([path], "--compare takes two baselines and 1 is named"),
        ([path] * 3, "--compare takes two baselines and 3 are named"),
        ([path, path], "'student' would be timed against itself; set a field"),
        (["x=1", path], "'x=1' is set for no baseline"),
    ):
        with pytest.raises(UserError, match=sentence):
            profiling.profile(words, compare=True, **how)
    with pytest.raises(UserError, match=r"--chunks 4 never gets steady.* the least is 5"):
        profiling.profile([path], chunks=4, repeats=1)
    assert not (folders / "runs").exists()


def test_two_settings_of_one_baseline_from_the_command_line(tmp_path, folders, capsys):
    """Real processes, two of them in turn: rows that follow each other, one JSON document as the last line."""
    path = models.write(tmp_path, max_latents=24)
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", path, path, "sampler.steps=[1000]", "--compare", "--chunks", "9", "--repeats", "2", "--name", "steps"])
    out = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert any(line.startswith("dit_fps ") for line in out)
    document = json.loads(out[-1])
    directory = folders / "runs" / "profile" / "steps" / "cpu"
    assert Path(document["path"]) == directory
    names = ["student", "student sampler.steps=[1000]"]
    assert list(document["timings"]) == sorted(names)
    assert (document["compare"]["better"], document["compare"]["than"]) == tuple(names)
    ratio = document["compare"]["ratios"]["dit_fps"]
    assert ratio["value"] < 1 and ratio["low"] is None and ratio["why"] == "2 rounds in a process, the least is 6"  # five passes against two
    rounds = timing.read_rounds(directory)
    fps = {name: [measured(one) for each in rounds for one in each.turns if one.contender == name] for name in names}
    assert ratio["value"] == pytest.approx(sum(a / b for a, b in zip(*fps.values(), strict=True)) / 2)
    recorded = document["recorded"]
    assert recorded["contenders"][names[0]]["precision"] == {"denoiser": "float32", "text": "float32"}
    assert recorded["contenders"][names[0]]["chunks"] == 6  # 24 latents are 8 chunks, of which the switch takes two
    assert len(recorded["hardware"]) == 1 and len(recorded["hardware"][0]["before"]["load"]) == 3
    assert [[one.contender for one in each.turns] for each in rounds] == [names, names[::-1]]
    for one in (one for each in rounds for one in each.turns):
        assert [chunk.frames for chunk in one.clip] == [9, *[12] * 6] and [chunk.frames for chunk in one.stream] == [9, *[12] * 5]
        assert one.clip[-1].cached is None and one.stream[-1].cached is not None
        assert one.switched is not None and (one.switched.index, one.switched.frames, one.switched.cached) == (7, 12, None)
        stamps = [
            stamp for chunk in (*one.stream, one.switched) for stamp in (chunk.begin, chunk.denoised, chunk.decoded, chunk.readable, chunk.cached)
        ]
        assert stamps[:-1] == sorted(stamps[:-1])  # type: ignore[type-var]
        assert 5e7 < one.peak_bytes < 4e9 and one.reserved_bytes is None
        assert all(0 < chunk.held_bytes < 2 * one.peak_bytes for chunk in (*one.clip, *one.stream))  # type: ignore[operator]
        assert one.joint and [chunk.index for chunk in one.apart] == list(range(6)) and one.joules is None
        assert all(apart.cached > apart.readable for apart in one.apart)  # type: ignore[operator]
    colds = [one.cold_start_s for each in rounds for one in each.turns]
    assert [cold is None for cold in colds] == [False, False, True, True]
    assert [one.warm_up_s is None for each in rounds for one in each.turns] == [False, False, True, True]
    assert all(one.warm_up_s > one.cold_start_s for one in rounds[0].turns)  # type: ignore[operator]
    assert document["length"][names[0]]["seconds"]["chunks"] == 2 and document["length"][names[0]]["bytes"]["level"] > 5e7
    assert recorded["contenders"][names[0]]["energy"] == "not measured: a CPU does not tell"
    assert "joint" in recorded["contenders"][names[0]]["shortcuts"] and "kernels" not in recorded["contenders"][names[0]]["shortcuts"]
    assert all(cold > one.clip[0].readable for cold, one in zip(colds[:2], rounds[0].turns, strict=True))  # type: ignore[operator]
    timed = evidence.read_timings(directory)
    assert timed[names[0]].columns["profile.dit_fps"] == {("steps/cpu", 0, number): value for number, value in enumerate(fps[names[0]])}


def test_what_goes_wrong_in_a_process_is_told_by_the_one_that_asked(tmp_path):
    ready = baselines.prepare(models.write(tmp_path), random_weights=False)
    (tmp_path / "student.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"student\.safetensors"):
        stopwatch.Worker(ready, 0)
    worker = stopwatch.Worker(baselines.prepare(models.write(tmp_path, "other"), ["sampler.steps=[1000]"]), 0)
    with worker:
        assert worker.about["memory"].startswith("resident")
        os.kill(worker.process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        with pytest.raises(UserError, match="the process that timed 'other' ended with -9, perhaps for lack of memory") as told:
            worker.turn(0)
    assert told.value.code == 1


def test_no_pass_is_recorded_while_somebody_looks_at_the_clock(tmp_path, monkeypatch):
    """Recordings are made of what comes for the second time: a clip, a stream, its switch and its passes one by one, all before the first turn."""
    monkeypatch.setattr(lean, "ON", {})
    monkeypatch.setattr(graphs, "Cuda", Remembered)
    monkeypatch.setattr(sampler, "settings", lambda: dataclasses.replace(settings(), fast=FastCfg(shortcuts=Shortcuts(kernels=False))))
    contestant = stopwatch.warm(baselines.prepare(models.write(tmp_path)), 7, 0.0)
    assert contestant.lean is not None and contestant.lean.graphs is not None and contestant.cold_start_s is not None
    recorded = recordings(contestant.lean)
    assert recorded > 10 and all(None not in known.made.values() for known in contestant.lean.graphs.of.values())
    turns = [stopwatch.take(contestant, number) for number in range(2)]
    assert recordings(contestant.lean) == recorded and [turn.cold_start_s is None for turn in turns] == [False, True]
    assert "graphs" in stopwatch.about(contestant)["shortcuts"] and stopwatch.about(contestant)["left_out"] == {}


@pytest.mark.parametrize("joint", [True, False])
def test_every_timed_chunk_has_one_context_pass_and_the_meter_reads_no_text_encoder(joint, tmp_path, monkeypatch):
    """On a machine whose clock and meter count passes: four steps and a context pass are five for each chunk, the last before the switch too."""
    spent = [0]

    def costs(name: str, passes: int) -> None:
        plain = getattr(lean.LeanDiT, name)

        def counted(self: Any, *arguments: Any, **options: Any) -> Any:
            spent[0] += passes
            return plain(self, *arguments, **options)

        monkeypatch.setattr(lean.LeanDiT, name, counted)

    costs("__call__", 1)
    costs("fill", 1)
    costs("fill_and_step", 2)

    def queue(self: stopwatch.Clock, *, beside: torch.device | None = None) -> Any:
        now = float(spent[0]) + (0.5 if beside is not None else 0.0)  # a copy beside what the device does
        return lambda: now

    contestant = stopwatch.warm(baselines.prepare(models.write(tmp_path)), 6, 0.0)
    assert contestant.lean is not None
    contestant.lean.shortcuts = dataclasses.replace(contestant.lean.shortcuts, joint=joint)
    plain = contestant.backbone.encode_text

    def encode(prompts: Any) -> Any:
        spent[0] += 1000
        return plain(prompts)

    monkeypatch.setattr(contestant.backbone, "encode_text", encode)
    monkeypatch.setattr(stopwatch.Clock, "queue", queue)
    monkeypatch.setattr(contestant, "energy", lambda: float(spent[0]))
    one = stopwatch.take(contestant, 0)
    assert [timing.with_context(chunk) for chunk in one.stream[1:]] == [5.0] * 5
    assert one.switched is not None and one.switched.index == 7 and one.switched.cached is None
    assert one.joules == 8 * 4 + 7 + 2  # eight chunks, seven context passes, and at the switch those of the window again but for the sink
    assert one.whole == 9 + 7 * 12 and timing.TIMINGS["joules_per_frame"].of(one) == 41 / 93


def test_a_bidirectional_model_has_only_whole_clips(tmp_path):
    ready = baselines.prepare(models.write(tmp_path, "teacher", sampler=models.TEACHER, max_latents=21))
    assert stopwatch.possible(ready, 20) == 0
    one = stopwatch.take(stopwatch.warm(ready, 0, 0.0), 0)
    assert (one.stream, len(one.clip), one.clip[0].frames, one.clip[0].cached) == ((), 1, 81, None)
    assert one.cold_start_s is not None and one.cold_start_s > 1e9  # since 1970


def test_a_model_with_all_frames_in_work_has_only_whole_clips(tmp_path):
    """Three chunks of 8 latent frames, one step apart: 81 frames are 21 of the 24, and the last chunk is cut."""
    staggered = {"steps": 3, "shift": 5.0, "solver": "forcing", "chunk": 8, "lag": 1, "guidance": 2.0}
    ready = baselines.prepare(models.write(tmp_path, "staggered", sampler=staggered))
    assert stopwatch.possible(ready, 20) == 0
    one = stopwatch.take(stopwatch.warm(ready, 0, 0.0), 0)
    assert one.stream == () and [chunk.frames for chunk in one.clip] == [29, 32, 20]
    assert [chunk.cached is None for chunk in one.clip] == [False, False, True]


def test_a_model_is_timed_over_as_many_chunks_as_it_can_make(tmp_path):
    reroll = models.STUDENT | {"reroll": {"latents": 21, "overlap": 3}}
    for more, wanted in (({}, 40), ({"max_latents": 24}, 6), ({"sampler": reroll}, 5), ({"sampler": reroll, "max_latents": 12}, 2)):
        assert stopwatch.possible(baselines.prepare(models.write(tmp_path, **more)), 40) == wanted


def test_a_stream_counts_once_its_window_is_full(tmp_path):
    """A window of 21 frames is full after seven chunks of three; where clips end before that, they count from chunk 3 on."""
    wide = models.STUDENT | {"cache": {"policy": "window", "window": 21, "rope": "absolute"}}
    ready = baselines.prepare(models.write(tmp_path, sampler=wide))
    with pytest.raises(UserError, match=r"--chunks 8 never gets steady: 'student' is counted from chunk 7 on; the least is 9"):
        profiling.profile([str(tmp_path / "student.yaml")], chunks=8, repeats=1)
    contestant = stopwatch.warm(ready, 9, 0.0)
    one = stopwatch.take(contestant, 0)
    assert one.steady == 7 == contestant.about["steady"] and len(one.stream) == 9
    assert timing.TIMINGS["dit_fps"].of(one) == 12 / median([timing.with_context(chunk) for chunk in one.stream[7:]])
    short = baselines.prepare(models.write(tmp_path, sampler=wide, max_latents=21))
    assert stopwatch.possible(short, 20) == 5 and stopwatch.counted_from(short) == 3


def test_a_joint_window_is_timed_while_it_is_full(tmp_path):
    """As many chunks in work as there are steps; each turn of the window makes one chunk, and none of the timed ones is made by a shorter one."""
    rolling = {"steps": [1000, 750, 500], "shift": 5.0, "solver": "rolling", "chunk": 3}
    rolling |= {"cache": {"policy": "static_sink", "window": 18, "sink": 3, "rope": "absolute"}}
    ready = baselines.prepare(models.write(tmp_path, "joint", sampler=rolling))
    assert stopwatch.beyond(ready.cfg.sampler) == 2
    contestant = stopwatch.warm(ready, 6, 0.0)
    widths: list[int] = []
    contestant.backbone.denoiser.register_forward_pre_hook(lambda module, arguments: widths.append(arguments[0].shape[1]))
    clip, chunks = stopwatch.take(contestant, 0), 81 // 12 + 1
    assert clip.switched is None
    assert [chunk.index for chunk in clip.stream] == list(range(6)) and all(chunk.cached is not None for chunk in clip.stream)
    passes = widths[2 * chunks + 1 :]  # of the stream: a clip of n chunks takes n + 2 joint passes and n - 1 clean ones
    assert passes[:2] == [3, 6] and passes[2 : 2 + 2 * 6] == [9, 3] * 6


def test_only_what_is_said_about_it_leaves_a_contender_its_speed(tmp_path):
    def cfg(*fields: str) -> Any:
        return baselines.prepare(path, fields).cfg

    path = models.write(tmp_path)
    for fields in (["title=x"], ["saw=[motion.speed]"], ["trained_by.seed=1"], ["paper=arXiv:1"]):
        assert profiling.same_speed(cfg(*fields)) == profiling.same_speed(cfg())
    for fields in (["sampler.steps=[1000]"], ["sampler.cache.alpha=0.5"], ["max_latents=21"]):
        assert profiling.same_speed(cfg(*fields)) != profiling.same_speed(cfg())
    assert profiling.same_speed(dataclasses.replace(cfg(), precision="bfloat16")) != profiling.same_speed(cfg())


def test_a_new_prompt_is_encoded_although_its_embedding_lies_on_disk(tmp_path):
    class Wan(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            denoiser: Any = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, dtype=torch.bfloat16)])
            denoiser.cfg = DiTCfg(dim=1, ffn_dim=1, num_heads=1, num_layers=1, text_dim=1)
            self.denoiser = denoiser
            self.text = WanText(tmp_path, tmp_path, tmp_path, dtype=torch.bfloat16)

    backbone: Any = Wan()
    stopwatch.forget_prompts(backbone)
    assert backbone.text.cache is None
    assert stopwatch.precision(backbone) == {"denoiser": "bfloat16+float32", "text": "bfloat16"}


def test_random_weights_need_no_file_and_are_marked(tmp_path, monkeypatch):
    path = models.write(tmp_path)
    monkeypatch.setattr(ToyBackbone, "fresh", lambda self, seed: self.load_state_dict(models.weights()))  # fitting its decoder takes long
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights 'student\.safetensors'"):
        profiling.profile([path], chunks=5, repeats=1)
    ready = baselines.prepare(path, random_weights=True)
    assert ready.inputs()["weights_sha256"] == "random"
    contestant = stopwatch.warm(ready, 0, 0.0)
    assert contestant.about["weights_sha256"] == "random"
    assert contestant.cold_start_s is None  # nothing was loaded
    found = {"dit_fps": {"median": 20.0, "low": 19.0, "high": 21.0}, "peak_memory_bytes": {"median": 2e9, "low": 2e9, "high": 2e9}}
    line = {"chunks": 16, "level": 0.5, "more": 0.002, "low": -0.001, "high": 0.005, "why": ""}
    short = {"chunks": 3, "level": 3e9, "more": -2e6, "low": None, "high": None, "why": "3 chunks, the least is 4"}
    document = {
        "timings": {"a": found, "b": {}},
        "length": {"a": {"seconds": line, "bytes": short}, "b": {}},
        "recorded": {"contenders": {"a": contestant.about, "b": {"weights_sha256": "f", "approximate": ["tiny decoder"]}}},
    }

    def row(name: str, counts: str, cell: str) -> dict[str, str]:
        return {"": name, "what counts": counts, "a (random weights)": cell, "b (tiny decoder)": ""}

    assert profiling.table(document) == [
        row("dit_fps", "steps + context pass, no decoding", "20 [19, 21]"),
        row("peak_memory_MB", "most allocated, or resident on a CPU", "2000 [2000, 2000]"),
        row("ms per 100", "more for a chunk, 100 chunks later", "+2 [-1, +5]"),
        row("MB per 100", "more for a chunk, 100 chunks later", "-2 (3 chunks, the least is 4)"),
    ]
    assert float(contestant.backbone.denoiser.head.head.weight.std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the peak")
def test_memory_held_before_the_meter_starts_is_not_counted():
    mebibyte = 2**20
    held = bytearray(b"x" * (300 * mebibyte))
    del held
    what, peak = stopwatch.meter()
    before = peak()
    held = bytearray(b"x" * (100 * mebibyte))
    assert what == "resident after warm-up"
    assert 90 * mebibyte < peak() - before < 250 * mebibyte
    del held


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_clock(tmp_path):
    ready = baselines.prepare(models.write(tmp_path))
    one = stopwatch.take(stopwatch.warm(ready, 6, 0.0), 0)
    stamps = [stamp for chunk in one.stream for stamp in (chunk.begin, chunk.denoised, chunk.readable, chunk.cached)]
    assert stamps == sorted(stamps)  # type: ignore[type-var]
    assert 0 < one.peak_bytes <= one.reserved_bytes < one.device_bytes < torch.cuda.get_device_properties(0).total_memory  # type: ignore[operator]


def outcome(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(ended.value.code or 0)


def test_a_ladder_is_a_run_with_a_document(tmp_path, folders, capsys, monkeypatch):
    monkeypatch.setattr(rungs, "ENOUGH", 2)
    path = models.write(tmp_path, "student")
    fields = ["sampler.steps=[1000,500]", "--chunks", "5", "--repeats", "2", "--name", "climb"]
    assert outcome(["profile", str(path), "--ladder", *fields]) == 0
    told = capsys.readouterr().out
    found = json.loads(told.splitlines()[-1])
    names = [rung["name"] for rung in found["rungs"]]
    assert names[:2] == ["naive", "slots"] and names[-5:] == [*rungs.EIGHT, "no context", "half the steps", "tiny decoder"] and "joint" in names
    assert found["name"] == "climb/cpu" and found["status"] == "done" and found["asked"] == {"chunks": 5, "repeats": 2}
    assert all(rung["peak_is"].startswith("float32, measured") and rung["peak"] > 0 for rung in found["rungs"]), "a CPU has no 8-bit floats"
    assert found["recorded"]["left_out"] == {} and found["rungs"][-1]["first"] < 1e-6, "another decoder leaves latents as they are"
    assert all(rung["ms_low"] <= rung["ms"] <= rung["ms_high"] and rung["share"] > 0 for rung in found["rungs"])
    assert "times as fast" in told
    apart = {row[""]: row["error of rung 0 ×"] for row in ladder.table(found)}
    assert apart["no context"].endswith(" apart") and float(apart["no context"].split()[0]) > 1e-4, "its first chunk has nothing to look back at"
    stamp = (Path(found["path"]) / "run.json").stat().st_mtime_ns
    assert outcome(["profile", str(path), "--ladder", *fields]) == 0 and (Path(found["path"]) / "run.json").stat().st_mtime_ns == stamp
    (folders / "rfbench.toml").write_text("[hardware.cpu]\ntitle = 'CPU'\nmatch = 'cpu'\n[fast]\nattention = 'math'\n")
    assert outcome(["profile", str(path), "--ladder", *fields]) == 2
    assert 'settings.attention: "auto" -> "math"' in capsys.readouterr().err


def test_a_rung_that_is_off_fails_the_ladder_when_all_is_recorded(tmp_path, capsys, monkeypatch):
    """From the command line, again when the finished run is found, and in the script for GPUs."""
    monkeypatch.setattr(rungs, "ENOUGH", 2)

    def off(*given):
        return (1.2 * chunk for chunk in rungs.reference(*given))

    def ways(backbone, cfg, others):
        return [rungs.Way("naive", "reference", rungs.reference, backbone, cfg), rungs.Way("worse", "exact", off, backbone, cfg)]

    monkeypatch.setattr(ladder, "ways", ways)
    path = models.write(tmp_path, "student")
    for _ in range(2):
        assert outcome(["profile", str(path), "--ladder", "sampler.steps=[1000,500]", "--chunks", "5", "--repeats", "1", "--name", "off"]) == 1
        told = capsys.readouterr()
        found = json.loads(told.out.splitlines()[-1])
        assert found["status"] == "done" and not found["exact"] and [rung["verdict"] for rung in found["rungs"]] == ["pass", "fail"]
        assert all(error["low"] > 5 for error in found["rungs"][1]["error"].values())
        assert "worse (" in told.err and "times the error of rung 0" in told.err and " fail " in told.out
    monkeypatch.setattr(ladder, "profile", lambda *given, **asked: Path(found["path"]))
    with pytest.raises(SystemExit, match=r"rungs of the ladder fail.*worse"):
        gpu.climbed(argparse.Namespace(chunks=5, repeats=1, small=True))
    assert json.loads(capsys.readouterr().out)["rungs"] == found["rungs"]


def test_eight_bit_products_are_measured_by_the_peak_of_eight_bits(monkeypatch):
    table = {"bfloat16": 989.4, "float8": 1978.9}
    monkeypatch.setattr(hardware, "printed", lambda device, dtype: table.get(dtype))
    peak = ladder.speed_of_light(torch.device("cuda"), torch.bfloat16)

    def told(*eight):
        return peak(rungs.Way("any", "approximate", rungs.reference, cast(Any, None), cast(Any, None), eight))

    assert told() == told("attention") == (989.4, "bfloat16, the maker's dense peak")
    assert told("products") == (1978.9, "float8, the maker's dense peak")
    del table["float8"]
    assert told("products") == (None, "float8, which rfbench.toml does not have of this device")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a", "b", "--ladder"], "take one baseline"),
        (["toy/teacher", "--ladder", "--random-weights"], "has no ladder"),
        (["toy/ode-init", "--ladder", "--chunks", "4"], "never gets steady"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(words, sentence, capsys):
    assert outcome(["profile", *words]) == 2
    assert sentence in capsys.readouterr().err
