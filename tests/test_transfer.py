"""Inside a chunk the host waits for nothing. The stand-in for a GPU is device `meta`: it computes no values, so none can be read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rfbench import attention, cache, hardware, transfer, video
from rfbench.backbones.wan.lean import LeanDiT, Shortcuts
from rfbench.config import CacheCfg, SamplerCfg
from rfbench.sampler import clip_noise, stream
from tests.tiny import Tiny, normal

AWAY = torch.device("meta")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: values read back, copies to the host, copies from memory that is not page-locked."""

    def __init__(self, pinned: set[int]) -> None:
        super().__init__()
        self.on, self.pinned, self.copies = False, pinned, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.on:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name, tensors = func.overloadpacket.__name__, [arg for arg in args if isinstance(arg, Tensor)]
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal"):
            raise AssertionError(f"{name} reads from the device")
        source, target = None, None
        if name == "_to_copy":
            source, target = tensors[0], torch.device(kwargs.get("device") or tensors[0].device)
        elif name == "copy_":
            source, target = tensors[1], tensors[0].device
        if source is not None and source.device != target:
            if source.device == AWAY:
                raise AssertionError(f"{name} copies {tuple(source.shape)} to the host")
            if source.numel() > 1 or source.ndim:
                self.copies += 1
                assert kwargs.get("non_blocking"), f"{name} of {tuple(source.shape)} blocks"
                assert source.data_ptr() in self.pinned, f"{name} of {tuple(source.shape)} is from pageable memory"

    def mark(self, event: str) -> None:
        self.on = event == "begin"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[NoWaiting]:
    """A device that takes page-locked memory, and what was locked."""
    pinned, kept = set[int](), list[Tensor]()

    def pin(x: Tensor) -> Tensor:
        kept.append(x)  # or its address would be another tensor's
        pinned.add(x.data_ptr())
        return x

    monkeypatch.setattr(transfer, "PINNED", {"meta"})
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    attention.rotations.cache_clear()
    cache._rows.cache_clear()
    yield NoWaiting(pinned)
    attention.rotations.cache_clear()
    cache._rows.cache_clear()


CACHES = {
    "ema_sink": CacheCfg("ema_sink", window=7, sink=2, alpha=0.9, fold_dtype="float32"),
    "window": CacheCfg("window", window=6, rope="absolute"),
    "full": CacheCfg("full"),
}


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("name", CACHES)
def test_the_host_waits_for_nothing_between_the_beginning_of_a_chunk_and_its_end(name: str, joint: bool, watched: NoWaiting) -> None:
    tiny = Tiny()
    text = tiny.encode_text(["a red disc"]).to(AWAY)
    tiny.denoiser.to(AWAY)
    cfg = SamplerCfg((1000, 500), 5.0, cache=CACHES[name])
    with watched:
        made = list(stream(tiny, text, 15, cfg, clip_noise(tiny, [0]), mark=watched.mark, lean=LeanDiT(tiny.denoiser, Shortcuts(joint=joint))))
    assert len(made) == 5 and all(chunk.latent_BFCHW.device == AWAY for chunk in made)
    assert watched.copies >= 10, "noise of two steps in five chunks at least"


def test_waiting_is_seen(watched: NoWaiting) -> None:
    away = normal(3).to(AWAY)
    watched.mark("begin")
    with watched:
        for wait in (lambda: normal(3).to(AWAY), lambda: normal(3).to(AWAY, non_blocking=True), lambda: normal(1).item(), away.cpu):
            with pytest.raises(AssertionError):
                wait()
        assert transfer.to_device(normal(3), AWAY).device == AWAY


def test_on_a_cpu_nothing_is_copied() -> None:
    x = normal(3)
    assert transfer.to_device(x, x.device) is x and transfer.to_host(x)() is x


def test_a_queue_of_its_own_and_bytes_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then copies wait like anything else, and what is copied are pixels; the frames are the same."""
    monkeypatch.setattr(transfer, "PINNED", {"cpu"})
    pixels, asked = normal(1, 2, 3, 4, 5), list[object]()

    def current(device: torch.device) -> str:
        asked.append(device)
        return "its queue"

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    with hardware.by(Shortcuts(copies=False, bytes=False)):
        assert torch.equal(transfer.to_host(pixels)(), pixels) and not asked
        assert str(transfer.side(pixels.device)) == "its queue" and asked == [pixels.device]
        frames = video.as_uint8(pixels)
    assert torch.equal(frames, video.as_uint8(pixels))
    assert video.as_uint8(normal(1, 2, 3, 4, 5).to(AWAY)).device == AWAY


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_arrive_while_the_device_goes_on() -> None:
    device = torch.device("cuda", 0)
    x = [normal(1 << 20, seed=seed) for seed in range(4)]
    coming = []
    for part in x:
        there = transfer.to_device(part, device)
        coming.append(transfer.to_host(there * 2))
        there.zero_()
    assert all(torch.equal(wait(), 2 * part) for wait, part in zip(coming, x, strict=True))
