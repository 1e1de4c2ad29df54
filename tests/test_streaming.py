"""The shared sampler against the naive loop, an implementation of its own of every cache policy; and the ladder between them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rfbench import attention, flops, hardware, rungs
from rfbench.backbones.base import Backbone
from rfbench.backbones.toy import ToyBackbone
from rfbench.backbones.wan import graphs, lean
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts, usable
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.naive import naive, possible
from rfbench.sampler import clip_noise, stream
from tests import models
from tests.tiny import Remembered, Tiny, distance, recordings

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


def test_the_ladder_has_one_more_shortcut_on_each_rung_and_then_what_is_approximate(backbone, monkeypatch):
    """Each exact rung is the video of rung 0, and as near to float32 in bfloat16."""
    monkeypatch.setattr(rungs, "ENOUGH", 4)
    cfg = student()
    ways = rungs.ways(backbone, cfg, {"no context": (backbone, dataclasses.replace(cfg, context="last_step"))})
    found = rungs.climb("a red disc moves right", ways, chunks=5, turns=1, peak=lambda way: (0.1, "of a test"))
    names = usable(torch.device("cpu"))
    assert [rung.name for rung in found] == ["naive", "slots", *names, *rungs.EIGHT, "no context"]
    assert set(names) <= {field.name for field in dataclasses.fields(Shortcuts)}
    assert (found[0].ratio, found[0].whole, found[0].error["long"].ratio) == (1.0, 0.0, 1.0)
    assert all(rung.kind == "approximate" and 1e-3 < rung.whole < 0.3 for rung in found[-3:-1])
    for rung in found[:-3]:
        assert max(rung.first, rung.steady, rung.whole) <= 1e-6
        assert rung.verdict != "fail" and set(rung.error) == set(rungs.PLACES)
        assert rung.dit_fps == pytest.approx(12000 / rung.ms) and rung.dit_fps > rung.e2e_fps
        assert rung.share == pytest.approx(rung.tflops / 0.1) and rung.peak_is == "of a test"
        assert rung.tflops == pytest.approx(flops.dit_chunk(backbone, cfg, 4) / rung.ms / 1e9)
    assert found[-1].whole > 1e-3 and not found[-1].error and found[-1].verdict is None
    with pytest.raises(ValueError, match="never gets steady"):
        rungs.climb("a red disc moves right", ways, chunks=4, turns=1, peak=None)


def test_rungs_decode_and_copy_by_their_own_shortcuts(backbone, monkeypatch):
    """Whatever this machine's settings are: rung 0 by none, each later one by those that it has."""
    monkeypatch.setattr(rungs, "usable", lambda device: ["modulation", "kernels", "bytes", "copies"])
    latents, seen = [torch.zeros(1, 3, 8, 6, 8)] * 5, dict[str, set[Any]]()

    class Watched:
        denoiser = backbone.denoiser

        def decoder(self):
            def decode(latent):
                seen.setdefault(way.name, set()).add(hardware.shortcuts())
                return torch.zeros(1, 12, 3, 8, 8)

            return decode

    before = hardware.shortcuts()
    for way in rungs.ways(cast(Backbone, Watched()), student()):
        rungs.decoding_seconds(way, latents)
    assert seen["naive"] == seen["slots"] == {rungs.NONE}
    has = {name: [field for field, on in dataclasses.asdict(*taken).items() if on is not False] for name, taken in seen.items()}
    assert has["modulation"] == ["modulation"] and has["kernels"] == ["modulation", "kernels"]
    assert has["copies"] == has["8-bit products"] == has["8-bit attention"] == ["modulation", "kernels", "bytes", "copies"]
    asks = {name: shortcuts.kernels for name, (shortcuts,) in seen.items()}
    assert asks["kernels"] is True and asks["bytes"] is asks["8-bit products"] is None, "only the kernels' own rung fails with them"
    assert hardware.shortcuts() == before


def test_a_ladder_shows_a_rung_that_is_not_exact(backbone, monkeypatch):
    """A sink that is off by a tenth of the average shows in the latents, and where the error is bounded."""
    monkeypatch.setattr(rungs, "ENOUGH", 4)
    right = student()
    assert right.cache is not None
    wrong = dataclasses.replace(right, cache=dataclasses.replace(right.cache, alpha=0.8))

    def off(b, text, latents, cfg, noise, given):
        return naive(b, text, latents, wrong, noise, given)

    ways = [rungs.Way(name, "exact", run, backbone, right) for name, run in (("right", rungs.reference), ("wrong", off))]
    _, rung = rungs.climb("a red disc moves right", ways, chunks=6, turns=1, peak=None)
    assert rung.first == 0 and rung.whole > 1e-4
    assert rung.error["long"].low > rungs.WITHIN and rung.verdict == "fail"


def test_a_verdict_is_of_the_ratio_and_open_only_where_clips_leave_it_open():
    error = rungs.Error
    told = {
        (1.1, 0.9, 1.3): "pass",
        (1.11, 1.11, 1.11): "fail",
        (1.35, 1.05, 1.7): "undecided",
        (1.19, 0.9, 1.59): "undecided",
        (5.0, 4.0, 6.0): "fail",
    }
    assert {numbers: error(*numbers).verdict for numbers in told} == told
    assert rungs.compared([1.0], [1.0]) == error(1.0, 1.0, 1.0) and rungs.compared([5.0], [1.0]).verdict == "fail", "one clip decides by itself"
    for lost in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            rungs.compared([lost, 1.0], [1.0, 1.0])


def test_another_kernel_of_attention_is_a_rung_of_its_own(backbone, monkeypatch):
    """Before it all pay for torch's choice, as rung 0 does; nothing of it is left behind."""
    asked = list[str]()

    def watched(name: str, kernel: attention.Kernel) -> attention.Kernel:
        def run(*given):
            asked.append(name)
            return kernel(*given)

        return run

    monkeypatch.setattr(attention, "KERNELS", {name: watched(name, kernel) for name, kernel in attention.KERNELS.items()})
    assert "attention" not in [way.name for way in rungs.ways(backbone, student())]
    monkeypatch.setattr(attention, "kernel", lambda device: "math")
    by, text = dict[str, set[str]](), backbone.encode_text(["a red disc"])
    for way in rungs.ways(backbone, student())[:4]:
        rungs.once(way, text, 1)
        by[way.name], asked = set(asked), list[str]()
    assert by == {"naive": set(), "slots": {"torch-sdpa"}, "attention": {"math"}, "modulation": {"math"}}


def test_what_the_plain_loop_cannot_do_has_no_ladder():
    assert possible(student())
    changes: list[dict[str, Any]] = [{"guidance": 2.0}, {"context_noise": 0.1}, {"solver": "euler"}, {"context": "last_step"}]
    assert not any(possible(dataclasses.replace(student(), **change)) for change in changes)


@torch.no_grad()
def test_a_plain_loop_goes_on_from_given_frames(backbone):
    text, cfg = backbone.encode_text(["a red disc moves right"]), student()
    given = torch.randn(1, 9, 8, 6, 8, generator=torch.Generator().manual_seed(0))
    found = torch.cat(list(naive(backbone, text, LATENTS, cfg, clip_noise(backbone, [0]), given)), 1)
    wanted = torch.cat([c.latent_BFCHW for c in stream(backbone, text, LATENTS, cfg, clip_noise(backbone, [0]), initial_BFCHW=given)], 1)
    assert torch.equal(found[:, :9], given) and distance(found, wanted) < 1e-5


@torch.no_grad()
def test_without_a_clean_pass_later_chunks_look_back_at_the_last_step(backbone, monkeypatch):
    """Every chunk's keys and values in the cache are those of its last step: a clean pass with that pass's input and timestep changes nothing."""
    cfg, text, last = dataclasses.replace(student("window"), context="last_step"), backbone.encode_text(["a red disc moves right"]), dict[str, Any]()
    bare = torch.cat([c.latent_BFCHW for c in stream(backbone, text, 12, cfg, clip_noise(backbone, [0]))], 1)
    call = LeanDiT.__call__

    def noted(lean, x, t, *given, **options):
        last.update(x=x, t=t)
        return call(lean, x, t, *given, **options)

    def again(lean, clean, text, cache):
        call(lean, last["x"], last["t"], text, cache, kept=True)

    monkeypatch.setattr(LeanDiT, "__call__", noted)
    monkeypatch.setattr(LeanDiT, "fill", again)
    lean = LeanDiT(backbone.denoiser, Shortcuts(joint=False))
    made = stream(backbone, text, 12, dataclasses.replace(cfg, context="clean"), clip_noise(backbone, [0]), lean=lean)
    assert distance(bare, torch.cat([c.latent_BFCHW for c in made], 1)) < 1e-6


def test_no_rung_records_a_pass_while_it_is_timed(backbone, monkeypatch):
    """Passes are recorded when they come for the second time, and a short clip has most of them once."""
    monkeypatch.setattr(rungs, "off", lambda *given: lambda way: {way.name: {}})
    monkeypatch.setattr(lean, "ON", {})
    monkeypatch.setattr(graphs, "Cuda", Remembered)
    counts, run = list[int](), rungs.streamed(shortcuts := Shortcuts(kernels=False))
    find = LeanDiT.done

    def done(own: LeanDiT, cache: Any) -> None:
        find(own, cache)
        counts.append(recordings(own))

    monkeypatch.setattr(LeanDiT, "done", done)
    cfg = student()
    ways = [rungs.Way("naive", "reference", rungs.reference, backbone, cfg), rungs.Way("graphs", "exact", run, backbone, cfg, shortcuts=shortcuts)]
    rungs.climb("a red disc", ways, chunks=5, turns=2, peak=None)
    assert len(counts) == 4 and 0 < counts[1] == counts[2] == counts[3]


def test_a_rung_that_fails_is_named_and_the_others_are_timed(backbone, monkeypatch):
    """At the first clip or later on; rung 0 must not, and without anybody to name it to no rung may."""
    monkeypatch.setattr(rungs, "ENOUGH", 2)
    cfg, calls = student(), list[int]()

    def fails(*given):
        raise RuntimeError("no such instruction")

    def fails_later(*given):
        calls.append(1)
        return (fails if len(calls) > 1 else rungs.reference)(*given)

    runs = {"naive": rungs.reference, "bad": fails, "worse": fails_later, "good": rungs.streamed(Shortcuts())}
    ways = [rungs.Way(name, "exact", run, backbone, cfg) for name, run in runs.items()]
    broken, rows = dict[str, str](), list[dict[str, Any]]()
    found = rungs.climb("a red disc moves right", ways, chunks=5, turns=2, peak=None, keep=rows.append, broken=broken)
    assert [rung.name for rung in found] == ["naive", "good"] and found[1].verdict != "fail"
    assert broken == dict.fromkeys(["bad", "worse"], "RuntimeError: no such instruction")
    assert [(row["rung"], row["turn"], len(row["seconds"])) for row in rows] == [(name, turn, 2) for turn in (0, 1) for name in ("naive", "good")]
    for steps in ([ways[1]], ways[:2]):
        with pytest.raises(RuntimeError, match="no such instruction"):
            rungs.climb("a red disc moves right", steps, chunks=5, turns=1, peak=None, broken={} if len(steps) == 1 else None)


class Counted(TorchDispatchMode):
    """How many operations there were and how many numbers they made."""

    def __init__(self) -> None:
        super().__init__()
        self.total = [0, 0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.total[0] += 1
        self.total[1] += made.numel() if isinstance(made, torch.Tensor) else 0
        return made


def alive() -> int:
    """Bytes of all tensors that somebody holds."""
    gc.collect()
    stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor}
    return sum(stores.values())


@pytest.mark.parametrize("name", ["ema_sink", "window"])
def test_work_and_memory_of_a_chunk_are_the_same_over_seven_hundred(name: str) -> None:
    """Not about time, which a busy machine takes as it likes: operations, what they make, and what is kept. `profile --chunks 700` measures time."""
    caches = {
        "ema_sink": CacheCfg("ema_sink", window=4, sink=1, alpha=0.9, fold_dtype="float32"),
        "window": CacheCfg("window", window=3, rope="absolute"),
    }
    tiny, cfg = Tiny(height=2, width=2), SamplerCfg((1000,), 5.0, chunk=1, cache=caches[name])
    made = stream(tiny, tiny.encode_text(["a"]), 700, cfg, clip_noise(tiny, [0]), lean=LeanDiT(tiny.denoiser, Shortcuts(untracked=False)))
    work, held = dict[int, list[int]](), dict[int, int]()
    for index in range(700):
        looked = index % 300 >= 90 and index % 300 < 97  # in three places, once all rotations that are remembered at a time are there
        with Counted() if looked else contextlib.nullcontext() as counted:
            next(made)
        if counted is not None:
            work[index], held[index] = counted.total, alive() if index % 300 == 96 else 0
    assert len(work) == 21 and all(work[index] == work[index % 300] for index in work)  # 300 is a multiple of the places that frames go to in turn
    assert len({size for size in held.values() if size}) == 1
