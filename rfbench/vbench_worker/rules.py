"""VBench's rules that need no network: which frames are looked at, when a verdict is settled, what counts as a hit. Plain Python.

Source: PyPI vbench 0.1.5; each rule gives the same answer as the function that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

COLORS = ("white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey")
Box = Sequence[int]  # left, top, right, bottom in pixels


def middle_frames(length: int, count: int) -> list[int]:
    """The middles of `count` equal parts of a clip; a shorter clip is filled up with its last frame (utils.get_frame_indices, "middle")."""
    parts = min(count, length)
    cuts = [int(k * (length / parts)) for k in range(parts)] + [length]  # in floats and truncated, as numpy.linspace does it
    found = [(low + high - 1) // 2 for low, high in pairwise(cuts)]
    return found + [found[-1]] * (count - parts)


def flow_stride(fps: float) -> int:
    """Dynamic degree looks at eight frames per second (dynamic_degree.DynamicDegree.get_frames); halves round to even."""
    return max(1, round(fps / 8))


def moves_threshold(height: int, width: int, frames: int) -> tuple[float, int]:
    """How fast a pair has to move, in pixels, and how many pairs have to (DynamicDegree.set_params)."""
    return 6.0 * (min(height, width) / 256.0), round(4 * (frames / 16.0))


def static_threshold(height: int, width: int, frames: int) -> tuple[float, int]:
    """What a pair of a static clip stays below, in pixels, and how many pairs may break it (static_filter.StaticFilter.set_params)."""
    return 3.0 * (min(height, width) / 256.0), round(2 * (frames / 16.0))


def moves(pairs: int, needed: int, hit: Callable[[int], bool]) -> tuple[bool, int]:
    """Whether at least `needed` of `pairs` are hits, asking for as few of them as settle it (DynamicDegree.check_move).

    Without any pair there is no motion, even when none is needed.

    Returns:
        the verdict, and how many pairs were asked for.
    """
    if pairs == 0:
        return False, 0
    hits = 0
    for seen in range(pairs):
        if hits >= needed or hits + pairs - seen < needed:
            return hits >= needed, seen
        hits += hit(seen)
    return hits >= needed, pairs


def stays(pairs: int, allowed: int, threshold: float, score: Callable[[int], float]) -> tuple[bool, int]:
    """Whether a clip is static, asking for as few pairs as settle it (static_filter.StaticFilter.check_static).

    At most `allowed` of the consecutive pairs may exceed the threshold, and first to last and last to first, which are the pairs
    number `pairs` and `pairs + 1`, must not exceed it `2 * allowed` times. Those two are asked first: they see slow motion at once.

    Returns:
        the verdict, and how many pairs were asked for.
    """
    asked = 0
    for wrap in (pairs, pairs + 1):
        asked += 1
        if score(wrap) > threshold * allowed * 2:
            return False, asked
    over = 0
    for pair in range(pairs):
        if over + pairs - pair <= allowed:
            return True, asked
        asked += 1
        over += score(pair) > threshold
        if over > allowed:
            return False, asked
    return True, asked


def action_of(prompt: str) -> str:
    """The action that a clip must be recognised as: human_action reads it from the name of the file, which is the prompt and a number."""
    return f"{prompt}-0.mp4".split("/")[-1].lower().split("-")[0].split("person is ")[-1].split("_")[0]


def recognised(action: str, labels: Iterable[str], scores: Iterable[float]) -> bool:
    """Whether one of the five most likely actions is the right one and is sure enough (human_action.human_action)."""
    return any(label == action and round(score, 4) >= 0.85 for label, score in zip(labels, scores, strict=True))


def in_scene(scene: str, caption: str) -> bool:
    """Every word of the scene occurs in the caption, be it inside another word (scene.check_generate)."""
    return all(word in caption for word in scene.split(" "))


def colored_object(prompt: str, color: str) -> str:
    """The object of a prompt such as "a red car" (color.color); the article "a " is also cut out of the middle of words."""
    return prompt.replace("a ", "").replace("an ", "").replace(color, "").strip()


def color_counts(color: str, target: str, frames: Iterable[Sequence[tuple[str, str]]]) -> tuple[int, int]:
    """Frames whose object has the colour, and frames whose object has any; a frame is (description, label) pairs (color.check_generate)."""
    right = named = 0
    for found in frames:
        texts = [text for text, label in found if label == target]
        right += any(color in text for text in texts)
        named += any(word in text for text in texts for word in COLORS)
    return right, named


def placed(relation: str, a: Box, b: Box) -> float:
    """How far two boxes lie side by side, or one above the other: 1, or less if they overlap (spatial_relationship.get_position_score).

    Which one is on which side makes no difference.
    """
    dx = abs((b[0] + b[2]) / 2 - (a[0] + a[2]) / 2)
    dy = abs((b[1] + b[3]) / 2 - (a[1] + a[3]) / 2)
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
    if relation in "on the right of" or relation in "on the left of":
        along = dx > dy
    elif relation in "on the bottom of" or relation in "on the top of":
        along = dy > dx
    else:
        along = False
    iou = overlap / union
    return 0.0 if not along else 1.0 if iou < 0.1 else 0.1 / iou


def best_placed(relation: str, names: Sequence[str], found: Iterable[tuple[str, Box]]) -> float:
    """The best pair among all boxes of a frame whose label is one of `names`, two of the same label included (check_generate)."""
    boxes = [box for label, box in found if label in names]
    return max((placed(relation, a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]), default=0.0)
