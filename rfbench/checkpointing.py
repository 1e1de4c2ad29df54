"""Activations that are computed anew in the backward pass, block by block, also of blocks that read a KV cache.

By the time of the backward pass a cache has moved on. What a block read from it is kept, and read again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rfbench.backbones.wan.dit import Block, Scope, WanDiT
from rfbench.cache import KVCache


class Reread:
    """A cache as one block reads it: the first time as it is, later as it was then."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self.next, self.then = cache, cache.kept(layer)

    def extend(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `KVCache.extend`."""
        cache, self.next = self.next, self.then  # lets go of the cache itself
        return cache.extend(layer, q_BSHD, k_BSHD, v_BSHD)


def checkpointed(model: WanDiT) -> None:
    """Let every block of a model keep no more than what came in; results and gradients stay the same, a third more work is done."""
    for block in cast(Iterable[Block], model.blocks):
        block.forward = functools.partial(_forward, block.forward, block.layer)  # type: ignore[method-assign]


def _forward(plain: Callable[..., Tensor], layer: int, x: Tensor, time: Tensor, text: Tensor | tuple[Tensor, Tensor], scope: Scope) -> Tensor:
    if not torch.is_grad_enabled():
        return plain(x, time, text, scope)
    if isinstance(scope.cache, KVCache):
        scope = Scope(cache=Reread(scope.cache, layer))
    found: Any = checkpoint(plain, x, time, text, scope, use_reentrant=False, preserve_rng_state=False)
    return cast(Tensor, found)
