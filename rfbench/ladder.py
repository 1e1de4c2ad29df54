"""The ladder: from the loop as the reference runs it to ours, one exact step after another, each timed and compared.

The rungs take turns, chunk times are those of a steady stream, and every ratio is to rung 0 in the same turn. On a CPU the
clock is the processor time of this process, so what else the machine does counts less; on a GPU it is that of the host, which
waits for the device between chunks.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from rfbench.backbones.base import TEMPORAL, Backbone
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.config import SamplerCfg
from rfbench.naive import naive
from rfbench.sampler import clip_noise, stream
from rfbench.timing import STEADY

Run = Callable[[Backbone, Tensor, int, SamplerCfg, int], Iterator[Tensor]]  # ..., text, latent frames, ..., seed -> clean chunks


@dataclass(frozen=True)
class Rung:
    """What one rung takes and how far it is from rung 0."""

    name: str
    ms: float  # per chunk with its context pass: median over turns of the median over chunks
    fps: float  # pixel frames per second of denoising
    ratio: float  # how many times as long rung 0 takes: median over turns
    first: float  # relative L2 distance of the latents of chunk 0 to those of rung 0
    steady: float  # of the first chunk that is counted
    whole: float  # of all chunks together


def _streamed(shortcuts: Shortcuts) -> Run:
    def run(backbone: Backbone, text_BLE: Tensor, latents: int, cfg: SamplerCfg, seed: int) -> Iterator[Tensor]:
        noise = clip_noise(backbone, [seed])
        return (chunk.latent_BFCHW for chunk in stream(backbone, text_BLE, latents, cfg, noise, lean=LeanDiT(backbone.denoiser, shortcuts)))

    return run


def rungs() -> dict[str, Run]:
    """Rung 0, the shared sampler without shortcuts, then with one more of them at a time."""
    names = [field.name for field in dataclasses.fields(Shortcuts)]
    taken = dict.fromkeys(names, False)
    found: dict[str, Run] = {
        "naive": lambda backbone, text_BLE, latents, cfg, seed: naive(backbone, text_BLE, latents, cfg, clip_noise(backbone, [seed])),
        "slots": _streamed(Shortcuts(**taken)),
    }
    for name in names:
        taken[name] = True
        found[name] = _streamed(Shortcuts(**taken))
    return found


@torch.no_grad()
def climb(backbone: Backbone, text_BLE: Tensor, cfg: SamplerCfg, *, chunks: int, turns: int, on: Mapping[str, Run] | None = None) -> list[Rung]:
    """Time all rungs over streams of `chunks` chunks, `turns` times in turn, and compare their videos of seed 0.

    Raises:
        ValueError: too few chunks: those before chunk STEADY are not counted, and the last one has no context pass.
    """
    if chunks < STEADY + 2:
        raise ValueError(f"a ladder of {chunks} chunks never gets steady; the least is {STEADY + 2}")
    assert cfg.chunk is not None
    runs, device, latents = dict(on or rungs()), text_BLE.device, chunks * cfg.chunk
    made = {name: list(run(backbone, text_BLE, latents, cfg, 0)) for name, run in runs.items()}  # which also warms up
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            stamps = [now(device) for _ in run(backbone, text_BLE, latents, cfg, 0)]
            taken[name].append(median(after - before for before, after in zip(stamps[STEADY - 1 :], stamps[STEADY:], strict=False)))
    base = next(iter(runs))
    return [
        Rung(
            name,
            1000 * median(taken[name]),
            TEMPORAL * cfg.chunk / median(taken[name]),
            median(slow / fast for slow, fast in zip(taken[base], taken[name], strict=True)),
            *(distance(made[name][part], made[base][part]) for part in (slice(1), slice(STEADY, STEADY + 1), slice(None))),
        )
        for name in runs
    ]


def now(device: torch.device) -> float:
    """Seconds by the clock of the module's docstring."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative L2 distance of some chunks."""
    ours, theirs = torch.cat(found, 1).double(), torch.cat(wanted, 1).double()
    return float((ours - theirs).norm() / theirs.norm())
