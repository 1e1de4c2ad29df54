"""`rfbench train`: from a recipe to weights and the baseline file that names them.

One loop for every method, and for one process or many (`rfbench.parallel`). All randomness comes from one generator, which is the same in
every process and whose state is in every checkpoint beside the weights and the optimisers, so a run that was killed and started again ends
with the same bytes as one that was not.

    runs/train/<name>/{run.json, log.jsonl, checkpoints/step_000100/, samples/step_000100/0.mp4} and what `rfbench.outcome` writes
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfbench import config, logbook, memory, outcome, pairs, parallel, provenance, records, resume, strict
from rfbench.backbones.base import Backbone, accepts, load, open_backbone, pixel_frames
from rfbench.backbones.wan.dit import WanDiT
from rfbench.baselines import device
from rfbench.checkpointing import checkpointed
from rfbench.config import Precision, PrecisionCfg, Recipe, SamplesCfg, WeightsCfg
from rfbench.data import ClipDraws, ClipStore, Prompts, draw_clips, draw_prompts, prompts_of
from rfbench.errors import UserError
from rfbench.launched import place
from rfbench.logbook import Row, summary
from rfbench.methods.base import METHODS, Batch, Draws, Method
from rfbench.parallel import ALONE, Ranks, finite, full, whole
from rfbench.phases import phase
from rfbench.progress import Progress, say
from rfbench.recipes import check, files, forced, inputs_of, locate
from rfbench.registry import pick
from rfbench.sampler import generate
from rfbench.settings import settings
from rfbench.updates import Updater, schedule
from rfbench.video import as_uint8, writing
from rfbench.weight_files import commits
from rfbench.weights import Ema

EXPLODED = 1e4  # times the norm that gradients are clipped to: nothing is learned from such a step, and the weights may be lost


def train(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    name: str | None = None,
    fresh: bool = False,
    dry_run: bool = False,
    share: int | None = None,
    offload: bool = False,
    tracker: str | None = None,
) -> Path:
    """Train a recipe, or go on training where a run of the same recipe stopped.

    Args:
        share: how many of the processes that were launched have one copy of every network between them; null is those of a node.
        offload: frozen networks wait in the CPU's memory.
        tracker: where figures go beside `log.jsonl`, see `logbook.TRACKERS`.

    Returns:
        the run directory, with `weights.safetensors` and `baseline.yaml` in it.

    Raises:
        UserError: the recipe is wrong, its weights are missing, the directory holds another run, or training broke down (code 1).
    """
    planned = share or place().local_size
    with contextlib.nullcontext(ALONE) if dry_run else parallel.joined(share=share, offload=offload) as ranks:
        recipe = config.whole_name(Recipe, recipe)
        path = config.find(Recipe, recipe)
        cfg = strict.build(Recipe, strict.load_plain(path, list(overrides), Recipe), where=recipe)
        check(cfg)
        if tracker is not None:
            logbook.check_tracker(tracker)
        ranks.deal(*clips_of(cfg))
        name = name or config.name_of(recipe)
        directory = settings().runs / "train" / name
        if dry_run:
            clips, parts = clips_of(cfg)
            say(memory.sentence(cfg, max(1, clips // math.lcm(parts, planned)), share=planned, offload=offload))
        sources = locate(cfg, path)
        if not dry_run:
            _train(cfg, name, directory, sources, ranks, fresh=fresh, tracker=tracker)
        return directory


def _train(cfg: Recipe, name: str, directory: Path, sources: dict[str, Path], ranks: Ranks, *, fresh: bool, tracker: str | None) -> None:
    """Train inside a session of the run's directory, which the first process holds for all."""
    inputs = inputs_of(cfg, sources) if ranks.first else {}
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(provenance.session(directory, "train", name, inputs, fresh=fresh)) if ranks.first else None
        if run is not None:
            if run.done and not all((directory / file).exists() for file in outcome.files(cfg)):
                run.reopen()
            if not run.done:
                shared = 1 if ranks.mesh is None else ranks.mesh.size(1)
                origin = commits({role: (one, sources[role]) for role, one in files(cfg).items()})
                how = {"processes": ranks.size, "shared_by": shared, "offload": ranks.offload, **origin}
                run.record(device=str(device()), threads=torch.get_num_threads(), **how)
        stack.enter_context(ranks.failing_together())  # so that the session's end has the reason
        known = ranks.told(None if run is None or run.done else (run.run.recorded.get("code"), run.run.fingerprint))
        if known is not None:
            code, fingerprint = known
            hashes = {key: value for key, value in inputs.items() if key != "recipe"}
            about = {"run": name, "fingerprint": fingerprint, "seed": cfg.seed, "code": code, **hashes}
            result = Trainer(cfg, directory, sources, ranks).run(about, tracker=tracker)
            if run is not None:
                run.result.update(result)


def clips_of(cfg: Recipe) -> tuple[int, int]:
    """Clips of one step, and micro-batches that they come in: as released, a step is one micro-batch of one clip per GPU (D-1)."""
    return (cfg.batch // cfg.accumulate,) * 2 if cfg.stepping == "as_released" else (cfg.batch, cfg.accumulate)


class Trainer:
    """State of a training run: modules, their optimisers, the average, the generator, the step.

    Without `sources` weights and clips are drawn, and networks are small where there is no GPU: for profiles.
    """

    def __init__(self, cfg: Recipe, directory: Path, sources: dict[str, Path] | None, ranks: Ranks = ALONE) -> None:
        self.cfg, self.directory, self.precision, self.ranks = cfg, directory, cfg.precision or PrecisionCfg(), ranks
        self.rng = self._generator()
        self.prompts: Prompts | None = None  # of a clip, where its seed says it
        self.drawn = sources is None
        self.student = self._student(sources or {})
        self.method = self._method(sources or {})
        for module in (*self.method.modules.values(), *self.method.frozen.values()):  # SiD's gradients go through the teacher
            if cfg.checkpointing and isinstance(module, WanDiT):
                checkpointed(module)
        for module in self.method.modules.values():
            self.ranks.split_trained(module)
        for frozen in self.method.frozen.values():
            self.ranks.split_frozen(frozen)
        optims = {"generator": cfg.optim} | ({"critic": cfg.scores.critic_optim} if cfg.scores else {})
        self.updaters = {role: Updater(module, optims[role]) for role, module in self.method.modules.items()}
        self.generator = self.updaters["generator"]
        self.ema: Ema | None = None
        self.step = 0

    def _generator(self) -> torch.Generator:
        """What says the seeds of all clips, from the first step on."""
        return torch.Generator().manual_seed(self.cfg.seed)

    def _student(self, sources: dict[str, Path]) -> Backbone:
        cfg = self.cfg
        if cfg.init is not None:
            student = self._open(cfg.backbone, cfg.init, sources.get("student"), self.precision.student)
        else:
            student = open_backbone(cfg.backbone, precision=self.precision.student)
            student.fresh(cfg.seed)
        assert isinstance(student, nn.Module)
        student.to(device())
        return student

    def _open(self, name: str, weights: WeightsCfg, file: Path | None, precision: Precision | None) -> Backbone:
        """A backbone with the weights of a file, or with drawn ones."""
        if file is not None:
            return load(name, weights, file, precision=precision)
        assert self.drawn
        backbone = open_backbone(name, precision=precision, reduced=(device().type == "cpu" and accepts(name, "reduced")) or None)
        backbone.fresh(self.cfg.seed)
        nn.init.normal_(backbone.denoiser.head.head.weight, std=0.02, generator=self._generator())  # arithmetic on zeros draws less power
        return backbone

    def _method(self, sources: dict[str, Path]) -> Method:
        cfg, student = self.cfg, self.student
        kind = pick(METHODS, cfg.method, what="method")
        if cfg.method == "flow":
            return kind(cfg, student, self._rendered())
        prompts = prompts_of(sources.get("prompts"))
        if cfg.method == "ode":
            given = pairs.of(cfg, student, prompts, sources, self.ranks)
            self._remember(self._captions(given))
            return kind(cfg, student, given)
        scores, precision = cfg.scores, self.precision
        assert scores is not None
        teacher = self._open(scores.teacher_backbone or cfg.backbone, scores.teacher, sources.get("teacher"), precision.teacher)
        teacher.remember([scores.negative] if scores.guidance != 1.0 else [])
        critic = None
        if scores.critic is not None or precision.critic != precision.teacher:
            file = sources.get("critic", sources.get("teacher"))
            critic = self._open(cfg.backbone, scores.critic or scores.teacher, file, precision.critic).denoiser
        clips = None
        if self.drawn and forced(cfg):
            clips = self._noise
        elif "latents" in sources:
            shown = pairs.LmdbPairs(sources["latents"], (), frames=cfg.latents)
            self._remember(self._captions(shown))
            clips = shown.ends
        elif cfg.data.clips is not None:
            clips = self._rendered().pick
        if clips is None:
            self.prompts = prompts
            self._remember(prompts)
        return kind(cfg, student, teacher, critic=critic, prompts=prompts, clips=clips)

    def _remember(self, prompts: Prompts) -> None:
        """Embed the prompts of all clips of this process before training, so that no text encoder has to be in memory then."""
        rng, (clips, parts), scores = self._generator(), clips_of(self.cfg), self.cfg.scores
        seeds = [seed for _ in range(self.cfg.steps) for part in self._own(_draw(rng, clips), parts) for seed in part.seeds]
        if scores is not None and scores.rollouts == "separate":
            seeds += Batch(tuple(seeds), 0).other().seeds
        self.student.remember([*dict.fromkeys(prompts(seeds)), *(self.cfg.samples.prompts if self.cfg.samples is not None else ())])

    def _captions(self, given: pairs.StoredPairs | pairs.LmdbPairs) -> Prompts:
        """What clips are called that are given, by the seeds that pick them."""
        return lambda seeds: [caption for seed in seeds for caption in given.prompts(Draws(self.student.shape, [seed]))]

    def _noise(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        """Clips that cost as much as any others."""
        assert isinstance(draws, Draws)
        return draws(self.cfg.latents), draw_prompts(draws.integers(2**31))

    def _rendered(self) -> ClipStore:
        """Clips of the toy world."""
        cfg = self.cfg
        assert cfg.data.clips is not None
        with Progress("rendering clips", cfg.data.clips):
            return draw_clips(self.student.encode_pixels, seed=cfg.data.seed, count=cfg.data.clips, frames=pixel_frames(cfg.latents))

    def run(self, about: Mapping[str, Any], *, tracker: str | None = None) -> dict[str, Any]:
        """Train to the end; write checkpoints, the log, and what comes out, with what it is `about`. Returns headline numbers."""
        name = str(about["run"])
        self._resume()
        with contextlib.ExitStack() as stack:
            log = progress = None
            if self.ranks.first:
                told = {"recipe": self.cfg.title, "method": self.cfg.method, "seed": self.cfg.seed, "fingerprint": about["fingerprint"]}
                log = stack.enter_context(logbook.writing(self.directory, name, self.step, tracker=tracker, about=told))
                progress = stack.enter_context(Progress(name, self.cfg.steps, done=self.step))
            rows: list[Row] = []
            while self.step < self.cfg.steps:
                rows.append(self.advance())
                if progress is not None:
                    progress.advance(1, logbook.numbers(rows[-1]))
                if self.step % self.cfg.log_every == 0 or self.step == self.cfg.steps:
                    if log is not None:
                        log(self.step, rows)
                    rows = []
                if self.cfg.samples is not None and self.step % self.cfg.samples.every == 0:
                    self._sample(self.cfg.samples)
                if self.step % self.cfg.checkpoint_every == 0 and self.step < self.cfg.steps:
                    self._checkpoint()
        self._finish(about)
        return {"steps": self.step, "updates": {role: updater.steps for role, updater in self.updaters.items()}}

    def _own(self, seeds: list[int], parts: int) -> Sequence[Batch]:
        """The micro-batches of a step that this process computes."""
        return self.ranks.own(Batch(tuple(seeds[1:]), seeds[0]).split(self.ranks.deal(len(seeds) - 1, parts)))

    def turns(self, step: int) -> tuple[str, ...]:
        """Which modules a step updates."""
        if self.cfg.stepping != "as_released":
            return self.method.turns(step)
        return self.method.turns(step // self.cfg.accumulate) if step % self.cfg.accumulate == 0 else ("critic",)

    def advance(self) -> Row:
        """One optimiser step of every module whose turn it is; what happened, in figures.

        The released trainer steps after every micro-batch, which is one clip per GPU, and once more, with the same gradients, after
        every `accumulate`-th. Only then does it clear them, and only then has the generator a turn (D-1).
        """
        cfg, released, turns = self.cfg, self.cfg.stepping == "as_released", self.turns(self.step)
        whole_step = not released or self.step % cfg.accumulate == 0
        clips, parts = clips_of(cfg)
        seeds = _draw(self.rng, clips)
        own = self._own(seeds, parts)
        stats: dict[str, list[Tensor]] = {}
        phase("communication")
        with whole(self.method.modules.values()):
            for part in own:
                losses, seen = self.method.losses(part, turns)
                phase("backward")
                for loss in losses.values():
                    (loss / len(own) / (cfg.accumulate if released else 1)).backward()
                for key, value in seen.items():
                    stats.setdefault(key, []).append(value.detach().double().cpu())
            phase("communication")
        figures = self.ranks.together({key: torch.cat(values) for key, values in stats.items()})
        if cfg.reward is not None and cfg.reward.normalise and "generator" in turns:
            self.generator.scale(1 / float(figures["weight"].mean()))  # the loss is linear in weights that only now are all known
        phase("optimiser")
        norms = {role: self.updaters[role].clip() for role in turns}
        self._refuse_breakdown(norms, figures, seeds)
        for role in turns:
            updater = self.updaters[role]
            for _ in range(2 if released and whole_step else 1):
                updater.step(schedule(updater.cfg, self.step, cfg.steps))
                if released and role == "generator" and self.ema is not None:
                    self.ema.update(updater.masters)
            if whole_step:
                updater.clear()
        self.step += 1
        self._average(turns)
        return {f"grad_norm_{role}": norm for role, norm in norms.items()} | summary(figures)

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

    def _refuse_breakdown(self, norms: Mapping[str, float], figures: Mapping[str, Tensor], seeds: list[int]) -> None:
        """Stop before a step that would spoil the weights; every process finds the same, and the first one writes down what it was."""
        for role, norm in norms.items():
            limit = EXPLODED * self.updaters[role].cfg.clip
            problem = (
                "is not finite" if not math.isfinite(norm) else f"has norm {norm:.3g}, where {limit:.3g} is beyond repair" if norm > limit else None
            )
            if problem is None:
                continue
            prompts = self.prompts(seeds[1:]) if self.prompts is not None else [None] * (len(seeds) - 1)
            clips: list[dict[str, Any]] = [
                {"seed": seed, "prompt": prompt} | {key: _json(float(value[number])) for key, value in figures.items()}
                for number, (seed, prompt) in enumerate(zip(seeds[1:], prompts, strict=True))
            ]
            broken = self.directory / "broken_batch.json"
            if self.ranks.first:
                records.write_json(broken, {"step": self.step, "role": role, "norm": _json(norm), "shared_seed": seeds[0], "clips": clips})
            raise UserError(
                f"training broke down at step {self.step}: the {role}'s gradient {problem}; the batch and its seeds are in {broken}; "
                f"{resume.left(self.directory / 'checkpoints')}",
                code=1,
            )

    def _tensors(self, *, primed: bool = False) -> dict[str, Any]:
        """All tensors that training goes on from; `primed` for being filled."""
        ema = {} if self.ema is None else dict(zip(self.generator.names, self.ema.average, strict=True))
        return {"roles": {role: updater.tensors(primed=primed) for role, updater in self.updaters.items()}, "ema": ema}

    def _sound(self) -> dict[str, Any]:
        """The same, if all of it is finite in every process; otherwise whoever goes on from it is lost.

        Raises:
            UserError: says what is not finite (code 1); nothing was written.
        """
        found = self._tensors()
        parts = {f"the {role}'s {kind}": part for role, both in found["roles"].items() for kind, part in both.items()}
        sound = self.ranks.together({name: torch.tensor([finite(part)]) for name, part in (parts | {"the average": found["ema"]}).items()})
        lost = [name for name, everywhere in sound.items() if not everywhere.all()]
        if lost:
            raise UserError(
                f"training broke down before step {self.step} was over: {' and '.join(lost)} are not finite, though the gradients were; nothing "
                f"of it is written; {resume.left(self.directory / 'checkpoints')}",
                code=1,
            )
        return found

    def _checkpoint(self) -> None:
        steps = {role: updater.steps for role, updater in self.updaters.items()}
        facts = {"updates": steps, "averaging": self.ema is not None, "rng": self.rng.get_state().numpy().tobytes().hex()}
        resume.save(self.directory / "checkpoints", self.step, self._sound(), facts, self.ranks)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if there is one."""
        found = resume.newest(self.directory / "checkpoints")
        if found is None:
            return
        path, facts = found
        if facts["averaging"]:
            assert self.cfg.ema is not None
            self.ema = Ema(self.generator.masters, self.cfg.ema.decay)
        resume.load(path, self._tensors(primed=True), self.ranks)
        self.step = int(facts["step"])
        self.rng.set_state(torch.frombuffer(bytearray.fromhex(facts["rng"]), dtype=torch.uint8))
        for role, updater in self.updaters.items():
            updater.go_on(int(facts["updates"][role]))

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
        """Render the recipe's samples, in the first process; the others wait."""
        shape, seeds = self.student.shape, [cfg.seed + number for number in range(len(cfg.prompts))]
        with self._averaged(), whole(self.method.modules.values()):
            if self.ranks.first:
                pixels = as_uint8(torch.cat(list(generate(self.student, cfg.prompts, cfg.latents, self.cfg.sampler, seeds)), dim=1)).cpu().numpy()
                for number, clip in enumerate(pixels):
                    out = self.directory / "samples" / f"step_{self.step:06d}" / f"{number}.mp4"
                    with writing(out, fps=shape.fps, height=shape.pixel_height, width=shape.pixel_width) as write:
                        write(clip)
            self.ranks.wait()

    def _finish(self, about: Mapping[str, Any]) -> None:
        """Write what comes out. Tensors are named as in the checkpoints that the backbone reads: what it has beside those is not trained."""
        self._sound()
        own = self._exact()
        with self._averaged():
            average = None if self.ema is None else self._exact()
        if self.ranks.first:
            outcome.write(self.directory, self.cfg, own, average, about)
        self.ranks.wait()

    def _exact(self) -> dict[str, Tensor]:
        """The student's tensors as they are now, in float32 where there are copies; in the first process alone."""
        model = self.student.denoiser if self.student.parts() else self.student
        assert isinstance(model, nn.Module)
        found = {}
        for name, tensor in self.generator.exact(model.state_dict(keep_vars=True)).items():
            together = full(tensor)  # by all processes, one tensor after the other
            if self.ranks.first:
                found[name] = together.to("cpu", copy=True)
        return found


def _draw(rng: torch.Generator, clips: int) -> list[int]:
    """Seeds of a step: what its clips have in common, then each clip's own."""
    return torch.randint(2**62, (clips + 1,), generator=rng).tolist()


def _json(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
