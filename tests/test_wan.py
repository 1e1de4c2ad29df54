"""The Wan family as a backbone: from files in the original layouts to pixels, and with random weights from the command line."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from rfbench import baselines
from rfbench import generate as verb
from rfbench.backbones import known
from rfbench.backbones.base import load, open_backbone
from rfbench.backbones.wan import backbone as wan
from rfbench.backbones.wan.dit import WanDiT
from rfbench.backbones.wan.text import key_map
from rfbench.backbones.wan.vae import WanDecoder, WanEncoder
from rfbench.backbones.wan.vae22 import VAE22Cfg
from rfbench.config import CacheCfg, SamplerCfg, WeightsCfg
from rfbench.errors import UserError
from rfbench.sampler import generate, stream, timesteps
from tests.tiny import distance, normal

STUDENT = SamplerCfg((1000, 750, 500, 250), 5.0, cache=CacheCfg("ema_sink", 9, 3, 0.99, "float32"))
YAML = """
title: Student
backbone: wan2.1-1.3b
weights: {file: student.pt, key: generator_ema, strip: model.}
precision: float32
sampler: {steps: [1000, 750, 500, 250], shift: 5.0, cache: {policy: ema_sink, window: 9, sink: 3, alpha: 0.99, fold_dtype: float32}}
license: {code: apache-2.0, weights: apache-2.0}
"""


def reduced(**settings: str) -> wan.WanBackbone:
    made = open_backbone("wan2.1-1.3b", reduced=True, **settings)
    made.fresh(0)
    assert isinstance(made, wan.WanBackbone)
    return made


def tokenizer(path: Path) -> None:
    """A tokenizer.json that knows three words and ends every text with </s>."""
    made = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "kite": 5}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    path.parent.mkdir(parents=True)
    made.save(str(path))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> wan.WanBackbone:
    """A small member of the family whose weights lie on disk as their authors publish theirs; the same weights in memory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rfbench.toml").write_text('[paths]\nweights = "weights"\nruns = "runs"\nreports = "reports"\n')
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    monkeypatch.setattr(wan, "wan_1_3b", functools.partial(wan.WanBackbone, wan.REDUCED))
    unchecked = {role: replace(file, bytes=None, sha256=None) for role, file in known.WAN21.items()}
    monkeypatch.setitem(known.KNOWN, "wan2.1-1.3b", replace(known.KNOWN["wan2.1-1.3b"], files=unchecked))
    for role, file in unchecked.items():
        monkeypatch.setattr(wan, role.upper(), file)
    made = reduced(precision="float32")
    folder = tmp_path / "weights" / known.REPO
    tokenizer(folder / known.TOKENIZER.file)
    assert isinstance(made.text, wan.RandomText)
    encoder = made.text.encoder(torch.device("cpu")).state_dict()
    torch.save({ours: encoder[theirs] for ours, theirs in key_map(made.member.text.layers).items()}, folder / known.TEXT.file)
    torch.save(made.vae.state_dict(), folder / known.VAE.file)
    torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in made.denoiser.state_dict().items()}}, tmp_path / "student.pt")
    (tmp_path / "student.yaml").write_text(YAML)
    return made


def test_files_in_the_original_layouts_make_the_pixels_of_the_parts_by_hand(files, tmp_path):
    ready = baselines.prepare("student.yaml")
    assert set(dict(ready.parts)) == {"text", "tokenizer", "vae"} and ready.inputs()["parts"] == dict(ready.parts)
    opened = ready.open()
    found = torch.cat(list(generate(opened, ["a red kite"], 6, STUDENT, [5])), dim=1)
    assert found.shape == (1, 21, 3, 64, 96) and found.abs().max() <= 1

    ids = [3, 4, 5, 1]
    text = torch.zeros(1, 32, 64)
    with torch.no_grad():
        text[0, :4] = files.text.encoder(torch.device("cpu"))(torch.tensor([ids])).last_hidden_state[0]
        assert distance(opened.encode_text(["a red  kite"]), text) < 1e-6
        rng = torch.Generator().manual_seed(5)
        chunks = stream(files, text, 6, STUDENT, lambda frames: torch.randn(1, frames, 16, 8, 12, generator=rng))
        latents = torch.cat([chunk.latent_BFCHW for chunk in chunks], dim=1)
        wanted = WanDecoder(files.vae)(latents)
    assert distance(found, wanted) < 1e-5
    assert distance(opened.encode_pixels(found), WanEncoder(files.vae)(wanted)) < 1e-4


def test_a_prompt_is_encoded_once_for_all_clips(files, tmp_path):
    baselines.prepare("student.yaml").open().encode_text(["a red kite"])
    (entry,) = (tmp_path / "weights" / "embeddings").glob("*.safetensors")
    assert load_file(entry)["rows"].shape == (4, 64)


@pytest.mark.parametrize("missing", ["text", "tokenizer", "vae", "student.pt"])
def test_a_missing_file_is_named_before_anything_is_loaded(files, tmp_path, missing):
    parts = {"text": known.TEXT, "tokenizer": known.TOKENIZER, "vae": known.VAE}
    path = tmp_path / "weights" / known.REPO / parts[missing].file if missing in parts else tmp_path / missing
    path.unlink()
    with pytest.raises(UserError, match=path.name):
        baselines.prepare("student.yaml")


def test_weights_of_another_member_are_refused(files, tmp_path):
    other = {f"model.{name}": tensor[..., :1].clone() for name, tensor in files.denoiser.state_dict().items()}
    torch.save({"generator_ema": other}, tmp_path / "student.pt")
    with pytest.raises(UserError, match=r"student\.pt does not fit the model"):
        baselines.prepare("student.yaml").open()


@pytest.mark.parametrize(
    ("precision", "islands", "rest", "vae"),
    [
        ("bfloat16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("mixed", torch.float32, torch.bfloat16, torch.float32),
        ("float32", torch.float32, torch.float32, torch.float32),
    ],
)
def test_precision_decides_what_is_stored_how(precision, islands, rest, vae):
    made = reduced(precision=precision)
    stored = {name: parameter.dtype for name, parameter in made.denoiser.named_parameters()}
    assert stored["time_embedding.0.weight"] == stored["head.head.weight"] == stored["blocks.0.modulation"] == islands
    assert stored["blocks.0.ffn.0.weight"] == stored["blocks.1.self_attn.q.weight"] == rest
    assert {parameter.dtype for parameter in made.vae.parameters()} == {vae}
    assert made.encode_text(["x"]).dtype == rest


def test_a_setting_that_a_backbone_does_not_have_is_refused():
    with pytest.raises(UserError, match="backbone 'toy' does not use 'reduced'; leave it out"):
        open_backbone("toy", reduced=True)
    with pytest.raises(UserError, match="backbone 'toy' does not use 'precision'"):
        load("toy", WeightsCfg("x"), Path("x"), precision="bfloat16")


def test_random_weights_run_from_the_command_line_to_a_video(files, tmp_path, capsys):
    (tmp_path / "student.pt").unlink()
    for _ in range(2):  # the second time nothing is left to do
        verb.generate("student.yaml", "smoke", limit=1, random_weights=True)
    directory = tmp_path / "runs/bench/student-random/smoke"
    run = json.loads((directory / "run.json").read_text())
    assert run["status"] == "done" and run["recorded"]["weights"] == run["inputs"]["weights_sha256"] == "random" and run["inputs"]["reduced"]
    with av.open(str(directory / "videos/0000-0.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 33 and frames[0].shape == (64, 96, 3) and frames[0].std() > 1
    assert "weights: random" in capsys.readouterr().err


def test_the_generation_of_2_2_has_its_sizes_and_its_own_autoencoder():
    """3072 wide with 30 layers, 48 latent channels; 4 x 16 x 16 pixels per latent; text encoder and tokenizer are those of 2.1."""
    made = open_backbone("wan2.2-5b")
    tensors = made.denoiser.state_dict()
    assert len(tensors) == 825 and sum(tensor.numel() for tensor in tensors.values()) == 4_999_787_712
    with torch.device("meta"):
        smaller = WanDiT(wan.WAN_1_3B.dit)
    assert list(smaller.state_dict()) == list(tensors)
    shape = made.shape
    assert (shape.channels, shape.height, shape.width, shape.pixel_height, shape.pixel_width, shape.fps) == (48, 44, 80, 704, 1280, 24)
    parts, others = made.parts(), open_backbone("wan2.1-1.3b").parts()
    assert parts["vae"].file == "Wan2.2_VAE.pth" and parts["vae"].repo == "Wan-AI/Wan2.2-TI2V-5B"
    assert {role: part for role, part in parts.items() if role != "vae"} == {role: part for role, part in others.items() if role != "vae"}
    with pytest.raises(UserError, match=r"backbone 'wan2\.2-5b' does not use 'decoder'"):
        open_backbone("wan2.2-5b", decoder="tiny")


def test_pixels_of_2_2_go_through_its_own_autoencoder():
    made = open_backbone("wan2.2-5b", reduced=True, precision="float32")
    made.fresh(0)
    assert isinstance(made, wan.WanBackbone) and isinstance(made.member.vae, VAE22Cfg)
    pixels = made.decoder()(normal(1, 3, 48, 4, 6))
    assert pixels.shape == (1, 9, 3, 64, 96)
    assert torch.equal(made.encode_pixels(pixels), WanEncoder(made.vae)(pixels))
    assert made.encode_pixels(pixels).shape == (1, 3, 48, 4, 6)


def test_random_weights_of_2_2_make_a_video_at_its_own_frame_rate(files, tmp_path):
    """The suite's 2 s are 49 frames at 24 per second; they take two chunks of 8 latents."""
    directory = verb.generate("longlive-2.0-5b", "smoke", limit=1, random_weights=True)
    run = json.loads((directory / "run.json").read_text())
    assert run["status"] == "done" and run["recorded"]["weights"] == "random"
    with av.open(str(directory / "videos/0000-0.mp4")) as video:
        assert video.streams.video[0].average_rate == 24
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 49 and frames[0].shape == (64, 96, 3) and frames[0].std() > 1


def test_other_words_give_another_embedding_and_padding_is_zero():
    made = reduced(precision="float32")
    one, two, again = made.encode_text(["a red kite", "a blue kite", "a red kite"])
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert one[:4].abs().min() > 0 and not one[4:].any()


@pytest.mark.slow
def test_the_full_size_student_makes_a_chunk():
    """1.4 billion random weights, 480 x 832 pixels, one step: five to eight minutes and 10 GB on two cores."""
    made = open_backbone("wan2.1-1.3b")
    made.fresh(0)
    assert isinstance(made, wan.WanBackbone)
    made.requires_grad_(False).to(baselines.device())
    one_step = replace(STUDENT, steps=(1000,))
    assert timesteps(one_step) == (1000.0,)
    text = normal(1, 512, 4096).to(made.denoiser.dtype).to(baselines.device())

    def noise(frames: int) -> Tensor:
        return normal(1, frames, 16, 60, 104).to(text)

    with torch.no_grad():
        (chunk,) = stream(made, text, 3, one_step, noise)
        pixels = made.decoder()(chunk.latent_BFCHW)
    assert chunk.latent_BFCHW.shape == (1, 3, 16, 60, 104) and chunk.latent_BFCHW.isfinite().all()
    assert pixels.shape == (1, 9, 3, 480, 832) and pixels.isfinite().all()
