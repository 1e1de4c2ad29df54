"""The judge asks a real HTTP server on loopback, which answers, is slow, busy, broken, rude or gone."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rfbench import evaluate, records
from rfbench.errors import UserError
from rfbench.records import Score
from rfbench.scorers import chat, judge
from rfbench.scorers.base import read_video
from rfbench.scorers.judge import SCORER, Exchange, marks, shown
from tests import fake_runs, hostile

PROMPTS = ["a red disc moves right", "a blue square"]
GOOD = '{"visual": 4, "dynamic": 2, "text": 5}'

Said = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: Any, **more: Any) -> Said:
    answer = {"model": "tiny-vl-0", "choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps(answer | {"usage": {"prompt_tokens": 700, "completion_tokens": 20}} | more).encode()


class Server(ThreadingHTTPServer):
    """Answers as `script` says, from the body of the request and how many there have been before."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.script: Callable[[int, dict[str, Any]], Said | None] = lambda number, body: completion(GOOD)
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.asked)
            server.asked.append(body | {"path": self.path})
            server.keys.append(self.headers.get("Authorization"))
        said = server.script(number, body)
        if said is None:  # hangs up
            self.close_connection = True
            return
        status, headers, content = said
        try:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the asker has given up

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield found
        found.shutdown()


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait would have been."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


@pytest.fixture
def run(server: Server, waited: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two clips, and settings by which the judge is `server`."""
    configure(tmp_path, monkeypatch, server=f"http://127.0.0.1:{server.server_port}/v1/", model="tiny-vl", parallel=1)
    return fake_runs.write_bench(tmp_path / "runs", "student", "short", PROMPTS, samples=1, frames=97)


def configure(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    (folder / "judge.toml").write_text("\n".join(["[judge]", *lines]))
    monkeypatch.setenv("RFBENCH_TOML", str(folder / "judge.toml"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(chat.KEY, raising=False)


def rows_of(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in records.read_rows(run / "scores" / "judge.jsonl", Score):
        found.setdefault(row.clip, {})[row.metric] = row.value
    return found


def exchanges(run: Path) -> list[Exchange]:
    return records.read_rows(run / "scores" / "judge.answers.jsonl", Exchange)


def note_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "scores" / "judge.json").read_text()))


# A server that works


def test_the_model_sees_the_last_five_seconds_and_the_prompt(run, server):
    evaluate.evaluate(run, ["judge"])
    assert rows_of(run) == {clip: {"visual": 4, "dynamic": 2, "text": 5} for clip in ("0000-0", "0001-0")}
    first = server.asked[0]
    assert (first["path"], first["model"], first["temperature"]) == ("/v1/chat/completions", "tiny-vl", 0)
    (turn,) = first["messages"]
    *pictures, text = turn["content"]
    assert turn["role"] == "user" and f"\n{PROMPTS[0]}\n" in text["text"]
    frames = read_video(run, records.read_clips(run)[0])
    assert len(pictures) == 10
    for picture, wanted in zip(pictures, frames[24::8], strict=True):  # frames 24, 32, ... 96 of 97
        data = picture["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
        seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert np.abs(seen.astype(int) - wanted).mean() < 6 and seen.shape == (48, 64, 3)


def test_answers_tokens_and_cost_are_kept(run, server, tmp_path, monkeypatch, capsys):
    configure(
        tmp_path, monkeypatch, server=f"http://127.0.0.1:{server.server_port}/v1", model="tiny-vl", price_in=1000.0, price_out=10000.0, parallel=2
    )
    text = f"Let me see.\n```json\n{GOOD}\n```"
    server.script = lambda number, body: completion(text)
    evaluate.evaluate(run, ["judge"])
    assert {(one.clip, one.model, one.answer, one.tokens_in, one.tokens_out) for one in exchanges(run)} == {
        (clip, "tiny-vl-0", text, 700, 20) for clip in ("0000-0", "0001-0")
    }
    used = {"answers": 2, "tokens_in": 1400, "tokens_out": 40, "uncounted": 0, "cost": 1.8}  # 1.4 + 0.4
    assert note_of(run)["summary"] == used
    assert "answers 2, tokens_in 1400, tokens_out 40, uncounted 0, cost 1.8" in capsys.readouterr().err


def test_the_key_comes_from_the_environment_and_goes_into_no_file(run, server, monkeypatch):
    monkeypatch.setenv(chat.KEY, "a-secret")
    evaluate.evaluate(run, ["judge"])
    assert server.keys == ["Bearer a-secret"] * 2
    assert not [path for path in run.rglob("*") if path.is_file() and b"a-secret" in path.read_bytes()]


def test_a_server_that_does_not_count_is_said_not_to(run, server):
    server.script = lambda number, body: completion(GOOD, usage=None)
    evaluate.evaluate(run, ["judge"])
    assert note_of(run)["summary"] == {"answers": 2, "tokens_in": 0, "tokens_out": 0, "uncounted": 2, "cost": 0}


def test_the_question_is_part_of_the_version(run, server, monkeypatch):
    before = SCORER.version
    assert before.endswith("-tiny-vl")
    monkeypatch.setattr(judge, "template", lambda: "Another question: {prompt}")
    assert SCORER.version != before


# One that does not


def test_an_answer_of_another_form_is_asked_for_again(run, server):
    bad = '{"visual": 6, "dynamic": 2, "text": 5}'
    server.script = lambda number, body: completion(bad if number == 0 else GOOD)
    evaluate.evaluate(run, ["judge"])
    assert rows_of(run)["0000-0"]["visual"] == 4
    assert [one.answer for one in exchanges(run)] == [bad, GOOD, GOOD]
    first, second = server.asked[0]["messages"], server.asked[1]["messages"]
    assert second[:1] == first and second[1] == {"role": "assistant", "content": bad} and second[2]["role"] == "user"


def test_a_clip_without_a_valid_answer_is_missing_and_is_asked_about_again_next_time(run, server):
    server.script = lambda number, body: completion("I cannot say." if "blue square" in str(body) else GOOD)
    with pytest.raises(UserError, match=r"could not score clip 0001-0 .*gave no valid answer in 3 attempts \(0 objects instead of one"):
        evaluate.evaluate(run, ["judge"])
    assert rows_of(run).keys() == {"0000-0"} and note_of(run)["refused"].keys() == {"0001-0"}
    assert [one.answer for one in exchanges(run)] == [GOOD, *["I cannot say."] * 3]
    server.script = lambda number, body: completion(GOOD)
    evaluate.evaluate(run, ["judge"])
    assert len(server.asked) == 5 and rows_of(run).keys() == {"0000-0", "0001-0"}


@pytest.mark.parametrize(
    ("said", "waits"),
    [
        ((429, {"Retry-After": "7"}, b"slow down"), [7.0]),
        ((429, {"Retry-After": "100000"}, b"slow down"), [chat.LONGEST_WAIT]),
        ((429, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""), [chat.WAITS[0]]),
        ((500, {}, b"out of memory"), [chat.WAITS[0]]),
        ((503, {"Retry-After": "2"}, b""), [2.0]),
        ((200, {}, b"{ this is no JSON"), [chat.WAITS[0]]),
        ((200, {}, b'{"choices": []}'), [chat.WAITS[0]]),
        (completion(None), [chat.WAITS[0]]),
        (None, [chat.WAITS[0]]),
    ],
)
def test_what_passes_is_waited_for(run, server, waited, said, waits):
    server.script = lambda number, body: said if number == 0 else completion(GOOD)
    evaluate.evaluate(run, ["judge"])
    assert waited == waits and len(rows_of(run)) == 2 and len(server.asked) == 3


def test_a_slow_answer_is_given_up_and_asked_for_again(run, server, tmp_path, monkeypatch):
    configure(tmp_path, monkeypatch, server=f"http://127.0.0.1:{server.server_port}/v1", model="tiny-vl", parallel=1, timeout=0.3)
    over = threading.Event()
    server.script = lambda number, body: (over.wait(10) if number == 0 else None, completion(GOOD))[1]
    begun = time.monotonic()
    evaluate.evaluate(run, ["judge"])
    over.set()
    assert len(rows_of(run)) == 2 and time.monotonic() - begun < 8


def test_a_clip_on_which_the_server_always_breaks_is_refused_and_the_others_are_scored(run, server, waited):
    server.script = lambda number, body: (500, {}, b"out of memory") if "red disc" in str(body) else completion(GOOD)
    with pytest.raises(UserError, match=r"could not score clip 0000-0 .* answered 500 Internal Server Error \(out of memory\), 4 times") as caught:
        evaluate.evaluate(run, ["judge"])
    assert caught.value.code == 1 and rows_of(run).keys() == {"0001-0"} and waited == list(chat.WAITS)


def test_a_clip_that_the_server_does_not_take_is_refused_at_once(run, server, waited):
    server.script = lambda number, body: (400, {}, b"at most 8 images") if "red disc" in str(body) else completion(GOOD)
    with pytest.raises(UserError, match=r"clip 0000-0 .* answered 400 Bad Request \(at most 8 images\)"):
        evaluate.evaluate(run, ["judge"])
    assert not waited and rows_of(run).keys() == {"0001-0"}


@pytest.mark.parametrize(
    ("status", "sentence"), [(401, "put its key into RFBENCH_JUDGE_KEY"), (404, r"correct server and model under \[judge\] in rfbench.toml")]
)
def test_a_server_that_does_not_let_us_in_ends_the_work_with_what_to_do(run, server, status, sentence):
    server.script = lambda number, body: completion(GOOD) if number == 0 else (status, {}, b"no")
    with pytest.raises(UserError, match=sentence) as caught:
        evaluate.evaluate(run, ["judge"])
    assert caught.value.code == 1 and not (run / "scores" / "judge.json").exists()
    server.script = lambda number, body: completion(GOOD)
    evaluate.evaluate(run, ["judge"])
    assert len(server.asked) == 3 and len(rows_of(run)) == 2  # the answer before was kept


def test_nobody_is_there(run, server, waited, tmp_path, monkeypatch):
    with Server() as other:
        port = other.server_port
    configure(tmp_path, monkeypatch, server=f"http://127.0.0.1:{port}/v1", model="tiny-vl")
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused\), 4 times; see that it runs") as caught:
        evaluate.evaluate(run, ["judge"])
    assert caught.value.code == 1 and not server.asked


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, r"needs a model: add \[judge\]"),
        ({"model": "x", "server": "localhost:8000"}, "has to begin with http://"),
        ({"model": "nowhere/at-all"}, "there is no model folder 'nowhere/at-all'"),
        ({"modle": "x"}, "did you mean 'model'"),
    ],
)
def test_settings_that_do_not_do_are_refused_before_any_work(run, tmp_path, monkeypatch, fields, sentence):
    configure(tmp_path, monkeypatch, **fields)
    with pytest.raises(UserError, match=sentence) as caught:
        evaluate.evaluate(run, ["judge", "motion"])
    assert caught.value.code == 2 and not (run / "scores").exists()


def test_broken_and_odd_clips_are_asked_about_or_refused_by_name(run, server):
    records.write_rows(run / "clips.jsonl", [hostile.write(run, name, number) for number, name in enumerate(hostile.NAMES)])
    refused = {f"{number:04}-0" for number, name in enumerate(hostile.NAMES) if name in (*hostile.UNREADABLE, "one frame")}
    with pytest.raises(UserError, match=f"could not score {len(refused)} of {len(hostile.NAMES)} clips"):
        evaluate.evaluate(run, ["judge"])
    assert note_of(run)["refused"].keys() == refused and len(server.asked) == len(rows_of(run)) == len(hostile.NAMES) - len(refused)


# A model that is loaded here


def write_model(folder: Path) -> None:
    """A LLaVA of random weights whose answer is always the word with number 0, which is GOOD."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: number for number, word in enumerate([GOOD, "<s>", "</s>", "<image>", "\n", *map(chr, range(32, 127))])}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<s>", eos_token="</s>", pad_token="</s>", extra_special_tokens=["<image>"])
    part = "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}"
    chat_template = "{% for turn in messages %}{{ turn.role }}: {% for part in turn.content %}" + part + "{% endfor %}{% endfor %}"
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    how: dict[str, Any] = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": chat_template,
    }
    LlavaProcessor(image_processor=pictures, tokenizer=tokenizer, **how).save_pretrained(folder)
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**small, image_size=28, patch_size=14, projection_dim=16)
    text = LlamaConfig(**small, vocab_size=len(vocabulary))
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))
    model.model.language_model.norm.weight.data.zero_()  # all words are as likely: the first is taken
    model.save_pretrained(folder)


def test_a_model_in_a_folder_is_asked_without_any_server(run, server, tmp_path, monkeypatch):
    write_model(tmp_path / "tiny-llava")
    configure(tmp_path, monkeypatch, model=str(tmp_path / "tiny-llava"))
    monkeypatch.setattr(chat, "LONGEST", 1)
    evaluate.evaluate(run, ["judge"])
    assert rows_of(run) == {clip: {"visual": 4, "dynamic": 2, "text": 5} for clip in ("0000-0", "0001-0")} and not server.asked
    assert {(one.answer, one.model, one.tokens_out) for one in exchanges(run)} == {(GOOD, "tiny-llava", 1)}
    asked = len(judge.template().replace("{prompt}", PROMPTS[0])) + len("user: ")  # a token per letter
    assert exchanges(run)[0].tokens_in == asked + 10 * 4  # of a picture 2 x 2 patches
    (weights,) = note_of(run)["weights"].items()
    assert weights[0] == "tiny-llava" and note_of(run)["version"].endswith(f"-tiny-llava-{weights[1][:12]}")
    monkeypatch.setattr(chat, "LONGEST", 2)
    with pytest.raises(UserError, match=r"no valid answer in 3 attempts \(2 objects instead of one"):
        evaluate.evaluate(run, ["judge"], fresh=True)
    assert [one.answer for one in exchanges(run)[2:]] == [GOOD + GOOD] * 6


def test_a_folder_that_holds_no_such_model_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"")
    configure(tmp_path, monkeypatch, model=str(tmp_path / "other"))
    with pytest.raises(UserError, match="is not a model that transformers can load here"):
        evaluate.evaluate(run, ["judge"])


# Parts


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "4 2 5",
        '{"visual": 4}',
        '{"visual": 0, "dynamic": 2, "text": 5}',
        '{"visual": "4", "dynamic": 2, "text": 5}',
        '{"visual": 4.5, "dynamic": 2, "text": 5}',
        '{"visual": true, "dynamic": 2, "text": 5}',
        '{"visual": NaN, "dynamic": 2, "text": 5}',
        '{"visual": 4, "dynamic": 2, "text": 5, "sum": 11}',
        "{visual: 4, dynamic: 2, text: 5}",
        f"{GOOD} or {GOOD}",
        GOOD[:-1],
    ],
)
def test_what_is_not_three_marks_is_no_answer(answer):
    with pytest.raises(ValueError, match=r"."):
        marks(answer)


@given(st.integers(2, 400), st.integers(1, 60))
def test_frames_are_from_the_end_in_order_and_evenly_spaced(count, fps):
    frames = np.arange(count).reshape(-1, 1, 1, 1)
    seen = shown(frames, fps)[:, 0, 0, 0]
    assert seen[-1] == count - 1 and seen[0] >= max(0, count - 5 * fps) and 2 <= len(seen) <= 10
    steps = np.diff(seen)
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1
