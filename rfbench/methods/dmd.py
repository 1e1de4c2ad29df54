"""Distribution matching distillation of a streaming student (DMD in Self Forcing's form).

The student rolls a clip out through the shared sampler; the gradient on the clip is the difference of two score models, a
frozen teacher and a critic that learns the student's distribution by flow matching between the student's steps. A student
that is forced rolls nothing out: it denoises noised chunks of given clips (CausVid, arXiv:2412.07772), behind noisy ones or behind clean ones.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from rfbench.backbones.base import Backbone
from rfbench.backbones.wan.dit import WanDiT
from rfbench.cache import KVCache
from rfbench.config import Recipe, SamplerCfg, ScoreCfg
from rfbench.data import Clips, Prompts, draw_prompts
from rfbench.methods.base import Batch, Draws, chunk_steps, student_mask
from rfbench.phases import phase
from rfbench.sampler import cache_shape, stream, timesteps
from rfbench.schedule import Schedule, add_noise, flow_to_x0, shifted, x0_to_flow


def score_timesteps(raw_B: Tensor, shift: float, cfg: ScoreCfg) -> Tensor:
    """Timestep at which a clip's scores are compared: `raw` in [0, 1) shifted, in [t_min, t_max]: [B]."""
    return (shifted(raw_B, shift) * 1000).clamp(cfg.t_min, cfg.t_max)


def matching_gradient(video_BFCHW: Tensor, real_BFCHW: Tensor, fake_BFCHW: Tensor) -> Tensor:
    """(fake - real) / mean |video - real|, the mean over everything but the batch: the direction away from the data."""
    scale = (video_BFCHW - real_BFCHW).abs().mean((1, 2, 3, 4), keepdim=True)
    return (fake_BFCHW - real_BFCHW) / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def matching_loss(video_BFCHW: Tensor, gradient_BFCHW: Tensor, mask_BF: Tensor | None = None) -> Tensor:
    """Half the mean squared distance to a target one gradient step away, per clip, in float64: [B].

    Its derivative by the clip is the given gradient over the number of elements; frames outside `mask_BF` take no part.
    """
    target = (video_BFCHW.double() - gradient_BFCHW.double()).detach()
    error_BF = 0.5 * (video_BFCHW.double() - target).square().mean((2, 3, 4))
    if mask_BF is None:
        return error_BF.mean(1)
    return (error_BF * mask_BF).sum(1) / mask_BF.sum(1)


def rollout_sampler(recipe: Recipe) -> SamplerCfg:
    """The sampler of training rollouts: the recipe's, but for what it says of rollouts alone."""
    sampler, rollout = recipe.sampler, recipe.rollout
    if rollout is None:
        return sampler
    noise = sampler.context_noise if rollout.context_noise is None else rollout.context_noise
    return dataclasses.replace(sampler, cache=rollout.cache or sampler.cache, context_noise=noise)


Made = tuple[Tensor, Tensor | None, list[str], Tensor, Draws]  # clips, frames that count, prompts, their embeddings, what is left to draw


class Dmd:
    """Student, critic (without one given, a copy of the teacher) and teacher; `weights` is where Re-DMD comes in."""

    def __init__(
        self,
        recipe: Recipe,
        student: Backbone,
        teacher: Backbone,
        *,
        critic: WanDiT | None = None,
        prompts: Prompts = draw_prompts,
        clips: Clips | None = None,
    ) -> None:
        """`clips` are what a forced student is shown; `prompts` what another one is asked for."""
        assert recipe.scores is not None
        self.recipe, self.cfg = recipe, recipe.scores
        self.student, self.teacher, self.prompts, self.clips = student, teacher, prompts, clips
        self.critic = copy.deepcopy(teacher.denoiser) if critic is None else critic
        teacher.denoiser.requires_grad_(False)
        self.modules: dict[str, nn.Module] = {"generator": student.denoiser, "critic": self.critic}
        self.frozen = {"teacher": teacher.denoiser}
        self.schedule = Schedule(recipe.sampler.shift)
        self.score_schedule = Schedule(self.cfg.score_shift)
        self.rollout = rollout_sampler(recipe)
        self.timesteps = timesteps(recipe.sampler)
        self.taught = recipe.rollout is not None and recipe.rollout.student == "teacher_forced"
        self.mask_SS = None if clips is None or self.taught else student_mask(recipe, student)

    def turns(self, step: int) -> tuple[str, ...]:
        return ("generator", "critic") if step % self.cfg.generator_every == 0 else ("critic",)

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if self.cfg.rollouts == "separate" and len(turns) > 1:
            losses, stats = self.losses(batch, ("generator",))
            others, more = self.losses(batch.other(), ("critic",))
            return losses | others, stats | more
        phase("rollout")
        with torch.set_grad_enabled("generator" in turns):
            video, mask_BF, prompts, text, draws = self._streamed(batch, turns) if self.clips is None else self._forced(batch, self.clips)
        losses, stats = dict[str, Tensor](), dict[str, Tensor]()
        if "generator" in turns:
            t_B, noise = self._score_draws(draws), draws(video.shape[1])
            with torch.no_grad():
                weight_B, stats = self.weights(video, prompts)
            phase("scores")
            loss_B, seen = self.student_loss(video, noise, t_B, text, mask_BF)
            losses["generator"] = (weight_B * loss_B).mean()
            stats |= seen | {"loss": loss_B.detach(), "timestep": t_B}
        if "critic" in turns:
            noise, t_B = draws(video.shape[1]), self._score_draws(draws)
            phase("critic")
            error_B = self.critic_error(video.detach(), noise, t_B, text)
            losses["critic"] = error_B.mean()
            stats |= {"critic_loss": error_B.detach(), "critic_timestep": t_B}
        return losses, stats

    def _streamed(self, batch: Batch, turns: tuple[str, ...]) -> Made:
        """Clips that the student streams from noise, all its chunks up to the same step; the gradient is that of this step."""
        prompts = self.prompts(batch.seeds)
        with torch.no_grad():
            text = self.student.encode_text(prompts)
        draws = Draws(self.student.shape, batch.seeds, like=text)
        exit_step = int(torch.randint(len(self.timesteps), (1,), generator=torch.Generator().manual_seed(batch.shared)))
        rollout = stream(
            self.student,
            text,
            self.recipe.latents,
            self.rollout,
            draws,
            exit_step=exit_step,
            grad_from=max(0, self.recipe.latents - self.cfg.latents) if "generator" in turns else None,
            cache_gradients=self.cfg.cache_gradients,
        )
        return *self.judged(torch.cat([chunk.latent_BFCHW for chunk in rollout], dim=1)), prompts, text, draws

    def _forced(self, batch: Batch, clips: Clips) -> Made:
        """What the student takes given clips for, whose chunks are noised to one of its timesteps each, or clean at timestep 0.

        A teacher-forced student has nothing to learn from a chunk that is clean, as it has them all before it.
        """
        draws = Draws(self.student.shape, batch.seeds)
        clean, prompts = clips(draws)
        with torch.no_grad():
            text = self.student.encode_text(prompts)
        draws.like, clean = text, clean.to(text)
        levels = torch.tensor([*self.timesteps, *([] if self.taught else [0.0])], dtype=torch.float64)
        t_BF = levels[chunk_steps(draws, clean.shape[1], self.recipe.sampler.chunk or 1, len(levels))].to(text.device)
        sigma_BF = self.schedule.sigma(t_BF)
        noisy = torch.where((t_BF == 0)[:, :, None, None, None], clean, add_noise(clean, draws(clean.shape[1]), sigma_BF))
        flow = self._behind_clean(noisy, t_BF, text, clean) if self.taught else self.student.denoiser(noisy, t_BF, text, mask_SS=self.mask_SS)
        return flow_to_x0(flow, noisy, sigma_BF), None, prompts, text, draws

    def _behind_clean(self, noisy_BFCHW: Tensor, t_BF: Tensor, text_BLE: Tensor, clean_BFCHW: Tensor) -> Tensor:
        """The student's flow of each noisy chunk with the clean ones before it in the cache that it streams with: [B, F, C, H, W]."""
        model, sampler, flows = self.student.denoiser, self.recipe.sampler, list[Tensor]()
        assert sampler.cache is not None and sampler.chunk is not None
        shape = cache_shape(self.student, len(noisy_BFCHW), noisy_BFCHW.shape[1])
        cache = KVCache(sampler.cache, shape, dtype=text_BLE.dtype, device=text_BLE.device, gradients=self.cfg.cache_gradients)
        for noisy, t, before in zip(
            *(whole.split(sampler.chunk, 1) for whole in (noisy_BFCHW, t_BF, clean_BFCHW.roll(sampler.chunk, 1))), strict=True
        ):
            if flows:
                with torch.no_grad():
                    model(before, torch.zeros_like(t), text_BLE, cache=cache)
            cache.begin(sampler.chunk)
            flows.append(model(noisy, t, text_BLE, cache=cache))
        return torch.cat(flows, 1)

    def student_loss(
        self, video_BFCHW: Tensor, noise_BFCHW: Tensor, t_B: Tensor, text_BLE: Tensor, mask_BF: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's loss of each clip before its weight, [B], and what to log about it; frames outside `mask_BF` take no part."""
        with torch.no_grad():
            gradient = matching_gradient(video_BFCHW, *self.scores(video_BFCHW, noise_BFCHW, t_B, text_BLE))
        return matching_loss(video_BFCHW, gradient, mask_BF), {"matching_gradient": gradient.abs().mean((1, 2, 3, 4))}

    def judged(self, video_BFCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """The part of a rollout that the score models see, and which of its frames take part in the student's loss.

        Of a rollout that is too long for them, the last frames. Their first was made as a later one; the score models get in its
        place what the encoder makes of the last pixel frame before the others, as a clip's first frame. Its chunk is left out of
        the loss (Self Forcing, long rollouts).
        """
        if video_BFCHW.shape[1] <= self.cfg.latents:
            return video_BFCHW, None
        before, last = video_BFCHW[:, : 1 - self.cfg.latents], video_BFCHW[:, 1 - self.cfg.latents :]
        with torch.no_grad():
            first = self.student.encode_pixels(self.student.decoder()(before)[:, -1:])
        mask_BF = torch.ones(len(video_BFCHW), self.cfg.latents, device=video_BFCHW.device)
        mask_BF[:, : self.recipe.sampler.chunk] = 0
        return torch.cat([first, last], 1), mask_BF

    def _score_draws(self, draws: Draws) -> Tensor:
        return score_timesteps(draws.uniform(), self.recipe.sampler.shift, self.cfg)

    def scores(self, video_BFCHW: Tensor, noise_BFCHW: Tensor, t_B: Tensor, text_BLE: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher (with guidance) and the critic (without) take the noised clip for: x0 of both."""
        t_B1 = t_B[:, None]
        noisy = add_noise(video_BFCHW, noise_BFCHW, self.schedule.sigma(t_B1))
        sigma_B1 = self.score_schedule.sigma(t_B1)
        real = flow_to_x0(self.teacher.denoiser(noisy, t_B1, text_BLE), noisy, sigma_B1)
        if self.cfg.guidance != 1.0:
            null = self.teacher.encode_text([self.cfg.negative] * len(text_BLE)).to(text_BLE.device)
            real = real + (self.cfg.guidance - 1) * (real - flow_to_x0(self.teacher.denoiser(noisy, t_B1, null), noisy, sigma_B1))
        return real, flow_to_x0(self.critic(noisy, t_B1, text_BLE), noisy, sigma_B1)

    def weights(self, video_BFCHW: Tensor, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weight of each clip's loss, and what to log about it."""
        return torch.ones(len(video_BFCHW), dtype=torch.float64, device=video_BFCHW.device), {}

    def critic_error(self, video_BFCHW: Tensor, noise_BFCHW: Tensor, t_B: Tensor, text_BLE: Tensor) -> Tensor:
        """Flow matching error of the critic on a clip that the student made, per clip: [B].

        The critic's flow goes to x0 and back through two sigma tables, as in the release (D-33); with equal shifts that changes nothing.
        """
        t_B1 = t_B[:, None]
        sigma_B1 = self.schedule.sigma(t_B1)
        noisy = add_noise(video_BFCHW, noise_BFCHW, sigma_B1)
        x0 = flow_to_x0(self.critic(noisy, t_B1, text_BLE), noisy, self.score_schedule.sigma(t_B1))
        flow = x0_to_flow(x0, noisy, sigma_B1)
        return (flow - (noise_BFCHW - video_BFCHW)).float().square().mean((1, 2, 3, 4))
