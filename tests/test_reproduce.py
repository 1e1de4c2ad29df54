"""What a study asks for, in which order, what is refused before any work; and a tiny study from nothing to its report."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml

from rfbench import config, filming, records, reproduce, stopwatch, studies, train
from rfbench.config import Baseline
from rfbench.errors import UserError
from rfbench.report import evidence
from tests import models
from tests.test_profiling import switch_off

OPTIM = {"lr": 1.0e-3}
FLOW = {
    "title": "Tiny teacher",
    "method": "flow",
    "backbone": "toy",
    "steps": 2,
    "batch": 2,
    "latents": 3,
    "optim": OPTIM,
    "data": {"clips": 2, "drop_caption": 0.1},
    "sampler": models.TEACHER,
    "max_latents": 21,
    "log_every": 1,
    "checkpoint_every": 2,
}
ODE = FLOW | {
    "title": "Tiny student",
    "method": "ode",
    "init": {"file": "teacher.safetensors"},
    "data": {"pairs": 2, "pair_sampler": {"steps": 4, "shift": 5.0, "chunk": None, "solver": "euler"}},
    "sampler": models.STUDENT,
    "max_latents": None,
}


def study(folder: Path, contenders: list[dict[str, Any]], **fields: Any) -> str:
    """A study file beside the recipes `flow.yaml` and `ode.yaml` and the baseline `base.yaml`."""
    for name, recipe in {"flow": FLOW, "ode": ODE}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    models.write(folder, "base")
    models.write(folder, "teacher")
    plain = {"title": "A study", "suites": ["smoke"], "scorers": ["motion"], "contenders": contenders} | fields
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plain))
    return str(folder / "tiny.yaml")


def recipe(folder: Path, name: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "recipe": str(folder / f"{kind}.yaml"), **more}


def base(folder: Path, name: str = "base", **more: Any) -> dict[str, Any]:
    return {"name": name, "baseline": str(folder / "base.yaml"), **more}


def test_every_contender_has_a_run_per_training_seed(tmp_path):
    contenders = [
        base(tmp_path),
        base(tmp_path, "forgetful", set={"sampler.cache.alpha": 0.5}),
        recipe(tmp_path, "student", "ode", seeds=[3, 4], set={"steps": 1, "sampler.shift": 3.0}),
        {"name": "variant", "of": "student", "set": {"sampler.cache.alpha": 0.99}},
        {
            "name": "further",
            "of": "variant",
            "set": {"sampler.cache.policy": "static_sink", "sampler.cache.alpha": None, "sampler.cache.fold_dtype": None},
        },
    ]
    plan = studies.plan_of(study(tmp_path, contenders))
    assert [training.name for training in plan.trainings] == ["tiny/student-s3", "tiny/student-s4"]
    assert [training.cfg.seed for training in plan.trainings] == [3, 4]
    assert {(training.cfg.steps, training.cfg.sampler.shift) for training in plan.trainings} == {(1, 3.0)}
    names = {member.name: member for member in plan.members}
    runs = [f"tiny/{name}-s{seed}" for name in ("student", "variant", "further") for seed in (3, 4)]
    assert list(names) == ["tiny/base", "tiny/forgetful", *runs]
    forgetful, itself = "tiny/forgetful", [names[name].timed_as for name in names]
    assert itself == ["tiny/base", forgetful, *["tiny/student-s3"] * 2, *["tiny/variant-s3"] * 2, *["tiny/further-s3"] * 2]
    assert names["tiny/variant-s4"].training == "tiny/student-s4"
    assert Path(names["tiny/variant-s4"].baseline).parts[-4:] == ("train", "tiny", "student-s4", "baseline.yaml")
    caches = {name: member.cfg.sampler.cache for name, member in names.items() if isinstance(member.cfg, Baseline)}
    assert [caches[name].alpha for name in ("tiny/base", "tiny/forgetful", "tiny/student-s3", "tiny/variant-s3", "tiny/further-s3")] == [  # type: ignore[union-attr]
        *(0.9, 0.5, 0.9, 0.99),
        None,
    ]
    assert names["tiny/further-s3"].overrides[0] == "sampler.cache.alpha=0.99"


def test_trainings_come_after_the_weights_that_they_start_from(tmp_path):
    contenders = [
        recipe(tmp_path, "last", "ode", set={"init.file": "run:tiny/middle-s1"}),
        recipe(tmp_path, "middle", "ode", seeds=[0, 1], set={"init.file": "run:tiny/first-s0"}),
        recipe(tmp_path, "first", "flow"),
        recipe(tmp_path, "alone", "ode"),
    ]
    path = study(tmp_path, contenders)
    order = [training.name for training in studies.plan_of(path).trainings]
    assert sorted(order) == ["tiny/alone-s0", "tiny/first-s0", "tiny/last-s0", "tiny/middle-s0", "tiny/middle-s1"]
    assert order.index("tiny/first-s0") < min(order.index("tiny/middle-s0"), order.index("tiny/middle-s1"))
    assert order.index("tiny/middle-s1") < order.index("tiny/last-s0")
    only = studies.plan_of(path, only=["last"])
    assert [training.name for training in only.trainings] == ["tiny/first-s0", "tiny/middle-s1", "tiny/last-s0"]
    assert [member.name for member in only.members] == ["tiny/last-s0"]
    contenders[2] = recipe(tmp_path, "first", "ode", set={"init.file": "run:tiny/last-s0"})
    with pytest.raises(UserError, match="starts from weights that are trained from its own"):
        studies.plan_of(study(tmp_path, contenders))


def claim(**fields: str) -> dict[str, Any]:
    return {"claims": [{"id": "c", "text": "t", "metric": "motion.speed", "suite": "smoke", "better": "base", "than": "base"} | fields]}


@pytest.mark.parametrize(
    ("contenders", "fields", "sentence"),
    [
        ([{"name": "a", "baseline": "toy/nothing"}], {}, "there is no baseline 'toy/nothing'"),
        ([{"name": "a", "recipe": "toy/nothing"}], {}, "there is no recipe 'toy/nothing'"),
        ([{"name": "a", "of": "nobody"}], {}, "'a' is 'of' 'nobody', which is no contender"),
        ([{"name": "a", "of": "b"}, {"name": "b", "of": "a"}], {}, "which leads back to it"),
        (["base", "base"], {}, "two contenders of one name"),
        (["base"], {"suites": ["smok"]}, "there is no suite 'smok'; did you mean 'smoke'?"),
        (["base"], {"scorers": ["motoin"]}, "there is no scorer 'motoin'; did you mean 'motion'?"),
        ([("base", {"suites": ["toy-long"]})], {}, "the study has no suite 'toy-long'"),
        ([("base", {"set": {"sampler.cache.alpa": 0.5}})], {}, "CacheCfg has no field 'alpa'; did you mean 'alpha'?"),
        ([("base", {"set": {"sampler.cache.policy": "window"}})], {}, "cache policy 'window' does not use 'sink'"),
        ([("flow", {"set": {"max_latents": 5}})], {}, "makes clips of at most 17 frames, but suite 'smoke' asks for 33"),
        ([("flow", {"set": {"reward": {"name": "toy_motion", "beta": 1.0}}})], {}, "method 'flow' does not use 'reward'"),
        ([("ode", {"set": {"init.file": "nowhere.safetensors"}})], {}, "weights 'nowhere.safetensors'"),
        ([("ode", {"set": {"init.file": "run:other/teacher-s0"}})], {}, "training run 'other/teacher-s0' has not finished"),
        ([("ode", {}), {"name": "v", "of": "ode", "set": {"sampler.cache.policy": "window"}}], {}, "cache policy 'window' does not use 'sink'"),
        (["base"], claim(than="bass"), "there is no contender 'bass'; did you mean 'base'?"),
        (["base"], claim(metric="motion.sped"), "scorer 'motion' has no metric 'sped'"),
        (["base"], claim(metric="drift.drift"), "the study does not run scorer 'drift'"),
        (["base"], claim(suite="toy-long"), "the study has no suite 'toy-long'"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_any_work(tmp_path, folders, contenders, fields, sentence):
    def spelled(given: Any) -> dict[str, Any]:
        if isinstance(given, dict):
            return given
        kind, more = given if isinstance(given, tuple) else (given, {})
        return base(tmp_path, **more) if kind == "base" else recipe(tmp_path, kind, kind, **more)

    path = study(tmp_path, [spelled(contender) for contender in contenders], **fields)
    with pytest.raises(UserError) as caught:
        reproduce.reproduce(path)
    assert sentence in str(caught.value)
    assert caught.value.code == 2
    assert not (folders / "runs").exists()


def test_only_names_contenders(tmp_path):
    path = study(tmp_path, [base(tmp_path), {"name": "broken", "baseline": "toy/nothing"}])
    assert [member.name for member in studies.plan_of(path, only=["base"]).members] == ["tiny/base"]
    with pytest.raises(UserError, match="has no contender 'bass'; did you mean 'base'"):
        studies.plan_of(path, only=["bass"])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the verbs really do, as they do it."""
    noted: list[str] = []

    def note(owner: Any, name: str, text: str) -> None:
        original = getattr(owner, name)

        def wrapper(*arguments: Any, **how: Any) -> Any:
            noted.append(text)
            return original(*arguments, **how)

        monkeypatch.setattr(owner, name, wrapper)

    note(train.Trainer, "advance", "step")
    note(filming, "film", "film")
    note(stopwatch.Worker, "turn", "turn")
    return noted


def test_a_tiny_study_from_nothing_to_its_report(tmp_path, folders, calls, capsys):
    contenders = [
        recipe(tmp_path, "teacher", "flow"),
        recipe(tmp_path, "student", "ode", seeds=[0, 1], set={"init.file": "run:tiny/teacher-s0", "steps": 1}),
        {"name": "forgetful", "of": "student", "set": {"sampler.cache.alpha": 0.5}},
    ]
    claims = [{"id": "c", "text": "it is faster", "metric": "profile.clip_fps", "better": "student", "than": "teacher"}]
    path = study(tmp_path, contenders, scorers=["motion", "drift"], claims=claims, profile={"chunks": 5, "repeats": 1})
    reproduce.show(studies.plan_of(path))
    told = capsys.readouterr().err
    assert "tiny/student-s1" in told and "to do: 2 steps" in told and "0 of 2 clips" in told
    assert not (folders / "runs").exists()

    reproduce.reproduce(path, only=["teacher"], limit=1)
    assert calls == ["step", "step", "film"]
    assert "timing is left out" in capsys.readouterr().err
    calls.clear()
    assert reproduce.reproduce(path, limit=1) == folders / "reports" / "tiny" / "index.html"
    assert calls == ["step"] * 2 + ["film"] * 4 + ["turn"] * 3
    assert set(evidence.read_timings(folders / "runs" / "profile" / "tiny" / "cpu")) == {
        f"tiny/{name}" for name in ("teacher-s0", "student-s0", "student-s1", "forgetful-s0", "forgetful-s1")
    }
    runs = folders / "runs"
    for seed in (0, 1):
        alphas = [
            records.read_run(runs / "bench" / "tiny" / f"{name}-s{seed}" / "smoke").inputs["baseline"]["sampler"]["cache"]["alpha"]
            for name in ("student", "forgetful")
        ]
        assert alphas == [0.9, 0.5]
        for scorer in ("motion", "drift"):
            assert (runs / "bench" / "tiny" / f"forgetful-s{seed}" / "smoke" / "scores" / f"{scorer}.json").is_file()
    weights = {
        name: records.read_run(runs / "bench" / "tiny" / name / "smoke").inputs["weights_sha256"]
        for name in ("student-s0", "student-s1", "forgetful-s1")
    }
    assert weights["student-s1"] == weights["forgetful-s1"] != weights["student-s0"]
    (verdict,) = csv.DictReader((folders / "reports" / "tiny" / "claims.csv").open(encoding="utf-8"))
    assert verdict["verdict"] == "inconclusive" and "1 round in a process" in verdict["reason"]
    assert float(verdict["improvement"]) != 0

    calls.clear()
    before = {file: file.read_bytes() for file in folders.rglob("*") if file.is_file()}
    reproduce.reproduce(path, limit=1)
    assert calls == []
    assert {file: file.read_bytes() for file in folders.rglob("*") if file.is_file()} == before
    switch_off(folders, "joint")
    with pytest.raises(UserError, match=r"other settings of this machine \(shortcuts\.joint: true -> false\); set them back, or remove it"):
        reproduce.reproduce(path)  # the whole suite, of which nothing is made before
    assert calls == []


def test_shipped_studies_are_planned_without_weights_and_prompts(folders):
    for name in config.names_of(config.Study):
        assert studies.plan_of(name).members
