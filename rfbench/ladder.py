"""`profile --ladder`: a baseline from the loop as the reference runs it to the approximations of ours, rung by rung (`rfbench.rungs`).

runs/ladder/<name>/<hardware>/{run.json, turns.jsonl}    the latter has the raw times of all chunks
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rfbench import attention, baselines, flops, hardware, proof, provenance, records
from rfbench.backbones.base import Backbone
from rfbench.backbones.wan import float8
from rfbench.baselines import Prepared
from rfbench.config import SamplerCfg
from rfbench.errors import UserError
from rfbench.naive import possible
from rfbench.rungs import EIGHT, WITHIN, Peak, Way, climb, ways
from rfbench.settings import settings
from rfbench.stopwatch import precision, refuse_short
from rfbench.suites import load_suite

APPROXIMATE = {  # what a baseline can be set to that changes its videos, each for itself
    "no context": ("sampler.context=last_step",),
    "half the steps": ("sampler.steps={half}",),
    "tiny decoder": ("decoder=tiny",),
}


def profile(
    baseline: str,
    fields: Sequence[str],
    *,
    name: str | None = None,
    chunks: int,
    repeats: int,
    random_weights: bool = False,
    reduced: bool = False,
    fresh: bool = False,
) -> Path:
    """Climb it, or find it climbed; -> the run directory.

    Raises:
        UserError: the baseline cannot be used, or what it does has no plain loop to begin with, or too few chunks.
    """
    ready = baselines.prepare(baseline, fields, name=name, random_weights=random_weights, reduced=reduced)
    if not possible(ready.cfg.sampler):
        raise UserError(f"'{baseline}' has no ladder: rung 0 knows few steps with fresh noise over a plain cache, and neither guidance nor shots")
    if eight := [what for what in ready.cfg.approximate if what in EIGHT]:
        raise UserError(f"'{baseline}' with {' and '.join(eight)} has no ladder of its own: that is a rung of the other's; leave it out")
    refuse_short(ready, chunks)
    device = baselines.device()
    machine = hardware.name(device)
    directory = settings().runs / "ladder" / ready.name / machine
    inputs = {"contender": ready.inputs(), "chunks": chunks, "repeats": repeats, "settings": hardware.timed_by()}
    with provenance.session(directory, "ladder", f"{ready.name}/{machine}", inputs, fresh=fresh) as run:
        if not run.done:
            run.record(
                device=str(device), attention=attention.kernel(device), software=hardware.software(device), weights_sha256=ready.weights_sha256
            )
            before, backbone = hardware.state(device), ready.open()
            others, left_out = approximations(baseline, fields, ready, backbone)
            run.record(precision=precision(backbone), reduced=ready.reduced)
            run.record(
                flop={
                    "chunk": flops.dit_chunk(backbone, ready.cfg.sampler, chunks),
                    "decoding": flops.decoded(backbone, ready.cfg.sampler.chunk or 1),
                }
            )
            prompt = load_suite("smoke").prompts[0].text
            broken = dict[str, str]()
            (directory / "turns.jsonl").unlink(missing_ok=True)  # of a ladder that was cut short
            with records.appending(directory / "turns.jsonl") as keep:
                steps = ways(backbone, ready.cfg.sampler, others)
                rungs = climb(
                    prompt, steps, chunks=chunks, turns=repeats, peak=speed_of_light(device, backbone.denoiser.dtype), keep=keep, broken=broken
                )
            run.record(broken=broken, left_out=left_out | proof.left_out)
            run.record(hardware={"before": before, "after": hardware.state(device)})
            run.result.update(
                rungs=[dataclasses.asdict(rung) | {"verdict": rung.verdict} for rung in rungs],
                exact=not broken and all(rung.verdict == "pass" for rung in rungs if rung.kind == "exact"),
            )
    return directory


def approximations(
    baseline: str, fields: Sequence[str], ready: Prepared, backbone: Backbone
) -> tuple[dict[str, tuple[Backbone, SamplerCfg]], dict[str, str]]:
    """The approximations that a baseline can be set to, and why others are left out."""
    steps, found = ready.cfg.sampler.steps, dict[str, tuple[Backbone, SamplerCfg]]()
    left_out = {name: why for name, what in EIGHT.items() if (why := float8.missing(what, baselines.device())) is not None}
    half = steps // 2 if isinstance(steps, int) else list(steps[::2])
    for called, changes in APPROXIMATE.items():
        asked = [*fields, *(field.format(half=half) for field in changes)]
        try:
            other = baselines.prepare(baseline, asked, random_weights=ready.weights is None, reduced=ready.reduced)
            same = dataclasses.replace(other.cfg, sampler=ready.cfg.sampler) == ready.cfg
            found[called] = (backbone if same else other.open(), other.cfg.sampler)
        except UserError as error:
            left_out[called] = str(error)
    return found, left_out


def speed_of_light(device: torch.device, dtype: torch.dtype) -> Peak:
    """What a rung could reach: the peak of the network's dtype; where its products are of 8-bit floats, of those.

    Everything else of such a rung counts as if it were that fast too, attention and the head. A CPU has no 8-bit floats, and computes by the dtype.
    """
    own = hardware.peak(device, dtype)

    def peak(way: Way) -> tuple[float | None, str]:
        if "products" not in way.eight or device.type != "cuda":
            return own[0], f"{str(dtype).removeprefix('torch.')}, {own[1]}"
        eight = hardware.printed(device, "float8")
        return eight, "float8, the maker's dense peak" if eight is not None else "float8, which rfbench.toml does not have of this device"

    return peak


def failed(rungs: Sequence[Mapping[str, Any]], broken: Mapping[str, str]) -> str | None:
    """One sentence about the rungs that break, or whose error is more than is allowed; None if there are none."""
    wrong = {}
    for rung in rungs:
        if rung["verdict"] == "fail":
            place, error = max(rung["error"].items(), key=lambda item: float(item[1]["low"]))
            wrong[rung["name"]] = f"{error['ratio']:.2f} times the error of rung 0 in {place}, where {WITHIN} is the most"
    if not (wrong := wrong | dict(broken)):
        return None
    told = "; ".join(f"{name} ({why})" for name, why in wrong.items())
    return f"rungs of the ladder fail, though all is recorded: {told}; switch such a shortcut off under [fast] in rfbench.toml"


def document(directory: Path) -> dict[str, Any]:
    """A finished ladder as one JSON document; `failed` says what about it is wrong."""
    run = records.read_run(directory)
    found: dict[str, Any] = {"name": run.name, "status": run.status, "fingerprint": run.fingerprint, "seconds": run.seconds}
    found |= {"asked": {key: run.inputs[key] for key in ("chunks", "repeats")}, "recorded": run.recorded}
    rungs = run.result["rungs"]
    return found | {"rungs": rungs, "exact": run.result["exact"], "failed": failed(rungs, run.recorded["broken"])}


def table(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """A ladder's document as rows for people, rung by rung; of approximate ones, how far their latents of chunk STEADY are from those of rung 0."""
    rows = []
    for rung in document["rungs"]:
        apart = rung["error"]
        rows.append(
            {
                "": rung["name"],
                "kind": rung["kind"],
                "ms per chunk": f"{rung['ms']:.4g} [{rung['ms_low']:.4g}, {rung['ms_high']:.4g}]",
                "DiT FPS": f"{rung['dit_fps']:.4g}",
                "end-to-end FPS": f"{rung['e2e_fps']:.4g}",
                "times as fast": f"{rung['ratio']:.2f} [{rung['ratio_low']:.2f}, {rung['ratio_high']:.2f}]",
                "of peak": f"{rung['share']:.1%}" if rung["share"] is not None else "",
                "exact": (rung["verdict"] or "") if rung["kind"] == "exact" else "",
                "error of rung 0 ×": " ".join(f"{error['ratio']:.2f}" for error in apart.values()) or f"{rung['steady']:.1e} apart",
            }
        )
    told = [
        (f"{what}: {why}"[:80], name)
        for what, key in (("failed", "broken"), ("left out", "left_out"))
        for name, why in document["recorded"][key].items()
    ]
    return rows + [dict.fromkeys(rows[0], "") | {"": name, "kind": kind} for kind, name in told]
