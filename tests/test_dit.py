"""The network's sizes against published checkpoints, and what its inputs may and may not influence.

That it computes what the reference computes is tests/test_golden.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rfbench.backbones.wan.dit import DiTCfg, WanDiT, block_causal_mask, timestep_embedding
from tests.tiny import CFG, Tiny, distance, normal

KEYS = Path(__file__).parent / "golden" / "keys"
PUBLISHED = {
    "wan_dit_1.3B": DiTCfg(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096, freq_dim=256),
    "wan_dit_14B": DiTCfg(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096, freq_dim=256),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_checkpoint(name: str) -> None:
    about = json.loads((KEYS / f"{name}.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = WanDiT(PUBLISHED[name])
    found = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert found == dict(about["tensors"])
    assert sum(parameter.numel() for parameter in model.parameters()) == about["num_parameters"]
    written = {"dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "in_dim", "out_dim", "freq_dim", "eps"}
    assert {key: getattr(model.cfg, key) for key in written} == {key: about["config"][key] for key in written}


def test_timestep_embedding_is_cosines_then_sines() -> None:
    t = torch.tensor([0.0, 20.0, 999.9])
    angle = t.double()[:, None] * torch.tensor([10000 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    assert torch.allclose(timestep_embedding(t, 8), torch.cat([angle.cos(), angle.sin()], dim=1))


@torch.no_grad()
def test_one_timestep_for_all_frames_is_the_same_as_one_for_each() -> None:
    model, x, text = Tiny().denoiser, normal(2, 3, 3, 4, 6), normal(2, 4, 8, seed=1)
    t = torch.tensor([[700.0], [20.0]])
    assert distance(model(x, t, text), model(x, t.expand(-1, 3), text)) < 1e-6
    other = torch.tensor([[700.0, 700.0, 100.0], [20.0, 20.0, 20.0]])
    assert distance(model(x, other, text)[0], model(x, t, text)[0]) > 1e-3
    assert distance(model(x, other, text)[1], model(x, t, text)[1]) < 1e-6


@torch.no_grad()
def test_text_may_be_given_as_embedding_or_as_keys_and_values() -> None:
    model, x, text = Tiny().denoiser, normal(2, 3, 3, 4, 6), normal(2, 4, 8, seed=1)
    t = torch.full((2, 1), 500.0)
    assert torch.equal(model(x, t, text), model(x, t, model.text_kv(text)))
    assert distance(model(x, t, text.flip(0)), model(x, t, text)) > 1e-3


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other() -> None:
    model, x, text, t = Tiny().denoiser, normal(3, 2, 3, 4, 6), normal(3, 4, 8, seed=1), torch.tensor([[900.0], [500.0], [10.0]])
    whole = model(x, t, text)
    for i in range(3):
        assert distance(model(x[i : i + 1], t[i : i + 1], text[i : i + 1]), whole[i : i + 1]) < 1e-6


@torch.no_grad()
def test_tokens_are_patches_and_come_back_where_they_were() -> None:
    """Without attention between tokens, a change of one patch changes that patch of the output alone."""
    tiny = Tiny(replace(CFG, num_layers=1), height=6, width=8)
    x, t, text = normal(1, 2, 3, 6, 8), torch.full((1, 1), 300.0), normal(1, 4, 8)
    alone = torch.eye(2 * 3 * 4, dtype=torch.bool)
    before = tiny.denoiser(x, t, text, mask_SS=alone)
    changed = x.clone()
    changed[0, 1, :, 2:4, 4:6] += 1
    difference = (tiny.denoiser(changed, t, text, mask_SS=alone) - before).abs()
    assert difference[0, 1, :, 2:4, 4:6].min() > 1e-4
    difference[0, 1, :, 2:4, 4:6] = 0
    assert difference.max() == 0


@pytest.mark.parametrize(("frames", "chunk", "window"), [(6, 3, None), (6, 2, None), (9, 3, 6), (4, 1, 2), (6, 3, 4), (1, 1, None)])
def test_block_causal_mask_is_what_it_says(frames: int, chunk: int, window: int | None) -> None:
    tokens = 2
    mask = block_causal_mask(frames, tokens, chunk, window, torch.device("cpu"))
    for query in range(frames * tokens):
        end = (query // tokens // chunk + 1) * chunk
        for key in range(frames * tokens):
            allowed = key // tokens < end and (window is None or key // tokens >= end - window)
            assert bool(mask[query, key]) == allowed
