"""The folders that VBench's own program reads: `<dimension>/{prompt}-{i}.mp4`, as links to the clips of a run, checked by name.

VBench looks for file names that are the prompts themselves. Two prompts are there twice, two differ in case only, one has an
accented letter, and the names' ending is taken from whichever file the folder lists first. One folder per list of prompts, as
in VBench's dimension_to_folder.json, keeps equal prompts apart; everything else is looked at after the links are there.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rfbench.errors import UserError
from rfbench.records import Clip, sha256_of

LONGEST_NAME = 255  # bytes, of every common file system


@dataclass(frozen=True)
class Finding:
    """Something that stands between a run and a score."""

    kind: Literal["missing", "extra", "duplicate", "mismatched"]
    clip: str
    text: str


def preflight(clips: Sequence[Clip], suite: Mapping[str, Any], run: Path | None = None) -> list[Finding]:
    """What a run lacks or has too much of, against its suite (as in run.json); with its directory also against its files.

    A duplicate is the same video under two ids, a mismatch a clip of another prompt, length, rate or size than the others.
    """
    prompts = {prompt["id"]: prompt for prompt in suite["prompts"]}
    wanted = {(number, i) for number, prompt in prompts.items() for i in range(prompt.get("samples") or suite["samples"])}
    there = {(clip.prompt_id, clip.sample): clip for clip in clips}
    found = [
        Finding("missing", f"{number:04d}-{i}", f"no clip {i} of prompt {number}: {prompts[number]['text']}")
        for number, i in sorted(wanted - there.keys())
    ]
    found += [
        Finding("extra", there[key].id, f"the suite does not ask for clip {key[1]} of prompt {key[0]}") for key in sorted(there.keys() - wanted)
    ]
    first: dict[str, str] = {}
    for clip in clips:
        if first.setdefault(clip.sha256, clip.id) != clip.id:
            found.append(Finding("duplicate", clip.id, f"the same video as {first[clip.sha256]}"))
    shapes = Counter((clip.frames, clip.fps, clip.height, clip.width) for clip in clips)
    for key in sorted(there.keys() & wanted):
        clip, prompt = there[key], prompts[key[0]]
        shape = (clip.frames, clip.fps, clip.height, clip.width)
        if clip.prompt != prompt["text"] or clip.generated_from != (prompt.get("generate_from") or prompt["text"]):
            found.append(Finding("mismatched", clip.id, "made for or from another prompt than the suite's"))
        elif shape != shapes.most_common(1)[0][0]:
            found.append(Finding("mismatched", clip.id, "{} frames at {} fps, {}x{}; the others are not".format(*shape)))
        elif run is not None and not (run / clip.file).is_file():
            found.append(Finding("missing", clip.id, f"{clip.file} is not there"))
        elif run is not None and sha256_of(run / clip.file) != clip.sha256:
            found.append(Finding("mismatched", clip.id, f"{clip.file} was altered"))
    return found


def names(clips: Iterable[Clip], suite: Mapping[str, Any]) -> dict[str, Clip]:
    """`<folder>/<file name>` -> clip. A list's folder is called after its first dimension; prompts of one's own lie in `custom`.

    Raises:
        UserError: two clips have one name, or a prompt is no file name.
    """
    folders = {prompt["id"]: (prompt.get("dimensions") or ["custom"])[0] for prompt in suite["prompts"]}
    found: dict[str, Clip] = {}
    for clip in clips:
        name = f"{clip.prompt}-{clip.sample}.mp4"
        if "/" in name or len(name.encode()) > LONGEST_NAME:
            why = "it has a '/'" if "/" in name else f"its name has {len(name.encode())} bytes and the most is {LONGEST_NAME}"
            raise UserError(f"clip {clip.id} cannot be named after its prompt as VBench wants ({why}); shorten or change the prompt")
        if unicodedata.normalize("NFC", name) != name:
            raise UserError(f"clip {clip.id}: its prompt is not in Unicode's composed form (NFC), in which VBench's are; normalise the prompt")
        other = found.setdefault(f"{folders[clip.prompt_id]}/{name}", clip)
        if other is not clip:
            raise UserError(f"clips {other.id} and {clip.id} would both be '{name}'; give each prompt once and raise 'samples' instead")
    return found


def stage(run: Path, named: Mapping[str, Clip], out: Path) -> None:
    """Link every clip under its name, then list the folders: what lies there is exactly what was named.

    Raises:
        UserError: something else lies there; the file system does not keep two names apart, or changes one.
    """
    for folder in sorted({name.partition("/")[0] for name in named}):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _refuse_stray(named, out)
    for name, clip in named.items():
        link, target = out / name, (run / clip.file).resolve()
        if link.exists() and not link.is_symlink():
            raise UserError(f"{link} is there and is no link; name an empty folder")
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    lost = [name for name in named if name.partition("/")[2] not in os.listdir(out / name.partition("/")[0])]
    if lost:
        raise UserError(f"this file system changes the name '{lost[0]}' or takes it for another one's, so VBench would not find it; use another disk")


def _refuse_stray(named: Mapping[str, Clip], out: Path) -> None:
    """VBench takes the ending of all names from whichever file is listed first: a stray .json makes every video missing."""
    there = [str(path.relative_to(out)) for path in sorted(out.rglob("*")) if not path.is_dir() or path.is_symlink()]
    forms = {unicodedata.normalize("NFC", name) for name in named}
    stray = [name for name in there if unicodedata.normalize("NFC", name) not in forms]
    if stray:
        raise UserError(f"{out} holds {len(stray)} files that do not belong there ({', '.join(stray[:3])}); name an empty folder")
