"""Attention from 8-bit floats: by hand in float64 with a rounding of our own, by a package of the published signature, and clip by clip."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from rfbench import attention
from rfbench.backbones.wan import float8, graphs, lean
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import clip_noise, stream
from tests.test_float8 import LACKING, NUMBERS, WIDE, check_nearest
from tests.tiny import Remembered, Tiny, distance, normal, recordings

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(LACKING is not None, reason=f"8-bit attention {LACKING}")
EVEN = (torch.arange(256)[torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().isfinite()] % 2) * 1e-9


def drawn(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*size, seed=seed).to(DEVICE, dtype)


def qkv(
    batch: int = 2, queries: int = 6, keys: int = 20, heads: int = 2, width: int = 16, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Heads of other sizes, and clips that are not alike."""
    found = [drawn(batch, tokens, heads, width, seed=seed) for seed, tokens in enumerate((queries, keys, keys))]
    sizes = torch.linspace(0.5, 2.0, batch * heads, device=DEVICE).view(batch, 1, heads, 1)
    return tuple((x * sizes).to(dtype) for x in found)


def nearest(x: Tensor) -> Tensor:
    """The number of float8_e4m3fn that is nearest, of two the one whose last bit is 0; by looking at all of them."""
    return NUMBERS[((x[..., None] - NUMBERS).abs() + EVEN).argmin(-1)]


def by_hand(q_SD: Tensor, k_TD: Tensor, v_TD: Tensor) -> Tensor:
    """One head of one clip, in float64."""
    scales = [x.abs().max() / 448 for x in (q_SD, k_TD, v_TD)]
    q, k, v = (nearest(x / scale) for x, scale in zip((q_SD, k_TD, v_TD), scales, strict=True))
    scores = q @ k.T * scales[0] * scales[1] / math.sqrt(q.shape[1])
    weights = 256 * (scores - scores.max(1, keepdim=True).values).exp()
    return nearest(weights) @ v * scales[2] / weights.sum(1, keepdim=True)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU rounds weights by the largest score so far")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_arithmetic_of_flash_attention_3(dtype: torch.dtype) -> None:
    q, k, v = qkv(dtype=dtype)
    found = float8.attend(q, k, v)
    assert found.dtype == dtype and found.shape == q.shape
    for clip in range(2):
        for head in range(2):
            wanted = by_hand(*(x[clip, :, head].double() for x in (q, k, v)))
            assert ((found[clip, :, head] - wanted).abs() <= 2**-8 * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("sizes", [(2, 6, 20, 2, 16), (2, 1, 1, 2, 16), (2, 6, 300, 2, 32), (1, 6, 20, 3, 48)])
def test_it_is_within_the_bound_of_its_roundings(sizes: tuple[int, ...]) -> None:
    """Every factor is off by a sixteenth of itself at most, or by half a step where steps are even, and so is every weight."""
    q, k, v = qkv(*sizes)
    found = float8.attend(q, k, v).double()
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))

    def off(x: Tensor) -> Tensor:
        return torch.maximum(x.abs() / 16, x.abs().amax((2, 3), keepdim=True) / 448 / 1024)

    root = math.sqrt(q.shape[-1])
    weights = (q @ k.mT / root).softmax(-1)
    scores_off = (off(q) @ (k.abs() + off(k)).mT + q.abs() @ off(k).mT) / root
    most = weights * (2 * scores_off.amax(-1, keepdim=True)).exp()  # a weight over the sum of all, with each score off as far as it may
    rounded = torch.maximum(most / 16, torch.full_like(most, 1 / 1024 / 256))
    bound = (most - weights) @ v.abs() + rounded @ (v.abs() + off(v)) + most @ off(v)
    wanted = weights @ v
    assert ((found.transpose(1, 2) - wanted).abs() <= 1.01 * (bound + 2**-8 * wanted.abs())).all()  # and comes out in bfloat16
    assert 0.01 < distance(found.transpose(1, 2), wanted) < 0.12


def test_scales_are_those_of_a_clip_and_a_head() -> None:
    """What is large in another clip or head takes no bits away, so a clip has the same bits alone as beside others."""
    q, k, v = qkv(batch=3)
    together = float8.attend(q, k, v)
    for clip in range(3):
        assert torch.equal(float8.attend(*(x[clip : clip + 1] for x in (q, k, v))), together[clip : clip + 1])
    for x in (q, k, v):
        x[2] *= 1000
        x[0, :, 1] *= 1000
    again = float8.attend(q, k, v)
    assert torch.equal(again[1], together[1]) and torch.equal(again[0, :, 0], together[0, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(5, 12), (150, 16)])
def test_heads_are_quantised_alike_by_torch_and_by_a_kernel(tokens: int, width: int, dtype: torch.dtype) -> None:
    """Of a cache that has more room than is filled, of rows that lie between others, and of zeros."""
    kernels: Any = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)
    room = drawn(2, tokens + 7, 3, width, seed=1, dtype=dtype) * torch.tensor([1.0, 1e-3, 0.0], device=DEVICE, dtype=dtype)[:, None]
    for x in (room[:, :tokens], drawn(2, tokens, 2, 3, width, seed=2, dtype=dtype)[:, :, 1]):
        for quantise in (float8.quantised_heads, kernels.quantised_heads):
            heads, scales = quantise(x)
            assert heads.shape == x.shape and heads.dtype == torch.float8_e4m3fn and heads.stride(-1) == 1
            assert scales.shape == (2, 3) and scales.dtype == torch.float32
            filled = x.float().abs().amax((1, 3)) > 0
            flat = [part.transpose(1, 2).flatten(2)[filled] for part in (heads, x.float())]
            check_nearest((flat[0], scales[..., None][filled]), flat[1])
            assert not heads.transpose(1, 2)[~filled].float().any() and (scales > 0).all()


def package(*, pair: bool) -> Any:
    """FlashAttention 3's interface as published, for what is asked of it here; `calls` are the descales that came in."""
    calls = list[tuple[Tensor, ...]]()

    def flash_attn_func(
        q,
        k,
        v,
        softmax_scale=None,
        causal=False,
        qv=None,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        window_size=(-1, -1),
        attention_chunk=0,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        sm_margin=0,
        return_attn_probs=False,
    ):
        assert softmax_scale is None and causal is False and qv is None and window_size == (-1, -1) and not softcap
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn and k.shape == v.shape and q.shape[-1] % 16 == 0
        assert all(x.stride(-1) == 1 and all(stride % 16 == 0 for stride in x.stride()[:-1]) for x in (q, k, v))  # bytes, of which it copies 16
        for descale in (q_descale, k_descale, v_descale):
            assert descale.dtype == torch.float32 and descale.shape == (k.shape[0], k.shape[2])
        calls.append((q_descale, k_descale, v_descale))
        q, k, v = (x.double() * scale[:, None, :, None].double() for x, scale in zip((q, k, v), (q_descale, k_descale, v_descale), strict=True))
        weights = torch.einsum("bshd,bthd->bhst", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        out = torch.einsum("bhst,bthd->bshd", weights, v).bfloat16()
        return (out, None) if pair else out

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, calls=calls)


@pytest.mark.parametrize(("module", "pair"), [("flash_attn_interface", True), ("fa3_fwd_interface", False)])
def test_the_package_gets_what_it_is_declared_to_take(module: str, pair: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = package(pair=pair)
    monkeypatch.setitem(sys.modules, module, found)
    monkeypatch.setattr(attention, "FA3", (module,))
    q, k, v = qkv(batch=3, dtype=torch.bfloat16)
    quantised = [float8.quantised_heads(x) for x in (q, k, v)]
    out = float8.by_package(*quantised)
    assert out.dtype == torch.bfloat16 and out.shape == q.shape
    assert all(torch.equal(own, scales) for own, (_, scales) in zip(found.calls[0], quantised, strict=True))
    assert distance(out, float8.emulated(*quantised)) < 0.04  # which rounds weights too
    assert distance(out, attention.KERNELS["math"](q, k, v, None)) < 0.1


def test_nothing_is_read_back() -> None:
    """On a device whose tensors have no values to read."""
    nowhere = [x.to("meta") for x in qkv(dtype=torch.bfloat16)]
    assert float8.attend(*nowhere).shape == nowhere[0].shape


def test_recorded_and_joint_passes_make_the_same_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the package's interface; on a GPU also by kernels, for which Triton's interpreter would take long."""
    monkeypatch.setattr(lean, "ON", {})
    if DEVICE.type != "cuda":
        found = package(pair=False)
        monkeypatch.setitem(sys.modules, "fa3_fwd_interface", found)
        monkeypatch.setattr(float8, "emulated", float8.by_package)
        monkeypatch.setattr(attention, "FA3", ("fa3_fwd_interface",))
        monkeypatch.setattr(graphs, "Cuda", Remembered)
    tiny = Tiny(WIDE, height=2, width=4).to(DEVICE)
    cfg = SamplerCfg((1000, 500), 5.0, chunk=1, cache=CacheCfg("ema_sink", window=3, sink=1, alpha=0.9, fold_dtype="float32"))

    def made(**shortcuts: bool) -> tuple[Tensor, LeanDiT]:
        model = LeanDiT(tiny.denoiser, Shortcuts(kernels=DEVICE.type == "cuda", **shortcuts), eight=["attention"])
        text = tiny.encode_text(["a"]).to(DEVICE)
        clips = [chunk.latent_BFCHW for _ in range(2) for chunk in stream(tiny, text, 4, cfg, clip_noise(tiny, [0]), lean=model)]
        return torch.cat(clips, 1), model

    wanted, _ = made(graphs=False, joint=False)
    found, model = made(graphs=True, joint=True)
    assert recordings(model) and distance(found, wanted) < 1e-5


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_this_gpu_agrees_with_float32_and_with_the_emulation() -> None:
    """At the sizes of a chunk of Wan2.1: 3 latent frames that look at 9."""
    kernels: Any = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)
    q, k, v = (drawn(1, size, 12, 128, seed=size, dtype=torch.bfloat16) for size in (4680, 14040, 14040))
    wanted = attention.KERNELS["torch-sdpa"](q.float(), k.float(), v.float(), None)
    for quantise in (float8.quantised_heads, kernels.quantised_heads):
        found = float8.attend(q, k, v, quantise=quantise)
        assert distance(found.float(), wanted) < 0.1
    emulated = float8.emulated(*(float8.quantised_heads(x[:, :, :1]) for x in (q[:, :512], k, v)))
    assert distance(found[:, :512, :1].float(), emulated.float()) < 0.05
