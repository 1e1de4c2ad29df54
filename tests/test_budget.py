"""What a study is said to take, against numbers computed by hand from what is printed and from what was timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rfbench import budget, config, external, provenance, records, reproduce, studies
from rfbench.baselines import Prepared
from rfbench.config import Baseline, Recipe
from rfbench.errors import UserError
from rfbench.records import DONE, Run
from tests import models
from tests.test_cli import call
from tests.test_external import fake as fake


def by_name(found: budget.Budget) -> dict[str, budget.Cost]:
    return {cost.contender: cost for cost in found.costs}


def test_table_1_without_weights_or_prompts(folders):
    found = budget.estimate(studies.plan_of("table1-short"), gpus=64)
    costs = by_name(found)
    assert {cost.clips for cost in costs.values()} == {946 * 5}
    assert costs["reward-forcing"].hours == pytest.approx(4730 * 81 / 23.1 / 3600)
    assert costs["reward-forcing"].wall_hours == pytest.approx(74 * 81 / 23.1 / 3600)  # 4730 = 73 * 64 + 58
    assert costs["magi-1"].hours == pytest.approx(4730 * 770 / 3600)  # of its own length and size, not as printed of another
    assert "own" in costs["reward-forcing"].source and "770 s for its 96 frames of 720x720, says a third party on one H100" in costs["magi-1"].source
    assert costs["magi-1"].device == "H100" and "competitor; whether at its own 768x480 is not known" in costs["nova"].source
    assert costs["magi-1"].disk_bytes == round(4730 * 96 * 720 * 720 / 8) and not costs["magi-1"].disk_measured
    assert found.hours == pytest.approx(sum(cost.hours or 0 for cost in costs.values()))
    slowest = next(iter(found.by_contender))
    assert slowest == "magi-1"
    told = "\n".join(budget.sentences(found))
    assert f"the bottleneck is magi-1 with {74 * 770 / 3600:.1f} h" in told
    assert "on 64 GPUs" in told and {costs[name].device for name in ("reward-forcing", "rolling-forcing")} == {"H100", "a GPU"}
    assert "rfbench env magi-1" in told and "rfbench env vbench" in told and "rfbench fetch wan/reward-forcing" in told
    self_forcing = [one for one in found.downloads if one.repo == "gdhe17/Self-Forcing"]
    assert [one.bytes for one in self_forcing] == [5676252553]
    lists = [one for one in found.downloads if one.repo == "guandeh17/Self-Forcing"]
    assert [(one.file, one.command) for one in lists] == [("prompts/vbench/all_dimension_extended.txt", "rfbench fetch vbench-forcing")]
    encoder = [one for one in found.downloads if one.file == "models_t5_umt5-xxl-enc-bf16.pth"]
    assert len(encoder) == 1 and {"reward-forcing", "skyreels-v2"} <= set(encoder[0].for_)
    assert found.download_bytes == sum(one.bytes or 0 for one in found.downloads) > 11361920418 + 5676252553


def test_a_share_and_a_limit_make_it_cheaper(folders):
    share = by_name(budget.estimate(studies.plan_of("table1-short@0.1")))["nova"]
    assert (share.suite, share.clips) == ("vbench-forcing@0.1", 95 * 5)
    assert by_name(budget.estimate(studies.plan_of("table2-long", limit=3)))["longlive"].clips == 3


def test_hours_by_a_profile_of_the_same_settings(folders, tmp_path):
    """A profile whose contender has another name counts; one of other settings does not."""
    path = models.write(tmp_path, "base")
    contenders = [{"name": "a", "baseline": path}, {"name": "b", "baseline": path, "set": {"sampler.shift": 3.0}}]
    plain = {"title": "t", "suites": ["smoke"], "scorers": ["motion"], "contenders": contenders}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(plain))
    plan = studies.plan_of(str(tmp_path / "tiny.yaml"))
    unknown = budget.estimate(plan)
    assert unknown.unknown == ("a", "b") and unknown.hours == 0
    assert (
        "making clips takes one GPU at least 0 s" in budget.sentences(unknown)[0] and "nobody says how fast a, b are" in budget.sentences(unknown)[1]
    )
    _profile(folders, plan.members[0], seconds=(9.0, 10.0, 12.0))
    costs = by_name(budget.estimate(plan, gpus=2))
    assert costs["a"].fps == pytest.approx(8.1) and costs["a"].device == "cpu"  # 81 frames in the middle one's 10 s
    assert costs["a"].hours == pytest.approx(2 * 33 / 8.1 / 3600) and costs["a"].wall_hours == pytest.approx(33 / 8.1 / 3600)
    assert costs["b"].fps is None
    told = budget.sentences(budget.estimate(plan, gpus=2))  # what is known was measured on a CPU
    assert "takes one CPU at least 8.1 s" in told[0] and told[2].startswith("on 2 CPUs")


def test_a_training_that_is_shorter_than_its_recipe_takes_less(folders):
    """Toy studies take a quarter of the steps; the text of the recipe is about all of them."""
    found = budget.estimate(studies.plan_of("toy", only=["self-forcing", "reward-forcing"]))
    assert [(work.steps, work.of) for work in found.trainings] == [(60, 240)] * 3
    assert found.trainings[0].needs == "2 cores, 2 GB of memory, about 45 s"
    told = [line for line in budget.sentences(found) if line.startswith("to train")]
    assert len(told) == 2 and "toy/reward-forcing-s0, toy/reward-forcing-s1: 60 of 240 steps of toy/reward-forcing, each" in told[1]
    whole = budget.estimate(studies.plan_of("toy-full", only=["self-forcing"])).trainings[-1]
    assert whole.steps == whole.of and whole.needs == config.load(Recipe, whole.recipe).needs


def test_a_variant_with_other_weights_alone_is_as_fast(folders):
    costs = by_name(budget.estimate(studies.plan_of("table3-ablation", only=["reward-forcing", "no-redmd", "no-sink"])))
    assert costs["no-redmd-s0"].fps == costs["reward-forcing-s0"].fps == 23.1 and costs["no-sink-s0"].fps is None


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (None, "?"),
        (0, "0 s"),
        (1.4 / 3600, "1.4 s"),
        (42.44 / 3600, "42.4 s"),
        (7.5 / 60, "7.5 min"),
        (1, "1 h"),
        (19.46, "19.5 h"),
        (1243.6, "1,244 h"),
    ],
)
def test_a_time_is_said_in_its_unit(hours: float | None, said: str):
    assert budget.lasting(hours) == said


def _profile(folders: Path, member: studies.Member, seconds: tuple[float, ...]) -> None:
    directory = folders / "runs" / "profile" / "other" / "cpu"
    chunk = {"index": 0, "frames": 81, "begin": 0.1, "denoised": 0.2, "cached": None}
    turn = {"contender": "x", "fps": 16, "stream": [], "switched": None, "peak_bytes": 1, "reserved_bytes": None, "device_bytes": None}
    turn |= {"cold_start_s": None}
    rounds = [{"process": 0, "number": i, "turns": [turn | {"clip": [chunk | {"readable": second}]}]} for i, second in enumerate(seconds)]
    directory.mkdir(parents=True)
    (directory / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rounds))
    assert isinstance(member.cfg, Baseline)
    prepared = Prepared("x", member.cfg, None)
    inputs = {"contenders": {"x": prepared.inputs()}, "chunks": 5, "repeats": len(seconds), "processes": 1}
    run = Run("profile", "other/cpu", inputs, records.fingerprint(inputs), provenance.environment(), DONE)
    run.result["rounds_sha256"] = records.sha256_of(directory / "rounds.jsonl")
    records.write_run(directory, run)


def test_a_study_with_a_contender_of_another_interpreter(fake, folders):
    """It is run, scored and reported; what fails there is said at the end and keeps nobody from their turn."""
    told = yaml.safe_load((fake / "fake.yaml").read_text()) | {"settings": {}}  # a record holds no path of this machine
    (fake / "fake.yaml").write_text(yaml.safe_dump(told))
    runner = fake / "runners" / "fake.py"
    runner.write_text(runner.read_text().replace('settings["broken"]', 'settings["weights"].replace("scale.pt", "broken")'))
    own = models.write(fake, "base")
    four = str(fake / "four.jsonl")
    contenders = [{"name": "fake", "baseline": str(fake / "fake.yaml"), "suites": [four]}, {"name": "base", "baseline": own, "suites": ["smoke"]}]
    plain = {"title": "t", "suites": [four, "smoke"], "scorers": ["flicker"], "contenders": contenders}
    path = fake / "mixed.yaml"
    path.write_text(yaml.safe_dump(plain))
    (fake / "four.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("it is fine", "it is narrow")))
    (fake / "broken").touch()
    plan = studies.plan_of(str(path), only=["fake"])
    assert by_name(budget.estimate(plan))["fake"].hours is None
    with pytest.raises(UserError, match=r"index\.html is written without what failed: 1 of 2 clips failed"):
        reproduce.reproduce(str(path), limit=2)
    rows = (folders / "reports" / "mixed" / "leaderboard.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:] if ",number," in row} == {"base"}
    assert "Incomplete: mixed/fake/four failed: 1 of 2 clips failed (first" in (folders / "reports" / "mixed" / "README.md").read_text()
    (fake / "broken").unlink()
    left = by_name(budget.estimate(plan))["fake"]
    assert (left.clips, left.there, left.fps, left.disk_measured) == (2, 1, 9 / 1.5, True)  # stamps end at 1.5 s
    assert left.hours == pytest.approx(9 / 6 / 3600)
    reproduce.reproduce(str(path))
    rows = (folders / "reports" / "mixed" / "leaderboard.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:] if ",number," in row} == {"fake", "base"}
    assert by_name(budget.estimate(plan))["fake"].hours == 0
    assert external.failures(folders / "runs" / "bench" / "mixed" / "fake" / "four") == []


def test_the_command_line_has_it_as_json(folders, capsys):
    code, out, err = call(capsys, "reproduce", "fps", "--gpus", "8", "--json")
    found = json.loads(out)
    assert code == 0 and found["gpus"] == 8 and len(found["costs"]) == 7 and "the bottleneck is" in err
    assert found["totals"]["hours"] == pytest.approx(sum(cost["hours"] for cost in found["costs"]))
    assert not (folders / "runs").exists()
