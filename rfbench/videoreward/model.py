"""VideoReward as a judge: frames and prompts in, three scores each out.

    <weights>/KwaiVGI/VideoReward/model_config.json                         how it was trained, mean and spread of its scores
    <weights>/KwaiVGI/VideoReward/checkpoint-11352/model.pth                the network
    <weights>/KwaiVGI/VideoReward/checkpoint-11352/tokenizer/tokenizer.json

One that somebody trained further may lie there as VideoAlign's training saves it without the whole model, in place of model.pth:
adapter_model.safetensors and non_lora_state_dict.pth, over <weights>/Qwen/Qwen2-VL-2B-Instruct/*.safetensors.

Shapes: B clips, L tokens, T frames, H and W rows and columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rfbench.errors import UserError
from rfbench.records import read_json
from rfbench.settings import settings
from rfbench.videoreward.frames import patches, token_count
from rfbench.videoreward.network import REST, VideoRewardCfg, VideoRewardNet, load_network
from rfbench.weight_files import files_of
from rfbench.weights import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPOSITORY = "KwaiVGI/VideoReward"
ABOUT, WEIGHTS, TOKENIZER = "model_config.json", "checkpoint-11352/model.pth", "checkpoint-11352/tokenizer/tokenizer.json"
FILES = (ABOUT, WEIGHTS, TOKENIZER)
ADAPTER, BESIDE = "checkpoint-11352/adapter_model.safetensors", f"checkpoint-11352/{REST}"
BASE = "Qwen/Qwen2-VL-2B-Instruct"
AXES = ("VQ", "MQ", "TA")  # visual quality, motion quality, text alignment
ASKED = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
VIDEO = "<|video_pad|>"
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>" + VIDEO + "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
TRAINED: dict[str, dict[str, Any]] = {  # what model_config.json must say for this code to be the model's: section -> key -> value
    "data_config": {"eval_dim": list(AXES), "prompt_template_type": "detailed_special", "sample_type": "uniform"},
    "model_config": {"output_dim": 1, "use_special_tokens": True, "reward_token": "special"},
    "peft_lora_config": {"lora_enable": True, "vision_lora": False, "use_rslora": False},
}


@dataclass(frozen=True)
class About:
    """What model_config.json says: how frames are taken, what its adapters are, and the mean and spread of its scores on its own data."""

    fps: float
    max_pixels: int  # of a frame
    rank: int
    alpha: float
    mean: tuple[float, ...]  # of VQ, MQ, TA
    std: tuple[float, ...]


def question(prompt: str) -> str:
    """What the model is asked about a clip that was made from `prompt`. The text is VideoAlign's."""
    return _template().replace("{text_prompt}", prompt)


@functools.cache
def _template() -> str:
    return Path(__file__).with_name("prompt.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class VideoReward:
    """The loaded model. Frames are float [T, 3, H, W] of 0 to 255, as `frames.as_file` and `frames.as_released` make them."""

    network: VideoRewardNet
    tokenizer: Tokenizer
    about: About

    def score(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Normalised scores [B, 3] on the CPU: VQ, MQ, TA, of mean 0 and spread 1 on the data that the model was trained with.

        Raises:
            UserError: a prompt contains one of the model's own special tokens.
        """
        return self.normalised(self.raw(videos, prompts))

    def normalised(self, raw_B3: Tensor) -> Tensor:
        """What the head gives, on the scale of `score`."""
        return (raw_B3 - torch.tensor(self.about.mean)) / torch.tensor(self.about.std)

    @torch.no_grad()
    def raw(self, videos: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """Scores [B, 3] as the head gives them, float32 on the CPU. A clip's scores do not depend on what it is batched with."""
        device, tokens = self.network.rm_head.weight.device, self.network.cfg.tokens
        cut = [patches(video.to(device)) for video in videos]
        rows = [self.ids(prompt, token_count(*video.shape)) for prompt, video in zip(prompts, videos, strict=True)]
        ids_BL = torch.full((len(rows), max(map(len, rows))), tokens.pad)
        mask_BL = torch.zeros_like(ids_BL)
        for row, (ids_L, mask_L) in zip(rows, zip(ids_BL, mask_BL, strict=True), strict=True):
            ids_L[: len(row)], mask_L[: len(row)] = torch.tensor(row), 1
        grid_B3 = torch.tensor([grid for _, grid in cut], device=device)
        found: Tensor = self.network(ids_BL.to(device), mask_BL.to(device), torch.cat([patch for patch, _ in cut]), grid_B3)
        return found.cpu()

    def ids(self, prompt: str, video_tokens: int) -> list[int]:
        """The tokens of a clip's question, with the video's place taken by as many tokens as it has."""
        tokens = self.network.cfg.tokens
        ids = self.tokenizer.encode(CHAT.format(question=question(prompt)), add_special_tokens=False).ids
        if [one for one in ids if one in (tokens.video, *tokens.scores)] != [tokens.video, *tokens.scores]:
            raise UserError(f"the prompt '{prompt[:60]}' contains a special token of VideoReward; take it out of the suite")
        place = ids.index(tokens.video)
        return [*ids[:place], *[tokens.video] * video_tokens, *ids[place + 1 :]]


def files(where: Path | None = None) -> dict[str, Path]:
    """Settings, weights and tokenizer in the published repository's directory, by default that of the weights directory, by their names.

    Raises:
        UserError: one of them is missing.
    """
    where = where or settings().weights / REPOSITORY
    adapted = (where / ADAPTER).is_file() and not (where / WEIGHTS).is_file()
    found = {file: where / file for file in ((ABOUT, ADAPTER, BESIDE, TOKENIZER) if adapted else FILES)}
    if missing := [path for path in found.values() if not path.is_file()]:
        raise UserError(f"VideoReward: {missing[0]} is missing; `rfbench fetch videoreward` brings it")
    if not adapted:
        return found
    base = settings().weights / BASE
    if not base.is_dir():
        raise UserError(f"VideoReward: the adapters in {where} need {base}; run `hf download {BASE} --local-dir {base}`")
    return found | {f"{BASE}/{path.name}": path for path in files_of(base)}


def load(
    where: Path | None = None, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, cfg: VideoRewardCfg | None = None
) -> VideoReward:
    """The published model; in bfloat16 as it was trained.

    Raises:
        UserError: a file is missing, corrupt, or not that of this model.
    """
    there = files(where)
    cfg = cfg or VideoRewardCfg()
    about = read_about(there[ABOUT])
    tokenizer = tokenizer_of(there[TOKENIZER], cfg)
    cfg = replace(cfg, rank=about.rank, alpha=about.alpha)
    if ADAPTER in there:
        network = load_network(there[ADAPTER], cfg, dtype, base=settings().weights / BASE)
    else:
        network = load_network(there[WEIGHTS], cfg, dtype)
    return VideoReward(network.to(device), tokenizer, about)


def read_about(path: Path) -> About:
    """The published settings.

    Raises:
        UserError: not JSON, a key is missing or of another kind, or the model was trained in another way than this code judges.
    """
    found = read_json(path)
    sections = found if isinstance(found, dict) else {}
    for name in (*TRAINED, "inference_config"):
        if not isinstance(sections.get(name), dict):
            raise UserError(f"{path} is not VideoReward's: it has no '{name}'; fetch it again")
    for name, wanted in TRAINED.items():
        for key, right in wanted.items():
            if (there := sections[name].get(key)) != right:
                raise UserError(f"{path}: '{key}' is {there!r}, but only a VideoReward with {right!r} can be run here; fetch {REPOSITORY}")

    def number(section: str, key: str) -> Any:
        value = sections[section].get(key)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{path} is not VideoReward's: '{key}' of '{section}' is {value!r}; fetch it again")
        return value

    mean, std = (tuple(number("inference_config", f"{axis}_{moment}") for axis in AXES) for moment in ("mean", "std"))
    return About(
        fps=number("data_config", "fps"),
        max_pixels=int(number("data_config", "max_frame_pixels")),
        rank=int(number("peft_lora_config", "lora_r")),
        alpha=number("peft_lora_config", "lora_alpha"),
        mean=mean,
        std=std,
    )


def tokenizer_of(path: Path, cfg: VideoRewardCfg) -> Tokenizer:
    """The tokenizer of a file, if it is this network's.

    Raises:
        UserError: not a tokenizer, or its special tokens are not those of the network.
    """
    tokenizer = read_tokenizer(path)
    wanted = dict(zip((VIDEO, *ASKED), (cfg.tokens.video, *cfg.tokens.scores), strict=True))
    for word, number in wanted.items():
        if tokenizer.token_to_id(word) != number:
            raise UserError(f"{path} is not VideoReward's: '{word}' is {tokenizer.token_to_id(word)} there, not {number}; fetch it again")
    return tokenizer
