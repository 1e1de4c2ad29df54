"""The shared sampler against the naive loop of benchmarks/streaming.py, an implementation of its own of every cache policy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import streaming
from rfbench.backbones.toy import ToyBackbone
from rfbench.sampler import clip_noise, stream
from tests import models
from tests.tiny import distance

LATENTS = 18  # six chunks: with a window of nine frames, three of them evict


@pytest.fixture(scope="module")
def backbone() -> ToyBackbone:
    made = ToyBackbone()
    made.load_state_dict(models.weights())
    return made.requires_grad_(False)


@pytest.mark.parametrize(
    "cfg",
    [
        streaming.student("ema_sink"),
        streaming.student("ema_sink", window=12, sink=2),
        streaming.student("static_sink"),
        streaming.student("static_sink", "absolute"),
        streaming.student("static_sink", window=8, sink=1),
        streaming.student("window"),
        streaming.student("window", "absolute"),
        streaming.student("window", window=3),
        streaming.student("full"),
        streaming.student("full", "absolute"),
    ],
    ids=lambda cfg: f"{cfg.cache.policy}-{cfg.cache.window}-{cfg.cache.sink}-{cfg.cache.rope}",
)
@torch.no_grad()
def test_cached_streaming_equals_the_loop_that_recomputes_everything(backbone, cfg):
    text = backbone.encode_text(["a red disc moves right", "a blue square"])
    found = torch.cat([chunk.latent_BFCHW for chunk in stream(backbone, text, LATENTS, cfg, clip_noise(backbone, [0, 1]))], 1)
    wanted = torch.cat(list(streaming.naive(backbone, text, LATENTS, cfg, clip_noise(backbone, [0, 1]))), 1)
    assert distance(found, wanted) < 1e-5


@torch.no_grad()
def test_the_comparison_sees_a_wrong_sink(backbone):
    """A fold that is off by a little is far outside of what the comparison allows."""
    text, right = backbone.encode_text(["a red disc moves right"]), streaming.student("ema_sink")
    assert right.cache is not None
    wrong = dataclasses.replace(right, cache=dataclasses.replace(right.cache, alpha=0.91))
    found, wanted = (torch.cat(list(streaming.naive(backbone, text, LATENTS, cfg, clip_noise(backbone, [0]))), 1) for cfg in (wrong, right))
    assert distance(found[:, :9], wanted[:, :9]) == 0
    assert distance(found, wanted) > 1e-4
