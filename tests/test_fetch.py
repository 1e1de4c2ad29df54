"""Files come from a mirror, from the hub's cache or from a hub on localhost; what is not right never gets its name."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import save_file

from rfbench import cli, config, fetch, generate, items, records, weight_files, weights
from rfbench.config import Baseline, CacheCfg, License, LoraCfg, SamplerCfg, WeightsCfg
from rfbench.errors import UserError
from rfbench.items import Item
from rfbench.settings import HOME
from rfbench.vbench import prompts
from tests import models
from tests.test_generate import write_suite

REPO, COMMIT = "someone/some-model", "c" * 40
CONTENT = bytes(range(256)) * 400


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def item(file: str = "sub/model.pt", content: bytes = CONTENT, **fields: Any) -> Item:
    return replace(Item(REPO, file, COMMIT, len(content), sha(content)), **fields)


def store(folders: Path) -> Path:
    return folders / "weights" / REPO


def left_over(folders: Path) -> list[str]:
    """Names of all files in the weights directory, but of the list of known hashes."""
    return sorted(path.name for path in (folders / "weights").rglob("*") if path.is_file() and path.name != weight_files.HASHES)


@dataclass
class Hub:
    """As much of the hub's protocol as a download needs: metadata, a redirect to a store under another name, ranges, the tree."""

    files: dict[str, bytes] = field(default_factory=dict)
    served: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range) of every GET at the store
    asked: int = 0
    cut: int | None = None  # bytes after which the connection breaks, once; after that there are errors until it is None again
    broken: bool = False
    refusal: tuple[int, str] | None = None
    lies: bytes | None = None  # sent instead of the content
    large: bool = True  # told by sha256, as files in large file storage are
    tokens: list[tuple[str, str | None]] = field(default_factory=list)
    port: int = 0
    head: str = COMMIT  # of its branch
    looked_up: int = 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        self.tokens.append((request.path, request.headers["Authorization"]))
        if self.refusal:
            request.send_response(self.refusal[0])
            request.send_header("X-Error-Code", self.refusal[1])
            request.end_headers()
        elif request.path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            tree = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "sub"}]
            for name, content in self.files.items():
                lfs = {"oid": sha(content), "size": len(content), "pointerSize": 100}
                tree.append({"type": "file", "oid": "1" * 40, "size": len(content), "path": name, "lfs": lfs})
            body = json.dumps(tree).encode()
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
        elif request.path == f"/api/models/{REPO}/revision/main":
            self.looked_up += 1
            body = json.dumps({"id": REPO, "sha": self.head, "siblings": []}).encode()
            request.send_response(200)
            request.send_header("Content-Length", str(len(body)))
            request.end_headers()
            request.wfile.write(body)
        elif request.path.startswith("/store/"):
            self.send(request, request.path.removeprefix("/store/"))
        elif request.path.startswith(f"/{REPO}/{COMMIT}/"):  # as GitHub has it
            self.send(request, request.path.removeprefix(f"/{REPO}/{COMMIT}/"))
        else:
            name = request.path.removeprefix(f"/{REPO}/resolve/{COMMIT}/")
            if name not in self.files:
                request.send_response(404)
                request.send_header("X-Error-Code", "EntryNotFound")
            else:
                request.send_response(302)
                request.send_header("X-Linked-Etag", f'"{sha(self.files[name]) if self.large else "1" * 40}"')
                request.send_header("X-Linked-Size", str(len(self.files[name])))
                request.send_header("Location", f"http://localhost:{self.port}/store/{name}")
            request.send_header("X-Repo-Commit", COMMIT)
            request.send_header("Content-Length", "0")
            request.end_headers()

    def send(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content, wanted = self.lies or self.files[name], request.headers["Range"]
        self.served.append((name, wanted))
        if self.broken:
            request.send_response(500)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        request.send_response(206 if wanted else 200)
        request.send_header("Content-Length", str(len(content) - first))
        if wanted:
            request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        request.end_headers()
        request.wfile.write(content[first : self.cut])
        if self.cut is not None:
            self.broken = True
            request.wfile.flush()
            request.connection.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of this test's own, where the library looks for one, and an empty HF_HOME."""
    hub = Hub({"sub/model.pt": CONTENT})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.answer(self)

        do_HEAD = do_GET

        def log_message(self, *given: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{hub.port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is in the middle of a chunk comes again
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    server.shutdown()
    server.server_close()


def refused(code: int, *items: Item, mirror: Path | None = None, yes: bool = True) -> str:
    with pytest.raises(UserError) as raised:
        fetch.fetch(items, mirror=mirror, yes=yes)
    assert raised.value.code == code and "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    path = tmp_path / "mirror" / REPO / "sub" / "model.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    return tmp_path / "mirror"


def test_a_mirror_is_linked_and_the_network_left_alone(folders: Path, hub: Hub, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = item(licence="mit", gated=True)
    assert fetch.fetch([wanted], mirror=mirror, dry_run=True) == [store(folders) / "sub" / "model.pt"]
    assert not left_over(folders)
    (path,) = fetch.fetch([wanted, wanted], mirror=mirror, yes=True)
    assert path == store(folders) / "sub" / "model.pt" and path.read_bytes() == CONTENT
    assert path.samefile(mirror / REPO / "sub" / "model.pt") and left_over(folders) == ["model.pt"]
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{REPO}/sub/model.pt 26.1 kB... mit yes sha256 mirror".replace("26.1 kB...", "102.4 kB") in shown
    assert f"1 of 1 files to fetch into {folders / 'weights'}, 102.4 kB" in shown
    shutil.rmtree(mirror)
    assert fetch.fetch([wanted], mirror=mirror) == [path]  # nothing to ask for, nothing looked up
    assert "0 of 1 files to fetch" in capsys.readouterr().err
    assert hub.asked == 0


def test_a_mirror_on_another_disk_is_copied(folders: Path, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_disk(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    (path,) = fetch.fetch([item()], mirror=mirror, yes=True)
    assert path.read_bytes() == CONTENT and not path.samefile(mirror / REPO / "sub" / "model.pt")
    assert left_over(folders) == ["model.pt"]


def test_a_link_in_a_mirror_is_followed(folders: Path, mirror: Path, tmp_path: Path) -> None:
    path = mirror / REPO / "sub" / "model.pt"
    path.rename(tmp_path / "blob")
    path.symlink_to(tmp_path / "blob")
    (found,) = fetch.fetch([item()], mirror=mirror, yes=True)
    assert not found.is_symlink() and found.samefile(tmp_path / "blob")


def test_a_mirror_that_lacks_or_changed_a_file_is_refused(folders: Path, mirror: Path) -> None:
    path = mirror / REPO / "sub" / "model.pt"
    assert f"mirror: {mirror / REPO / 'other.pt'} is not there" in refused(1, item("other.pt"), mirror=mirror)
    for content in (CONTENT[:-1], CONTENT[:-1] + b"x"):
        path.write_bytes(content)
        assert f"{path} is not the one that is asked for" in refused(1, item(), mirror=mirror)
    assert not left_over(folders) and path.exists()


def test_the_hub_is_asked_and_its_file_checked(folders: Path, hub: Hub) -> None:
    (path,) = fetch.fetch([item()], yes=True)
    assert path.read_bytes() == CONTENT and hub.served == [("sub/model.pt", None)] and left_over(folders) == ["model.pt"]
    asked = hub.asked
    assert fetch.fetch([item()]) == [path] and hub.asked == asked


def test_what_the_hub_says_is_used_where_the_baseline_says_nothing(folders: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    vague = item(bytes=None, sha256=None)
    fetch.fetch([vague], dry_run=True)
    assert "102.4 kB" in capsys.readouterr().err and not hub.served
    hub.lies = CONTENT[:-1] + b"x"
    assert "came with sha256" in refused(1, vague)
    hub.lies, hub.large = None, False
    (path,) = fetch.fetch([vague], yes=True)
    assert path.read_bytes() == CONTENT
    assert f"{path} has sha256 {sha(CONTENT)}; nobody says what it should be" in capsys.readouterr().err


def test_an_interrupted_download_goes_on(folders: Path, hub: Hub) -> None:
    hub.cut = 45_000
    sentence = refused(1, item())
    assert "did not come from" in sentence and "the same command goes on from here" in sentence
    (name,) = left_over(folders)
    assert name.endswith(".part") and (store(folders) / "sub" / name).read_bytes() == CONTENT[:40_000]
    hub.cut, hub.broken, hub.served = None, False, []
    (path,) = fetch.fetch([item()], yes=True)
    assert path.read_bytes() == CONTENT and hub.served == [("sub/model.pt", "bytes=40000-")] and left_over(folders) == ["model.pt"]


@pytest.mark.parametrize("kept", [len(CONTENT), len(CONTENT) + 5])
def test_all_or_too_much_of_a_file_may_be_there_already(folders: Path, hub: Hub, kept: int) -> None:
    (source,) = fetch.find(item(), None, {})
    source.part.parent.mkdir(parents=True)
    source.part.write_bytes((CONTENT + b"12345")[:kept])
    (path,) = fetch.fetch([item()], yes=True)
    assert path.read_bytes() == CONTENT and left_over(folders) == ["model.pt"]
    assert len(hub.served) == (kept > len(CONTENT))


def test_the_beginning_of_another_version_is_not_gone_on_from(folders: Path, hub: Hub) -> None:
    hub.files["sub/model.pt"] = other = b"x" * 50_000
    hub.cut = 20_000
    refused(1, item(content=other))
    assert [path.stat().st_size for path in (store(folders) / "sub").iterdir()] == [20_000]
    hub.files["sub/model.pt"], hub.cut, hub.broken = CONTENT, None, False
    (path,) = fetch.fetch([item()], yes=True)
    assert path.read_bytes() == CONTENT and left_over(folders) == ["model.pt"]


def test_what_is_wrong_is_set_aside(folders: Path, hub: Hub) -> None:
    hub.lies, hub.large = CONTENT[:-1] + b"x", False  # of a small file the hub tells no sha256
    sentence = refused(1, item())
    assert f"came with sha256 {sha(hub.lies)[:12]}... instead of {sha(CONTENT)[:12]}...; it is now model.pt.wrong" in sentence
    assert left_over(folders) == ["model.pt.wrong"]
    hub.lies = None
    (path,) = fetch.fetch([item()], yes=True)
    assert path.read_bytes() == CONTENT


def test_what_lies_there_but_is_wrong_is_set_aside(folders: Path, hub: Hub, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store(folders) / "sub" / "model.pt"
    path.parent.mkdir(parents=True)
    for source in (None, mirror):
        path.write_bytes(CONTENT[:-1] + b"y")
        fetch.fetch([item()], mirror=source, yes=True)
        assert path.read_bytes() == CONTENT and (path.parent / "model.pt.wrong").read_bytes()[-1:] == b"y"
        assert "is not what was asked for and is kept as model.pt.wrong" in capsys.readouterr().err
        path.unlink()


def test_another_file_on_the_hub_is_not_downloaded(folders: Path, hub: Hub) -> None:
    for wrong in (item(bytes=len(CONTENT) + 1), item(sha256="0" * 64)):
        assert "is not the one that is asked for" in refused(1, wrong)
    assert not hub.served and not left_over(folders)


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        ((403, "GatedRepo"), "is gated: accept its terms at http://127.0.0.1"),
        ((404, "RepoNotFound"), "has no sub/model.pt of someone/some-model"),
        ((404, "RevisionNotFound"), f"at {COMMIT}"),
        ((404, "EntryNotFound"), "has no sub/model.pt of someone/some-model"),
        ((503, "Busy"), "did not come from http://127.0.0.1"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence_after_the_table(
    folders: Path, hub: Hub, capsys: pytest.CaptureFixture[str], refusal: tuple[int, str], sentence: str
) -> None:
    hub.refusal = refusal
    assert sentence in refused(1, item(licence="mit"))
    shown = " ".join(capsys.readouterr().err.split())
    assert "102.4 kB mit no sha256 cannot be had" in shown and not left_over(folders)


def test_a_token_goes_to_the_hub_and_nowhere_else(folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch.fetch([item()], yes=True)
    assert len(hub.served) == 1
    assert all(token == (None if path.startswith("/store/") else "Bearer hf_secret") for path, token in hub.tokens)


def test_a_disk_that_is_too_small_is_said_before_anything_happens(folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    free = len(CONTENT) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
    assert "has 102.4 kB free and this takes 102.4 kB" in refused(1, item())
    assert not hub.served and not left_over(folders)
    (source,) = fetch.find(item(), None, {})
    source.part.parent.mkdir(parents=True)
    source.part.write_bytes(CONTENT[:1])  # what has come already takes no more room
    assert fetch.fetch([item()], yes=True)[0].read_bytes() == CONTENT


def test_two_processes_do_not_write_one_file(folders: Path, hub: Hub) -> None:
    (source,) = fetch.find(item(), None, {})
    source.part.parent.mkdir(parents=True)
    with source.part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is fetching" in refused(1, item())
    assert fetch.fetch([item()], yes=True)[0].read_bytes() == CONTENT


def test_who_comes_as_another_process_ends_does_not_write_into_its_file(folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, (source,) = fcntl.flock, fetch.find(item(), None, {})
    source.part.parent.mkdir(parents=True)
    source.part.write_bytes(CONTENT[:40_000])

    def late(file: Any, how: int) -> None:
        source.part.write_bytes(CONTENT)
        source.part.replace(item().path)
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert "another process is fetching" in refused(1, item())
    assert item().path.read_bytes() == CONTENT and left_over(folders) == ["model.pt"]


@pytest.mark.parametrize(("answer", "came"), [("y", True), ("n", False), (None, False)])
def test_somebody_has_to_agree(folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, answer: str | None, came: bool) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None, raising=False)
    monkeypatch.setattr("builtins.input", lambda *given: answer)
    if came:
        fetch.fetch([item()])
    else:
        sentence = refused(1 if answer else 2, item(), yes=False)
        assert sentence == ("nothing was fetched" if answer else "nobody is there to be asked whether to fetch this; add --yes")
    assert bool(hub.served) == came


def shards(folder: Path) -> dict[str, bytes]:
    """A checkpoint in two files with its index, and files beside it that do not belong to it."""
    folder.mkdir(parents=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.full((3,), float(number))}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"t0": names[0], "t1": names[1]}}))
    (folder / "README.md").write_text("not wanted")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("file", ["sub/model-*.safetensors", "sub", "pipeline"])
@pytest.mark.parametrize("source", ["hub", "mirror"])
def test_several_files_come_as_a_pattern_or_a_folder(folders: Path, hub: Hub, tmp_path: Path, file: str, source: str) -> None:
    inner = {"pipeline": "pipeline/transformer"}.get(file, "sub")
    content = shards(tmp_path / "mirror" / REPO / inner)
    hub.files = {f"{inner}/{name}": value for name, value in content.items()} | {"model-1.safetensors": b"", f"{inner}/deep/x.safetensors": b""}
    files = [tmp_path / "mirror" / REPO / inner / name for name in sorted(content) if name.startswith("model-")]
    wanted = item(file, bytes=sum(path.stat().st_size for path in files), sha256=weight_files.sha256_of(files))
    for _ in range(2):
        fetch.fetch([wanted], mirror=tmp_path / "mirror" if source == "mirror" else None, yes=True)
        assert left_over(folders) == sorted(set(content) - {"README.md"})
        assert all((store(folders) / inner / name).read_bytes() == content[name] for name in left_over(folders))
    assert len(hub.served) == (3 if source == "hub" else 0)
    cfg = WeightsCfg(file, REPO, COMMIT, wanted.bytes, sha256=wanted.sha256)
    assert weights.read_tensors(weight_files.resolve(cfg, tmp_path / "x.yaml"), cfg).keys() == {"t0", "t1"}
    if source == "hub":  # a file of several is lost, and only that one comes again
        (store(folders) / inner / files[0].name).unlink()
        fetch.fetch([wanted], yes=True)
        assert hub.served[3:] == [(f"{inner}/{files[0].name}", None)]
        assert hub.served[0][0] == f"{inner}/model.safetensors.index.json"


def test_several_files_that_are_not_those_that_were_asked_for(folders: Path, hub: Hub, tmp_path: Path) -> None:
    hub.files = {f"sub/{name}": value for name, value in shards(tmp_path / "x").items()}
    sentence = refused(1, item("sub/model-*.safetensors", bytes=None, sha256="0" * 64))
    assert "together they are not what is asked for" in sentence
    assert "has no files other-*.pt" in refused(1, item("other-*.pt", bytes=None, sha256=None))


def test_what_other_programs_left_in_the_hub_s_cache_is_used(folders: Path, hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    blob, snapshot = home / "blobs" / sha(CONTENT), home / "snapshots" / COMMIT / "sub" / "model.pt"
    for path in (blob, snapshot):
        path.parent.mkdir(parents=True)
    blob.write_bytes(CONTENT)
    snapshot.symlink_to(blob)
    (path,) = fetch.fetch([item()], yes=True)
    assert path.samefile(blob) and not path.is_symlink() and hub.asked == 0
    path.unlink()
    blob.write_bytes(CONTENT[:-1])  # broken there: the hub has a whole one
    (path,) = fetch.fetch([item()], yes=True)
    assert path.read_bytes() == CONTENT and len(hub.served) == 1


def of_main(file: str, **fields: Any) -> Item:
    return Item(REPO, file, **fields)


def origin(file: str) -> str | None:
    return weight_files.commit_of(WeightsCfg(file, REPO), weight_files.resolve(WeightsCfg(file, REPO), Path("x.yaml")))


def test_a_branch_is_looked_up_once_and_its_commit_is_kept(folders: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files |= {"other.pt": b"other", "third.pt": b"third"}
    fetch.fetch([of_main("sub/model.pt"), of_main("other.pt")], yes=True)
    assert hub.looked_up == 1 and {file for file, _ in hub.served} == {"sub/model.pt", "other.pt"}
    assert weight_files.pins(store(folders)) == {"main": weight_files.Pin(COMMIT, ("other.pt", "sub/model.pt"))}
    assert origin("other.pt") == COMMIT
    fetch.fetch([of_main("sub/model.pt")], yes=True)
    assert hub.looked_up == 1, "it is in its place"

    hub.head = "d" * 40
    capsys.readouterr()
    fetch.fetch([of_main("third.pt")], yes=True)  # the hub of this test has nothing at another commit
    assert f"'main' has moved on to {hub.head}; what is missing comes from {COMMIT}" in " ".join(capsys.readouterr().err.split())
    assert origin("third.pt") == COMMIT and (store(folders) / "third.pt").read_bytes() == b"third"
    hub.refusal = (500, "")
    (store(folders) / "third.pt").unlink()
    assert "did not come from" in refused(1, of_main("third.pt"))
    (store(folders) / ".commits.json").write_text('{"main": 1}')
    assert "expected the keys of Pin" in refused(2, of_main("third.pt")), "it is not overwritten"


def test_a_folder_of_a_branch_goes_on_at_its_commit(folders: Path, hub: Hub) -> None:
    hub.files = {f"sub/{name}": name.encode() * 1000 for name in ("a.bin", "b.bin", "c.bin")}
    hub.cut = 1500
    refused(1, of_main("sub/**"))
    hub.cut, hub.broken = None, False
    fetch.fetch([of_main("sub/**")], yes=True)
    hub.head, before = "d" * 40, hub.looked_up
    (store(folders) / "sub" / "b.bin").unlink()
    fetch.fetch([of_main("sub/**")], yes=True)
    assert hub.looked_up == before + 1 and origin("sub/**") == COMMIT
    assert (store(folders) / "sub" / "b.bin").read_bytes() == b"b.bin" * 1000


def test_a_mirror_s_commit_comes_along_and_another_one_is_refused(folders: Path, hub: Hub, mirror: Path) -> None:
    (mirror / REPO / "other.pt").write_bytes(b"other")
    fetch.fetch([of_main("sub/model.pt")], mirror=mirror, yes=True)
    assert origin("sub/model.pt") is None and hub.asked == 0, "nobody knows"
    (store(folders) / "sub" / "model.pt").unlink()
    (mirror / REPO / ".commits.json").write_text(json.dumps({"main": {"commit": COMMIT, "files": ["sub/model.pt"]}}))
    fetch.fetch([of_main("sub/model.pt"), of_main("other.pt")], mirror=mirror, yes=True)
    assert (origin("sub/model.pt"), origin("other.pt")) == (COMMIT, None)
    (store(folders) / "other.pt").unlink()
    (mirror / REPO / ".commits.json").write_text(json.dumps({"main": {"commit": "d" * 40, "files": ["sub/model.pt"]}}))
    assert f"is of commit {'d' * 12}... of 'main', and what is in" in refused(1, of_main("other.pt"), mirror=mirror)
    assert not (store(folders) / "other.pt").exists()


def test_the_commit_of_the_hub_s_cache_is_kept(folders: Path, hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "hf" / "hub" / f"models--{REPO.replace('/', '--')}"
    for path, content in ((home / "refs" / "main", b"e" * 40), (home / "snapshots" / ("e" * 40) / "sub" / "model.pt", CONTENT)):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    fetch.fetch([of_main("sub/model.pt")], yes=True)
    assert origin("sub/model.pt") == "e" * 40 and hub.asked == 0


def test_a_run_records_which_commit_its_weights_are_from(folders: Path, hub: Hub, tmp_path: Path) -> None:
    path = Path(models.write(tmp_path, sampler=models.STUDENT | {"steps": [1000]}))
    hub.files = {"student.safetensors": path.with_suffix(".safetensors").read_bytes()}
    path.with_suffix(".safetensors").unlink()
    plain = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(plain | {"weights": {"file": "student.safetensors", "repo": REPO}}))
    fetch.fetch(items.items_named(str(path)), yes=True)
    directory = generate.generate(str(path), write_suite(tmp_path, prompts=["a red disc"], samples=1, frames=9))
    assert records.read_run(directory).recorded["commits"] == {"weights": COMMIT}


@pytest.mark.parametrize("given", [("one", "x.pt"), ("a/b/c", "x.pt"), ("../b", "x.pt"), ("a/b", "../x.pt"), ("a/b", "/x.pt"), ("a/b", "")])
def test_nothing_is_written_outside_of_the_weights_directory(given: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="is not a file of a repository"):
        Item(*given)


def baseline(backbone: str = "toy", **fields: Any) -> Baseline:
    sampler = SamplerCfg((1000,), 5.0, cache=CacheCfg("full"))
    return Baseline("A title", backbone, WeightsCfg("x.pt", **fields), sampler, License("mit", "cc-by-4.0"))


def test_what_a_baseline_needs() -> None:
    assert items.items_of(baseline()) == []
    adapter = LoraCfg("lora.pt", 4, 4, bytes=3, sha256="b" * 64)
    found = items.items_of(baseline("wan2.1-1.3b", repo=REPO, revision=COMMIT, bytes=5, sha256="a" * 64, lora=adapter))
    assert found[:2] == [
        Item(REPO, "x.pt", COMMIT, 5, "a" * 64, "cc-by-4.0"),
        Item(REPO, "lora.pt", COMMIT, 3, "b" * 64, "cc-by-4.0"),
    ]
    assert all(item.revision != "main" and item.sha256 and item.licence == "apache-2.0" for item in found[2:])
    assert {item.path.name for item in found[2:]} == {"models_t5_umt5-xxl-enc-bf16.pth", "tokenizer.json", "Wan2.1_VAE.pth"}


@pytest.mark.parametrize("name", config.names_of(Baseline))
def test_every_shipped_baseline_says_what_it_needs(name: str) -> None:
    cfg = config.load(Baseline, name)
    assert bool(items.items_of(cfg)) == (cfg.weights.repo is not None)


YAML = f"""
title: A title
backbone: toy
weights: {{file: sub/model.pt, repo: {REPO}, revision: {COMMIT}, bytes: {len(CONTENT)}, sha256: {sha(CONTENT)}}}
sampler: {{steps: [1000], shift: 5.0, cache: {{policy: full}}}}
license: {{code: mit, weights: mit}}
"""


def test_offline_only_what_is_on_this_machine_is_to_be_had(folders: Path, hub: Hub, mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for wanted in (item(), item("sub")):
        sentence = refused(1, wanted)
        assert sentence.startswith(f"HF_HUB_OFFLINE is set, and {wanted.file} of {REPO} is not on this machine")
    assert fetch.fetch([item()], mirror=mirror, yes=True) == fetch.fetch([item()])
    assert hub.asked == 0


def test_the_library_s_environment_is_heeded(folders: Path, hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, and HF_HOME with the token of somebody who has logged in; the library reads them when a process begins."""
    path, home = tmp_path / "x.yaml", tmp_path / "home"
    path.write_text(YAML)
    home.mkdir()
    (home / "token").write_text("hf_login")
    environment = {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}", "PYTHONPATH": str(HOME)}
    command = [sys.executable, "-m", "rfbench.cli", "fetch", str(path), "--yes", "--json"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    target = store(folders) / "sub" / "model.pt"
    assert done.returncode == 0 and json.loads(done.stdout) == [str(target)] and target.read_bytes() == CONTENT
    assert [token for path, token in hub.tokens if path.startswith(f"/{REPO}/")] == ["Bearer hf_login"] * 2


def test_the_command_passes_on_what_it_is_asked_for(folders: Path, mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(YAML)

    def call(*arguments: str) -> tuple[object, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(["fetch", str(path), "--mirror", str(mirror), *arguments])
        return caught.value.code, capsys.readouterr().out

    target = store(folders) / "sub" / "model.pt"
    assert call() == (2, "") and not target.exists()
    assert call("--dry-run") == (0, f"{target}\n") and not target.exists()
    assert call("-y") == (0, f"{target}\n") and target.exists()
    path.write_text(YAML.replace(f"repo: {REPO}, ", ""))
    assert call() == (0, "")


# Lists of prompts


def test_a_list_of_prompts_comes_from_github_by_its_hash(folders: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on where a connection broke, like a file of the hub, and no token of the hub goes there."""
    monkeypatch.setattr(prompts, "GITHUB", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    listed = prompts.Listed("rewritten", REPO, COMMIT, "sub/model.pt", sha(CONTENT), len(CONTENT))
    monkeypatch.setitem(prompts.EXTENDED, "self-forcing", listed)
    (wanted,) = (one for one in items.items_named("vbench-extended") if one.repo == REPO)
    hub.cut = 50_000
    assert "the same command goes on from here" in refused(1, wanted)
    hub.cut, hub.broken = None, False
    (path,) = fetch.fetch([wanted], yes=True)
    assert path == listed.path and path.read_bytes() == CONTENT
    assert hub.served[-1][1] == "bytes=50000-" and {token for _, token in hub.tokens} == {None}
    path.unlink()
    hub.lies = b"something else of the same name"
    assert "came with sha256" in refused(1, wanted) or "did not come" in refused(1, wanted)
    assert not path.exists()


def test_what_a_suite_needs_is_known_by_commit_size_and_hash(folders: Path, tmp_path: Path) -> None:
    lists = (prompts.FULL_INFO, prompts.MOVIEGEN, *prompts.EXTENDED.values())
    assert all(len(one.commit) == 40 and fetch.SHA256.fullmatch(one.sha256) and one.bytes > 100_000 for one in lists)
    assert [one.file for one in items.items_named("vbench")] == [prompts.FULL_INFO.file]
    assert [one.file for one in items.items_named("vbench-extended")] == [prompts.FULL_INFO.file, prompts.EXTENDED["self-forcing"].file]
    assert [one.file for one in items.items_named("moviegen-60s")] == [prompts.MOVIEGEN.file, prompts.EXTENDED["moviegen-self-forcing"].file]
    (tmp_path / "mine.yaml").write_text("prompts: vbench\nextended: wan2.1\n")
    assert items.items_named(str(tmp_path / "mine.yaml"))[1].file == prompts.EXTENDED["wan2.1"].file
    assert items.items_named("smoke") == [] and all(one.github for one in items.items_named("vbench-forcing"))
    with pytest.raises(UserError, match="there is no baseline 'vbench-extendet'"):
        items.items_named("vbench-extendet")
