"""What a vision-language model says of the end of each clip: three marks from 1 to 5, as in the paper's table of 60 s videos.

The paper asks Qwen3-VL-235B-A22B-Instruct about the last 5 seconds (Table 2). Its wording is in its supplement and not shipped; the
question here, judge.txt, is our own, so marks are comparable with each other and not with the paper's. Which model, and where, is
said under [judge] in rfbench.toml. All answers, and the tokens that they took, are kept as they came:

    <run>/scores/judge.answers.jsonl
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rfbench import records
from rfbench.errors import UserError
from rfbench.progress import say
from rfbench.records import Clip, Score
from rfbench.scorers import chat
from rfbench.scorers.base import Answer, ClipError, Metric, Pixels, each, read_video
from rfbench.scorers.chat import Ask, Turn
from rfbench.settings import JudgeCfg, settings
from rfbench.weight_files import files_of, sha256_of

SECONDS = 5  # from the end
PER_SECOND = 2  # frames that are shown
ATTEMPTS = 3  # answers that a clip gets
AGAIN = (
    'That was not the asked form. Answer with one line of JSON and nothing else, whole numbers from 1 to 5: {"visual": 3, "dynamic": 3, "text": 3}'
)
METRICS = {
    "visual": Metric(True, "of 5", "A vision-language model's mark for the quality of the pictures of the last 5 seconds."),
    "dynamic": Metric(True, "of 5", "Its mark for the motion there: how much, and how plausible."),
    "text": Metric(True, "of 5", "Its mark for how well they show what the text says."),
}


@dataclass(frozen=True)
class Exchange:
    """A line of answers.jsonl."""

    clip: str
    sha256: str
    version: str
    model: str  # as the server calls what answered
    answer: str  # verbatim
    tokens_in: int | None
    tokens_out: int | None
    seconds: float


@functools.cache
def template() -> str:
    """The question, with {prompt} where the clip's text goes."""
    return Path(__file__).with_name("judge.txt").read_text(encoding="utf-8")


def shown(frames: Pixels, fps: int) -> Pixels:
    """The frames of a clip that are shown: PER_SECOND of its last SECONDS, two at least, evenly spaced and the last one among them."""
    last = min(len(frames), SECONDS * fps)
    count = max(2, min(last, round(last / fps * PER_SECOND)))
    return frames[len(frames) - 1 - np.arange(count)[::-1] * last // count]


def marks(answer: str) -> dict[str, float]:
    """The three marks of an answer, in a fence or among words if it has just one object.

    Raises:
        ValueError: it is not of the asked form; the message says what is wrong.
    """
    objects = re.findall(r"\{[^{}]*\}", answer)
    if len(objects) != 1:
        raise ValueError(f"{len(objects)} objects instead of one")
    found = json.loads(objects[0])
    if found.keys() != METRICS.keys():
        raise ValueError(f"it has {', '.join(found) or 'nothing'}")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 5:
            raise ValueError(f"'{name}' is {value!r}")
    return {name: float(found[name]) for name in METRICS}


@dataclass(frozen=True)
class JudgeScorer:
    """Asks the model of the settings, several clips at a time if a server has it."""

    name: str = "judge"
    metrics: Mapping[str, Metric] = field(default_factory=lambda: METRICS)
    together: bool = False
    sparse: Set[str] = frozenset()

    @property
    def version(self) -> str:
        """With the model, the sha256 of its weights if they are here, and that of the question.

        Raises:
            UserError: no model is named, or it is not there.
        """
        asked = hashlib.sha256(f"{template()}{AGAIN}".encode()).hexdigest()[:8]
        cfg = _cfg()
        which = [cfg.model] if cfg.server else [_folder(cfg).name, sha256_of(files_of(_folder(cfg)))[:12]]
        return "-".join(["1", asked, *which])

    @property
    def weights(self) -> Mapping[str, str]:
        """Those of a model that is loaded here; nobody knows a server's."""
        cfg = _cfg()
        return {} if cfg.server else {_folder(cfg).name: sha256_of(files_of(_folder(cfg)))}

    def score(self, clips: list[Clip], out: Path) -> Iterator[Answer]:
        """Three rows for every clip; refused is one whose video is broken, or of which no valid answer was to be had.

        Raises:
            UserError: no model, no server, or one that does not let us in.
        """
        cfg, version = _cfg(), self.version
        ask = chat.served(cfg) if cfg.server else chat.local(_folder(cfg))

        def judge(clip: Clip) -> tuple[Answer, list[Exchange]]:
            said: list[Exchange] = []
            (answer,) = each([clip], lambda clip: _judged(clip, out, ask, version, said))
            return answer, said

        pool = concurrent.futures.ThreadPoolExecutor(cfg.parallel if cfg.server else 1)
        try:
            with records.appending(_said(out)) as append:
                for future in concurrent.futures.as_completed([pool.submit(judge, clip) for clip in clips]):
                    answer, said = future.result()
                    for exchange in said:
                        append(exchange)
                    yield answer
        finally:
            pool.shutdown(cancel_futures=True)
            say("judge, over all sessions: " + ", ".join(f"{key} {value}" for key, value in self.summary(clips, out, partial=True).items()))

    def summary(self, clips: list[Clip], out: Path, *, partial: bool) -> dict[str, Any]:
        """What all answers of this version took, those that were no use among them, and what that costs by the prices of the settings."""
        cfg, version = _cfg(), self.version
        said = [one for one in records.read_rows(_said(out), Exchange) if one.version == version]
        counted = [one for one in said if one.tokens_in is not None and one.tokens_out is not None]
        given, made = sum(one.tokens_in or 0 for one in counted), sum(one.tokens_out or 0 for one in counted)
        cost = round((given * cfg.price_in + made * cfg.price_out) / 1e6, 6)
        return {"answers": len(said), "tokens_in": given, "tokens_out": made, "uncounted": len(said) - len(counted), "cost": cost}


def _said(out: Path) -> Path:
    return out / "scores" / "judge.answers.jsonl"


def _judged(clip: Clip, out: Path, ask: Ask, version: str, said: list[Exchange]) -> Iterator[Score]:
    """Ask about one clip until the answer has the asked form; every answer goes into `said`."""
    if clip.frames < 2:
        raise ClipError(f"clip {clip.id} has a single frame, of which nobody can judge the motion")
    seen = shown(read_video(out, clip), clip.fps)
    turns = [Turn("user", template().replace("{prompt}", clip.prompt), tuple(seen))]
    wrong = ""
    for _ in range(ATTEMPTS):
        begun = time.monotonic()
        try:
            reply = ask(turns)
        except ClipError as error:
            raise ClipError(f"clip {clip.id}: {error}") from None
        seconds = round(time.monotonic() - begun, 3)
        said.append(Exchange(clip.id, clip.sha256, version, reply.model, reply.text, reply.tokens_in, reply.tokens_out, seconds))
        try:
            return (Score(clip.id, name, value) for name, value in marks(reply.text).items())
        except ValueError as error:
            wrong = str(error)
            turns += [Turn("assistant", reply.text), Turn("user", AGAIN)]
    raise ClipError(f"clip {clip.id}: the judge gave no valid answer in {ATTEMPTS} attempts ({wrong} in the last)")


def _cfg() -> JudgeCfg:
    cfg = settings().judge
    if not cfg.model:
        raise UserError('scorer \'judge\' needs a model: add [judge] with model = "..." and server = "http://.../v1" to rfbench.toml')
    if cfg.server and not cfg.server.startswith(("http://", "https://")):
        raise UserError(f"scorer 'judge': server '{cfg.server}' under [judge] in rfbench.toml has to begin with http:// or https://")
    return cfg


def _folder(cfg: JudgeCfg) -> Path:
    """Where a model is that is loaded here: a folder, or one of that name in the weights directory.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(cfg.model).expanduser(), settings().weights / cfg.model):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"scorer 'judge': there is no model folder '{cfg.model}', nor one in {settings().weights}; name a server under [judge] in rfbench.toml"
    )


SCORER = JudgeScorer()
