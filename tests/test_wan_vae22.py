"""The Wan2.2 autoencoder: names, diffusers' implementation, streams in any chunks, precision, wrong files."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rfbench.backbones.base import pixel_frames
from rfbench.backbones.wan.vae import AT_ONCE, VAECfg, WanDecoder, WanEncoder, WanVAE, diffusers_names, folded, unfolded
from rfbench.backbones.wan.vae22 import VAE22Cfg, averaged, repeated
from rfbench.errors import UserError
from tests.test_wan_vae import CHUNKS, ROUNDING, check_half_precision, chunked, randomised
from tests.tiny import distance, normal

KEYS = Path(__file__).parent / "keys" / "wan2.2_vae.json"
FOUR: dict[str, Any] = {"z_dim": 4, "mean": (0.0, 0.5, -1.0, 2.0), "std": (1.0, 0.5, 2.0, 3.0)}
CFG = VAE22Cfg(dim=4, decoder_dim=6, num_res_blocks=1, **FOUR)
CONFIGS = (
    CFG,
    VAE22Cfg(dim=4, decoder_dim=4, num_res_blocks=2),
    VAE22Cfg(dim=4, decoder_dim=6, dim_mult=(1, 2, 2), temporal_downsample=(True, True), **FOUR),
    VAE22Cfg(dim=6, decoder_dim=2, dim_mult=(1, 2, 2), num_res_blocks=1, temporal_downsample=(True, False), **FOUR),
)


@functools.cache
def wan(cfg: VAE22Cfg = CFG) -> WanVAE:
    return randomised(WanVAE(cfg))


def latents(frames: int, batch: int = 1) -> Tensor:
    return normal(batch, frames, CFG.z_dim, 1, 2)


def test_names_shapes_and_normalisation_are_those_of_the_reference() -> None:
    about = json.loads(KEYS.read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = WanVAE(VAE22Cfg())
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == about["tensors"]
    assert sum(parameter.numel() for parameter in model.parameters()) == about["num_parameters"] == 704_688_668
    assert {name: json.loads(json.dumps(getattr(model.cfg, name))) for name in about["config"]} == about["config"]
    assert model.cfg.patch == 16


# Against other implementations


def diffusers_vae(cfg: VAE22Cfg) -> Any:
    from diffusers import AutoencoderKLWan

    sizes = {"base_dim": cfg.dim, "decoder_base_dim": cfg.decoder_dim, "z_dim": cfg.z_dim, "num_res_blocks": cfg.num_res_blocks}
    layout = {"dim_mult": list(cfg.dim_mult), "temperal_downsample": list(cfg.temporal_downsample), "scale_factor_spatial": cfg.patch}
    patched = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    theirs: Any = AutoencoderKLWan(**sizes, **layout, **patched)
    return randomised(theirs)


@pytest.mark.parametrize("cfg", CONFIGS, ids=range(len(CONFIGS)))
def test_diffusers_weights_give_diffusers_results(cfg: VAE22Cfg) -> None:
    theirs, ours = diffusers_vae(cfg), WanVAE(cfg)
    names = diffusers_names(cfg)
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == set(theirs.state_dict())
    ours.load(theirs.state_dict(), "weights")
    again = WanVAE(cfg)
    again.load({name: theirs.state_dict()[names[name]] for name in names}, "weights")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))

    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (cfg.mean, cfg.std))
    frames = 1 + 2 * 2 ** sum(cfg.temporal_downsample)
    pixel, latent = normal(2, frames, 3, 2 * cfg.patch, cfg.patch).tanh(), normal(2, 3, cfg.z_dim, 1, 2)
    if sum(cfg.temporal_downsample) == 2:  # diffusers encodes in groups of 4 whatever the downsampling
        expected = ((theirs.encode(pixel.transpose(1, 2)).latent_dist.mode() - mean) / std).transpose(1, 2)
        assert expected.shape == (2, 3, cfg.z_dim, 2, 1)
        assert distance(WanEncoder(ours)(pixel), expected) < 1e-5
    expected = theirs.decode(latent.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    assert expected.shape == (2, frames, 3, cfg.patch, 2 * cfg.patch)
    assert (expected.abs() < 1).float().mean() > 0.3
    assert distance(WanDecoder(ours)(latent), expected.clamp(-1, 1)) < 1e-5


def test_half_precision_loses_no_more_than_op_by_op() -> None:
    check_half_precision(diffusers_vae(CFG), WanVAE(CFG), normal(2, 9, 3, 32, 32).tanh(), latents(4, batch=2))


def test_shortcuts_of_equal_width_are_pooling_and_nearest_neighbours() -> None:
    x_BTHWC = normal(2, 4, 6, 8, 3)
    x_BCTHW = x_BTHWC.permute(0, 4, 1, 2, 3)
    for times in (1, 2):
        pooled = functional.avg_pool3d(x_BCTHW, (times, 2, 2)).permute(0, 2, 3, 4, 1)
        assert distance(averaged(x_BTHWC, 3, times, 2), pooled) < 1e-6
        nearest = x_BCTHW.repeat_interleave(times, 2).repeat_interleave(2, 3).repeat_interleave(2, 4).permute(0, 2, 3, 4, 1)
        assert torch.equal(repeated(x_BTHWC, 3, times, 2), nearest)
    first = averaged(x_BTHWC[:, :1], 3, 2, 1)
    assert torch.equal(first, x_BTHWC[:, :1] / 2), "a stream begins after a frame of zeros"


def test_pixels_become_channels_and_come_back() -> None:
    x_BTHWC = normal(2, 3, 4, 6, 3)
    patches = folded(x_BTHWC, 2)
    assert patches.shape == (2, 3, 2, 3, 12)
    assert torch.equal(unfolded(patches, 2), x_BTHWC) and torch.equal(folded(x_BTHWC, 1), x_BTHWC)
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(patches[..., 4 * channel + 2 * column + row], x_BTHWC[:, :, row::2, column::2, channel])


# Streams


@settings(max_examples=8, deadline=None)
@given(chunks=CHUNKS)
def test_decoding_in_chunks_is_decoding_at_once(chunks: list[int]) -> None:
    latent = latents(sum(chunks), batch=2)
    whole, parts = WanDecoder(wan())(latent), chunked(WanDecoder(wan()), latent, chunks)
    assert [part.shape[1] for part in parts] == [4 * chunk - (0 if number else 3) for number, chunk in enumerate(chunks)]
    assert whole.shape == (2, pixel_frames(sum(chunks)), 3, 16, 32)
    assert distance(torch.cat(parts, dim=1), whole) < ROUNDING
    assert whole.abs().max() <= 1 < 100 * whole.std()


@settings(max_examples=8, deadline=None)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_encoding_in_chunks_is_encoding_at_once(chunks: list[int]) -> None:
    frames = sum(chunks)
    pixel = normal(2, frames, 3, 16, 32).tanh()
    whole, parts = WanEncoder(wan())(pixel), chunked(WanEncoder(wan()), pixel, chunks)
    assert whole.shape == (2, 1 + (frames - 1) // 4, CFG.z_dim, 1, 2)
    assert distance(torch.cat(parts, dim=1), whole) < ROUNDING


def test_the_past_does_not_grow() -> None:
    decode, encode = WanDecoder(wan()), WanEncoder(wan())
    sizes = [(decode(latents(frames)), sum(t.numel() for t in decode.past.values()))[1] for frames in (2, 1, AT_ONCE + 3)]
    assert len(set(sizes)) == 1
    sizes = [(encode(normal(1, frames, 3, 16, 16)), sum(t.numel() for t in encode.past.values()))[1] for frames in (5, 4, 12)]
    assert len(set(sizes)) == 1


def test_a_clip_does_not_see_its_neighbour_or_the_future() -> None:
    latent = latents(4, batch=2)
    whole = WanDecoder(wan())(latent)
    assert distance(WanDecoder(wan())(latent[1:, :2]), whole[1:, :5]) < ROUNDING


# Wrong files and sizes


@pytest.mark.parametrize(
    ("model", "tensors", "says"),
    [
        (lambda: WanVAE(CFG), lambda: WanVAE(VAECfg(dim=4)).state_dict(), "lacks .* tensor"),
        (lambda: WanVAE(VAECfg(dim=4)), lambda: WanVAE(CFG).state_dict(), "lacks .* tensor"),
        (lambda: WanVAE(CFG), lambda: WanVAE(VAE22Cfg(dim=4, decoder_dim=4, num_res_blocks=1, **FOUR)).state_dict(), "another shape"),
    ],
    ids=["2.1 for 2.2", "2.2 for 2.1", "size"],
)
def test_wrong_weights_are_one_sentence(model: Any, tensors: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        model().load(tensors(), "some/file.pth")
    assert str(error.value).startswith("some/file.pth") and "\n" not in str(error.value)


def test_pixels_that_are_no_whole_latents_are_refused() -> None:
    with pytest.raises(UserError, match=r"24 x 16 pixels .* multiples of 16"):
        WanEncoder(wan())(torch.zeros(1, 1, 3, 16, 24))
