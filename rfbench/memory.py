"""What training takes of a GPU's memory, told before anything is loaded: what every network holds, and how far a step goes above that.

The step is taken for real, by the method of the recipe, on tensors that have sizes and no contents (torch's `meta` device). So nothing about
activations, caches or recomputation is written down a second time here. Blocks are alike: a step with one block in every network and a step
with two tell what each further one adds.

Not known here: what kernels take for themselves while they run, and what the allocator cannot use. Attention is counted as kernels of
FlashAttention's kind have it: a number for every row of the table, and never the table itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rfbench.attention import KERNELS
from rfbench.backbones.base import Backbone, open_backbone
from rfbench.checkpointing import checkpointed
from rfbench.config import Precision, PrecisionCfg, Recipe
from rfbench.methods.base import METHODS, Batch, Draws, Method, student_mask
from rfbench.methods.redmd import ReDmd
from rfbench.phases import heard, phase
from rfbench.recipes import forced
from rfbench.registry import pick
from rfbench.reward import videoreward_mq
from rfbench.settings import settings

META = torch.device("meta")


def held(cfg: Recipe, *, share: int = 1, offload: bool = False) -> dict[str, int]:
    """Bytes that each network of a recipe takes of a GPU from step to step.

    A trained weight is stored once, copied in float32 if that is more, and has a gradient and AdamW's two moments in float32; the student's
    has an average. Beside them lie the autoencoder and the reward's network.

    Split over `share` processes, all of that is in float32 and a part of it, and the whole network and its gradient come on top while a step is
    computed; of a frozen network two blocks are there at a time, and its part is not with `offload`.
    """
    precision = cfg.precision or PrecisionCfg()

    def trained(role: str, stored: Precision | None) -> int:
        sizes = [(weight.numel(), weight.element_size()) for weight in open_backbone(cfg.backbone, precision=stored).denoiser.parameters()]
        average = 4 * (role == "student" and cfg.ema is not None)
        if share > 1:
            return sum(count * (16 + average) // share + 2 * count * size for count, size in sizes)
        return sum(count * (size + 4 * (size < 4) + 12 + average) for count, size in sizes)

    found = {"student": trained("student", precision.student)}
    if cfg.scores is not None:
        found["critic"] = trained("critic", precision.critic)
        teacher = open_backbone(cfg.scores.teacher_backbone or cfg.backbone, precision=precision.teacher).denoiser
        found["teacher"] = whole = _bytes(teacher)
        if share > 1 or offload:
            blocks = [_bytes(block) for block in teacher.blocks]
            found["teacher"] = (0 if offload else whole // share) + whole - sum(blocks) + 2 * max(blocks)
    student = cast(nn.Module, open_backbone(cfg.backbone, precision=precision.student))
    found["autoencoder"] = _bytes(student) - _bytes(cast(Backbone, student).denoiser)
    if cfg.reward is not None and cfg.reward.name == "videoreward_mq":
        from rfbench.videoreward.network import VideoRewardCfg, VideoRewardNet

        with META:
            found["reward"] = _bytes(VideoRewardNet(VideoRewardCfg()).bfloat16())
    return found


def _bytes(module: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def above(cfg: Recipe, clips: int) -> dict[str, int]:
    """Phase -> most bytes above what is held, in a step of a micro-batch of so many clips in which every network has a turn.

    A backward pass is a phase for each network. A pass of a reward of one's own is not in it.
    """
    few, more = (_step(cfg, clips, layers) for layers in (1, 2))
    further = open_backbone(_deepest(cfg)).denoiser.cfg.num_layers - 1
    return {name: size + further * (more[name] - size) for name, size in few.items()}


def _deepest(cfg: Recipe) -> str:
    """The network whose blocks are counted: gradients go through the student, and with `sid` through the teacher."""
    return (cfg.method == "sid" and cfg.scores is not None and cfg.scores.teacher_backbone) or cfg.backbone


def _step(cfg: Recipe, clips: int, layers: int) -> dict[str, int]:
    """The same of networks with so many blocks."""
    method, watch = _method(cfg, layers), Alive()
    batch = Batch(tuple(range(clips)), 0)
    for module in method.modules.values():
        for weight in module.parameters():
            weight.grad = torch.empty_like(weight)  # which is counted as held
    if cfg.checkpointing:
        for module in (*method.modules.values(), *method.frozen.values()):
            checkpointed(cast(Any, module))
    with watch, flash(), heard(watch.mark):
        losses, _ = method.losses(batch, tuple(method.modules))
        for role, loss in losses.items():
            watch.mark(f"{role}'s backward")
            loss.backward()
    return watch.found()


def _method(cfg: Recipe, layers: int) -> Method:
    precision = cfg.precision or PrecisionCfg()

    def blank(name: str, stored: Precision | None) -> Backbone:
        return _blank(open_backbone(name, precision=stored), layers)

    student = blank(cfg.backbone, precision.student)
    if cfg.scores is None:
        return OnePass(cfg, student)
    teacher = blank(cfg.scores.teacher_backbone or cfg.backbone, precision.teacher)
    critic = blank(cfg.backbone, precision.critic).denoiser
    kind: Any = pick(METHODS, cfg.method, what="method")
    reward = cfg.reward
    if kind is ReDmd:
        cfg = dataclasses.replace(cfg, reward=dataclasses.replace(cast(Any, cfg.reward), name="rfbench.memory:blank_reward", input=None, fps=None))
    clips = (lambda draws: (draws(cfg.latents).to(META), [""] * len(draws.generators))) if forced(cfg) else None
    method: Any = kind(cfg, student, teacher, critic=critic, clips=clips)
    if reward is not None and reward.name == "videoreward_mq":
        judge: Any = BlankJudge()
        shown: Any = {"input": reward.input or "correct", "fps": reward.fps}
        method.reward = functools.partial(videoreward_mq, judge=judge, video_fps=student.shape.fps, **shown)
    return cast(Method, method)


def _blank(backbone: Backbone, layers: int) -> Backbone:
    """A backbone without contents, with the first of its blocks; every prompt's embedding is as long as the longest."""
    cast(nn.Module, backbone).to(META)
    model = backbone.denoiser
    cfg = model.cfg = dataclasses.replace(model.cfg, num_layers=layers)
    del model.blocks[layers:]

    def encode(prompts: Any) -> Tensor:
        return torch.empty(len(prompts), cfg.text_len, cfg.text_dim, dtype=model.dtype, device=META)

    backbone.encode_text = encode  # type: ignore[method-assign]
    return backbone


class BlankJudge:
    """VideoReward's network without contents, as far as a block for frames and one for words: nothing outlives a block but what comes out."""

    QUESTION = 1024  # tokens, more than a prompt and what is asked about it have

    def __init__(self) -> None:
        from rfbench.videoreward.frames import MAX_PIXELS
        from rfbench.videoreward.model import About
        from rfbench.videoreward.network import VideoRewardCfg, VideoRewardNet

        cfg = VideoRewardCfg()
        self.about = About(2.0, MAX_PIXELS, cfg.rank, cfg.alpha, (), ())
        with META:
            self.network: Any = VideoRewardNet(dataclasses.replace(cfg, layers=1, vision_depth=1)).bfloat16()

    def score(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """[B, 3]. Frames of a pair see each other, and words all that is before them."""
        from rfbench.videoreward.frames import patches, token_count

        cut, cfg, qwen = [patches(video) for video in videos], self.network.cfg, self.network.qwen
        ends = [rows * columns for _, (pairs, rows, columns) in cut for _ in range(pairs)]
        pixels = torch.cat([patch for patch, _ in cut])
        x = torch.empty(len(pixels), cfg.vision_dim, dtype=torch.bfloat16, device=META)
        angle = x[:, : cfg.vision_dim // cfg.vision_heads]
        qwen.visual.blocks[0](x, cu_seqlens=torch.tensor([0, *itertools.accumulate(ends)]), position_embeddings=(angle, angle))
        length = max(token_count(*video.shape) for video in videos) + self.QUESTION
        y = torch.empty(len(videos), length, cfg.hidden, dtype=torch.bfloat16, device=META)
        angle = y[..., : cfg.hidden // cfg.heads]
        qwen.language_model.layers[0](y, position_embeddings=(angle, angle))
        return torch.empty(len(videos), 3, device=META)


def blank_reward(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
    """A number for each clip."""
    return torch.empty(len(prompts), device=META)


class OnePass:
    """What methods without score models do with a clip."""

    def __init__(self, cfg: Recipe, student: Backbone) -> None:
        self.cfg, self.student = cfg, student
        self.modules: dict[str, nn.Module] = {"generator": student.denoiser}
        self.frozen: dict[str, Any] = {}
        self.mask_SS = student_mask(cfg, student) if cfg.sampler.chunk is not None else None

    def turns(self, step: int) -> tuple[str, ...]:
        return ("generator",)

    def losses(self, batch: Batch, turns: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        phase("forward")
        text = self.student.encode_text([""] * len(batch.seeds))
        noisy = Draws(self.student.shape, batch.seeds, like=text)(self.cfg.latents)
        flow = self.student.denoiser(noisy, torch.zeros(noisy.shape[:2], device=META), text, mask_SS=self.mask_SS)
        return {"generator": (flow - noisy).square().mean()}, {}


class Alive(TorchDispatchMode):
    """Bytes of the tensors without contents that were made here and are still there, and the most of them in each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.name, self.most = 0, "", Counter[str]()
        self.known: set[int] = set()  # storages

    def mark(self, name: str) -> None:
        """What follows is a phase; what is there when it begins is part of it."""
        self.name = name
        self.most[name] = max(self.most[name], self.now)

    def found(self) -> dict[str, int]:
        """Phase -> bytes."""
        return {name: size for name, size in self.most.items() if name}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._meet(tensor, 0)  # from elsewhere, or known
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            self._meet(tensor, 1)
        self.most[self.name] = max(self.most[self.name], self.now)
        return out

    def _meet(self, tensor: Any, counts: int) -> None:
        if not isinstance(tensor, Tensor) or not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, counts * storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@contextlib.contextmanager
def flash() -> Iterator[None]:
    """Attention keeps what FlashAttention keeps (arXiv:2307.08691); that of the reward's network, which has no gradients, the result alone."""
    kernels, own = dict(KERNELS), functional.scaled_dot_product_attention
    KERNELS.update(dict.fromkeys(kernels, Flash.apply))
    functional.scaled_dot_product_attention = lambda q_BHSD, *others, **how: torch.empty_like(q_BHSD)
    try:
        yield
    finally:
        KERNELS.update(kernels)
        functional.scaled_dot_product_attention = own


class Flash(torch.autograd.Function):
    """Its tensors: the result and the softmax's denominators, and backwards the float32 sums of the queries' gradient."""

    @staticmethod
    def forward(ctx: Any, q_BSHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, mask_SK: Tensor | None) -> Tensor:
        out, denominators = torch.empty_like(q_BSHD, memory_format=torch.contiguous_format), torch.empty_like(q_BSHD[..., 0], dtype=torch.float32)
        ctx.save_for_backward(q_BSHD, k_BKHD, v_BKHD, out, denominators, None if mask_SK is None else torch.empty_like(mask_SK, dtype=q_BSHD.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Any:
        q_BSHD, k_BKHD, v_BKHD, *_ = ctx.saved_tensors
        return torch.empty_like(q_BSHD, dtype=torch.float32).to(q_BSHD.dtype), torch.empty_like(k_BKHD), torch.empty_like(v_BKHD), None


def room(total: int) -> str:
    """Whether so many bytes fit: on the GPU that is there, else on those that rfbench.toml knows."""
    if torch.cuda.is_available():
        sizes = {"this GPU": torch.cuda.get_device_properties(0).total_memory / 2**30}
    else:
        sizes = {name: table.memory_gib for name, table in settings().hardware.items() if table.memory_gib is not None}
    if not sizes:
        return "whether that fits is not known, as there is no GPU and rfbench.toml has none with 'memory_gib'"
    left = {name: size - total / 2**30 for name, size in sizes.items()}
    fits = ", ".join(f"{name} leaves {gib:.1f} GiB" for name, gib in left.items() if gib > 0)
    short = ", ".join(f"{name} ({sizes[name]:.1f} GiB)" for name, gib in left.items() if gib <= 0)
    return "; ".join([*([fits] if fits else []), *([f"does not fit {short}"] if short else [])])


def sentence(cfg: Recipe, clips: int, *, share: int = 1, offload: bool = False) -> str:
    """The plan in words: roles, phases, the sum, and where it fits."""
    roles, phases = held(cfg, share=share, offload=offload), above(cfg, clips)
    total = sum(roles.values()) + max(phases.values())
    over = f" of a GPU, networks split over {share}" if share > 1 else ""
    step = f"a step of {clips} clip{'s' if clips > 1 else ''} at a time"
    return f"memory{over}: {_list(roles)}; {step} adds {_list(phases)}; {_size(total)} at most; {room(total)}; {beside(cfg)}"


def _list(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {_size(size)}" for name, size in sizes.items())


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.0f} MiB"


def beside(cfg: Recipe) -> str:
    """What the plan does not count, of what this recipe has."""
    left = ["what kernels and the allocator take for themselves"]
    if cfg.reward is not None and cfg.reward.name != "videoreward_mq":
        left.append(f"what the reward '{cfg.reward.name}' takes")
    if "text" in open_backbone(cfg.backbone).parts():
        left.append("the text encoder, which leaves before the first step")
    return f"not counted: {', '.join(left)}"
