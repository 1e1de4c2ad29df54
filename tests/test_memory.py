"""The memory plan against what torch really allocates on a CPU, what autograd keeps, and numbers that are computed by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rfbench import config, memory
from rfbench.backbones.base import BACKBONES
from rfbench.backbones.wan.dit import DiTCfg
from rfbench.checkpointing import checkpointed
from rfbench.config import CacheCfg, Recipe
from rfbench.errors import UserError
from rfbench.methods.base import Batch
from rfbench.methods.dmd import Dmd
from rfbench.methods.redmd import ReDmd
from rfbench.methods.sid import Sid
from rfbench.reward import videoreward_mq
from rfbench.settings import HOME
from rfbench.train import train
from tests.test_methods import REDMD
from tests.tiny import Tiny

CFG = DiTCfg(dim=96, ffn_dim=384, num_heads=2, num_layers=3, text_dim=16, text_len=16, in_dim=4, out_dim=4, freq_dim=16)
KINDS: dict[str, Any] = {"dmd": Dmd, "redmd": ReDmd, "sid": Sid}


def wide() -> Tiny:
    """Activations that are many times its weights."""
    return Tiny(CFG, height=8, width=12)


def recipe(method: str, *, checkpointing: bool, cache_gradients: Any = "detached") -> Recipe:
    scores = dataclasses.replace(REDMD.scores, cache_gradients=cache_gradients, sid_alpha=1.0 if method == "sid" else None)  # type: ignore[type-var]
    sampler = dataclasses.replace(REDMD.sampler, cache=CacheCfg("ema_sink", 6, 3, 0.5, "float32"))
    reward = REDMD.reward if method == "redmd" else None
    return dataclasses.replace(
        REDMD, method=method, backbone="wide", latents=6, checkpointing=checkpointing, scores=scores, sampler=sampler, reward=reward
    )


@contextlib.contextmanager
def profiled() -> Iterator[list[int]]:
    """A list that gets the most bytes which torch's profiler saw allocated on the CPU at a time."""
    most = list[int]()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield most
    events: Any = profile.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()) if event.name() == "[memory]"]
    most.append(max(itertools.accumulate(sizes)))


def allocated(cfg: Recipe) -> tuple[int, int]:
    """Most bytes allocated at a time in a step on the CPU; and those that autograd holds once the student's loss is there."""
    method = KINDS[cfg.method](cfg, wide(), wide(), critic=wide().denoiser)
    parameters = {weight.untyped_storage().data_ptr() for module in method.modules.values() for weight in module.parameters()}
    for module in method.modules.values():
        for weight in module.parameters():
            weight.grad = torch.zeros_like(weight)
    if cfg.checkpointing:
        for module in (*method.modules.values(), *method.frozen.values()):
            checkpointed(module)
    if cfg.method == "redmd":
        method.reward = lambda pixels, prompts: torch.zeros(len(prompts))
    with profiled() as most:
        losses, _ = method.losses(Batch((0, 1), 0), tuple(method.modules))
        for loss in losses.values():
            loss.backward()
    kept = dict[int, int]()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses, _ = method.losses(Batch((0, 1), 0), ("generator",))
    return most[0], sum(kept.values())


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("dmd", {"checkpointing": False}),
        ("redmd", {"checkpointing": True}),
        pytest.param("dmd", {"checkpointing": True, "cache_gradients": "in_place"}, marks=pytest.mark.slow),
        pytest.param("sid", {"checkpointing": True}, marks=pytest.mark.slow),
    ],
)
def test_a_step_takes_what_it_was_said_to(method: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks, told from one and two, against the profiler's peak within a hundredth; autograd keeps no more than was said to be there."""
    monkeypatch.setitem(BACKBONES, "wide", "tests.test_memory:wide")
    cfg = recipe(method, **changes)
    planned = memory.above(cfg, 2)
    most, kept = allocated(cfg)
    assert max(planned.values()) == pytest.approx(most, rel=0.01)
    assert 0.1 * planned["scores"] < kept < planned["scores"]


@pytest.mark.parametrize(("accumulate", "share", "clips"), [(64, 1, 1), (16, 1, 4), (16, 8, 4), (2, 8, 8)])
def test_a_dry_run_says_whether_it_fits(
    accumulate: int, share: int, clips: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By hand: 1.419e9 weights of the 1.3B model, 2 + 4 + 4 + 8 + 4 bytes of each of the student's in bfloat16 and 4 less of the critic's; 2 of the
    teacher's 14.29e9 and a little for its float32 islands. A step adds what `above` says."""
    monkeypatch.setenv("RFBENCH_TOML", str(HOME / "rfbench.toml"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = list[int]()
    monkeypatch.setattr(memory, "above", lambda cfg, clips: asked.append(clips) or {"rollout": 17 * 2**30, "critic": 5 * 2**30})  # type: ignore[func-returns-value]
    with pytest.raises(UserError, match="lacks"):
        train("wan/reward-forcing", [f"accumulate={accumulate}"], dry_run=True, share=share)
    said = " ".join(capsys.readouterr().err.split())
    assert asked == [clips] and "adds rollout 17.0 GiB, critic 5.0 GiB" in said and "not counted" in said
    if share == 1:
        plan = memory.held(config.load(Recipe, "wan/reward-forcing"))
        assert plan["student"] == pytest.approx(22 * 1.419e9, rel=1e-3) and plan["critic"] * 22 == plan["student"] * 18
        assert plan["teacher"] == pytest.approx(2 * 14.29e9, rel=0.02) and plan["teacher"] > 2 * 14.288e9
        assert plan["autoencoder"] == pytest.approx(2 * 126.9e6, rel=0.01) and plan["reward"] == pytest.approx(2 * 2.21e9, rel=0.02)
        total = sum(plan.values()) / 2**30 + 17
        assert f"{total:.1f} GiB at most" in said and f"h200 leaves {139.8 - total:.1f} GiB" in said and "does not fit h100-pcie (79.2 GiB)" in said


@pytest.mark.parametrize(
    ("input", "patches", "tokens", "copies"), [("as_released", 41 * 24 * 42, 41 * 12 * 21, 1), ("correct", 5 * 24 * 40, 5 * 12 * 20, 2)]
)
def test_the_rewards_pass_is_counted(input: Any, patches: int, tokens: int, copies: int) -> None:
    """By hand, 81 frames of 480x832: all pixels in float32, once or twice; in a block for frames queries and keys in float32, as they are, turned by
    the rotary embedding and in parts, at 1280 a patch; in one for words three rows of 8960 a token. Nothing less, and not twice as much."""
    alive, judge = memory.Alive(), memory.BlankJudge()
    pixels = torch.empty(1, 81, 3, 480, 832, device="meta")
    with alive, memory.flash(), torch.no_grad():
        alive.mark("reward")
        found = videoreward_mq(pixels, ["a red disc"], judge=judge, video_fps=16, input=input, fps=None)  # type: ignore[arg-type]
    assert found.shape == (1,)
    least = max(patches * 1280 * 4 * 6, (tokens + judge.QUESTION) * 8960 * 2 * 3, copies * 81 * 3 * 480 * 832 * 4)
    assert least <= alive.found()["reward"] < 2 * least


def test_room_is_told_of_known_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "not known" in memory.room(1)  # without a GPU or a table of one
    monkeypatch.setenv("RFBENCH_TOML", str(HOME / "rfbench.toml"))
    wanted = ("h200 leaves 79.8 GiB", "a100 leaves 19.2 GiB", "does not fit rtx4090 (23.5 GiB)")
    assert [word in memory.room(60 * 2**30) for word in wanted] == [True] * 3
    assert "does not fit" not in memory.room(2**30) and "leaves" not in memory.room(200 * 2**30)


@pytest.mark.slow
def test_the_recipe_for_one_gpu_of_80_gb_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config.load(Recipe, "wan/reward-forcing-1.3b-teacher")
    total = sum(memory.held(cfg).values()) + max(memory.above(cfg, 1).values())
    assert 70 < total / 2**30 < 78


@pytest.mark.parametrize(
    ("recipe", "left"),
    [
        ("toy/teacher", "not counted: what kernels and the allocator take for themselves"),
        ("toy/reward-forcing", "for themselves, what the reward 'toy_motion' takes"),
        ("wan/self-forcing", "for themselves, the text encoder, which leaves before the first step"),
        ("wan/reward-forcing", "for themselves, the text encoder, which leaves before the first step"),  # VideoReward is counted
    ],
)
def test_only_what_a_recipe_has_is_named_as_not_counted(recipe: str, left: str) -> None:
    assert memory.beside(config.load(Recipe, recipe)).endswith(left)
