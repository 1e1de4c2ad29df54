"""Training runs that are interrupted end with the same bytes; steps and averages against hand-computed ones; wrong recipes are refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rfbench import config, resume
from rfbench.backbones import toy
from rfbench.backbones.base import BACKBONES, load
from rfbench.backbones.wan.dit import WanDiT
from rfbench.config import Baseline, OptimCfg, Recipe, WeightsCfg
from rfbench.errors import UserError
from rfbench.logbook import means, summary
from rfbench.methods.base import METHODS, Batch
from rfbench.recipes import check
from rfbench.records import read_run, sha256_of
from rfbench.registry import pick
from rfbench.reward import REWARDS
from rfbench.scorers.base import SCORERS
from rfbench.settings import settings
from rfbench.train import Trainer, train
from rfbench.updates import schedule
from tests.tiny import Tiny

CACHE = {"policy": "ema_sink", "window": 6, "sink": 2, "alpha": 0.9, "fold_dtype": "float32"}
STUDENT = {"steps": [1000, 500], "shift": 5.0, "chunk": 3, "cache": CACHE}
TEACHER = {"steps": 4, "shift": 5.0, "chunk": None, "solver": "euler", "guidance": 2.0}
BASE = {"title": "A test", "backbone": "tiny", "steps": 7, "batch": 2, "latents": 6, "log_every": 2, "checkpoint_every": 2}
OPTIM = {"lr": 0.01, "betas": [0.5, 0.9], "clip": 1.0, "warmup": 2, "cosine": True, "weight_decay": 0.01}
SCORES = {"teacher": {"file": "teacher.safetensors"}, "guidance": 2.0, "generator_every": 3, "critic_optim": OPTIM, "score_shift": 8.0}
RECIPES: dict[str, dict[str, Any]] = {
    "flow": {"optim": OPTIM | {"kind": "muon"}, "data": {"clips": 3, "seed": 1, "drop_caption": 0.3}, "sampler": TEACHER},
    "ode": {"optim": OPTIM, "data": {"pairs": 3, "seed": 2, "pair_sampler": TEACHER}, "sampler": STUDENT, "init": {"file": "teacher.safetensors"}},
    "dmd": {"optim": OPTIM, "data": {}, "sampler": STUDENT, "init": {"file": "student.safetensors"}, "scores": SCORES},
}
RECIPES["redmd"] = RECIPES["dmd"] | {"reward": {"name": "toy_motion", "beta": 0.5}}
FORCED = {"student": "diffusion_forced"}
ABOUT = {"run": "name", "fingerprint": "fingerprint", "seed": 0, "code": None}
EMA = {"ema": {"decay": 0.5, "start": 2}}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "tiny", "tests.tiny:Tiny")


def write(folder: Path, method: str, /, **changes: Any) -> str:
    """A recipe file with the weights that it starts from; its path."""
    for seed, name in enumerate(("teacher", "student")):
        if not (folder / f"{name}.safetensors").exists():
            save_file(dict(Tiny(seed=10 + seed).state_dict()), folder / f"{name}.safetensors")
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(BASE | {"method": method} | RECIPES[method] | changes))
    return str(path)


def recipe(folder: Path, method: str, /, **changes: Any) -> Recipe:
    return config.load(Recipe, write(folder, method, **changes))


class Interrupted(BaseException):
    """What a killed process leaves behind, without the process."""


def interrupt(monkeypatch: pytest.MonkeyPatch, method: str, after: int) -> None:
    """Stop in the middle of the step that follows `after` steps of this session."""
    kind = pick(METHODS, method, what="method")
    whole, calls = kind.losses, list[int]()

    def losses(self: Any, batch: Batch, turns: tuple[str, ...]) -> Any:
        if len(calls) == after:
            raise Interrupted
        calls.append(1)
        return whole(self, batch, turns)

    monkeypatch.setattr(kind, "losses", losses)


@pytest.mark.parametrize("method", RECIPES)
def test_an_interrupted_run_ends_with_the_bytes_of_one_that_was_not(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the first checkpoint, then twice with rows in the log that the checkpoint does not know; whatever the global
    generator does meanwhile."""
    path = write(tmp_path, method, **EMA, steps=9, checkpoint_every=4)
    torch.manual_seed(1)
    straight = train(path, name="straight")
    for seed, after in enumerate((1, 7, 3)):
        torch.manual_seed(seed)
        with monkeypatch.context() as patch:
            interrupt(patch, method, after)
            with pytest.raises(Interrupted):
                train(path, name="interrupted")
        assert read_run(straight.parent / "interrupted").status == "running"
    again = train(path, name="interrupted")
    assert read_run(again).status == "done"
    for file in ("weights.safetensors", "log.jsonl"):
        assert (again / file).read_bytes() == (straight / file).read_bytes(), file
    start = load_file(tmp_path / "student.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in load_file(again / "weights.safetensors").items())


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    directory = train(write(tmp_path, "flow"))
    assert sorted(file.name for file in (directory / "checkpoints").iterdir()) == ["step_000004", "step_000006"]


@pytest.mark.parametrize("method", RECIPES)
def test_a_run_leaves_weights_a_log_and_a_baseline(method: str, tmp_path: Path) -> None:
    path = write(tmp_path, method, max_latents=6)
    directory = train(path, ["steps=5", "seed=3"])
    assert directory == settings().runs / "train" / method
    run = read_run(directory)
    generator = 5 if method in ("flow", "ode") else 2  # its turns are steps 0 and 3
    assert run.result == {"steps": 5, "updates": {"generator": generator} | ({"critic": 5} if generator == 2 else {})}
    assert run.inputs["recipe"]["seed"] == 3 and run.recorded["threads"] >= 1

    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5]
    wanted = {"loss", "grad_norm_generator"}
    if generator == 2:
        wanted |= {"matching_gradient", "timestep", "critic_loss", "critic_timestep", "grad_norm_critic"}
    if method == "redmd":
        wanted |= {"reward", "reward_std", "weight", "weight_max", "weight_ess"}
    assert set(rows[0]) == set(rows[1]) == wanted | {"step"}
    if generator == 2:
        assert set(rows[2]) == {"step", "critic_loss", "critic_timestep", "grad_norm_critic"}  # the generator had no turn
        assert all(len(row["critic_timestep"]) == 10 and sum(row["critic_timestep"]) == pytest.approx(1) for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values() if not isinstance(value, list))

    made = config.load(Baseline, str(directory / "baseline.yaml"))
    assert made.sampler == config.load(Recipe, path).sampler and made.max_latents == 6 and made.backbone == "tiny"
    assert made.weights.sha256 == sha256_of(directory / "weights.safetensors")
    assert bool(made.saw) == (method == "redmd")
    for seen in made.saw:  # the reward itself, or a metric whose cells get a mark
        group, name = seen.split(".")
        assert name in (REWARDS if group == "reward" else pick(SCORERS, group, what="scorer").metrics)
    assert made.trained_by["fingerprint"] == run.fingerprint and made.trained_by["seed"] == 3
    load("tiny", made.weights, directory / "weights.safetensors")


def test_a_finished_run_is_left_alone_until_something_of_it_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "flow")
    directory = train(path)
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in directory.iterdir() if file.is_file()}
    with monkeypatch.context() as patch:
        interrupt(patch, "flow", 0)
        train(path)
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in directory.iterdir() if file.is_file()} == before
    (directory / "weights.safetensors").unlink()
    train(path)
    assert (directory / "weights.safetensors").read_bytes() == before["weights.safetensors"][0]
    assert (directory / "log.jsonl").read_bytes() == before["log.jsonl"][0]
    with pytest.raises(UserError, match="other inputs"):
        train(path, ["seed=1"])
    train(path, ["seed=1"], fresh=True)
    assert (directory / "weights.safetensors").read_bytes() != before["weights.safetensors"][0]


def test_other_starting_weights_are_other_inputs(tmp_path: Path) -> None:
    path = write(tmp_path, "dmd", steps=2)
    train(path)
    save_file(dict(Tiny(seed=99).state_dict()), tmp_path / "teacher.safetensors")
    with pytest.raises(UserError, match=r"other inputs .*weights.teacher"):
        train(path)


def test_a_dry_run_checks_and_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "dmd")
    assert not train(path, dry_run=True).exists()
    with pytest.raises(UserError, match="does not use 'reward'"):
        train(path, ["reward.name=toy_motion", "reward.beta=1"], dry_run=True)
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights 'teacher.safetensors', named by dmd.yaml, are neither"):
        train(path, dry_run=True)
    assert not settings().runs.exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "flow")
    straight = train(path, name="straight")
    with monkeypatch.context() as patch:
        interrupt(patch, "flow", 5)
        with pytest.raises(Interrupted):
            train(path, name="damaged")
    newest = straight.parent / "damaged" / "checkpoints" / "step_000004"
    (data,) = newest.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step_000004 is not a readable checkpoint"):
        train(path, name="damaged")
    shutil.rmtree(newest)
    again = train(path, name="damaged")
    assert (again / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()
    assert (again / "log.jsonl").read_bytes() == (straight / "log.jsonl").read_bytes()


@pytest.mark.parametrize("method", ["flow", "redmd"])
def test_a_gradient_that_is_not_finite_stops_training(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = pick(METHODS, method, what="method")
    whole, calls = kind.losses, list[int]()

    def losses(self: Any, batch: Batch, turns: tuple[str, ...]) -> Any:
        calls.append(1)
        found, stats = whole(self, batch, turns)
        return {role: loss * float("nan") if len(calls) == 4 else loss for role, loss in found.items()}, stats

    path = write(tmp_path, method)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "losses", losses)
        with pytest.raises(UserError, match=r"training broke down at step 3: the generator's gradient is not finite") as raised:
            train(path)
    assert raised.value.code == 1 and "\n" not in str(raised.value)
    assert "; the checkpoint of step 2 is kept; if training from there breaks down again, take a lower learning rate" in str(raised.value)
    directory = settings().runs / "train" / method
    run = read_run(directory)
    assert run.status == "failed" and run.error == str(raised.value)
    broken = json.loads((directory / "broken_batch.json").read_text())
    assert broken["step"] == 3 and broken["role"] == "generator"
    assert [file.name for file in (directory / "checkpoints").iterdir()] == ["step_000002"]
    assert not (directory / "weights.safetensors").exists() and not (directory / "baseline.yaml").exists()
    train(path)
    assert read_run(directory).status == "done"


def test_who_is_told_of_a_breakdown_is_told_what_to_go_on_from(tmp_path: Path) -> None:
    assert resume.left(tmp_path) == "there is no checkpoint yet; a lower learning rate may help"
    for step in (20, 40):
        (tmp_path / f"step_{step:06}").mkdir()
    (tmp_path / ".step_000060.tmp").mkdir()
    assert resume.left(tmp_path).startswith(
        "the checkpoint of step 40 is kept; if training from there breaks down again, remove it to go on from step 20"
    )


@pytest.mark.parametrize("what", ["the generator's weights", "the critic's optimiser", "the average"])
def test_what_is_not_finite_is_not_kept_though_gradients_were(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that would hold it is not written, so the same command goes on from the one before."""
    path = write(tmp_path, "dmd", **EMA | {"steps": 5, "checkpoint_every": 1, "log_every": 1})
    straight, advance = train(path, name="straight"), Trainer.advance

    def spoiled(self: Trainer) -> Any:
        row = advance(self)
        if self.step == 4:
            assert self.ema is not None
            state = next(iter(self.updaters["critic"].optimisers[0].state.values()))
            tensors = {
                "the generator's weights": self.generator.masters,
                "the critic's optimiser": [state["exp_avg_sq"]],
                "the average": self.ema.average,
            }
            tensors[what][-1].data.view(-1)[-1] = math.inf
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", spoiled)
        with pytest.raises(UserError, match=f"broke down before step 4 was over: {what} are not finite") as raised:
            train(path, name="spoiled")
    directory = settings().runs / "train" / "spoiled"
    assert raised.value.code == 1 and read_run(directory).error == str(raised.value)
    assert sorted(file.name for file in (directory / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    again = train(path, name="spoiled")
    assert (again / "weights.safetensors").read_bytes() == (straight / "weights.safetensors").read_bytes()


def test_weights_that_overflow_in_the_last_step_do_not_come_out(tmp_path: Path) -> None:
    """A learning rate that no float32 survives, with a gradient that is clipped."""
    path = write(tmp_path, "flow", optim={"lr": 1e39, "clip": 1.0}, steps=1, log_every=1, checkpoint_every=1)
    with pytest.raises(UserError, match="the generator's weights are not finite"):
        train(path)
    assert not any((settings().runs / "train" / "flow" / name).exists() for name in ("weights.safetensors", "baseline.yaml", "checkpoints"))


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"rollout": FORCED, "data": {"clips": 3, "seed": 1}}, {"matching_gradient"}),
        ({"rollout": {"student": "teacher_forced"}, "data": {"clips": 3, "seed": 1}}, {"matching_gradient"}),
        ({"method": "sid", "scores": SCORES | {"sid_alpha": 1.0}}, {"score_difference"}),
    ],
    ids=["diffusion-forced", "teacher-forced", "sid"],
)
def test_relatives_of_matching_train_as_it_does(changes: dict[str, Any], more: set[str], tmp_path: Path) -> None:
    directory = train(write(tmp_path, "dmd", steps=5, **changes))
    run, rows = read_run(directory), [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    assert run.result == {"steps": 5, "updates": {"generator": 2, "critic": 5}} and more < set(rows[0])
    start, made = load_file(tmp_path / "student.safetensors"), load_file(directory / "weights.safetensors")
    assert any(not torch.equal(tensor, start[name]) for name, tensor in made.items())


@pytest.mark.parametrize(
    ("method", "changes", "sentence"),
    [
        ("flow", {"init": {"file": "teacher.safetensors"}}, "method 'flow' does not use 'init'"),
        ("flow", {"data": {"clips": 3}}, "method 'flow' needs 'data.drop_caption'"),
        ("flow", {"data": {"clips": 3, "drop_caption": 0.1, "pairs": 3}}, "method 'flow' does not use 'data.pairs'"),
        ("flow", {"scores": SCORES}, "method 'flow' does not use 'scores'"),
        ("ode", {"init": None}, "method 'ode' needs 'init'"),
        ("ode", {"data": {"pairs": 3}}, "method 'ode' needs 'data.pair_sampler'"),
        ("ode", {"data": {"pairs": 3, "pair_sampler": TEACHER, "clips": 3}}, "method 'ode' does not use 'data.clips'"),
        ("ode", {"sampler": TEACHER}, "method 'ode' makes a streaming student and needs a sampler with 'chunk'"),
        (
            "ode",
            {"data": {"pairs": 3, "pair_sampler": TEACHER | {"steps": 3}}},
            "passes the timesteps 1000, 909.091, 714.286, but not all of the student's 1000, 833.333;",
        ),
        ("dmd", {"scores": None}, "method 'dmd' needs 'scores'"),
        ("dmd", {"rollout": FORCED}, "method 'dmd' needs 'data.clips'"),
        (
            "dmd",
            {"rollout": FORCED, "data": {"clips": 3}, "latents": 9, "scores": SCORES | {"latents": 6}},
            "of clips that the score models can judge",
        ),
        ("dmd", {"rollout": FORCED | {"context_noise": 0.1}}, "or a 'student' that is shown clips, which has neither"),
        ("dmd", {"scores": SCORES | {"sid_alpha": 1.0}}, "method 'dmd' does not use 'scores.sid_alpha'"),
        ("dmd", {"method": "sid"}, "method 'sid' needs 'scores.sid_alpha'"),
        ("dmd", {"reward": {"name": "toy_motion", "beta": 1.0}}, "method 'dmd' does not use 'reward'"),
        ("dmd", {"sampler": STUDENT | {"solver": "euler"}}, "clean at any of its steps; that takes 'sampler.solver: renoise'"),
        ("dmd", {"sampler": STUDENT | {"guidance": 2.0}}, "leave 'sampler.guidance' at 1"),
        ("redmd", {"reward": None}, "method 'redmd' needs 'reward'"),
        ("redmd", {"reward": {"name": "toy_moton", "beta": 1.0}}, "there is no reward 'toy_moton'; did you mean 'toy_motion'"),
        ("redmd", {"method": "re-dmd"}, "there is no method 're-dmd'; did you mean 'redmd'"),
        ("flow", {"backbone": "tinny"}, "there is no backbone 'tinny'"),
        ("flow", {"accumulate": 3}, "a batch of 2 does not split into 3 equal micro-batches"),
        ("flow", {"checkpoint_every": 3}, "'checkpoint_every' must be a multiple of 'log_every'"),
        ("dmd", {"latents": 7}, "7 latent frames are not whole chunks of 3"),
        ("flow", {"optim": OPTIM | {"momentum": 0.9}}, "unknown key 'momentum'"),
    ],
)
def test_a_recipe_with_missing_or_unused_settings_is_refused(method: str, changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        train(write(tmp_path, method, **changes))
    assert raised.value.code == 2


@pytest.mark.parametrize("name", config.names_of(Recipe))
def test_shipped_recipes_are_checked(name: str) -> None:
    check(config.load(Recipe, name))


def test_the_toy_backbone_trains_from_a_shipped_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = toy.fit_autoencoder
    monkeypatch.setattr(toy, "fit_autoencoder", lambda seed, clips: fit(seed, clips=2))
    small = ["steps=2", "batch=2", "accumulate=2", "latents=3", "data.clips=2", "log_every=1", "checkpoint_every=1"]
    directory = train("toy/teacher", small)
    assert directory == settings().runs / "train" / "toy" / "teacher"
    found = load("toy", WeightsCfg("weights.safetensors"), directory / "weights.safetensors")
    assert isinstance(found, toy.ToyBackbone) and found.denoiser.head.head.weight.any()


class Quadratic:
    """Each clip pulls one weight to a place that its seed says: the loss is (w - x)^2."""

    def __init__(self, recipe: Recipe, student: Any, store: Any) -> None:
        self.w = nn.Parameter(torch.tensor([0.25]))
        self.modules: dict[str, nn.Module] = {"generator": nn.ParameterList([self.w])}
        self.frozen: dict[str, WanDiT] = {}
        self.batches: list[Batch] = []

    def turns(self, step: int) -> tuple[str, ...]:
        return ("generator",)

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.batches.append(batch)
        error = (self.w - places(batch.seeds)).square()
        return {"generator": error.mean()}, {"loss": error.detach()}


def places(seeds: tuple[int, ...]) -> Tensor:
    return torch.tensor([float(seed % 7) for seed in seeds])


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_add_up_to_one_step_of_the_whole_batch(accumulate: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: g = 2 (w - mean x), and AdamW with betas (0, 0) steps by lr g / |g| after decaying the weight.

    (The released trainer steps after every micro-batch, and twice after the last.)
    """
    monkeypatch.setitem(METHODS, "flow", "tests.test_train:Quadratic")
    optim = {"lr": 0.1, "betas": [0.0, 0.0], "clip": 0.5, "weight_decay": 0.5}
    cfg = recipe(tmp_path, "flow", steps=3, batch=4, accumulate=accumulate, optim=optim, log_every=1, checkpoint_every=1)
    trainer = Trainer(cfg, tmp_path / "run", {})
    assert trainer.run(ABOUT) == {"steps": 3, "updates": {"generator": 3}}
    method = trainer.method
    assert isinstance(method, Quadratic)
    assert [len(batch.seeds) for batch in method.batches] == [4 // accumulate] * 3 * accumulate
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    w = 0.25
    for step, row in enumerate(rows):
        parts = method.batches[step * accumulate : (step + 1) * accumulate]
        assert len({batch.shared for batch in parts}) == 1
        x = torch.cat([places(batch.seeds) for batch in parts]).double()
        gradient = 2 * (w - float(x.mean()))
        assert row["step"] == step + 1
        assert row["grad_norm_generator"] == pytest.approx(abs(gradient), rel=1e-5)  # before clipping
        assert row["loss"] == pytest.approx(float((w - x).square().mean()), rel=1e-5)
        w = w * (1 - 0.1 * 0.5) - 0.1 * math.copysign(1, gradient)
    assert method.w.item() == pytest.approx(w, rel=1e-5)


def test_the_seed_and_nothing_else_decides_the_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "flow", "tests.test_train:Quadratic")
    seen = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        trainer = Trainer(recipe(tmp_path, "flow", seed=seed), tmp_path / f"run{number}", {})
        trainer.run(ABOUT)
        assert isinstance(trainer.method, Quadratic)
        seen.append(trainer.method.batches)
    assert seen[0] == seen[1] != seen[2]
    assert len({clip for batch in seen[0] for clip in batch.seeds}) == 14  # no clip's randomness comes twice


def test_the_weights_are_the_average_where_there_is_one(tmp_path: Path) -> None:
    """An average without memory is the last step's weights; one with memory is not."""
    made = {}
    for name, ema in (("none", None), ("forgetful", {"decay": 0.0}), ("slow", {"decay": 0.9})):
        made[name] = load_file(train(write(tmp_path, "flow", ema=ema), name=name) / "weights.safetensors")
    assert all(torch.equal(tensor, made["forgetful"][name]) for name, tensor in made["none"].items())
    assert not any(torch.equal(tensor, made["slow"][name]) for name, tensor in made["none"].items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_weight_has_one_optimiser(kind: str, tmp_path: Path) -> None:
    trainer = Trainer(recipe(tmp_path, "flow", optim=OPTIM | {"kind": kind}), tmp_path, {})
    optimisers = trainer.generator.optimisers
    held = [id(parameter) for optim in optimisers for group in optim.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in trainer.method.modules["generator"].parameters())
    assert len(optimisers) == (2 if kind == "muon" else 1)


def test_learning_rates_warm_up_and_fall_like_a_cosine() -> None:
    cfg = OptimCfg(2.0, warmup=4, cosine=True)
    assert schedule(cfg, 0, 100) == pytest.approx(0.25)
    assert schedule(cfg, 3, 100) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 0.03))
    assert schedule(cfg, 50, 100) == pytest.approx(0.5)
    assert 0 < schedule(cfg, 99, 100) < 0.0005
    assert {schedule(dataclasses.replace(cfg, warmup=0, cosine=False), step, 100) for step in range(100)} == {1.0}


def test_the_log_holds_means_of_what_was_there() -> None:
    assert means([{"a": 1.0, "b": 5.0}, {"a": 2.0}, {"a": 6.0}]) == {"a": 3.0, "b": 5.0}
    assert means([{"c": [1.0, 0.0]}, {"a": 2.0}, {"c": [0.5, 0.5]}]) == {"a": 2.0, "c": [0.75, 0.25]}
    assert summary({"timestep": torch.tensor([20.0, 980.0, 950.0, 500.0])}) == {"timestep": [0.25, 0, 0, 0, 0, 0.25, 0, 0, 0, 0.5]}
    weights = torch.tensor([1.0, 3.0])
    row = summary({"loss": torch.tensor([1.0, 2.0]), "reward": torch.tensor([0.0, 4.0]), "weight": weights})
    assert row == {"loss": 1.5, "reward": 2.0, "weight": 2.0, "reward_std": 2.0, "weight_max": 3.0, "weight_ess": pytest.approx(16 / 20)}
