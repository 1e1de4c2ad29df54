"""The DiT for streaming against the DiT for everything else: every shortcut alone, with a cache and without, in float32 and with islands."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rfbench import doctor, proof
from rfbench.attention import attend
from rfbench.backbones.wan import graphs
from rfbench.backbones.wan import lean as module
from rfbench.backbones.wan.dit import DiTCfg, WanDiT
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.cache import CacheShape, KVCache
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.errors import UserError
from rfbench.sampler import clip_noise, stream
from tests.tiny import Remembered, Tiny, distance, normal, recordings

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

    def told(*args: Tensor, by: str | None) -> Tensor:
        calls.append(1)
        return attend(*args, by=by)

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
    model = made().to(DEVICE)
    assert LeanDiT(model, NONE).taken == []
    assert LeanDiT(model).taken == NAMES and not proof.left_out
    for base, built in (("merged", "kernels"), ("modulation", "graphs")):
        assert LeanDiT(model, replace(Shortcuts(), **{base: False})).taken == [name for name in NAMES if name not in (base, built)]


@pytest.fixture(autouse=True)
def nothing_is_left_out() -> Iterator[None]:
    """Verdicts are a process's, and every test is one of its own."""
    yield
    proof.left_out.clear()
    proof._verdicts.clear()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is for a GPU alone is taken here too: without one, kernels by Triton's interpreter, recordings by remembering the function."""
    monkeypatch.setattr(module, "ON", {})
    if DEVICE.type != "cuda":
        monkeypatch.setattr(graphs, "Cuda", Remembered)


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
    recorded = recordings(lean)
    assert distance(clips(cfg, lean, tiny, 15, "abc"), wanted) < 1e-6
    assert recordings(lean) == recorded > 0 and len(lean.caches) == 1 and not proof.left_out
    next(stream(tiny, tiny.encode_text(["a"]).to(DEVICE), 15, cfg, clip_noise(tiny, [0]), lean=lean))  # and nobody wants the rest
    assert distance(clips(cfg, lean, tiny, 9, "d"), clips(cfg, LeanDiT(tiny.denoiser, NONE), tiny, 9, "d")) < 1e-6
    assert recordings(lean) == recorded and len(lean.caches) == 1, "a shorter clip has the same memory, and so has one that was left"


def test_a_pass_of_kernels_is_the_plain_one(as_on_a_gpu: None) -> None:
    pytest.importorskip("triton", reason="there is no triton; pip install triton")
    tiny = Tiny(height=2, width=4).to(DEVICE)
    cfg = SamplerCfg((1000,), 5.0, chunk=1, cache=CacheCfg("static_sink", window=2, sink=1))
    lean = LeanDiT(tiny.denoiser, replace(NONE, merged=True, kernels=True, joint=True, context=True))
    assert set(lean.kernels) == {"place", "modulate", "add_and_modulate", "rms_norm"}
    assert distance(clips(cfg, lean, tiny, 3, "a"), clips(cfg, LeanDiT(tiny.denoiser, NONE), tiny, 3, "a")) < 2e-6


class Held:
    """Memory that a pass adds to, so that it cannot be made twice."""

    def __init__(self) -> None:
        self.total = torch.zeros(1)

    def memory(self) -> list[Tensor]:
        return [self.total]


def test_a_recording_takes_in_what_changed_and_nothing_else() -> None:
    kept, held = graphs.Graphs(Remembered()), Held()
    tables = [torch.tensor([10.0]), torch.tensor([100.0])]

    def run(key: str, value: float) -> float:
        def work(inputs: Sequence[Tensor]) -> Tensor:
            held.total += inputs[0]
            return sum(inputs[1:], inputs[0].clone())

        found = kept.run(held, key, work, [torch.tensor([value])], tables[:1], tables[1:])
        assert found is not None
        return found.item()

    assert [run("key", value) for value in (1.0, 2.0, 3.0, 4.0)] == [111.0, 112.0, 113.0, 114.0]
    tables[0] = torch.tensor([20.0])
    assert run("key", 5.0) == 125 and held.total.item() == 15
    assert [run("another", value) for value in (1.0, 2.0)] == [121.0, 122.0] and held.total.item() == 18
    tables[1] = torch.tensor([200.0])
    assert run("key", 0.0) == 220 and run("another", 1.0) == 221
    (known,) = kept.of.values()
    assert len(known.made) == 2 and len(known.shared) == 1 and held.total.item() == 19


def test_a_recording_lives_as_long_as_the_memory_that_it_writes_to() -> None:
    class Copied(Remembered):
        def record(self, work: graphs.Work) -> graphs.Work:
            result = work()  # a graph knows addresses, and holds nothing
            return lambda: result

    kept, held = graphs.Graphs(Copied()), Held()
    for _ in range(3):
        kept.run(held, "key", lambda inputs: inputs[0] + 1, [torch.ones(1)], [], [])
    assert len(kept.of) == 1
    del held
    assert len(kept.of) == 0


class Forgetful(Remembered):
    """Leaves out what a pass gives, or what it changes."""

    def __init__(self, what: str) -> None:
        self.what = what

    def record(self, work: graphs.Work) -> graphs.Work:
        if self.what == "nothing":
            raise RuntimeError("operation not permitted when stream is capturing")

        def again() -> Tensor | None:
            if self.what == "changes":
                return torch.tensor([[1.0, 2.0]])
            found = work()
            return None if found is None else found * 0 + 3

        return again


@pytest.mark.parametrize(
    ("what", "told"), [("nothing", "RuntimeError: operation not permitted"), ("changes", "other bits"), ("result", "other bits")]
)
def test_a_recording_that_is_off_is_left_out_and_the_passes_are_as_without(what: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work(inputs: Sequence[Tensor]) -> Tensor:
        held.total += 1
        return torch.stack([inputs[0], 2 * inputs[0]], -1)

    for asked in (None, True):
        kept, held = graphs.Graphs(Forgetful(what), asked=asked), Held()
        first = kept.run(held, "key", work, [torch.ones(1)], [], [])
        if asked:
            with pytest.raises(UserError, match=f"'graphs' is asked for, but 'graphs' .*{told}"):
                kept.run(held, "key", work, [torch.ones(1)], [], [])
            continue
        for _ in range(3):
            found = kept.run(held, "key", work, [torch.ones(1)], [], [])
            assert found is not None and first is not None and torch.equal(found, first)
        assert held.total.item() == 4 and told in proof.left_out["graphs"] and capsys.readouterr().err.count("left out") == 1
        assert not kept.of


def test_bits_are_compared_and_not_numbers() -> None:
    nothing = torch.full((2, 3), float("nan"), dtype=torch.bfloat16)
    assert graphs.equal(nothing, nothing.clone()) and graphs.equal(nothing.T, nothing.T.clone())
    assert not graphs.equal(torch.zeros(1), -torch.zeros(1))


def test_clips_are_the_same_where_recordings_are_left_out(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sinks that are folded into: the pass that is compared is not made twice."""
    monkeypatch.setattr(graphs, "Cuda", lambda: Forgetful("result"))
    tiny = Tiny().to(DEVICE)
    cfg = SamplerCfg((1000, 500), 5.0, cache=CacheCfg("ema_sink", window=7, sink=2, alpha=0.9, fold_dtype="float32"))
    shortcuts = replace(Shortcuts(), kernels=False)
    wanted = clips(cfg, LeanDiT(tiny.denoiser, replace(shortcuts, graphs=False)), tiny, 21, "ab")
    lean = LeanDiT(tiny.denoiser, shortcuts)
    assert "graphs" in lean.taken and torch.equal(clips(cfg, lean, tiny, 21, "ab"), wanted)
    assert "graphs" not in lean.taken and "graphs" not in LeanDiT(tiny.denoiser, shortcuts).taken and list(proof.left_out) == ["graphs"]


BROKEN = {  # kernel -> what it is off by
    "place": lambda queries: queries.roll(1, 1),
    "modulate": lambda out: 1.05 * out,
    "add_and_modulate": lambda out: (out[0], out[1] + 0.1),
    "rms_norm": lambda out: out + 0.1,
}


def test_a_doctor_tries_what_has_to_prove_itself(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None)))
    (found, without) = doctor._shortcuts()
    assert found.state == "ok" and "graphs" in found.found and "kernels" not in found.found
    assert (without.name, without.state, without.found) == ("shortcut kernels", "missing", "left out: it needs package triton")
    monkeypatch.undo()
    proof.left_out.clear()
    if DEVICE.type != "cuda":
        (found,) = doctor._shortcuts()
        assert found.found == ", ".join(HERE)


@pytest.mark.parametrize("islands", [False, True])
@pytest.mark.parametrize("name", ["none", *BROKEN])
def test_a_kernel_that_is_off_is_left_out_and_the_others_are_taken(
    name: str, islands: bool, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)
    model = made(replace(CFG, islands=islands), torch.bfloat16).to(DEVICE)
    if name in BROKEN:
        right = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *given, **options: BROKEN[name](right(*given, **options)))
    lean = LeanDiT(model, replace(Shortcuts(), graphs=False))
    assert set(lean.kernels) == set(BROKEN) - {name} and "kernels" in lean.taken
    assert list(proof.left_out) == ([f"kernels.{name}"] if name in BROKEN else [])
    told = capsys.readouterr().err
    assert "is left out: it is" in told if name in BROKEN else not told
    LeanDiT(model, replace(Shortcuts(), graphs=False))
    assert not capsys.readouterr().err, "it is tried once, and said once"
    if name in BROKEN:
        with pytest.raises(UserError, match=f"shortcut 'kernels' is asked for, but 'kernels.{name}' is .* apart from its plain form"):
            LeanDiT(model, replace(Shortcuts(), kernels=True))


def test_kernels_that_do_not_compile_are_left_out(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("rfbench.kernels", reason="there is no triton; pip install triton", exc_type=ImportError)

    def fails(*given: object, **options: object) -> None:
        raise RuntimeError("ptxas died")

    for name in BROKEN:
        monkeypatch.setattr(kernels, name, fails)
    lean = LeanDiT(made().to(DEVICE), replace(Shortcuts(), graphs=False))
    assert not lean.kernels and "kernels" not in lean.taken
    assert proof.left_out == {f"kernels.{name}": "fails with RuntimeError: ptxas died" for name in BROKEN}

    def full(*given: object, **options: object) -> None:
        raise torch.OutOfMemoryError("there is no memory")

    proof._verdicts.clear()
    monkeypatch.setattr(kernels, "place", full)
    with pytest.raises(torch.OutOfMemoryError):  # which is no verdict: another time there may be some
        LeanDiT(made(), replace(Shortcuts(), graphs=False))
    assert not proof._verdicts
