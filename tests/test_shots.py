"""Prompts that begin shots (LongLive 2.0), against a cache kept by hand as the released code keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from rfbench.attention import rotate, rotations
from rfbench.cache import KVCache, static_sink
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.errors import UserError
from rfbench.sampler import cache_shape, noise_levels, stream, timesteps
from rfbench.unipc import UniPC
from tests.tiny import Tiny, distance, normal

CFG = SamplerCfg(3, 5.0, chunk=2, solver="unipc", cache=CacheCfg("static_sink", window=8, sink=2, rope="absolute", shot_offset=5))
TEXTS = [normal(2, 4, 8, seed=seed) for seed in range(4)]


@dataclass
class Released:
    """Frames in a row, in chunks of 2 and at most 8; the first chunk is never rolled out, nor is a pinned chunk that has come to stand behind it.

    A pinned chunk further back is rolled on with the others. Keys and values are looked up by frame.
    """

    row: list[int] = field(default_factory=list)
    pinned: int | None = None  # place of the chunk that began the shot
    chunk: tuple[int, ...] = ()
    offset: int = 0
    seen: list[tuple[int, ...]] = field(default_factory=list)
    kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # (layer, frame)

    def begin(self, start: int, offset: int) -> None:
        self.chunk, self.offset = (start, start + 1), offset
        if len(self.row) == 8:
            sink = 4 if self.pinned == 2 else 2
            del self.row[sink : sink + 2]
            if self.pinned is not None and self.pinned >= sink:
                self.pinned -= 2
        self.row += self.chunk
        self.seen.append(tuple(self.row))

    def extend(self, layer: int, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rotation = rotations(tuple(frame + self.offset for frame in self.chunk), 2, 3, q_BSHD.shape[-1], q_BSHD.device)
        queries, keys = rotate(q_BSHD, rotation), rotate(k_BSHD, rotation)
        for frame, k, v in zip(self.chunk, keys.chunk(2, 1), v_BSHD.chunk(2, 1), strict=True):
            self.kept[layer, frame] = k, v
        past = [self.kept[layer, frame] for frame in self.row]
        return queries, torch.cat([k for k, _ in past], 1), torch.cat([v for _, v in past], 1)


LAST: list[tuple[dict[int, int], tuple[int, ...]]] = [  # frames of switches, and what the last chunk sees
    ({}, (0, 1, 18, 19, 20, 21, 22, 23)),
    ({4: 1}, (0, 1, 4, 5, 20, 21, 22, 23)),  # before the window is full
    ({8: 1}, (0, 1, 8, 9, 20, 21, 22, 23)),
    ({6: 1, 8: 2}, (0, 1, 8, 9, 20, 21, 22, 23)),  # a shot of one chunk
    ({6: 1, 16: 2}, (0, 1, 16, 17, 20, 21, 22, 23)),  # the chunk of the first shot had come to stay
    ({4: 1, 10: 2, 20: 3}, (0, 1, 18, 19, 20, 21, 22, 23)),
]


@pytest.mark.parametrize(("switches", "last"), LAST)
@torch.no_grad()
def test_shots_are_those_of_the_release(switches: dict[int, int], last: tuple[int, ...]) -> None:
    tiny, frames = Tiny(), 24
    noises = [normal(2, 2, 3, 4, 6, seed=start) for start in range(0, frames, 2)]
    supply = iter(noises)
    turns = [(frame, TEXTS[number]) for frame, number in switches.items()]
    parts = stream(tiny, TEXTS[0], frames, CFG, lambda _: next(supply), switches=turns)
    found = torch.cat([part.latent_BFCHW for part in parts], 1)

    cache, text, offset, made = Released(), TEXTS[0], 0, []
    for start, x in zip(range(0, frames, 2), noises, strict=True):
        if start in switches:
            text, offset = TEXTS[switches[start]], offset + 5
        cache.begin(start, offset)
        solver = UniPC(noise_levels(CFG))
        for step in timesteps(CFG):
            x = solver.step(x, tiny.denoiser(x, torch.full((1, 1), step), text, cache=cache))
        tiny.denoiser(x, torch.zeros(1, 1), text, cache=cache)
        if start in switches:
            cache.pinned = len(cache.row) - 2
        made.append(x)
    assert distance(found, torch.cat(made, 1)) < 1e-5
    assert cache.seen[-1] == last


@torch.no_grad()
def test_without_an_offset_the_prompt_switches_by_passing_the_cached_frames_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, cut, begin = Tiny(), [(8, TEXTS[1])], KVCache.begin
    assert CFG.cache is not None
    begun, clips = list[int](), list[Tensor]()

    def counted(cache: KVCache, frames: int, **how: bool) -> None:
        begun.append(frames)
        begin(cache, frames, **how)

    monkeypatch.setattr(KVCache, "begin", counted)
    for offset, wanted in ((5, 6), (None, 6 + 3)):  # chunks, and of 8 cached frames those that are not the sink's
        cfg = replace(CFG, cache=replace(CFG.cache, shot_offset=offset))
        clips.append(torch.cat([part.latent_BFCHW for part in stream(tiny, TEXTS[0], 12, cfg, lambda n: normal(2, n, 3, 4, 6), switches=cut)], 1))
        assert begun == [2] * wanted
        begun.clear()
    assert torch.equal(clips[0][:, :8], clips[1][:, :8]) and distance(clips[0][:, 8:], clips[1][:, 8:]) > 1e-2


def test_slots_that_stay_are_kept_and_the_oldest_others_go() -> None:
    assert static_sink(8, 2, size=8, sink=2, stay=(4, 5)).keep == (0, 1, 4, 5, 6, 7)
    assert static_sink(8, 2, size=8, sink=2, stay=(2, 3)).keep == (0, 1, 2, 3, 6, 7)
    with pytest.raises(ValueError, match="no room for 4 new ones"):
        static_sink(6, 4, size=6, sink=2, stay=(2, 3))


def test_a_shot_where_there_can_be_none_is_refused() -> None:
    assert CFG.cache is not None
    for change in ({"rope": "relative"}, {"policy": "window", "sink": None}, {"shot_offset": -1}):
        with pytest.raises(UserError, match="cache 'shot_offset' is a number of frames, for policy 'static_sink' with rope 'absolute'"):
            replace(CFG.cache, **change)
    with pytest.raises(UserError, match="needs a 'window' for two sinks and a chunk"):
        replace(CFG, cache=replace(CFG.cache, window=5))
    plain = KVCache(replace(CFG.cache, shot_offset=None), cache_shape(Tiny(), 1, 4), dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(AssertionError):
        plain.begin(2, cut=True)
