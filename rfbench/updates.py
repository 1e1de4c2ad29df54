"""From gradients to new weights: optimisers, their schedule, and float32 copies of weights that are stored in less."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from rfbench.config import OptimCfg
from rfbench.parallel import full


class Updater:
    """The optimiser state of one network.

    What is stored in less than float32 has a copy in float32: `masters`, which are the weights themselves where nothing is gained.
    Gradients are added up for the copies as soon as a backward pass leaves one, the optimisers step on them, and every step is rounded anew.
    """

    def __init__(self, module: nn.Module, cfg: OptimCfg) -> None:
        self.cfg = cfg
        self.module = module
        named = [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]
        self.names, self.weights = [name for name, _ in named], [weight for _, weight in named]
        self.masters = [weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float()) for weight in self.weights]
        self.optimisers = optimisers([(name, master) for (name, _), master in zip(named, self.masters, strict=True)], cfg)
        for weight, master in self._copied():
            weight.register_post_accumulate_grad_hook(functools.partial(_gather, master))
        self.steps = 0  # taken

    def scale(self, factor: float) -> None:
        """Scale the gathered gradients, as if the loss had been scaled."""
        for master in self.masters:
            if master.grad is not None:
                master.grad.mul_(factor)

    def clip(self) -> float:
        """Scale the gradients down to the largest norm that is allowed; the norm before, of all processes' parts together."""
        return float(full(nn.utils.clip_grad_norm_(self.masters, self.cfg.clip)))

    def step(self, share: float) -> None:
        """One step of every optimiser at `share` of the learning rate."""
        for optim in self.optimisers:
            for group in optim.param_groups:
                group["lr"] = self.cfg.lr * share
            optim.step()
        self.round()
        self.steps += 1

    @torch.no_grad()
    def round(self) -> None:
        """Give the weights the copies' values."""
        for weight, master in self._copied():
            weight.copy_(master)

    def clear(self) -> None:
        for optim in self.optimisers:
            optim.zero_grad(set_to_none=True)

    def exact(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of the weights (`keep_vars=True`) with the copies in their places."""
        copies = {id(weight): master.detach() for weight, master in self._copied()}
        return {name: copies.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}

    def tensors(self, *, primed: bool = False) -> dict[str, Any]:
        """All that training goes on from, by name: weights, those with a copy as that, and the optimisers' state.

        They are the tensors themselves and can be filled; then `go_on` is due. `primed` makes the state of optimisers that never stepped.
        """
        if primed:
            self._prime()
        state = {id(weight): held for optim in self.optimisers for weight, held in optim.state.items()}
        assert primed or all(held.get("step", self.steps) == self.steps for held in state.values()), "a weight had no gradient in some step"
        held = {
            name: {key: tensor for key, tensor in state[id(master)].items() if key != "step"}  # the same for all: `steps`
            for name, master in zip(self.names, self.masters, strict=True)
            if id(master) in state
        }
        return {"weights": self.exact(self.module.state_dict(keep_vars=True)), "optimiser": held}

    def go_on(self, steps: int) -> None:
        """Go on after `steps` steps, from what the tensors were filled with."""
        self.steps = steps
        for optim in self.optimisers:
            for held in optim.state.values():
                if "step" in held:
                    held["step"].fill_(steps)
        self.round()

    def _prime(self) -> None:
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        for optim in self.optimisers:
            for group in optim.param_groups:
                group["lr"] = 0.0
            optim.step()
        self.clear()

    def _copied(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [(weight, master) for weight, master in zip(self.weights, self.masters, strict=True) if weight is not master]


def _gather(master: nn.Parameter, weight: Tensor) -> None:
    """Add a weight's gradient to its copy's, and let go of it."""
    assert weight.grad is not None
    master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
    weight.grad = None


def optimisers(named: list[tuple[str, nn.Parameter]], cfg: OptimCfg) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the transformer blocks' matrices where that is asked for."""
    matrices = [weight for name, weight in named if cfg.kind == "muon" and weight.ndim == 2 and "blocks." in name]
    rest = [weight for _, weight in named if not any(weight is matrix for matrix in matrices)]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=cfg.lr, betas=cfg.betas, weight_decay=cfg.weight_decay, fused=True)]
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


def schedule(cfg: OptimCfg, step: int, steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant or a half cosine to zero."""
    warm = min(1.0, (step + 1) / cfg.warmup) if cfg.warmup else 1.0
    return warm * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cfg.cosine else 1.0)
