"""The video autoencoder and the tiny decoder: sizes, streams in any chunks, diffusers' implementation, memory, arithmetic, wrong files.

That the autoencoder computes what the reference computes is tests/test_golden.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rfbench.backbones.base import pixel_frames
from rfbench.backbones.wan.tiny_vae import TinyDecoder, TinyVAE
from rfbench.backbones.wan.vae import AT_ONCE, Attention, VAECfg, WanDecoder, WanEncoder, WanVAE, diffusers_names
from rfbench.errors import UserError
from tests.tiny import distance, normal

KEYS = Path(__file__).parent / "golden" / "keys"
CFG = VAECfg(dim=4, num_res_blocks=1)
ROUNDING = 2e-6  # chunked and whole: convolutions add up in another order


def randomised(model: nn.Module, seed: int = 0) -> Any:
    """The model with random weights that keep activations near 1 and pixels mostly within their range."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 and not name.endswith("gamma") else 100
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * fan_in**-0.5 + name.endswith("gamma"))
    return model.requires_grad_(False)


@functools.cache
def wan(cfg: VAECfg = CFG) -> WanVAE:
    return randomised(WanVAE(cfg))


@functools.cache
def tiny() -> TinyVAE:
    return randomised(TinyVAE(widths=(12, 8, 6, 6)))


def latents(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return normal(batch, frames, 16, 2, 3, seed=seed)


def chunked(stream: Callable[[Tensor], Tensor], whole: Tensor, chunks: list[int]) -> list[Tensor]:
    return [stream(part) for part in whole.split(chunks, dim=1)]


CHUNKS = st.lists(st.integers(1, 6), min_size=1, max_size=4)
DECODERS: dict[str, Callable[[], Any]] = {"wan": lambda: WanDecoder(wan()), "tiny": lambda: TinyDecoder(tiny())}


# Sizes


def test_names_and_shapes_are_those_of_the_published_checkpoint() -> None:
    about = json.loads((KEYS / "wan_vae.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        model = WanVAE(VAECfg())
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == dict(about["tensors"])
    assert sum(parameter.numel() for parameter in model.parameters()) == about["num_parameters"]
    written = {name: value for name, value in about["config"].items() if name != "temperal_downsample"}
    assert {name: json.loads(json.dumps(getattr(model.cfg, name))) for name in written} == written
    assert list(VAECfg().temporal_downsample) == about["config"]["temperal_downsample"]


def test_the_tiny_decoder_has_the_published_layout() -> None:
    """As the headers of taew2_1.safetensors were written down by those who read them: 64 decoder tensors, 9 844 611 weights."""
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in TinyVAE().state_dict().items()}
    expected: dict[str, tuple[int, ...]] = {"decoder.1.weight": (256, 16, 3, 3), "decoder.1.bias": (256,)}
    for first, width in ((3, 256), (9, 128), (15, 64)):
        for block in range(first, first + 3):
            for layer in (0, 2, 4):
                expected[f"decoder.{block}.conv.{layer}.weight"] = (width, width * (1 if layer else 2), 3, 3)
                expected[f"decoder.{block}.conv.{layer}.bias"] = (width,)
    expected |= {"decoder.7.conv.weight": (256, 256, 1, 1), "decoder.13.conv.weight": (256, 128, 1, 1), "decoder.19.conv.weight": (128, 64, 1, 1)}
    expected |= {"decoder.8.weight": (128, 256, 3, 3), "decoder.14.weight": (64, 128, 3, 3), "decoder.20.weight": (64, 64, 3, 3)}
    expected |= {"decoder.22.weight": (3, 64, 3, 3), "decoder.22.bias": (3,)}
    assert found == expected
    assert len(expected) == 64
    assert sum(torch.Size(shape).numel() for shape in found.values()) == 9_844_611


@pytest.mark.parametrize(
    ("open_decoder", "first", "later"),
    [(lambda: WanDecoder(WanVAE(VAECfg())), 4.3522, 13.5500), (lambda: TinyDecoder(TinyVAE()), 0.544, 0.544)],
    ids=["wan", "tiny"],
)
def test_arithmetic_is_that_of_the_reference(open_decoder: Callable[[], Any], first: float, later: float) -> None:
    """TFLOP per latent frame at 480 x 832, as counted on the reference's own modules; several at once cost as much as one by one."""
    with torch.device("meta"):
        decoder, latent = open_decoder(), torch.empty(1, 4, 16, 60, 104)
    for frames, expected in ((1, first), (1, later), (3, 3 * later)):
        with FlopCounterMode(display=False) as count:
            decoder(latent[:, :frames])
        assert count.get_total_flops() / 1e12 == pytest.approx(expected, rel=1e-3)


# Streams


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=12, deadline=None)
@given(chunks=CHUNKS)
def test_decoding_in_chunks_is_decoding_at_once(name: str, chunks: list[int]) -> None:
    latent = latents(sum(chunks), batch=2)
    whole, parts = DECODERS[name]()(latent), chunked(DECODERS[name](), latent, chunks)
    assert [part.shape[1] for part in parts] == [4 * chunk - (0 if number else 3) for number, chunk in enumerate(chunks)]
    assert whole.shape == (2, pixel_frames(sum(chunks)), 3, 16, 24)
    assert distance(torch.cat(parts, dim=1), whole) < ROUNDING
    assert whole.abs().max() <= 1 < 100 * whole.std()


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_encoding_in_chunks_is_encoding_at_once(chunks: list[int]) -> None:
    """Frames that do not fill a group wait for the next chunk, so a chunk may give nothing."""
    frames = sum(chunks)
    pixel = normal(2, frames, 3, 16, 8).tanh()
    whole, parts = WanEncoder(wan())(pixel), chunked(WanEncoder(wan()), pixel, chunks)
    ends = [sum(chunks[: number + 1]) for number in range(len(chunks))]
    assert [part.shape[1] for part in parts] == [b - a for a, b in pairwise([0, *(1 + (end - 1) // 4 for end in ends)])]
    assert whole.shape == (2, 1 + (frames - 1) // 4, 16, 2, 1)
    assert distance(torch.cat(parts, dim=1), whole) < ROUNDING


def test_many_frames_in_one_call() -> None:
    """More than go through the network together."""
    assert AT_ONCE < 9
    latent, pixel = latents(9), normal(1, 37, 3, 16, 16).tanh()
    for name in DECODERS:
        assert distance(torch.cat(chunked(DECODERS[name](), latent, [1] * 9), dim=1), DECODERS[name]()(latent)) < ROUNDING
    assert distance(torch.cat(chunked(WanEncoder(wan()), pixel, [1] + [4] * 9), dim=1), WanEncoder(wan())(pixel)) < ROUNDING


def test_clips_of_a_batch_do_not_see_each_other() -> None:
    latent, pixel = latents(3, batch=3), normal(3, 9, 3, 16, 16).tanh()
    for i in range(3):
        for name in DECODERS:
            assert distance(DECODERS[name]()(latent[i : i + 1]), DECODERS[name]()(latent)[i : i + 1]) < ROUNDING
        assert distance(WanEncoder(wan())(pixel[i : i + 1]), WanEncoder(wan())(pixel)[i : i + 1]) < ROUNDING


def test_streams_through_the_same_weights_do_not_see_each_other() -> None:
    one, other = latents(4), latents(4, seed=1)
    for name in DECODERS:
        streams = DECODERS[name](), DECODERS[name]()
        parts = [[stream(latent[:, i : i + 1]) for stream, latent in zip(streams, (one, other), strict=True)] for i in range(4)]
        for number, latent in enumerate((one, other)):
            assert distance(torch.cat([part[number] for part in parts], dim=1), DECODERS[name]()(latent)) < ROUNDING


def test_the_past_does_not_grow_and_holds_on_to_nothing_else() -> None:
    def held(stream: Any) -> int:
        tensors = [*stream.past.values(), *([stream.waiting_BTHWC] if isinstance(stream, WanEncoder) else [])]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors), "a view keeps a whole chunk alive"
        return sum(tensor.numel() for tensor in tensors)

    for name in DECODERS:
        stream = DECODERS[name]()
        sizes = [(stream(latents(frames)), held(stream))[1] for frames in (2, 1, 3, 9)]
        assert len(set(sizes)) == 1
    stream = WanEncoder(wan())
    sizes = [(stream(normal(1, frames, 3, 16, 16)), held(stream))[1] for frames in (5, 4, 12, 36)]
    assert len(set(sizes)) == 1


class Convolutions(TorchDispatchMode):
    """How many convolutions run, and of how many frames at most."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.frames = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.calls += 1
            self.frames = max(self.frames, args[0].shape[2] if args[0].ndim == 5 else args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", DECODERS)
def test_a_chunk_is_one_pass_and_a_long_clip_is_several(name: str) -> None:
    stream, counts = DECODERS[name](), []
    stream(latents(1))
    for frames in (1, 3, AT_ONCE, 3 * AT_ONCE):
        with Convolutions() as count:
            stream(latents(frames))
        counts.append(count)
    assert counts[0].calls == counts[1].calls == counts[2].calls == counts[3].calls / 3
    assert counts[1].frames > counts[0].frames
    assert counts[3].frames == counts[2].frames


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixels_and_latents_are_float32_whatever_the_weights_are(dtype: torch.dtype) -> None:
    latent = latents(2)
    pairs: list[tuple[nn.Module, Any]] = [(WanVAE(CFG), WanDecoder), (TinyVAE(widths=(12, 8, 6, 6)), TinyDecoder)]
    for model, stream in pairs:
        exact = stream(randomised(model))(latent)
        rounded = stream(model.to(dtype))(latent.to(dtype))
        assert rounded.dtype == torch.float32
        assert distance(rounded, exact) < (0.05 if dtype == torch.bfloat16 else 1e-6)
    pixel, vae = normal(1, 5, 3, 16, 16).tanh(), randomised(WanVAE(CFG))
    exact, rounded = WanEncoder(vae)(pixel), WanEncoder(vae.to(dtype))(pixel.to(dtype))
    assert rounded.dtype == torch.float32
    assert distance(rounded, exact) < (0.05 if dtype == torch.bfloat16 else 1e-6)


# Against other implementations

CONFIGS = (
    CFG,
    VAECfg(dim=6, num_res_blocks=2),
    VAECfg(dim=4, dim_mult=(1, 3, 2), temporal_downsample=(True, True)),
    VAECfg(dim=4, z_dim=4, num_res_blocks=1, temporal_downsample=(False, False, True), mean=(0.0, 0.5, -1.0, 2.0), std=(1.0, 0.5, 2.0, 3.0)),
)


def diffusers_vae(cfg: VAECfg) -> Any:
    from diffusers import AutoencoderKLWan

    sizes = {"base_dim": cfg.dim, "z_dim": cfg.z_dim, "dim_mult": list(cfg.dim_mult), "num_res_blocks": cfg.num_res_blocks}
    theirs: Any = AutoencoderKLWan(**sizes, temperal_downsample=list(cfg.temporal_downsample))
    return randomised(theirs)


@pytest.mark.parametrize("cfg", CONFIGS, ids=range(len(CONFIGS)))
def test_diffusers_weights_give_diffusers_results(cfg: VAECfg) -> None:
    theirs, ours = diffusers_vae(cfg), WanVAE(cfg)
    names = diffusers_names(cfg)
    assert len(set(names.values())) == len(names)
    assert set(names.values()) == set(theirs.state_dict())
    ours.load(theirs.state_dict(), "weights")
    again = WanVAE(cfg)
    again.load({name: theirs.state_dict()[names[name]] for name in names}, "weights")
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))

    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (cfg.mean, cfg.std))
    pixel, latent = normal(2, 11, 3, 16, 24).tanh(), normal(2, 3, cfg.z_dim, 2, 3)
    expected = ((theirs.encode(pixel.transpose(1, 2)).latent_dist.mode() - mean) / std).transpose(1, 2)
    assert distance(WanEncoder(ours)(pixel), expected) < 1e-5
    expected = theirs.decode(latent.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    assert (expected.abs() < 1).float().mean() > 0.3
    assert distance(WanDecoder(ours)(latent), expected.clamp(-1, 1)) < 1e-5


def test_normalisation_is_that_of_diffusers() -> None:
    theirs = diffusers_vae(CFG).config
    assert tuple(theirs.latents_mean) == VAECfg().mean
    assert tuple(theirs.latents_std) == VAECfg().std


def check_half_precision(theirs: Any, ours: Any, pixel: Tensor, latent: Tensor) -> None:
    """bfloat16 weights and activations: our relative error to float32 is less than 1.1 times that of diffusers, both ways."""
    theirs.to(torch.bfloat16).float()
    ours.load(theirs.state_dict(), "weights")
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (ours.cfg.mean, ours.cfg.std))
    pixel = pixel.bfloat16().float()
    z = (latent.transpose(1, 2) * std + mean).bfloat16().float()
    exact, exact_pixel = theirs.encode(pixel.transpose(1, 2)).latent_dist.mode(), theirs.decode(z).sample
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    rounded, rounded_pixel = theirs.encode(pixel.bfloat16().transpose(1, 2)).latent_dist.mode(), theirs.decode(z.bfloat16()).sample
    own = WanEncoder(ours)(pixel).transpose(1, 2) * std + mean
    assert distance(own, exact) < 1.1 * distance(rounded, exact)
    own = WanDecoder(ours)(latent).transpose(1, 2)
    assert distance(own, exact_pixel.clamp(-1, 1)) < 1.1 * distance(rounded_pixel.clamp(-1, 1), exact_pixel.clamp(-1, 1))


def test_half_precision_loses_no_more_than_op_by_op() -> None:
    check_half_precision(diffusers_vae(CFG), WanVAE(CFG), normal(2, 9, 3, 16, 24).tanh(), latents(4, batch=2))


def test_attention_where_it_is_asked_for() -> None:
    """Scales count from 1 at the pixels; the decoder's from 1/4 at the latents of four resolutions."""
    names = WanVAE(replace(CFG, attn_scales=(0.25,))).state_dict()
    attention = {name.rpartition(".norm")[0] for name in names if name.endswith("norm.gamma")}
    assert attention == {"encoder.middle.1", "decoder.middle.1", "encoder.downsamples.5", "decoder.upsamples.1", "decoder.upsamples.3"}
    vae, latent, pixel = wan(replace(CFG, attn_scales=(0.25,))), latents(4), normal(1, 9, 3, 16, 16)
    assert distance(torch.cat(chunked(WanDecoder(vae), latent, [2, 1, 1]), dim=1), WanDecoder(vae)(latent)) < ROUNDING
    assert distance(torch.cat(chunked(WanEncoder(vae), pixel, [5, 4]), dim=1), WanEncoder(vae)(pixel)) < ROUNDING

    layer, x_BTHWC = randomised(Attention(6)), normal(2, 3, 4, 5, 6)
    rows = (x_BTHWC / x_BTHWC.norm(dim=-1, keepdim=True) * 6**0.5 * layer.norm.gamma.flatten()).flatten(2, 3).double()
    q, k, v = (rows @ layer.to_qkv.weight.flatten(1).T.double() + layer.to_qkv.bias).split(6, dim=-1)
    mixed = torch.softmax(q @ k.transpose(-1, -2) / 6**0.5, dim=-1) @ v
    expected = x_BTHWC + (mixed @ layer.proj.weight.flatten(1).T.double() + layer.proj.bias).view_as(x_BTHWC)
    assert distance(layer(x_BTHWC, {}), expected) < 1e-6


def test_the_tiny_decoder_frame_by_frame() -> None:
    """Each frame alone, layer after layer, from the tensors by their names; the first three frames are thrown away."""
    weights, latent = tiny().state_dict(), latents(3)

    def conv(x: Tensor, name: str) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return functional.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [functional.relu(conv(3 * torch.tanh(z / 3), "1")) for z in latent[0]]
    for stage, times in ((3, 1), (9, 2), (15, 2)):
        for block in range(stage, stage + 3):
            pairs = pairwise([torch.zeros_like(frames[0]), *frames])
            both = [(x, torch.cat([x, before])) for before, x in pairs]
            for layer in (0, 2, 4):
                both = [(x, conv(y if layer == 0 else functional.relu(y), f"{block}.conv.{layer}")) for x, y in both]
            frames = [functional.relu(x + y) for x, y in both]
        frames = [x.repeat_interleave(2, -1).repeat_interleave(2, -2) for x in frames]
        frames = [part for x in frames for part in conv(x, f"{stage + 4}.conv").chunk(times)]
        frames = [conv(x, str(stage + 5)) for x in frames]
    expected = torch.stack([conv(functional.relu(x), "22") for x in frames])[None, 3:].clamp(0, 1) * 2 - 1
    assert (expected.abs() < 1).float().mean() > 0.1
    assert distance(TinyDecoder(tiny())(latent), expected) < 1e-6


def test_what_is_approximate_says_so() -> None:
    assert TinyDecoder(tiny()).approximate
    assert TinyVAE.approximate
    assert not WanDecoder(wan()).approximate


# Wrong files and sizes


def test_the_tiny_decoder_leaves_the_encoder_of_its_file_aside() -> None:
    model = TinyVAE(widths=(12, 8, 6, 6))
    model.load(tiny().state_dict() | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}, "taew2_1.pth")
    assert distance(TinyDecoder(model)(latents(2)), TinyDecoder(tiny())(latents(2))) == 0


def diffusers_named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = diffusers_names(CFG)
    return {names[name]: tensor for name, tensor in tensors.items()}


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("model", "tensors", "says"),
    [
        (wan, lambda: tiny().state_dict(), "lacks 146 tensor"),
        (tiny, lambda: wan().state_dict(), "lacks 64 tensor"),
        (wan, lambda: without(wan().state_dict(), "conv2.bias"), "lacks 1 tensor.*conv2.bias"),
        (wan, lambda: wan().state_dict() | {"encoder.mask": torch.zeros(1)}, "unknown 1 tensor.*encoder.mask"),
        (wan, lambda: wan().state_dict() | {"conv2.bias": torch.zeros(48)}, "another shape of 1 tensor.*conv2.bias"),
        (wan, lambda: {f"vae.{name}": tensor for name, tensor in wan().state_dict().items()}, "lacks 146 tensor"),
        (wan, lambda: diffusers_named(without(wan().state_dict(), "conv1.bias")), "lacks 1 tensor.*'conv1.bias'"),
    ],
)
def test_wrong_weights_are_one_sentence(model: Callable[[], Any], tensors: Callable[[], dict[str, Tensor]], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        model().load(tensors(), "some/file.pth")
    assert str(error.value).startswith("some/file.pth")
    assert "\n" not in str(error.value)


def test_pixels_that_are_no_whole_latents_are_refused() -> None:
    with pytest.raises(UserError, match=r"20 x 16 pixels .* multiples of 8"):
        WanEncoder(wan())(torch.zeros(1, 1, 3, 16, 20))
