"""The DiT for streaming against the DiT for everything else: every shortcut alone, with a cache and without, in float32 and with islands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rfbench.attention import attend
from rfbench.backbones.wan import graphs
from rfbench.backbones.wan import lean as module
from rfbench.backbones.wan.dit import DiTCfg, WanDiT
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.cache import CacheShape, KVCache
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.errors import UserError
from rfbench.sampler import clip_noise, stream
from tests.tiny import Tiny, distance, normal

CFG = DiTCfg(dim=48, ffn_dim=96, num_heads=4, num_layers=3, text_dim=16, text_len=8, in_dim=4, out_dim=4, freq_dim=32)
NAMES = [field.name for field in dataclasses.fields(Shortcuts)]
NONE = Shortcuts(**dict.fromkeys(NAMES, False))
HERE = module.usable(torch.device("cpu"))
CASES = [NONE, *(replace(NONE, **{name: True}) for name in HERE), Shortcuts()]
TEXT = normal(2, 8, 16, seed=1)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def made(cfg: DiTCfg = CFG, dtype: torch.dtype = torch.float32) -> WanDiT:
    model, rng = WanDiT(cfg), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=rng)
    model.store(dtype)
    return model.requires_grad_(False)


def cache(dtype: torch.dtype = torch.float32) -> KVCache:
    cfg = CacheCfg("ema_sink", window=5, sink=1, alpha=0.9, fold_dtype="float32", rope="relative")
    return KVCache(cfg, CacheShape(3, 2, 4, 12, 2, 3, 8), dtype=dtype, device=torch.device("cpu"))


def latents(seed: int) -> Tensor:
    return normal(2, 2, 4, 4, 6, seed=seed)


def streamed(model: WanDiT, shortcuts: Shortcuts | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Flows of four chunks, two timesteps each, by the lean DiT, or without shortcuts to speak of by the plain one."""
    held, text, flows = cache(dtype), model.text_kv(TEXT), []
    lean = LeanDiT(model, shortcuts or NONE)
    for chunk in range(4):
        held.begin(2)
        for step in (1000.0, 437.5):
            x = latents(chunk)
            flows.append(lean(x, step, text, held) if shortcuts else model(x, torch.full((1, 1), step), text, cache=held))
        if shortcuts:
            lean.fill(latents(chunk), text, held)
        else:
            model(latents(chunk), torch.zeros(1, 1), text, cache=held)
    return torch.cat(flows, 1)


@pytest.mark.parametrize("shortcuts", CASES, ids=["none", *HERE, "all"])
@torch.no_grad()
def test_streaming_passes_are_those_of_the_plain_network(shortcuts: Shortcuts) -> None:
    model = made()
    assert distance(streamed(model, shortcuts), streamed(model, None)) <= 1e-6
    x, text = latents(0), model.text_kv(TEXT)
    assert distance(LeanDiT(model, shortcuts)(x, 250.0, text, None), model(x, torch.full((1, 1), 250.0), text)) <= 1e-6


@torch.no_grad()
def test_the_frame_rate_counts_here_too() -> None:
    wanted = {fps: streamed(made(replace(CFG, fps=fps)), None) for fps in (16, 24)}
    assert distance(streamed(made(replace(CFG, fps=24)), Shortcuts()), wanted[24]) <= 1e-6
    assert distance(wanted[16], wanted[24]) > 1e-3


@pytest.mark.parametrize("islands", [False, True])
@torch.no_grad()
def test_in_bfloat16_the_shortcuts_are_as_near_to_float32_as_the_plain_network(islands: bool) -> None:
    rounded = made(replace(CFG, islands=islands), torch.bfloat16)
    exact = made(replace(CFG, islands=islands), torch.bfloat16)
    exact.store(torch.float32)  # the same rounded weights
    wanted = streamed(exact, None)
    plain, short = (distance(streamed(rounded, shortcuts, torch.bfloat16), wanted) for shortcuts in (None, Shortcuts()))
    assert short <= 1.1 * plain


@torch.no_grad()
def test_the_clean_pass_stops_at_the_last_layers_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self and cross attention of all layers but the last; and what it leaves in the cache is the same."""
    model, calls = made(), list[int]()

    def told(*args: Tensor) -> Tensor:
        calls.append(1)
        return attend(*args)

    monkeypatch.setattr(module, "attend", told)
    held = {short: cache() for short in (False, True)}
    for short, each in held.items():
        calls.clear()
        each.begin(2)
        LeanDiT(model, replace(NONE, context=short)).fill(latents(0), model.text_kv(TEXT), each)
        assert len(calls) == (4 if short else 6)
    for name in ("rotated", "raw", "values"):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(getattr(held[True], name), getattr(held[False], name), strict=True))


@torch.no_grad()
def test_a_timestep_is_embedded_once_per_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(), list[float]()
    own = model.embed_time

    def told(t: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(float(t))
        return own(t)

    monkeypatch.setattr(model, "embed_time", told)
    streamed(model, Shortcuts())
    assert sorted(calls) == [0.0, 437.5, 1000.0]
    calls.clear()
    streamed(model, NONE)
    assert len(calls) == 12


@torch.no_grad()
def test_a_clip_has_the_same_bits_alone_as_beside_others() -> None:
    model = made()
    lean, text = LeanDiT(model, Shortcuts()), model.text_kv(TEXT)
    together = lean(latents(0), 500.0, text, None)
    for i in range(2):
        own = [(k[i : i + 1], v[i : i + 1]) for k, v in text]
        assert torch.equal(lean(latents(0)[i : i + 1], 500.0, own, None), together[i : i + 1])


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"kernels": True}, "'kernels' is for device 'cuda' and this is 'cpu'"),
        ({"graphs": True}, "'graphs' is for device 'cuda' and this is 'cpu'"),
    ],
)
def test_a_shortcut_that_cannot_be_taken_is_an_error(asked: dict[str, bool], told: str) -> None:
    with pytest.raises(UserError, match=told):
        LeanDiT(made(), Shortcuts(**asked))


def test_a_shortcut_without_the_one_that_it_is_built_on_is_an_error(as_on_a_gpu: None) -> None:
    for name, base in module.NEEDS.items():
        with pytest.raises(UserError, match=f"'{name}' is built on '{base}'"):
            LeanDiT(made(), replace(NONE, **{name: True}))


def test_what_is_not_asked_for_is_taken_where_it_is_possible(as_on_a_gpu: None) -> None:
    assert LeanDiT(made(), NONE).taken == []
    assert LeanDiT(made()).taken == [name for name in NAMES if name not in ("kernels", "graphs")]


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is for a GPU alone is taken here too: without one, kernels by Triton's interpreter, recordings by remembering the function."""
    monkeypatch.setattr(module, "ON", {})
    if DEVICE.type != "cuda":
        monkeypatch.setattr(graphs, "Cuda", lambda: remembered)


def remembered(work: Callable[[], Tensor | None]) -> Callable[[], Tensor | None]:
    return work


def clips(cfg: SamplerCfg, lean: LeanDiT, tiny: Tiny, latents: int, prompts: str) -> Tensor:
    """Clips one after the other, so that the second finds what the first has left."""
    made = [
        [chunk.latent_BFCHW for chunk in stream(tiny, tiny.encode_text([prompt]).to(DEVICE), latents, cfg, clip_noise(tiny, [seed]), lean=lean)]
        for seed, prompt in enumerate(prompts)
    ]
    return torch.cat([chunk for clip in made for chunk in clip], 1)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", ["ema_sink", "window"])
def test_recorded_passes_make_the_same_clips(name: str, joint: bool, as_on_a_gpu: None) -> None:
    tiny = Tiny().to(DEVICE)
    caches = {
        "ema_sink": CacheCfg("ema_sink", window=7, sink=2, alpha=0.9, fold_dtype="float32"),
        "window": CacheCfg("window", window=6, rope="absolute"),
    }
    cfg = SamplerCfg((1000, 500, 250), 5.0, cache=caches[name])
    wanted = clips(cfg, LeanDiT(tiny.denoiser, NONE), tiny, 15, "abc")
    lean = LeanDiT(tiny.denoiser, replace(NONE, modulation=True, context=True, graphs=True, joint=joint))
    assert lean.graphs is not None
    assert distance(clips(cfg, lean, tiny, 15, "abc"), wanted) < 1e-6
    recorded = len(lean.graphs.recordings)
    assert distance(clips(cfg, lean, tiny, 15, "abc"), wanted) < 1e-6
    assert len(lean.graphs.recordings) == recorded > 0 and len(lean.caches) == 1
    assert distance(clips(cfg, lean, tiny, 9, "d"), clips(cfg, LeanDiT(tiny.denoiser, NONE), tiny, 9, "d")) < 1e-6
    assert len(lean.caches) == 1, "a shorter clip has the same window, so its passes are recorded already"


def test_a_pass_of_kernels_is_the_plain_one(as_on_a_gpu: None) -> None:
    pytest.importorskip("triton", reason="there is no triton; pip install triton")
    tiny = Tiny(height=2, width=4).to(DEVICE)
    cfg = SamplerCfg((1000,), 5.0, chunk=1, cache=CacheCfg("static_sink", window=2, sink=1))
    lean = LeanDiT(tiny.denoiser, replace(NONE, merged=True, kernels=True, joint=True, context=True))
    assert lean.kernels is not None
    assert distance(clips(cfg, lean, tiny, 3, "a"), clips(cfg, LeanDiT(tiny.denoiser, NONE), tiny, 3, "a")) < 2e-6


def test_a_recording_takes_in_what_changed_and_nothing_else() -> None:
    told, held = list[str](), graphs.Graphs(remembered)
    table = torch.tensor([10.0])

    def work(inputs: Sequence[Tensor]) -> Tensor:
        told.append("")
        return inputs[0] + inputs[1]

    for value in (1.0, 2.0, 3.0, 4.0):
        found = held.run("key", work, [torch.tensor([value])], [table])
        assert found is not None and found.item() == value + 10
    table = torch.tensor([20.0])
    found = held.run("key", work, [torch.tensor([5.0])], [table])
    assert found is not None and found.item() == 25 and len(held.recordings) == 1
