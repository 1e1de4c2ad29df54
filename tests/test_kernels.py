"""Every Triton kernel against torch in float64, by Triton's interpreter on a CPU; on a GPU the kernels themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rfbench import hardware, proof, video
from rfbench.attention import rotate, rotations
from rfbench.backbones.wan import vae
from rfbench.errors import UserError
from rfbench.settings import Shortcuts
from tests.tiny import distance, normal

kernels = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6


def drawn(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    return normal(*size, seed=seed).to(DEVICE, dtype)


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_queries_are_turned_and_keys_and_values_put_in_place(dtype: torch.dtype, within: float, raw: bool) -> None:
    batch, frames, height, width, heads, head, room = 2, 2, 2, 3, 3, 20, 30
    tokens, wide = frames * height * width, heads * head
    qkv, gain = drawn(batch * tokens, 3 * wide, seed=0, dtype=dtype), drawn(2, wide, seed=1, dtype=dtype)
    rotation = rotations((4, 7), height, width, head, DEVICE)
    rows = torch.tensor([*range(18, 24), *range(6)], device=DEVICE)
    keys, unrotated, values = (drawn(batch, room, heads, head, seed=seed, dtype=dtype) for seed in (2, 3, 4))
    before = [buffer.clone() for buffer in (keys, unrotated, values)]
    queries = kernels.place(qkv, gain, EPS, rotation, rows, keys, unrotated if raw else None, values)

    q, k, v = qkv.double().view(batch, tokens, 3, wide).unbind(2)
    q, k = (functional.rms_norm(x, (wide,), g.double(), EPS).unflatten(-1, (heads, head)) for x, g in ((q, gain[0]), (k, gain[1])))
    assert distance(queries, rotate(q.float(), rotation)) < within
    assert distance(keys[:, rows], rotate(k.float(), rotation)) < within
    assert torch.equal(values[:, rows], v.unflatten(-1, (heads, head)).to(dtype))
    if raw:
        assert distance(unrotated[:, rows], k) < within
    others = [row for row in range(room) if row not in rows.tolist()]
    for now, then in zip((keys, unrotated, values), before, strict=True):
        assert torch.equal(now[:, others], then[:, others])
    assert raw or torch.equal(unrotated, before[1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_residual_gate_norm_and_modulation_are_one(dtype: torch.dtype, within: float, groups: int) -> None:
    rows, wide = 10, 36
    x, y = (drawn(rows, wide, seed=seed, dtype=dtype) for seed in (0, 1))
    gate, shift, gain = (drawn(groups, 1, wide, seed=seed, dtype=dtype) for seed in (2, 3, 4))

    def spread(table: Any) -> Any:
        return table.double().expand(groups, rows // groups, wide).reshape(rows, wide)

    def normed(value: Any) -> Any:
        return functional.layer_norm(value.double(), (wide,), eps=EPS) * spread(gain) + spread(shift)

    assert distance(kernels.modulate(x, shift, gain, EPS), normed(x)) < within
    for how in (gate, gate[:1], None):
        total, out = kernels.add_and_modulate(x, how, y, shift, gain, EPS)
        wanted = x.double() + (y.double() if how is None else spread(how) * y.double())
        assert distance(total, wanted) < within and distance(out, normed(wanted)) < 2 * within


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_rows_are_normed_and_come_in_the_dtype_of_the_gain(dtype: torch.dtype, within: float) -> None:
    x, gain = drawn(7, 36, seed=0, dtype=dtype), drawn(36, seed=1)
    wanted = functional.rms_norm(x.double(), (36,), gain.double(), EPS)
    for kept, apart in ((dtype, within), (torch.float32, 1e-6)):
        found = kernels.rms_norm(x, gain.to(kept), EPS)
        assert found.dtype == kept and distance(found, wanted) < apart


@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_autoencoders_norm_and_silu_are_one(dtype: torch.dtype, within: float) -> None:
    x, gain = drawn(2, 3, 5, 12, seed=0, dtype=dtype), drawn(12, seed=1, dtype=dtype)
    wanted = functional.silu(functional.rms_norm(x.double(), (12,), gain.double(), 1e-24))
    assert distance(kernels.norm_silu(x, gain, 1e-24), wanted) < within
    behind = torch.zeros(2, 5, 5, 12, dtype=dtype, device=DEVICE)
    kernels.norm_silu(x, gain, 1e-24, out=behind[:, 2:])
    assert distance(behind[:, 2:], wanted) < within and not behind[:, :2].any()


def test_an_autoencoder_by_kernels_makes_the_same_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clips in two chunks, as bytes too; every norm in front of a convolution is the kernel's."""
    rng = torch.Generator().manual_seed(0)
    model = vae.WanVAE(vae.VAECfg(dim=4, dim_mult=(1, 1), num_res_blocks=1, temporal_downsample=(True,)))
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    model.requires_grad_(False).to(DEVICE)
    latents = drawn(2, 2, 16, 1, 1, seed=3).split(1, 1)

    def frames() -> list[Tensor]:
        decode = vae.WanDecoder(model)
        return [decode(part) for part in latents]

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # where convolutions round to 10 bits, a hair before becomes a step behind
    with hardware.by(Shortcuts(kernels=False)):
        wanted = frames()
        pairs = [(part, video.as_uint8(part)) for part in wanted]
    called = list[Tensor]()
    norm_silu = kernels.norm_silu

    def counted(x: Tensor, *given: Any, **options: Any) -> Any:
        called.append(x)
        return norm_silu(x, *given, **options)

    for module in (vae, hardware):
        monkeypatch.setattr(module, "kernels", lambda device: True)
    frames()  # and the trial
    monkeypatch.setattr(kernels, "norm_silu", counted)
    assert all(distance(ours, theirs) < 1e-5 for ours, theirs in zip(frames(), wanted, strict=True))
    assert len(called) == 2 * (2 * len([block for block in model.decoder.modules() if isinstance(block, vae.ResidualBlock)]) + 1)
    assert all(torch.equal(video.as_uint8(pixels), shown) for pixels, shown in pairs)


def test_kernels_are_for_gpus_and_not_for_those_who_switch_them_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    for line, asked in (("kernels = true", True), ("kernels = false", False), ("", None)):
        hardware._asked.cache_clear()
        (tmp_path / "rfbench.toml").write_text(f"[fast.shortcuts]\n{line}\n")
        assert hardware.kernels(torch.device("cuda", 0)) is asked and hardware.kernels(torch.device("cpu")) is False
    hardware._asked.cache_clear()


@pytest.mark.parametrize("asked", [None, True])
def test_a_decoders_kernel_that_is_off_is_left_out(asked: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "kernels", lambda device: asked)
    monkeypatch.setattr(proof, "_verdicts", {})
    monkeypatch.setattr(proof, "left_out", {})
    x = drawn(1, 2, 2, 2, 8, seed=0)
    assert vae.norm_silu(x) is kernels.norm_silu and not proof.left_out
    proof._verdicts.clear()
    right: Any = kernels.norm_silu

    def off(x: Tensor, gain: Tensor, eps: float, out: Tensor) -> Tensor:
        return cast(Tensor, right(x, gain, eps, out=out).mul_(1.001))

    monkeypatch.setattr(kernels, "norm_silu", off)
    if asked:
        with pytest.raises(UserError, match=r"'kernels.norm_silu' is 1.0e-03 apart from its plain form, where 1.1e-06 is rounding"):
            vae.norm_silu(x)
    else:
        assert vae.norm_silu(x) is None and list(proof.left_out) == ["kernels.norm_silu"]
        assert vae.norm_silu(x.bfloat16()) is off, "which such an error is within the rounding of"
        assert proof.bound(torch.bfloat16) < 0.01


def test_the_sum_is_as_wide_as_its_widest_part() -> None:
    """As of a network that keeps its residual stream in float32 and multiplies in bfloat16."""
    x, y = (drawn(4, 36, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    gate, shift, gain = (drawn(36, seed=seed) for seed in (2, 3, 4))
    total, out = kernels.add_and_modulate(x, gate, y, shift, gain, EPS)
    assert total.dtype == out.dtype == torch.float32 and distance(total, torch.addcmul(x, gate, y)) < 1e-6
    assert kernels.add_and_modulate(x, None, y, shift, gain, EPS)[0].dtype == torch.bfloat16


def test_bytes_are_those_of_the_plain_conversion() -> None:
    """Halves too, which go to the even neighbour, and what lies outside."""
    halves = ((torch.arange(0, 255) + 0.5) - 127.5) / 127.5
    x = torch.cat([halves, torch.linspace(-1.2, 1.2, 2001)]).to(DEVICE).view(1, 2, 1, 8, -1)
    with hardware.by(Shortcuts(kernels=False)):
        assert torch.equal(kernels.as_uint8(x.permute(0, 1, 3, 4, 2).contiguous()), video.as_uint8(x))
