"""Suites: which prompts, how many samples of each, how long, at which seed. Everything that two contenders must share.

A suite is one of `SUITES`, a .jsonl file of prompts (`{"text": ..., "generate_from": ...}` per line) that is run with the
defaults of `SuiteFile`, or a .yaml file with the fields of `SuiteFile`. `NAME@0.02` is two per cent of its prompts.

Prompt text never becomes part of a path here
(`rfbench.vbench.staging` makes the names that VBench wants).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rfbench.errors import UserError, did_you_mean
from rfbench.records import fingerprint
from rfbench.strict import as_plain, build
from rfbench.vbench import prompts as vbench

PROMPTS = Path(__file__).resolve().parent / "prompts"
LONGEST = 2000  # characters of a prompt
VBENCH, MOVIEGEN = "vbench", "moviegen"  # prompts that are not ours to ship
FLICKERING = 75  # prompts that VBench has for temporal flickering


@dataclass(frozen=True)
class SuiteFile:
    """What a suite's .yaml file says."""

    prompts: str  # a .jsonl file beside it, `vbench` or `moviegen`
    extended: str | None = None  # what models are given, line by line: one of `rfbench.vbench.prompts.EXTENDED` or a .txt file beside it
    frames: int = 81  # pixel frames per clip
    fps: int = 16
    seed: int = 0
    samples: int = 1  # clips per prompt
    filtered: int | None = None  # vbench: clips per prompt of temporal flickering, of which its filter keeps the first static ones
    first: int | None = None  # only so many prompts from the beginning of the file, which has them
    title: str = ""

    def __post_init__(self) -> None:
        if self.filtered is not None and (self.prompts != VBENCH or self.filtered <= self.samples):
            raise UserError(f"'filtered' is for 'prompts: {VBENCH}' and is more than 'samples'; leave it out")
        for field, least in (("frames", 1), ("fps", 1), ("samples", 1), ("seed", 0), ("first", 1)):
            if (getattr(self, field) or 0) < least and getattr(self, field) is not None:
                raise UserError(f"'{field}' is {getattr(self, field)}; the least is {least}")


@dataclass(frozen=True)
class Prompt:
    """`text` is what a clip is scored against; a model is given `generate_from` where there is one (a longer rewriting)."""

    id: int
    text: str
    generate_from: str | None = None
    samples: int | None = None  # clips of this prompt, if not as many as of the others
    dimensions: tuple[str, ...] = ()  # of VBench that it is for

    @property
    def given(self) -> str:
        """What a model is given."""
        return self.text if self.generate_from is None else self.generate_from


Item = tuple[Prompt, int]  # a clip to make: its prompt and which sample of it
Thing = TypeVar("Thing")


@dataclass(frozen=True)
class Suite:
    """A list of clips to make: `samples` of each prompt, seeded by `seed`, as long as `frames` pixel frames at `fps`."""

    name: str
    frames: int
    fps: int
    seed: int
    samples: int
    prompts: tuple[Prompt, ...]

    def frames_at(self, fps: int) -> int:
        """Pixel frames of a model that makes `fps` of them per second: the time from the first to the last is the suite's, or a little more."""
        return 1 + -(-(self.frames - 1) * fps // self.fps)

    @property
    def items(self) -> list[Item]:
        """Every clip: its prompt and which sample of it."""
        return [(prompt, sample) for prompt in self.prompts for sample in range(prompt.samples or self.samples)]


SUITES = {
    "toy-short": SuiteFile("toy-short.jsonl", frames=81, samples=2, title="toy world, 5 s: open, fixed and changing motion"),
    "toy-long": SuiteFile("toy-long.jsonl", frames=477, title="toy world, 30 s: motion that should hold"),
    "smoke": SuiteFile("smoke.jsonl", frames=33, title="two clips of 2 s, to see that everything runs"),
    "vbench": SuiteFile(VBENCH, samples=5, filtered=25, first=946, title="VBench"),
    "vbench-extended": SuiteFile(VBENCH, "self-forcing", samples=5, filtered=25, first=946, title="VBench, from rewritten prompts"),
    "vbench-forcing": SuiteFile(
        VBENCH, "self-forcing", samples=5, first=946, title="VBench as the Forcing papers run it: rewritten prompts, no static filter"
    ),
    "moviegen-60s": SuiteFile(MOVIEGEN, "moviegen-self-forcing", frames=957, first=128, title="MovieGen's first 128 prompts, rewritten, 60 s"),
}


def load_suite(name_or_path: str, limit: int | None = None) -> Suite:
    """A built-in suite by name, or one from a .jsonl or .yaml file; `limit` keeps its first prompts, with their ids.

    Raises:
        UserError: no such suite, a wrong field, or a prompt that cannot be used; names the file and line.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no prompt; the least is 1")
    whole, share = split(name_or_path)
    name, folder, header = header_of(whole)
    if header.prompts == VBENCH:
        prompts = _vbench_prompts(header)
    elif header.prompts == MOVIEGEN:
        prompts = tuple(Prompt(i, line) for i, line in enumerate(vbench.moviegen()))
    else:
        prompts = _read_prompts(folder / header.prompts)
    if header.extended is not None:
        prompts = _extended(prompts, header.extended, folder)
    if len(prompts) < (header.first or 0):
        raise UserError(f"suite '{name}' asks for the first {header.first} prompts, and there are {len(prompts)}; correct 'first'")
    prompts = prompts[: header.first]
    if share is not None:
        name, prompts = f"{name}@{share:g}", stratified(prompts, share)
    return Suite(name, header.frames, header.fps, header.seed, header.samples, prompts[:limit])


def foreseen(name_or_path: str, limit: int | None = None) -> Suite:
    """The suite; if it is of prompts that are not ours to ship and that are not here, as many without text, of a share about as many.

    Raises:
        UserError: no such suite, a wrong field, or a prompt of one's own that cannot be used.
    """
    whole, share = split(name_or_path)
    name, _, header = header_of(whole)
    try:
        return load_suite(name_or_path, limit)
    except UserError:
        if header.prompts not in (VBENCH, MOVIEGEN) or header.first is None:
            raise
    prompts = tuple(Prompt(i, "", samples=header.filtered if i < FLICKERING else None) for i in range(header.first))
    if share is not None:
        name, prompts = f"{name}@{share:g}", stratified(prompts, share)
    return Suite(name, header.frames, header.fps, header.seed, header.samples, prompts[:limit])


def split(name: str) -> tuple[str, float | None]:
    """`vbench@0.02` as `vbench` and 0.02: a name, and the share of its prompts that is meant.

    Raises:
        UserError: what follows the @ is no share.
    """
    whole, at, text = name.rpartition("@")
    if not at:
        return name, None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UserError(f"'{name}': write a share of the prompts between 0 and 1 after the @, for example {whole}@0.02")
    return whole, share


def header_of(name_or_path: str) -> tuple[str, Path, SuiteFile]:
    """A suite's name, the folder of its files and what its file says; its prompts need not be there.

    Raises:
        UserError: no such suite or a wrong field.
    """
    if name_or_path in SUITES:
        return name_or_path, PROMPTS, SUITES[name_or_path]
    if not name_or_path.endswith((".jsonl", ".yaml", ".yml")):
        raise UserError(f"there is no suite '{name_or_path}'{did_you_mean(name_or_path, SUITES)}")
    path = Path(name_or_path)
    if not path.is_file():
        raise UserError(f"suite {path}: there is no such file")
    if not re.fullmatch(r"\w[\w.-]*", path.stem, re.ASCII):
        raise UserError(f"suite {path}: its clips go into a folder named after it, so name the file with letters, digits, '-' and '_' only")
    return path.stem, path.parent, SuiteFile(path.name) if path.suffix == ".jsonl" else _read_header(path)


def stratified(prompts: Sequence[Prompt], share: float) -> tuple[Prompt, ...]:
    """A share of the prompts, evenly spaced among those of the same dimensions, at least one of each; with their ids, in their order."""
    strata: dict[tuple[str, ...], list[Prompt]] = {}
    for prompt in prompts:
        strata.setdefault(prompt.dimensions, []).append(prompt)
    kept = set()
    for stratum in strata.values():
        count = max(1, round(share * len(stratum)))
        kept |= {stratum[int((i + 0.5) * len(stratum) / count)].id for i in range(count)}
    return tuple(prompt for prompt in prompts if prompt.id in kept)


def declared(suite: Suite) -> dict[str, Any]:
    """A suite as plain data, what its prompts do not say left out: a field that is new changes no suite that does not use it."""
    plain: dict[str, Any] = as_plain(suite)
    for prompt in plain["prompts"]:
        for key in ("samples", "dimensions"):
            if not prompt[key]:
                del prompt[key]
    return plain


def suite_sha256(suite: Suite) -> str:
    """Identity of what a suite asks for; its name is only a label."""
    return fingerprint({key: value for key, value in declared(suite).items() if key != "name"})


def clip_id(prompt_id: int, sample: int) -> str:
    """`0007-1`: what a clip's file is called."""
    return f"{prompt_id:04d}-{sample}"


def clip_seed(suite_seed: int, prompt_id: int, sample: int) -> int:
    """Seed of one clip's torch.Generator: the first 63 bits of sha256("<suite seed>/<prompt id>/<sample>").

    It depends on nothing else, so a clip is the same from any machine, shard and order.
    """
    digest = hashlib.sha256(f"{suite_seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def shard(items: Sequence[Thing], part: str) -> list[Thing]:
    """Every N-th item from the I-th on, for `part` "I/N" with I from 1 to N: the shards are disjoint and cover all.

    Raises:
        UserError: `part` is not of that form.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part, re.ASCII)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {part}: write I/N with I from 1 to N, for example 1/4 to 4/4")
    return list(items[int(match[1]) - 1 :: int(match[2])])


def _read_header(path: Path) -> SuiteFile:
    import yaml

    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"suite {path}: not valid YAML ({' '.join(str(error).split())})") from None
    header: SuiteFile = build(SuiteFile, plain, where=f"suite {path}")
    return header


def _vbench_prompts(header: SuiteFile) -> tuple[Prompt, ...]:
    """VBench's own, two of which are there twice, for other dimensions."""
    filtered = {"temporal_flickering": header.filtered}
    return tuple(
        Prompt(i, entry.text, samples=filtered.get(entry.dimensions[0]), dimensions=entry.dimensions) for i, entry in enumerate(vbench.entries())
    )


def _extended(prompts: tuple[Prompt, ...], name: str, folder: Path) -> tuple[Prompt, ...]:
    lines = vbench.rewritings(name, folder)
    if len(lines) != len(prompts):
        raise UserError(f"the rewritten prompts '{name}' have {len(lines)} lines for {len(prompts)} prompts; line i is for prompt i")
    for number, line in enumerate(lines, start=1):
        if problem := _unusable(line):
            raise UserError(f"rewritten prompts '{name}' line {number}: {problem}")
    return tuple(dataclasses.replace(prompt, generate_from=line) for prompt, line in zip(prompts, lines, strict=True))


def _read_prompts(path: Path) -> tuple[Prompt, ...]:
    if not path.is_file():
        raise UserError(f"prompts {path}: there is no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: U+2028 is no end of a JSON line
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if lines[-1].strip() == "":
        lines.pop()
    if not lines:
        raise UserError(f'prompts {path}: there is no prompt in it; write one {{"text": ...}} per line')
    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        where = f"prompts {path} line {number}"
        prompt = _read_prompt(line, number - 1, where)
        first = seen.setdefault(unicodedata.normalize("NFC", prompt.text), number)
        if first != number:
            raise UserError(f"{where}: the same prompt as line {first}; remove one, or raise 'samples' to make several clips of it")
        prompts.append(prompt)
    return tuple(prompts)


def _read_prompt(line: str, prompt_id: int, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f'{where}: not JSON; write {{"text": "a red disc"}}') from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str) or not isinstance(value.get("generate_from"), str | None):
        raise UserError(f'{where}: expected an object with a string "text" and, if you like, a string "generate_from"')
    fields = ["text", "generate_from"]
    for key in value:
        if key not in fields:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(key, fields)}")
    for key, text in value.items():
        problem = text is not None and _unusable(text)
        if problem:
            raise UserError(f"{where}: '{key}' {problem}")
    return Prompt(prompt_id, value["text"], value.get("generate_from"))


def _unusable(text: str) -> str:
    """What is wrong with a prompt, or nothing. Emoji, other scripts and `../../x` are only text."""
    if not text.strip():
        return "is empty; write a prompt or remove the line"
    if len(text) > LONGEST:
        return f"has {len(text)} characters; the most is {LONGEST}"
    for at, letter in enumerate(text):
        if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
            return f"has a control character or line break (U+{ord(letter):04X}) at position {at}; remove it"
    return ""
