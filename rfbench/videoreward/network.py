"""VideoReward's network: transformers' Qwen2-VL and a linear head, from the published checkpoint.

The checkpoint (checkpoint-11352/model.pth, 1123 tensors) holds the model as PEFT wrapped it, under the names that transformers had
before 4.52. VideoAlign's training also saves adapters alone, with what else it trained beside them, over the Qwen2-VL that it began
with. Here adapters are merged. Shapes: B clips, L tokens, N patches of all clips together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rfbench.config import LoraCfg, WeightsCfg
from rfbench.errors import UserError
from rfbench.videoreward.frames import CELL, PAIR, PATCH
from rfbench.weights import load_into, merge, read_tensors

WRAPPER = "base_model.model."  # PEFT's
PREFIXES = {  # in the checkpoint, behind the wrapper -> here; the longer ones are what transformers calls them since 4.52
    "model.language_model.": "qwen.language_model.",
    "model.visual.": "qwen.visual.",
    "model.": "qwen.language_model.",
    "visual.": "qwen.visual.",
    "rm_head.": "rm_head.",
}
UNUSED = f"{WRAPPER}lm_head.weight"  # predicts words
ADAPTED = tuple(f"self_attn.{side}_proj" for side in "qkvo") + tuple(f"mlp.{part}_proj" for part in ("gate", "up", "down"))
REST = "non_lora_state_dict.pth"
LORA = re.compile(r"(?P<part>.+)\.lora_[AB]\.default\.weight")


@dataclass(frozen=True)
class Tokens:
    """Ids of the special tokens; `scores` are those of visual quality, motion quality and text alignment."""

    vision_start: int = 151652
    vision_end: int = 151653
    image: int = 151655
    video: int = 151656
    pad: int = 151643
    scores: tuple[int, ...] = (151657, 151658, 151659)


@dataclass(frozen=True)
class VideoRewardCfg:
    """Sizes of the network and of its adapters; those of the published one by default."""

    hidden: int = 1536
    inter: int = 8960
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    mrope: tuple[int, ...] = (16, 24, 24)
    vocab: int = 151660
    vision_depth: int = 32
    vision_dim: int = 1280
    vision_heads: int = 16
    vision_ratio: int = 4  # of its MLPs' width to its own
    rank: int = 64
    alpha: float = 128.0
    tokens: Tokens = Tokens()


class VideoRewardNet(nn.Module):
    """Qwen2-VL without its language head, and the reward head."""

    def __init__(self, cfg: VideoRewardCfg) -> None:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

        super().__init__()
        self.cfg = cfg
        self.qwen: Any = Qwen2VLModel(qwen_config(cfg))
        self.rm_head = nn.Linear(cfg.hidden, 1, bias=False)

    def forward(self, ids_BL: Tensor, mask_BL: Tensor, patch_N: Tensor, grid_B3: Tensor) -> Tensor:
        """Raw scores [B, 3] in float32, in the order of the score tokens, of which every row has three. Padding is on the right.

        Positions are 0, 1, 2, ... on all three axes of the rotary embedding, as the public model ends up with (D-36).
        """
        position_3BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand(3, *ids_BL.shape)
        hidden_BLE = self.qwen(
            input_ids=ids_BL,
            attention_mask=mask_BL,
            position_ids=position_3BL,
            pixel_values_videos=patch_N,
            video_grid_thw=grid_B3,
            use_cache=False,
        ).last_hidden_state
        asked_BL = torch.isin(ids_BL, torch.tensor(self.cfg.tokens.scores, device=ids_BL.device))
        scores: Tensor = self.rm_head(hidden_BLE[asked_BL]).float()
        return scores.view(len(ids_BL), len(self.cfg.tokens.scores))


def qwen_config(cfg: VideoRewardCfg) -> Any:
    """transformers' configuration of the same network."""
    from transformers import Qwen2VLConfig

    vision = {"patch_size": PATCH, "temporal_patch_size": PAIR, "spatial_merge_size": CELL, "in_channels": 3, "mlp_ratio": cfg.vision_ratio}
    sizes = {"hidden_size": cfg.hidden, "intermediate_size": cfg.inter, "num_hidden_layers": cfg.layers, "vocab_size": cfg.vocab}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(cfg.mrope)}
    found = Qwen2VLConfig(
        text_config=sizes
        | {"num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "rope_parameters": rope, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None},
        vision_config=vision | {"depth": cfg.vision_depth, "embed_dim": cfg.vision_dim, "num_heads": cfg.vision_heads, "hidden_size": cfg.hidden},
        video_token_id=cfg.tokens.video,
        image_token_id=cfg.tokens.image,
        vision_start_token_id=cfg.tokens.vision_start,
        vision_end_token_id=cfg.tokens.vision_end,
    )
    found._attn_implementation = "sdpa"
    return found


def empty_network(cfg: VideoRewardCfg, dtype: torch.dtype) -> VideoRewardNet:
    """The network on the meta device, but for the frequencies of its rotary embeddings, which no checkpoint holds.

    Those are rounded to `dtype` too: the public code casts the whole model, and trained it so.
    """
    with torch.device("meta"):
        network = VideoRewardNet(cfg)
    for part, name in ((network.qwen.language_model, "rotary_emb"), (network.qwen.visual, "rotary_pos_emb")):
        setattr(part, name, type(getattr(part, name))(part.config))
    return network.to(dtype).requires_grad_(False).eval()


@dataclass(frozen=True)
class Cast(Mapping[str, Tensor]):
    """Tensors in another dtype, each converted when it is asked for."""

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def our_name(published: str) -> str | None:
    """Name of a tensor of the checkpoint in the network, adapters included; None for a name that is not one of its own."""
    bare = published.removeprefix(WRAPPER)
    prefix = next((prefix for prefix in PREFIXES if bare.startswith(prefix)), None)
    if prefix is None or bare == published:
        return None
    return PREFIXES[prefix] + bare.removeprefix(prefix).replace(".base_layer.", ".")


def over_base(adapter: Path, base: Path, cfg: VideoRewardCfg) -> Iterator[tuple[str, Tensor]]:
    """The tensors of adapters by the names of a whole checkpoint: the base model's, the adapters', and those that training put in place of the first.

    Training adds three words, and makes the embeddings as long as the tokenizer, which is shorter than the base model's.

    Raises:
        UserError: a file is missing or corrupt.
    """
    for name, tensor in read_tensors(base, WeightsCfg(base.name)).items():
        yield WRAPPER + name, tensor[: cfg.vocab] if name.endswith("embed_tokens.weight") else tensor
    for name, tensor in read_tensors(adapter, WeightsCfg(adapter.name)).items():
        yield re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name), tensor
    yield from read_tensors(adapter.with_name(REST), WeightsCfg(REST)).items()


def load_network(path: Path, cfg: VideoRewardCfg, dtype: torch.dtype, *, base: Path | None = None) -> VideoRewardNet:
    """The network with its weights, on the CPU and without gradients: W + alpha / rank B A, added in float32 and rounded to `dtype`.

    `path` is a whole checkpoint, or with `base`, a folder of Qwen2-VL's weights, adapter_model.safetensors beside non_lora_state_dict.pth.

    Raises:
        UserError: the file is missing or corrupt, or is not a VideoReward of these sizes, with its head and all of its adapters.
    """
    weights: dict[str, Tensor] = {}
    adapters: dict[str, Tensor] = {}
    for published, tensor in read_tensors(path, WeightsCfg(path.name)).items() if base is None else over_base(path, base, cfg):
        if published == UNUSED:
            continue
        name = our_name(published)
        if name is None:
            raise UserError(f"{path} is not a checkpoint of VideoReward: it has '{published}'; fetch it again")
        (adapters if LORA.fullmatch(name) else weights)[name] = tensor
    found = {match["part"] for name in adapters if (match := LORA.fullmatch(name))}
    wanted = {f"qwen.language_model.layers.{layer}.{part}" for layer in range(cfg.layers) for part in ADAPTED}
    if found != wanted:
        raise UserError(
            f"{path} is not a checkpoint of VideoReward: it has adapters of {len(found)} layers instead of {len(wanted)}, "
            f"and '{min(found ^ wanted)}' is among the differences; fetch it again"
        )
    network = empty_network(cfg, dtype)
    load_into(network, merge(Cast(weights, dtype), adapters, LoraCfg(path.name, cfg.rank, cfg.alpha), where=path), where=path)
    return network
