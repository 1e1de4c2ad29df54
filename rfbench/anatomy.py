"""`rfbench profile --train`: what the step of a recipe is made of. Seconds, arithmetic and memory, phase by phase, through the trainer itself.

A recipe has steps of several kinds: with a turn of the generator and without. Each kind is warmed up once, its arithmetic is counted in a step that
nobody times, then it is timed; the mean step weighs them as the recipe does. At every mark the device is waited for, and only here.

    runs/profile/train/<name>/<hardware>/{run.json, steps.jsonl}
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rfbench import config, hardware, parallel, provenance, records, strict
from rfbench.baselines import device
from rfbench.config import Recipe, RewardCfg
from rfbench.errors import UserError
from rfbench.phases import PHASES, heard
from rfbench.progress import Progress
from rfbench.recipes import check, inputs_of, locate
from rfbench.records import RANDOM
from rfbench.settings import settings
from rfbench.stopwatch import meter
from rfbench.train import Trainer, clips_of


@dataclasses.dataclass(frozen=True)
class Step:
    """A timed step of one process."""

    kind: str
    seconds: dict[str, float]  # of each phase
    peak_bytes: dict[str, int]  # most memory held during it


def profile(
    recipe: str, overrides: Sequence[str] = (), *, name: str | None = None, repeats: int = 3, random_weights: bool = False, fresh: bool = False
) -> Path:
    """Time the steps of a recipe. With random weights nothing is looked for; networks are then small where there is no GPU.

    Returns:
        the run directory, whose `document` has every number.

    Raises:
        UserError: the recipe is wrong, its weights are missing, or it cannot do without them.
    """
    with parallel.joined() as ranks:
        recipe = config.whole_name(Recipe, recipe)
        path = config.find(Recipe, recipe)
        cfg = strict.build(Recipe, strict.load_plain(path, list(overrides), Recipe), where=recipe)
        check(cfg)
        ranks.deal(*clips_of(cfg))
        if random_weights and cfg.method in ("flow", "ode"):
            raise UserError(f"method '{cfg.method}' learns from clips or pairs, which can't be drawn; leave out --random-weights")
        stood_in = random_weights and cfg.reward is not None and cfg.reward.name == "videoreward_mq"
        if stood_in and cfg.reward is not None:
            cfg = dataclasses.replace(cfg, reward=RewardCfg("toy_motion", cfg.reward.beta, cfg.reward.clip, cfg.reward.normalise))
        sources = None if random_weights else locate(cfg, path)
        called = f"train/{name or config.name_of(recipe)}/{hardware.name(device())}"
        directory = settings().runs / "profile" / called
        inputs = {"recipe": strict.as_plain(cfg), "weights": RANDOM} if sources is None else inputs_of(cfg, sources)
        if not ranks.first:
            _measure(Trainer(cfg, directory, sources, ranks), repeats, lambda step: None)
            return directory
        inputs |= {"repeats": repeats, "processes": ranks.size, "settings": hardware.timed_by()}
        with provenance.session(directory, "profile", called, inputs, fresh=fresh) as run:
            if run.done:
                return directory
            trainer = Trainer(cfg, directory, sources, ranks)
            records.write_text(directory / "steps.jsonl", "")  # a profile that was cut short begins again
            with records.appending(directory / "steps.jsonl") as append:
                counts, steps = _measure(trainer, repeats, append)
            rate, whose = hardware.peak(device(), trainer.student.denoiser.dtype)
            small = sources is None and device().type == "cpu"
            run.record(
                device=str(device()), software=hardware.software(device()), peak_tflops=rate, peak=whose, reward_stood_in=stood_in, small=small
            )
            run.result.update(summary(counts, steps, kinds(trainer), rate), held=held(trainer))
    return directory


def kinds(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """Kind of step -> the first one of its kind, and how many there are in a cycle of the recipe."""
    cfg = trainer.cfg
    cycle = (cfg.scores.generator_every if cfg.scores else 1) * (cfg.accumulate if cfg.stepping == "as_released" else 1)
    named = [" + ".join(trainer.turns(step)) for step in range(cycle)]
    return {kind: (named.index(kind), count) for kind, count in Counter(named).items()}


def _measure(trainer: Trainer, repeats: int, append: Callable[[Step], None]) -> tuple[dict[str, dict[str, int]], list[Step]]:
    """Kind of step -> phase -> FLOP; and all timed steps."""
    counts, steps, each = dict[str, dict[str, int]](), list[Step](), kinds(trainer)
    with Progress("steps", len(each) * (repeats + 2)) as progress:
        for turn, (kind, (number, _)) in itertools.product(range(repeats + 2), each.items()):
            trainer.step = number
            if turn == 1:
                counted = Arithmetic()
                with counted, heard(counted.mark):
                    trainer.advance()
                counts[kind] = dict(counted.found)
            else:
                watch = Watch()
                with heard(watch.mark):
                    trainer.advance()
                if turn:
                    steps.append(watch.done(kind))
                    append(steps[-1])
            progress.advance()
    return counts, steps


class Watch:
    """Seconds and memory of the phases of a step."""

    def __init__(self) -> None:
        self.seconds, self.peaks = Counter[str](), Counter[str]()
        self.name, self.begun, self.read = "communication", 0.0, meter()[1]
        self.mark("communication")

    def mark(self, name: str) -> None:
        """The end of one phase and the beginning of another."""
        if device().type == "cuda":
            torch.cuda.synchronize()
        if self.begun:
            self.seconds[self.name] += time.perf_counter() - self.begun  # type: ignore[assignment]
            self.peaks[self.name] = max(self.peaks[self.name], self.read())
        self.name, self.read, self.begun = name, meter()[1], time.perf_counter()

    def done(self, kind: str) -> Step:
        self.mark("")
        return Step(kind, {name: float(count) for name, count in self.seconds.items()}, dict(self.peaks))


class Arithmetic(TorchDispatchMode):
    """FLOP of the phases of a step: products, convolutions and attention as torch counts them.

    A backward pass takes as many as the operations before it for either factor that has a gradient. What it recomputes is not counted, so that the
    share of a peak is that of the model's FLOP (PaLM, arXiv:2204.02311, appendix B).
    """

    def __init__(self) -> None:
        super().__init__()
        self.found, self.name, self.graded = Counter[str](), "communication", 0

    def mark(self, name: str) -> None:
        if name == "backward":
            self.found[name] += self.graded
            self.graded = 0
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func.overloadpacket)
        if formula is not None and self.name != "backward":
            count = formula(*args, **(kwargs or {}), out_val=out)
            self.found[self.name] += count
            factors = sum(isinstance(one, Tensor) and one.requires_grad and one.ndim > 1 for one in args)  # a bias is none
            self.graded += count * min(factors, 2) * torch.is_grad_enabled()
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> int:
    """Two products for each pair of a query [B, H, S, D] and a key."""
    return 2 * query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2] * (query.shape[3] + value.shape[3])


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # which torch does not count
}


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes that each role holds on this process's device between steps: weights, float32 copies, the optimiser's state, the average."""
    found = {}
    for role, updater in trainer.updaters.items():
        state = [tensor for optim in updater.optimisers for one in optim.state.values() for tensor in one.values()]
        average = trainer.ema.average if role == "generator" and trainer.ema is not None else []
        found[role] = _bytes([*updater.module.state_dict().values(), *updater.masters, *state, *average])
    found |= {role: _bytes(module.state_dict().values()) for role, module in trainer.method.frozen.items()}
    student = trainer.student
    assert isinstance(student, nn.Module)
    others = {name: part for name, part in student.named_children() if part is not student.denoiser and trainer.cfg.method != "flow"}
    return found | {name: size for name, part in others.items() if (size := _bytes(part.state_dict().values()))}


def _bytes(tensors: Iterable[Any]) -> int:
    """Of tensors that are on the device, none of them twice."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    there = {part.data_ptr(): part for part in parts if isinstance(part, Tensor) and part.device.type == device().type}
    return sum(part.numel() * part.element_size() for part in there.values())


def summary(
    counts: Mapping[str, Mapping[str, int]], steps: Sequence[Step], each: Mapping[str, tuple[int, int]], rate: float
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Kind of step, and their mean -> phase, and all of them -> median seconds, TFLOP, share of the peak `rate` (TFLOP/s), most memory."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kind in each:
        own = [step for step in steps if step.kind == kind]
        rows = {}
        for name in PHASES:
            if any(name in step.seconds for step in own):
                seconds = median(step.seconds.get(name, 0.0) for step in own)
                rows[name] = {"seconds": seconds, "tflop": counts[kind].get(name, 0) / 1e12, "peak_bytes": max(step.peak_bytes[name] for step in own)}
        found[kind] = _shares(rows, rate)
    total = sum(count for _, count in each.values())
    mean: dict[str, dict[str, float]] = {}
    for kind, (_, count) in each.items():
        for name, row in found[kind].items():
            if name == "all":
                continue
            into = mean.setdefault(name, {"seconds": 0.0, "tflop": 0.0, "peak_bytes": 0})
            into["peak_bytes"] = max(into["peak_bytes"], row["peak_bytes"])
            for key in ("seconds", "tflop"):
                into[key] += row[key] * count / total
    return {"steps": found | {"mean": _shares({name: mean[name] for name in PHASES if name in mean}, rate)}}


def _shares(rows: dict[str, dict[str, float]], rate: float) -> dict[str, dict[str, float]]:
    """Phases with all of them together, and what share of the peak each reaches."""
    rows["all"] = {key: sum(row[key] for row in rows.values()) for key in ("seconds", "tflop")}
    rows["all"]["peak_bytes"] = max(row["peak_bytes"] for name, row in rows.items() if name != "all")
    return {name: row | {"mfu": row["tflop"] / (row["seconds"] * rate)} for name, row in rows.items()}


def document(directory: Path) -> dict[str, Any]:
    """A finished profile as one JSON document."""
    run = records.read_run(directory)
    about = {"name": run.name, "status": run.status, "fingerprint": run.fingerprint, "seconds": run.seconds}
    return about | {"recorded": run.recorded, "random_weights": run.inputs["weights"] == RANDOM, **run.result}


def table(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The mean step for people, then what each role holds between steps."""
    every, recorded = document["steps"], document["recorded"]
    there = {"random weights": document["random_weights"], "small networks": recorded["small"], "toy reward": recorded["reward_stood_in"]}
    marks = ", ".join(mark for mark, so in there.items() if so)
    rows = []
    for name, mean in every["mean"].items():
        row = {marks: name} | {kind: _seconds(phases.get(name)) for kind, phases in every.items()}
        rows.append(row | {"TFLOP": f"{mean['tflop']:.3g}", "of peak": f"{100 * mean['mfu']:.1f}%", "peak MB": f"{mean['peak_bytes'] / 1e6:.4g}"})
    blank = dict.fromkeys(every, "") | {"TFLOP": "", "of peak": ""}
    return rows + [{marks: f"held: {role}", **blank, "peak MB": f"{size / 1e6:.4g}"} for role, size in document["held"].items()]


def _seconds(row: Mapping[str, float] | None) -> str:
    return "" if row is None else f"{row['seconds']:.4g} s"
