"""How much arithmetic a stream takes, from the configuration alone: a multiplication with an addition is 2 FLOP.

Products and attention are counted, which is all but a thousandth. What a shortcut leaves out counts all the same, so that the
share of a peak can be compared between ways to do the same thing.
"""

from __future__ import annotations

from typing import Any

import torch

from rfbench.backbones.base import Backbone
from rfbench.backbones.wan.dit import DiTCfg
from rfbench.config import SamplerCfg


def dit_pass(cfg: DiTCfg, queries: int, keys: int) -> dict[str, int]:
    """One pass of `queries` tokens that look at `keys` tokens, the text's keys and values already there: part -> FLOP."""
    square = 2 * queries * cfg.dim**2
    patch = cfg.patch[0] * cfg.patch[1] * cfg.patch[2]
    parts = {
        "self qkv": 3 * square,
        "self o": square,
        "self attention": 4 * queries * keys * cfg.dim,
        "cross q": square,
        "cross o": square,
        "cross attention": 4 * queries * cfg.text_len * cfg.dim,
        "feed-forward": 4 * queries * cfg.dim * cfg.ffn_dim,
    }
    found = {name: cfg.num_layers * count for name, count in parts.items()}
    return found | {"patches and head": 2 * queries * cfg.dim * patch * (cfg.in_dim + cfg.out_dim)}


def dit_chunk(backbone: Backbone, sampler: SamplerCfg, index: int) -> int:
    """All passes of one clip's chunk number `index`, its context pass among them."""
    assert sampler.chunk is not None and sampler.cache is not None
    cfg, steps = backbone.denoiser.cfg, sampler.steps if isinstance(sampler.steps, int) else len(sampler.steps)
    tokens = backbone.shape.height // cfg.patch[1] * (backbone.shape.width // cfg.patch[2])
    seen = sampler.chunk * (index + 1) if sampler.cache.window is None else min(sampler.chunk * (index + 1), sampler.cache.window)
    passes = (steps + (sampler.context == "clean")) * (1 if sampler.guidance == 1.0 else 2)
    return passes * sum(dit_pass(cfg, sampler.chunk * tokens, seen * tokens).values())


@torch.no_grad()
def decoded(backbone: Backbone, frames: int) -> int:
    """Decoding `frames` latent frames in the middle of one clip: counted by torch while it is done once."""
    from torch.utils.flop_counter import FlopCounterMode

    shape, weight = backbone.shape, next(backbone.denoiser.parameters())
    latent = torch.zeros(1, frames, shape.channels, shape.height, shape.width, dtype=backbone.denoiser.dtype, device=weight.device)
    decode, counter = backbone.decoder(), FlopCounterMode(display=False)
    decode(latent)
    with counter:
        decode(latent)
    total: Any = counter.get_total_flops()
    return int(total)
