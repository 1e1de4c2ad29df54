"""VBench's prompts as a suite: by line, by hash, with their dimensions; and the folders that its own program reads."""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from pathlib import Path

import pytest

from rfbench import suites
from rfbench.errors import UserError
from rfbench.records import sha256_of
from rfbench.suites import declared, load_suite, suite_sha256
from rfbench.vbench import prompts, staging
from rfbench.vbench.dimensions import T2V
from tests import vbench_suite
from tests.test_cli import call
from tests.vbench_suite import ENTRIES, LONGER


@pytest.fixture(autouse=True)
def published(folders, monkeypatch):
    vbench_suite.publish(monkeypatch)
    return folders


def clips_of(suite):
    return [vbench_suite.clip(prompt.id, i, prompt.text, given=prompt.generate_from) for prompt, i in suite.items]


def kinds(findings):
    return sorted((finding.kind, finding.clip) for finding in findings)


# Suites


def test_the_suite_has_every_line_with_its_dimensions_and_enough_samples():
    suite = load_suite("vbench")
    assert [(prompt.text, list(prompt.dimensions)) for prompt in suite.prompts] == [(e["prompt_en"], e["dimension"]) for e in ENTRIES]
    assert {name for prompt in suite.prompts for name in prompt.dimensions} == set(T2V.dimensions)
    assert [prompt.samples for prompt in suite.prompts] == [25 if "temporal_flickering" in e["dimension"] else None for e in ENTRIES]
    assert len(suite.items) == len(set(suite.items)) == 5 * (len(ENTRIES) - 1) + 25
    assert len(load_suite("vbench-forcing").items) == 5 * len(ENTRIES)


def test_what_is_generated_from_is_line_i_of_the_rewritings_and_what_is_scored_line_i_of_the_prompts():
    suite = load_suite("vbench-extended")
    assert [(prompt.text, prompt.generate_from) for prompt in suite.prompts] == list(zip([e["prompt_en"] for e in ENTRIES], LONGER, strict=True))


def test_own_rewritings_are_known_by_their_content(tmp_path):
    shas = {suite_sha256(load_suite("vbench")), suite_sha256(load_suite("vbench-extended")), suite_sha256(load_suite("vbench-forcing"))}
    (tmp_path / "mine.yaml").write_text("prompts: vbench\nextended: mine.txt\nsamples: 5\nfiltered: 25\n")
    for text in ("\n".join(LONGER), "\n".join(LONGER) + "!\n"):
        (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
        shas.add(suite_sha256(load_suite(str(tmp_path / "mine.yaml"))))
    assert len(shas) == 4, "the first of mine is the published list, whatever its file is called"


def test_a_suite_that_uses_none_of_it_has_the_identity_it_always_had():
    assert suite_sha256(load_suite("smoke")) == "c51ad4bd735a" + suite_sha256(load_suite("smoke"))[12:]
    assert set(declared(load_suite("smoke"))["prompts"][0]) == {"id", "text", "generate_from"}


@pytest.mark.parametrize(
    ("header", "text", "sentence"),
    [
        ("extended: self-forcin", "", "there is no list of rewritten prompts 'self-forcin'; did you mean 'self-forcing'?; or name a .txt file"),
        ("extended: mine.txt", "a\nb\n", "have 2 lines for 12 prompts; line i is for prompt i"),
        ("extended: mine.txt", "a\n" * 5 + "\n" + "a\n" * 6, "line 6: is empty"),
        ("extended: nowhere.txt", "", "nowhere.txt: cannot be read"),
        ("filtered: 4\nsamples: 5", "", "'filtered' is for 'prompts: vbench' and is more than 'samples'"),
    ],
)
def test_lists_that_do_not_belong_together_are_refused(tmp_path, header, text, sentence):
    (tmp_path / "mine.txt").write_text(text)
    (tmp_path / "mine.yaml").write_text(f"prompts: vbench\n{header}\n")
    with pytest.raises(UserError) as caught:
        load_suite(str(tmp_path / "mine.yaml"))
    assert sentence in str(caught.value) and caught.value.code == 2


def test_a_file_that_is_not_the_published_one_is_refused(capsys):
    for name, listed in (("vbench", prompts.FULL_INFO), ("vbench-extended", prompts.EXTENDED["self-forcing"])):
        text = listed.path.read_text(encoding="utf-8")
        listed.path.write_text(text + " ", encoding="utf-8")
        with pytest.raises(UserError, match=r"is not the published file .*; `rfbench fetch` with the suite's name brings it"):
            load_suite(name)
        listed.path.unlink()
        with pytest.raises(UserError, match="`rfbench fetch"):
            load_suite(name)
        listed.path.write_text(text, encoding="utf-8")
    prompts.FULL_INFO.path.unlink()
    code, out, _ = call(capsys, "list", "suites")
    assert code == 0 and "rfbench env vbench" in out and "toy-short" in out, "what is missing hides nothing else"


# Before hours are spent


def test_a_whole_run_passes():
    suite = load_suite("vbench-extended")
    assert staging.preflight(clips_of(suite), declared(suite)) == []


def test_everything_that_is_wrong_is_named():
    suite = load_suite("vbench-extended")
    clips = {clip.id: clip for clip in clips_of(suite)}
    del clips["0001-24"]
    clips["0000-5"] = vbench_suite.clip(0, 5, "a bird", given=LONGER[0])
    clips["0002-1"] = dataclasses.replace(clips["0002-1"], sha256=clips["0002-0"].sha256)
    clips["0003-0"] = dataclasses.replace(clips["0003-0"], generated_from="A beach, oil painting")
    clips["0004-0"] = dataclasses.replace(clips["0004-0"], frames=80)
    clips["0005-0"] = dataclasses.replace(clips["0005-0"], prompt=LONGER[5])
    assert kinds(staging.preflight(list(clips.values()), declared(suite))) == [
        ("duplicate", "0002-1"),
        ("extra", "0000-5"),
        ("mismatched", "0003-0"),
        ("mismatched", "0004-0"),
        ("mismatched", "0005-0"),
        ("missing", "0001-24"),
    ]


def test_files_are_looked_at_where_the_run_is_given(tmp_path):
    suite = load_suite("vbench-forcing")
    (tmp_path / "videos").mkdir()
    clips = clips_of(suite)
    for clip in clips:
        (tmp_path / clip.file).write_text(clip.id)
    clips = [dataclasses.replace(clip, sha256=sha256_of(tmp_path / clip.file)) for clip in clips]
    assert staging.preflight(clips, declared(suite), tmp_path) == []
    (tmp_path / clips[3].file).write_text("other")
    (tmp_path / clips[7].file).unlink()
    assert kinds(staging.preflight(clips, declared(suite), tmp_path)) == [("mismatched", clips[3].id), ("missing", clips[7].id)]


# The folders


def test_every_clip_is_linked_under_its_official_name(tmp_path):
    suite = load_suite("vbench-forcing")
    clips = clips_of(suite)
    named = staging.names(clips, declared(suite))
    assert len(named) == len(clips), "prompts that are there twice lie in different folders"
    for _ in range(2):  # again over what is there
        staging.stage(tmp_path / "run", named, tmp_path / "out")
    for entry in ENTRIES:
        folder = tmp_path / "out" / entry["dimension"][0]
        for i in range(5):
            assert (folder / f"{entry['prompt_en']}-{i}.mp4").is_symlink()
    there = [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert len(there) == len(clips) and {os.readlink(path) for path in there} == {str((tmp_path / "run" / clip.file).resolve()) for clip in clips}


def test_what_lies_in_the_way_is_refused(tmp_path):
    suite = load_suite("vbench-forcing")
    named = staging.names(clips_of(suite), declared(suite))
    (tmp_path / "color").mkdir()
    (tmp_path / "color" / ".DS_Store").touch()
    with pytest.raises(UserError, match=r"1 files that do not belong there \(color/\.DS_Store\)"):
        staging.stage(tmp_path, named, tmp_path)
    (tmp_path / "color" / ".DS_Store").unlink()
    (tmp_path / "color" / "a red car-0.mp4").write_text("a video")
    with pytest.raises(UserError, match="is there and is no link"):
        staging.stage(tmp_path, named, tmp_path)
    assert (tmp_path / "color" / "a red car-0.mp4").read_text() == "a video"


@pytest.mark.parametrize("change", [str.casefold, lambda name: unicodedata.normalize("NFD", name)], ids=["takes cases for one", "decomposes"])
def test_a_file_system_that_changes_names_is_found_out(tmp_path, monkeypatch, change):
    suite = load_suite("vbench-forcing")
    named = staging.names(clips_of(suite), declared(suite))
    honest = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [change(name) for name in honest(path)])
    with pytest.raises(UserError, match="this file system changes the name"):
        staging.stage(tmp_path, named, tmp_path / "out")


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["a/b"], "it has a '/'"),
        (["é" * 125], "its name has 256 bytes and the most is 255"),
        (["fac\u0327ade"], "not in Unicode's composed form"),
        (["a", "a"], "would both be 'a-0.mp4'"),
    ],
)
def test_prompts_that_are_no_file_names_are_refused(texts, sentence):
    clips = [vbench_suite.clip(i, 0, text) for i, text in enumerate(texts)]
    with pytest.raises(UserError) as caught:
        staging.names(clips, {"prompts": [{"id": i, "text": text} for i, text in enumerate(texts)]})
    assert sentence in str(caught.value)
    assert suites.VBENCH == "vbench"


def test_what_is_said_to_be_kept_or_repaired_has_a_test_of_that_name():
    """PROTOCOL.md names one beside each habit."""
    text = (Path(staging.__file__).with_name("PROTOCOL.md")).read_text(encoding="utf-8")
    named = re.findall(r"`test_(\w+)::(\w+)`", text)
    assert len(named) > 25
    for module, name in named:
        assert f"def test_{name}(" in (Path(__file__).with_name(f"test_{module}.py")).read_text(encoding="utf-8"), f"{module}::{name}"
