"""The Wan family as backbones: one DiT, the autoencoders of Wan2.1 and Wan2.2, one text encoder, at the sizes that were published.

A baseline names the DiT's weights; autoencoder, text encoder and tokenizer are the same for all of a generation (`parts`).

Shapes: B batch, F latent frames, C channels, H and W latent rows and columns, T pixel frames, L text tokens, E text width.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rfbench.backbones.base import Decoder, VideoShape
from rfbench.backbones.known import TEXT, TINY, TOKENIZER, VAE, VAE22
from rfbench.backbones.wan.dit import DiTCfg, WanDiT
from rfbench.backbones.wan.float8 import asked
from rfbench.backbones.wan.text import UMT5_XXL, UMT5Cfg, WanText, clean, embed, empty_encoder
from rfbench.backbones.wan.tiny_vae import TinyDecoder, TinyVAE
from rfbench.backbones.wan.vae import VAECfg, WanDecoder, WanEncoder, WanVAE
from rfbench.backbones.wan.vae22 import VAE22Cfg
from rfbench.config import Streamed, WeightsCfg
from rfbench.settings import settings
from rfbench.weights import load_into, read_tensors

WAN_VAE = VAECfg()


@dataclass(frozen=True)
class Member:
    """Sizes of one member of the family; `height` and `width` in pixels."""

    dit: DiTCfg
    vae: VAECfg | VAE22Cfg = WAN_VAE
    text: UMT5Cfg = UMT5_XXL
    height: int = 480
    width: int = 832
    fps: int = 16


WAN_1_3B = Member(DiTCfg(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096))
WAN_14B = Member(DiTCfg(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096))
SKYREELS_DF_1_3B = Member(replace(WAN_1_3B.dit, fps=24), height=544, width=960, fps=24)
WAN_5B = Member(
    DiTCfg(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096, in_dim=48, out_dim=48), VAE22Cfg(), height=704, width=1280, fps=24
)
REDUCED = Member(
    DiTCfg(dim=96, ffn_dim=192, num_heads=2, num_layers=2, text_dim=64, text_len=32, freq_dim=64),
    VAECfg(dim=8),
    UMT5Cfg(vocab=512, dim=64, head_dim=16, ffn_dim=128, heads=4, layers=2, text_len=32),
    height=64,
    width=96,
)


def smaller(member: Member) -> Member:
    """A member's architecture at a size that a laptop runs in seconds, for random weights: what is made of it means nothing."""
    dit = replace(REDUCED.dit, in_dim=member.dit.in_dim, out_dim=member.dit.out_dim, fps=member.dit.fps)
    return replace(REDUCED, dit=dit, vae=VAE22Cfg(dim=8, decoder_dim=8) if isinstance(member.vae, VAE22Cfg) else REDUCED.vae, fps=member.fps)


class TextEncoder(Protocol):
    def encode(self, prompts: Sequence[str], *, device: torch.device | str) -> Tensor:
        """[B, L, E] on `device`, zero rows behind a prompt's end."""

    def remember(self, prompts: Sequence[str], *, device: torch.device | str) -> None:
        """Have the embeddings of prompts at hand without the encoder, if it is one that is worth getting rid of."""


class WanBackbone(nn.Module):
    """Denoiser, text encoder and autoencoder of one member; the weights are on `meta` until `load` or `fresh`.

    `precision`: everything in bfloat16, as the students of the Self Forcing family run; `mixed`, as Wan's own code runs, with the
    DiT's float32 islands and the autoencoder in float32; or everything in float32. `float8` is bfloat16 whose streams multiply 8-bit
    floats, `attention: float8` is streams' attention from such, and `decoder: tiny` decodes with another network: all are approximate.
    """

    def __init__(
        self,
        member: Member,
        *,
        precision: Streamed = "bfloat16",
        attention: Literal["float8"] | None = None,
        decoder: Literal["vae", "tiny"] = "vae",
        reduced: bool = False,
    ) -> None:
        super().__init__()
        member = smaller(member) if reduced else member
        eight = asked(products=precision, attention=attention)
        self.member = replace(member, dit=replace(member.dit, islands=precision == "mixed", float8=eight))
        self.dtype = torch.float32 if precision == "float32" else torch.bfloat16
        self.vae_dtype = torch.float32 if precision == "mixed" else self.dtype
        rows, columns = member.height // member.vae.patch, member.width // member.vae.patch
        self.shape = VideoShape(member.dit.in_dim, rows, columns, member.height, member.width, member.fps)
        with torch.device("meta"):
            self.denoiser = WanDiT(self.member.dit)
            self.vae = WanVAE(member.vae)
            self.tiny = TinyVAE(member.dit.in_dim) if decoder == "tiny" else None
        self.denoiser.store(self.dtype)  # while nothing takes memory yet: tensors are converted one by one as they come in
        self.vae.to(self.vae_dtype)
        if self.tiny is not None:
            self.tiny.to(self.vae_dtype)
        self.text: TextEncoder | None = None

    def parts(self) -> dict[str, WeightsCfg]:
        """Files beside the denoiser's: what `load` wants to be told the places of."""
        return {"text": TEXT, "tokenizer": TOKENIZER, "vae": self._vae_file} | ({"tiny": TINY} if self.tiny is not None else {})

    def load(self, tensors: Mapping[str, Tensor], where: Any, parts: Mapping[str, Path]) -> None:
        """Take all weights, strictly.

        Raises:
            UserError: some are of another model, or their file is corrupt.
        """
        load_into(self.denoiser, tensors, where=where)
        self.vae.load(read_tensors(parts["vae"], self._vae_file), parts["vae"])
        if self.tiny is not None:
            self.tiny.load(read_tensors(parts["tiny"], TINY), parts["tiny"])
        cache = settings().weights / "embeddings"
        self.text = WanText(parts["text"], parts["tokenizer"].parent, cache, dtype=self.dtype, cfg=self.member.text, sha256=TEXT.sha256)

    def fresh(self, seed: int) -> None:
        """Random weights for every part; prompts are hashed word by word, since there is no tokenizer."""
        rng = torch.Generator().manual_seed(seed)
        for module in (self.denoiser, self.vae, self.tiny):
            if module is not None:
                draw(module, rng)
        self.text = RandomText(self.member.text, self.dtype, seed)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        assert self.text is not None, "weights are loaded or drawn first"
        return self.text.encode(prompts, device=self._device)

    def remember(self, prompts: Sequence[str]) -> None:
        """Embed prompts that are not in the cache on disk yet, then give the encoder's memory back."""
        assert self.text is not None, "weights are loaded or drawn first"
        self.text.remember(prompts, device="cuda" if torch.cuda.is_available() else "cpu")

    def encode_pixels(self, pixel_BTCHW: Tensor) -> Tensor:
        return WanEncoder(self.vae)(pixel_BTCHW.to(self._device)).to(self.denoiser.dtype)

    def decoder(self) -> Decoder:
        return WanDecoder(self.vae) if self.tiny is None else TinyDecoder(self.tiny)

    @property
    def _vae_file(self) -> WeightsCfg:
        return VAE22 if isinstance(self.member.vae, VAE22Cfg) else VAE

    @property
    def _device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


class RandomText:
    """The text encoder with random weights; a word's token is its hash, so that other words give another embedding."""

    def __init__(self, cfg: UMT5Cfg, dtype: torch.dtype, seed: int) -> None:
        self.cfg, self.dtype, self.seed = cfg, dtype, seed
        self._drawn: Any = None

    def encoder(self, device: torch.device) -> Any:
        """Drawn on its device: billions of numbers take a second there, and a minute on the host."""
        if self._drawn is not None:
            return self._drawn.to(device)
        encoder = empty_encoder(self.cfg).to(self.dtype)
        draw(encoder, torch.Generator(device).manual_seed(self.seed))
        encoder.encoder.set_input_embeddings(encoder.shared)
        self._drawn = encoder.requires_grad_(False).eval()
        return self._drawn

    def encode(self, prompts: Sequence[str], *, device: torch.device | str) -> Tensor:
        text_BLE = torch.zeros(len(prompts), self.cfg.text_len, self.cfg.dim, dtype=self.dtype, device=device)
        for text_LE, prompt in zip(text_BLE, prompts, strict=True):
            words = clean(prompt).split()[: self.cfg.text_len - 1]
            ids = [int(hashlib.sha256(word.encode()).hexdigest(), 16) % (self.cfg.vocab - 2) + 2 for word in words]
            text_LE[: len(ids) + 1] = embed(self.encoder(torch.device(device)), [*ids, 1])
        return text_BLE

    def remember(self, prompts: Sequence[str], *, device: torch.device | str) -> None:
        """Nothing: the encoder is small."""


def draw(module: nn.Module, rng: torch.Generator) -> None:
    """Random weights in place of those on `meta`: matrices at a scale that keeps signals as large as they come in, gains of one, no biases."""
    module.to_empty(device=rng.device)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and parameter[0].numel() > 1:
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim != 3 else parameter.shape[-1]  # three axes: a table of modulation
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=rng)
        else:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)


wan_1_3b = functools.partial(WanBackbone, WAN_1_3B)
wan_14b = functools.partial(WanBackbone, WAN_14B)
skyreels_df_1_3b = functools.partial(WanBackbone, SKYREELS_DF_1_3B, precision="mixed")


def wan22_5b(*, precision: Streamed = "bfloat16", attention: Literal["float8"] | None = None, reduced: bool = False) -> WanBackbone:
    """There is no tiny decoder of its latents."""
    return WanBackbone(WAN_5B, precision=precision, attention=attention, reduced=reduced)
