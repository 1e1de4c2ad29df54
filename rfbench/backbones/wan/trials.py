"""What a `LeanDiT` tries its kernels on: a few rows of the model's own widths and dtypes, beside its own operations without kernels.

Shapes: B batch, S tokens of a chunk, R = B S rows, K tokens that a cache has room for, M width, h heads, D head width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rfbench import proof
from rfbench.attention import rotate, rotations
from rfbench.backbones.wan import float8
from rfbench.proof import Kernel, Pair

CLIPS, TOKENS, ROOM = 2, 6, 9  # tokens of a chunk, and of a cache
Pairs = Iterator[Pair]
EIGHT = torch.float8_e4m3fn


def proven(lean: Any) -> dict[str, Kernel]:
    """The kernels that have proved themselves for the passes of a `LeanDiT` that has none yet, by name.

    Raises:
        UserError: kernels are asked for, and one of them fails (code 1).
    """
    trials = {"place": _place, "modulate": _modulate, "add_and_modulate": _add_and_modulate, "rms_norm": _rms_norm}
    trials |= ({"quantised": _quantised} if lean.eight else {}) | ({"quantised_heads": _quantised_heads} if lean.looks_by_eight else {})
    device, cfg = lean.model.head.modulation.device, lean.model.cfg
    sizes = (cfg.dim, cfg.ffn_dim, lean.heads, lean.eps, lean.eight, *_dtypes(lean))
    found = {name: proof.kernel(name, lean.shortcuts.kernels, device, sizes, functools.partial(trial, lean)) for name, trial in trials.items()}
    return {name: kernel for name, kernel in found.items() if kernel is not None}


def _dtypes(lean: Any) -> tuple[torch.dtype, torch.dtype]:
    """Of the blocks' products, and of what Wan's own network keeps in float32 (`DiTCfg.islands`)."""
    return lean.model.blocks[0].self_attn.q.weight.dtype, lean.model.head.modulation.dtype


def _drawn(lean: Any, *size: int, seed: int, dtype: torch.dtype) -> Tensor:
    return proof.drawn(*size, seed=seed, device=lean.model.head.modulation.device, dtype=dtype)


def _place(lean: Any, kernel: Kernel) -> Pairs:
    (own, table), (width,), (heads, head) = _dtypes(lean), lean.size, lean.heads
    qkv, gain = _drawn(lean, CLIPS * TOKENS, 3 * width, seed=0, dtype=own), _drawn(lean, 2, width, seed=1, dtype=table)
    rotation = rotations((1, 2), 1, TOKENS // 2, head, qkv.device)
    rows = torch.tensor([5, 6, 7, 0, 1, 2], device=qkv.device)
    qk = lean._norm(qkv.view(-1, 3, width)[:, :2], gain).view(CLIPS, TOKENS, 2, heads, head)
    queries, keys = rotate(qk, rotation.unsqueeze(1)).unbind(2)
    put = [keys, qkv.view(CLIPS, TOKENS, 3, heads, head)[:, :, 2], qk[:, :, 1]]
    for raw in (True, False):
        found = [torch.zeros(CLIPS, ROOM, heads, head, dtype=own, device=qkv.device) for _ in range(2 + raw)]
        yield kernel(qkv, gain, lean.eps, rotation, rows, found[0], found[2] if raw else None, found[1]), queries, own
        for ours, theirs in zip(found, put, strict=False):
            yield ours, torch.zeros_like(ours).index_copy(1, rows, theirs.to(own)), own


def _modulate(lean: Any, kernel: Kernel) -> Pairs:
    width = lean.size[0]
    for x in _rows(lean):
        for table in ((width,), (CLIPS, 1, width)):
            shift, gain = (_drawn(lean, *table, seed=seed, dtype=_dtypes(lean)[1]) for seed in (2, 3))
            for eight in {False, lean.eight}:
                wanted = lean._modulate(x, shift, gain)
                found = kernel(x, shift, gain, lean.eps, eight=eight)
                yield (found, float8.quantised(wanted), EIGHT) if eight else (found, wanted, x.dtype)


def _add_and_modulate(lean: Any, kernel: Kernel) -> Pairs:
    (own, kept), width = _dtypes(lean), lean.size[0]
    one, each = (width,), (CLIPS, 1, width)
    for x in _rows(lean):
        y = _drawn(lean, len(x), width, seed=4, dtype=own)
        for gates, tables in ((one, one), (each, each), (each, one), (None, one), (None, each)):
            gate = None if gates is None else _drawn(lean, *gates, seed=5, dtype=kept)
            shift, gain = (_drawn(lean, *tables, seed=seed, dtype=kept) for seed in (6, 7))
            total, out = kernel(x, gate, y, shift, gain, lean.eps, eight=lean.eight)
            wanted, normed = lean._add_and_norm(x, gate, y, shift, gain)
            yield total, wanted, total.dtype
            yield (out, float8.quantised(normed), EIGHT) if lean.eight else (out, normed, total.dtype)


def _rms_norm(lean: Any, kernel: Kernel) -> Pairs:
    (own, kept), width = _dtypes(lean), lean.size[0]
    x, gain = _drawn(lean, CLIPS * TOKENS, width, seed=8, dtype=own), _drawn(lean, width, seed=9, dtype=kept)
    yield kernel(x, gain, lean.eps), lean._norm(x, gain), torch.promote_types(own, kept)


def _quantised(lean: Any, kernel: Kernel) -> Pairs:
    cfg = lean.model.cfg
    for width, gelu in ((cfg.dim, False), (cfg.ffn_dim, True)):
        x = _drawn(lean, TOKENS, width, seed=8, dtype=_dtypes(lean)[0])
        yield kernel(x, gelu=gelu), float8.quantised(lean._gelu(x) if gelu else x), EIGHT


def _quantised_heads(lean: Any, kernel: Kernel) -> Pairs:
    """Of the values as they lie between queries and keys."""
    x = _drawn(lean, CLIPS, TOKENS, 3, *lean.heads, seed=8, dtype=_dtypes(lean)[0])[:, :, 1]
    (found, scale), (wanted, right) = kernel(x), float8.quantised_heads(x)
    yield (found, scale[:, None, :, None]), (wanted, right[:, None, :, None]), EIGHT


def _rows(lean: Any) -> list[Tensor]:
    """Rows as they come into a pass, and as its first sum with something in another dtype leaves them."""
    own, kept = _dtypes(lean)
    return [_drawn(lean, CLIPS * TOKENS, lean.size[0], seed=9, dtype=dtype) for dtype in dict.fromkeys((own, torch.promote_types(own, kept)))]
