"""Toy baselines with random weights, for tests of the verbs: real code, no training."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from rfbench.backbones.toy import ToyBackbone

STUDENT: dict[str, Any] = {
    "steps": [1000, 750, 500, 250],
    "shift": 5.0,
    "cache": {"policy": "ema_sink", "window": 9, "sink": 3, "alpha": 0.9, "fold_dtype": "float32"},
}
TEACHER: dict[str, Any] = {"steps": 3, "shift": 5.0, "chunk": None, "solver": "euler", "guidance": 2.0}


@functools.cache
def weights() -> dict[str, Tensor]:
    """Tensors of a toy backbone that makes noise of its own: a fresh one would predict zeros."""
    backbone = ToyBackbone()
    backbone.fresh(0)
    torch.nn.init.normal_(backbone.denoiser.head.head.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    return {name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}


def write(folder: Path, name: str = "student", *, sampler: dict[str, Any] = STUDENT, tensors: dict[str, Tensor] | None = None, **more: Any) -> str:
    """A baseline file and its weights; returns the file's path as it is given to a verb."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights() if tensors is None else tensors, folder / f"{name}.safetensors")
    plain = {"title": name, "backbone": "toy", "weights": {"file": f"{name}.safetensors"}, "sampler": sampler}
    licence = {"license": {"code": "apache-2.0", "weights": "apache-2.0"}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain | licence | more))
    return str(folder / f"{name}.yaml")


def products_do_not_depend_on_their_rows() -> bool:
    """Whether this machine's matrix product gives a row the same bits among few and many others. On most CPUs it does."""
    rng = torch.Generator().manual_seed(0)
    weight, x = torch.randn(512, 128, generator=rng), torch.randn(576, 128, generator=rng)
    return all(torch.equal(torch.nn.functional.linear(x[:rows], weight), torch.nn.functional.linear(x, weight)[:rows]) for rows in (36, 72, 108, 252))
