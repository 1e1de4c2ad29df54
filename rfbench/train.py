"""`rfbench train`: from a recipe to weights and the baseline file that names them.

One loop for every method. All randomness comes from one generator, whose state is in every checkpoint beside the weights
and the optimisers, so a run that was killed and started again ends with the same bytes as one that was not.

    runs/train/<name>/{run.json, log.jsonl, checkpoints/step_000100.pt, weights.safetensors, baseline.yaml}
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfbench import config, provenance, records, strict
from rfbench.backbones.base import Backbone, load, open_backbone, pixel_frames
from rfbench.config import OptimCfg, Recipe, WeightsCfg
from rfbench.data import OdePairs, draw_clips
from rfbench.errors import UserError
from rfbench.methods.base import METHODS, Batch, Method
from rfbench.methods.redmd import effective_share
from rfbench.progress import Progress
from rfbench.registry import pick
from rfbench.reward import JUDGED
from rfbench.weights import Ema, identity, read_file, resolve, save

KEPT = 2  # checkpoints; the older one is there in case the newer one's disk goes bad


def train(recipe: str, overrides: Sequence[str] = (), *, name: str | None = None, fresh: bool = False, dry_run: bool = False) -> Path:
    """Train a recipe, or go on training where a run of the same recipe stopped.

    Returns:
        the run directory, with `weights.safetensors` and `baseline.yaml` in it.

    Raises:
        UserError: the recipe is wrong, its weights are missing, the directory holds another run, or the loss is not finite (code 1).
    """
    recipe = config.whole_name(Recipe, recipe)
    path = config.find(Recipe, recipe)
    cfg = strict.build(Recipe, strict.load_plain(path, list(overrides), Recipe), where=recipe)
    check(cfg)
    name = name or config.name_of(recipe)
    directory = config.settings().runs / "train" / name
    sources = {role: resolve(weights, path) for role, weights in roles(cfg).items()}
    inputs = {"recipe": strict.as_plain(cfg), "weights": {role: identity(sources[role], weights) for role, weights in roles(cfg).items()}}
    if dry_run:
        return directory
    with provenance.session(directory, "train", name, inputs, fresh=fresh) as run:
        if run.done and not all((directory / file).exists() for file in ("weights.safetensors", "baseline.yaml")):
            run.reopen()
        if not run.done:
            run.record(threads=torch.get_num_threads())
            run.result.update(Trainer(cfg, directory, sources).run(run.run.recorded, run.run.fingerprint, name))
    return directory


def roles(cfg: Recipe) -> dict[str, WeightsCfg]:
    """The checkpoints that a recipe starts from."""
    named = {"student": cfg.init, "teacher": cfg.scores.teacher if cfg.scores else None}
    return {role: weights for role, weights in named.items() if weights is not None}


def check(cfg: Recipe) -> None:
    """Refuse settings that the method needs and lacks, or has and would not read."""
    uses = {
        "flow": {"data.clips", "data.drop_caption"},
        "ode": {"init", "data.pairs", "data.pair_sampler"},
        "dmd": {"init", "scores"},
        "redmd": {"init", "scores", "reward"},
    }
    if cfg.method not in uses:
        pick(METHODS, cfg.method, what="method")
    given = {"init": cfg.init, "scores": cfg.scores, "reward": cfg.reward}
    given |= {f"data.{item.name}": getattr(cfg.data, item.name) for item in dataclasses.fields(cfg.data) if item.name != "seed"}
    for key, value in given.items():
        if (value is not None) != (key in uses[cfg.method]):
            raise UserError(f"recipe '{cfg.title}': method '{cfg.method}' {'needs' if value is None else 'does not use'} '{key}'")
    if cfg.batch % cfg.accumulate:
        raise UserError(f"recipe '{cfg.title}': a batch of {cfg.batch} does not split into {cfg.accumulate} equal micro-batches")
    if cfg.checkpoint_every % cfg.log_every:
        raise UserError(f"recipe '{cfg.title}': 'checkpoint_every' must be a multiple of 'log_every', or a resumed run would log other means")
    if cfg.method == "ode" and cfg.sampler.chunk is None:
        raise UserError(f"recipe '{cfg.title}': method 'ode' makes a streaming student and needs a sampler with 'chunk' and 'cache'")
    if cfg.scores is not None and cfg.sampler.guidance != 1.0:
        raise UserError(f"recipe '{cfg.title}': a student learns its teacher's guidance; leave 'sampler.guidance' at 1 and set 'scores.guidance'")
    if cfg.method != "flow" and cfg.sampler.solver != "renoise":
        raise UserError(f"recipe '{cfg.title}': a student is trained to be clean at any of its steps; that takes 'sampler.solver: renoise'")
    if cfg.sampler.chunk is not None and cfg.latents % cfg.sampler.chunk:
        raise UserError(f"recipe '{cfg.title}': {cfg.latents} latent frames are not whole chunks of {cfg.sampler.chunk}")


class Trainer:
    """State of a training run: modules, their optimisers, the average, the generator, the step."""

    def __init__(self, cfg: Recipe, directory: Path, sources: dict[str, Path]) -> None:
        self.cfg, self.directory = cfg, directory
        self.rng = torch.Generator().manual_seed(cfg.seed)
        self.student = self._student(sources)
        self.method = self._method(sources)
        optims = {"generator": cfg.optim} | ({"critic": cfg.scores.critic_optim} if cfg.scores else {})
        self.optims = {role: (optims[role], _optimisers(module, optims[role])) for role, module in self.method.modules.items()}
        self.updates = dict.fromkeys(self.method.modules, 0)  # optimiser steps taken, per module
        self.trained = _parameters(self.method.modules["generator"])
        self.ema: Ema | None = None
        self.step = 0

    def _student(self, sources: dict[str, Path]) -> Backbone:
        if self.cfg.init is not None:
            return load(self.cfg.backbone, self.cfg.init, sources["student"])
        student = open_backbone(self.cfg.backbone)
        student.fresh(self.cfg.seed)
        return student

    def _method(self, sources: dict[str, Path]) -> Method:
        cfg, student = self.cfg, self.student
        kind = pick(METHODS, cfg.method, what="method")
        if cfg.method == "flow":
            assert cfg.data.clips is not None
            with Progress("rendering clips", cfg.data.clips):
                store = draw_clips(student.encode_pixels, seed=cfg.data.seed, count=cfg.data.clips, frames=pixel_frames(cfg.latents))
            return kind(cfg, student, store)
        if cfg.method == "ode":
            return kind(cfg, student, self._pairs())
        assert cfg.scores is not None
        return kind(cfg, student, load(cfg.backbone, cfg.scores.teacher, sources["teacher"]))

    def _pairs(self) -> OdePairs:
        """The teacher's trajectories: what the student is initialised from is the teacher itself."""
        from rfbench.methods.ode import solve_pairs

        cfg = self.cfg
        assert cfg.data.pairs is not None and cfg.data.pair_sampler is not None
        rng = torch.Generator().manual_seed(cfg.data.seed)
        seeds = torch.randint(2**62, (cfg.data.pairs,), generator=rng).tolist()
        with Progress("solving ODE pairs", cfg.data.pairs) as progress:
            return solve_pairs(self.student, cfg.sampler, cfg.data.pair_sampler, latents=cfg.latents, seeds=seeds, tell=progress.advance)

    def run(self, recorded: dict[str, Any], fingerprint: str, name: str) -> dict[str, Any]:
        """Train to the end; write checkpoints, the log, the weights and the baseline. Returns headline numbers."""
        self._resume()
        log = self.directory / "log.jsonl"
        _keep_rows(log, self.step)
        with records.appending(log) as append, Progress(name, self.cfg.steps, done=self.step) as progress:
            rows: list[dict[str, float]] = []
            while self.step < self.cfg.steps:
                rows.append(self._advance())
                if self.step % self.cfg.log_every == 0 or self.step == self.cfg.steps:
                    append({"step": self.step} | means(rows))
                    rows = []
                progress.advance(1, rows[-1] if rows else None)
                if self.step % self.cfg.checkpoint_every == 0 and self.step < self.cfg.steps:
                    self._checkpoint()
        self._finish(recorded, fingerprint, name)
        return {"steps": self.step, "updates": self.updates}

    def _advance(self) -> dict[str, float]:
        """One optimiser step of every module whose turn it is; what happened, in figures."""
        cfg, turns = self.cfg, self.method.turns(self.step)
        seeds = torch.randint(2**62, (cfg.batch + 1,), generator=self.rng).tolist()
        parts = Batch(tuple(seeds[1:]), seeds[0]).split(cfg.accumulate)
        stats: dict[str, list[Tensor]] = {}
        for part in parts:
            losses, seen = self.method.losses(part, turns)
            for loss in losses.values():
                (loss / len(parts)).backward()
            for key, value in seen.items():
                stats.setdefault(key, []).append(value.detach().double())
        norms = {f"grad_norm_{role}": self._update(role, seeds) for role in turns}
        self.step += 1
        if self.cfg.ema is not None and "generator" in turns and self.step > self.cfg.ema.start:
            if self.ema is None:
                self.ema = Ema(self.trained, self.cfg.ema.decay)
            else:
                self.ema.update(self.trained)
        return norms | summary({key: torch.cat(values) for key, values in stats.items()})

    def _update(self, role: str, seeds: list[int]) -> float:
        """Clip, step, clear. The gradient norm before clipping."""
        cfg, optimisers = self.optims[role]
        parameters = _parameters(self.method.modules[role])
        norm = float(nn.utils.clip_grad_norm_(parameters, cfg.clip))
        if not math.isfinite(norm):
            records.write_json(self.directory / "broken_batch.json", {"step": self.step, "role": role, "seeds": seeds})
            raise UserError(
                f"training broke down at step {self.step}: the {role}'s gradient is not finite; the batch's seeds are in "
                f"{self.directory / 'broken_batch.json'} and the last good checkpoint is kept",
                code=1,
            )
        for optim in optimisers:
            for group in optim.param_groups:
                group["lr"] = learning_rate(cfg, self.step, self.cfg.steps)
            optim.step()
            optim.zero_grad(set_to_none=True)
        self.updates[role] += 1
        return norm

    def _checkpoint(self) -> None:
        folder = self.directory / "checkpoints"
        state = {
            "step": self.step,
            "updates": self.updates,
            "rng": self.rng.get_state(),
            "modules": {role: module.state_dict() for role, module in self.method.modules.items()},
            "optims": {role: [optim.state_dict() for optim in optimisers] for role, (_, optimisers) in self.optims.items()},
            "ema": None if self.ema is None else self.ema.average,
        }
        with records.atomic(folder / f"step_{self.step:06d}.pt") as temporary, temporary.open("wb") as file:
            torch.save(state, file)  # given a path, it would write the temporary name into the archive
        for old in sorted(folder.glob("step_*.pt"))[:-KEPT]:
            old.unlink()

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = sorted((self.directory / "checkpoints").glob("step_*.pt"))
        if not found:
            return
        state = read_file(found[-1])
        self.step, self.updates = int(state["step"]), dict(state["updates"])
        self.rng.set_state(state["rng"])
        for role, module in self.method.modules.items():
            module.load_state_dict(state["modules"][role])
            for optim, saved in zip(self.optims[role][1], state["optims"][role], strict=True):
                optim.load_state_dict(saved)
        if state["ema"] is not None:
            assert self.cfg.ema is not None
            self.ema = Ema(state["ema"], self.cfg.ema.decay)

    def _finish(self, recorded: dict[str, Any], fingerprint: str, name: str) -> None:
        """Write the weights (the average, where there is one) and the baseline that names them."""
        if self.ema is not None:
            self.ema.copy_to(self.trained)
        assert isinstance(self.student, nn.Module)
        weights = self.directory / "weights.safetensors"
        save(weights, self.student, {"recipe": self.cfg.title, "fingerprint": fingerprint, "seed": str(self.cfg.seed)})
        write_baseline(self.directory / "baseline.yaml", self.cfg, weights, recorded, fingerprint, name)


def write_baseline(path: Path, cfg: Recipe, weights: Path, recorded: dict[str, Any], fingerprint: str, name: str) -> None:
    """The baseline of a training run's result: the noun that `generate` and `profile` take."""
    import yaml

    trained = config.Baseline(
        title=cfg.title,
        backbone=cfg.backbone,
        weights=WeightsCfg(file=weights.name, sha256=records.sha256_of(weights)),
        sampler=cfg.sampler,
        license=config.License(code="apache-2.0", weights="apache-2.0"),
        max_latents=cfg.max_latents,
        saw=(f"reward.{cfg.reward.name}", *JUDGED.get(cfg.reward.name, ())) if cfg.reward else (),
        trained_by={"run": name, "fingerprint": fingerprint, "seed": cfg.seed, "code": recorded.get("code")},
    )
    plain = {key: value for key, value in strict.as_plain(trained).items() if value not in (None, [], {})}
    records.write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def summary(stats: dict[str, Tensor]) -> dict[str, float]:
    """Means of per-clip statistics, with spread and effective sample size where they decide something."""
    row = {key: float(value.mean()) for key, value in stats.items()}
    if "weight" in stats:
        row["reward_std"] = float(stats["reward"].std(correction=0))
        row["weight_max"] = float(stats["weight"].max())
        row["weight_ess"] = effective_share(stats["weight"])
    return row


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure over the steps that have it: the generator's are there at its own steps alone."""
    keys = {key for row in rows for key in row}
    return {key: math.fsum(row[key] for row in rows if key in row) / sum(key in row for row in rows) for key in sorted(keys)}


def learning_rate(cfg: OptimCfg, step: int, steps: int) -> float:
    """Linear warm-up, then constant or a half cosine to zero."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return cfg.lr * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cfg.cosine else 1.0)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _optimisers(module: nn.Module, cfg: OptimCfg) -> list[torch.optim.Optimizer]:
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if cfg.kind == "muon" and parameter.ndim == 2 and "blocks." in name]
    rest = [parameter for _, parameter in named if not any(parameter is matrix for matrix in matrices)]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        optimisers.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimisers


def _keep_rows(log: Path, step: int) -> None:
    """Drop log rows of steps that are about to be taken again."""
    everything: list[dict[str, Any]] = records.read_rows(log, dict[str, Any])
    rows = [row for row in everything if row["step"] <= step]
    records.write_text(log, "".join(records.canonical(row) + "\n" for row in rows))
