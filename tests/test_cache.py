"""Cache policies against lists of frame names; the cache against keys and values that are kept, averaged and rotated from scratch;
cached streaming against a recomputation of everything, layer by layer and without a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rfbench.attention import attend, rotate, rotations
from rfbench.backbones.wan.dit import WanDiT, block_causal_mask, modulate, timestep_embedding
from rfbench.cache import CacheShape, KVCache, plan
from rfbench.config import CacheCfg
from tests.tiny import Tiny, distance, normal

CPU = torch.device("cpu")
SHAPE = CacheShape(layers=2, batch=2, heads=2, head_dim=12, height=1, width=2, latents=24)


@dataclass(frozen=True)
class View:
    """What a chunk looks back at: frames by number, oldest first, and which frames were averaged into which, in order."""

    frames: tuple[int, ...]
    folds: tuple[tuple[int, int, float], ...]  # (frame that left, sink frame, share of the old sink that stays), since the beginning


def views(cfg: CacheCfg, chunks: Sequence[int]) -> list[View]:
    """By the paper's words, one frame at a time: frames queue up, a frame without room pushes out the oldest behind the sink.

    A chunk's frames come in together, so none of them may push out another.
    """
    held: list[int] = []
    folds: list[tuple[int, int, float]] = []
    found, count = [], 0
    for size in chunks:
        gone: list[int] = []
        while cfg.window is not None and len(held) + size > cfg.window:
            sink = cfg.sink or 0
            if len(held) <= sink:
                raise ValueError("no room")
            gone.append(held.pop(sink))
        if cfg.alpha is not None and cfg.sink and gone:
            replace = cfg.mismatch == "overwrite" and len(gone) != cfg.sink
            places = zip(gone, held[: cfg.sink] if replace else held[: cfg.sink] * len(gone), strict=False)
            folds += [(frame, place, 0.0 if replace else cfg.alpha) for frame, place in places]
        found.append(View(tuple(held), tuple(folds)))
        held += range(count, count + size)
        count += size
    return found


@st.composite
def configs(draw: st.DrawFn) -> CacheCfg:
    policy = draw(st.sampled_from(["full", "window", "static_sink", "ema_sink"]))
    rope: Literal["relative", "absolute"] = draw(st.sampled_from(["relative"] if policy == "ema_sink" else ["relative", "absolute"]))
    mismatch: Literal["average", "overwrite"] = draw(st.sampled_from(["average", "overwrite"]))
    empty: Literal["ignored", "attended"] = draw(st.sampled_from(["ignored", "attended"]))
    if policy == "full":
        return CacheCfg(policy, rope=rope)
    window = draw(st.integers(1, 9))
    if policy == "window":
        return CacheCfg(policy, window=window, rope=rope)
    sink = draw(st.integers(1 if policy == "ema_sink" else 0, min(4, window)))
    cfg = CacheCfg("static_sink", window=window, sink=sink, rope=rope)
    if policy == "ema_sink":
        cfg = CacheCfg(policy, window=window, sink=sink, alpha=draw(st.sampled_from([0.0, 0.5, 0.9, 0.999])), fold_dtype="float32", mismatch=mismatch)
    return dataclasses.replace(cfg, empty_sink=empty) if sink and rope == "relative" else cfg


def chunk_sizes(cfg: CacheCfg) -> st.SearchStrategy[list[int]]:
    """Chunks that leave room for the sink."""
    most = 4 if cfg.window is None else min(4, cfg.window - (cfg.sink or 0))
    return st.lists(st.integers(1, most), min_size=1, max_size=6) if most else st.just([])


@st.composite
def streams(draw: st.DrawFn) -> tuple[CacheCfg, list[int]]:
    cfg = draw(configs())
    return cfg, draw(chunk_sizes(cfg))


@settings(max_examples=200)
@given(configs(), st.lists(st.integers(1, 6), min_size=1, max_size=8))
def test_plans_hold_what_a_queue_holds(cfg: CacheCfg, chunks: list[int]) -> None:
    try:
        wanted = views(cfg, chunks)
    except ValueError:
        with pytest.raises(ValueError, match="no room"):
            follow(cfg, chunks)
        return
    assert follow(cfg, chunks) == wanted


def follow(cfg: CacheCfg, chunks: Sequence[int]) -> list[View]:
    """The plans of a policy, carried out on frame numbers."""
    held: list[int] = []
    folds: list[tuple[int, int, float]] = []
    found, count = [], 0
    for size in chunks:
        step = plan(cfg, len(held), size)
        assert sorted(step.keep) == list(step.keep)
        folds += [(held[gone], held[sink], cfg.alpha or 0.0) for gone, sink in step.fold]
        folds += [(held[gone], held[sink], 0.0) for gone, sink in step.overwrite]
        held = [held[slot] for slot in step.keep]
        found.append(View(tuple(held), tuple(folds)))
        held += range(count, count + size)
        count += size
    return found


def folded(value_of: dict[int, Tensor], view: View) -> list[Tensor]:
    """Per held frame what is left of it: its own value, or the moving average of a sink frame."""
    values = dict(value_of)
    for gone, sink, share in view.folds:
        values[sink] = share * values[sink] + (1 - share) * value_of[gone]
    return [values[frame] for frame in view.frames]


def positions(cfg: CacheCfg, frames: Sequence[int]) -> tuple[int, ...]:
    return tuple(frames) if cfg.rope == "absolute" else tuple(range(len(frames)))


def attended(cfg: CacheCfg, frames: Sequence[int], new: int, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], dim: int) -> Tensor:
    """Attention of raw queries of the last `new` frames over raw keys of all, the empty sink slots behind them where they count."""
    at = positions(cfg, frames)
    empty = max(0, (cfg.sink or 0) - len(frames)) if cfg.empty_sink == "attended" else 0
    turned = rotate(k, rotations(at, *grid, dim, CPU))
    nothing = torch.zeros(len(k), grid[0] * grid[1] * empty, *k.shape[2:])
    return attend(rotate(q, rotations(at[-new:], *grid, dim, CPU)), torch.cat([turned, nothing], 1), torch.cat([v, nothing], 1))


@settings(max_examples=60)
@given(streams(), st.integers(1, 3), st.booleans())
@torch.no_grad()
def test_every_pass_attends_to_what_is_held_at_its_positions(stream: tuple[CacheCfg, list[int]], passes: int, graded: bool) -> None:
    """`graded`: the pass is made as in training, where nothing may be stored, and then again to store it."""
    cfg, chunks = stream
    cache = KVCache(cfg, SHAPE, dtype=torch.float32, device=CPU)
    keys: list[dict[int, Tensor]] = [{} for _ in range(SHAPE.layers)]
    values: list[dict[int, Tensor]] = [{} for _ in range(SHAPE.layers)]
    first = 0
    for number, (size, view) in enumerate(zip(chunks, views(cfg, chunks), strict=True)):
        cache.begin(size)
        for turn in range(passes):
            for layer in range(SHAPE.layers):
                q, k, v = (normal(2, size * 2, 2, 12, seed=1000 * number + 100 * turn + 10 * layer + i) for i in range(3))
                own = range(first, first + size)
                keys[layer] |= dict(zip(own, k.split(2, 1), strict=True))
                values[layer] |= dict(zip(own, v.split(2, 1), strict=True))
                all_k = torch.cat([*folded(keys[layer], view), k], 1)
                all_v = torch.cat([*folded(values[layer], view), v], 1)
                wanted = attended(cfg, (*view.frames, *own), size, q, all_k, all_v, (1, 2), 12)
                if graded:
                    with torch.enable_grad():
                        assert distance(attend(*cache.extend(layer, q, k, v)), wanted) < 1e-5
                assert distance(attend(*cache.extend(layer, q, k, v)), wanted) < 1e-5
        first += size
    assert cache.frames == sum(chunks)


@torch.no_grad()
def recomputed(model: WanDiT, cfg: CacheCfg, clean: Tensor, noisy: Tensor, t: float, text: Tensor, chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Flows of the noisy and of the clean frames without any cache: layer by layer over the whole clip, each chunk looking at the
    clean frames that its policy leaves it, at their positions, in a loop over chunks. Nothing is shared between chunks."""
    frames, height, width = clean.shape[1], clean.shape[3] // 2, clean.shape[4] // 2
    tokens, dim = height * width, model.cfg.head_dim
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    x = model.patch_embedding(torch.cat([clean, noisy]).transpose(1, 2)).flatten(-2).permute(0, 2, 3, 1)
    times = torch.cat([torch.zeros(len(clean), 1), torch.full((len(clean), 1), t)])
    time = model.time_embedding(timestep_embedding(times, model.cfg.freq_dim).float())
    six = model.time_projection(time).unflatten(-1, (6, -1))
    texts = model.text_kv(torch.cat([text, text]))
    block: Any
    for block, text_kv in zip(model.blocks, texts, strict=True):
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + six).unsqueeze(-2).unbind(2)
        tokens_in = modulate(x, shift1, scale1, model.cfg.eps).flatten(1, 2)
        q, (k, v) = block.self_attn.queries(tokens_in), block.self_attn.keys_values(tokens_in)
        out = []
        for size, start, view in zip(chunks, starts, views(cfg, chunks), strict=True):
            own = slice(start * tokens, (start + size) * tokens)
            seen = []
            for raw in (k, v):  # both halves of the batch look back at clean frames
                past = folded(dict(enumerate(raw[: len(clean)].split(tokens, 1))), view)
                seen.append(torch.cat([*(part.repeat(2, 1, 1, 1) for part in past), raw[:, own]], 1))
            out.append(attended(cfg, (*view.frames, *range(start, start + size)), size, q[:, own], seen[0], seen[1], (height, width), dim))
        x = x + gate1 * block.self_attn.o(torch.cat(out, 1).flatten(-2)).view_as(x)
        query = block.cross_attn.queries(block.norm3(x).flatten(1, 2))
        x = x + block.cross_attn.o(attend(query, *text_kv).flatten(-2)).view_as(x)
        x = x + gate2 * block.ffn(modulate(x, shift2, scale2, model.cfg.eps))
    patch = model.head(x, time).view(2, len(clean), frames, height, width, 2, 2, -1)
    clean_flow, noisy_flow = patch.permute(0, 1, 2, 7, 3, 5, 4, 6).reshape(2, *clean.shape)
    return noisy_flow, clean_flow


@torch.no_grad()
def streamed(model: WanDiT, cfg: CacheCfg, clean: Tensor, noisy: Tensor, t: float, text: Tensor, chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same flows with the cache: per chunk a noisy pass (twice, which may change nothing) and a clean one."""
    shape = dataclasses.replace(SHAPE, batch=len(clean), height=clean.shape[3] // 2, width=clean.shape[4] // 2)
    cache = KVCache(cfg, shape, dtype=torch.float32, device=CPU)
    noisy_flow, clean_flow, start = [], [], 0
    for size in chunks:
        cache.begin(size)
        own = slice(start, start + size)
        model(noisy[:, own], torch.full((len(clean), 1), 999.0), text, cache=cache)
        noisy_flow.append(model(noisy[:, own], torch.full((len(clean), 1), t), text, cache=cache))
        clean_flow.append(model(clean[:, own], torch.zeros(len(clean), 1), text, cache=cache))
        start += size
    return torch.cat(noisy_flow, 1), torch.cat(clean_flow, 1)


@settings(max_examples=25)
@given(streams())
def test_cached_streaming_equals_recomputing_everything(stream: tuple[CacheCfg, list[int]]) -> None:
    """Every policy, the EMA sink too: its keys and values are averages of earlier chunks' clean ones, whoever computes those."""
    cfg, chunks = stream
    if not chunks:
        return
    clean, noisy, text = normal(1, sum(chunks), 3, 4, 4, seed=1), normal(1, sum(chunks), 3, 4, 4, seed=2), normal(1, 4, 8, seed=3)
    arguments = (Tiny(height=4, width=4).denoiser, cfg, clean, noisy, 600.0, text, chunks)
    for found, wanted in zip(streamed(*arguments), recomputed(*arguments), strict=True):
        assert distance(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("window", "sink", "rope"),
    [(None, 0, "absolute"), (None, 0, "relative"), (6, 0, "absolute"), (7, 0, "relative"), (9, 3, "absolute"), (8, 1, "absolute")],
)
@torch.no_grad()
def test_cached_streaming_equals_one_masked_pass(window: int | None, sink: int, rope: Literal["absolute", "relative"]) -> None:
    """Where all chunks see a frame at one position: absolute positions, or relative ones without a sink (only distances matter).

    One pass of the whole network over all clean frames and the last noisy chunk, a dense mask, and no code of the cache.
    """
    cfg = CacheCfg("full" if window is None else "static_sink" if sink else "window", window=window, sink=sink or None, rope=rope)
    model, chunk, frames = Tiny(height=4, width=4).denoiser, 3, 12
    clean, noisy, text = normal(1, frames, 3, 4, 4, seed=1), normal(1, frames, 3, 4, 4, seed=2), normal(1, 4, 8, seed=3)
    mask = block_causal_mask(frames, 4, chunk, window, CPU)
    if sink and window is not None:  # sink frames always, of the others the latest of which there is room beside them
        frame = torch.arange(frames).repeat_interleave(4)
        end = (frame // chunk + 1) * chunk
        mask = (frame[None] < end[:, None]) & ((frame[None] < sink) | (frame[None] >= end[:, None] - (window - sink)))
    flows, _ = streamed(model, cfg, clean, noisy, 600.0, text, [chunk] * (frames // chunk))
    for start in range(0, frames, chunk):
        clip = torch.cat([clean[:, :start], noisy[:, start : start + chunk]], 1)
        times = torch.cat([torch.zeros(1, start), torch.full((1, chunk), 600.0)], 1)
        size = clip.shape[1] * 4
        wanted = model(clip, times, text, mask_SS=mask[:size, :size])[:, start:]
        assert distance(flows[:, start : start + chunk], wanted) < 1e-5


def feed(cache: KVCache, value: float) -> None:
    """One chunk of one frame, with constant keys and values."""
    cache.begin(1)
    size = (cache.shape.batch, cache.tokens, cache.shape.heads, cache.shape.head_dim)
    new = torch.full(size, value, dtype=cache.values[0].dtype)
    for layer in range(cache.shape.layers):
        cache.extend(layer, new, new, new)


@pytest.mark.parametrize(("fold_dtype", "dtype"), [("float32", torch.float32), ("float32", torch.bfloat16), ("bfloat16", torch.bfloat16)])
@torch.no_grad()
def test_what_stays_of_the_first_frame_is_alpha_to_the_number_of_folds(fold_dtype: str, dtype: torch.dtype) -> None:
    """Closed form of Eq. 5. Kept in bfloat16, a change of 0.1 % is rounded away, and the sink never moves (D-38)."""
    alpha, folds = 0.999, 120
    cfg = CacheCfg("ema_sink", window=3, sink=1, alpha=alpha, fold_dtype="bfloat16" if fold_dtype == "bfloat16" else "float32")
    cache = KVCache(cfg, SHAPE, dtype=dtype, device=CPU)
    feed(cache, 1.0)
    for _ in range(2 + folds):
        feed(cache, 0.0)
    wanted = alpha**folds if fold_dtype == "float32" else 1.0
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    for layer in range(SHAPE.layers):
        sink = cache.held[0] * cache.tokens
        for buffer in (cache.raw[layer], cache.values[layer]):
            assert buffer[:, sink : sink + cache.tokens].float().sub(wanted).abs().max() < rounding * wanted
    assert abs(alpha**folds - 1) > 0.1


@torch.no_grad()
def test_a_cache_has_one_size_for_any_length() -> None:
    cfg = CacheCfg("ema_sink", window=9, sink=3, alpha=0.9, fold_dtype="float32")
    cache = KVCache(cfg, dataclasses.replace(SHAPE, latents=10**6), dtype=torch.float32, device=CPU)

    def memory() -> dict[int, int]:
        sinks = [tensor for pair in cache.sinks for tensor in pair]
        return {tensor.data_ptr(): tensor.numel() for tensor in (*cache.raw, *cache.rotated, *cache.values, *sinks)}

    for _ in range(12):
        feed(cache, 1.0)
    after_few = memory()
    for _ in range(300):
        feed(cache, 2.0)
    assert memory() == after_few
    assert max(after_few.values()) == 9 * cache.tokens * SHAPE.batch * SHAPE.heads * SHAPE.head_dim


def test_frames_without_room_are_refused() -> None:
    cache = KVCache(CacheCfg("static_sink", window=5, sink=3), SHAPE, dtype=torch.float32, device=CPU)
    cache.begin(3)
    with pytest.raises(ValueError, match="no room"):
        cache.begin(3)
    cache = KVCache(CacheCfg("full"), dataclasses.replace(SHAPE, latents=4), dtype=torch.float32, device=CPU)
    cache.begin(3)
    with pytest.raises(ValueError, match="1 free frame slots and 3 frames"):
        cache.begin(3)


def test_earlier_chunks_get_no_gradient_and_their_keys_are_left_alone() -> None:
    cache = KVCache(CacheCfg("static_sink", window=6, sink=2), SHAPE, dtype=torch.float32, device=CPU)
    past = [normal(2, 4, 2, 12, seed=i).requires_grad_() for i in range(3)]
    own = [normal(2, 4, 2, 12, seed=10 + i).requires_grad_() for i in range(3)]
    cache.begin(2)
    with torch.no_grad():
        cache.extend(0, *past)
    cache.begin(2)
    before = [buffer.clone() for buffer in (cache.rotated[0], cache.raw[0], cache.values[0])]
    attend(*cache.extend(0, *own)).square().sum().backward()
    assert all(tensor.grad is None for tensor in past)
    assert all(tensor.grad is not None and tensor.grad.abs().min() > 0 for tensor in own)
    assert all(torch.equal(a, b) for a, b in zip(before, (cache.rotated[0], cache.raw[0], cache.values[0]), strict=True))


@pytest.mark.parametrize(("policy", "rope"), [("full", "absolute"), ("full", "relative"), ("ema_sink", "relative")])
def test_gradients_in_place_go_to_the_last_pass_under_autograd_at_the_values_of_the_clean_one(
    policy: str, rope: Literal["absolute", "relative"]
) -> None:
    """Against a softmax over tensors that are written out: clean values, and differences to the graded ones that are zero."""
    alpha = 0.75
    cfg = CacheCfg("full", rope=rope) if policy == "full" else CacheCfg("ema_sink", window=2, sink=1, alpha=alpha, fold_dtype="float32")
    cache = KVCache(cfg, dataclasses.replace(SHAPE, layers=1, latents=3), dtype=torch.float32, device=CPU, gradients="in_place")
    size = (2, 2, 2, 12)
    graded = [[normal(*size, seed=10 * i + j).requires_grad_() for j in range(2)] for i in range(3)]
    clean = [[normal(*size, seed=100 + 10 * i + j) for j in range(2)] for i in range(3)]
    query = normal(*size, seed=5)
    for i in range(3):
        cache.begin(1)
        result = attend(*cache.extend(0, query, *graded[i]))
        with torch.no_grad():
            cache.extend(0, query, *clean[i])
    weight = normal(*size, seed=6)
    found = torch.autograd.grad((result * weight).sum(), [tensor for pair in graded for tensor in pair], allow_unused=True)

    mixed = [[now + (then - then.detach()) for then, now in zip(*pair, strict=True)] for pair in zip(graded, clean, strict=True)]
    if policy == "ema_sink":  # the second frame left when the third came
        mixed = [[alpha * a + (1 - alpha) * b for a, b in zip(mixed[0], mixed[1], strict=True)]]
    k, v = (torch.cat([*(pair[j] for pair in mixed[:2]), graded[2][j]], 1) for j in range(2))
    wanted_result = attended(cfg, range(len(mixed[:2]) + 1), 1, query, k, v, (1, 2), 12)
    assert distance(result.detach(), wanted_result.detach()) < 1e-6
    wanted = torch.autograd.grad((wanted_result * weight).sum(), [tensor for pair in graded for tensor in pair], allow_unused=True)
    for a, b in zip(found, wanted, strict=True):
        assert a is not None and b is not None and distance(a, b) < 1e-5


@torch.no_grad()
def test_frames_come_in_again_after_a_rewind_and_the_sink_stays() -> None:
    cache = KVCache(CacheCfg("static_sink", window=7, sink=2, rope="absolute"), SHAPE, dtype=torch.float32, device=CPU)
    for _ in range(4):
        cache.begin(3)
        for layer in range(2):
            cache.extend(layer, *(normal(2, 6, 2, 12, seed=i) for i in range(3)))
    assert cache.numbers == [0, 1, 7, 8, 9, 10, 11]
    before = [cache.values[layer][:, :4].clone() for layer in range(2)]
    assert cache.rewind() == [7, 8, 9, 10, 11]
    cache.begin(2)
    assert cache.numbers == [0, 1, 7, 8]
    cache.begin(3)
    assert cache.numbers == [0, 1, 7, 8, 9, 10, 11] and cache.frames == 12
    assert all(torch.equal(cache.values[layer][:, :4], before[layer]) for layer in range(2))
