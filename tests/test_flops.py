"""Arithmetic counted from configurations against counts that were made elsewhere, and against what torch counts while it runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rfbench import flops
from rfbench.backbones.base import open_backbone
from rfbench.backbones.wan.backbone import WAN_1_3B
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import clip_noise, stream
from tests.tiny import Tiny

STUDENT = SamplerCfg((1000, 750, 500, 250), 5.0, cache=CacheCfg("ema_sink", window=9, sink=3, alpha=0.999, fold_dtype="bfloat16"))
TERA = 1e12  # the expected figures are of an independent model of Wan2.1-T2V-1.3B at 480x832, printed with four digits behind the point


def test_a_pass_of_the_published_model_takes_as_much_as_others_counted() -> None:
    parts = flops.dit_pass(WAN_1_3B.dit, 4680, 14040)
    wanted = {"self qkv": 1.9875, "self o": 0.6625, "self attention": 12.1112, "cross q": 0.6625, "cross attention": 0.4417, "feed-forward": 7.7291}
    assert {name: round(parts[name] / TERA, 4) for name in wanted} == wanted
    assert sum(parts.values()) / TERA == pytest.approx(24.2587, abs=3e-4)  # without the time embedding's 0.0001
    for keys, total in ((4680, 16.1846), (9360, 20.2217)):
        assert sum(flops.dit_pass(WAN_1_3B.dit, 4680, keys).values()) / TERA == pytest.approx(total, abs=3e-4)


def test_a_chunk_takes_its_steps_and_its_context_pass() -> None:
    backbone = open_backbone("wan2.1-1.3b")
    assert [flops.dit_chunk(backbone, STUDENT, index) / TERA for index in (0, 1, 2, 3)] == pytest.approx(
        [80.9232, 101.1085, 121.2937, 121.2937], abs=1e-3
    )
    bare = flops.dit_chunk(backbone, replace(STUDENT, context="last_step"), 3)
    assert bare == 4 * flops.dit_chunk(backbone, STUDENT, 3) // 5
    assert flops.dit_chunk(backbone, replace(STUDENT, guidance=2.0), 3) == 2 * flops.dit_chunk(backbone, STUDENT, 3)


def test_decoding_takes_as_much_as_others_counted() -> None:
    assert flops.decoded(open_backbone("wan2.1-1.3b"), 3) / TERA == pytest.approx(40.650, abs=1e-3)
    assert flops.decoded(open_backbone("wan2.1-1.3b", decoder="tiny"), 1) / TERA == pytest.approx(0.544, abs=1e-3)


@torch.no_grad()
def test_the_count_is_what_runs() -> None:
    """A whole stream under torch's counter; the last layer of a context pass, whose outputs nobody wants, is what runs less."""
    tiny, cfg = Tiny(height=8, width=12), replace(STUDENT, cache=CacheCfg("window", window=6))
    text, counter = tiny.encode_text(["a"]), FlopCounterMode(display=False)
    kv = FlopCounterMode(display=False)
    with kv:
        tiny.denoiser.text_kv(text)
    with counter, sdpa_kernel(SDPBackend.MATH):  # a counter does not know the CPU's attention kernel
        list(stream(tiny, text, 12, cfg, clip_noise(tiny, [0])))
    dit, tokens = tiny.denoiser.cfg, 3 * 24
    steps = [4 * sum(flops.dit_pass(dit, tokens, min(index + 1, 2) * tokens).values()) for index in range(4)]
    context = [flops.dit_pass(dit, tokens, min(index + 1, 2) * tokens) for index in range(3)]
    unused = sum(sum(count for name, count in each.items() if name not in ("patches and head", "self qkv")) / dit.num_layers for each in context)
    time = 2 * dit.dim * (dit.freq_dim + dit.dim + 6 * dit.dim)  # each timestep is embedded once
    head = 3 * 2 * tokens * dit.dim * 4 * dit.out_dim
    wanted = sum(steps) + sum(sum(each.values()) for each in context) - unused - head + 5 * time
    counted = counter.get_total_flops() - kv.get_total_flops()
    assert counted == pytest.approx(wanted, rel=1e-9)
