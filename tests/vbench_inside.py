"""What Tag2Text says inside both drivers, for test_vbench_drivers.py: with drawn weights alone all captions are alike, whatever is seen.

    VBENCH_PYTHON tests/vbench_inside.py      prints {"official": ..., "fast": ...}

Both use one network, vbench's own code first, as the fast driver changes parts of it. See rfbench/vbench_worker/captions.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from rfbench.vbench_worker import networks, torchvision_ops
from rfbench.vbench_worker.__main__ import only_rows_on_stdout

CPU = torch.device("cpu")


def different_frames() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Six that have nothing in common: [6, 384, 384, 3]."""
    rng = np.random.default_rng(0)
    ramp = np.broadcast_to(np.linspace(0, 255, 384).astype(np.uint8)[:, None, None], (384, 384, 3))
    stripes = np.where(np.arange(384)[None, :, None] // 24 % 2, [250, 10, 10], [0, 240, 60]).repeat(384, 0).astype(np.uint8)
    noise = rng.integers(0, 256, (384, 384, 3), np.uint8)
    return np.stack([noise, stripes, ramp, stripes.transpose(1, 0, 2), 255 - ramp, np.zeros_like(noise)])


def captions() -> tuple[Any, Any]:
    """Tag2Text's, of frames and with weights that give different ones: words listen more to the image than they do when drawn."""
    from vbench.utils import tag2text_transform

    from rfbench.vbench_worker.captions import Scene
    from rfbench.vbench_worker.fast import Networks

    look = tag2text_transform(384)
    network = networks.tag2text(CPU)
    for name, parameter in network.named_parameters():
        if name.endswith("crossattention.output.dense.weight"):
            parameter.mul_(20)
    network.generate = functools.partial(network.generate, max_length=12)
    frames, nets = different_frames(), Networks(CPU)
    nets.keep("tag2text", lambda: network)
    official = networks.module("scene").get_caption(network, torch.stack([look(frame) for frame in frames]))
    return official, Scene(nets).captions(frames)


if __name__ == "__main__":
    write = only_rows_on_stdout()
    torchvision_ops.declare()
    networks.supply_words()
    from rfbench.vbench_worker.random_weights import random_weights

    with random_weights(0), torch.no_grad():
        mine, ours = captions()
    write({"official": mine, "fast": ours})
