"""Object class, multiple objects, spatial relationship and colour: what GRiT finds in 16 frames of a clip.

vbench's predictor also scales every frame to another size and draws the boxes on it, and looks neither of them at; and its
network asks the same boxes of the same frame twice, for descriptions and for labels. Those are left out.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rfbench.vbench_worker import rules
from rfbench.vbench_worker.fast import Networks, Result, once
from rfbench.vbench_worker.video import Footage, Frames
from rfbench.vbench_worker.words import Reader

Found = tuple[str, list[int], list[str]]  # description, box, and the labels of all boxes of the frame


class Detector:
    """GRiT with one of its two texts: labels ("object_class"), or descriptions beside labels ("color")."""

    def __init__(self, nets: Networks, dimension: str) -> None:
        self.model = nets.get("grit", dimension).demo.predictor.model
        Reader(self.model.roi_heads)
        if dimension == "color":
            _ask_boxes_once(self.model.roi_heads)
        else:  # the second text is the first one again
            self.model.roi_heads.forward_object = types.MethodType(lambda heads, features, proposals: (self._labels, {}), self.model.roi_heads)
            first = type(self.model.roi_heads).forward
            self.model.roi_heads.forward = types.MethodType(lambda heads, *args: self._remember(first(heads, *args)), self.model.roi_heads)

    def _remember(self, found: Any) -> Any:
        self._labels = found[0]
        return found

    def __call__(self, frame_THWC: Any) -> list[list[Found]]:
        """What is in each frame; frames that occur twice are looked at once."""
        from vbench.third_party.grit_src.image_dense_captions import dense_pred_to_caption_tuple

        different, back = np.unique(frame_THWC, axis=0, return_inverse=True)
        found = []
        for frame in different:
            height, width = frame.shape[:2]
            image_CHW = torch.as_tensor(frame.astype("float32").transpose(2, 0, 1))
            found.append(dense_pred_to_caption_tuple(self.model([{"image": image_CHW, "height": height, "width": width}])[0]))
        return [found[index] for index in back.reshape(-1)]


def _ask_boxes_once(heads: Any) -> None:
    """The three box stages of the second pass are those of the first, for the same features and proposals."""
    stage = type(heads)._run_stage
    last: dict[int, Any] = {}

    def run_stage(self: Any, features: Any, proposals: Any, k: int) -> Any:
        if k in last:
            return last.pop(k)
        last[k] = stage(self, features, proposals, k)
        return last[k]

    heads._run_stage = types.MethodType(run_stage, heads)


def middle_16(clip: Footage) -> Frames:
    frames = clip.decord
    return frames[rules.middle_frames(len(frames), 16)]


def shrunk(frame_THWC: Frames) -> Any:
    """Frames whose shorter side is above 768 come down to 720, by torchvision in float as for all but colour."""
    from torchvision.transforms import Resize

    height, width = frame_THWC.shape[1:3]
    image_TCHW = torch.from_numpy(frame_THWC).permute(0, 3, 1, 2).float()
    if min(height, width) > 768:
        scale = 720.0 / min(height, width)
        image_TCHW = Resize(size=(int(scale * height), int(scale * width)))(image_TCHW)
    return image_TCHW.permute(0, 2, 3, 1).numpy()


def shrunk_by_opencv(frame_THWC: Frames) -> Frames:
    """The same in whole numbers, by OpenCV, as for colour."""
    import cv2

    height, width = frame_THWC.shape[1:3]
    if min(height, width) <= 768:
        return frame_THWC
    scale = 720.0 / min(height, width)
    size = (int(scale * width), int(scale * height))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR) for frame in frame_THWC])


class ObjectClass:
    def __init__(self, nets: Networks) -> None:
        self.detector: Detector = nets.keep("detector", lambda: Detector(nets, "object_class"))

    def found(self, clip: Footage) -> list[list[Found]]:
        return once(clip, "objects", lambda: self.detector(shrunk(middle_16(clip))))

    def labels(self, clip: Footage) -> list[set[str]]:
        return [set(frame[0][2]) if frame else set() for frame in self.found(clip)]

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        return _share([about["object"] in labels for labels in self.labels(clip)])


class MultipleObjects(ObjectClass):
    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        a, b = (name.strip() for name in about["object"].split(" and "))
        return _share([a in labels and b in labels for labels in self.labels(clip)])


class SpatialRelationship(ObjectClass):
    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        wanted = about["spatial_relationship"]
        names = (wanted["object_a"], wanted["object_b"])
        return _share([rules.best_placed(wanted["relationship"], names, [found[:2] for found in frame]) for frame in self.found(clip)])


class Color:
    def __init__(self, nets: Networks) -> None:
        self.detector = Detector(nets, "color")

    def __call__(self, clip: Footage, prompt: str, about: Mapping[str, Any]) -> Result:
        color = about["color"]
        frames = [[(text, labels[0]) for text, _, labels in frame] or [("", "")] for frame in self.detector(shrunk_by_opencv(middle_16(clip)))]
        right, named = rules.color_counts(color, rules.colored_object(prompt, color), frames)
        return Result(right / named, 1, {"right": right, "named": named}) if named else Result(None, 0, {"right": right, "named": 0})


def _share(frames: list[Any]) -> Result:
    return Result(float(np.mean(frames)), len(frames), {"frames": [float(frame) for frame in frames]})
