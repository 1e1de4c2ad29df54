"""`rfbench train`: from a recipe to weights and the baseline file that names them.

One loop for every method. All randomness comes from one generator, whose state is in every checkpoint beside the weights
and the optimisers, so a run that was killed and started again ends with the same bytes as one that was not.

    runs/train/<name>/{run.json, log.jsonl, checkpoints/step_000100.pt, samples/step_000100/0.mp4, weights.safetensors, baseline.yaml}
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfbench import config, pairs, provenance, records, strict
from rfbench.backbones.base import Backbone, load, open_backbone, pixel_frames
from rfbench.backbones.wan.dit import WanDiT
from rfbench.baselines import device
from rfbench.checkpointing import checkpointed
from rfbench.config import PrecisionCfg, Recipe, SamplesCfg, WeightsCfg
from rfbench.data import ClipStore, draw_clips, prompts_of
from rfbench.errors import UserError
from rfbench.methods.base import METHODS, Batch, Method
from rfbench.methods.redmd import effective_share
from rfbench.progress import Progress, say
from rfbench.recipes import check, inputs_of, locate, memory
from rfbench.registry import pick
from rfbench.reward import JUDGED
from rfbench.sampler import generate
from rfbench.settings import settings
from rfbench.updates import Updater, schedule
from rfbench.video import as_uint8, writing
from rfbench.weights import Ema, read_file, save

BESIDE = "activations, autoencoder, text encoder and reward come on top"
KEPT = 2  # checkpoints; the older one is there in case the newer one's disk goes bad
BINS = 10  # of timestep histograms, between 0 and 1000

Row = dict[str, float | list[float]]  # of the log


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
    directory = settings().runs / "train" / name
    if dry_run:
        plan = memory(cfg)
        each = ", ".join(f"{role} {size / 2**30:.1f} GiB" for role, size in plan.items())
        say(f"memory: {each}; {sum(plan.values()) / 2**30:.1f} GiB in all; {BESIDE}")
    sources = locate(cfg, path)
    if dry_run:
        return directory
    with provenance.session(directory, "train", name, inputs_of(cfg, sources), fresh=fresh) as run:
        if run.done and not all((directory / file).exists() for file in ("weights.safetensors", "baseline.yaml")):
            run.reopen()
        if not run.done:
            run.record(device=str(device()), threads=torch.get_num_threads())
            run.result.update(Trainer(cfg, directory, sources).run(run.run.recorded, run.run.fingerprint, name))
    return directory


class Trainer:
    """State of a training run: modules, their optimisers, the average, the generator, the step."""

    def __init__(self, cfg: Recipe, directory: Path, sources: dict[str, Path]) -> None:
        self.cfg, self.directory, self.precision = cfg, directory, cfg.precision or PrecisionCfg()
        self.rng = torch.Generator().manual_seed(cfg.seed)
        self.student = self._student(sources)
        self.method = self._method(sources)
        if cfg.checkpointing:
            for module in {self.student.denoiser, *self.method.modules.values()}:
                if isinstance(module, WanDiT):
                    checkpointed(module)
        optims = {"generator": cfg.optim} | ({"critic": cfg.scores.critic_optim} if cfg.scores else {})
        self.updaters = {role: Updater(module, optims[role]) for role, module in self.method.modules.items()}
        self.generator = self.updaters["generator"]
        self.ema: Ema | None = None
        self.step = 0

    def _student(self, sources: dict[str, Path]) -> Backbone:
        cfg = self.cfg
        if cfg.init is not None:
            return self._load(cfg.backbone, cfg.init, sources["student"], self.precision.student)
        student = open_backbone(cfg.backbone, precision=self.precision.student)
        student.fresh(cfg.seed)
        return _moved(student)

    def _load(self, backbone: str, weights: WeightsCfg, file: Path, precision: str | None) -> Backbone:
        return _moved(load(backbone, weights, file, precision=precision))

    def _method(self, sources: dict[str, Path]) -> Method:
        cfg, student = self.cfg, self.student
        kind = pick(METHODS, cfg.method, what="method")
        if cfg.method == "flow":
            return kind(cfg, student, self._rendered())
        prompts = prompts_of(sources.get("prompts"))
        if cfg.method == "ode":
            return kind(cfg, student, pairs.of(cfg, student, prompts, sources))
        scores, precision = cfg.scores, self.precision
        assert scores is not None
        teacher = self._load(scores.teacher_backbone or cfg.backbone, scores.teacher, sources["teacher"], precision.teacher)
        critic = None
        if "critic" in sources or precision.critic != precision.teacher:
            file = sources.get("critic", sources["teacher"])
            critic = self._load(cfg.backbone, scores.critic or scores.teacher, file, precision.critic).denoiser
        clips = None
        if "latents" in sources:
            clips = pairs.LmdbPairs(sources["latents"], (), frames=cfg.latents).ends
        elif cfg.data.clips is not None:
            clips = self._rendered().pick
        return kind(cfg, student, teacher, critic=critic, prompts=prompts, clips=clips)

    def _rendered(self) -> ClipStore:
        """Clips of the toy world."""
        cfg = self.cfg
        assert cfg.data.clips is not None
        with Progress("rendering clips", cfg.data.clips):
            return draw_clips(self.student.encode_pixels, seed=cfg.data.seed, count=cfg.data.clips, frames=pixel_frames(cfg.latents))

    def run(self, recorded: dict[str, Any], fingerprint: str, name: str) -> dict[str, Any]:
        """Train to the end; write checkpoints, the log, the weights and the baseline. Returns headline numbers."""
        self._resume()
        log = self.directory / "log.jsonl"
        _keep_rows(log, self.step)
        with records.appending(log) as append, Progress(name, self.cfg.steps, done=self.step) as progress:
            rows: list[Row] = []
            while self.step < self.cfg.steps:
                rows.append(self._advance())
                if self.step % self.cfg.log_every == 0 or self.step == self.cfg.steps:
                    append({"step": self.step} | means(rows))
                    rows = []
                progress.advance(1, _numbers(rows[-1]) if rows else None)
                if self.cfg.samples is not None and self.step % self.cfg.samples.every == 0:
                    self._sample(self.cfg.samples)
                if self.step % self.cfg.checkpoint_every == 0 and self.step < self.cfg.steps:
                    self._checkpoint()
        self._finish(recorded, fingerprint, name)
        return {"steps": self.step, "updates": {role: updater.steps for role, updater in self.updaters.items()}}

    def _advance(self) -> Row:
        """One optimiser step of every module whose turn it is; what happened, in figures.

        The released trainer steps after every micro-batch, which is one clip per GPU, and once more, with the same gradients, after
        every `accumulate`-th. Only then does it clear them, and only then has the generator a turn (D-1).
        """
        cfg, released = self.cfg, self.cfg.stepping == "as_released"
        whole = not released or self.step % cfg.accumulate == 0
        turns = self.method.turns(self.step // cfg.accumulate if released else self.step) if whole else ("critic",)
        clips = cfg.batch // cfg.accumulate if released else cfg.batch
        parts = clips if released else cfg.accumulate
        seeds = torch.randint(2**62, (clips + 1,), generator=self.rng).tolist()
        stats: dict[str, list[Tensor]] = {}
        for part in Batch(tuple(seeds[1:]), seeds[0]).split(parts):
            losses, seen = self.method.losses(part, turns)
            for loss in losses.values():
                (loss / parts / (cfg.accumulate if released else 1)).backward()
            for role in turns:
                self.updaters[role].gather()
            for key, value in seen.items():
                stats.setdefault(key, []).append(value.detach().double().cpu())
        norms = {f"grad_norm_{role}": self._clip(role, seeds) for role in turns}
        for role in turns:
            updater = self.updaters[role]
            for _ in range(2 if released and whole else 1):
                updater.step(schedule(updater.cfg, self.step, cfg.steps))
                if released and role == "generator" and self.ema is not None:
                    self.ema.update(updater.masters)
            if whole:
                updater.clear()
        self.step += 1
        self._average(turns)
        return norms | summary({key: torch.cat(values) for key, values in stats.items()})

    def _average(self, turns: tuple[str, ...]) -> None:
        """Begin the moving average, or go on. The release begins it whosever turn it is, and goes on after every step of the optimiser."""
        cfg = self.cfg.ema
        if cfg is None:
            return
        released, turn = self.cfg.stepping == "as_released", "generator" in turns
        if self.ema is None and (self.step >= cfg.start if released else turn and self.step > cfg.start):
            self.ema = Ema(self.generator.masters, cfg.decay)
        elif self.ema is not None and turn and not released:
            self.ema.update(self.generator.masters)

    def _clip(self, role: str, seeds: list[int]) -> float:
        """The gradient norm before clipping."""
        norm = self.updaters[role].clip()
        if not math.isfinite(norm):
            records.write_json(self.directory / "broken_batch.json", {"step": self.step, "role": role, "seeds": seeds})
            raise UserError(
                f"training broke down at step {self.step}: the {role}'s gradient is not finite; the batch's seeds are in "
                f"{self.directory / 'broken_batch.json'} and the last good checkpoint is kept",
                code=1,
            )
        return norm

    def _checkpoint(self) -> None:
        folder = self.directory / "checkpoints"
        state = {
            "step": self.step,
            "rng": self.rng.get_state(),
            "modules": {role: module.state_dict() for role, module in self.method.modules.items()},
            "updaters": {role: updater.state() for role, updater in self.updaters.items()},
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
        self.step = int(state["step"])
        self.rng.set_state(state["rng"])
        for role, module in self.method.modules.items():
            module.load_state_dict(state["modules"][role])
            self.updaters[role].load(state["updaters"][role])
        if state["ema"] is not None:
            assert self.cfg.ema is not None
            self.ema = Ema((average.to(device()) for average in state["ema"]), self.cfg.ema.decay)

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The student with the weights that would come out now: the average, where there is one."""
        kept = [master.detach().clone() for master in self.generator.masters] if self.ema is not None else []
        if self.ema is not None:
            self.ema.copy_to(self.generator.masters)
            self.generator.round()
        yield
        for master, own in zip(self.generator.masters, kept, strict=False):
            master.data.copy_(own)
        self.generator.round()

    @torch.no_grad()
    def _sample(self, cfg: SamplesCfg) -> None:
        """Render the recipe's samples."""
        shape, seeds = self.student.shape, [cfg.seed + number for number in range(len(cfg.prompts))]
        with self._averaged():
            pixels = as_uint8(torch.cat(list(generate(self.student, cfg.prompts, cfg.latents, self.cfg.sampler, seeds)), dim=1)).cpu().numpy()
        for number, clip in enumerate(pixels):
            out = self.directory / "samples" / f"step_{self.step:06d}" / f"{number}.mp4"
            with writing(out, fps=shape.fps, height=shape.pixel_height, width=shape.pixel_width) as write:
                write(clip)

    def _finish(self, recorded: dict[str, Any], fingerprint: str, name: str) -> None:
        """Write the weights (the average, where there is one) and the baseline that names them.

        Tensors are named as in the checkpoints that the backbone reads: what it has beside those is not trained and not written.
        """
        model = self.student.denoiser if self.student.parts() else self.student
        assert isinstance(model, nn.Module)
        weights = self.directory / "weights.safetensors"
        about = {"recipe": self.cfg.title, "fingerprint": fingerprint, "seed": str(self.cfg.seed)}
        with self._averaged():
            save(weights, self.generator.exact(model.state_dict(keep_vars=True)), about)
        write_baseline(self.directory / "baseline.yaml", self.cfg, weights, recorded, fingerprint, name)


def _moved(backbone: Backbone) -> Backbone:
    assert isinstance(backbone, nn.Module)
    backbone.to(device())
    return backbone


def write_baseline(path: Path, cfg: Recipe, weights: Path, recorded: dict[str, Any], fingerprint: str, name: str) -> None:
    """The baseline of a training run's result: the noun that `generate` and `profile` take."""
    import yaml

    trained = config.Baseline(
        title=cfg.title,
        backbone=cfg.backbone,
        weights=WeightsCfg(file=weights.name, sha256=records.sha256_of(weights)),
        sampler=cfg.sampler,
        precision=None if cfg.precision is None else cfg.precision.student,
        license=config.License(code="apache-2.0", weights="apache-2.0"),
        max_latents=cfg.max_latents,
        saw=(f"reward.{cfg.reward.name}", *JUDGED.get(cfg.reward.name, ())) if cfg.reward else (),
        trained_by={"run": name, "fingerprint": fingerprint, "seed": cfg.seed, "code": recorded.get("code")},
    )
    plain = {key: value for key, value in strict.as_plain(trained).items() if value not in (None, [], {})}
    records.write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def summary(stats: dict[str, Tensor]) -> Row:
    """Means of per-clip statistics, with spread and effective sample size where they decide something; of timesteps, a histogram."""
    row: Row = {}
    for key, value in stats.items():
        row[key] = (value.histc(BINS, 0, 1000) / len(value)).tolist() if key.endswith("timestep") else float(value.mean())
    if "weight" in stats:
        row["reward_std"] = float(stats["reward"].std(correction=0))
        row["weight_max"] = float(stats["weight"].max())
        row["weight_ess"] = effective_share(stats["weight"])
    return row


def means(rows: Sequence[Row]) -> Row:
    """Mean of every figure over the steps that have it: the generator's are there at its own steps alone."""
    found: Row = {}
    for key in sorted({key for row in rows for key in row}):
        there = [row[key] for row in rows if key in row]
        lists = [value if isinstance(value, list) else [value] for value in there]
        mean = [math.fsum(values) / len(values) for values in zip(*lists, strict=True)]
        found[key] = mean if isinstance(there[0], list) else mean[0]
    return found


def _numbers(row: Row) -> dict[str, float]:
    """What of a row has a place in a line of progress."""
    return {key: value for key, value in row.items() if isinstance(value, float)}


def _keep_rows(log: Path, step: int) -> None:
    """Drop log rows of steps that are about to be taken again."""
    everything: list[dict[str, Any]] = records.read_rows(log, dict[str, Any])
    rows = [row for row in everything if row["step"] <= step]
    records.write_text(log, "".join(records.canonical(row) + "\n" for row in rows))
