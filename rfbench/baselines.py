"""A baseline made ready to run: its settings with overrides, its weights, what its runs are called and are identified by."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rfbench import config, strict
from rfbench.backbones.base import Backbone, accepts, latent_frames, load, open_backbone, parts_of, pixel_frames
from rfbench.backbones.known import KNOWN
from rfbench.config import Baseline
from rfbench.errors import UserError
from rfbench.records import RANDOM
from rfbench.weight_files import commits, identity, resolve

if TYPE_CHECKING:
    import torch

TOLD = ("title", "weights", "license", "paper", "code", "saw", "trained_by")  # of a baseline, what no video depends on


@dataclass(frozen=True)
class Prepared:
    """A baseline whose file was read and whose weights were found; nothing of it is in memory yet."""

    name: str  # of its runs
    cfg: Baseline
    weights: Path | None  # None: random
    parts: tuple[tuple[str, str], ...] = ()  # what the backbone brings along: role and sha256
    reduced: bool = False  # random weights of a small network of the same architecture
    origin: Mapping[str, Any] = field(default_factory=dict)  # `weight_files.commits` of all of these, for the record

    @functools.cached_property
    def weights_sha256(self) -> str:
        return RANDOM if self.weights is None else identity(self.weights, self.cfg.weights)

    @functools.cached_property
    def blank(self) -> Backbone:
        """The backbone without its weights, which knows its sizes."""
        return open_backbone(self.cfg.backbone, **_settings(self.cfg, self.reduced))

    @property
    def fps(self) -> int:
        """Pixel frames per second of what it makes."""
        return KNOWN[self.cfg.backbone].fps if self.cfg.backbone in KNOWN else self.blank.shape.fps

    def inputs(self) -> dict[str, Any]:
        """What of a baseline is a declared input of a run: what its videos depend on. The rest is recorded, so that a run outlives a note."""
        plain = {key: value for key, value in strict.as_plain(self.cfg).items() if key not in TOLD}
        found: dict[str, Any] = {"baseline": plain, "weights_sha256": self.weights_sha256}
        return found | ({"parts": dict(self.parts)} if self.parts else {}) | ({"reduced": True} if self.reduced else {})

    def latents(self, frames: int, asked_by: str) -> int:
        """Latent frames of a clip of at least `frames` pixel frames, in whole chunks.

        Raises:
            UserError: more than the baseline can make.
        """
        latents, most = latent_frames(frames, self.cfg.sampler.chunk), self.cfg.max_latents
        if most is not None and latents > most:
            raise UserError(f"baseline '{self.name}' makes clips of at most {pixel_frames(most)} frames, but {asked_by} asks for {frames}")
        return latents

    def open(self) -> Backbone:
        """The backbone with its weights, ready to sample, on the GPU if there is one."""
        import torch
        from torch import nn

        settings = _settings(self.cfg, self.reduced)
        if self.weights is None:
            backbone = open_backbone(self.cfg.backbone, **settings)
            backbone.fresh(0)
            # A fresh model predicts zeros, and arithmetic on zeros draws less power, so clocks would be higher.
            nn.init.normal_(backbone.denoiser.head.head.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        else:
            backbone = load(self.cfg.backbone, self.cfg.weights, self.weights, **settings)
        assert isinstance(backbone, nn.Module)
        backbone.requires_grad_(False).to(device())
        return backbone


def prepare(
    baseline: str, overrides: Sequence[str] = (), *, name: str | None = None, random_weights: bool = False, reduced: bool = False
) -> Prepared:
    """Read a baseline by name or path and find its weights. Its runs are called `name`, else after the baseline.

    With `random_weights` nothing is looked for; `reduced` then makes the network small, where the backbone has a small size.

    Raises:
        UserError: it does not exist, a key is wrong, its weights are missing or altered, this device cannot compute as it says, or its
            authors' code runs it.
    """
    if config.is_external(baseline):
        how = f"`rfbench generate {baseline} --suite smoke --json` makes clips and tells how fast they came"
        raise UserError(f"'{baseline}' is run by its authors' code, in a process of its own, and is timed while it makes clips: {how}")
    baseline = config.whole_name(Baseline, baseline)
    path = config.find(Baseline, baseline)
    cfg = strict.build(Baseline, strict.load_plain(path, list(overrides), Baseline), where=baseline)
    if "float8" in (cfg.precision, cfg.attention):
        _refuse_float8(cfg, baseline)
    if name is None:
        called = config.name_of(baseline)
        name = cfg.trained_by.get("run", called) if called == "baseline" else called  # every training calls its result baseline.yaml
    if random_weights:
        return Prepared(name, cfg, None, reduced=reduced and accepts(cfg.backbone, "reduced"))
    weights = resolve(cfg.weights, path)
    parts = parts_of(cfg.backbone, **_settings(cfg))
    found = {role: (part, resolve(part, path)) for role, part in parts.items()}
    hashes = tuple((role, identity(place, part)) for role, (part, place) in found.items())
    return Prepared(name, cfg, weights, hashes, origin=commits({"weights": (cfg.weights, weights), **found}))


def _refuse_float8(cfg: Baseline, baseline: str) -> None:
    """Refuse 8-bit floats that this device cannot compute with, which torch knows."""
    from rfbench.backbones.wan.float8 import asked, missing

    for what in asked(products=cfg.precision, attention=cfg.attention):
        if (why := missing(what, device())) is not None:
            raise UserError(f"'{baseline}' with 8-bit {what} {why}; leave that 'float8' out")


def _settings(cfg: Baseline, reduced: bool = False) -> dict[str, Any]:
    """What a baseline says about its backbone; None is left to the backbone."""
    return {"precision": cfg.precision, "attention": cfg.attention, "decoder": cfg.decoder, "reduced": reduced or None}


def device() -> torch.device:
    """Where clips are made and timed: the GPU that torch sees first, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
