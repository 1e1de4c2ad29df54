"""Several processes against one: the same batches, the same weights; what is killed goes on, and who fails says so once."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import Shard, distribute_tensor

from rfbench.backbones.base import BACKBONES
from rfbench.errors import UserError
from rfbench.methods.base import METHODS, Batch
from rfbench.outcome import WEIGHTS as OUT
from rfbench.parallel import Ranks, joined
from rfbench.records import read_run
from rfbench.registry import pick
from rfbench.settings import HOME, settings
from rfbench.train import Trainer, train
from tests.ranks import launched
from tests.test_train import EMA, OPTIM, SCORES, Interrupted, interrupt, tiny, write
from tests.tiny import CFG, Tiny, distance

__all__ = ["tiny"]  # a fixture
FEW = EMA | {"optim": OPTIM | {"betas": [0.9, 0.999]}, "steps": 4, "batch": 4, "log_every": 1, "checkpoint_every": 2}


def run_of(name: str) -> Path:
    return settings().runs / "train" / name


def same(one: Path, other: Path) -> None:
    """Weights and logs that differ by rounding: a sum over processes has another order."""
    ours, theirs = (load_file(run / "weights.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    assert distance(*(torch.cat([tensors[name].flatten() for name in ours]) for tensors in (ours, theirs))) < 1e-6
    rows = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    for row, wanted in zip(*rows, strict=True):
        assert row.keys() == wanted.keys() and all(row[key] == pytest.approx(wanted[key], rel=1e-4) for key in row), (row, wanted)


@pytest.mark.parametrize(("method", "accumulate", "size", "local"), [("flow", 1, 2, 2), ("ode", 2, 2, 1), ("dmd", 4, 2, 2), ("redmd", 2, 4, 2)])
def test_many_processes_train_as_one(method: str, accumulate: int, size: int, local: int, tmp_path: Path) -> None:
    """With fewer, as many and more micro-batches than processes; split over all, copied to all, and split within nodes and copied between them."""
    path = write(tmp_path, method, **FEW, accumulate=accumulate)
    alone = train(path, name="alone")
    ends = launched(size, lambda: train(path, name="many"), tmp_path / "many", local=local)
    assert [end.code for end in ends] == [0] * size, ends
    same(run_of("many"), alone)
    recorded = read_run(run_of("many")).recorded
    assert recorded["processes"] == size and recorded["shared_by"] == local
    assert read_run(run_of("many")).result == read_run(alone).result
    assert sorted(path.name for path in run_of("many").iterdir()) == sorted(path.name for path in alone.iterdir())
    assert "many: 4/4" in ends[0].said and not any("many:" in end.said for end in ends[1:])


class Mixed(Tiny):
    """Computes in bfloat16, but for its islands, as full-size networks in `mixed` precision do."""

    def __init__(self) -> None:
        super().__init__(dataclasses.replace(CFG, islands=True))
        self.denoiser.store(torch.bfloat16)


def test_mixed_precision_is_split_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointed blocks and gradients through the cache. Weights are rounded to bfloat16 in every step, so equality is that of a few steps."""
    monkeypatch.setitem(BACKBONES, "mixed", "tests.test_parallel:Mixed")
    scores = SCORES | {"cache_gradients": "in_place"}
    path = write(tmp_path, "redmd", **FEW, backbone="mixed", checkpointing=True, accumulate=4, scores=scores)
    alone = train(path, name="alone")
    ends = launched(2, lambda: train(path, name="many"), tmp_path / "many")
    assert [end.code for end in ends] == [0] * 2, ends
    ours, theirs, start = (load_file(file) for file in (run_of("many") / OUT, alone / OUT, tmp_path / "student.safetensors"))
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    gap, way = (torch.cat([(ours[name] - other[name]).flatten() for name in ours]).norm() for other in (theirs, start))
    assert gap < 1e-3 * way


def test_weights_are_normalised_over_the_whole_batch(tmp_path: Path) -> None:
    """At once, by accumulation and over processes; the first step's gradient is the one without, over the mean weight."""
    reward = {"name": "toy_motion", "beta": 0.5, "normalise": True}
    rest = FEW | {"steps": 2, "checkpoint_every": 2}
    made = [train(write(tmp_path, "redmd", **rest, reward=reward, accumulate=parts), name=f"in{parts}") for parts in (1, 4)]
    path = write(tmp_path, "redmd", **rest, reward=reward, accumulate=1)
    assert [end.code for end in launched(2, lambda: train(path, name="many"), tmp_path / "many")] == [0, 0]
    for other in (made[1], run_of("many")):
        same(other, made[0])
    plain = train(write(tmp_path, "redmd", **rest), name="plain")
    first, wanted = (json.loads((run / "log.jsonl").read_text().splitlines()[0]) for run in (made[0], plain))
    assert first["weight"] == wanted["weight"] < 0.9
    assert first["grad_norm_generator"] == pytest.approx(wanted["grad_norm_generator"] / wanted["weight"], rel=1e-5)


def test_an_interrupted_run_goes_on_with_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "dmd", **FEW, accumulate=2)
    alone = train(path, name="alone")
    with monkeypatch.context() as patch:
        interrupt(patch, "dmd", 5)  # in the third step
        with pytest.raises(Interrupted):
            train(path, name="grows")
    assert all(end.code == 70 for end in launched(2, lambda: _interrupted(path), tmp_path / "shrinks"))
    assert launched(2, lambda: train(path, name="grows"), tmp_path / "grows")[0].code == 0
    same(run_of("grows"), alone)
    assert (run_of("shrinks") / "checkpoints" / "step_000002").is_dir()
    train(path, name="shrinks")
    same(run_of("shrinks"), alone)


def _interrupted(path: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "dmd", 2)
        train(path, name="shrinks")


@pytest.mark.parametrize(("steps", "kills"), [(4, 2), pytest.param(24, 12, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(steps: int, kills: int, tmp_path: Path) -> None:
    """One of the two processes is killed, or both are, at any moment: whoever is left says so in a sentence, or nothing was to do any more."""
    path = write(tmp_path, "redmd", **FEW | {"steps": steps, "batch": 2, "checkpoint_every": 1})
    begun = time.monotonic()
    assert [end.code for end in launched(2, lambda: train(path, name="straight"), tmp_path / "straight")] == [0, 0]
    took, rng, struck = time.monotonic() - begun, random.Random(3), 0
    for number in range(kills):
        victims = ((0, 1), (1,), (0,))[number % 3]
        ends = launched(2, lambda: train(path, name="killed"), tmp_path / "killed", kill=(victims, took * rng.uniform(0.3, 0.7)))
        struck += any(ends[rank].code == -signal.SIGKILL for rank in victims)
        for rank in {0, 1} - set(victims):
            other = ends[rank]
            assert other.code == 0 or (other.code == 1 and other.said.count("error: ") == 1 and "a process of this run was killed" in other.said), (
                other
            )
    assert struck, "every run was over before it was killed"
    assert [end.code for end in launched(2, lambda: train(path, name="killed"), tmp_path / "killed")] == [0, 0]
    for file in ("weights.safetensors", "log.jsonl"):
        assert (run_of("killed") / file).read_bytes() == (run_of("straight") / file).read_bytes(), file
    assert sorted(path.name for path in (run_of("killed") / "checkpoints").iterdir()) == [f"step_{step:06d}" for step in (steps - 2, steps - 1)]


@pytest.mark.parametrize("who", ["all", "one", "part"])
def test_a_failure_is_told_once_and_the_last_good_checkpoint_is_kept(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that is not finite in one process is so for all; what fails in one process, or is lost of its part of the weights, ends all."""
    kind = pick(METHODS, "dmd", what="method")
    whole, calls = kind.losses, list[int]()

    def losses(self: Any, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        calls.append(1)
        found, stats = whole(self, batch, turns)
        if len(calls) == 4 and torch.distributed.get_rank() == 1:
            if who == "one":
                raise UserError("the reward has run out", code=1)
            found = {role: loss * float("nan") for role, loss in found.items()}
        return found, stats

    def advance(self: Trainer) -> Any:
        row = step(self)
        if self.step == 4 and self.ranks.rank == 1:
            self.generator.masters[0].to_local().data.fill_(math.inf)  # type: ignore[attr-defined]
        return row

    step = Trainer.advance
    monkeypatch.setattr(*((Trainer, "advance", advance) if who == "part" else (kind, "losses", losses)))
    path = write(tmp_path, "dmd", **FEW, accumulate=2)
    ends = launched(2, lambda: train(path, name="broken"), tmp_path / "broken")
    assert [end.code for end in ends] == [1, 1]
    sentence = {
        "all": "training broke down at step 3: the generator's gradient is not finite",
        "one": "the reward has run out",
        "part": "training broke down before step 4 was over: the generator's weights are not finite",
    }[who]
    assert "".join(end.said for end in ends).count(sentence) == 1 and "".join(end.said for end in ends).count("error: ") == 1, ends
    run = read_run(run_of("broken"))
    assert run.status == "failed" and sentence in str(run.error)
    assert [path.name for path in (run_of("broken") / "checkpoints").iterdir()] == ["step_000002"]
    if who == "all":
        broken = json.loads((run_of("broken") / "broken_batch.json").read_text())
        assert broken["step"] == 3 and broken["norm"] == "nan" and len(broken["clips"]) == 4
        assert all(isinstance(clip["seed"], int) and clip["prompt"] and "loss" in clip for clip in broken["clips"])
        assert "shared_seed" in broken


def test_accelerate_launches_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The miniature's own recipe and weights, with interpreters of their own; and a tracker, whose accelerate knows of the ranks, too."""
    small = ["steps=2", "batch=2", "accumulate=2", "latents=3", "log_every=1", "checkpoint_every=1"]
    alone = train("toy/reward-forcing", small, name="alone")
    monkeypatch.setenv("PYTHONPATH", str(HOME))
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--mixed_precision", "no", "-m", "rfbench.cli", "train", "toy/reward-forcing", *small, "--track", "tensorboard"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    many = run_of("toy/reward-forcing")
    same(many, alone)
    assert done.stdout.splitlines() == [str(many)] and read_run(many).recorded["processes"] == 2
    assert len(list(many.glob("toy-reward-forcing/events.*"))) == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    with pytest.raises(UserError, match="accelerate's use_fsdp, mixed_precision is set") as raised:
        train("toy/reward-forcing")
    assert raised.value.code == 2
    for name in ("USE_FSDP", "MIXED_PRECISION", "DYNAMO_BACKEND"):
        monkeypatch.delenv(f"ACCELERATE_{name}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="--cpu` starts one process whatever"):  # and says nothing of it
        train("toy/reward-forcing")


def test_a_wrong_request_is_told_once(tmp_path: Path) -> None:
    path = write(tmp_path, "dmd", **FEW)
    ends = launched(3, lambda: train(path, name="three"), tmp_path / "three")
    assert sorted(end.code for end in ends) == [1, 1, 2]
    assert "".join(end.said for end in ends).count("4 clips in 1 micro-batches do not go round 3 processes") == 1
    assert not run_of("three").exists()
    with pytest.raises(UserError, match="needs as many processes"):
        train(path, share=2)


def test_clips_are_dealt_out_in_order() -> None:
    batch = Batch(tuple(range(12)), 99)
    for size, parts, dealt in ((1, 3, 3), (2, 3, 6), (3, 3, 3), (4, 2, 4), (6, 12, 12)):
        everyone = [Ranks(rank, size) for rank in range(size)]
        assert {ranks.deal(12, parts) for ranks in everyone} == {dealt}
        owned = [part for ranks in everyone for part in ranks.own(batch.split(dealt))]
        assert [seed for part in owned for seed in part.seeds] == list(range(12)) and {part.shared for part in owned} == {99}
        assert all(len(part.seeds) <= 12 / parts for part in owned)  # no more at a time than the recipe says


def test_muon_sees_whole_matrices(tmp_path: Path) -> None:
    """Newton and Schulz iterate in bfloat16, which magnifies differences of rounding, so a run is no test of it; one step is."""

    def step() -> None:
        rng = torch.Generator().manual_seed(0)
        start, gradient = torch.randn(24, 48, generator=rng), torch.randn(24, 48, generator=rng)
        with joined() as ranks:
            assert ranks.mesh is not None
            found = []
            for wrap in (lambda x: x.clone(), lambda x: distribute_tensor(x.clone(), ranks.mesh["share"], [Shard(0)])):
                weight = torch.nn.Parameter(wrap(start))
                weight.grad = wrap(gradient)
                torch.optim.Muon([weight], lr=0.1).step()
                found.append(weight.detach())
            assert torch.equal(found[0], found[1].full_tensor())  # type: ignore[attr-defined]

    assert [end.code for end in launched(2, step, tmp_path)] == [0, 0]
