"""Run directories as generate, eval, profile and train leave them, with effects that are known because they were put in."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfbench import records, timing, world
from rfbench.records import Clip, Run, Score, clips_sha256
from rfbench.suites import clip_id, clip_seed
from rfbench.timing import Chunk, Round, Turn
from rfbench.video import Frames, writing

RECORDED: dict[str, Any] = {
    "code": {"version": "0.1.0", "commit": "c0ffee" * 6 + "c0ff", "dirty": False},
    "packages": {"torch": "2.13.0+cpu", "numpy": "2.4.0"},
    "machine": {"cpu": "A Processor", "cores": 2, "memory_gib": 8, "system": "Linux x86_64", "python": "3.11.2", "gpu": []},
}
METRICS: dict[str, dict[str, dict[str, Any]]] = {
    "motion": {
        "dynamic_degree": {"higher_is_better": True, "unit": "%", "text": "Clips that move faster than VBench's threshold."},
        "speed": {"higher_is_better": True, "unit": "px/frame", "text": "Mean speed of the sprite along its path."},
        "motion_smoothness": {"higher_is_better": True, "unit": "%", "text": "Steps that follow the sprite's own velocity."},
    },
    "caption": {
        "caption_agreement": {"higher_is_better": True, "unit": "%", "text": "Mean of the agreements over the parts that the caption fixes."},
        "direction_agreement": {"higher_is_better": True, "unit": "%", "text": "Share of the way that is made in the asked direction."},
    },
    "drift": {
        "imaging_quality": {"higher_is_better": True, "unit": "%", "text": "Nearness to one clean sprite on a clean background."},
        "drift": {"higher_is_better": False, "unit": "points", "text": "Standard deviation of imaging quality over two-second pieces."},
    },
}
# metric -> mean, spread over prompts, noise of a clip, standard deviation of a training seed
SHAPE = {
    "motion.speed": (0.45, 0.15, 0.04, 0.01),
    "motion.motion_smoothness": (97.0, 0.8, 0.3, 0.1),
    "caption.caption_agreement": (82.0, 6.0, 3.0, 0.5),
    "caption.direction_agreement": (85.0, 5.0, 3.0, 0.5),
    "drift.imaging_quality": (88.0, 2.0, 1.0, 0.3),
    "drift.drift": (3.0, 0.6, 0.3, 0.1),
}


def baseline(title: str, **more: Any) -> dict[str, Any]:
    sampler = {"steps": [1000, 750, 500, 250], "shift": 5.0, "cache": {"policy": "full", "rope": "absolute"}}
    return {
        "title": title,
        "backbone": "toy",
        "weights": {"file": "weights.safetensors"},
        "sampler": sampler,
        "license": {"code": "apache-2.0", "weights": "apache-2.0"},
        **more,
    }


def write_bench(
    runs: Path,
    name: str,
    suite: str,
    prompts: Sequence[str],
    *,
    samples: int = 2,
    frames: int = 17,
    pace: float = 1.0,
    shake: float = 0.0,
    status: str = records.DONE,
    plain: Mapping[str, Any] | None = None,
    filmed: int | None = None,
) -> Path:
    """A generate run whose sprites move `pace` times as fast as their captions say and shake by `shake` pixels.

    Only the first sample of every `filmed`-th prompt has a video of its own, the others have that of the first clip.
    """
    directory = runs / "bench" / name / suite
    (directory / "videos").mkdir(parents=True)
    rows: list[Clip] = []
    for number, text in enumerate(prompts):
        for sample in range(samples):
            clip = clip_id(number, sample)
            rng = np.random.default_rng([number, sample])
            scene = world.draw_scene(world.parse(text) if text.startswith("a ") else world.Caption("red", "disc"), rng)
            scene = dataclasses.replace(scene, velocity_xy=(scene.velocity_xy[0] * pace, scene.velocity_xy[1] * pace), then_velocity_xy=None)
            places = scene.positions(frames) + rng.normal(size=(frames, 2)) * shake
            alpha = world.coverage(scene.shape, scene.radius, places)[..., None]
            pixels = (255 * (alpha * np.asarray(world.COLOURS[scene.colour]) + (1 - alpha) * world.BACKGROUND)).astype(np.uint8)
            if rows and filmed is not None and (sample or number % filmed):
                shutil.copy(directory / rows[0].file, directory / "videos" / f"{clip}.mp4")
            else:
                write_video(directory / "videos" / f"{clip}.mp4", pixels)
            sha256 = records.sha256_of(directory / "videos" / f"{clip}.mp4")
            seed = clip_seed(0, number, sample)
            rows.append(Clip(clip, number, sample, text, text, seed, frames, 16, world.HEIGHT, world.WIDTH, f"videos/{clip}.mp4", sha256))
    records.write_rows(directory / "clips.jsonl", rows)
    asked = {"prompts": [{"id": i, "text": text} for i, text in enumerate(prompts)], "samples": samples, "frames": frames, "fps": 16, "seed": 0}
    inputs = {
        "baseline": dict(plain or baseline(name)),
        "weights_sha256": records.fingerprint({"of": name}),
        "suite": {"name": suite, "sha256": records.fingerprint(asked), **asked},
        "seed": 0,
    }
    run = Run(
        "generate",
        f"{name}/{suite}",
        inputs,
        records.fingerprint(inputs),
        RECORDED | {"baseline": inputs["baseline"]},
        status,
        "2026-01-01T00:00:00Z",
        "2026-01-01T00:01:00Z",
        60.0,
    )
    records.write_run(directory, run)
    return directory


def write_video(path: Path, frames_THWC: Frames) -> None:
    with writing(path, fps=16, height=frames_THWC.shape[1], width=frames_THWC.shape[2]) as write:
        write(frames_THWC)


def write_scores(
    directory: Path, effects: Mapping[str, float] | None = None, *, training_seed: int = 0, segments: int = 3, fade: float = 0.0
) -> None:
    """Scores of every metric: what SHAPE says plus `effects`; `fade` is lost over the clip."""
    effects = effects or {}
    clips = records.read_clips(directory)
    for scorer, metrics in METRICS.items():
        rows = []
        for order, metric in enumerate(metrics):
            name = f"{scorer}.{metric}"
            for clip in clips:
                if metric == "direction_agreement" and "moves" not in clip.prompt:
                    continue
                rng = np.random.default_rng([zlib.crc32(str(directory.parent.name).encode()), order, clip.prompt_id, clip.sample, 1 + training_seed])
                value = _value(name, clip.prompt_id, order, effects.get(name, 0.0), rng, training_seed)
                rows.append(Score(clip.id, metric, value))
                if metric in ("speed", "imaging_quality"):
                    drop = np.linspace(0.5, -0.5, segments) * fade * (20 if metric == "imaging_quality" else 0.3)
                    rows += [Score(clip.id, metric, float(value + drop[k]), segment=k) for k in range(segments)]
        records.write_rows(directory / "scores" / f"{scorer}.jsonl", rows)
        note = {"scorer": scorer, "version": "1", "metrics": metrics, "clips": len(clips), "clips_sha256": clips_sha256(clips)}
        note["rows_sha256"] = records.sha256_of(directory / "scores" / f"{scorer}.jsonl")
        records.write_json(directory / "scores" / f"{scorer}.json", note)


def _value(name: str, prompt: int, order: int, effect: float, rng: np.random.Generator, training_seed: int) -> float:
    if name == "motion.dynamic_degree":
        return 100.0 if np.random.default_rng([7, prompt]).random() < 0.5 + effect / 100 else 0.0
    centre, of_prompts, of_clips, of_seeds = SHAPE[name]
    hard = np.random.default_rng([1, order, prompt]).normal() * of_prompts
    luck = np.random.default_rng([2, order, training_seed, int(1000 * abs(effect))]).normal() * of_seeds
    return float(centre + effect + hard + luck + rng.normal() * of_clips)


def write_profile(
    runs: Path,
    name: str,
    speeds: Mapping[str, float],
    *,
    hardware: str = "cpu",
    slower: float = 0.0,
    noise: float = 0.01,
    chunks: int = 20,
    repeats: int = 9,
    processes: int = 3,
    timed_as: Mapping[str, str] | None = None,
) -> Path:
    """A profile run: contender -> frames per second end to end, and `slower` times the chunk's number more time for each chunk.

    The machine is up to twice as fast in one round as in another, for everybody; `noise` is each chunk's own.
    """
    directory = runs / "profile" / name / hardware
    rng = np.random.default_rng(len(name))
    rounds = []
    for process, number in itertools.product(range(processes), range(repeats)):
        machine = rng.uniform(1, 2)
        turns = []
        for contender in timing.order(list(speeds), number):

            def made(count: int, fps: float = speeds[contender] * machine) -> tuple[Chunk, ...]:
                rows, clock = [], 0.0
                for index in range(count):
                    frames = 9 if index == 0 else 12
                    took = frames / fps * (1 + slower * index + noise * float(rng.normal()))
                    rows.append(Chunk(index, frames, clock, clock + 0.7 * took, clock + 0.85 * took, clock + took))
                    clock += took
                return tuple(rows)

            turns.append(Turn(contender, 16, made(7), made(chunks), None, 310_000_000, None, None, 2.0 if number == 0 else None))
        rounds.append(Round(process, number, tuple(turns)))
    records.write_rows(directory / "rounds.jsonl", rounds)
    contenders = {each: {"baseline": baseline(each), "weights_sha256": records.fingerprint({"of": each})} for each in speeds}
    inputs = {"contenders": contenders, "chunks": chunks, "repeats": repeats, "processes": processes}
    recorded = RECORDED | {"timed_as": dict(timed_as or {})}
    result = {"rounds_sha256": records.sha256_of(directory / "rounds.jsonl")}
    run = Run("profile", f"{name}/{hardware}", inputs, records.fingerprint(inputs), recorded, records.DONE, "2026-01-01T00:00:00Z", seconds=5.0)
    records.write_run(directory, dataclasses.replace(run, result=result))
    return directory


def write_training(runs: Path, name: str, *, steps: int = 200, reward: bool = False) -> Path:
    directory = runs / "train" / name
    directory.mkdir(parents=True)
    rng = np.random.default_rng(len(name))
    with (directory / "log.jsonl").open("w") as file:
        for step in range(10, steps + 1, 10):
            row = {"step": step, "critic_loss": 0.2 + 0.5 * np.exp(-step / 60) + 0.02 * rng.normal(), "grad_norm_critic": 1 + 0.1 * rng.normal()}
            if step % 50 == 0:
                row |= {"loss": 0.3 + np.exp(-step / 80), "grad_norm_generator": 0.5 + 0.1 * rng.normal()}
                if reward:
                    row |= {"reward": 0.2 + 0.002 * step + 0.05 * rng.normal(), "weight": 1.5, "weight_max": 3.0, "weight_ess": 0.7 - 0.001 * step}
            file.write(json.dumps(row) + "\n")
    return _write_run(directory, "train", name, {"recipe": {"title": name}})


def _write_run(directory: Path, verb: str, name: str, inputs: dict[str, Any], **more: Any) -> Path:
    run = Run(verb, name, inputs, records.fingerprint(inputs), RECORDED, **{"status": records.DONE, "started": "2026-01-01T00:00:00Z"} | more)
    records.write_run(directory, run)
    return directory
