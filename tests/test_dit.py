"""The network's sizes against published checkpoints, and what its inputs may and may not influence.

That it computes what the reference computes is tests/test_golden.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rfbench.attention import rotate, rotations
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


def test_skyreels_has_five_tensors_more() -> None:
    """SkyReels-V2-DF-1.3B: the 825 of Wan2.1 1.3B, and an embedding of two frame rates with a projection to six modulations."""
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in WanDiT(replace(PUBLISHED["wan_dit_1.3B"], fps=24)).state_dict().items()}
        wan = {name: tuple(tensor.shape) for name, tensor in WanDiT(PUBLISHED["wan_dit_1.3B"]).state_dict().items()}
    assert len(found) == 830
    assert dict(found.items() - wan.items()) == {
        "fps_embedding.weight": (2, 1536),
        "fps_projection.0.weight": (1536, 1536),
        "fps_projection.0.bias": (1536,),
        "fps_projection.2.weight": (6 * 1536, 1536),
        "fps_projection.2.bias": (6 * 1536,),
    }


@torch.no_grad()
def test_the_frame_rate_is_added_to_all_modulations() -> None:
    """As much as if it had been in the bias of the time projection."""
    x, t, text = normal(1, 2, 3, 4, 6), torch.full((1, 1), 500.0), normal(1, 4, 8)
    for fps, row in ((16, 0), (24, 1), (8, 1)):
        told, plain = Tiny(replace(CFG, fps=fps)).denoiser, Tiny().denoiser
        plain.load_state_dict({name: tensor for name, tensor in told.state_dict().items() if not name.startswith("fps_")})
        before = plain(x, t, text)
        given = told.state_dict()
        hidden = functional.silu(given["fps_projection.0.weight"] @ given["fps_embedding.weight"][row] + given["fps_projection.0.bias"])
        rate = given["fps_projection.2.weight"] @ hidden + given["fps_projection.2.bias"]
        plain.state_dict()["time_projection.1.bias"].add_(rate)
        assert distance(told(x, t, text), plain(x, t, text)) < 1e-6
        assert distance(told(x, t, text), before) > 1e-2


WIDE = DiTCfg(dim=96, ffn_dim=256, num_heads=4, num_layers=4, text_dim=16, text_len=8, in_dim=4, out_dim=4, freq_dim=32)


def op_by_op(model: WanDiT, x_BFCHW: Tensor, t: float, text_BLE: Tensor) -> Tensor:
    """The network as its description reads, each operation rounding to the dtype of the weights and none fused."""
    cfg, dtype = model.cfg, model.patch_embedding.weight.dtype
    weight = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weight[f"{name}.weight"].flatten(1).T + weight[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + cfg.eps).sqrt()

    def heads(x: Tensor, name: str) -> Tensor:
        scaled = x / (x.square().mean(-1, keepdim=True) + cfg.eps).sqrt() * weight[f"{name}.weight"]
        return scaled.unflatten(-1, (cfg.num_heads, -1))

    def attention(x: Tensor, other: Tensor, name: str) -> Tensor:
        q, k = heads(linear(x, f"{name}.q"), f"{name}.norm_q"), heads(linear(other, f"{name}.k"), f"{name}.norm_k")
        if other is x:
            q, k = rotate(q, rotation), rotate(k, rotation)
        v = linear(other, f"{name}.v").unflatten(-1, (cfg.num_heads, -1))
        share = (torch.einsum("bshd,bkhd->bhsk", q, k) / cfg.head_dim**0.5).softmax(-1)
        return linear(torch.einsum("bhsk,bkhd->bshd", share, v).flatten(2), f"{name}.o")

    batch, frames, channels, height, width = x_BFCHW.shape
    rotation = rotations(tuple(range(frames)), height // 2, width // 2, cfg.head_dim, x_BFCHW.device)
    patches = x_BFCHW.view(batch, frames, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4, 6).reshape(batch, -1, 4 * channels)
    x = linear(patches.to(dtype), "patch_embedding")
    time = linear(timestep_embedding(torch.full((1, 1), t), cfg.freq_dim).to(dtype), "time_embedding.0")
    time = linear(functional.silu(time), "time_embedding.2")
    six = linear(functional.silu(time), "time_projection.1").view(1, 6, -1)
    text = linear(functional.gelu(linear(text_BLE.to(dtype), "text_embedding.0"), approximate="tanh"), "text_embedding.2")
    for layer in range(cfg.num_layers):
        at = f"blocks.{layer}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (six + weight[f"{at}.modulation"]).unbind(1)
        tokens = norm(x) * (1 + scale1) + shift1
        x = x + attention(tokens, tokens, f"{at}.self_attn") * gate1
        tokens = norm(x) * weight[f"{at}.norm3.weight"] + weight[f"{at}.norm3.bias"]
        x = x + attention(tokens, text, f"{at}.cross_attn")
        tokens = norm(x) * (1 + scale2) + shift2
        x = x + linear(functional.gelu(linear(tokens, f"{at}.ffn.0"), approximate="tanh"), f"{at}.ffn.2") * gate2
    shift, scale = (weight["head.modulation"] + time).unbind(1)
    out = linear(norm(x) * (1 + scale) + shift, "head.head")
    return out.view(batch, frames, height // 2, width // 2, 2, 2, channels).permute(0, 1, 6, 2, 4, 3, 5).reshape(x_BFCHW.shape)


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_plain_operations_with_and_without_islands() -> None:
    """Both kinds of storage; the same tensors in float32 give the same bits, and islands are nearer than none."""
    plain, islands = WanDiT(WIDE), WanDiT(replace(WIDE, islands=True))
    rng = torch.Generator().manual_seed(0)
    for parameter in plain.parameters():
        size = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        parameter.copy_((torch.randn(parameter.shape, generator=rng) * size).bfloat16().float())
    for name, parameter in plain.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.copy_((1 + parameter).bfloat16().float())
    islands.load_state_dict(plain.state_dict())
    inputs = [
        (normal(2, 3, 4, 8, 8, seed=i).bfloat16().float(), t, normal(2, 8, 16, seed=i).bfloat16().float()) for i, t in enumerate((950.0, 500.0, 20.0))
    ]
    exact = [plain(x, torch.full((1, 1), t), text) for x, t, text in inputs]
    assert all(distance(op_by_op(plain, *given), wanted) < 1e-5 for given, wanted in zip(inputs, exact, strict=True))
    assert all(torch.equal(islands(x, torch.full((1, 1), t), text), wanted) for (x, t, text), wanted in zip(inputs, exact, strict=True))

    plain.store(torch.bfloat16)
    islands.store(torch.bfloat16)
    stored = {name for name, parameter in islands.named_parameters() if parameter.dtype == torch.float32}
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    kinds = {"".join(letter for letter in name if not letter.isdigit()).replace("..", ".") for name in stored}
    assert kinds == {
        *(f"time_{part}..{kind}".replace("..", ".") for part in ("embedding", "projection") for kind in ("weight", "bias")),
        *(f"blocks.{part}" for part in ("modulation", "norm.weight", "norm.bias")),
        *(f"blocks.{part}_attn.norm_{which}.weight" for part in ("self", "cross") for which in "qk"),
        "head.modulation",
        "head.head.weight",
        "head.head.bias",
    }
    assert plain.dtype == torch.bfloat16 and islands.dtype == torch.float32

    def error(flows: list[Tensor]) -> float:
        return distance(torch.stack(flows), torch.stack(exact))

    naive = error([op_by_op(plain, *given) for given in inputs])
    without, with_islands = (error([model(x.to(model.dtype), torch.full((1, 1), t), text) for x, t, text in inputs]) for model in (plain, islands))
    print(f"relative error in bfloat16: op by op {naive:.2e}, as stored {without:.2e}, with islands {with_islands:.2e}")
    assert without <= 1.1 * naive
    assert with_islands < without
