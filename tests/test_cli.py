"""The command line: quick to answer, one sentence for a mistake, stdout for data, and requests passed on as they were made."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rfbench import cli, config, records
from rfbench.errors import UserError
from rfbench.settings import HOME

ROOT = Path(HOME)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rfbench.cli", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True)


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    out, err = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out, err


Call = tuple[tuple[Any, ...], dict[str, Any]]


def noting(calls: list[Call], result: Path) -> Callable[..., Path]:
    """A verb that only notes what it is asked for."""

    def verb(*given: Any, **how: Any) -> Path:
        calls.append((given, how))
        return result

    return verb


def test_compat_is_another_scorer(monkeypatch, folders, capsys):
    calls: list[Call] = []
    monkeypatch.setattr("rfbench.evaluate.evaluate", noting(calls, folders))
    monkeypatch.setattr(cli, "_run", Path)
    assert call(capsys, "eval", "x", "-s", "vbench, vbench-long", "--compat")[0] == 0
    assert calls[0][0] == (Path("x"), ["vbench-compat", "vbench-long-compat"])


def test_help_is_quick_because_it_loads_nothing_heavy():
    """CPU seconds, so that a busy machine does not fail it; the first run may have to compile what the second one loads."""
    run("--help", PYTHONDONTWRITEBYTECODE="")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr == ""
    for verb in ("reproduce", "train", "generate", "sample", "eval", "profile", "report", "list", "doctor"):
        assert re.search(rf"\b{verb}\b", done.stdout)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5
    code = "import sys, rfbench.cli; print({'torch', 'pandas', 'numpy', 'matplotlib', 'omegaconf', 'yaml', 'rich'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian", "x"], "No such command 'trian'. Did you mean 'train'? (see `rfbench --help`)"),
        (["train", "x", "--frsh"], "No such option: --frsh (Possible options: --fresh, --share) (see `rfbench train --help`)"),
        (["train"], "Missing argument 'RECIPE' (see `rfbench train --help`)"),
        (["list", "studie"], "'studie' cannot be listed; did you mean 'studies'?"),
        (["eval", "nobody/toy-short"], "there is no run 'nobody/toy-short'; there is none"),
        (["eval", "x", "-s", "motion", "--compat"], "--compat: 'motion' has no other habits than its original; it is for -s vbench, vbench-long"),
        (["eval", "x", "--compat"], "--compat: name a scorer; it is for -s vbench, vbench-long"),
        (["generate", "toy/teacher", "--limit", "0"], "Invalid value for '--limit'"),
        (["sample", "toy/teacher", "a red disc", "--seed", "-1"], "Invalid value for '--seed'"),
        (["generate", "toy/teacher", "--engine", "slurm"], "--engine slurm: there are 'here' and 'ray'"),
        (["generate", "toy/teacher", "--workers", "2"], "--workers is for --engine ray; leave it out, or use --shard"),
        (["generate", "toy/teecher"], "there is no baseline 'toy/teecher'; did you mean 'toy/teacher'?"),
        (["train", "toy/techer"], "there is no recipe 'toy/techer'; did you mean 'toy/teacher'?"),
        (["train", "toy/teacher", "stesp=3"], "'stesp': Recipe has no field 'stesp'; did you mean 'steps'?"),
        (["profile", "toy/teacher", "--train", "--chunks", "5"], "--ladder, --train, --batch, --streams take one baseline"),
        (["train", "toy/teacher", "--name", "../../x"], "a run cannot be called '../../x'"),
        (["generate", "toy/teacher", "--suite", "toy-shrot"], "there is no suite 'toy-shrot'; did you mean 'toy-short'?"),
        (["generate", "toy/teacher", "--suite", "smoke", "--shard", "3/2"], "--shard 3/2: write I/N with I from 1 to N"),
        (["eval", "x", "-s", "motoin"], "there is no run 'x'"),
        (["profile", "toy/teecher"], "there is no baseline 'toy/teecher'"),
        (["report", "x"], "there is no run 'x'"),
        (["reproduce", "tyo"], "there is no study 'tyo'; did you mean 'toy'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request_is_one_sentence_and_exit_2(capsys, folders, arguments, sentence):
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {sentence}") and err.count("\n") == 1
    assert not (folders / "runs").exists(), "a wrong request leaves nothing behind"


def test_errors_end_the_process_as_they_should(capsys, monkeypatch):
    from rfbench import train

    def raising(error):
        def verb(*_: object, **__: object) -> Path:
            raise error

        monkeypatch.setattr(train, "train", verb)
        return call(capsys, "train", "toy/teacher")

    assert raising(UserError("the disk is [full]", code=1)) == (1, "", "error: the disk is [full]\n")
    assert raising(OSError(28, "No space left on device", "x.mp4")) == (
        *(1, ""),
        "error: the disk is full (x.mp4); free space, then the same command goes on from here\n",
    )
    assert raising(KeyboardInterrupt()) == (130, "", "error: interrupted; the same command goes on from here\n")
    for bug in (ZeroDivisionError("a bug"), OSError(5, "Input/output error")):
        with pytest.raises(type(bug)):
            raising(bug)


def test_a_bug_is_a_traceback_and_exit_1(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import rfbench.listing\nrfbench.listing.ROWS['suites'] = lambda: 1 / 0\n")
    done = run("list", "suites", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1 and done.stdout == ""
    assert "Traceback" in done.stderr and done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


HERE = {"engine": "here", "workers": None}


@pytest.mark.parametrize(
    ("module", "verb", "arguments", "positional", "named"),
    [
        (
            *("train", "train", ["toy/teacher", "seed=1", "--fresh", "batch=2"]),
            ("toy/teacher", ["seed=1", "batch=2"]),
            {"name": None, "fresh": True, "dry_run": False, "share": None, "offload": False, "tracker": None},
        ),
        (
            *("generate", "generate", ["toy/x", "--suite", "smoke", "--shard", "1/2", "--limit", "3", "--name", "n", "--dry-run"]),
            *(("toy/x", "smoke", []), {"name": "n", "limit": 3, "shard": "1/2", "random_weights": False, "fresh": False, "dry_run": True} | HERE),
        ),
        (
            *("generate", "sample", ["toy/x", "a red disc", "sampler.shift=3", "--seed", "7", "--out", "y.mp4"]),
            *(("toy/x", "a red disc", ["sampler.shift=3"]), {"then": [], "given": None, "seed": 7, "frames": None, "out": Path("y.mp4")}),
        ),
        (
            *("reproduce", "reproduce", ["toy", "--only", "a", "--only", "b", "--limit", "2"]),
            *(("toy",), {"only": ["a", "b"], "limit": 2, "fresh": False, "out": None}),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_reaches_its_verb_as_it_was_made(capsys, tmp_path, monkeypatch, module, verb, arguments, positional, named):
    import importlib
    import inspect

    loaded = importlib.import_module(f"rfbench.{module}")
    inspect.signature(getattr(loaded, verb)).bind(*positional, **named)
    calls: list[Call] = []
    monkeypatch.setattr(loaded, verb, noting(calls, tmp_path / "made"))
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, verb, *arguments)
    assert (code, err, calls) == (0, "", [(positional, named)])
    assert out == "made\n"


def test_a_profile_is_asked_for_as_it_was_typed_and_answers_in_json(capsys, tmp_path, monkeypatch):
    from rfbench import profiling

    calls: list[Call] = []
    monkeypatch.setattr(profiling, "profile", noting(calls, tmp_path / "made"))
    monkeypatch.setattr(profiling, "document", lambda directory, compare: {"name": directory.name, "timings": {"x": {}}, "compare": compare})
    monkeypatch.chdir(tmp_path)
    arguments = ["toy/x", "a=1", "toy/y", "--compare", "--chunks", "5", "--random-weights", "--json"]
    wanted = {"name": None, "compare": True, "chunks": 5, "repeats": 9, "processes": 1, "random_weights": True, "fresh": False}
    assert call(capsys, "profile", *arguments) == (0, '{"path": "made", "name": "made", "timings": {"x": {}}, "compare": true}\n', "")
    assert calls == [((["toy/x", "a=1", "toy/y"],), wanted)]


def a_run(folder: Path) -> Path:
    records.write_run(folder, records.Run("generate", "x/smoke", {}, "f" * 64, {}, status="done", seconds=1.5, result={"clips": 2}))
    return folder


def test_a_run_is_found_by_name_and_by_path(capsys, folders, monkeypatch):
    from rfbench import evaluate, report

    calls: list[Call] = []
    directory = a_run(folders / "runs" / "bench" / "x" / "smoke")
    monkeypatch.setattr(evaluate, "evaluate", noting(calls, directory))
    monkeypatch.setattr(report, "report", noting(calls, folders / "reports" / "index.html"))
    for spelled in ("x/smoke", str(directory)):
        code, out, _ = call(capsys, "eval", spelled, "-s", "motion", "--json")
        assert code == 0 and json.loads(out)["result"] == {"clips": 2} and json.loads(out)["status"] == "done"
    assert calls == [((directory, ["motion"]), {"against": None, "partial": False, "fresh": False} | HERE)] * 2
    assert call(capsys, "eval", "x/smok")[2] == "error: there is no run 'x/smok'; did you mean 'x/smoke'?\n"
    assert call(capsys, "report", "x/smoke", "--check")[0] == 0
    assert calls[-1] == (([directory],), {"study": None, "out": folders / "reports", "record": False, "check": True, "embed": False})


@pytest.mark.parametrize("what", cli.WHAT)
def test_lists_are_tables_for_people_and_json_for_programs(capsys, what):
    code, out, err = call(capsys, "list", what, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "") and all(row["name"] and row["title"] for row in rows)
    assert not [row for row in rows if row["title"].startswith("not usable")]
    code, out, err = call(capsys, "list", what)
    assert (code, err) == (0, "") and all(row["name"] in out for row in rows)


def test_lists_name_what_can_be_loaded(capsys):
    from rfbench import listing

    assert tuple(listing.ROWS) == cli.WHAT
    names = {what: [row["name"] for row in json.loads(call(capsys, "list", what, "--json")[1])] for what in ("recipes", "studies", "suites")}
    assert names["recipes"] == list(config.names_of(config.Recipe)) and names["studies"] == list(config.names_of(config.Study))
    assert names["suites"] == ["toy-short", "toy-long", "smoke", "vbench", "vbench-extended", "vbench-forcing", "moviegen-60s"]


def test_a_broken_file_does_not_hide_the_others(capsys, folders):
    made = folders / "runs" / "train" / "mine" / "baseline.yaml"
    made.parent.mkdir(parents=True)
    made.write_text("titel: x\n")
    rows = json.loads(call(capsys, "list", "baselines", "--json")[1])
    assert next(row for row in rows if row["name"] == str(made))["title"].startswith("not usable: ")
    assert len(rows) == 1 + len(config.names_of(config.Baseline)) + len(config.names_of(config.External))


def test_the_doctor_says_what_is_wrong_and_what_to_do(capsys, folders):
    code, out, _ = call(capsys, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0 and {"python", "torch", "disk", "video", "scorer motion"} <= set(checks)
    assert all(check["fix"] for check in checks.values() if check["state"] != "ok")
    assert checks["video"]["state"] == "ok"
    assert list((folders / "runs").iterdir()) == []
    (folders / "rfbench.toml").write_text("[paths]\nruns = 'rfbench.toml'\n")
    code, out, _ = call(capsys, "doctor")
    assert code == 1 and re.search(r"broken\s+disk", out)


def test_completion_knows_the_names(tmp_path):
    for words, expected in (("rfbench train toy/", "toy/teacher"), ("rfbench generate x --suite toy-", "toy-long"), ("rfbench li", "list")):
        count = len(words.split()) - 1
        done = run(_RFBENCH_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(count))
        assert expected in done.stdout.split(), (words, done.stderr)


def test_the_doctor_gives_the_command_that_mends(capsys):
    _, out, _ = call(capsys, "doctor", "--json")
    fixes = {check["name"]: check["fix"] for check in json.loads(out)}
    assert fixes["baseline wan/causvid"] == "rfbench fetch wan/causvid" and fixes["environment nova"] == "rfbench env nova"
    assert fixes["baseline toy/teacher"] == ""


@pytest.mark.parametrize("name", ["../x", "", "a b", "/x", "a//b", ".", "a/../b", "-x"])
@pytest.mark.parametrize(
    "command", [["train", "toy/teacher"], ["generate", "toy/ode-init"], ["profile", "toy/ode-init"]], ids=lambda command: command[0]
)
def test_a_name_that_leads_elsewhere_is_refused(command, name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, f"--name={name}"])
    assert ended.value.code == 2 and "a run cannot be called" in capsys.readouterr().err


def test_a_file_where_a_folder_should_be_is_one_sentence(tmp_path, capsys, monkeypatch):
    def report(*_, **__):
        (tmp_path / "file" / "below").mkdir(parents=True)

    (tmp_path / "file").touch()
    monkeypatch.setattr("rfbench.generate.generate", report)
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", "toy/ode-init"])
    assert ended.value.code == 1 and "name another place" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["/proc/x", "{folder}/file/x"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(place, capsys, tmp_path):
    """What was asked for may take days, and its report would be the last of it."""
    (tmp_path / "file").touch()
    out, one, other = place.format(folder=tmp_path), tmp_path / "one", tmp_path / "other"
    for directory in (one, other):
        records.write_run(directory, records.Run("generate", f"{directory.name}/smoke", {}, "0", {}))
    before = sorted(tmp_path.rglob("*"))
    page = ("compare", str(one), str(other), "--out", f"{out}.html")
    for command in (
        ("report", "--out", out),
        ("reproduce", "toy", "--out", out),
        ("export", str(one), out),
        ("export", str(one), f"{out}.zip"),
        page,
    ):
        code, told, error = call(capsys, *command)
        assert (code, told) == (2, "") and "no file can be written there (" in error and error.endswith("); name another place\n")
    assert sorted(tmp_path.rglob("*")) == before
