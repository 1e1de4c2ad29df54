"""Asking a model that sees pictures: one behind an OpenAI-compatible server, or one that transformers loads here.

A conversation is a list of turns; the first of them has the pictures. Temperature is 0. What a server does wrong for a while
(busy, broken, silent) is waited for; what it does wrong for good is said in a sentence.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rfbench.errors import UserError
from rfbench.scorers.base import ClipError, Pixels
from rfbench.settings import JudgeCfg

KEY = "RFBENCH_JUDGE_KEY"  # the environment variable with the server's key, which stands in no file
LONGEST = 200  # tokens of an answer
WAITS = (1.0, 4.0, 15.0)  # seconds before each further try
LONGEST_WAIT = 120.0  # seconds that a server may ask for
QUALITY = 95  # of the JPEG pictures


@dataclass(frozen=True)
class Turn:
    """What was said by one side."""

    role: str  # user | assistant
    text: str
    pictures: tuple[Pixels, ...] = ()  # [H, W, 3] each


@dataclass(frozen=True)
class Reply:
    """What the model answered, verbatim, and what it cost; tokens are None where a server does not count."""

    text: str
    model: str  # as the server calls what answered
    tokens_in: int | None
    tokens_out: int | None


Ask = Callable[[Sequence[Turn]], Reply]


class _PassingError(Exception):
    """A failure that may be over at the next try; `wait` is what the server asks for, in seconds."""

    def __init__(self, sentence: str, *, wait: float | None = None, gone: bool = False) -> None:
        super().__init__(sentence)
        self.wait = wait
        self.gone = gone  # nobody is there, which concerns every clip


def served(cfg: JudgeCfg) -> Ask:
    """The model `cfg.model` behind `cfg.server`."""
    return functools.partial(_patiently, cfg)


def _patiently(cfg: JudgeCfg, turns: Sequence[Turn]) -> Reply:
    """Ask until there is a reply, as often as WAITS allows.

    Raises:
        UserError: the server is not there, does not know the model or refuses the key (code 1).
        ClipError: it does not take this conversation, or never answered it.
    """
    body = {"model": cfg.model, "temperature": 0, "max_tokens": LONGEST, "messages": [_message(turn) for turn in turns]}
    for wait in (*WAITS, None):
        try:
            return _once(cfg, body)
        except _PassingError as error:
            if wait is None:
                sentence = f"judge: {cfg.server} {error}, {len(WAITS) + 1} times"
                raise UserError(f"{sentence}; see that it runs, then run this again", code=1) if error.gone else ClipError(sentence) from None
            time.sleep(wait if error.wait is None else min(error.wait, LONGEST_WAIT))
    raise AssertionError


def _once(cfg: JudgeCfg, body: dict[str, Any]) -> Reply:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {os.environ[KEY].strip()}"} if os.environ.get(KEY) else {})
    request = urllib.request.Request(f"{str(cfg.server).rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=cfg.timeout) as response:
            return _reply(json.loads(response.read()))
    except urllib.error.HTTPError as error:
        told = " ".join(error.read(2000).decode(errors="replace").split())[:200]
        said = f"answered {error.code} {error.reason} ({told})"
        if error.code in (401, 403):
            raise UserError(f"judge: {cfg.server} {said}; put its key into {KEY}", code=1) from None
        if error.code == 404:
            raise UserError(f"judge: {cfg.server} {said}; correct server and model under [judge] in rfbench.toml", code=1) from None
        if error.code in (408, 409, 425, 429) or error.code >= 500:
            raise _PassingError(said, wait=_seconds(error.headers.get("Retry-After"))) from None
        raise ClipError(f"judge: {cfg.server} {said}") from None
    except TimeoutError:
        raise _PassingError(f"did not answer within {cfg.timeout:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _PassingError(f"did not answer within {cfg.timeout:g} seconds") from None
        raise _PassingError(f"cannot be reached ({reason or type(error).__name__})", gone=True) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _PassingError(f"answered something that is no chat completion ({type(error).__name__}: {str(error)[:100]})") from None


def _reply(found: Any) -> Reply:
    text = found["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("its content is not a text")
    usage = found.get("usage") or {}
    return Reply(text, str(found.get("model", "")), usage.get("prompt_tokens"), usage.get("completion_tokens"))


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for; None if it is a date or not there."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return None


def _message(turn: Turn) -> dict[str, Any]:
    if not turn.pictures:
        return {"role": turn.role, "content": turn.text}
    pictures = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{_jpeg(picture)}"}} for picture in turn.pictures]
    return {"role": turn.role, "content": [*pictures, {"type": "text", "text": turn.text}]}


def _jpeg(picture: Pixels) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def local(where: Path) -> Ask:
    """A model that transformers can load with its processor, from a folder; on a GPU if there is one.

    Raises:
        UserError: the folder does not hold such a model.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(where, local_files_only=True)
        model = AutoModelForImageTextToText.from_pretrained(where, local_files_only=True, dtype="auto").eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"judge: {where} is not a model that transformers can load here ({told}); name a server under [judge] instead") from None
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def ask(turns: Sequence[Turn]) -> Reply:
        pictures = [[{"type": "image", "image": Image.fromarray(picture)} for picture in turn.pictures] for turn in turns]
        messages = [{"role": turn.role, "content": [*seen, {"type": "text", "text": turn.text}]} for turn, seen in zip(turns, pictures, strict=True)]
        given = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        given = given.to(model.device)
        with torch.no_grad():
            found = model.generate(**given, do_sample=False, max_new_tokens=LONGEST)[0, given["input_ids"].shape[1] :]
        return Reply(processor.decode(found, skip_special_tokens=True), where.name, given["input_ids"].shape[1], len(found))

    return ask
