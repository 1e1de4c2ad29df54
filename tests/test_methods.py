"""Training objectives against hand-computed cases: perfect predictors, known gradients, weights, and whose turn it is."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rfbench.backbones.wan.dit import block_causal_mask
from rfbench.config import CacheCfg, DataCfg, OptimCfg, Recipe, RewardCfg, RolloutCfg, SamplerCfg, ScoreCfg, WeightsCfg
from rfbench.data import ClipDraws, ClipStore, draw_clips, draw_prompts
from rfbench.methods.base import METHODS, Batch, Draws
from rfbench.methods.dmd import Dmd, matching_gradient, matching_loss, score_timesteps
from rfbench.methods.flow import FlowMatching
from rfbench.methods.ode import OdeRegression, regression, solve
from rfbench.methods.redmd import ReDmd, effective_share
from rfbench.methods.sid import Sid, identity_error
from rfbench.registry import pick
from rfbench.sampler import timesteps
from rfbench.schedule import Schedule, flow_to_x0
from rfbench.world import parse
from tests.tiny import Tiny, distance, normal, observe

OPTIM = OptimCfg(1e-3)
TEACHER = SamplerCfg(8, 5.0, chunk=None, solver="euler", guidance=2.0)
STUDENT = SamplerCfg((1000, 750, 500, 250), 5.0, chunk=3, cache=CacheCfg("window", window=6))
SCORES = ScoreCfg(WeightsCfg("x"), guidance=2.0, generator_every=3, critic_optim=OPTIM, score_shift=8.0)
FLOW = Recipe("flow", "flow", "tiny", 1, 2, 6, OPTIM, DataCfg(clips=2, drop_caption=0.5), TEACHER)
DMD = Recipe("dmd", "dmd", "tiny", 1, 2, 6, OPTIM, DataCfg(), STUDENT, scores=SCORES)
REDMD = replace(DMD, method="redmd", reward=RewardCfg("toy_motion", beta=0.5))
SID = replace(DMD, method="sid", scores=replace(SCORES, sid_alpha=1.2))
BATCH = Batch((11, 22), shared=5)


class Trajectories:
    """Two of them, in memory."""

    timesteps = timesteps(STUDENT)
    path_NSFCHW = normal(2, 5, 6, 3, 4, 6)

    def pick(self, draws: ClipDraws) -> tuple[Tensor, list[str]]:
        index = draws.integers(2)
        return self.path_NSFCHW[index], [("a red disc", "a blue square moves up")[number] for number in index]


class Knowing(nn.Module):
    """Predicts exactly the flow to one clip that it knows, whatever the noise; has a weight that changes nothing."""

    def __init__(self, x0_FCHW: Tensor, cfg: Any) -> None:
        super().__init__()
        self.x0_FCHW, self.cfg, self.weight = x0_FCHW, cfg, nn.Parameter(torch.zeros(1))

    def forward(self, x_BFCHW: Tensor, t_BF: Tensor, text: Any, **options: Any) -> Tensor:
        sigma = (t_BF.double() / 1000)[..., None, None, None]
        return ((x_BFCHW - self.x0_FCHW) / sigma).float() + self.weight


def knowing(x0_FCHW: Tensor) -> Tiny:
    tiny = Tiny()
    tiny.denoiser = Knowing(x0_FCHW, tiny.denoiser.cfg)  # type: ignore[assignment]
    return tiny


def store(clips: int = 2) -> ClipStore:
    return ClipStore(normal(clips, 6, 3, 4, 6), ("a red disc", "a blue square moves up")[:clips])


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


@pytest.mark.parametrize("method", ["flow", "ode", "dmd"])
def test_what_is_shown_goes_to_where_the_network_is(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clips and pairs are on the CPU, as they come from files; networks are elsewhere."""
    student, teacher, seen = Tiny().to("meta"), Tiny(seed=1).to("meta"), set[str]()
    encode = student.encode_text
    monkeypatch.setattr(student, "encode_text", lambda prompts: encode(prompts).to("meta"))
    monkeypatch.setattr(teacher, "encode_text", student.encode_text)
    call = student.denoiser.forward

    def heard(*given: Any, **how: Any) -> Tensor:
        seen.update(value.device.type for value in (*given, *how.values()) if isinstance(value, Tensor))
        return call(*given, **how)

    monkeypatch.setattr(student.denoiser, "forward", heard)
    if method == "dmd":
        objective: Any = Dmd(replace(DMD, rollout=RolloutCfg(student="diffusion_forced")), student, teacher, clips=store().pick)
    else:
        objective = FlowMatching(FLOW, student, store()) if method == "flow" else OdeRegression(replace(DMD, method="ode"), student, Trajectories())
    with contextlib.suppress(NotImplementedError):  # frames are picked by a tensor without contents, once the network was called
        objective.losses(BATCH, objective.turns(0))
    assert seen == {"meta"}


def test_methods_are_found_by_name() -> None:
    kinds = [pick(METHODS, name, what="method") for name in METHODS]
    assert kinds == [FlowMatching, OdeRegression, Dmd, ReDmd, Sid]


def test_a_batch_splits_into_equal_parts_that_share_what_all_share() -> None:
    parts = Batch((1, 2, 3, 4), shared=9).split(2)
    assert parts == [Batch((1, 2), 9), Batch((3, 4), 9)]


def test_a_clip_draws_the_same_in_any_batch() -> None:
    shape = Tiny().shape

    def draws(seeds: list[int]) -> list[Tensor]:
        draw = Draws(shape, seeds)
        return [draw(3), draw.uniform(), torch.tensor(draw.integers(1000)), draw(1)]

    together = draws([5, 2**61, 5])
    for i, seed in enumerate((5, 2**61, 5)):
        assert all(torch.equal(alone[0], many[i]) for alone, many in zip(draws([seed]), together, strict=True))
    assert not torch.equal(together[0][0], together[0][1])
    assert draw_prompts([3, 4]) == [draw_prompts([3])[0], draw_prompts([4])[0]]
    assert [str(parse(prompt)) for prompt in draw_prompts(range(20))] == draw_prompts(range(20))


@pytest.mark.parametrize("method", ["flow", "ode", "dmd", "redmd", "sid", "causvid"])
def test_a_split_batch_has_the_gradient_of_the_whole(method: str) -> None:
    """Mean of the micro-batches' gradients: nothing about a clip depends on how the batch was cut."""
    batch = Batch((11, 22, 33, 44), shared=5)
    found = {}
    for parts in (1, 2, 4):
        tiny = Tiny()
        objective = make(method, tiny)
        turns = objective.turns(0)
        for part in batch.split(parts):
            losses, _ = objective.losses(part, turns)
            assert losses.keys() == set(turns)
            for loss in losses.values():
                (loss / parts).backward()
        found[parts] = {role: gradients(module) for role, module in objective.modules.items()}
    for parts in (2, 4):
        for role, whole in found[1].items():
            assert distance(found[parts][role], whole) < 1e-4, role


def make(method: str, tiny: Tiny) -> Any:
    if method == "flow":
        return FlowMatching(FLOW, tiny, store())
    if method == "ode":
        return OdeRegression(replace(FLOW, method="ode", sampler=STUDENT), tiny, Trajectories())
    if method == "sid":
        return Sid(SID, tiny, Tiny(seed=1))
    if method == "causvid":
        return Dmd(DMD, tiny, Tiny(seed=1), clips=store().pick)
    return (ReDmd if method == "redmd" else Dmd)(REDMD if method == "redmd" else DMD, tiny, Tiny(seed=1))


@torch.no_grad()
def test_flow_matching_is_zero_for_a_perfect_predictor_and_known_for_a_silent_one() -> None:
    flat = torch.full((1, 6, 3, 4, 6), 0.7)
    clips = ClipStore(flat, ("a red disc",))
    losses, stats = FlowMatching(FLOW, knowing(flat[0]), clips).losses(BATCH, ("generator",))
    assert float(losses["generator"]) < 1e-8
    silent = Tiny()
    nn.init.zeros_(silent.denoiser.head.head.weight)
    nn.init.zeros_(silent.denoiser.head.head.bias)
    losses, stats = FlowMatching(FLOW, silent, clips).losses(Batch(tuple(range(64)), 0), ("generator",))
    assert float(losses["generator"]) == pytest.approx(1 + 0.7**2, abs=0.05)  # variance of noise - x0
    assert stats["loss"].shape == (64,) and float(stats["loss"].mean()) == pytest.approx(float(losses["generator"]), rel=1e-5)


def test_captions_are_dropped_as_often_as_asked() -> None:
    seen: list[str] = []

    class Listening(Tiny):
        def encode_text(self, prompts: Any) -> Tensor:
            seen.extend(prompts)
            return super().encode_text(prompts)

    for share in (0.0, 0.25, 1.0):
        seen.clear()
        recipe = replace(FLOW, data=DataCfg(clips=2, drop_caption=share))
        FlowMatching(recipe, Listening(), store()).losses(Batch(tuple(range(200)), 0), ("generator",))
        assert seen.count("") / 200 == pytest.approx(share, abs=0.08)
        assert set(seen) - {""} <= set(store().captions)


def test_clips_are_picked_with_their_captions() -> None:
    clips = store()
    picked, captions = clips.pick(Draws(Tiny().shape, range(50)))
    assert all(torch.equal(clip, clips.latent_NFCHW[clips.captions.index(caption)]) for clip, caption in zip(picked, captions, strict=True))
    assert 10 < captions.count("a red disc") < 40


def test_drawn_clips_do_not_depend_on_how_many_are_encoded_at_a_time() -> None:
    def first_frames(pixel_BTCHW: Tensor) -> Tensor:
        return pixel_BTCHW[:, :1, :, ::12, ::12]

    found = draw_clips(first_frames, seed=3, count=5, frames=2)
    assert len(found.captions) == 5 and found.latent_NFCHW.shape == (5, 1, 3, 4, 6)
    again = draw_clips(first_frames, seed=3, count=5, frames=2)
    assert torch.equal(found.latent_NFCHW, again.latent_NFCHW) and found.captions == again.captions
    assert draw_clips(first_frames, seed=4, count=5, frames=2).captions != found.captions


@torch.no_grad()
def test_ode_regression_is_zero_where_trajectories_end_and_counts_frames_on_the_way() -> None:
    end = normal(6, 3, 4, 6, seed=3)
    path = torch.stack([normal(6, 3, 4, 6, seed=4), normal(6, 3, 4, 6, seed=5), end])[None].expand(2, -1, -1, -1, -1, -1)
    schedule, kept = Schedule(5.0), torch.tensor([*Schedule(5.0).warp((1000, 500)), 0.0], dtype=torch.float64)
    mask = block_causal_mask(6, 6, 3, None, torch.device("cpu"))
    index = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 2, 2, 2]])
    tiny = knowing(end)
    text = tiny.encode_text(["", ""])
    loss, x0 = regression(tiny, path, index, text, kept, schedule, mask)
    wanted = index != 2  # at timestep 0 nothing is left to learn
    assert float(loss) < 1e-8 and distance(x0[wanted], path[:, -1][wanted]) < 1e-5
    off = path.clone()
    off[0, -1, :3] += 2.0  # a quarter of all frames, a third of those that count
    assert float(regression(tiny, off, index, text, kept, schedule, mask)[0]) == pytest.approx(4 / 3, rel=1e-4)
    off = path.clone()
    off[1, -1, 3:] += 2.0
    assert float(regression(tiny, off, index, text, kept, schedule, mask)[0]) < 1e-8


@torch.no_grad()
def test_ode_pairs_are_what_the_teachers_sampler_passes() -> None:
    """Against a plain Euler loop; the student's timesteps are every second one of the solver's eight."""
    tiny, seeds = Tiny(), [7, 8, 9]
    path, captions = solve(tiny, STUDENT, TEACHER, latents=3, seeds=seeds)
    assert path.shape == (3, 5, 3, 3, 4, 6) and captions == draw_prompts(seeds)
    x, grid = Draws(tiny.shape, seeds)(3), timesteps(TEACHER)
    text, null = tiny.encode_text(captions), tiny.encode_text([""] * 3)
    for number, t in enumerate(grid):
        if number % 2 == 0:
            assert distance(path[:, number // 2], x) < 1e-5
            assert timesteps(STUDENT)[number // 2] == pytest.approx(t)
        time = torch.tensor([[t]])
        flow = 2 * tiny.denoiser(x, time, text) - tiny.denoiser(x, time, null)
        x = x + flow * ((grid[number + 1] if number < 7 else 0.0) - t) / 1000
    assert distance(path[:, -1], x) < 1e-5


def test_a_diffusion_forced_student_is_shown_chunks_at_its_own_timesteps() -> None:
    """Each chunk is a given clip's, noised as far as its timestep says, by noise of its own; all clips of many seeds together see every timestep."""
    clean = 3 * torch.ones(1, 6, 3, 4, 6)
    student, seen = Tiny(), list[tuple[Tensor, Tensor]]()
    student.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[:2]))
    objective = Dmd(replace(DMD, batch=64), student, Tiny(seed=1), clips=lambda draws: (clean[[0] * len(draws.integers(1))], ["a red disc"] * 64))
    losses, stats = objective.losses(Batch(tuple(range(64)), 0), ("generator", "critic"))
    ((noisy, t_BF),) = seen
    chunks = t_BF.view(64, 2, 3)
    assert (chunks == chunks[:, :, :1]).all()
    sigmas = {1000: 1.0, 937.5: 0.9375, 2500 / 3: 5 / 6, 625: 0.625, 0: 0.0}
    assert sorted({round(float(t), 3) for t in t_BF.flatten()}) == sorted(round(t, 3) for t in sigmas)
    for t, sigma in sigmas.items():
        frames = noisy[(t_BF - t).abs() < 1e-3]
        assert float(frames.mean()) == pytest.approx(3 * (1 - sigma), abs=0.1)
        assert float(frames.std(correction=0)) == pytest.approx(sigma, abs=0.05)
    losses["generator"].backward()
    assert student.denoiser.patch_embedding.weight.grad is not None and stats["loss"].shape == stats["critic_loss"].shape == (64,)


@pytest.mark.parametrize("window", [6, 9])
def test_a_teacher_forced_student_has_clean_chunks_before_each_noisy_one(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk against one pass over the clean frames before it and itself, under a dense mask and without a cache; so are the gradients."""
    clean, student, seen = normal(2, 9, 3, 4, 6, seed=4), Tiny(), list[tuple[Tensor, Tensor]]()
    sampler = replace(STUDENT, cache=CacheCfg("window", window=window, rope="absolute"))
    recipe = replace(DMD, latents=9, sampler=sampler, rollout=RolloutCfg(student="teacher_forced"))
    objective = Dmd(recipe, student, Tiny(seed=1), clips=lambda draws: (clean[: len(draws.integers(1))], ["a red disc", "a blue square"]))
    call = student.denoiser.forward

    def heard(x_BFCHW: Tensor, t_BF: Tensor, text: Any, **how: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((x_BFCHW, t_BF))
        return call(x_BFCHW, t_BF, text, **how)

    with monkeypatch.context() as patch:
        patch.setattr(student.denoiser, "forward", heard)
        video, _, _, text, _ = objective._forced(BATCH, objective.clips)  # type: ignore[arg-type]
    assert len(seen) == 3 and len({float(t) for _, t_BF in seen for t in t_BF.flatten()} - {0.0}) > 1 and all((t_BF > 0).all() for _, t_BF in seen)
    mask, wanted = block_causal_mask(9, 6, 3, window, torch.device("cpu")), []
    for number, (noisy, t_BF) in enumerate(seen):
        start, tokens = 3 * number, 6 * 3 * (number + 1)
        clip, times = torch.cat([clean[:, :start], noisy], 1), torch.cat([torch.zeros(2, start), t_BF], 1)
        flow = call(clip, times, text, mask_SS=mask[:tokens, :tokens])[:, start:]
        wanted.append(flow_to_x0(flow, noisy, objective.schedule.sigma(t_BF)))
    assert distance(video.detach(), torch.cat(wanted, 1).detach()) < 1e-5
    head = student.denoiser.head.head.weight  # nothing of it is behind what is cached
    ours, theirs = (torch.autograd.grad(found.square().mean(), head)[0] for found in (video, torch.cat(wanted, 1)))
    assert distance(ours, theirs) < 1e-5


def test_score_identity_has_the_derivative_of_its_closed_form() -> None:
    """With scores that are multiples of the clip the error is a multiple of its square over a scale that counts as a number."""
    video = normal(2, 3, 3, 2, 2).double().requires_grad_()
    a, b, alpha = 0.3, 0.8, 1.2
    error = identity_error(video, a * video, b * video, alpha)
    scale = ((1 - a) * video).detach().abs().mean((1, 2, 3, 4), keepdim=True)
    factor = (a - b) * ((a - 1) - alpha * (a - b)) / scale
    assert distance(error.detach(), factor * video.detach() ** 2) < 1e-12
    (found,) = torch.autograd.grad(error.sum(), video)
    assert distance(found, 2 * factor * video.detach()) < 1e-12


def test_score_identity_trains_the_student_through_scores_that_stay_as_they_are() -> None:
    objective = make("sid", Tiny())
    losses, _ = objective.losses(BATCH, ("generator", "critic"))
    losses["generator"].backward()
    assert all(parameter.grad is None for module in (objective.critic, objective.teacher.denoiser) for parameter in module.parameters())
    assert any(gradient.abs().max() > 0 for gradient in gradients(objective.modules["generator"]))
    losses["critic"].backward()
    assert all(parameter.requires_grad for parameter in objective.critic.parameters())
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in objective.critic.parameters())


def test_score_timesteps_are_shifted_and_clamped() -> None:
    t = score_timesteps(torch.tensor([0.0, 0.5, 0.999999], dtype=torch.float64), 5.0, SCORES)
    assert t.tolist() == pytest.approx([20, 1000 * 2.5 / 3, 980])


def test_the_matching_gradient_points_from_the_teachers_clip_to_the_critics() -> None:
    video, real, fake = (normal(2, 3, 3, 2, 2, seed=seed) for seed in range(3))
    found = matching_gradient(video, real, fake)
    for b in range(2):
        assert distance(found[b], (fake[b] - real[b]) / (video[b] - real[b]).abs().mean()) < 1e-6
    assert not matching_gradient(video, real, real).any()
    assert not matching_gradient(video, video, video).any()
    assert distance(matching_gradient(3 * video, 3 * real, 3 * fake), found) < 1e-6
    broken = real.clone()
    broken[0, 0, 0, 0, 0] = float("nan")
    assert matching_gradient(video, broken, fake)[0].isnan().any()  # not mistaken for agreement


@settings(max_examples=20)
@given(st.integers(0, 1000), st.booleans())
def test_the_matching_loss_has_the_given_derivative(seed: int, masked: bool) -> None:
    video = normal(2, 4, 3, 2, 2, seed=seed).requires_grad_()
    gradient = normal(2, 4, 3, 2, 2, seed=seed + 1)
    mask = torch.tensor([[0.0, 1, 1, 1], [0, 0, 1, 1]]) if masked else torch.ones(2, 4)
    loss = matching_loss(video, gradient, mask if masked else None)
    assert loss.shape == (2,) and loss.dtype == torch.float64
    (found,) = torch.autograd.grad(loss.sum(), video)
    frames = mask[..., None, None, None]
    assert distance(found, gradient * frames / (mask.sum(1)[:, None, None, None, None] * 12)) < 1e-6
    wanted = 0.5 * (gradient.double().square() * frames).sum((1, 2, 3, 4)) / (12 * mask.sum(1))
    assert torch.allclose(loss, wanted, rtol=1e-5)


def test_nothing_is_to_be_learnt_from_a_critic_that_agrees_with_the_teacher() -> None:
    method = Dmd(replace(DMD, scores=replace(SCORES, guidance=1.0)), Tiny(), Tiny(seed=1))
    losses, stats = method.losses(BATCH, ("generator", "critic"))
    losses["generator"].backward()
    assert losses["generator"].item() == 0 and not gradients(method.modules["generator"]).any()
    assert losses["critic"].item() > 0.1 and not stats["matching_gradient"].any()


def test_each_loss_reaches_its_own_module_alone() -> None:
    student, teacher = Tiny(), Tiny(seed=1)
    method = Dmd(DMD, student, teacher)
    assert method.modules["critic"] is not teacher.denoiser
    losses, _ = method.losses(BATCH, ("generator", "critic"))
    losses["generator"].backward()
    assert all(parameter.grad is not None for parameter in method.modules["generator"].parameters())
    assert all(parameter.grad is None for parameter in (*method.modules["critic"].parameters(), *teacher.parameters()))
    method.modules["generator"].zero_grad(set_to_none=True)
    losses, _ = method.losses(BATCH, ("critic",))
    assert losses.keys() == {"critic"}
    losses["critic"].backward()
    assert all(parameter.grad is not None for parameter in method.modules["critic"].parameters())
    assert all(parameter.grad is None for parameter in (*method.modules["generator"].parameters(), *teacher.parameters()))


@torch.no_grad()
def test_the_critic_is_right_about_a_clip_it_knows() -> None:
    """Up to the two sigma tables of the release (D-33): with equal shifts exactly, else nearly."""
    video, noise = normal(1, 6, 3, 4, 6, seed=1).expand(2, -1, -1, -1, -1), normal(2, 6, 3, 4, 6, seed=2)
    for shift, limit in ((5.0, 1e-5), (8.0, 1e-3)):
        method = Dmd(replace(DMD, scores=replace(SCORES, score_shift=shift)), Tiny(), Tiny(seed=1))
        method.critic = knowing(video[0]).denoiser
        t = Schedule(5.0).timesteps[[100, 800]]
        error = method.critic_error(video, noise, t, torch.zeros(2, 4, 8))
        assert error.shape == (2,) and float(error.max()) < limit
        assert float(method.critic_error(video + 1, noise, t, torch.zeros(2, 4, 8)).min()) > 0.5


@pytest.mark.parametrize("every", [1, 3, 5])
def test_the_generator_has_every_nth_turn_and_the_critic_each(every: int) -> None:
    method = Dmd(replace(DMD, scores=replace(SCORES, generator_every=every)), Tiny(), Tiny(seed=1))
    turns = [method.turns(step) for step in range(15)]
    assert [step for step, turn in enumerate(turns) if "generator" in turn] == list(range(0, 15, every))
    assert all("critic" in turn for turn in turns)


def generator_gradient(method: Dmd, batch: Batch) -> Tensor:
    losses, _ = method.losses(batch, ("generator",))
    losses["generator"].backward()
    return gradients(method.modules["generator"])


def test_a_clips_gradient_is_weighted_by_the_exponential_of_its_reward() -> None:
    """Re-DMD's gradient against DMD's of each clip alone."""
    rewards = {11: 0.3, 22: -0.7}
    alone = {seed: generator_gradient(Dmd(DMD, Tiny(), Tiny(seed=1)), Batch((seed,), shared=5)) for seed in rewards}
    method = ReDmd(REDMD, Tiny(), Tiny(seed=1))
    asked: list[Any] = []

    def reward(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
        asked.append((tuple(pixel_BTCHW.shape), prompts, pixel_BTCHW.requires_grad))
        return torch.tensor(list(rewards.values()))

    method.reward = reward
    wanted = sum(math.exp(rewards[seed] / 0.5) * alone[seed] for seed in rewards) / 2
    assert isinstance(wanted, Tensor)
    assert distance(generator_gradient(method, BATCH), wanted) < 1e-4
    assert asked == [((2, 21, 3, 4, 6), draw_prompts(BATCH.seeds), False)]


def test_weights_may_be_limited_and_are_logged() -> None:
    method = ReDmd(replace(REDMD, reward=RewardCfg("toy_motion", beta=0.5, clip=3.0)), Tiny(), Tiny(seed=1))
    method.reward = lambda pixels, prompts: torch.tensor([0.1, 2.0])
    weight, stats = method.weights(normal(2, 6, 3, 4, 6), ["", ""])
    assert weight.tolist() == pytest.approx([math.exp(0.2), 3.0])
    assert stats["reward"].tolist() == pytest.approx([0.1, 2.0]) and torch.equal(stats["weight"], weight)
    _, stats = method.losses(BATCH, ("generator", "critic"))
    assert stats.keys() == {"reward", "weight", "loss", "matching_gradient", "timestep", "critic_loss", "critic_timestep"}
    assert all(value.shape == (2,) and not value.requires_grad for value in stats.values())


@settings(max_examples=50)
@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=12))
def test_the_effective_share_is_kishs(weights: list[float]) -> None:
    share = effective_share(torch.tensor(weights, dtype=torch.float64))
    assert share == pytest.approx(sum(weights) ** 2 / len(weights) / sum(w * w for w in weights), rel=1e-9)
    assert 1 / len(weights) - 1e-12 <= share <= 1 + 1e-12


def test_the_effective_share_at_its_ends() -> None:
    assert effective_share(torch.full((5,), 3.0)) == pytest.approx(1)
    assert effective_share(torch.tensor([1e9, 0, 0, 0])) == pytest.approx(0.25)


@torch.no_grad()
def test_all_clips_of_a_step_exit_at_the_step_that_is_drawn_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in passes of the student; over several draws every step has its turn."""
    exits, seen = [], list[float]()
    observe(monkeypatch, lambda x, t, cache, flow: seen.append(t))
    for shared in range(16):
        method = Dmd(DMD, Tiny(), Tiny(seed=1))
        for seeds in ((1,), (2, 3)):
            seen.clear()
            method.losses(Batch(seeds, shared), ("critic",))
            noisy = [t for t in seen if t > 0]
            assert noisy == 2 * noisy[: len(noisy) // 2]
            exits.append(len(noisy) // 2 - 1)
        assert exits[-1] == exits[-2]
    assert set(exits) == {0, 1, 2, 3}


def test_of_a_long_rollout_the_score_models_judge_the_end_with_a_first_frame_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 latent frames, judged as 6: the last 5, and before them what the encoder makes of the pixels before."""
    recipe = replace(DMD, latents=12, scores=replace(SCORES, latents=6))
    method, seen, made = Dmd(recipe, Tiny(), Tiny(seed=1)), dict[str, Tensor](), list[Tensor]()
    judged, scores = method.judged, method.scores

    def record_rollout(video: Tensor) -> tuple[Tensor, Tensor | None]:
        video.retain_grad()
        made.append(video)
        return judged(video)

    def record_scores(video: Tensor, noise: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        seen["video"], seen["noise"] = video, noise
        return scores(video, noise, *rest)

    monkeypatch.setattr(method, "judged", record_rollout)
    monkeypatch.setattr(method, "scores", record_scores)
    losses, _ = method.losses(BATCH, ("generator", "critic"))
    losses["generator"].backward()
    (rollout,) = made
    assert rollout.shape[1] == 12 and seen["video"].shape == seen["noise"].shape == (2, 6, 3, 4, 6)
    assert torch.equal(seen["video"][:, 1:], rollout[:, 7:])
    assert torch.equal(seen["video"][:, 0], rollout[:, 6].clamp(-1, 1))  # Tiny's pixels are latents within -1 and 1
    assert rollout.grad is not None
    assert not rollout.grad[:, :9].any() and rollout.grad[:, 9:].abs().amin((1, 2, 3, 4)).gt(0).any()  # the first chunk of six is left out


def test_a_rollout_that_fits_is_judged_as_it_is() -> None:
    method, video = Dmd(DMD, Tiny(), Tiny(seed=1)), normal(2, 6, 3, 4, 6)
    clip, mask = method.judged(video)
    assert clip is video and mask is None


def test_cached_keys_may_carry_gradients_and_the_loss_is_the_same() -> None:
    found = {}
    for kind in ("detached", "in_place"):
        recipe = replace(DMD, scores=replace(SCORES, cache_gradients=kind))
        method = Dmd(recipe, Tiny(), Tiny(seed=1))
        losses, _ = method.losses(BATCH, ("generator",))
        losses["generator"].backward()
        found[kind] = (losses["generator"].detach(), gradients(method.modules["generator"]))
    assert distance(found["in_place"][0], found["detached"][0]) < 1e-6
    assert distance(found["in_place"][1], found["detached"][1]) > 1e-2
