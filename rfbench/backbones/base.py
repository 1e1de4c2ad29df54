"""What the sampler, the trainer and the verbs need of a backbone; it owns all shapes.

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, L text tokens, E text width, T pixel frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rfbench.backbones.known import KNOWN
from rfbench.config import WeightsCfg
from rfbench.errors import UserError
from rfbench.registry import pick
from rfbench.weight_files import resolve

if TYPE_CHECKING:
    from torch import Tensor

    from rfbench.backbones.wan.dit import WanDiT

BACKBONES: dict[str, str] = {
    "toy": "rfbench.backbones.toy:ToyBackbone",
    "wan2.1-1.3b": "rfbench.backbones.wan.backbone:wan_1_3b",
    "wan2.1-14b": "rfbench.backbones.wan.backbone:wan_14b",
    "skyreels-v2-df-1.3b": "rfbench.backbones.wan.backbone:skyreels_df_1_3b",
    "wan2.2-5b": "rfbench.backbones.wan.backbone:wan22_5b",
}
TEMPORAL = 4  # pixel frames per latent frame, but the first, which is one


@dataclass(frozen=True)
class VideoShape:
    """Size of a clip in latents and in pixels."""

    channels: int
    height: int
    width: int
    pixel_height: int
    pixel_width: int
    fps: int


def pixel_frames(latents: int) -> int:
    """Pixel frames of a clip: 1 + 4 (latents - 1), never 4 times."""
    return 1 + TEMPORAL * (latents - 1)


def latent_frames(frames: int, chunk: int | None) -> int:
    """Latent frames that hold `frames` pixel frames, rounded up to whole chunks."""
    latents = 1 + -(-(frames - 1) // TEMPORAL)
    return latents if chunk is None else -(-latents // chunk) * chunk


class Decoder(Protocol):
    """Streaming state of one batch of clips being decoded."""

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        """The next frames' pixels [B, T, 3, H, W], in [-1, 1]; the first latent ever gives 1 frame, each other 4."""


class Backbone(Protocol):
    """A `torch.nn.Module`. Text -> embedding; (latent chunk, t, cache) -> flow; latents -> pixels as a stream."""

    shape: VideoShape
    denoiser: WanDiT

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, E], zero rows as padding; the empty prompt is the unconditional one."""

    def remember(self, prompts: Sequence[str]) -> None:
        """Embed prompts that will come, so that no text encoder has to stay in memory for them."""

    def encode_pixels(self, pixel_BTCHW: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of whole clips, without gradients."""

    def decoder(self) -> Decoder:
        """A decoder at the beginning of a clip."""

    def parts(self) -> dict[str, WeightsCfg]:
        """Files that belong to the backbone and not to a checkpoint of it, by what they are for."""

    def load(self, tensors: Mapping[str, Tensor], where: Any, parts: Mapping[str, Path]) -> None:
        """Take the weights of a checkpoint and of the `parts`, strictly; `where` names the checkpoint in errors."""

    def fresh(self, seed: int) -> None:
        """Start from random weights, with whatever is not trained fitted or fetched."""


def open_backbone(name: str, **settings: Any) -> Backbone:
    """A backbone on the CPU whose weights are still to be loaded; settings that are None are left to the backbone.

    Raises:
        UserError: there is no backbone of that name, or it has no such setting.
    """
    backbone: Backbone = pick(BACKBONES, name, what="backbone")(**_asked(name, settings))
    return backbone


def parts_of(name: str, **settings: Any) -> dict[str, WeightsCfg]:
    """The `parts` of a backbone, which is built, and may refuse a setting, only if this is not `KNOWN`.

    Raises:
        UserError: as of `open_backbone`.
    """
    asked = _asked(name, settings)
    if name in KNOWN and asked.get("precision", KNOWN[name].precisions[0]) in KNOWN[name].precisions:
        return KNOWN[name].parts(asked.get("decoder"))
    return open_backbone(name, **asked).parts()


def _asked(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are given; all of them are the backbone's."""
    asked = {key: value for key, value in settings.items() if value is not None}
    for key in asked:
        if not accepts(name, key):
            raise UserError(f"backbone '{name}' does not use '{key}'; leave it out")
    return asked


def accepts(name: str, setting: str) -> bool:
    """Whether a backbone has such a setting."""
    if name in KNOWN:
        return setting in KNOWN[name].settings
    return setting in inspect.signature(pick(BACKBONES, name, what="backbone")).parameters


def load(name: str, weights: WeightsCfg, file: Path, **settings: Any) -> Backbone:
    """A backbone with the weights of a checkpoint file and of its own parts.

    Raises:
        UserError: there is no backbone of that name, it has no such setting, or a file is missing, corrupt or of another model.
    """
    from rfbench.weights import read_tensors

    backbone = open_backbone(name, **settings)
    backbone.load(read_tensors(file, weights), file, {role: resolve(part, file) for role, part in backbone.parts().items()})
    return backbone
