"""torchvision without its compiled half.

Torchvision's wheels are built against CUDA builds of torch. Beside another build its operators are not registered and `import
torchvision` fails, though VBench needs two of them: non-maximum suppression and RoIAlign, which are supplied here in plain torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor

_KEEP: list[Any] = []  # a library's registrations end with its object


def declare() -> bool:
    """Make `import torchvision` work; call it before anything imports torchvision.

    Returns:
        whether torchvision's own operators were missing.
    """
    if _KEEP or importlib.util.find_spec("torchvision") is None:
        return bool(_KEEP)
    try:
        importlib.import_module("torchvision")

        return False
    except RuntimeError as error:  # operator torchvision::nms does not exist
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CompositeExplicitAutograd")
    _KEEP.append(library)
    importlib.import_module("torchvision.ops")
    for name in ("boxes", "roi_align"):
        sys.modules[f"torchvision.ops.{name}"].__dict__["_assert_has_ops"] = lambda: None
    sys.modules["torchvision.ops.roi_align"].__dict__["_roi_align"] = roi_align  # theirs takes 60 GB for one frame of 480p
    return True


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better one overlaps by more than `iou_threshold`, best first: dets [N, 4], scores [N]."""
    left, top, right, bottom = dets.unbind(1)
    area = (right - left) * (bottom - top)
    order = scores.argsort(descending=True, stable=True)
    alive = torch.ones(len(order), dtype=torch.bool, device=dets.device)
    kept = []
    for rank, box in enumerate(order.tolist()):
        if not alive[rank]:
            continue
        kept.append(box)
        rest = order[rank + 1 :]
        width = (torch.minimum(right[box], right[rest]) - torch.maximum(left[box], left[rest])).clamp(min=0)
        height = (torch.minimum(bottom[box], bottom[rest]) - torch.maximum(top[box], top[rest])).clamp(min=0)
        overlap = width * height
        alive[rank + 1 :] &= ~(overlap / (area[box] + area[rest] - overlap) > iou_threshold)
    return torch.tensor(kept, dtype=torch.int64, device=dets.device)


def roi_align(image_NCHW: Tensor, rois: Tensor, scale: float, height: int, width: int, sampling: int, aligned: bool) -> Tensor:
    """Mean of bilinear samples in each cell of a grid over each box: rois [K, 5] (image, left, top, right, bottom) -> [K, C, height, width].

    A sample's weights are a product of one for its row and one for its column, so that a box is two small matrix products.
    """
    boxes_K4 = rois[:, 1:] * scale - (0.5 if aligned else 0.0)
    left, top, right, bottom = boxes_K4.unbind(1)
    rows_KPH = _weights(top, bottom, height, image_NCHW.shape[2], sampling, aligned)
    columns_KPW = _weights(left, right, width, image_NCHW.shape[3], sampling, aligned)
    out = image_NCHW.new_empty(len(rois), image_NCHW.shape[1], height, width)
    for index in range(image_NCHW.shape[0]):
        here = (rois[:, 0] == index).nonzero()[:, 0]
        for part in here.split(64):
            out[part] = torch.einsum("kph,chw,kqw->kcpq", rows_KPH[part], image_NCHW[index], columns_KPW[part])
    return out


def _weights(begin: Tensor, end: Tensor, cells: int, length: int, sampling: int, aligned: bool) -> Tensor:
    """How much each of `length` places counts in each cell of each interval: [K, cells, length]."""
    extent = end - begin if aligned else (end - begin).clamp(min=1.0)
    size = extent / cells
    grid = torch.full_like(extent, sampling) if sampling > 0 else torch.ceil(extent / cells)  # 0 of a box without extent: it has no sample
    most = max(int(grid.max()), 0) if len(grid) else 0
    index = torch.arange(most, device=begin.device)
    cell = torch.arange(cells, device=begin.device)
    place_KPS = begin[:, None, None] + cell[None, :, None] * size[:, None, None] + (index + 0.5) * (size / grid.clamp(min=1))[:, None, None]
    counts = (index < grid[:, None])[:, None, :] & (place_KPS >= -1.0) & (place_KPS <= length)
    place_KPS = place_KPS.clamp(min=0, max=length - 1)
    low = place_KPS.floor().long().clamp(max=length - 1)
    share = torch.where(counts, place_KPS - low, 0.0)
    out = torch.zeros(*place_KPS.shape[:2], length, dtype=begin.dtype, device=begin.device)
    out.scatter_add_(2, low, torch.where(counts, 1.0 - share, 0.0).to(out.dtype))
    out.scatter_add_(2, (low + 1).clamp(max=length - 1), share.to(out.dtype))
    return out / grid.clamp(min=1)[:, None, None]
