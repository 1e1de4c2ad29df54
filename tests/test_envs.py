"""Environments, built for real from a tiny package and a git repository that the tests make; no index is asked."""

from __future__ import annotations

import dataclasses
import json
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from rfbench import doctor, envs, listing, records
from rfbench.errors import UserError
from tests.test_cli import call

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir(exist_ok=True)
    about = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")


def repository(folder: Path) -> str:
    """A git repository with one module; its commit."""
    folder.mkdir(parents=True)
    (folder / "upstream.py").write_text("WORD = 'from a commit'\n")
    git = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An environment `tiny` of Python and one package; options that work and one that does not. Built once."""
    folder = tmp_path_factory.mktemp("envs")
    for version in ("1.0", "2.0"):
        wheel(folder / "wheels", "tinypkg", version)
    wheel(folder / "wheels", "extra", "1.0")
    commit = repository(folder / "github" / "someone" / "upstream")
    source = {"repo": "someone/upstream", "commit": commit}
    options = {
        "extra": {"title": "more", "license": "MIT", "packages": ["extra==1.0"], "check": "import extra"},
        "code": {"title": "code", "license": "MIT", "sources": [source], "check": "import upstream; assert upstream.WORD == 'from a commit'"},
        "gone": {"title": "gone", "license": "MIT", "packages": ["not-there==1.0"], "check": ""},
    }
    definition = {"title": "Tiny", "license": "MIT", "python": VERSION, "packages": ["tinypkg"], "check": "import tinypkg", "options": options}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(definition))
    (folder / "tiny.txt").write_text("tinypkg==1.0\n")
    (folder / "rfbench.toml").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RFBENCH_TOML", str(folder / "rfbench.toml"))
        set_up(patch, folder)
        envs.build("tiny")
    return folder


def set_up(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(envs, "FOLDER", folder)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(folder / "wheels"))
    patch.setenv("GIT_CONFIG_COUNT", "1")
    patch.setenv("GIT_CONFIG_KEY_0", f"url.file://{folder / 'github'}/.insteadOf")
    patch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")


@pytest.fixture
def tiny(world, monkeypatch):
    monkeypatch.setenv("RFBENCH_TOML", str(world / "rfbench.toml"))
    set_up(monkeypatch, world)
    return world


def run(python: Path, code: str) -> str:
    return subprocess.run([str(python), "-c", code], env=envs.environ(), cwd="/", check=True, capture_output=True, text=True).stdout.strip()


def test_a_built_environment_has_its_packages_at_their_pins_and_none_of_ours(tiny):
    python = envs.python("tiny")
    assert run(python, "import tinypkg; print(tinypkg.VERSION)") == "1.0", "the pins beside the definition hold"
    code = "import importlib.util as u; print([n for n in ('torch', 'numpy', 'rfbench', 'typer') if u.find_spec(n)])"
    assert run(python, code) == "[]", "neither the packages of this interpreter nor its PYTHONPATH come along"
    built = envs.found("tiny")
    assert built is not None and built.packages["tinypkg"] == "1.0" and built.python.startswith(VERSION)
    assert "tinypkg" in (envs.home("tiny") / "build.log").read_text()


def test_building_again_does_nothing(tiny, capsys):
    before = (envs.home("tiny") / envs.MARKER).stat().st_mtime_ns
    code, out, _ = call(capsys, "env", "tiny")
    assert (code, out.strip()) == (0, str(envs.home("tiny") / "venv/bin/python"))
    assert (envs.home("tiny") / envs.MARKER).stat().st_mtime_ns == before


def test_a_dry_run_prints_commands_that_a_shell_takes(tiny, capsys):
    code, out, _ = call(capsys, "env", "tiny", "--fresh", "--dry-run")
    first, install, check = out.splitlines()
    assert code == 0 and shlex.split(first)[1:3] == ["-m", "venv"] and shlex.split(install)[-3:] == ["-c", str(tiny / "tiny.txt"), "tinypkg"]
    assert shlex.split(check)[-1] == "import tinypkg"
    assert envs.found("tiny"), "a dry run removes nothing"


def test_options_are_added_and_asked_for(tiny, capsys):
    with pytest.raises(UserError, match=r"lacks code; run `rfbench env tiny --with code`"):
        envs.python("tiny", "code")
    assert call(capsys, "env", "tiny", "--with", "code", "--with", "extra")[0] == 0
    assert run(envs.python("tiny", "code"), "import upstream; print(upstream.WORD)") == "from a commit"
    assert envs.source("tiny", "someone/upstream").joinpath("upstream.py").is_file()
    built = envs.found("tiny")
    assert built is not None and built.options == ("code", "extra"), "in the order of the definition"


def test_an_option_that_fails_leaves_the_rest(tiny, capsys):
    code, out, err = call(capsys, "env", "tiny", "--with", "gone")
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: environment 'tiny': packages for gone failed (ERROR: No matching distribution found for not-there==1.0)")
    assert str(envs.home("tiny") / "build.log") in last
    assert envs.python("tiny").exists()


def test_a_changed_definition_is_another_environment(tiny, capsys):
    pins = (tiny / "tiny.txt").read_text()
    try:
        (tiny / "tiny.txt").write_text("tinypkg==2.0\n")
        with pytest.raises(UserError, match="has changed since it was built; run `rfbench env tiny --fresh`"):
            envs.python("tiny")
        code, _, err = call(capsys, "env", "tiny")
        assert code == 2 and "add --fresh to build it again" in err
        assert [row["state"] for row in listing.environments()] == ["built from another definition"]
    finally:
        (tiny / "tiny.txt").write_text(pins)
    assert envs.python("tiny").exists()


def test_half_an_environment_is_none(tiny, capsys):
    marker = envs.home("tiny") / envs.MARKER
    text = marker.read_text()
    marker.unlink()
    try:
        with pytest.raises(UserError, match="not built; run `rfbench env tiny`"):
            envs.python("tiny")
        checks = {check.name: check for check in doctor.examine()}
        assert checks["environment tiny"].state == "missing" and "rfbench env tiny" in checks["environment tiny"].found
    finally:
        marker.write_text(text)
    assert {check.name: check.state for check in doctor.examine()}["environment tiny"] == "ok"
    assert json.loads(text)["packages"] == records.read_json(marker)["packages"]


def test_a_build_that_fails_says_where_and_is_no_environment(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "rfbench.toml").write_text("")
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'error: no room for a venv'\nexit 3\n")
    broken.chmod(0o755)
    code, out, err = call(capsys, "env", "tiny", "--python", str(broken))
    assert (code, out) == (1, "") and "of Python" in err and "(error: no room for a venv)" in err
    assert envs.found("tiny") is None


def test_a_python_that_is_not_there_is_asked_for(monkeypatch):
    with pytest.raises(UserError, match=r"environment 'x' needs Python 9\.9, and none was found; install it .* --python /path/to/python9\.9"):
        envs.find_python("9.9", "x")
    assert run(envs.find_python(VERSION, "x"), "import sys; print('%d.%d' % sys.version_info[:2])") == VERSION


@pytest.mark.parametrize("name", envs.names())
def test_a_shipped_definition_is_pinned_and_printable(name):
    cfg, identity = envs.load(name)
    assert len(identity) == 64 and cfg.title and cfg.license
    parts: list[envs.Environment | envs.Option] = [cfg, *cfg.options.values()]
    for part in parts:
        compile(part.check, name, "exec")
        assert all("==" in line for line in part.packages), "exact versions"
        assert all(len(item.commit) == 40 for item in part.sources)


def test_what_was_built_without_the_gpu_that_is_here_is_refused(tiny, monkeypatch):
    """It would run, on the CPU, and nobody would know why it takes days."""
    built = envs.found("tiny")
    assert built is not None
    monkeypatch.setattr(envs, "found", lambda name: dataclasses.replace(built, packages={"torch": "2.4.0+cpu"}))
    monkeypatch.setattr(envs, "_has_gpu", lambda: False)
    assert envs.python("tiny").is_file()
    monkeypatch.setattr(envs, "_has_gpu", lambda: True)
    with pytest.raises(UserError, match=r"'tiny' was built without a GPU and has torch's CPU build; run `rfbench env tiny --fresh` on this machine"):
        envs.python("tiny")
    monkeypatch.setattr(envs, "found", lambda name: dataclasses.replace(built, packages={"torch": "2.4.0"}))
    assert envs.python("tiny").is_file()


@pytest.mark.parametrize(("programs", "lacks"), [(["nvcc"], "GPU"), (["nvidia-smi"], "nvcc")])
def test_what_has_to_be_compiled_is_not_begun_where_it_cannot_be(tmp_path, monkeypatch, programs, lacks):
    (tmp_path / "rfbench.toml").write_text("")
    monkeypatch.setenv("RFBENCH_TOML", str(tmp_path / "rfbench.toml"))
    for program in programs:
        (tmp_path / program).write_text("")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(
        UserError, match=rf"'magi-1' compiles flash-attn==2\.4\.2 for the GPU, and this machine has no {lacks}; run this where both are"
    ):
        envs.build("magi-1", base=Path(sys.executable))
    assert not (tmp_path / "envs" / "magi-1").exists()
