"""VBench's 946 prompts, which dimensions each is for, and the longer rewritings that models are given instead of them.

Nothing of it ships here: the prompts are in the package `vbench`, the rewritings in public repositories. Each file is known by
its sha256. Lists belong together by line: a model is given line i of the rewritings, and its video is named after and scored
against line i of the prompts. (Scored against the rewriting, or given the prompt, a model loses about ten points of Semantic.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfbench.errors import UserError, did_you_mean
from rfbench.records import sha256_of
from rfbench.settings import settings
from rfbench.vbench.dimensions import T2V

SAMPLES = 5  # clips of a prompt that count
GITHUB = "https://raw.githubusercontent.com"


@dataclass(frozen=True)
class Listed:
    """A file of a public repository at a commit; it belongs to `<weights>/<repository>/<file>`."""

    title: str
    repo: str
    commit: str
    file: str
    sha256: str
    bytes: int
    licence: str = "apache-2.0"

    @property
    def path(self) -> Path:
        """Where it belongs on this machine."""
        return settings().weights / self.repo / self.file


FULL_INFO = Listed(
    "prompts, dimensions and what to look for",
    "Vchitect/VBench",
    "45e79ec14e69a2187202c675d2dbce1a71843d53",
    "vbench/VBench_full_info.json",
    "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd",
    228118,
)
EXTENDED = {
    "self-forcing": Listed(
        "rewritten for Self Forcing; LongLive and Reward Forcing say that they follow it",
        "guandeh17/Self-Forcing",
        "33593df3e81fa3ec10239271dd2c100facac6de1",
        "prompts/vbench/all_dimension_extended.txt",
        "c78f1ad32974503efaa8cc935347ace88f3a8b571adde6687bc8425bbf417cf3",
        515429,
    ),
    "moviegen-self-forcing": Listed(
        "MovieGen's prompts, rewritten for Self Forcing",
        "guandeh17/Self-Forcing",
        "33593df3e81fa3ec10239271dd2c100facac6de1",
        "prompts/MovieGenVideoBench_extended.txt",
        "50293c2717c8f2df5773154d4680c74e636ecb08eb4fe13cdce7357d0ab9d121",
        657775,
        "not stated",
    ),
    "wan2.1": Listed(
        "by Wan2.1's own rewriting, Qwen2.5-3B at seed 42; the leaderboard's for Wan2.1-1.3B",
        "Vchitect/VBench",
        "45e79ec14e69a2187202c675d2dbce1a71843d53",
        "prompts/augmented_prompts/Wan2.1-T2V-1.3B/all_dimension_aug_wanx_seed42.txt",
        "54fb940aea8f1ede1e8728f62d3e67efacdd7b341fb8a6c91308bcba874d5d5d",
        758151,
    ),
    "gpt-4o": Listed(
        "by GPT-4o, after CogVideoX",
        "Vchitect/VBench",
        "45e79ec14e69a2187202c675d2dbce1a71843d53",
        "prompts/augmented_prompts/gpt_enhanced_prompts/all_dimension_longer.txt",
        "58ed0665de52c1bdb4820af01327f5cc1138bedbeedcc63902751056f6bf5768",
        597926,
    ),
}
MOVIEGEN = Listed(
    "MovieGen's 1003 prompts",
    "guandeh17/Self-Forcing",
    "33593df3e81fa3ec10239271dd2c100facac6de1",
    "prompts/MovieGenVideoBench.txt",
    "ae02a4bbebcb55067dbeea369e43d52a4817d57fd0ac223071b9aa236ac027c4",
    106686,
    "not stated",
)


@dataclass(frozen=True)
class Entry:
    """A line of VBench_full_info.json. `auxiliary` says what a dimension looks for: {"color": {"color": "red"}}."""

    text: str
    dimensions: tuple[str, ...]
    auxiliary: dict[str, Any] = field(default_factory=dict)
    filtered: bool = False  # in a run: it has more clips than count, and the static filter chooses


def entries(path: Path | None = None) -> tuple[Entry, ...]:
    """The prompts in their order, of a file in the format of VBench_full_info.json; of the published one by default.

    Raises:
        UserError: the file is not there, not the published one, or not of that format.
    """
    source = located() if path is None else path
    try:
        rows = json.loads(source.read_text(encoding="utf-8"))
        found = tuple(Entry(row["prompt_en"], tuple(row["dimension"]), row.get("auxiliary_info", {})) for row in rows)
    except OSError as error:
        raise UserError(f"prompts {source}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'prompts {source}: not a list of {{"prompt_en": ..., "dimension": [...]}} as VBench_full_info.json is') from None
    for number, entry in enumerate(found):
        unknown = [name for name in entry.dimensions if name not in T2V.dimensions]
        if not isinstance(entry.text, str) or not entry.dimensions or unknown:
            hint = did_you_mean(str(unknown[0]), T2V.dimensions) if unknown else ""
            raise UserError(f"prompts {source}: entry {number} has no text, no dimension or one that VBench does not have{hint}")
    return found


def located() -> Path:
    """The published VBench_full_info.json on this machine: in the weights directory, else in the package `vbench`.

    Raises:
        UserError: it is in neither place, or is another file.
    """
    if FULL_INFO.path.exists():
        return _right(FULL_INFO)
    from rfbench import envs

    try:
        venv = envs.python("vbench").parent.parent
    except UserError:
        raise UserError("VBench's prompts are not here; `rfbench fetch vbench` brings them, `rfbench env vbench` has them too") from None
    for path in venv.glob("lib/python3*/site-packages/vbench/VBench_full_info.json"):
        if sha256_of(path) == FULL_INFO.sha256:
            return path
    raise UserError("the environment 'vbench' does not hold VBench's published prompts; run `rfbench env vbench --fresh`")


def rewritings(name_or_path: str, folder: Path) -> Sequence[str]:
    """The lines of a list of `EXTENDED` by its name, or of a .txt file in `folder`, which is known by its content alone.

    Raises:
        UserError: no such list or file, or a named one that is not the published one.
    """
    if name_or_path in EXTENDED:
        path = _right(EXTENDED[name_or_path])
    elif name_or_path.endswith(".txt"):
        path = folder / name_or_path
    else:
        raise UserError(f"there is no list of rewritten prompts '{name_or_path}'{did_you_mean(name_or_path, EXTENDED)}; or name a .txt file")
    return _lines(path)


def moviegen() -> Sequence[str]:
    """MovieGen's prompts.

    Raises:
        UserError: the file is not there or not the published one.
    """
    return _lines(_right(MOVIEGEN))


def _lines(path: Path) -> Sequence[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"prompts {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompts {path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    return lines[:-1] if lines[-1].strip() == "" else lines


def _right(listed: Listed) -> Path:
    """The path of a published file that is there and is the published one."""
    if not listed.path.is_file():
        raise UserError(f"this suite needs {listed.file} of {listed.repo}; `rfbench fetch` with the suite's name brings it")
    if sha256_of(listed.path) != listed.sha256:
        raise UserError(
            f"{listed.path} is not the published file (its sha256 is not {listed.sha256[:12]}...); `rfbench fetch` with the suite's name brings it"
        )
    return listed.path
