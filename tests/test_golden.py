"""The golden vectors of the public reference code: every case of a folder, configured from the case's own JSON.

RFBENCH_GOLDEN names the folder (default: tests/golden, whose README says what lies there), so that cases nobody saw can be run. Each output
must agree to 1e-5 in relative L2 norm, schedules to 1e-6.

What the reference does and nobody would choose has names of its own: gradients through a cache that is written in place (D-34,
`cache_gradients`), a sink that is overwritten (D-12, `mismatch`), empty slots that are attended to (D-37, `empty_sink`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rfbench.backbones.base import Decoder
from rfbench.backbones.wan.dit import DiTCfg, WanDiT, block_causal_mask
from rfbench.backbones.wan.text import UMT5Cfg, embed, load_encoder
from rfbench.backbones.wan.vae import VAECfg, WanDecoder, WanEncoder, WanVAE
from rfbench.cache import CacheShape, Gradients, KVCache
from rfbench.config import CacheCfg, DataCfg, OptimCfg, Recipe, RewardCfg, SamplerCfg, ScoreCfg, WeightsCfg
from rfbench.methods.dmd import Dmd, matching_gradient, matching_loss, score_timesteps
from rfbench.methods.ode import regression
from rfbench.methods.redmd import ReDmd
from rfbench.sampler import stream, timesteps
from rfbench.schedule import Schedule, add_noise, flow_to_x0, x0_to_flow
from rfbench.updates import Updater
from rfbench.videoreward import frames
from rfbench.videoreward.model import CHAT, question
from rfbench.videoreward.network import Tokens, VideoRewardCfg, VideoRewardNet, load_network
from tests.tiny import Tiny, distance, observe

FOLDER = Path(os.environ.get("RFBENCH_GOLDEN", Path(__file__).parent / "golden"))
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A case's JSON and tensors, and the distances that were measured on it."""

    path: Path
    about: dict[str, Any]
    tensors: dict[str, Tensor]
    distances: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def compare(self, name: str, found: Tensor) -> None:
        self.distances[name] = distance(found, self.tensors[name])

    def compare_gradients(self, prefix: str, module: torch.nn.Module) -> None:
        """Gradients of the parameters that the case has, and the norm over all."""
        parameters = dict(module.named_parameters())
        for name in self.tensors:
            if name.startswith(f"out.{prefix}."):
                gradient = parameters[name.removeprefix(f"out.{prefix}.")].grad
                assert gradient is not None, name
                self.compare(name, gradient)
        total = torch.stack([p.grad.double().norm() for p in parameters.values() if p.grad is not None]).norm()
        self.compare(f"out.{prefix}_norm_all_params", total)

    def check(self, tolerance: float = TOLERANCE, leave_out: Iterable[str] = ()) -> None:
        """Everything that was compared is near, and everything that is there was compared."""
        name, worst = max(self.distances.items(), key=lambda item: item[1])
        print(f"{self.path.stem}: largest error {worst:.1e} ({name}), {len(self.distances)} outputs")
        assert not {key: value for key, value in self.distances.items() if not value <= tolerance}
        rest = [key for key in self.tensors if not key.startswith("in.") and key not in self.distances]
        assert not [key for key in rest if not any(re.match(pattern, key) for pattern in leave_out)]

    def model(self, config: str = "config", weights: str | None = None) -> WanDiT:
        """The network of a config, with the weights that the case names. The reference rounds timesteps to float32, which shows in gradients."""
        about = self.about[config]
        names = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "in_dim", "out_dim", "freq_dim", "eps")
        model = WanDiT(DiTCfg(**{name: about[name] for name in names}, patch=tuple(about["patch_size"])))
        file = self.about["weights_files"][weights] if weights else self.about["weights_file"]
        model.load_state_dict({name: tensor.float() for name, tensor in load_file((self.path.parent / file).resolve()).items()})
        model.register_forward_pre_hook(lambda module, args: (args[0], args[1].float(), *args[2:]))
        return model


def cases(kind: str) -> list[Any]:
    """Cases of a letter, or `LETTER:PART` for those with a PART in a tensor's name, as pytest parameters."""
    letter, _, part = kind.partition(":")
    found = []
    for path in sorted(FOLDER.rglob("*.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        if about.get("case") == letter and any(part in name for name in about["tensors"]):
            found.append(pytest.param(path, id=path.stem))
    return found


KINDS = ("A", "B", "C:sigmas", "C:out.latents", "D:in.dmd_noise", "D:in.critic_noise", "D:in.ode_latent", "E", "F", "G")


def test_every_case_is_run_once() -> None:
    run = [parameter.id for kind in KINDS for parameter in cases(kind)]
    known = [path.stem for path in FOLDER.rglob("*.json") if path.parent.name not in ("keys", "weights")]
    assert run
    assert sorted(run) == sorted(known)


def read(path: Path) -> Case:
    return Case(path, json.loads(path.read_text(encoding="utf-8")), load_file(path.with_suffix(".safetensors")))


def backbone(model: WanDiT, height: int, width: int) -> Tiny:
    """The network as a backbone whose text is given as tensors."""
    found = Tiny(model.cfg, height=height, width=width)
    found.denoiser = model
    return found


def cache_cfg(reference: str, about: dict[str, Any], *, held: int, frames: int, chunk: int) -> CacheCfg:
    """The policy that does what a reference does with a buffer of `held` frames and a clip of `frames` in chunks of `chunk`."""
    window, sink, alpha = about["local_attn_size"], about["sink_size"], about.get("ema_alpha")
    if reference in ("Self-Forcing", "sf"):
        if window == -1:
            assert frames <= held
            return CacheCfg("full", rope="absolute")
        if held > window or not sink:  # a sink sits in the buffer, outside the window
            return CacheCfg("window", window=window, rope="absolute")
        return CacheCfg("static_sink", window=window, sink=sink, rope="absolute")
    if window == -1:
        assert frames <= held
        window = held
    if not sink:
        return CacheCfg("window", window=window)
    empty: Any = "attended" if chunk < sink else "ignored"
    if frames > held and reference in ("Reward-Forcing", "rf"):
        assert held == window and alpha is not None
        return CacheCfg("ema_sink", window=window, sink=sink, alpha=alpha, fold_dtype="float32", mismatch="overwrite", empty_sink=empty)
    return CacheCfg("static_sink", window=window, sink=sink, empty_sink=empty)


@pytest.mark.parametrize("path", cases(KINDS[0]))
def test_bidirectional_network(path: Path) -> None:
    case = read(path)
    model, schedule = case.model(), Schedule(case.about["scheduler_shift"])
    noisy, context = case["in.noisy"], case["in.context"]
    with torch.no_grad():
        for name in [name for name in case.tensors if name.startswith("in.t_")]:
            tag, t_BF = name.removeprefix("in.t_"), case[name]
            flow = model(noisy, t_BF[:, :1], context)
            case.compare(f"out.{tag}.flow", flow)
            case.compare(f"out.{tag}.x0", flow_to_x0(flow, noisy, schedule.sigma(t_BF)))
        rows = [text[: int(text.abs().sum(1).nonzero().max()) + 1] for text in context]  # of different lengths, padded again
        padded = torch.nn.utils.rnn.pad_sequence([*rows, torch.zeros(model.cfg.text_len, context.shape[-1])], batch_first=True)[:-1]
        direct = model(noisy, case["in.t_uniform"][:, :1], padded).transpose(1, 2)
    case.compare("out.direct.flow_bcfhw", direct)
    case.compare("out.direct_padded_seq.flow_bcfhw", direct)
    case.check()


@pytest.mark.parametrize("path", cases(KINDS[1]))
def test_streaming_network(path: Path) -> None:
    case = read(path)
    about, chunk, chunks = case.about["variant"], case.about["variant"]["num_frame_per_block"], case.about["variant"]["num_blocks"]
    slots = about["kv_cache_frames"]
    cfg = cache_cfg(case.about["reference"], about, held=slots, frames=chunk * chunks, chunk=chunk)
    assert about["max_attention_frames"] == (slots if cfg.window is None else cfg.window)
    model, noisy, clean = case.model(), case["in.noisy"], case["in.clean"]
    rows, columns = noisy.shape[3] // model.cfg.patch[1], noisy.shape[4] // model.cfg.patch[2]
    shape = CacheShape(model.cfg.num_layers, len(noisy), model.cfg.num_heads, model.cfg.head_dim, rows, columns, slots)
    cache = KVCache(cfg, shape, dtype=torch.float32, device=noisy.device)

    def stored(buffer: Tensor, frames: int) -> Tensor:
        """The first `frames` frames in the order of the reference's buffer: oldest first, zero where nothing is."""
        parts = [buffer.unflatten(1, (-1, cache.tokens))[:, slot] for slot in cache.held[:frames]]
        return torch.cat([*parts, *[torch.zeros_like(parts[0])] * (frames - len(parts))], dim=1)

    flows, clean_flows, sink_k, sink_v, ends = [], [], [], [], []
    with torch.no_grad():
        text = model.text_kv(case["in.context"])
        for start in range(0, chunk * chunks, chunk):
            cache.begin(chunk)
            part = noisy[:, start : start + chunk]
            flows.append(torch.stack([model(part, t.expand(len(part), 1), text, cache=cache) for t in case["in.timesteps"]]))
            time = torch.full((len(part), 1), float(about["context_timestep"]))
            clean_flows.append(model(clean[:, start : start + chunk], time, text, cache=cache))
            sink_k.append(stored(cache.raw[0], about["sink_size"]) if about["sink_size"] else torch.zeros(0))
            sink_v.append(stored(cache.values[0], about["sink_size"]) if about["sink_size"] else torch.zeros(0))
            ends.append(torch.tensor([cache.frames * cache.tokens, len(cache.held) * cache.tokens]))
    case.compare("out.flow", torch.stack(flows))
    case.compare("out.clean_flow", torch.stack(clean_flows))
    if cfg.window in (None, slots):  # else the reference keeps frames that nobody attends to
        last = model.cfg.num_layers - 1
        case.compare(f"out.final_cache.layer{last}.k", stored(cache.raw[last], slots))
        case.compare(f"out.final_cache.layer{last}.v", stored(cache.values[last], slots))
        case.compare("out.cache_end_indices", torch.stack(ends))
    if "out.layer0_sink_k_after_block" in case.tensors:
        case.compare("out.layer0_sink_k_after_block", torch.stack(sink_k))
        case.compare("out.layer0_sink_v_after_block", torch.stack(sink_v))
    case.check(leave_out=() if cfg.window in (None, slots) else (r"out\.final_cache", r"out\.cache_end_indices"))


@pytest.mark.parametrize("path", cases(KINDS[2]))
def test_schedule(path: Path) -> None:
    case = read(path)
    for shift in case.about["shifts"]:
        schedule, at = Schedule(shift), f"shift{shift:g}"
        t, x0, noise, noisy, flow = (case[f"{at}.{name}"] for name in ("t", "x0", "noise", "add_noise", "flow"))
        sigma, number = schedule.sigma(t)[:, None], schedule.index(t)

        def frame(x_BCHW: Tensor) -> Tensor:
            return x_BCHW[:, None]

        case.compare(f"{at}.sigmas", schedule.sigmas)
        case.compare(f"{at}.timesteps", schedule.timesteps)
        case.compare(f"{at}.training_weights", schedule.training_weights)
        case.compare(f"{at}.training_weight_of_t", schedule.training_weights[number])
        case.compare(f"{at}.add_noise", add_noise(frame(x0), frame(noise), sigma)[:, 0])
        case.compare(f"{at}.flow_to_x0", flow_to_x0(frame(flow), frame(noisy), sigma)[:, 0])
        case.compare(f"{at}.x0_to_flow", x0_to_flow(frame(x0), frame(noisy), sigma)[:, 0])
        few = len(case[f"{at}.euler_step"])
        step = (torch.cat([schedule.sigmas, torch.zeros(1)])[number + 1] - schedule.sigmas[number])[:few, None, None, None]
        case.compare(f"{at}.euler_step", noisy[:few] + flow[:few] * step)
        for name in [name for name in case.tensors if name.startswith(f"{at}.warped_")]:
            steps = tuple(int(step) for step in name.partition("warped_")[2].split("_"))
            case.compare(name, torch.tensor(schedule.warp(steps), dtype=torch.float64))
    case.check(tolerance=1e-6, leave_out=(r"shift[\d.]+\.(t|x0|noise|flow)$",))


@pytest.mark.parametrize("path", cases(KINDS[3]))
def test_sampler(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = read(path)
    about, chunk = case.about["variant"], case.about["variant"]["num_frame_per_block"]
    given, frames = case.tensors.get("in.initial_latent"), case["out.latents"].shape[1]
    assert about["context_noise"] == 0
    held = about["local_attn_size"] if about["local_attn_size"] != -1 else frames
    cache = cache_cfg(case.about["reference"], about, held=held, frames=frames, chunk=chunk)
    cfg = SamplerCfg(tuple(about["denoising_step_list"]), about["timestep_shift"], about["warp_denoising_step"], chunk, cache=cache)
    model, steps = case.model(), timesteps(cfg)
    batch, _, _, height, width = case["out.latents"].shape
    sigmas = Schedule(cfg.shift).sigma(torch.tensor(steps, dtype=torch.float64))
    case.compare("out.warped_denoising_step_list", torch.tensor(steps))
    case.compare("out.sigma_of_steps", sigmas)

    calls: list[tuple[float, int, Tensor, Tensor]] = []  # timestep, first frame, noisy chunk, flow

    def record(x: Tensor, t: float, held: KVCache, flow: Tensor) -> None:
        calls.append((t, held.frames - held.chunk, x, flow))

    observe(monkeypatch, record)
    supply = []
    for number, noise in enumerate(case["in.noise"].split(chunk, dim=1)):
        supply += [noise, *(case["in.renoise"][number].unflatten(1, (batch, chunk)) if len(steps) > 1 else ())]
    draws = iter(supply)
    chunks = list(stream(backbone(model, height, width), case["in.context"], frames, cfg, lambda _: next(draws), initial_BFCHW=given))
    assert next(draws, None) is None
    latents = torch.cat([chunk.latent_BFCHW for chunk in chunks], dim=1)
    case.compare("out.latents", latents)
    case.compare("out.video", (latents[:, :, :3].tanh() * 0.5 + 0.5).clamp(0, 1))
    # The reference also refreshes the cache behind the last chunk, where nobody will read it.
    starts = torch.tensor([*(start for _, start, _, _ in calls), frames - chunk])
    case.compare("out.current_start", starts * about["tokens_per_frame"])
    made = [*calls[(0 if given is None else given.shape[1] // chunk) :], (0.0, frames - chunk, latents, latents)]
    case.compare("out.model_timesteps", torch.tensor([t for t, _, _, _ in made]).view(-1, len(steps) + 1))
    each = [made[i : i + len(steps)] for i in range(0, len(made), len(steps) + 1)]
    x0 = [[flow_to_x0(flow, x, sigma.view(1, 1)) for sigma, (_, _, x, flow) in zip(sigmas, part, strict=True)] for part in each]
    case.compare("out.x0", torch.stack([torch.stack(part) for part in x0]))
    case.check()


class Stub(Tiny):
    """The video autoencoder and the unconditional prompt that the training cases were made with."""

    def __init__(self, model: WanDiT, height: int, width: int, null_BLE: Tensor | None = None) -> None:
        super().__init__(model.cfg, height=height, width=width)
        self.denoiser, self.null_BLE = model, null_BLE

    def encode_text(self, prompts: Any) -> Tensor:
        assert self.null_BLE is not None and set(prompts) == {""}
        return self.null_BLE

    def encode_pixels(self, pixel_BTCHW: Tensor) -> Tensor:
        return torch.stack([pixel_BTCHW[:, :, c % 3] * (1 + 0.1 * c) for c in range(self.shape.channels)], dim=2)

    def decoder(self) -> Decoder:
        return lambda latent_BFCHW: (latent_BFCHW[:, :, :3] + 0.5 * latent_BFCHW[:, :, 3:6]).tanh()


def distillation(case: Case) -> tuple[Dmd, SamplerCfg]:
    """DMD or Re-DMD between the case's three networks."""
    about, args = case.about, case.about["args"]
    frames = case["in.initial_noise"].shape[1] if "in.initial_noise" in case.tensors else args["num_training_frames"]
    cache = cache_cfg(about["reference"], args["model_kwargs"], held=args["num_training_frames"], frames=frames, chunk=args["num_frame_per_block"])
    last = float(Schedule(about["generator_scheduler_shift"]).sigmas[-1])  # "no" noise on the clean pass (D-32)
    steps, shift, chunk = tuple(args["denoising_step_list"]), about["generator_scheduler_shift"], args["num_frame_per_block"]
    sampler = SamplerCfg(steps, shift, args["warp_denoising_step"], chunk, context_noise=last, cache=cache)
    optim = OptimCfg(1e-4)
    # The release adds guidance times the difference to the conditional score: its 3 is 4 where 1 is none.
    scores = ScoreCfg(WeightsCfg(""), args["guidance_scale"] + 1, 5, optim, about["fake_and_real_scheduler_shift"])
    reward = RewardCfg("toy_motion", beta=1 / about["beta"]) if "beta" in about else None  # D-8
    recipe = Recipe("golden", "redmd" if reward else "dmd", "toy", 1, 1, frames, optim, DataCfg(), sampler, scores=scores, reward=reward)
    height, width = about["latent"]["h"], about["latent"]["w"]
    student = Stub(case.model("generator_config", "generator"), height, width)
    teacher = Stub(case.model("real_config", "real_score"), height, width, case.tensors.get("in.uncond_context"))
    method = (ReDmd if reward else Dmd)(recipe, student, teacher)
    method.critic = case.model("fake_config", "fake_score")
    return method, sampler


@pytest.mark.parametrize("path", cases(KINDS[4]))
def test_distillation_of_the_generator(path: Path) -> None:
    """Rollout, both scores, loss and gradients; of a long rollout the last 21 frames are judged, the first of them made from pixels."""
    case = read(path)
    method, sampler = distillation(case)
    assert sampler.chunk is not None
    chunk, first, text = sampler.chunk, case["in.initial_noise"], case["in.context"]
    batch, frames, exit_step = first.shape[0], first.shape[1], int(case["in.exit_flags"][0])

    def judged(gradients: Gradients) -> tuple[Tensor, Tensor | None]:
        draws = []
        for number, noise in enumerate(first.split(chunk, dim=1)):
            renoise = case["in.renoise"][number].unflatten(1, (batch, chunk)) if exit_step else ()
            draws += [noise, *renoise, case["in.context_noise"][number].unflatten(0, (batch, chunk))]
        supply, since = iter(draws), max(0, frames - method.cfg.latents)
        rollout = stream(
            method.student, text, frames, sampler, lambda _: next(supply), exit_step=exit_step, grad_from=since, cache_gradients=gradients
        )
        return method.judged(torch.cat([part.latent_BFCHW for part in rollout], dim=1))

    video, mask_BF = judged("detached")
    if mask_BF is not None:
        case.compare("out.gradient_mask", mask_BF[..., None, None, None].expand_as(video))
    video.retain_grad()
    case.compare("out.pred_video", video.detach())

    t_B = score_timesteps(case["in.dmd_raw_timestep"][:, 0].double() / 1000, case.about["args"]["timestep_shift"], method.cfg)
    case.compare("out.dmd_timestep", t_B[:, None].expand(batch, 21))
    t_B = case["out.dmd_timestep"][:, 0]  # as rounded there
    noise, guided = case["in.dmd_noise"], method.cfg
    with torch.no_grad():
        case.compare("out.dmd_noisy_latent", add_noise(video, noise, method.schedule.sigma(t_B[:, None])))
        method.cfg = replace(guided, guidance=1.0)
        case.compare("out.real_x0_cond", method.scores(video, noise, t_B, text)[0])
        case.compare("out.real_x0_uncond", method.scores(video, noise, t_B, case["in.uncond_context"])[0])
        method.cfg = guided
        real, fake = method.scores(video, noise, t_B, text)
        case.compare("out.fake_x0_cond", fake)
        gradient = matching_gradient(video, real, fake)
        case.compare("out.kl_grad", gradient)
        case.compare("out.log_dmdtrain_gradient_norm", gradient.abs().mean())
        if isinstance(method, ReDmd):

            def reward(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
                case.compare("out.reward_input_video", 255 * pixel_BTCHW[0])  # the release scales -1..1 by 255; here a reward gets -1..1
                return torch.full((len(prompts),), float(case.about["MQ"]))

            method.reward = reward
        weight_B, _ = method.weights(video, [""] * batch)
    loss = (weight_B * matching_loss(video, gradient, mask_BF)).mean()
    loss.backward()
    case.compare("out.loss", loss.detach().reshape(case["out.loss"].shape))
    assert video.grad is not None
    case.compare("out.dloss_dpred_video", video.grad)
    case.compare_gradients("grad_detached_cache", method.modules["generator"])
    method.modules["generator"].zero_grad()
    judged("in_place")[0].backward(video.grad)
    case.compare_gradients("grad", method.modules["generator"])
    case.check()


@pytest.mark.parametrize("path", cases(KINDS[5]))
def test_distillation_of_the_critic(path: Path) -> None:
    case = read(path)
    method, _ = distillation(case)
    video, noise, text = case["in.generated_video"], case["in.critic_noise"], case["in.context"]
    t_B = score_timesteps(case["in.critic_raw_timestep"][:, 0].double() / 1000, case.about["args"]["timestep_shift"], method.cfg)
    t_BF = t_B[:, None].expand(video.shape[:2])
    case.compare("out.critic_timestep", t_BF)
    t_B, t_BF = case["out.critic_timestep"][:, 0], case["out.critic_timestep"]  # as rounded there: 6e-5 of an angle of 900 shows in a gradient
    noisy = add_noise(video, noise, method.schedule.sigma(t_BF))
    case.compare("out.critic_noisy", noisy)
    with torch.no_grad():
        flow = method.critic(noisy, t_BF[:, :1], text)
        case.compare("out.fake_flow", flow)
        case.compare("out.fake_x0", flow_to_x0(flow, noisy, method.score_schedule.sigma(t_BF)))
    loss = method.critic_error(video, noise, t_B, text).mean()
    loss.backward()
    case.compare("out.loss", loss.detach())
    case.compare_gradients("grad", method.critic)
    case.check()


@pytest.mark.parametrize("path", cases(KINDS[4]) + cases(KINDS[5]))
def test_one_step_of_the_optimiser(path: Path) -> None:
    """The reference's gradients through clipping and AdamW (arXiv:1711.05101, algorithm 2), which is written out here in float64."""
    case, lr, decay = read(path), 0.1, 0.01
    of_generator = "in.dmd_noise" in case.tensors
    model = case.model("generator_config", "generator") if of_generator else case.model("fake_config", "fake_score")
    weights = dict(model.named_parameters())
    gradients = {name.removeprefix("out.grad."): value.double() for name, value in case.tensors.items() if name.startswith("out.grad.")}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    before = {name: weights[name].detach().double() for name in gradients}
    updater = Updater(model, OptimCfg(lr, betas=(0.0, 0.999), weight_decay=decay, clip=float(norm) / 2))
    for name, gradient in gradients.items():
        weights[name].grad = gradient.float()
    assert updater.clip() == pytest.approx(float(norm), rel=1e-5)
    updater.step(0.5)
    for name, gradient in gradients.items():
        clipped = gradient / 2  # the first step's moments are the gradient and its square, once their bias is taken out
        moved = -0.5 * lr * (decay * before[name] + clipped / (clipped.square().sqrt() + 1e-8))
        assert distance(weights[name].detach() - before[name], moved) < 1e-5, name


@pytest.mark.parametrize("path", cases(KINDS[6]))
def test_ode_regression(path: Path) -> None:
    case = read(path)
    about, model, target = case.about["variant"], case.model(), case["in.ode_latent"]
    frames, (height, width) = target.shape[2], target.shape[-2:]
    chunk, window = about["num_frame_per_block"], about["local_attn_size"]
    mask_SS = block_causal_mask(frames, about["tokens_per_frame"], chunk, None if window == -1 else window, torch.device("cpu"))
    schedule, kept = Schedule(about["timestep_shift"]), case["in.step_list"].double()
    case.compare("in.step_list", torch.tensor(schedule.warp(tuple(about["steps_unwarped"]))))
    index_BF = case["in.raw_index"][:, ::chunk].repeat_interleave(chunk, 1)
    case.compare("out.index", index_BF)
    case.compare("out.timestep", kept[index_BF])
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss, x0 = regression(backbone(model, height, width), target, index_BF, case["in.context"], kept, schedule, mask_SS)
    loss.backward()
    case.compare("out.noisy_input", seen[0])
    case.compare("out.pred_x0", x0.detach())
    case.compare("out.unnormalized_loss", (x0 - target[:, -1]).detach().square().flatten(1).mean(1))
    case.compare("out.loss", loss.detach())
    case.compare_gradients("grad", model)
    case.check()


@pytest.mark.parametrize("path", cases(KINDS[7]))
def test_video_autoencoder(path: Path) -> None:
    case = read(path)
    about, (mean, std) = case.about["config"], (case[f"scale.{name}"] for name in ("mean", "std"))
    mult, scales, downsample = (tuple(about[name]) for name in ("dim_mult", "attn_scales", "temperal_downsample"))
    cfg = VAECfg(about["dim"], about["z_dim"], mult, about["num_res_blocks"], scales, downsample, tuple(mean.tolist()), tuple(std.tolist()))
    vae = WanVAE(cfg)
    weights = (path.parent / case.about["weights_file"]).resolve()
    vae.load({name: tensor.float() for name, tensor in load_file(weights).items()}, weights)

    pixel, latent = case["in.pixel"].transpose(1, 2), case["in.latent"]
    encoded = WanEncoder(vae)(pixel)
    case.compare("out.encoded_latent", encoded)
    case.compare("out.encoded_latent_first_frame_only", WanEncoder(vae)(pixel[:, :1]))
    case.compare("out.encoded_mu_unscaled", encoded.transpose(1, 2) * std.view(-1, 1, 1, 1) + mean.view(-1, 1, 1, 1))
    case.compare("out.roundtrip", WanDecoder(vae)(encoded))
    case.compare("out.decoded", WanDecoder(vae)(latent))
    assert case.distances["out.decoded"] <= TOLERANCE
    decoder, rate = WanDecoder(vae), 2 ** sum(downsample[: len(mult) - 1])
    pixels = [decoder(chunk) for chunk in latent.split(case.about["streaming_chunks"], dim=1)]
    assert [part.shape[1] for part in pixels] == [
        rate * chunk - (0 if number else rate - 1) for number, chunk in enumerate(case.about["streaming_chunks"])
    ]
    case.compare("out.decoded", torch.cat(pixels, dim=1))
    case.check(leave_out=(r"scale\.",))


@pytest.mark.parametrize("path", cases(KINDS[8]))
def test_text_encoder(path: Path) -> None:
    """With padding masked, and each prompt by itself as it is run here."""
    case = read(path)
    about, ids_BL, mask_BL = case.about["config"], case["in.ids"], case["in.mask"]
    assert not about["shared_pos"]
    heads, head_dim = about["num_heads"], about["dim_attn"] // about["num_heads"]
    cfg = UMT5Cfg(about["vocab"], about["dim"], head_dim, about["dim_ffn"], heads, about["num_layers"], about["num_buckets"])
    encoder = load_encoder((path.parent / case.about["weights_file"]).resolve(), cfg, torch.float32)
    case.compare("out.encoder_raw", encoder(ids_BL, mask_BL).last_hidden_state)
    found_BLE = torch.zeros_like(case["out.prompt_embeds"])
    for found_LE, ids_L, length in zip(found_BLE, ids_BL, mask_BL.sum(1).tolist(), strict=True):
        found_LE[:length] = embed(encoder, ids_L[:length].tolist())
    case.compare("out.prompt_embeds", found_BLE)
    case.check()


def video_reward(case: Case) -> VideoRewardNet:
    """The network of a case; what its config leaves out is told by the shapes of its weights."""
    about, ids, path = case.about["config"], case.about["token_ids"], (case.path.parent / case.about["weights_file"]).resolve()
    shapes = {name.removeprefix("base_model.model."): tensor.shape for name, tensor in load_file(path).items()}
    assert about["output_dim"] == 1
    cfg = VideoRewardCfg(
        **{ours: about[theirs] for ours, theirs in (("hidden", "hidden"), ("inter", "inter"), ("layers", "layers"), ("heads", "heads"))},
        kv_heads=about["kv"],
        mrope=tuple(about["mrope"]),
        vocab=shapes["model.embed_tokens.weight"][0],
        vision_depth=about["vdepth"],
        vision_dim=about["vdim"],
        vision_heads=about["vheads"],
        vision_ratio=shapes["visual.blocks.0.mlp.fc1.weight"][0] // about["vdim"],
        rank=about["r"],
        alpha=about["alpha"],
        tokens=Tokens(ids["vision_start"], ids["vision_end"], ids["image"], ids["video"], ids["pad"], (ids["VQ"], ids["MQ"], ids["TA"])),
    )
    return load_network(path, cfg, torch.float32)


@pytest.mark.parametrize("path", cases(KINDS[9]))
@torch.no_grad()
def test_video_reward(path: Path) -> None:
    """The network on given patches; from frames to logits; the rules for sizes and numbers of frames; what the model is asked."""
    case = read(path)
    network = video_reward(case)
    patches = case["in.pixel_values_videos"].float()
    case.compare("out.logits", network(case["in.input_ids"], case["in.attention_mask"], patches, case["in.video_grid_thw"]))
    for number, about in enumerate(case.about["preprocess"]):
        name, size = f"pre{number}.", tuple(about["resized"][-2:])
        video = case[f"{name}video_uint8"].float()
        assert about["value_range"] in ("[0,255]", "[-255,255] = 2*uint8-255")
        resized = frames.resized(2 * video - 255 if about["value_range"].startswith("[-") else video, size)
        case.compare(f"{name}resized_sample", resized[:, :, ::24, ::21])
        patches, grid = frames.patches(resized)
        case.compare(f"{name}grid_thw", torch.tensor([grid]))
        case.compare(f"{name}pixel_values_sample", patches[::61, ::49])
        case.compare(f"{name}pixel_values_row_mean", patches.mean(1))
        ids_BL = case[f"{name}input_ids"]
        case.compare(f"{name}logits", network(ids_BL, torch.ones_like(ids_BL), patches, torch.tensor([grid])))
    for row in case.about["smart_resize_table"]:
        assert frames.fitted_size(row["h"], row["w"], least=row["min_pixels"], most=row["max_pixels"]) == tuple(row["result"])
    for row in case.about["smart_nframes_table"]:
        assert len(frames.sampled_frames(row["total_frames"], row["video_fps"], row["fps"])) == row["result"]
    about = case.about["prompt"]
    asked = question(about["text_prompt"])
    assert about["template_type"] == "detailed_special"
    assert (hashlib.sha256(asked.encode()).hexdigest(), len(asked)) == (about["prompt_sha256"], about["prompt_chars"])
    assert hashlib.sha256(CHAT.format(question=asked).encode()).hexdigest() == about["chat_sha256"]
    assert sorted(about["order_of_special_tokens"], key=asked.index) == about["order_of_special_tokens"]
    case.check(leave_out=(r"pre\d+\.(video_uint8|input_ids)",))
