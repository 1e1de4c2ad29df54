"""The shared sampler against the naive loop, an implementation of its own of every cache policy; and the ladder between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rfbench import ladder
from rfbench.backbones.toy import ToyBackbone
from rfbench.backbones.wan.lean import Shortcuts
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.naive import naive
from rfbench.sampler import clip_noise, stream
from tests import models
from tests.tiny import distance

LATENTS = 18  # six chunks: with a window of nine frames, three of them evict


def student(policy: str = "ema_sink", rope_kind: str = "relative", *, window: int = 9, sink: int = 3) -> SamplerCfg:
    """Four steps with the given cache."""
    settings: dict[str, Any] = {"policy": policy, "rope": rope_kind}
    settings |= {"window": window} if policy != "full" else {}
    settings |= {"sink": sink} if "sink" in policy else {}
    settings |= {"alpha": 0.9, "fold_dtype": "float32"} if policy == "ema_sink" else {}
    return SamplerCfg(steps=(1000, 750, 500, 250), shift=5.0, cache=CacheCfg(**settings))


@pytest.fixture(scope="module")
def backbone() -> ToyBackbone:
    made = ToyBackbone()
    made.load_state_dict(models.weights())
    return made.requires_grad_(False)


@pytest.mark.parametrize(
    "cfg",
    [
        student("ema_sink"),
        student("ema_sink", window=12, sink=2),
        student("static_sink"),
        student("static_sink", "absolute"),
        student("static_sink", window=8, sink=1),
        student("window"),
        student("window", "absolute"),
        student("window", window=3),
        student("full"),
        student("full", "absolute"),
    ],
    ids=lambda cfg: f"{cfg.cache.policy}-{cfg.cache.window}-{cfg.cache.sink}-{cfg.cache.rope}",
)
@torch.no_grad()
def test_cached_streaming_equals_the_loop_that_recomputes_everything(backbone, cfg):
    text = backbone.encode_text(["a red disc moves right", "a blue square"])
    found = torch.cat([chunk.latent_BFCHW for chunk in stream(backbone, text, LATENTS, cfg, clip_noise(backbone, [0, 1]))], 1)
    wanted = torch.cat(list(naive(backbone, text, LATENTS, cfg, clip_noise(backbone, [0, 1]))), 1)
    assert distance(found, wanted) < 1e-5


@torch.no_grad()
def test_the_comparison_sees_a_wrong_sink(backbone):
    """A fold that is off by a little is far outside of what the comparison allows."""
    text, right = backbone.encode_text(["a red disc moves right"]), student("ema_sink")
    assert right.cache is not None
    wrong = dataclasses.replace(right, cache=dataclasses.replace(right.cache, alpha=0.91))
    found, wanted = (torch.cat(list(naive(backbone, text, LATENTS, cfg, clip_noise(backbone, [0]))), 1) for cfg in (wrong, right))
    assert distance(found[:, :9], wanted[:, :9]) == 0
    assert distance(found, wanted) > 1e-4


def test_the_ladder_ends_with_every_shortcut_and_has_one_more_on_each_rung(backbone):
    """Each rung is the video of rung 0, and each shortcut does something: work or bits are others than on the rung before."""
    text = backbone.encode_text(["a red disc moves right"])
    found = ladder.climb(backbone, text, student(), chunks=5, turns=1)
    assert [rung.name for rung in found] == ["naive", "slots", *(field.name for field in dataclasses.fields(Shortcuts))]
    assert (found[0].ratio, found[0].whole) == (1.0, 0.0)
    for rung in found:
        assert max(rung.first, rung.steady, rung.whole) <= 1e-6
        assert rung.fps == pytest.approx(12000 / rung.ms)
    with pytest.raises(ValueError, match="never gets steady"):
        ladder.climb(backbone, text, student(), chunks=4, turns=1)


def test_a_ladder_shows_a_rung_that_is_not_exact(backbone):
    right = student()
    assert right.cache is not None
    wrong = dataclasses.replace(right, cache=dataclasses.replace(right.cache, alpha=0.91))
    both = {
        name: lambda b, text, latents, cfg, seed, of=of: naive(b, text, latents, of, clip_noise(b, [seed]))
        for name, of in (("right", right), ("wrong", wrong))
    }
    _, off = ladder.climb(backbone, backbone.encode_text(["a red disc moves right"]), right, chunks=6, turns=1, on=both)
    assert off.first == 0 and off.whole > 1e-4
