"""What a person writes is either used as written or refused with a sentence: schemas, files, overrides, settings."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import rfbench
from rfbench import config, strict
from rfbench.config import Baseline, CacheCfg, External, Recipe, Study
from rfbench.errors import UserError
from rfbench.settings import HOME, Hardware, PathsCfg, SettingsFile, settings, settings_file

SHIPPED = [(kind, name) for kind in (Recipe, Baseline, Study) for name in config.names_of(kind)]
FILES = pytest.mark.parametrize(("kind", "name"), SHIPPED, ids=[f"{kind.__name__}-{name}" for kind, name in SHIPPED])

BASELINE: dict[str, Any] = {
    "title": "A student",
    "backbone": "toy",
    "weights": {"file": "x.safetensors"},
    "sampler": {"steps": [1000, 500], "shift": 5.0, "cache": {"policy": "window", "window": 9}},
    "license": {"code": "apache-2.0", "weights": "apache-2.0"},
}


def schemas(kind: Any) -> set[type]:
    """All dataclasses that a value of `kind` can hold."""
    if dataclasses.is_dataclass(kind):
        inner = (schemas(hint) for hint in typing.get_type_hints(kind).values())
        return {typing.cast(type, kind)}.union(*inner)
    return set().union(*(schemas(part) for part in typing.get_args(kind)))


def mappings(kind: Any, value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path to every mapping of a parsed file that stands for a dataclass (mappings of free keys are left out)."""
    found = []
    for choice in (kind, *typing.get_args(kind)):
        if dataclasses.is_dataclass(choice) and isinstance(value, dict):
            found.append(at)
            for key, hint in typing.get_type_hints(choice).items():
                found += mappings(hint, value.get(key), (*at, key))
        elif typing.get_origin(choice) is tuple and isinstance(value, list):
            for i, part in enumerate(value):
                found += mappings(typing.get_args(choice)[0], part, (*at, i))
    return list(dict.fromkeys(found))


def written(folder: Path, plain: Any) -> str:
    path = folder / "baseline.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


def test_something_ships():
    assert {kind for kind, _ in SHIPPED} == {Recipe, Baseline, Study}


@FILES
def test_a_shipped_file_loads_and_survives_being_written_out(kind, name):
    noun = config.load(kind, name)
    assert strict.build(kind, strict.as_plain(noun), where=name) == noun


@FILES
def test_an_unknown_key_is_refused_wherever_it_stands(kind, name):
    path = config.find(kind, name)
    places = mappings(kind, yaml.safe_load(path.read_text()))
    assert () in places
    for place in places:
        plain = yaml.safe_load(path.read_text())
        here = plain
        for key in place:
            here = here[key]
        here["surprise"] = 1
        with pytest.raises(UserError, match="unknown key 'surprise'"):
            strict.build(kind, plain, where=name)


@FILES
def test_what_a_shipped_file_names_exists(kind, name):
    """Suites, scorers, methods, contenders and their files, claims about contenders and metrics that there are."""
    from rfbench.registry import pick
    from rfbench.scorers.base import SCORERS
    from rfbench.suites import SUITES

    noun = config.load(kind, name)
    if isinstance(noun, Recipe):
        from rfbench.methods.base import METHODS

        assert noun.method in METHODS
    if isinstance(noun, Study):
        names = [contender.name for contender in noun.contenders]
        assert len(set(names)) == len(names)
        assert set(noun.suites) <= set(SUITES) and set(noun.scorers) <= set(SCORERS)
        for contender in noun.contenders:
            if contender.baseline:
                told: type = External if config.is_external(contender.baseline) else Baseline
                config.load(told, contender.baseline, contender.set)
            if contender.recipe:
                config.load(Recipe, contender.recipe, contender.set)
            assert contender.of is None or contender.of in names
            assert set(contender.suites or ()) <= set(noun.suites)
        metrics = {f"{scorer}.{metric}" for scorer in noun.scorers for metric in pick(SCORERS, scorer, what="scorer").metrics}
        for claim in noun.claims:
            assert {claim.better, claim.than} <= set(names)
            assert claim.metric in metrics or claim.metric.startswith("profile.")
            assert (claim.suite is None) == claim.metric.startswith("profile.") and claim.suite in (None, *noun.suites)


def test_every_field_is_read_by_some_code():
    """A field that is only checked by the schema itself does not count as read."""
    read: set[str] = set()
    for path in Path(rfbench.__file__).parent.rglob("*.py"):
        if path.name in ("config.py", "learning.py"):
            continue
        read |= {
            node.attr
            for node in ast.walk(ast.parse(path.read_text(), str(path)))
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
        }
    fields = {
        f"{kind.__name__}.{field.name}": field.name
        for noun in (Recipe, Baseline, Study)
        for kind in schemas(noun)
        for field in dataclasses.fields(kind)
    }
    assert len(fields) > 60
    assert [where for where, name in fields.items() if name not in read] == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"titel": "x"}, "unknown key 'titel'; did you mean 'title'"),
        ({"title": 3}, "title: expected str, found 3"),
        ({"title": None}, "title: expected str, found None"),
        ({"max_latents": 1.5}, "max_latents: expected int, found 1.5"),
        ({"max_latents": True}, "max_latents: expected int, found True"),
        ({"saw": "motion.speed"}, "saw: expected a list"),
        ({"license": {"code": "mit"}}, "license: 'weights' is missing"),
        ({"sampler": {"steps": 4, "shift": 5.0, "chunk": None, "warp": False}}, "needs a list of timesteps"),
        ({"sampler": {"steps": 4, "shift": 5.0}}, "a cache exactly when it has a chunk"),
        ({"sampler": {"steps": 4, "shift": 5.0, "chunk": None, "solver": "heun"}}, "'heun' is not one of renoise, euler"),
        ({"sampler": {"steps": [4.5], "shift": 5.0}}, r"steps\[0\]: expected int"),
        ([], "expected a mapping"),
        ("title: [", "not valid YAML"),
        ("title: ${nowhere}", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_one_sentence(tmp_path, change, sentence):
    if isinstance(change, str):
        (tmp_path / "baseline.yaml").write_text(change)
        name = str(tmp_path / "baseline.yaml")
    else:
        name = written(tmp_path, BASELINE | change if isinstance(change, dict) else change)
    with pytest.raises(UserError, match=sentence) as caught:
        config.load(Baseline, name)
    assert "\n" not in str(caught.value) and caught.value.code == 2


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("sampler.shfit=3", "SamplerCfg has no field 'shfit'; did you mean 'shift'"),
        ("shift", "is not KEY=VALUE"),
        ("title.x=1", "nothing below 'title'"),
        ("sampler.chunk=three", "expected int, found 'three'"),
        ("sampler.cache.window=null", "cache policy 'window' needs 'window'"),
        ("sampler.cache.sink=3", "cache policy 'window' does not use 'sink'"),
        ("sampler.cache.policy=windw", "does not exist; did you mean 'window'"),
    ],
)
def test_a_wrong_override_is_refused_with_one_sentence(tmp_path, override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        config.load(Baseline, written(tmp_path, BASELINE), [override])
    assert "\n" not in str(caught.value) and caught.value.code == 2


@given(
    shift=st.floats(0.5, 20),
    window=st.integers(1, 50),
    steps=st.lists(st.integers(1, 1000), min_size=1, max_size=5),
    warp=st.booleans(),
)
def test_an_override_is_the_same_as_editing_the_file(tmp_path_factory, shift, window, steps, warp):
    folder = tmp_path_factory.mktemp("config")
    overrides = [f"sampler.shift={shift!r}", f"sampler.cache.window={window}", f"sampler.steps={steps}", f"sampler.warp={str(warp).lower()}"]
    edited = {**BASELINE, "sampler": {"steps": steps, "shift": shift, "warp": warp, "cache": {"policy": "window", "window": window}}}
    left = config.load(Baseline, written(folder, BASELINE), overrides)
    assert left == config.load(Baseline, written(folder, edited))


def test_a_mapping_of_overrides_sets_null_too(tmp_path):
    changed = config.load(Baseline, written(tmp_path, BASELINE), {"sampler.chunk": None, "sampler.cache": None, "max_latents": 21})
    assert (changed.sampler.chunk, changed.sampler.cache, changed.max_latents) == (None, None, 21)


def test_cache_settings_are_exactly_those_that_the_policy_uses():
    uses = {"full": "", "window": "w", "static_sink": "ws", "ema_sink": "wsaf"}
    values = {"w": ("window", 9), "s": ("sink", 3), "a": ("alpha", 0.9), "f": ("fold_dtype", "float32")}
    for policy, letters in uses.items():
        for given_letters in itertools.chain.from_iterable(itertools.combinations(values, n) for n in range(5)):
            fields: dict[str, Any] = dict(values[letter] for letter in given_letters)
            if set(given_letters) == set(letters):
                CacheCfg(policy, **fields)
            else:
                with pytest.raises(UserError, match=f"cache policy '{policy}'"):
                    CacheCfg(policy, **fields)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="there is no recipe 'toy/techer'; did you mean 'toy/teacher'"):
        config.load(Recipe, "toy/techer")
    with pytest.raises(UserError, match=r"baseline nowhere\.yaml: there is no such file"):
        config.load(Baseline, "nowhere.yaml")


def test_settings_start_at_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "machine").mkdir()
    file = tmp_path / "machine" / "rfbench.toml"
    file.write_text('[paths]\nruns = "here"\nweights = "/models"\n[hardware.big]\ntitle = "Big"\nmatch = "BIG 9"\ntflops = {float32 = 1}\n')
    monkeypatch.setenv("RFBENCH_TOML", str(file))
    found = settings()
    assert (found.runs, found.weights, found.reports) == (tmp_path / "machine" / "here", Path("/models"), tmp_path / "machine" / "reports")
    assert found.hardware["big"].tflops == {"float32": 1.0}
    assert found.hardware_name("NVIDIA Big 9 (80GB)") == "big"
    assert found.hardware_name("Other/Card (TM) 3") == "other-card-tm-3"


def test_settings_of_the_current_directory_come_before_the_checkout(tmp_path, monkeypatch):
    monkeypatch.delenv("RFBENCH_TOML")
    monkeypatch.chdir(tmp_path)
    assert settings_file() == HOME / "rfbench.toml"
    (tmp_path / "rfbench.toml").write_text("")
    assert settings().runs == tmp_path / "runs"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[path]\n", "unknown key 'path'; did you mean 'paths'"),
        ("[paths]\nrun = 'x'\n", "unknown key 'run'; did you mean 'runs'"),
        ("[hardware.x]\ntitle = 'X'\n", "'match' is missing"),
        ("[hardware.x]\ntitle = 'X'\nmatch = 'X'\ntflops = {float32 = 'fast'}\n", "expected float, found 'fast'"),
        ("[paths\n", "not valid TOML"),
        (
            "[paths]\nruns = 's3://bucket/runs'\n",
            "'runs' is s3://bucket/runs, and an object store cannot hold it; name a disk, and the store as 'mirror'",
        ),
    ],
)
def test_wrong_settings_are_refused_with_one_sentence(folders, text, sentence):
    (folders / "rfbench.toml").write_text(text)
    with pytest.raises(UserError, match=sentence) as caught:
        settings()
    assert "\n" not in str(caught.value)


def test_a_settings_file_that_is_named_has_to_exist(monkeypatch):
    monkeypatch.setenv("RFBENCH_TOML", "/nowhere/rfbench.toml")
    with pytest.raises(UserError, match="RFBENCH_TOML is /nowhere"):
        settings()


def test_the_shipped_settings_call_devices_by_their_names(monkeypatch):
    monkeypatch.setenv("RFBENCH_TOML", str(HOME / "rfbench.toml"))
    found = settings()
    names = {"cpu": "cpu", "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA A100-SXM4-80GB": "a100"}
    assert {device: found.hardware_name(device) for device in names} == names
    assert schemas(SettingsFile) > {PathsCfg, Hardware}


def test_a_study_over_a_share_of_its_prompts_has_it_in_every_name() -> None:
    whole, some = config.load(Study, "toy"), config.load(Study, "toy@0.250")
    assert some.suites == tuple(f"{suite}@0.25" for suite in whole.suites) and "0.25 of the prompts" in some.title
    assert {claim.suite for claim in some.claims} <= {*some.suites, None}
    assert {suite for contender in some.contenders for suite in contender.suites or ()} <= set(some.suites)
    assert config.name_of("toy@0.25") == "toy@0.25" and config.name_of("there/mine.yaml@0.25") == "mine@0.25"
    with pytest.raises(UserError, match="'2' is no share of its prompts"):
        config.load(Study, "toy@2")


@pytest.mark.parametrize("field", ["sampler.steps=[]", "sampler.steps=[1000,-5]", "sampler.shift=-3", "sampler.chunk=0", "sampler.cache.window=0"])
def test_a_number_that_no_sampler_can_run_with_is_refused_before_it_runs(field: str) -> None:
    with pytest.raises(UserError, match=field.split("=")[0].split(".")[-1]):
        config.load(Baseline, "toy/ode-init", [field])


@pytest.mark.parametrize("name", ["steps", "batch", "accumulate", "checkpoint_every"])
def test_a_recipe_counts_from_one(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} is 0"):
        config.load(Recipe, "toy/self-forcing", [f"{name}=0"])


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(b"\xd8\x00title: a")
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(Recipe, str(tmp_path / "broken.yaml"))
