"""The fast driver: what vbench computes from each clip, with everything left out that no score depends on.

Every dimension is a class whose object holds its networks and whose call gives a `Result` for a clip. Where the numbers are not
those of vbench's own functions to the last bit, it is because networks see several frames at once. Legend: T frames, H rows,
W columns, D features.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rfbench.vbench_worker import networks, rules
from rfbench.vbench_worker.video import Footage, UnreadableError

BATCH = {"cuda": 32, "cpu": 4}  # frames that a network sees at once; 32 is vbench's own batch for aesthetic quality


@dataclass(frozen=True)
class Result:
    """A clip's score as a fraction or a cosine. A dimension is the mean of its clips' values weighted with `weight`; None weighs nothing."""

    value: float | None
    weight: float = 1
    extra: Mapping[str, Any] = field(default_factory=dict)


class Dimension(Protocol):
    def __init__(self, nets: Networks) -> None: ...

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result: ...


class Networks:
    """Networks by name, built when they are first asked for, shared by dimensions."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.batch = device, BATCH[device.type]
        self._built: dict[str, Any] = {}

    def get(self, name: str, *arguments: str) -> Any:
        """vbench's network, by `networks.<name>`."""
        return self.keep(" ".join((name, *arguments)), lambda: getattr(networks, name)(self.device, *arguments))

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, the first time."""
        if key not in self._built:
            self._built[key] = make()
        return self._built[key]

    def forget(self) -> None:
        self._built.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def once(clip: Footage, key: str, make: Any) -> Any:
    """What several dimensions compute alike from a clip."""
    if key not in clip.shared:
        clip.shared[key] = make()
    return clip.shared[key]


def floats(clip: Footage) -> Tensor:
    """All frames as vbench.utils.load_video gives them: [T, 3, H, W], 0 to 255."""
    return once(clip, "float", lambda: torch.from_numpy(clip.decord).permute(0, 3, 1, 2).float())


def clip_input(clip: Footage, batch: int) -> Tensor:
    """All frames as CLIP sees them in background consistency and aesthetic quality."""
    from vbench.utils import clip_transform

    return once(clip, "clip input", lambda: torch.cat([clip_transform(224)(part) for part in floats(clip).split(batch)]))


def consistency(feature_TD: Tensor) -> Result:
    """The mean over frames of how similar each is to the one before it and to the first."""
    if len(feature_TD) < 2:
        raise UnreadableError("the clip has one frame, and consistency is between frames")
    feature_TD = F.normalize(feature_TD, dim=-1, p=2)
    before = F.cosine_similarity(feature_TD[:-1], feature_TD[1:]).tolist()
    first = F.cosine_similarity(feature_TD[:1], feature_TD[1:]).tolist()
    frames = [(max(0.0, a) + max(0.0, b)) / 2 for a, b in zip(before, first, strict=True)]
    return Result(sum(frames) / len(frames), len(frames), {"frames": frames})


class SubjectConsistency:
    def __init__(self, nets: Networks) -> None:
        self.nets, self.network = nets, nets.get("dino")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        from vbench.utils import dino_transform

        look = dino_transform(224)
        parts = [self.network(look(part).to(self.nets.device)) for part in floats(clip).split(self.nets.batch)]
        return consistency(torch.cat(parts))


class BackgroundConsistency:
    def __init__(self, nets: Networks) -> None:
        self.nets, self.network = nets, nets.get("clip", "background_consistency")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        parts = [self.network.encode_image(part.to(self.nets.device)) for part in clip_input(clip, self.nets.batch).split(self.nets.batch)]
        return consistency(torch.cat(parts))


class TemporalFlickering:
    """Mean absolute difference of neighbouring frames in float32, as there: integers would give other last digits."""

    def __init__(self, nets: Networks) -> None:
        pass

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        import cv2

        frames = clip.bgr
        if len(frames) < 2:
            raise UnreadableError("the clip has one frame, and flickering is between frames")
        before, differences = frames[0].astype(np.float32), []
        for frame in frames[1:]:
            now = frame.astype(np.float32)
            differences.append(np.mean(cv2.absdiff(before, now)))
            before = now
        return Result((255.0 - np.mean(np.array(differences)).item()) / 255.0, 1, {"frames": [float(d) for d in differences]})


class AestheticQuality:
    def __init__(self, nets: Networks) -> None:
        self.nets, self.network, self.head = nets, nets.get("clip", "aesthetic_quality"), nets.get("aesthetic_head")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        parts = []
        for part in clip_input(clip, self.nets.batch).split(self.nets.batch):
            feature_TD = F.normalize(self.network.encode_image(part.to(self.nets.device)).to(torch.float32), dim=-1, p=2)
            parts.append(self.head(feature_TD).squeeze(dim=-1))
        frames = torch.cat(parts) / 10
        return Result(torch.mean(frames).item(), 1, {"frames": frames.tolist()})


class ImagingQuality:
    """MUSIQ on the longer side of at most 512. Places that only fill up a row of patches, which it masks, are left out."""

    def __init__(self, nets: Networks) -> None:
        from pyiqa.data.multiscale_trans_util import get_multiscale_patches

        self.nets, self.network, self.patches = nets, nets.get("musiq"), get_multiscale_patches

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        transform = networks.module("imaging_quality").transform
        frames: list[float] = []
        for part in floats(clip).split(self.nets.batch):
            patch_TPD = self.patches((transform(part, "longer").to(self.nets.device) - 0.5) * 2, **self.network.data_preprocess_opts)
            used = patch_TPD[0, :, -1].bool()  # the last feature says so; it depends on the size alone
            self.network.training = True  # of the outermost module only: it takes patches, no layer behaves differently
            frames += self.network(patch_TPD[:, used]).flatten().tolist()
            self.network.training = False
        return Result(sum(frames) / len(frames) / 100.0, 1, {"frames": [score / 100.0 for score in frames]})


class HumanAction:
    def __init__(self, nets: Networks) -> None:
        self.nets, self.network = nets, nets.get("umt")
        home = networks.module("human_action")
        self.names = home.build_dict()
        self.look = home.Compose(
            [
                home.Resize(256, interpolation="bilinear"),
                home.CenterCrop(size=(224, 224)),
                home.ClipToTensor(),
                home.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )
        for block in self.network.blocks:
            block.attn.forward = types.MethodType(_fused_attention, block.attn)

    def logits(self, clip: Footage) -> Tensor:
        frames = clip.decord
        picked = frames[rules.middle_frames(len(frames), 16)]
        return self.network(self.look(picked).unsqueeze(0).to(self.nets.device))

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        scores, indices = torch.topk(torch.sigmoid(self.logits(clip)), 5, dim=1)
        labels = [self.names[str(index)] for index in indices[0].tolist()]
        hit = rules.recognised(rules.action_of(prompt), labels, scores[0].tolist())
        return Result(float(hit), 1, {"labels": labels, "scores": scores[0].tolist()})


def _fused_attention(self: Any, x_BND: Tensor) -> Tensor:
    """UMT's attention without the matrix of all pairs in memory."""
    batch, tokens, _ = x_BND.shape
    bias = None if self.q_bias is None else torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
    qkv = F.linear(x_BND, self.qkv.weight, bias).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=self.scale)
    return self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class AppearanceStyle:
    """CLIP's logit of each frame and the style's text, which is encoded once."""

    def __init__(self, nets: Networks) -> None:
        self.nets, self.network = nets, nets.get("clip", "appearance_style")
        self.texts: dict[str, Tensor] = {}

    def text(self, style: str) -> Tensor:
        import clip as openai_clip

        if style not in self.texts:
            feature_1D = self.network.encode_text(openai_clip.tokenize([style]).to(self.nets.device))
            self.texts[style] = feature_1D / feature_1D.norm(dim=1, keepdim=True)
        return self.texts[style]

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        from PIL import Image
        from vbench.utils import clip_transform_Image

        look = clip_transform_Image(224)
        text_1D, scale = self.text(about["appearance_style"]), self.network.logit_scale.exp()
        frames: list[float] = []
        for begin in range(0, len(clip.decord), self.nets.batch):
            part = torch.stack([look(Image.fromarray(frame)) for frame in clip.decord[begin : begin + self.nets.batch]])
            feature_TD = self.network.encode_image(part.to(self.nets.device))
            feature_TD = feature_TD / feature_TD.norm(dim=1, keepdim=True)
            frames += [logit / 100 for logit in (scale * feature_TD @ text_1D.t())[:, 0].float().tolist()]
        return Result(sum(frames) / len(frames), len(frames), {"frames": frames})


class OverallConsistency:
    """ViCLIP's cosine of eight frames and the prompt; temporal style is the same number for other prompts."""

    def __init__(self, nets: Networks) -> None:
        self.nets, self.network = nets, nets.get("viclip")
        self.network.vision_encoder.transformer.checkpoint_num = 0  # nothing is differentiated
        self.texts: dict[str, Tensor] = {}

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        if prompt not in self.texts:
            feature_1D = self.network.encode_text(prompt).float()
            self.texts[prompt] = feature_1D / feature_1D.norm(dim=-1, keepdim=True)
        video_1D = once(clip, "viclip", lambda: self._video(clip))
        return Result(float((video_1D @ self.texts[prompt].T)[0][0]))

    def _video(self, clip: Footage) -> Tensor:
        from vbench.utils import clip_transform

        frames = clip.decord
        picked = torch.from_numpy(frames[rules.middle_frames(len(frames), 8)]).permute(0, 3, 1, 2)
        feature_1D = self.network.encode_vision(clip_transform(224)(picked).to(self.nets.device).unsqueeze(0), test=True).float()
        return feature_1D / feature_1D.norm(dim=-1, keepdim=True)
