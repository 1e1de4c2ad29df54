"""What comes out of training: weights that say what they were made of, the same as the reference code reads them, and the baseline that names them.

weights.safetensors   the average, where there is one, in float32; in its header the recipe, the commit and the hashes of all that was read
model.pt              of backbones with published checkpoints, in their layout: {generator, generator_ema} -> `model.` and the tensor's name
baseline.yaml         what `generate` and `profile` take
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfbench import config, records, strict
from rfbench.backbones.base import parts_of
from rfbench.config import Recipe, WeightsCfg
from rfbench.reward import origin_of
from rfbench.weights import save

WEIGHTS, ORIGINAL, BASELINE = "weights.safetensors", "model.pt", "baseline.yaml"


def files(cfg: Recipe) -> tuple[str, ...]:
    """What a recipe ends with."""
    return (WEIGHTS, ORIGINAL, BASELINE) if parts_of(cfg.backbone) else (WEIGHTS, BASELINE)


def write(directory: Path, cfg: Recipe, own: Mapping[str, Tensor], average: Mapping[str, Tensor] | None, about: Mapping[str, Any]) -> None:
    """Write all of it; `about` has the run's name, fingerprint and code, and the hashes of what it read."""
    header = {"recipe": strict.as_plain(cfg)} | {key: value for key, value in about.items() if key != "run"}  # bytes do not depend on a name
    save(directory / WEIGHTS, own if average is None else average, header)
    if ORIGINAL in files(cfg):
        _write_original(directory / ORIGINAL, {"generator": own} | ({} if average is None else {"generator_ema": average}))
    _write_baseline(directory / BASELINE, cfg, about)


def _write_original(path: Path, models: Mapping[str, Mapping[str, Tensor]]) -> None:
    """As CausVid's and Self Forcing's trainers write a checkpoint, without the critic (tianweiy/CausVid, guandeh17/Self-Forcing@33593df).

    Reward Forcing's `inference.py` wants the dictionary below `generator_ema` alone, where its trainer writes this one (D-18).
    """
    with records.atomic(path) as temporary:
        torch.save({key: {f"model.{name}": tensor for name, tensor in model.items()} for key, model in models.items()}, temporary)


def _write_baseline(path: Path, cfg: Recipe, about: Mapping[str, Any]) -> None:
    """The baseline of a training run's result."""
    import yaml

    trained = config.Baseline(
        title=cfg.title,
        backbone=cfg.backbone,
        weights=WeightsCfg(file=WEIGHTS, sha256=records.sha256_of(path.with_name(WEIGHTS))),
        sampler=cfg.sampler,
        precision=None if cfg.precision is None else cfg.precision.student,
        license=config.License(code="apache-2.0", weights="apache-2.0"),
        max_latents=cfg.max_latents,
        saw=origin_of(cfg.reward).marked if cfg.reward else (),
        trained_by={key: about[key] for key in ("run", "fingerprint", "seed", "code")},
    )
    plain = {key: value for key, value in strict.as_plain(trained).items() if value not in (None, [], {})}
    records.write_text(path, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
