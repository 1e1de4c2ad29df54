"""How near a run is to another one, clip by clip and frame by frame: a faster sampler to the exact one, one precision to another.

`rfbench eval RUN -s reference --against OTHER`. Clips are compared with those of the same id and prompt. LPIPS is left out: the package
of that name needs torchvision and ships its linear heads alone, without the network under them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rfbench.errors import UserError
from rfbench.records import Clip, Score, clips_sha256, read_clips
from rfbench.scorers.base import Answer, ClipError, Metric, each, read_video
from rfbench.scorers.similarity import SAME, SIDE, psnr, ssim


@dataclass(frozen=True)
class ReferenceScorer:
    """Compares with the run that `beside` is given."""

    other: Path | None = None
    name: str = "reference"
    metrics: Mapping[str, Metric] = field(
        default_factory=lambda: {
            "psnr": Metric(True, "dB", f"Peak signal-to-noise ratio to the other run's clip; {SAME:g} if they are the same."),
            "ssim": Metric(True, "%", "Structural similarity to the other run's clip, of the luma, over all frames."),
        }
    )
    weights: Mapping[str, str] = field(default_factory=dict)
    together: bool = False

    @property
    def version(self) -> str:
        """With the identity of the other run's videos."""
        return "1" if self.other is None else f"1-{clips_sha256(read_clips(self.other))[:12]}"

    def beside(self, run: Path) -> ReferenceScorer:
        """The same scorer, to compare with this run."""
        return dataclasses.replace(self, other=run)

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """Two rows for each clip; refused is one that the other run does not have, or has in another size or length.

        Raises:
            UserError: there is no other run.
        """
        if self.other is None:
            raise UserError("scorer 'reference' compares with another run: name that with --against RUN")
        run, theirs = self.other, {clip.id: clip for clip in read_clips(self.other)}

        def judge(clip: Clip) -> Iterator[Score]:
            other = theirs.get(clip.id)
            if other is None or other.prompt != clip.prompt:
                raise ClipError(f"clip {clip.id}: {run} has no clip of this id and prompt")
            shape, shape_there = ((one.frames, one.height, one.width) for one in (clip, other))
            if shape != shape_there or min(shape[1:]) < SIDE:
                raise ClipError(
                    f"clip {clip.id} is {_size(clip)}, that of {run} {_size(other)}; they have to be alike, of {SIDE} pixels or more each way"
                )
            ours, others = read_video(out, clip), read_video(run, other)
            yield Score(clip.id, "psnr", psnr(ours, others))
            yield Score(clip.id, "ssim", 100 * float(np.mean([ssim(a, b) for a, b in zip(ours, others, strict=True)])))

        return each(clips, judge)


def _size(clip: Clip) -> str:
    return f"{clip.frames} frame(s) of {clip.width}x{clip.height}"


SCORER = ReferenceScorer()
