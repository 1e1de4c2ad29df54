"""The smaller parts of a recipe: optimiser, average, reward, prompts, precision, samples. `rfbench.config` puts them together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rfbench.errors import UserError

Precision = Literal["float32", "bfloat16", "mixed"]
Streamed = Literal[Precision, "float8"]  # how a network streams: float8 is bfloat16 with products of 8-bit floats, which no gradient comes from


@dataclass(frozen=True)
class OptimCfg:
    """The optimiser and its schedule. `muon` orthogonalises the updates of the transformer blocks' matrices, at AdamW's step
    size, and leaves everything else to AdamW."""

    lr: float
    kind: Literal["adamw", "muon"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float = 10.0  # gradient norm
    warmup: int = 0  # steps of linear warm-up
    cosine: bool = False  # decay to zero over the run


@dataclass(frozen=True)
class EmaCfg:
    decay: float
    start: int = 0  # first step that is averaged


@dataclass(frozen=True)
class RewardCfg:
    """Weight exp(reward / beta) of each sample's distribution matching gradient (Re-DMD)."""

    name: str  # of REWARDS; `scorer.metric`; or `module:function` of your own: pixels [B, T, 3, H, W] in [-1, 1] and prompts -> [B]
    beta: float  # the paper's, which is one over the released code's (D-8)
    clip: float | None = None  # largest weight
    normalise: bool = False  # weights are divided by their mean over the whole batch, so that a step is as long as without a reward
    input: Literal["correct", "as_released"] | None = None  # videoreward_mq: what it is shown; null is correct (D-5, D-6, D-7)
    fps: float | None = None  # videoreward_mq: frames per second that it is shown; null is its own 2

    def __post_init__(self) -> None:
        if self.name != "videoreward_mq" and (self.input is not None or self.fps is not None):
            raise UserError(f"reward '{self.name}' does not use 'input' and 'fps'; leave them out")
        if self.fps is not None and (self.input == "as_released" or not self.fps > 0):
            raise UserError("reward 'fps' is a positive rate, and input 'as_released' has no use for it: it is every frame")


@dataclass(frozen=True)
class FileCfg:
    """A file of data, found as weights are."""

    file: str
    repo: str | None = None  # Hugging Face repository that `file` comes from
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PrecisionCfg:
    """How each network is stored and computes; null is the backbone's own. Whatever is trained in less than float32 has a
    float32 copy, which gradients are added up for, the optimiser works on and the average is taken of."""

    student: Precision | None = None
    teacher: Precision | None = None
    critic: Precision | None = None


@dataclass(frozen=True)
class SamplesCfg:
    """Videos that are rendered during training, of the same prompts and seeds each time."""

    every: int  # steps
    prompts: tuple[str, ...]
    latents: int
    seed: int = 0
