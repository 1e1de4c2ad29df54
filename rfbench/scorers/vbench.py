"""VBench: sixteen dimensions of the clips of a run, and its totals, by the networks of the PyPI package `vbench`.

A clip of the suite `vbench` is asked for the dimensions of its prompt; a clip of any other suite for those that need nothing but
a prompt. VBench-Long cuts long videos into clips and asks of each (`rfbench.vbench.long`). Values are kept one by one in
`scores/<scorer>/rows.jsonl` under the clip's sha256, the dimension and its version, so that other weights, or a dimension that
can run now, cost nothing but themselves. What is kept of VBench's habits: rfbench/vbench/PROTOCOL.md.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rfbench import envs, records
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.records import Clip, Score, canonical, fingerprint
from rfbench.scorers.base import Answer, ClipError, Metric, check_pace, verify_video
from rfbench.vbench import long, rows, totals
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.driver import Item, Line, answers, check
from rfbench.vbench.prompts import Entry, entries
from rfbench.vbench.rows import BETWEEN, CUSTOM, STATIC, TEXT_FREE, Asked, Row

TEXTS = {
    "subject_consistency": "How alike neighbouring frames, and each and the first, are to DINO.",
    "background_consistency": "How alike neighbouring frames, and each and the first, are to CLIP.",
    "temporal_flickering": "How little pixels change from frame to frame, in static clips.",
    "motion_smoothness": "How well a network that interpolates motion finds every second frame.",
    "dynamic_degree": "Clips whose fastest pixels move far in a quarter of their frames.",
    "aesthetic_quality": "LAION's aesthetic score of the frames.",
    "imaging_quality": "MUSIQ's technical quality of the frames.",
    "object_class": "Frames in which the object is found.",
    "multiple_objects": "Frames in which both objects are found.",
    "human_action": "Clips whose action is recognised.",
    "color": "Frames with the object in the asked colour, of those in which it has any.",
    "spatial_relationship": "Frames in which two of the objects lie side by side, or one above the other, as asked.",
    "scene": "Frames whose caption names the scene.",
    "appearance_style": "Cosine of frames and the name of the style.",
    "temporal_style": "Cosine of the clip and its prompt.",
    "overall_consistency": "Cosine of the clip and its prompt.",
}
TOTALS = {
    "total": "VBench's total of all dimensions: four parts quality, one part semantic.",
    "quality": "VBench's total of the dimensions that do not look at the prompt.",
    "semantic": "VBench's total of the dimensions that do.",
}
SEEN, WHOLE, DRIFT = "color_seen", "dynamic_degree_whole", "drift"
Place = tuple[str, int | None, int | None]  # a dimension, and the frames [begin, end) of a clip; of the whole clip without them


@dataclass(frozen=True)
class Want:
    """A dimension of a clip or of a part of it, with what it is compared with."""

    dimension: str
    prompt: str
    about: Mapping[str, Any]
    begin: int | None = None
    end: int | None = None
    cuts: tuple[tuple[int, int], ...] = ()  # of the first frames of these clips

    @property
    def place(self) -> Place:
        return self.dimension, self.begin, self.end

    @property
    def network(self) -> str:
        """The dimension whose networks find it."""
        return BETWEEN.get(self.dimension, self.dimension)

    @property
    def text(self) -> str:
        """What the answer depends on beside the clip."""
        return "" if self.network in (*TEXT_FREE, STATIC) else canonical([self.prompt, self.about])


@dataclass(frozen=True)
class VBench:
    """Some dimensions by one driver of the worker; `random` draws the networks' weights, to see that everything runs.

    `cut` makes it VBench-Long: prompts of VBench's suites are cut into 2 s or by their longest dimension, others always into 2 s.
    `compat` keeps what PROTOCOL.md calls repaired, where something can be switched: totals count what is missing as 0, clips of
    long videos are written to files, which changes their pixels, and consistency is fused with that between clips. `lenient` leaves out
    the dimensions that cannot run here.
    """

    name: str
    dimensions: tuple[str, ...]
    driver: str = "fast"
    random: int | None = None
    cut: long.Cut | None = None
    compat: bool = False
    lenient: bool = False
    together = False
    sparse = frozenset({"color", "temporal_flickering", *BETWEEN})  # may say nothing of a clip

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Those of the dimensions, what two of them leave out, and what all of them add up to."""
        found = {name: Metric(True, "%", TEXTS[name]) for name in self.dimensions}
        if "temporal_flickering" in found:
            found[STATIC] = Metric(True, "%", "Clips that VBench's static filter lets through.")
        if "color" in found:
            found[SEEN] = Metric(True, "%", "Clips in which the object was seen with a colour; the others do not count for color.")
        if set(T2V.dimensions) <= set(self.dimensions):
            found |= {name: Metric(True, "%", text) for name, text in TOTALS.items()}
        if self.cut is not None:
            told = {name: f"{TEXTS[of][:-1]}, of the first frames of a video's clips." for name, of in BETWEEN.items() if of in found}
            found |= {name: Metric(True, "%", text) for name, text in told.items()}
            found[WHOLE] = Metric(True, "%", "Videos that are dynamic as a whole; dynamic_degree is the mean over their clips.")
            found[DRIFT] = Metric(False, "points", "Standard deviation of imaging quality over the 2 s clips of a video.")
        if self.random is not None:
            return {name: dataclasses.replace(one, text=f"Of drawn weights, so that it says nothing: {one.text}") for name, one in found.items()}
        return found

    @property
    def version(self) -> str:
        """Of vbench, the worker and the weights, of every dimension that can run here; answers without some of them are others than with all.

        Raises:
            UserError: the environment is not built, or none of the dimensions can run.
        """
        versions = self._versions()
        lacks = self.lenient and any(name not in versions for name in self._names())
        return f"{fingerprint(versions)[:12]}{'-in-part' if lacks else ''}"

    @property
    def weights(self) -> Mapping[str, str]:
        """The version of each dimension, which ends with the hashes of its files."""
        return self._versions()

    def ready(self) -> list[Line]:
        """What each dimension is here: its version, or what it lacks and the command that mends it.

        Raises:
            UserError: the environment is not built or does not work.
        """
        return _checked(envs.python("vbench"), tuple(self._names()), self.driver, self.random)

    def _versions(self) -> dict[str, str]:
        found = self.ready()
        ready = {one["dimension"]: one["version"] for one in found if one["version"]}
        if not ready:
            raise UserError(f"none of VBench's dimensions can run here: {found[0]['dimension']}: {found[0]['problem']}; {found[0]['fix']}")
        written = {name: f"{version}/reencoded" if self._rewrites else version for name, version in ready.items()}
        between = {name: f"{written[of]}/first frames" for name, of in BETWEEN.items() if of in written and self.cut is not None}
        return written | between

    @property
    def _rewrites(self) -> bool:
        """Whether the clips of a long video are files of their own."""
        return self.compat and self.cut is not None

    def _names(self) -> list[str]:
        return [*self.dimensions, *([STATIC] if "temporal_flickering" in self.dimensions else [])]

    def partly(self) -> VBench:
        """The same with what can run here of it."""
        return dataclasses.replace(self, lenient=True)

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """Rows of every clip, of those kept and of those that the worker makes now.

        Raises:
            UserError: a dimension that the suite asks for cannot run here; the prompts are not VBench's.
        """
        wants = {clip.id: self._wanted(clip, entry) for clip, entry in _entries(clips, out)}
        asked = {want.network for several in wants.values() for want in several}
        versions = self._versions()
        for one in self.ready():
            if one["dimension"] in asked and one["dimension"] not in versions:
                raise UserError(f"VBench's {one['dimension']} cannot run here: {one['problem']}; {one['fix']} (--partial scores the others)")
            if self.lenient and one["dimension"] not in versions:
                say(f"without VBench's {one['dimension']}: {one['problem']}")
        kept = {rows.key(row): row for row in records.read_rows(self._rows(out), Row)}
        waiting: dict[str, dict[Place, Row | None]] = {}
        items = []
        told = " that can run here" if self.lenient else ""
        for clip in clips:
            waiting[clip.id] = {
                want.place: kept.get((clip.sha256, want.dimension, versions[want.dimension], want.text, want.begin, want.end))
                for want in wants[clip.id]
            }
            if not wants[clip.id]:
                yield Answer(clip.id, refused=f"clip {clip.id}: its prompt is for none of the dimensions of '{self.name}'{told}")
            elif all(waiting[clip.id].values()):
                yield self._answer(clip, waiting[clip.id])
            else:
                try:
                    path = verify_video(out, clip)
                    check_pace(clip, path)
                except ClipError as error:
                    yield Answer(clip.id, refused=str(error))
                    continue
                items += [self._item(clip, path, want, out) for want in wants[clip.id] if waiting[clip.id][want.place] is None]
        yield from self._made(items, {clip.id: clip for clip in clips}, wants, waiting, versions, out)

    def _item(self, clip: Clip, path: Path, want: Want, out: Path) -> Item:
        """What the worker is asked: frames of the clip's own file, or a file of these frames alone."""
        about = {"id": json.dumps([clip.id, *want.place]), "dimension": want.network, "prompt": want.prompt, "about": want.about}
        if want.cuts and self._rewrites:
            parts = [self._part(clip, path, begin, end, out) for begin, end in want.cuts]
            return about | {"path": str(long.write_first_frames(parts, parts[0].with_name(f"{clip.id}_first.mp4"), clip.fps)), "frames": len(parts)}
        if want.cuts:
            return about | {"path": str(path), "frames": clip.frames, "at": [begin for begin, _ in want.cuts]}
        if want.begin is None or want.end is None:
            return about | {"path": str(path), "frames": clip.frames}
        if self._rewrites:
            return about | {"path": str(self._part(clip, path, want.begin, want.end, out)), "frames": want.end - want.begin}
        return about | {"path": str(path), "frames": clip.frames, "begin": want.begin, "end": want.end}

    def _part(self, clip: Clip, path: Path, begin: int, end: int, out: Path) -> Path:
        part = self._rows(out).parent / "clips" / f"{clip.id}_{begin}.{clip.sha256[:16]}.mp4"  # one may be left of a clip that was made again
        long.write_part(path, part, begin, end, clip.fps)
        return part

    def _made(
        self,
        items: Sequence[Item],
        clips: Mapping[str, Clip],
        wants: Mapping[str, Sequence[Want]],
        waiting: dict[str, dict[Place, Row | None]],
        versions: Mapping[str, str],
        out: Path,
    ) -> Iterator[Answer]:
        """What the worker answers, each row kept at once; a clip is answered for with its last row."""
        open_of: dict[str, int] = {}
        refused: dict[str, str] = {}
        for item in items:
            number = json.loads(item["id"])[0]
            open_of[number] = open_of.get(number, 0) + 1
        if not items:
            return
        with records.appending(self._rows(out)) as append:
            job = {"driver": self.driver, "device": _device(), "random": self.random}
            for line in answers(envs.python("vbench"), items, job, self._rows(out).parent):
                number, *place = json.loads(line["id"])
                if line.get("reason"):
                    refused.setdefault(number, f"clip {number}: {line['reason']}")
                else:
                    want = next(want for want in wants[number] if want.place == tuple(place))
                    answer = (line["value"], line["weight"], want.text, want.begin, want.end, dict(line.get("extra", {})))
                    row = Row(clips[number].sha256, want.dimension, versions[want.dimension], *answer)
                    append(row)
                    waiting[number][want.place] = row
                open_of[number] -= 1
                if open_of[number] == 0:
                    yield Answer(number, refused=refused[number]) if number in refused else self._answer(clips[number], waiting[number])
        shutil.rmtree(self._rows(out).parent / "clips", ignore_errors=True)

    def _answer(self, clip: Clip, found: Mapping[Place, Row | None]) -> Answer:
        """Score rows of a clip. Flicker of what moves is not told where it was filtered, and no colour of an object that was not seen."""
        parts: dict[str, list[Row]] = {}
        for (dimension, begin, _), row in found.items():
            assert row is not None
            whole = self.cut is not None and begin is None and dimension == "dynamic_degree"
            parts.setdefault(WHOLE if whole else dimension, []).append(row)
        still = {(row.begin, row.end) for row in parts.get(STATIC, ()) if row.value == 1}
        scores = []
        for name, several in parts.items():
            told = [row.value for row in several if row.value is not None]
            if name == "color":
                scores.append(Score(clip.id, SEEN, 100.0 * bool(told)))
            if name == "temporal_flickering" and STATIC in parts:
                told = [row.value for row in several if row.value is not None and (row.begin, row.end) in still]
            if told:
                mean = math.fsum(told) / len(told)
                if self._rewrites and name in BETWEEN.values():
                    mean = long.fused(mean, next((row.value for of in parts if BETWEEN.get(of) == name for row in parts[of]), None), name)
                scores.append(Score(clip.id, name, 100 * mean))
            if name == "imaging_quality" and self.cut is not None and len(told) > 1 and _spans(several) == 2 * clip.fps:
                scores.append(Score(clip.id, DRIFT, 100 * long.drift(told)))
        return Answer(clip.id, tuple(scores))

    def summary(self, clips: list[Clip], out: Path, *, partial: bool) -> dict[str, Any]:
        """The dimensions over all clips as VBench in one process counts them, and the totals or why there are none.

        `partial`: clips are missing, and every number says so. Where VBench in several processes would find another value, it
        stands beside it.
        """
        versions, there = self._versions(), records.read_rows(self._rows(out), Row)
        asked: dict[str, list[Asked]] = {}
        for clip, entry in _entries(clips, out):
            for want in self._wanted(clip, entry):
                asked.setdefault(want.dimension, []).append(Asked(clip.id, clip.prompt_id, clip.sample, clip.sha256, want.text, want.begin, want.end))
        found: dict[str, dict[str, Any]] = {}
        for dimension in self.dimensions:
            if dimension not in asked or dimension not in versions:
                continue
            try:
                if self.cut is None:
                    found[dimension] = rows.dimension(dimension, asked, there, versions, partial=partial)
                else:
                    found[dimension] = long.dimension(dimension, asked, there, versions, partial=partial, compat=self.compat)
            except UserError as error:
                found[dimension] = {"value": None, "why": str(error)}
        percent = {name: one["value"] for name, one in found.items() if one["value"] is not None}
        try:
            points = totals.total(percent)
        except UserError as error:
            released = {"as_released": totals.as_released(percent)} if self.compat else {}  # no `totals`, which would be cells of a report
            return {"dimensions": found, "totals": None, "why": str(error), **released}
        return {"dimensions": found, "totals": points | ({"partial": True} if partial else {})}

    def _wanted(self, clip: Clip, entry: Entry) -> list[Want]:
        names = [name for name in (*entry.dimensions, *([STATIC] if entry.filtered else [])) if name in self._names()]
        if self.lenient:
            ready = self._versions()
            unfiltered = entry.filtered and STATIC not in ready
            names = [name for name in names if name in ready and not (unfiltered and name == "temporal_flickering")]
        whole = [Want(name, clip.prompt, entry.auxiliary.get(name, {})) for name in names]
        if self.cut is None:
            return whole
        length = long.seconds(entry, entries(), self.cut) if entry.dimensions != CUSTOM else 2
        cuts = long.segments(clip.frames, clip.fps, length)
        parts = [dataclasses.replace(want, begin=begin, end=end) for want in whole for begin, end in cuts]
        between = [Want(name, clip.prompt, {}, cuts=tuple(cuts)) for name, of in BETWEEN.items() if of in names and len(cuts) > 1]
        return [*parts, *between, *(want for want in whole if want.dimension == "dynamic_degree")]

    def _rows(self, out: Path) -> Path:
        return out / "scores" / self.name / "rows.jsonl"


def _spans(several: Sequence[Row]) -> int:
    return max((row.end or 0) - (row.begin or 0) for row in several)


@functools.cache
def _checked(python: Path, dimensions: tuple[str, ...], driver: str, random: int | None) -> list[Line]:
    """What can run here, asked once per process: the worker hashes gigabytes for it."""
    return check(python, dimensions, {"driver": driver, "random": random})


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _entries(clips: Sequence[Clip], out: Path) -> list[tuple[Clip, Entry]]:
    """Every clip with the entry of its prompt; of a suite of one's own, with the dimensions that need nothing but a prompt.

    Raises:
        UserError: the run's prompts are not those of VBench's list although they name dimensions.
    """
    suite = records.read_run(out).inputs["suite"]
    told = {prompt["id"]: prompt for prompt in suite["prompts"]}
    if not any(prompt.get("dimensions") for prompt in told.values()):
        return [(clip, Entry(clip.prompt, CUSTOM)) for clip in clips]
    known = entries()
    for number, prompt in told.items():
        if number >= len(known) or (known[number].text, list(known[number].dimensions)) != (prompt["text"], prompt["dimensions"]):
            raise UserError(f"{out}: prompt {number} is not that of VBench's list; generate a suite with 'prompts: vbench'")
    filtered = {number for number, prompt in told.items() if (prompt.get("samples") or 0) > suite["samples"]}
    return [(clip, dataclasses.replace(known[clip.prompt_id], filtered=clip.prompt_id in filtered)) for clip in clips]


ALL = tuple(T2V.dimensions)
SCORER = VBench("vbench", ALL)
QUALITY = VBench("vbench-quality", tuple(name for name, one in T2V.dimensions.items() if one.group == "quality"))
COMPAT = VBench("vbench-compat", ALL, driver="official", compat=True)
REHEARSAL = VBench("vbench-random", ALL, random=0)
LONG = VBench("vbench-long", ALL, cut="2s")
DRIFT_ALONE = VBench("vbench-drift", ("imaging_quality", "dynamic_degree"), cut="2s")  # the paper's supplement S3, of any long video
LONG_COMPAT = VBench("vbench-long-compat", ALL, driver="official", cut="longest", compat=True)
