"""The toy backbone's autoencoder and text: streams without traces, a torus, Wan's rule for frames, and what it cannot read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfbench import world
from rfbench.backbones import toy
from rfbench.backbones.base import latent_frames, pixel_frames
from rfbench.errors import UserError

FIT = toy.fit_autoencoder  # before a test shrinks it
FRAMES = 29


@pytest.fixture(scope="module")
def autoencoder() -> toy.Autoencoder:
    return FIT(0, clips=12)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Two clips that no autoencoder was fitted on: [2, 29, 3, 48, 64]."""
    rng = np.random.default_rng(77)
    _, found = world.draw_clips(78, [world.draw_caption(rng) for _ in range(2)], FRAMES)
    return torch.from_numpy(found)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=8))
@torch.no_grad()
def test_streamed_pixels_are_those_of_decoding_at_once(autoencoder: toy.Autoencoder, sizes: list[int]) -> None:
    """Bit for bit, for any chunks: their borders leave no trace."""
    latents = torch.randn(2, sum(sizes), toy.CHANNELS, 6, 8, generator=torch.Generator().manual_seed(len(sizes)))
    decode, at_once = toy.ToyDecoder(autoencoder), toy.ToyDecoder(autoencoder)(latents)
    parts = [decode(part) for part in latents.split(sizes, dim=1)]
    assert [part.shape[1] for part in parts] == [4 * size - (number == 0) * 3 for number, size in enumerate(sizes)]
    assert torch.equal(torch.cat(parts, 1), at_once)
    assert at_once.shape == (2, pixel_frames(sum(sizes)), 3, 48, 64)


@settings(max_examples=10)
@given(st.integers(-6, 6), st.integers(-8, 8))
@torch.no_grad()
def test_space_is_a_torus(autoencoder: toy.Autoencoder, pixels: Tensor, rows: int, columns: int) -> None:
    """A clip shifted by whole patches has shifted latents and comes back shifted."""
    latents = autoencoder.encode(pixels)
    shifted = autoencoder.encode(torch.roll(pixels, (8 * rows, 8 * columns), (3, 4)))
    assert (shifted - torch.roll(latents, (rows, columns), (3, 4))).abs().max() < 1e-5
    moved = autoencoder.decode(torch.roll(latents, (rows, columns), (3, 4)), None)
    assert (moved - torch.roll(autoencoder.decode(latents, None), (8 * rows, 8 * columns), (3, 4))).abs().max() < 1e-5


@torch.no_grad()
def test_clips_come_back_almost_as_they_were(autoencoder: toy.Autoencoder, pixels: Tensor) -> None:
    again = autoencoder.decode(autoencoder.encode(pixels), None)
    assert again.shape == pixels.shape
    psnr = 10 * math.log10(4 / float((again - pixels).square().mean()))
    grey = 10 * math.log10(4 / float((toy.GREY - pixels).square().mean()))
    assert psnr > 28 and psnr > grey + 9
    sprite = (pixels - toy.GREY).abs().amax(2, keepdim=True) > 0.5
    assert float((again - pixels).abs()[sprite.expand_as(pixels)].mean()) < 0.15


@torch.no_grad()
def test_the_tiny_decoder_is_the_best_that_a_patch_of_its_own_can_do(autoencoder: toy.Autoencoder, pixels: Tensor) -> None:
    """On the clips of the fit, numpy's least squares from each latent to the patch that it was made of; and neighbours know more."""
    rng = np.random.default_rng(0)
    _, fitted_on = world.draw_clips(0, [world.draw_caption(rng) for _ in range(12)], 81)
    clips = torch.from_numpy(fitted_on)
    latents, target = autoencoder.encode(clips), toy.patches(clips)
    z, wanted = latents.permute(0, 1, 3, 4, 2).flatten(0, 3).double().numpy(), target.flatten(0, 3).double().numpy()
    best = (z @ np.linalg.lstsq(z, wanted, rcond=None)[0]).reshape(target.shape).clip(-1 - toy.GREY, 1 - toy.GREY)
    guessed = toy.patches(autoencoder.guess(latents)[:, 3:])  # in which the first frame is repeated, as in no guess
    assert np.abs(guessed.double().numpy() - best)[:, 1:].max() < 1e-4
    ways = toy.ToyDecoder(autoencoder), toy.TinyToyDecoder(autoencoder)
    full, tiny = (float((decode(autoencoder.encode(pixels)) - pixels).square().mean()) for decode in ways)
    assert 1.1 < tiny / full < 3


@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
@torch.no_grad()
def test_the_tiny_decoder_streams(autoencoder: toy.Autoencoder, sizes: list[int]) -> None:
    latents = torch.randn(2, sum(sizes), toy.CHANNELS, 6, 8, generator=torch.Generator().manual_seed(len(sizes)))
    decode, at_once = toy.TinyToyDecoder(autoencoder), toy.TinyToyDecoder(autoencoder)(latents)
    assert torch.equal(torch.cat([decode(part) for part in latents.split(sizes, dim=1)], 1), at_once)
    assert at_once.shape == (2, pixel_frames(sum(sizes)), 3, 48, 64)


@torch.no_grad()
def test_a_latent_holds_four_frames_and_the_first_latent_one(autoencoder: toy.Autoencoder, pixels: Tensor) -> None:
    latents = autoencoder.encode(pixels)
    assert latents.shape == (2, 8, toy.CHANNELS, 6, 8)
    for frame in (0, 1, 4, 5, 28):
        changed = pixels.clone()
        changed[:, frame] += 0.5
        touched = (autoencoder.encode(changed) - latents).abs().amax((0, 2, 3, 4)) > 1e-6
        assert touched.nonzero().flatten().tolist() == [math.ceil(frame / 4)]
    assert torch.equal(autoencoder.encode(pixels[:, :28]), latents[:, :7])  # surplus frames are dropped
    assert torch.equal(autoencoder.encode(pixels[:, :1]), latents[:, :1])


@torch.no_grad()
def test_pixels_hang_on_this_latent_and_the_one_before(autoencoder: toy.Autoencoder, pixels: Tensor) -> None:
    latents = autoencoder.encode(pixels) * 0.5  # away from the clamp
    before = autoencoder.decode(latents, None)
    changed = latents.clone()
    changed[:, 3, :, 2, 5] += 0.3
    difference = (autoencoder.decode(changed, None) - before).abs().amax((0, 2))
    assert (difference.amax((1, 2)) > 1e-5).nonzero().flatten().tolist() == list(range(9, 17))
    near = difference.amax(0) > 1e-6
    assert near[8:32, 32:56].any() and not near[32:].any() and not near[:8].any() and not near[:, :32].any() and not near[:, 56:].any()


def test_lengths_are_converted_both_ways() -> None:
    assert [pixel_frames(latents) for latents in (1, 3, 21, 120)] == [1, 9, 81, 477]
    assert [latent_frames(frames, None) for frames in (1, 2, 5, 6, 81, 477)] == [1, 2, 2, 3, 21, 120]
    assert [latent_frames(frames, 3) for frames in (1, 81, 82, 477)] == [3, 21, 24, 120]


def test_fitting_depends_on_the_seed_alone() -> None:
    first, again, other = (FIT(seed, clips=2).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_prompt_is_its_words_at_their_places() -> None:
    text = toy.ToyText()
    long, short, empty = text(["a red disc moves left quickly then right", "a red disc", ""])
    assert long.shape == short.shape == (toy.TEXT_LEN, toy.TEXT_DIM)
    for place, word in enumerate(["a", "red", "disc", "moves", "left", "quickly", "then", "right"]):
        assert torch.equal(long[place], text.words.weight[world.WORDS.index(word)] + text.places.weight[place])
    assert torch.equal(short[:3], long[:3])
    assert not short[3:].any() and not long[8:].any() and not empty.any()


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a purple disc", "does not know the word 'purple'"),
        ("a red dics", "did you mean 'disc'"),
        ("red disc", "not a sentence of the toy world"),
        ("a red disc moves", "not a sentence of the toy world"),
        ("a disc red", "not a sentence of the toy world"),
        ("a red disc " * 1000, "not a sentence of the toy world"),
        ("../../x\n😀", "does not know the word"),
        (" ", "not a sentence of the toy world"),
    ],
)
def test_a_prompt_it_cannot_read_is_refused(prompt: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as raised:
        toy.ToyText()([prompt])
    assert len(str(raised.value)) < 400


def test_fresh_weights_come_from_the_seed_and_predict_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy, "fit_autoencoder", lambda seed, clips: FIT(seed, clips=2))
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        backbone = toy.ToyBackbone()
        backbone.fresh(5)
        states.append(backbone.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    with torch.no_grad():
        x = torch.randn(1, 2, toy.CHANNELS, 6, 8)
        assert not backbone.denoiser(x, torch.full((1, 1), 500.0), backbone.encode_text(["a red disc"])).any()
    before = {name: tensor.clone() for name, tensor in states[1].items()}
    backbone.fresh(6)
    same = {name for name, tensor in backbone.state_dict().items() if torch.equal(tensor, before[name])}
    constant = {name for name in same if not before[name].std() > 0}  # biases and scales of norms
    assert same == constant
