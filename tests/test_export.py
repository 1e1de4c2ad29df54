"""What VBench's own tools would read of an export: its script's rule for totals, its names, and nothing of a run that is not whole."""

from __future__ import annotations

import dataclasses
import json
import zipfile

import pytest

from rfbench import records, suites
from rfbench.errors import UserError
from rfbench.evaluate import evaluate
from rfbench.export import export
from rfbench.vbench.dimensions import T2V
from rfbench.vbench.prompts import entries
from tests.test_cli import call
from tests.test_vbench_scorer import made, note, worker  # noqa: F401


@pytest.fixture
def scored(tmp_path):
    run = made(tmp_path / "run", suites.load_suite("vbench-forcing"))
    evaluate(run, ["vbench"])
    return run


def total_of(archive):
    """As VBench's cal_final_score.py: the first entry of each dimension in every JSON file of the archive, dimensions spelled with spaces."""
    found: dict[str, float] = {}
    with zipfile.ZipFile(archive) as file:
        for name in file.namelist():
            content = json.loads(file.read(name))
            if name.endswith(".json") and isinstance(content, dict):
                found |= {key.replace("_", " "): value[0] for key, value in content.items()}
    shares = {"quality": [0.0, 0.0], "semantic": [0.0, 0.0]}
    for name, one in T2V.dimensions.items():
        shares[one.group][0] += (found[name.replace("_", " ")] - one.low) / (one.high - one.low) * one.weight
        shares[one.group][1] += one.weight
    quality, semantic = (top / bottom for top, bottom in shares.values())
    return (quality * 4 + semantic) / 5


def test_a_submission_has_the_total_of_the_note(scored, tmp_path, capsys):
    code, out, _ = call(capsys, "export", str(scored), str(tmp_path / "x.zip"))
    assert code == 0 and out.strip().endswith("x.zip")
    assert 100 * total_of(tmp_path / "x.zip") == pytest.approx(note(scored)["summary"]["totals"]["total"])
    first = (tmp_path / "x.zip").read_bytes()
    export(scored, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == first


def test_results_name_every_clip_by_its_official_name(scored, tmp_path):
    found = json.loads(export(scored, tmp_path / "x.json").read_text())
    assert set(found) == set(T2V.dimensions)
    for name, (score, details) in found.items():
        assert {entry["video_path"].split("/")[0] for entry in details} <= {entry.split("/")[0] for entry in _folders(name)}
        if name == "imaging_quality":
            assert score == pytest.approx(sum(entry["video_results"] for entry in details) / len(details) / 100)
        elif name not in ("dynamic_degree", "human_action"):
            assert score == pytest.approx(sum(entry["video_results"] for entry in details) / len(details))


def _folders(dimension):
    return {e.dimensions[0] for e in entries() if dimension in e.dimensions}


def test_a_folder_holds_the_links(scored, tmp_path):
    export(scored, tmp_path / "folder")
    assert sum(path.is_symlink() for path in (tmp_path / "folder").rglob("*")) == 60
    assert (tmp_path / "folder" / "color" / "a red car-4.mp4").read_text() == "0008-4 static"


def test_what_is_not_whole_is_not_exported(scored, tmp_path):
    (scored / "scores" / "vbench.json").rename(tmp_path / "note.json")
    with pytest.raises(UserError, match="has not been scored; run `rfbench eval x/vbench-forcing -s vbench`"):
        export(scored, tmp_path / "x.json")
    there = json.loads((tmp_path / "note.json").read_text())
    for change in ({"refused": {"0000-0": "why"}}, {"partial": True}, {"clips_sha256": "0"}, {"summary": None}):
        (scored / "scores" / "vbench.json").write_text(json.dumps(there | change))
        with pytest.raises(UserError, match="the scores are not of all its clips"):
            export(scored, tmp_path / "x.json")
    del there["summary"]["dimensions"]["scene"]
    (scored / "scores" / "vbench.json").write_text(json.dumps(there))
    with pytest.raises(UserError, match=r"1 are missing \(scene\); it would count them as 0"):
        export(scored, tmp_path / "x.zip")
    clips = records.read_clips(scored)
    records.write_rows(scored / "clips.jsonl", [dataclasses.replace(clips[0], prompt="a dog"), *clips[2:]])
    with pytest.raises(UserError, match="for 2 reasons: missing 0000-1: no clip 1 of prompt 0: a bird; mismatched 0000-0"):
        export(scored, tmp_path / "folder")
    assert not list(tmp_path.glob("x.*")) and not (tmp_path / "folder").exists()
