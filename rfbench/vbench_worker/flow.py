"""Dimensions on pairs of frames: dynamic degree and the static filter by RAFT's flow, motion smoothness by AMT's interpolation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfbench.vbench_worker import networks, rules
from rfbench.vbench_worker.fast import Networks, Result
from rfbench.vbench_worker.video import Footage, Frames, UnreadableError

ITERATIONS = 20
PAIRS = {"cuda": 4, "cpu": 1}  # that AMT sees at once


class Flow:
    """RAFT on the pairs of a clip. Each frame is encoded once, and only the last iteration is scaled up to full size: the same bits."""

    def __init__(self, raft: Any, frame_THWC: Frames, device: torch.device) -> None:
        self.raft, self.device, self.frames = raft, device, frame_THWC
        self._features: dict[int, Tensor] = {}
        self._pad = networks.module("dynamic_degree").InputPadder((1, 3, *frame_THWC.shape[1:3]))

    def _image(self, index: int) -> Tensor:
        image_1CHW = torch.from_numpy(self.frames[index]).permute(2, 0, 1).float()[None].to(self.device)
        return (2 * (self._pad.pad(image_1CHW)[0] / 255.0) - 1.0).contiguous()

    def _feature(self, index: int) -> Tensor:
        if index not in self._features:
            self._features[index] = self.raft.fnet(self._image(index)).float()
        return self._features[index]

    def between(self, a: int, b: int) -> Tensor:
        """Flow from frame a to frame b in pixels: [2, H, W], padded to multiples of 8. The loop of vbench's RAFT.forward."""
        from vbench.third_party.RAFT.core.corr import CorrBlock

        raft, image_1CHW = self.raft, self._image(a)
        look_up = CorrBlock(self._feature(a), self._feature(b), radius=raft.args.corr_radius)
        hidden, context = torch.split(raft.cnet(image_1CHW), [raft.hidden_dim, raft.context_dim], dim=1)
        hidden, context = torch.tanh(hidden), torch.relu(context)
        start, here = raft.initialize_flow(image_1CHW)
        block = raft.update_block
        for _ in range(ITERATIONS):
            motion = block.encoder(here - start, look_up(here))
            hidden = block.gru(hidden, torch.cat([context, motion], dim=1))
            here = here + block.flow_head(hidden)
        return raft.upsample_flow(here - start, 0.25 * block.mask(hidden))[0]

    def speed(self, a: int, b: int, fastest: float) -> float:
        """Mean length in pixels of the fastest share of the flow: the numbers of get_score, added up in its order, without sorting the rest."""
        u, v = self.between(a, b).cpu().numpy()
        rad = np.sqrt(np.square(u) + np.square(v)).flatten()
        count = int(rad.size * fastest)
        if count == 0:
            raise UnreadableError("the frames are too small for a share of their pixels to move")
        return float(np.mean(np.abs(np.sort(np.partition(-rad, count - 1)[:count]))))


class DynamicDegree:
    """Whether enough pairs move; RAFT is not asked about pairs that can no longer change the answer."""

    def __init__(self, nets: Networks) -> None:
        self.nets, self.raft = nets, nets.get("raft")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        flow = Flow(self.raft, clip.rgb[:: rules.flow_stride(clip.fps)], self.nets.device)
        count, height, width = flow.frames.shape[:3]
        threshold, needed = rules.moves_threshold(height, width, count)
        speeds: list[float] = []

        def hit(pair: int) -> bool:
            speeds.append(flow.speed(pair, pair + 1, 0.05))
            return speeds[-1] > threshold

        verdict, asked = rules.moves(count - 1, needed, hit)
        return Result(float(verdict), 1, {"pairs": count - 1, "asked": asked, "speeds": speeds, "threshold": threshold, "needed": needed})


class Static:
    """The filter in front of temporal flickering: 1 for a clip that may be scored there."""

    def __init__(self, nets: Networks) -> None:
        self.nets, self.raft = nets, nets.get("raft")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        flow = Flow(self.raft, clip.rgb, self.nets.device)
        count, height, width = flow.frames.shape[:3]
        threshold, allowed = rules.static_threshold(height, width, count)
        pairs = [*((k, k + 1) for k in range(count - 1)), (0, count - 1), (count - 1, 0)]
        verdict, asked = rules.stays(count - 1, allowed, threshold, lambda pair: flow.speed(*pairs[pair], 0.02))
        return Result(float(verdict), 1, {"pairs": len(pairs), "asked": asked})


class MotionSmoothness:
    """How well AMT-S finds each odd frame from its two neighbours; several triples at once."""

    def __init__(self, nets: Networks) -> None:
        self.nets, self.amt = nets, nets.get("amt")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        import cv2

        home = networks.module("motion_smoothness")
        frames = clip.rgb
        even = frames[::2]
        if len(even) < 2:
            raise UnreadableError(f"the clip has {len(frames)} frames, and smoothness is between the first and the third")
        image_TCHW = torch.from_numpy(np.ascontiguousarray(even)).permute(0, 3, 1, 2) / 255.0
        padder = home.InputPadder(image_TCHW.shape, 16)
        image_TCHW = padder.pad(image_TCHW)
        differences: list[float] = []
        at_once = PAIRS[self.nets.device.type]
        for begin in range(0, len(even) - 1, at_once):
            end = min(begin + at_once, len(even) - 1)
            a, b = (image_TCHW[k : end + k - begin].to(self.nets.device) for k in (begin, begin + 1))
            when = self.amt.embt.expand(len(a), 1, 1, 1)
            found = self.amt.model(a, b, when, scale_factor=1.0, eval=True)["imgt_pred"]
            for offset, image_CHW in enumerate(padder.unpad(found)):
                middle = home.tensor2img(image_CHW)
                differences.append(float(np.mean(cv2.absdiff(frames[2 * (begin + offset) + 1], middle))))
        return Result((255.0 - float(np.mean(np.array(differences)))) / 255.0, 1, {"frames": differences})
