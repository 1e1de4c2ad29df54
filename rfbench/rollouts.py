"""Clips that are longer than a model's rollouts: several of them, each beginning with the last frames of the one before.

Shapes: B batch, F latent frames, T pixel frames, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rfbench.backbones.base import Backbone, pixel_frames
from rfbench.config import RerollCfg

Roll = Callable[[int, int, Tensor | None], Iterator[Tensor]]  # first latent frame, latent frames, given ones -> chunks, given ones first


def chain(backbone: Backbone, latents: int, cfg: RerollCfg, roll: Roll) -> Iterator[Tensor]:
    """Pixels [B, T, 3, H, W] of a clip of `latents` latent frames, as a stream.

    Frames that are made anew are what the encoder makes of the pixels that the rollout shows of them: of the first one alone
    (`cfg.anew: first`), which the encoder takes for the first frame of a video, or of all. The next rollout is a video of its
    own for the decoder too, unless nothing is made anew: then one decoder goes through all.
    """
    decode, start, given = backbone.decoder(), 0, None
    while True:
        length = min(cfg.latents, latents - start)
        hold = pixel_frames(cfg.overlap) if start + length < latents else 0
        made, kept, tail = 0, list[Tensor](), list[Tensor]()  # latent frames so far; the last pixel frames and latent frames
        for chunk_BFCHW in roll(start, length, given):
            again = given is not None and made < cfg.overlap
            made += chunk_BFCHW.shape[1]
            tail = [torch.cat([*tail, chunk_BFCHW], 1)[:, -cfg.overlap :]]
            if again and cfg.anew == "none":
                continue
            pixels = decode(chunk_BFCHW)
            all_BTCHW = torch.cat([*kept, pixels], 1)
            ready = max(0, all_BTCHW.shape[1] - hold)
            kept = [all_BTCHW[:, ready:]]
            if cfg.anew == "first":
                yield all_BTCHW[:, :ready]
            elif not again:
                yield pixels
        if not hold:
            return
        start, given = start + length - cfg.overlap, tail[0]
        if cfg.anew != "none":
            encoded = backbone.encode_pixels(kept[0][:, :1] if cfg.anew == "first" else kept[0])
            decode, given = backbone.decoder(), torch.cat([encoded, tail[0][:, encoded.shape[1] :]], 1)
