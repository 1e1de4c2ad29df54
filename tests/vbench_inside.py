"""What networks say inside both drivers, for test_vbench_drivers.py: a score may be the same for other reasons.

    VBENCH_PYTHON tests/vbench_inside.py captions|objects|descriptions|logits|flow CLIP      prints {"official": ..., "fast": ...}

Both use one network with drawn weights, vbench's own code first, as the fast driver changes parts of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rfbench.vbench_worker import networks, torchvision_ops
from rfbench.vbench_worker.__main__ import only_rows_on_stdout
from rfbench.vbench_worker.video import Footage

CPU = torch.device("cpu")


def different_frames() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Six that have nothing in common: [6, 384, 384, 3]."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 384).astype(np.uint8)[:, None, None], (384, 384, 3))
    stripes = np.where(np.arange(384)[None, :, None] // 24 % 2, [250, 10, 10], [0, 240, 60]).repeat(384, 0).astype(np.uint8)
    noise = rng.integers(0, 256, (384, 384, 3), np.uint8)
    return np.stack([noise, stripes, ramp, stripes.transpose(1, 0, 2), 255 - ramp, np.zeros_like(noise)])


def captions(_: Path) -> tuple[Any, Any]:
    """Tag2Text's."""
    from vbench.utils import tag2text_transform

    from rfbench.vbench_worker.captions import Scene
    from rfbench.vbench_worker.fast import Networks

    look, network, frames, nets = tag2text_transform(384), networks.tag2text(CPU), different_frames(), Networks(CPU)
    nets.keep("tag2text", lambda: network)
    official = networks.module("scene").get_caption(network, torch.stack([look(frame) for frame in frames]))
    return official, Scene(nets).captions(frames)


def found(dimension: str, clip: Path) -> tuple[Any, Any]:
    """GRiT's texts, boxes and labels of two frames."""
    from rfbench.vbench_worker.fast import Networks
    from rfbench.vbench_worker.objects import Detector

    model, nets = networks.grit(CPU, dimension), Networks(CPU)
    frames = Footage(clip).decord[::4][:2]
    frames = frames if dimension == "color" else frames.astype(np.float32)
    nets.keep(f"grit {dimension}", lambda: model)
    official = [model.run_caption_tensor(frame)[0] for frame in frames]
    return official, Detector(nets, dimension)(frames)


def logits(clip: Path) -> tuple[Any, Any]:
    """UMT's of the 400 actions."""
    from rfbench.vbench_worker import official
    from rfbench.vbench_worker.fast import HumanAction, Networks
    from rfbench.vbench_worker.jobs import Item

    home, seen = networks.module("human_action"), []
    make = home.create_model

    def watched(*args: Any, **named: Any) -> Any:
        network = make(*args, **named)
        network.register_forward_hook(lambda module, given, out: seen.append(out.flatten().tolist()))
        return network

    home.create_model = watched
    list(official.score("human_action", [Item("a", str(clip), "human_action", "A person is running")], CPU))
    HumanAction(Networks(CPU)).logits(Footage(clip))
    return seen[0], seen[1]


def flow(clip: Path) -> tuple[Any, Any]:
    """RAFT's from the first frame to the third, to the last bit."""
    from rfbench.vbench_worker.flow import ITERATIONS, Flow

    raft, frames = networks.raft(CPU), Footage(clip).rgb
    ours = Flow(raft, frames, CPU)
    a, b = (torch.from_numpy(frames[k]).permute(2, 0, 1).float()[None] for k in (0, 2))
    padder = networks.module("dynamic_degree").InputPadder(a.shape)
    _, official = raft(*padder.pad(a, b), iters=ITERATIONS, test_mode=True)
    return official[0].tolist(), ours.between(0, 2).tolist()


WHAT: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "captions": captions,
    "objects": functools.partial(found, "object_class"),
    "descriptions": functools.partial(found, "color"),
    "logits": logits,
    "flow": flow,
}

if __name__ == "__main__":
    write = only_rows_on_stdout()
    torchvision_ops.declare()
    networks.supply_words()
    from rfbench.vbench_worker.random_weights import random_weights

    with random_weights(0), torch.no_grad():
        mine, ours = WHAT[sys.argv[1]](Path(sys.argv[2]))
    write({"official": mine, "fast": ours})
