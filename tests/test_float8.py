"""Products and attention from 8-bit floats: each number is the nearest, errors stay in their bounds, kernels agree, and it is never silent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rfbench import baselines, ladder, profiling, rungs, stopwatch
from rfbench.backbones.wan import float8
from rfbench.backbones.wan.dit import Eight
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.config import Baseline, CacheCfg, SamplerCfg, find
from rfbench.errors import UserError
from rfbench.report import division, leaderboard
from rfbench.sampler import clip_noise, stream
from rfbench.strict import build, load_plain
from tests.tiny import CFG, Tiny, distance, normal

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(float8.missing("products", DEVICE) is not None, reason="this GPU has no products of 8-bit floats")
NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = NUMBERS[NUMBERS.isfinite()]  # every one that there is
WIDE = replace(CFG, dim=32, ffn_dim=64)  # GPUs want multiples of 16
FIELDS: dict[Eight, str] = {"products": "precision=float8", "attention": "attention=float8"}
LACKING = float8.missing("attention", DEVICE)
THERE = ["products", pytest.param("attention", marks=pytest.mark.skipif(LACKING is not None, reason=f"8-bit attention {LACKING}"))]


def drawn(*size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(*size, seed=seed).to(DEVICE, dtype)


def check_nearest(found: float8.Rows8, wanted: Tensor) -> None:
    """No number of float8_e4m3fn is nearer to what was asked for than the one that was taken, but for what a float32 cannot tell apart."""
    rows, scales = found
    scaled = wanted.double().cpu() / scales.double().cpu()
    least = (scaled[..., None] - NUMBERS).abs().amin(-1)
    assert ((rows.double().cpu() - scaled).abs() <= least + 1e-6 * scaled.abs()).all()
    assert torch.allclose(scales.double().cpu(), wanted.double().cpu().abs().amax(-1, keepdim=True) / 448, rtol=1e-5)


def test_each_number_is_the_nearest_that_there_is() -> None:
    x = drawn(7, 33, seed=0) * 10.0 ** torch.arange(-3, 4, device=DEVICE)[:, None]
    x[0, 5:] *= 1e-4  # far below the largest of its row: where the numbers are evenly spaced, and where there are none left
    check_nearest(float8.quantised(x), x)
    rows, scales = float8.quantised(torch.zeros(2, 16, device=DEVICE))
    assert not rows.float().any() and scales.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_within_the_bound_of_its_factors(dtype: torch.dtype) -> None:
    """Every factor is off by a sixteenth of itself at most, or by half a step where steps are even."""
    linears = [nn.Linear(48, size).to(DEVICE, dtype).requires_grad_(False) for size in (16, 32)]
    x = drawn(5, 48, seed=1, dtype=dtype)
    out = float8.product(*linears)(x)
    weight, bias = (torch.cat([getattr(linear, name).double() for linear in linears]) for name in ("weight", "bias"))
    exact = x.double() @ weight.T + bias

    def off(value: Tensor) -> Tensor:
        step = value.abs().amax(-1, keepdim=True) / 448 / 1024
        return torch.maximum(value.abs() / 16, step)

    most = off(x.double()) @ (weight.abs() + off(weight)).T + x.double().abs() @ off(weight).T
    assert ((out.double() - exact).abs() <= most + exact.abs() * (2**-8 if dtype == torch.bfloat16 else 1e-5)).all()
    assert out.dtype == dtype and 0.01 < distance(out, exact) < 0.06


def test_a_row_and_an_output_have_scales_of_their_own() -> None:
    """What is a thousand times as large elsewhere takes no bits from the rest."""
    linear = nn.Linear(32, 16, device=DEVICE).requires_grad_(False)
    x = drawn(4, 32, seed=2)
    before = float8.product(linear)(x)
    x[3] *= 1000
    linear.weight[15] *= 1000
    assert torch.equal(float8.product(linear)(x)[:3, :15], before[:3, :15])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_quantise_what_they_would_have_handed_out(dtype: torch.dtype) -> None:
    kernels: Any = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)
    x, y = (drawn(6, 36, seed=seed, dtype=dtype) for seed in (0, 1))
    gate, shift, gain = (drawn(2, 1, 36, seed=seed) for seed in (2, 3, 4))
    check_nearest(kernels.quantised(x), x)
    check_nearest(kernels.quantised(x, gelu=True), nn.functional.gelu(x.double(), approximate="tanh").float())
    check_nearest(kernels.modulate(x, shift, gain, 1e-6, eight=True), kernels.modulate(x, shift, gain, 1e-6))
    (total, eight), plain = (kernels.add_and_modulate(x, gate, y, shift, gain, 1e-6, eight=each) for each in (True, False))
    assert torch.equal(total, plain[0])
    check_nearest(eight, plain[1])


def clip(tiny: Tiny, lean: LeanDiT) -> Tensor:
    cfg = SamplerCfg((1000, 500), 5.0, chunk=1, cache=CacheCfg("ema_sink", window=3, sink=1, alpha=0.9, fold_dtype="float32"))
    made = stream(tiny, tiny.encode_text(["a"]).to(DEVICE), 5, cfg, clip_noise(tiny, [0]), lean=lean)
    return torch.cat([chunk.latent_BFCHW for chunk in made], 1)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("what", THERE)
def test_such_a_stream_is_near_and_is_not_the_same(what: Eight, merged: bool) -> None:
    tiny = Tiny(WIDE, height=2, width=4).to(DEVICE)
    wanted, found = clip(tiny, LeanDiT(tiny.denoiser)), clip(tiny, LeanDiT(tiny.denoiser, Shortcuts(merged=merged), eight=[what]))
    assert 1e-3 < distance(found, wanted) < 0.2
    asked = Tiny(replace(WIDE, float8=(what,)), height=2, width=4).to(DEVICE)
    assert torch.equal(clip(asked, LeanDiT(asked.denoiser, Shortcuts(merged=merged))), found)


@pytest.mark.parametrize("what", THERE)
def test_a_stream_by_kernels_is_that_of_torch(what: Eight, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="there is no triton; pip install triton")
    monkeypatch.setattr("rfbench.backbones.wan.lean.ON", {})
    tiny = Tiny(WIDE, height=2, width=4).to(DEVICE)
    lean = LeanDiT(tiny.denoiser, Shortcuts(kernels=True, graphs=False), eight=[what])
    assert set(lean.kernels) == {"place", "modulate", "add_and_modulate", "rms_norm", "quantised" if what == "products" else "quantised_heads"}
    exact, plain = (clip(tiny, LeanDiT(tiny.denoiser, Shortcuts(kernels=False, graphs=False), eight=eight)) for eight in ([], [what]))
    assert distance(clip(tiny, lean), plain) < distance(plain, exact)  # a value between two numbers goes now to the one, now to the other


@pytest.mark.parametrize("what", THERE)
def test_a_setting_of_a_baseline_asks_for_it(what: Eight) -> None:
    asked = baselines.prepare("toy/ode-init", [FIELDS[what]])
    assert asked.blank.denoiser.cfg.float8 == (what,) and asked.cfg.approximate == (f"8-bit {what}",)
    assert asked.inputs() != baselines.prepare("toy/ode-init").inputs()


@pytest.mark.parametrize(
    ("what", "capability", "why"),
    [
        ("products", (8, 0), "compute capability 8.9 and this device has 8.0"),
        ("attention", (8, 9), "compute capability 9.0 and this device has 8.9"),
        ("attention", (10, 0), "compute capability 9.0 and this device has 10.0"),
        ("attention", (9, 0), "package flash_attn_interface or fa3_fwd_interface"),
    ],
)
def test_it_is_refused_where_a_device_cannot_do_it(what: Eight, capability: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"'toy/ode-init' with 8-bit {what} needs {why}; leave that 'float8' out"):
        baselines.prepare("toy/ode-init", [FIELDS[what]])


def test_it_is_taken_where_a_device_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name == "fa3_fwd_interface" else None)
    for what, capability in (("products", (8, 9)), ("attention", (9, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert float8.missing(cast(Eight, what), torch.device("cuda")) is None


def test_a_ladder_has_such_rungs_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = baselines.prepare("toy/ode-init")
    backbone = ready.open()
    for lacking in ((), ("attention",), ("products", "attention")):
        monkeypatch.setattr(float8, "missing", lambda what, device, lacking=lacking: f"needs another {what}" if what in lacking else None)
        found, left_out = ladder.approximations("toy/ode-init", [], ready, backbone)
        names = [way.name for way in rungs.ways(backbone, ready.cfg.sampler, found)]
        for name, what in rungs.EIGHT.items():
            assert (name in names) == (what not in lacking) and left_out.get(name) == (f"needs another {what}" if what in lacking else None)


def test_where_it_cannot_be_it_is_an_error() -> None:
    with pytest.raises(UserError, match="backbone 'toy' does not use 'precision' bfloat16"):
        baselines.prepare("toy/ode-init", ["precision=bfloat16"])
    with pytest.raises(UserError, match="'fp8' is not one of float8"):
        baselines.prepare("toy/ode-init", ["attention=fp8"])
    for field in FIELDS.values():
        with pytest.raises(UserError, match="'float8' is for passes of one chunk, and solver 'rolling' has several in work"):
            rolling = load_plain(find(Baseline, "wan/rolling-forcing"), [field], Baseline)
            build(Baseline, rolling, where="x")


@pytest.mark.parametrize("what", THERE)
def test_its_numbers_are_marked(what: Eight) -> None:
    with pytest.raises(UserError, match=f"'toy/ode-init' with 8-bit {what} has no ladder of its own: that is a rung of the other's"):
        ladder.profile("toy/ode-init", [FIELDS[what]], chunks=5, repeats=1)
    asked = baselines.prepare("toy/ode-init", [FIELDS[what]])
    about = stopwatch.warm(asked, 0, 0.0).about
    assert about["precision"][f"denoiser's {what}"] == "float8_e4m3fn" and about["approximate"] == (f"8-bit {what}",)
    document = {"timings": {"a": {"dit_fps": {"median": 1.0, "low": 1.0, "high": 1.0}}}, "length": {}, "recorded": {"contenders": {"a": about}}}
    assert f"a (8-bit {what})" in profiling.table(document)[0]
    assert division._told(about["approximate"]) == f"approximate: 8-bit {what}"
    assert set(rungs.EIGHT) <= set(leaderboard.APPROXIMATE)


def test_both_together_are_both_marked() -> None:
    cfg = build(Baseline, load_plain(find(Baseline, "wan/reward-forcing"), [*FIELDS.values()], Baseline), where="x")
    assert cfg.approximate == ("8-bit products", "8-bit attention")
