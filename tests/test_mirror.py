"""Runs that have a copy elsewhere: fresh machines go on from it, shards meet in it, and what dies or lies on the way changes no byte of the end."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from rfbench import evaluate, filming, generate, mirror, provenance, records, store
from rfbench.errors import UserError
from tests import models
from tests.test_cli import call
from tests.test_generate import PROMPTS, bytes_of, write_suite
from tests.test_kill import child


@pytest.fixture
def machine(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], Path]:
    """Another machine: a runs folder of its own, and a mirror."""

    def start(name: str, url: str | None) -> Path:
        lines = [f"runs = '{name}'", *([f"mirror = '{url}'"] if url else [])]
        (folders / "rfbench.toml").write_text("[paths]\n" + "\n".join(lines) + "\n[hardware.cpu]\ntitle = 'CPU'\nmatch = 'cpu'\n")
        return folders / name

    return start


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return "memory://bucket/runs" if request.param == "memory" else f"file://{tmp_path}/store"


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on no clip may be made."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a clip is made that the mirror has")

    return lambda: monkeypatch.setattr(filming, "film", refuse)


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, str]:
    return models.write(tmp_path, sampler=models.STUDENT | {"steps": [1000]}), write_suite(tmp_path, prompts=PROMPTS[:2], frames=9)


def contents(url: str) -> dict[str, bytes]:
    """Everything in a store."""
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).lstrip("/"): fs.cat_file(path) for path in fs.find(root)} if fs.exists(root) else {}


def check(url: str) -> None:
    """Every manifest over there names files that are there, whole."""
    found = contents(url)
    for name, content in found.items():
        folder, _, last = name.rpartition("/")
        if last.startswith("manifest."):
            for path, sha256 in json.loads(content)["files"].items():
                there = found[f"{folder}/{mirror._name(path, sha256)}"]
                assert hashlib.sha256(there).hexdigest() == sha256


def test_a_machine_that_has_nothing_goes_on(machine, url, asked, idle):
    machine("one", None)
    wanted = bytes_of(generate.generate(*asked))
    machine("two", url)
    first = generate.generate(*asked)
    check(url)
    names = {name.rpartition("/")[2] for name in contents(url)}
    assert len(names) == len(wanted) + 1 and not [name for name in names if "tmp" in name], "the files of the run, and a manifest"
    machine("three", url)
    idle()
    second = generate.generate(*asked)
    assert first != second and bytes_of(second) == bytes_of(first) == wanted
    assert (second / "run.json").read_bytes() == (first / "run.json").read_bytes()


def test_shards_of_several_machines_meet_in_it(machine, url, asked, idle, capsys, monkeypatch):
    machine("alone", None)
    alone = generate.generate(*asked)
    evaluate.evaluate(alone, ["motion"])
    for part in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(provenance, "machine", lambda part=part: {"cpu": f"of machine {part}"})
            machine(f"shard{part}", url)
            directory = generate.generate(*asked, shard=f"{part}/2")
        assert records.read_run(directory).status == records.RUNNING and len(records.read_clips(directory)) == 2
    assert "1 files come" not in capsys.readouterr().err, "a shard brings what is its own"
    machine("all", url)
    idle()
    whole = generate.generate(*asked)
    run = records.read_run(whole)
    assert bytes_of(whole) == {name: content for name, content in bytes_of(alone).items() if not name.startswith("scores")}
    assert run.status == records.DONE
    assert {place["machine"]["cpu"] for place in (run.recorded, *run.recorded["continued_on"])} >= {"of machine 1", "of machine 2"}
    check(url)
    videos = [name for name in contents(url) if "/videos/" in name]
    assert len(videos) == 4, "what the shards had sent is not sent again"
    machine("scorer", url)
    assert call(capsys, "eval", f"student/{whole.name}", "-s", "motion")[0] == 0
    there = machine("reader", url) / "bench" / "student" / whole.name
    assert mirror.bring(there) and bytes_of(there)["scores/motion.jsonl"] == bytes_of(alone)["scores/motion.jsonl"]
    assert call(capsys, "eval", "student/nothing")[0] == 2


def test_whoever_is_killed_leaves_what_was_there_before(machine, tmp_path, folders, asked, monkeypatch):
    """SIGKILL before and after each step of every transfer, while the files are sent as they appear; then a machine that has nothing."""
    monkeypatch.setattr(mirror, "EVERY_S", 0.05)
    monkeypatch.setattr(filming, "batches", lambda backbone, cfg, latents, todo: [[item] for item in todo])
    machine("alone", None)
    wanted = bytes_of(generate.generate(*asked))
    url = f"file://{tmp_path}/store"
    ended = 0
    for at in itertools.count(1, 3):
        machine("killed", url)
        if child(dying(lambda: generate.generate(*asked), at)) == 0:
            break
        ended += 1
        check(url)
        machine("fresh", url)
        assert child(lambda: generate.generate(*asked)) == 0
        assert bytes_of(folders / "fresh" / "bench" / "student" / "short") == wanted, f"killed at step {at}"
        check(url)
        for folder in (folders / "killed", folders / "fresh", tmp_path / "store"):
            shutil.rmtree(folder, ignore_errors=True)
    assert ended > 5


def dying(work: Callable[[], Any], at: int) -> Callable[[], Any]:
    """`work`, whose process is killed at the `at`-th of what it does to a store: before, between or after."""
    from fsspec.implementations.local import LocalFileSystem

    def run() -> None:
        count = itertools.count(1)

        def fatal(name: str) -> None:
            original = getattr(LocalFileSystem, name)

            def wrapper(*arguments: Any, **how: Any) -> Any:
                if next(count) == at:
                    if name == "pipe_file":  # half of it
                        original(arguments[0], arguments[1], arguments[2][: len(arguments[2]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **how)

            setattr(LocalFileSystem, name, wrapper)

        for name in ("pipe_file", "put_file", "mv", "rm"):
            fatal(name)
        work()

    return run


def spoil(url: str, part: str, how: Callable[[bytes], bytes] | None) -> str:
    """Change or remove the one file over there whose name has `part` in it."""
    fs, root = fsspec.core.url_to_fs(url)
    (path,) = [path for path in fs.find(root) if part in path]
    if how is None:
        fs.rm(path)
    else:
        fs.pipe_file(path, how(fs.cat_file(path)))
    return str(path)


DAMAGES = {"gone": None, "other": lambda content: content[:-1] + b"?", "torn": lambda content: content[: len(content) // 2]}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_video_that_is_damaged_over_there_is_made_again(machine, url, asked, damage, capsys):
    machine("one", url)
    wanted = bytes_of(generate.generate(*asked))
    whole = contents(url)
    spoil(url, "/videos/0001-0.", DAMAGES[damage])
    machine("two", url)
    assert bytes_of(generate.generate(*asked)) == wanted
    assert "its clip is made again" in capsys.readouterr().err
    assert {name for name in contents(url) if "videos" in name} == {name for name in whole if "videos" in name}
    check(url)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["clips.", "manifest."])
def test_anything_else_that_is_damaged_is_refused_until_it_is_begun_anew(machine, url, asked, damage, part, capsys):
    machine("one", url)
    wanted = bytes_of(generate.generate(*asked))
    spoil(url, f"/{part}", DAMAGES[damage])
    two = machine("two", url)
    if (part, damage) != ("manifest.", "gone"):  # then nothing was ever sent
        with pytest.raises(UserError, match=rf"{part}.* is (damaged|missing or not what was sent); restore it, or start over with --fresh") as raised:
            generate.generate(*asked)
        assert raised.value.code == 1 and not list(two.rglob("run.json")), "half a run is none"
    assert bytes_of(generate.generate(*asked, fresh=True)) == wanted
    check(url)


CASES = [(base, here, there) for base in (None, "a") for here in (None, "a", "b") for there in (None, "a", "b", "c")]


@pytest.mark.parametrize(("base", "here", "there"), CASES)
def test_what_was_changed_on_one_side_alone_wins(machine, base, here, there):
    """`base` is what both had when they last met; None is no file."""
    fsspec.filesystem("memory").store.clear()
    directory = machine("runs", "memory://bucket/three") / "pairs" / "x"
    directory.mkdir(parents=True)
    place, other = directory / "part.bin", machine("others", "memory://bucket/three") / "pairs" / "x"

    def meet() -> None:
        with mirror.following(directory, None):
            pass

    def put(path: Path, content: str | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True) if content is None else path.write_text(content)

    machine("runs", "memory://bucket/three")
    put(place, base)
    meet()
    machine("others", "memory://bucket/three")
    with mirror.following(other, None):
        put(other / "part.bin", there)
    machine("runs", "memory://bucket/three")
    put(place, here)
    refused = there is not None and here is not None and here != there and base not in (here, there)
    if refused:
        with pytest.raises(UserError, match=r"part\.bin was changed here and at memory://bucket/three/pairs/x since they were the same; remove"):
            meet()
        assert place.read_text() == here
        return
    meet()
    wanted = here if there is None or (here is not None and there == base) else there
    assert (place.read_text() if place.exists() else None) == wanted


def test_other_inputs_are_refused_as_on_one_disk(machine, url, asked, tmp_path):
    machine("one", url)
    generate.generate(*asked)
    machine("two", url)
    write_suite(tmp_path, prompts=PROMPTS[:2], frames=9, seed=6)
    with pytest.raises(UserError, match=r"holds a run with other inputs \(suite\.seed: 5 -> 6"):
        generate.generate(*asked)
    machine("three", url)
    assert len(bytes_of(generate.generate(*asked, fresh=True))) == 5
    check(url)
    assert len(contents(url)) == 6, "nothing of the former run is left"


def test_a_store_that_fails_costs_no_clip(machine, url, asked, monkeypatch, capsys, idle):
    machine("one", url)
    with monkeypatch.context() as patch:
        fs = type(fsspec.core.url_to_fs(url)[0])
        patch.setattr(fs, "put_file", lambda *_, **__: (_ for _ in ()).throw(TimeoutError("no answer")))
        code, _, err = call(capsys, "generate", asked[0], "--suite", asked[1])
    assert code == 1 and "cannot be used (no answer); what was made here is kept, and the same command goes on" in err
    check(url)
    idle()
    assert call(capsys, "generate", asked[0], "--suite", asked[1])[0] == 0
    machine("two", url)
    assert len(records.read_clips(generate.generate(*asked))) == 4


def test_a_line_that_is_being_written_does_not_travel(machine, tmp_path):
    directory = machine("runs", f"file://{tmp_path}/store") / "train" / "x"
    directory.mkdir(parents=True)
    (directory / "log.jsonl").write_text('{"step": 1}\n{"ste')
    (directory / ".half.tmp").write_text("x")
    (directory / ".later").mkdir()
    (directory / ".later" / "model.bin").write_text("x")
    with mirror.following(directory, None):
        pass
    assert [name for name in contents(f"file://{tmp_path}/store") if "manifest" not in name] == [
        "train/x/" + mirror._name("log.jsonl", hashlib.sha256(b'{"step": 1}\n').hexdigest())
    ]


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://example.org/runs", "paths.mirror is http://example.org/runs, where nobody promises that files appear as a whole"),
        ("smb://host/runs", "paths.mirror is smb://host/runs, where nobody promises that files appear as a whole"),  # no rename over a manifest
        ("s3://bucket/runs", r"paths.mirror is s3://bucket/runs, which cannot be used from here \(Install s3fs to access S3\)"),
        ("/mnt/bucket", "'mirror' is /mnt/bucket; write an address such as s3://bucket/runs"),
    ],
)
def test_a_place_that_cannot_give_it_is_refused(machine, asked, url, sentence):
    if url.startswith("s3"):
        try:
            import s3fs  # noqa: F401
        except ImportError:
            pass
        else:
            pytest.skip("s3fs is installed")
    runs = machine("runs", url)
    with pytest.raises(UserError, match=sentence) as raised:
        generate.generate(*asked)
    assert raised.value.code == 2 and not list(runs.rglob("run.json"))


OUTSIDE = ["../../../outside.bin", "{root}/outside.bin", "videos/../../../../outside.bin", ".", "..", ""]


@pytest.mark.parametrize("path", OUTSIDE)
def test_what_a_store_says_stays_in_the_run(machine, tmp_path, path):
    """Whoever can write there must not get files written, or read and sent, anywhere else here."""
    url = f"file://{tmp_path}/store"
    directory = machine("runs", url) / "bench" / "a" / "b"
    directory.mkdir(parents=True)
    path, content = path.format(root=tmp_path), b"theirs"
    sha256 = hashlib.sha256(content).hexdigest()
    copy = tmp_path / "store" / "bench" / "a" / "b"
    copy.mkdir(parents=True)
    there = (copy / path).parent / f"{Path(path).stem}.{sha256[:16]}{Path(path).suffix}"
    there.parent.mkdir(parents=True, exist_ok=True)
    there.write_bytes(content)
    (copy / "manifest.alone.json").write_text(json.dumps({"files": {path: sha256}, "run": None}))
    with pytest.raises(UserError, match=r"manifest\.alone\.json is damaged"), mirror.following(directory, None):
        pass
    assert not list(tmp_path.rglob("outside.bin"))


MANIFESTS = (
    *("[]", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": "../../x"}}', '{"files": {}, "run": 1}', "\xff"),
    *('{"files": {}, "run": "{"}', '{"files": {}, "run": "[]"}', '{"files": {}, "run": "' + "[" * 10**5 + '"}'),
)


@pytest.mark.parametrize("writer", ["alone", "1of2"])
@pytest.mark.parametrize("text", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_manifest_that_is_none_is_refused(machine, tmp_path, text, writer):
    directory = machine("runs", f"file://{tmp_path}/store") / "x"
    directory.mkdir(parents=True)
    (tmp_path / "store" / "x").mkdir(parents=True)
    (tmp_path / "store" / "x" / f"manifest.{writer}.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"manifest\.{writer}\.json is damaged") as raised, mirror.following(directory, None):
        pass
    assert raised.value.code == 1


def test_rows_make_nothing_outside_of_the_run_travel(machine, tmp_path):
    directory = machine("runs", f"file://{tmp_path}/store") / "x"
    directory.mkdir(parents=True)
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for number, file in enumerate([str(secret), "../../../secret.txt", "../../" * 9 + str(secret)[1:]]):
        (directory / "clips.jsonl").write_text(json.dumps({"file": file, "sha256": f"{number:064x}"}) + "\n")
        with mirror.following(directory, None):
            pass
    assert not [path for path in tmp_path.rglob("secret*") if path != secret]
    assert not any(content == b"secret" for content in contents(f"file://{tmp_path}/store").values())


def test_shards_on_one_disk_send_what_is_their_own(machine, tmp_path):
    url = f"file://{tmp_path}/store"
    directory = machine("one", url) / "bench" / "x"
    for writer in ("0of2", "1of2"):
        (directory / "work" / writer).mkdir(parents=True)
    for writer in ("0of2", "1of2"):
        with mirror.following(directory, writer):
            for each in ("0of2", "1of2"):  # both workers print all the time
                (directory / "work" / each / "log.txt").write_text(f"as {writer} has seen it")
    fresh = machine("two", url) / "bench" / "x"
    fresh.mkdir(parents=True)
    with mirror.following(fresh, None):
        pass


def test_a_large_file_that_grows_while_it_travels_is_sent_when_it_is_still(machine, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/store"
    monkeypatch.setattr(mirror, "SMALL", 4)
    directory = machine("one", url) / "train" / "x"
    directory.mkdir(parents=True)
    (directory / "events.out").write_bytes(b"first step\n")
    put, grown = store.Store.put, list[str]()

    def while_it_grows(there: Any, name: str, content: Any) -> None:
        if name.startswith("events") and not grown:
            grown.append(name)
            with (directory / "events.out").open("ab") as file:
                file.write(b"second step\n")
        put(there, name, content)

    monkeypatch.setattr(store.Store, "put", while_it_grows)
    with mirror.following(directory, None):
        pass
    assert grown
    check(url)
    with mirror.following(directory, None):
        pass
    fresh = machine("two", url) / "train" / "x"
    fresh.mkdir(parents=True)
    with mirror.following(fresh, None):
        pass
    assert (fresh / "events.out").read_bytes() == b"first step\nsecond step\n"
