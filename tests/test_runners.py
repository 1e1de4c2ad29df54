"""Runners: that of diffusers, and where its environment is that of NOVA, against the real package with tiny random weights; the others against
stand-ins with their package's signatures.

The stand-ins are as upstream has them if the last test passes, which reads pinned checkouts below RFBENCH_UPSTREAM (an environment's `src`).
"""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rfbench import config, envs, external, generate, processes, records, video
from rfbench.config import External
from rfbench.fetch import fetch
from rfbench.items import items_named
from rfbench.suites import clip_seed
from tests.test_external import interpreter

STAND_INS = {
    "nova": {
        "diffnext/pipelines/__init__.py": """
import numpy as np, torch
from types import SimpleNamespace

class NOVAPipeline:
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, torch_dtype=None, trust_remote_code=False):
        return cls()

    def to(self, device):
        return self

    def __call__(self, prompt=None, num_inference_steps=64, num_diffusion_steps=25, max_latent_length=1, guidance_scale=5, motion_flow=5,
                 generator=None, disable_progress_bar=False, output_type="pil"):
        assert (num_inference_steps, num_diffusion_steps, guidance_scale, motion_flow, output_type) == (128, 25, 7.0, 5.0, "np")
        frames = torch.randint(256, (1, 1 + 4 * (max_latent_length - 1), 32, 48, 3), generator=generator, dtype=torch.uint8)
        return SimpleNamespace(frames=frames.numpy())
""",
    },
    "pyramid-flow-384p": {
        "pyramid_dit/__init__.py": """
import numpy as np, torch
from PIL import Image

class Part:
    def to(self, device):
        return self

    def enable_tiling(self):
        self.tiled = True

class PyramidDiTForVideoGeneration:
    def __init__(self, model_path, model_dtype="bf16", model_name="pyramid_mmdit", model_variant="diffusion_transformer_768p"):
        assert (model_name, model_variant, model_dtype) == ("pyramid_mmdit", "diffusion_transformer_384p", "bf16")
        self.vae, self.dit, self.text_encoder = Part(), Part(), Part()

    def generate(self, prompt=None, height=None, width=None, temp=1, num_inference_steps=28, video_num_inference_steps=28, guidance_scale=7.0,
                 video_guidance_scale=7.0, generator=None, output_type="pil", save_memory=True):
        assert (num_inference_steps, video_num_inference_steps) == ([20] * 3, [10] * 3) and self.vae.tiled and isinstance(prompt, str)
        assert (guidance_scale, video_guidance_scale, output_type) == (7.0, 5.0, "pil") and torch.is_autocast_enabled("cpu")
        between = torch.randint(64, (1,))  # as upstream, which draws noise from torch's own generator between its stages
        frames = torch.randint(192, (8 * (temp - 1) + 1, height, width, 3), generator=generator) + between
        return [Image.fromarray(frame.numpy().astype(np.uint8)) for frame in frames]
""",
    },
    "magi-1": {
        "inference/__init__.py": "",
        "inference/common.py": """
import numpy, torch

def set_random_seed(seed):
    numpy.random.seed(seed)
    torch.manual_seed(seed)
""",
        "inference/model/__init__.py": "",
        "inference/model/dit.py": """
from types import SimpleNamespace

LOADED = []

def get_dit(config):
    assert not LOADED, "it takes minutes: once"
    LOADED.append(config)
    return SimpleNamespace(runtime_config=config.runtime_config)
""",
        "inference/pipeline/__init__.py": """
import json, os
from types import SimpleNamespace

class MagiPipeline:
    def __init__(self, config_path):
        assert os.path.exists("example/4.5B/4.5B_base_config.json") and os.environ["WORLD_SIZE"] == "1" and int(os.environ["MASTER_PORT"])
        self.config = SimpleNamespace(runtime_config=SimpleNamespace(**json.load(open(config_path))["runtime_config"]))
""",
        "inference/pipeline/prompt_process.py": """
def get_txt_embeddings(prompt, config):
    assert config.runtime_config.t5_pretrained.endswith("ckpt/t5")
    return prompt, None
""",
        "inference/pipeline/video_generate.py": """
def generate_per_chunk(model, prefix_video, caption_embs, emb_masks):
    for chunk in range(model.runtime_config.num_frames // 24):
        yield chunk
""",
        "inference/pipeline/video_process.py": """
import torch

def post_chunk_process(chunk, config):
    cfg = config.runtime_config
    return torch.randint(256, (24, 3, cfg.video_size_h, cfg.video_size_w), dtype=torch.uint8)
""",
    },
}
# torch without CUDA knows these, but they must not be asked of a machine without one
NO_CUDA = "import torch\ntorch.cuda.reset_peak_memory_stats = lambda: None\ntorch.cuda.max_memory_allocated = lambda: 7 * 2**30\n"


def checkout(tmp_path: Path, name: str) -> Path:
    """A stand-in package on disk."""
    for file, text in STAND_INS[name].items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    return tmp_path


def whole(folder: Path) -> None:
    """A folder of weights, as `fetch` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_text("weights")
    records.write_json(folder / ".whole.json", ["model.bin"])


def clips_of(baseline: str, suite: Path, overrides: list[str], **how: Any) -> list[records.Clip]:
    directory = generate.generate(baseline, str(suite), overrides, **how)
    clips = records.read_clips(directory)
    assert all(video.read(directory / clip.file)[0].shape == (clip.frames, clip.height, clip.width, 3) for clip in clips)
    return clips


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "a red kite"}\n{"text": "a blue kite"}\n')
    return path


@pytest.mark.parametrize("name", STAND_INS)
def test_a_runner_calls_its_package_as_the_baseline_says(folders, tmp_path, prompts, name):
    cfg = config.load(External, name)
    for part in (cfg.weights, *cfg.parts.values()):
        whole((folders / "weights" / str(part.repo) / part.file).parent)
    upstream = checkout(tmp_path / "upstream", name)
    overrides = ["height=32", "width=48"]
    if name == "magi-1":
        (upstream / "sitecustomize.py").write_text(NO_CUDA)
        source = envs.home("magi-1") / "src" / "MAGI-1" / "example" / "4.5B"
        source.mkdir(parents=True)
        (source / "4.5B_base_config.json").write_text('{"runtime_config": {"num_frames": 96, "seed": 1234}}')
    interpreter(cfg.env, str(upstream))
    clips = clips_of(name, prompts, overrides)
    assert [(clip.frames, clip.fps, clip.height, clip.width) for clip in clips] == [(cfg.frames, cfg.fps, 32, 48)] * 2
    assert clips[0].sha256 != clips[1].sha256
    (alone,) = clips_of(name, prompts, overrides, name="alone", shard="2/2")
    assert alone.sha256 == clips[1].sha256, "whatever came before it in the same process"
    times = external.times(folders / "runs" / "bench" / f"external/{name}" / "prompts")
    stamps = {"magi-1": 4}.get(name, 1)
    assert [len(row.stamps) for row in times] == [stamps, stamps] and all(row.frames == cfg.frames for row in times)
    assert clips[1].seed == clip_seed(0, clips[1].prompt_id, 0)


def tiny(pipeline: str, folder: Path) -> None:
    """A pipeline of diffusers with a random network, as its folder on disk."""
    import diffusers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    bare = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "blue": 5, "kite": 6}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text: dict[str, Any] = {"vocab_size": 8, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    if pipeline == "LTXPipeline":
        heads: dict[str, Any] = {"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32, "caption_channels": 32}
        parts["transformer"] = diffusers.LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_layers=1, **heads)
        blocks: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8), "layers_per_block": (1, 1, 1, 1, 1)}
        more: dict[str, Any] = {"decoder_layers_per_block": (1, 1, 1, 1, 1), "spatio_temporal_scaling": (True, True, False, False), "patch_size": 1}
        scaling: dict[str, Any] = {
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "decoder_inject_noise": (False,) * 5,
            "latent_channels": 8,
        }
        parts["vae"] = diffusers.AutoencoderKLLTXVideo(**blocks, **more, **scaling, encoder_causal=True, decoder_causal=False)
        parts["text_encoder"] = T5EncoderModel(T5Config(**text))
        parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler()
    else:
        sizes: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 32, "freq_dim": 16, "ffn_dim": 32, "num_layers": 1}
        wan, skyreels = diffusers.WanTransformer3DModel, diffusers.SkyReelsV2Transformer3DModel
        parts["transformer"] = wan(**sizes) if pipeline == "WanPipeline" else skyreels(**sizes, inject_sample_info=True)
        parts["vae"] = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        parts["text_encoder"] = UMT5EncoderModel(UMT5Config(**text))
        parts["scheduler"] = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    getattr(diffusers, pipeline)(**parts).save_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "external/wan2.1-1.3b-diffusers",
        pytest.param("external/skyreels-v2-df-diffusers", marks=pytest.mark.slow),
        pytest.param("external/skyreels-v2-df-diffusers-async", marks=pytest.mark.slow),
        pytest.param("external/ltx-video", marks=pytest.mark.slow),
    ],
)
def test_diffusers_itself_makes_the_clips(folders, prompts, name, tmp_path):
    """The real package in the other interpreter, from what `fetch` brings; its weights are random and small, what calls it is not."""
    cfg = config.load(External, name)
    folder = tmp_path / "mirror" / str(cfg.weights.repo)
    tiny(cfg.settings["pipeline"], folder)
    (folder / "all-in-one.safetensors").write_bytes(b"another version")
    fetch(items_named(name), mirror=tmp_path / "mirror", yes=True)
    assert (folders / "weights" / str(cfg.weights.repo) / "all-in-one.safetensors").exists() == (cfg.weights.file == "**")
    interpreter("diffusers")
    overrides = ["height=32", "width=32", "frames=9", "steps=[2]", "settings.dtype=float32"]
    if staggered := cfg.settings["call"].get("ar_step"):  # two blocks of five latent frames, the second of which a further rollout goes on from
        overrides = [*overrides, "frames=57", "settings.call.base_num_frames=37", "steps=[6]"]
    clips = clips_of(name, prompts, overrides)
    assert len({clip.sha256 for clip in clips}) == 2
    if name != "external/wan2.1-1.3b-diffusers":  # another process costs ten seconds of imports
        (alone,) = clips_of(name, prompts, overrides, name="alone", shard="2/2")
        assert alone.sha256 == clips[1].sha256
    if staggered:
        (in_step,) = clips_of(name, prompts, [*overrides, "settings.call.ar_step=0"], name="in-step", shard="2/2")
        assert in_step.sha256 != clips[1].sha256
    assert external.times(folders / "runs" / "bench" / name / "prompts")[0].seconds > 0


@pytest.mark.parametrize("name", [name for name in config.names_of(External) if config.load(External, name).runner == "pipeline"])
def test_the_pipelines_of_diffusers_take_what_a_baseline_says(name):
    import diffusers

    cfg = config.load(External, name)
    takes = inspect.signature(getattr(diffusers, cfg.settings["pipeline"]).__call__).parameters
    said = {"prompt", "height", "width", "num_frames", "num_inference_steps", "generator", "output_type", *cfg.settings["call"]}
    assert said <= takes.keys()


@pytest.mark.skipif("RFBENCH_NOVA_PYTHON" not in os.environ, reason="needs the environment nova; name its interpreter in RFBENCH_NOVA_PYTHON")
def test_the_real_package_of_nova_with_tiny_random_weights(tmp_path):
    python, inside, weights = Path(os.environ["RFBENCH_NOVA_PYTHON"]), Path(__file__).with_name("nova_inside.py"), tmp_path / "weights"
    subprocess.run([python, "-I", inside, weights], env=envs.environ(), check=True)
    told = config.load(External, "external/nova").settings | {"weights": str(weights), "steps": [4, 3], "height": 64, "width": 64, "fps": 12}
    items: list[dict[str, Any]] = [
        {"id": name, "prompt": "red disc", "seed": seed, "frames": 33, "out": str(tmp_path / f"{name}.npy")}
        for name, seed in (("a", 2**63 - 1), ("b", 5), ("again", 5))
    ]
    outcomes = list(processes.work(processes.Program(python, inside, told, 300, 120), items, tmp_path))
    assert [(outcome.error, outcome.row and outcome.row["stamps"][0][1]) for outcome in outcomes] == [(None, 33)] * 3
    a, b, again = (np.load(item["out"]) for item in items)
    assert a.shape == (33, 64, 64, 3) and a.dtype == np.uint8
    assert (b == again).all() and (a != b).any()


CALLED: dict[str, dict[str, list[str]]] = {  # what a runner or a baseline says to upstream: file, function -> arguments
    "NOVA": {
        "diffnext/pipelines/nova/pipeline_nova.py:NOVAPipeline.__call__": [
            *("prompt", "num_inference_steps", "num_diffusion_steps", "max_latent_length", "guidance_scale", "motion_flow", "generator"),
            *("disable_progress_bar", "output_type"),
        ],
    },
    "Pyramid-Flow": {
        "pyramid_dit/pyramid_dit_for_video_gen_pipeline.py:PyramidDiTForVideoGeneration.__init__": [
            *("model_path", "model_dtype", "model_name", "model_variant"),
        ],
        "pyramid_dit/pyramid_dit_for_video_gen_pipeline.py:PyramidDiTForVideoGeneration.generate": [
            *("prompt", "height", "width", "temp", "num_inference_steps", "video_num_inference_steps", "guidance_scale"),
            *("video_guidance_scale", "generator", "output_type", "save_memory"),
        ],
    },
    "MAGI-1": {
        "inference/pipeline/pipeline.py:MagiPipeline.__init__": ["config_path"],
        "inference/common/common_utils.py:set_random_seed": ["seed"],
        "inference/model/dit/dit_model.py:get_dit": ["config"],
        "inference/pipeline/prompt_process.py:get_txt_embeddings": ["prompt", "config"],
        "inference/pipeline/video_generate.py:generate_per_chunk": ["model", "prefix_video", "caption_embs", "emb_masks"],
        "inference/pipeline/video_process.py:post_chunk_process": ["chunk", "config"],
    },
}
UPSTREAM = Path(os.environ.get("RFBENCH_UPSTREAM", "envs"))


def arguments(tree: ast.AST, dotted: str) -> list[str]:
    """The argument names of a function of a source file."""
    for name in dotted.split("."):
        tree = next(node for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name)
    assert isinstance(tree, ast.FunctionDef)
    return [argument.arg for argument in (*tree.args.args, *tree.args.kwonlyargs) if argument.arg != "self"]


@pytest.mark.parametrize("repository", CALLED)
def test_upstream_is_called_as_its_pinned_source_says(repository):
    """And the example configuration that MAGI-1 starts from has every key that the runner sets."""
    source = next(iter([path for path in (UPSTREAM / repository, *UPSTREAM.glob(f"*/src/{repository}")) if path.is_dir()]), None)
    if source is None:
        pytest.skip("its source is not here; set RFBENCH_UPSTREAM to a folder with checkouts, or build its environment")
    for place, wanted in CALLED[repository].items():
        file, function = place.split(":")
        found = arguments(ast.parse((source / file).read_text()), function)
        assert set(wanted) <= set(found), f"{place} takes {found}"
    if repository == "MAGI-1":
        for kind in ("base", "distill"):
            cfg = yaml.safe_load((source / f"example/4.5B/4.5B_{kind}_config.json").read_text())["runtime_config"]
            assert {"load", "t5_pretrained", "vae_pretrained", "video_size_h", "video_size_w", "fps", "num_steps", "num_frames"} <= cfg.keys()


def test_the_stand_ins_have_the_signatures_that_are_checked_upstream():
    for repository, name in (("NOVA", "nova"), ("Pyramid-Flow", "pyramid-flow-384p"), ("MAGI-1", "magi-1")):
        for place, wanted in CALLED[repository].items():
            function = place.split(":")[1]
            trees = [ast.parse(text) for text in STAND_INS[name].values() if function.split(".")[-1] in text]
            found = [
                arguments(tree, function) for tree in trees if any(getattr(node, "name", "") == function.split(".")[0] for node in ast.walk(tree))
            ]
            assert found == [wanted] or sorted(found[0]) == sorted(wanted)
