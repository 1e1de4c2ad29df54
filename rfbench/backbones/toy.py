"""The toy backbone: the Wan DiT at a small size, a fixed linear video autoencoder, a text encoder of one table.

The autoencoder follows Wan's temporal rule (first frame alone, then 4 frames per latent). Its encoder projects patches of
4 frames x 8 x 8 pixels on their principal components; its decoder is the best linear guess of a patch from the 3 x 3 latents
around it and those one latent frame earlier, so patch borders do not show, and it streams: its state is one latent frame.
Both are fitted in closed form by `fit_autoencoder`. Space is a torus, as in `rfbench.world`. The tiny decoder, which stands for the one of
Wan, puts a patch together from its own components alone: an eighteenth of the arithmetic, and patch borders show.

Shapes: B batch, F latent frames, C channels, h and w latent rows and columns, T pixel frames, H and W pixel rows and columns,
L text tokens, E text width, P values per patch (3 x 4 x 8 x 8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from rfbench import world
from rfbench.backbones.base import TEMPORAL, Decoder, VideoShape
from rfbench.backbones.wan.dit import DiTCfg, WanDiT
from rfbench.backbones.wan.float8 import asked
from rfbench.config import Streamed, WeightsCfg
from rfbench.errors import UserError
from rfbench.weights import load_into

PATCH = 8
CHANNELS = 8  # more show finer edges, but a model this narrow then spends itself on passing their noise through
TEXT_LEN, TEXT_DIM = 12, 64
DIT = DiTCfg(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=TEXT_DIM, text_len=TEXT_LEN, in_dim=CHANNELS, out_dim=CHANNELS, freq_dim=64)
SHAPE = VideoShape(CHANNELS, world.HEIGHT // PATCH, world.WIDTH // PATCH, world.HEIGHT, world.WIDTH, world.FPS)
GREY = 2 * world.BACKGROUND - 1


class ToyText(nn.Module):
    """Word and position embeddings; the DiT's cross attention does the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(world.WORDS), TEXT_DIM)
        self.places = nn.Embedding(TEXT_LEN, TEXT_DIM)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """[B, L, E]; rows behind the last word are zero, and all rows are for the empty prompt.

        Raises:
            UserError: a prompt that is not a sentence of the toy world.
        """
        rows = []
        for prompt in prompts:
            words = str(world.parse(prompt)).split() if prompt else []
            ids = torch.tensor([world.WORDS.index(word) for word in words], dtype=torch.long, device=self.words.weight.device)
            embedded = self.words(ids) + self.places.weight[: len(ids)]
            rows.append(functional.pad(embedded, (0, 0, 0, TEXT_LEN - len(ids))))
        return torch.stack(rows)


class Autoencoder(nn.Module):
    """Fixed linear video autoencoder; see the module's docstring."""

    encode_PC: Tensor
    decode_QP: Tensor
    scale_C: Tensor

    def __init__(self) -> None:
        super().__init__()
        values = 3 * TEMPORAL * PATCH**2
        self.register_buffer("encode_PC", torch.zeros(values, CHANNELS))
        self.register_buffer("decode_QP", torch.zeros(2 * 9 * CHANNELS, values))
        self.register_buffer("scale_C", torch.ones(CHANNELS))  # latents are divided by it

    def encode(self, pixel_BTCHW: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] of 1 + 4 (F - 1) frames; surplus frames are dropped, as Wan's VAE does."""
        return ((patches(pixel_BTCHW) @ self.encode_PC) / self.scale_C).permute(0, 1, 4, 2, 3).contiguous()

    def decode(self, latent_BFCHW: Tensor, before_B1CHW: Tensor | None) -> Tensor:
        """Pixels [B, T, 3, H, W]; `before` is the latent frame in front of the first, None at the beginning of a clip."""
        z = latent_BFCHW.permute(0, 1, 3, 4, 2) * self.scale_C
        earlier = z[:, :1] if before_B1CHW is None else before_B1CHW.permute(0, 1, 3, 4, 2) * self.scale_C
        pixels = unpatch(around(torch.cat([earlier, z], dim=1)) @ self.decode_QP)
        return (pixels[:, TEMPORAL - 1 :] if before_B1CHW is None else pixels).clamp(-1, 1)

    def guess(self, latent_BFCHW: Tensor) -> Tensor:
        """What each latent holds of its own patch: pixels [B, 4 F, 3, H, W]. The components are orthonormal, so no weights are needed for that."""
        return unpatch((latent_BFCHW.permute(0, 1, 3, 4, 2) * self.scale_C) @ self.encode_PC.T).clamp(-1, 1)


def patches(pixel_BTCHW: Tensor) -> Tensor:
    """Patches relative to the background: [B, F, h, w, P]; the first frame is repeated to fill its patch."""
    frames = pixel_BTCHW.shape[1]
    first = pixel_BTCHW[:, :1].expand(-1, TEMPORAL - 1, -1, -1, -1)
    x = torch.cat([first, pixel_BTCHW[:, : 1 + (frames - 1) // TEMPORAL * TEMPORAL]], dim=1) - GREY
    x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(1, (-1, TEMPORAL))  # B F 4 3 h 8 w 8
    return x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4)


def unpatch(patch_BFhwP: Tensor) -> Tensor:
    """The inverse of `patches` but for the repeated frames: [B, 4 F, 3, H, W]."""
    x = patch_BFhwP.unflatten(-1, (3, TEMPORAL, PATCH, PATCH)) + GREY  # B F h w 3 4 8 8
    return x.permute(0, 1, 5, 4, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(1, 2)


def around(latent_BFhwC: Tensor) -> Tensor:
    """What a patch is decoded from: the 3 x 3 latents around it, one frame earlier and now: [B, F - 1, h, w, 18 C]."""
    shifted = [torch.roll(latent_BFhwC, (-row, -column), (2, 3)) for row in (-1, 0, 1) for column in (-1, 0, 1)]
    near = torch.cat(shifted, dim=-1)
    return torch.cat([near[:, :-1], near[:, 1:]], dim=-1)


def fit_autoencoder(seed: int, clips: int) -> Autoencoder:
    """The autoencoder of the toy world, from `clips` clips of 5 seconds, in closed form.

    Latent channels are the first principal components, divided by the square root of their standard deviation: halfway
    between whitening, which would make a model spend itself on faint detail, and none, which would make it ignore it.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    _, pixels = world.draw_clips(seed, [world.draw_caption(rng) for _ in range(clips)], 81)
    target = patches(torch.from_numpy(pixels))
    flat = target.flatten(0, 3).double()
    _, axes = torch.linalg.eigh(flat.T @ flat / len(flat))
    model = Autoencoder()
    model.encode_PC.copy_(axes[:, -CHANNELS:].flip(1))
    z = target @ model.encode_PC
    features = around(torch.cat([z[:, :1], z], dim=1)).flatten(0, 3).double()
    gram = features.T @ features
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    model.decode_QP.copy_(torch.linalg.solve(gram + ridge, features.T @ flat))
    model.scale_C.copy_(z.flatten(0, 3).std(0).sqrt())
    return model


class ToyDecoder:
    """Streaming state of a batch of clips being decoded: the last latent frame."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.last_B1CHW: Tensor | None = None

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        pixels = self.autoencoder.decode(latent_BFCHW, self.last_B1CHW)
        self.last_B1CHW = latent_BFCHW[:, -1:]
        return pixels


class TinyToyDecoder:
    """Streaming state of a batch of clips being decoded approximately: whether they have begun."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        self.begun = False

    def __call__(self, latent_BFCHW: Tensor) -> Tensor:
        pixels = self.autoencoder.guess(latent_BFCHW)
        self.begun, begun = True, self.begun
        return pixels if begun else pixels[:, TEMPORAL - 1 :]


class ToyBackbone(nn.Module):
    """Denoiser, text encoder and autoencoder of the toy world; one safetensors file holds all three."""

    shape = SHAPE

    def __init__(
        self, *, precision: Streamed = "float32", attention: Literal["float8"] | None = None, decoder: Literal["vae", "tiny"] = "vae"
    ) -> None:
        super().__init__()
        if precision not in ("float32", "float8"):
            raise UserError(f"backbone 'toy' does not use 'precision' {precision}; it computes in float32, or approximately with float8")
        self.denoiser = WanDiT(replace(DIT, float8=asked(products=precision, attention=attention)))
        self.text = ToyText()
        self.autoencoder = Autoencoder()
        self.tiny = decoder == "tiny"

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        return self.text(prompts)

    def remember(self, prompts: Sequence[str]) -> None:
        """Nothing: the encoder is a table that is trained."""

    @torch.no_grad()
    def encode_pixels(self, pixel_BTCHW: Tensor) -> Tensor:
        latents: Tensor = self.autoencoder.encode(pixel_BTCHW)
        return latents

    def decoder(self) -> Decoder:
        return TinyToyDecoder(self.autoencoder) if self.tiny else ToyDecoder(self.autoencoder)

    def parts(self) -> dict[str, WeightsCfg]:
        return {}

    def load(self, tensors: Mapping[str, Tensor], where: Path, parts: Mapping[str, Path]) -> None:
        load_into(self, tensors, where=where)

    def fresh(self, seed: int) -> None:
        rng = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5, generator=rng)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=rng)
        for parameter in self.parameters():
            if parameter.ndim == 3:  # modulation tables
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=rng)
        nn.init.zeros_(self.denoiser.head.head.weight)
        self.autoencoder = fit_autoencoder(seed, clips=96)
