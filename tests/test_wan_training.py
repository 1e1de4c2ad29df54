"""Training of the Wan family at a small size: from files in the original layouts to a baseline that makes videos."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rfbench import config
from rfbench import generate as verb
from rfbench.backbones import known
from rfbench.backbones.base import open_backbone
from rfbench.backbones.wan import backbone as wan
from rfbench.backbones.wan.text import WanText, key_map
from rfbench.config import Baseline, Recipe, WeightsCfg
from rfbench.errors import UserError
from rfbench.recipes import locate
from rfbench.records import read_run
from rfbench.train import Trainer, train
from rfbench.weights import read_tensors
from tests.test_train import ABOUT, Interrupted, interrupt
from tests.test_wan import tokenizer
from tests.tiny import normal

OPTIM = {"lr": 1.0e-3, "betas": [0.0, 0.999]}
SAMPLER = {"steps": [1000, 500], "shift": 5.0, "cache": {"policy": "ema_sink", "window": 9, "sink": 3, "alpha": 0.9, "fold_dtype": "float32"}}
RECIPE: dict[str, Any] = {
    "title": "A student of Wan's size",
    "backbone": "wan2.1-1.3b",
    "steps": 3,
    "batch": 2,
    "accumulate": 2,
    "latents": 6,
    "optim": OPTIM,
    "precision": {"student": "bfloat16", "teacher": "mixed", "critic": "bfloat16"},
    "checkpointing": True,
    "ema": {"decay": 0.5},
    "init": {"file": "student.pt", "key": "generator", "strip": "model."},
    "data": {"prompts": {"file": "prompts.txt"}},
    "scores": {
        "teacher": {"file": "teacher.pt"},
        "guidance": 4.0,
        "negative": "blue",
        "generator_every": 2,
        "critic_optim": OPTIM,
        "score_shift": 5.0,
    },
    "sampler": SAMPLER,
    "samples": {"every": 2, "prompts": ["a red kite", "a kite"], "latents": 3},
    "log_every": 1,
    "checkpoint_every": 1,
}
METHODS: dict[str, dict[str, Any]] = {"dmd": {}, "redmd": {"reward": {"name": "toy_motion", "beta": 0.5}}}


def halfway(pixel_BTCHW: Tensor, prompts: list[str]) -> Tensor:
    """A reward of one's own: how near to grey."""
    return -pixel_BTCHW.float().abs().mean((1, 2, 3, 4))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights on disk as their authors publish theirs, of a member that is small enough to train on one thread."""
    (tmp_path / "rfbench.toml").write_text('[paths]\nweights = "weights"\nruns = "runs"\nreports = "reports"\n')
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    monkeypatch.setattr(wan, "wan_1_3b", functools.partial(wan.WanBackbone, replace(wan.REDUCED, height=32, width=48)))
    unchecked = {role: replace(file, bytes=None, sha256=None) for role, file in known.WAN21.items()}
    monkeypatch.setitem(known.KNOWN, "wan2.1-1.3b", replace(known.KNOWN["wan2.1-1.3b"], files=unchecked))
    for role, file in unchecked.items():
        monkeypatch.setattr(wan, role.upper(), file)
    folder = tmp_path / "weights" / known.REPO
    tokenizer(folder / known.TOKENIZER.file)
    for seed, name in enumerate(("teacher", "student")):
        made = open_backbone("wan2.1-1.3b", precision="float32")
        made.fresh(seed)
        assert isinstance(made, wan.WanBackbone) and isinstance(made.text, wan.RandomText)
        tensors = made.denoiser.state_dict()
        torch.save(
            tensors if name == "teacher" else {"generator": {f"model.{key}": value for key, value in tensors.items()}}, tmp_path / f"{name}.pt"
        )
    assert isinstance(made, wan.WanBackbone) and isinstance(made.text, wan.RandomText)
    encoder = made.text.encoder(torch.device("cpu")).state_dict()
    torch.save({ours: encoder[theirs] for ours, theirs in key_map(made.member.text.layers).items()}, folder / known.TEXT.file)
    torch.save(made.vae.state_dict(), folder / known.VAE.file)
    (tmp_path / "prompts.txt").write_text("a red kite\na kite\nred\n")
    return tmp_path


def write(home: Path, method: str, **changes: Any) -> str:
    path = home / f"{method}.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"method": method} | METHODS.get(method, {}) | changes))
    return str(path)


@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_trained_resumed_and_makes_videos(method: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(home, method)
    straight = train(path, name="straight")
    with monkeypatch.context() as patch:
        interrupt(patch, method, 3)  # in the second step: two micro-batches each
        with pytest.raises(Interrupted):
            train(path, name="again")
    again = train(path, name="again")
    for file in ("weights.safetensors", "log.jsonl", "samples/step_000002/1.mp4"):
        assert (again / file).read_bytes() == (straight / file).read_bytes(), file

    run = read_run(straight)
    assert run.result == {"steps": 3, "updates": {"generator": 2, "critic": 3}}
    assert set(run.inputs["files"]) == {"prompts", "text", "tokenizer", "vae"} and set(run.inputs["weights"]) == {"student", "teacher"}
    rows = [json.loads(line) for line in (straight / "log.jsonl").read_text().splitlines()]
    assert {"critic_loss", "critic_timestep", "grad_norm_critic"} < set(rows[1]) and "loss" in rows[0] and "loss" not in rows[1]
    assert ("weight_ess" in rows[0]) == (method == "redmd")

    before, after = torch.load(home / "student.pt")["generator"], load_file(straight / "weights.safetensors")
    assert {f"model.{name}" for name in after} == set(before)  # original names, nothing else
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[f"model.{name}"].bfloat16().float())]
    assert len(moved) == len(after)
    published = {key: read_tensors(straight / "model.pt", WeightsCfg("model.pt", key=key, strip="model.")) for key in ("generator", "generator_ema")}
    assert all(found.keys() == after.keys() for found in published.values())
    assert all(torch.equal(tensor, after[name]) for name, tensor in published["generator_ema"].items())
    assert not all(torch.equal(tensor, after[name]) for name, tensor in published["generator"].items())
    (straight / "model.pt").unlink()
    train(path, name="straight")
    whole = torch.load(straight / "model.pt")
    assert all(torch.equal(tensor, published[key][name.removeprefix("model.")]) for key, model in whole.items() for name, tensor in model.items())
    with safe_open(straight / "weights.safetensors", "pt") as opened:
        header = json.loads(opened.metadata()["about"])
    assert header["recipe"] == run.inputs["recipe"] and header["files"] == run.inputs["files"] and header["weights"] == run.inputs["weights"]
    assert header["code"] == run.recorded["code"] and header["fingerprint"] == run.fingerprint

    made = config.load(Baseline, str(straight / "baseline.yaml"))
    assert made.precision == "bfloat16" and made.weights.sha256 is not None
    assert read_run(verb.generate(str(straight / "baseline.yaml"), "smoke", limit=1)).status == "done"


def test_other_prompts_are_other_inputs_and_a_reward_of_ones_own_is_marked(home: Path) -> None:
    path = write(home, "redmd", steps=1, reward={"name": "tests.test_wan_training:halfway", "beta": 0.5}, samples=None)
    assert config.load(Baseline, str(train(path) / "baseline.yaml")).saw == ("reward.tests.test_wan_training:halfway",)
    (home / "prompts.txt").write_text("a red kite\nred\n")
    with pytest.raises(UserError, match=r"other inputs .*files.prompts"):
        train(path)


def test_a_dry_run_finds_the_one_file_that_is_missing(home: Path) -> None:
    path = write(home, "dmd")
    assert not train(path, dry_run=True).exists()
    (home / "prompts.txt").unlink()
    with pytest.raises(UserError, match=r"'prompts.txt', named by dmd.yaml, are neither"):
        train(path, dry_run=True)


def lmdb_of(path: Path, *sizes: int, captions: tuple[str, ...]) -> None:
    """Latents in the layout of Self Forcing's LMDB: [N, F, C, H, W] or trajectories of them, float16."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), subdir=False, map_size=2**24) as store, store.begin(write=True) as writing:
        writing.put(b"latents_shape", " ".join(map(str, (len(captions), *sizes))).encode())
        for number, caption in enumerate(captions):
            writing.put(f"latents_{number}_data".encode(), normal(*sizes, seed=number).half().numpy().tobytes())
            writing.put(f"prompts_{number}_data".encode(), caption.encode())


@pytest.mark.parametrize("student", ["streamed", "diffusion-forced", "of pairs"])
def test_no_text_encoder_is_in_memory_while_a_student_learns(student: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether prompts come from a file or with clips or pairs: each is embedded once before, then nothing asks for the encoder any more."""
    shape = open_backbone("wan2.1-1.3b").shape
    latents = (6, shape.channels, shape.height, shape.width)
    lmdb_of(home / "clips.mdb", *latents, captions=("a red kite", "red"))
    lmdb_of(home / "pairs.mdb", 3, *latents, captions=("a kite", "a red kite"))
    changes: dict[str, Any] = {
        "streamed": {},
        "diffusion-forced": {"rollout": {"student": "diffusion_forced"}, "data": {"latents": {"file": "clips.mdb"}}},
    }.get(student, {"data": {"latents": {"file": "pairs.mdb"}}, "scores": None, "precision": {"student": "bfloat16"}})
    path = write(home, "ode" if student == "of pairs" else "dmd", **changes)
    cfg = config.load(Recipe, path)
    trainer = Trainer(cfg, home / "run", locate(cfg, Path(path)))
    text = trainer.student.text  # type: ignore[attr-defined]
    assert isinstance(text, WanText) and "_encoder" not in vars(text)
    embedded = len(list(text.cache.glob("*.safetensors"))) if text.cache is not None else 0
    assert embedded >= 2

    def asked(text: WanText) -> None:
        raise AssertionError("the encoder is loaded in training")

    monkeypatch.setattr(WanText, "_encoder", property(asked))
    assert trainer.run(ABOUT)["steps"] == 3
