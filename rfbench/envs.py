"""Interpreters of their own, for packages that cannot live beside ours: `rfbench env NAME` builds one, `python(NAME)` is its interpreter.

    rfbench/environments/<name>.yaml       what it consists of; <name>.txt beside it pins all the packages that come along
    <envs>/<name>/{venv/, src/, build.log, environment.json}

`environment.json` is written last and says from which definition: without it, or with another one, there is no environment.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rfbench import provenance, records, strict
from rfbench.errors import UserError, did_you_mean
from rfbench.progress import Progress
from rfbench.settings import settings

FOLDER = Path(__file__).parent / "environments"
MARKER = "environment.json"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NO_PYTHONPATH = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "VIRTUAL_ENV")  # of the calling interpreter, which another one must not see


@dataclass(frozen=True)
class Source:
    """Code that is no package in an index: a commit of a GitHub repository, which git fetches and thereby checks."""

    repo: str  # owner/name
    commit: str
    install: bool = False  # with pip, against what is installed already; otherwise its folder goes on the import path


@dataclass(frozen=True)
class Option:
    """What an environment may have beside the rest."""

    title: str
    license: str
    check: str  # Python code that must run in the end: what has to import
    packages: tuple[str, ...] = ()  # exact requirements
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Environment:
    """A definition file."""

    title: str
    license: str
    python: str  # "3.11"
    check: str  # as of an option
    torch: str | None = None  # version; without a GPU its CPU build
    index: str | None = None  # a further package index
    packages: tuple[str, ...] = ()
    compiled: tuple[str, ...] = ()  # requirements that are built against what is installed by then, as flash-attn against torch
    sources: tuple[Source, ...] = ()
    options: dict[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """environment.json: what an environment was built from, and what is in it."""

    definition: str  # sha256 of definition and pins
    options: tuple[str, ...]
    python: str
    packages: dict[str, str]
    built: str  # UTC
    seconds: float


@dataclass(frozen=True)
class Step:
    """Something to do, and the commands that can do it: the first that succeeds has done it."""

    title: str
    tries: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return " || ".join(shlex.join(command) for command in self.tries)


def names() -> list[str]:
    """The environments that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> tuple[Environment, str]:
    """The definition of an environment by name or path, and its identity.

    Raises:
        UserError: there is none, or its file is not valid.
    """
    if not _file(name).is_file():
        raise UserError(f"there is no environment '{name}'{did_you_mean(name, names())}")
    cfg: Environment = strict.build(Environment, strict.load_plain(_file(name), (), Environment), where=name)
    pins = _pins(name)
    return cfg, records.fingerprint({"definition": strict.as_plain(cfg), "pins": pins.read_text(encoding="utf-8") if pins else None})


def home(name: str) -> Path:
    """The folder of an environment on this machine."""
    return settings().envs / Path(name).stem


def python(name: str, *options: str) -> Path:
    """The interpreter of an environment that has these options.

    Raises:
        UserError: it is not built, or was built from another definition or without the GPU that is here, or lacks an option; names the command.
    """
    _, definition = load(name)
    built = found(name)
    command = " ".join(["rfbench env", name, *(f"--with {option}" for option in options)])
    if built is None:
        raise UserError(f"the environment '{name}' is not built; run `{command}`")
    if built.definition != definition:
        raise UserError(f"the definition of environment '{name}' has changed since it was built; run `{command} --fresh`")
    if _has_gpu() and built.packages.get("torch", "").endswith("+cpu"):
        raise UserError(f"the environment '{name}' was built without a GPU and has torch's CPU build; run `{command} --fresh` on this machine")
    missing = [option for option in options if option not in built.options]
    if missing:
        raise UserError(f"the environment '{name}' lacks {', '.join(missing)}; run `{command}`")
    return _interpreter(home(name))


def found(name: str) -> Built | None:
    """What is built under a name, from whichever definition; None if nothing is, or only half."""
    directory = home(name)
    if not (directory / MARKER).is_file() or not _interpreter(directory).exists():
        return None
    value = records.read_json(directory / MARKER)
    return records.from_fields(Built, value | {"options": tuple(value.get("options", ()))}, where=str(directory / MARKER))


def source(name: str, repo: str) -> Path:
    """Where an environment keeps the code of a repository."""
    return home(name) / "src" / repo.split("/")[1]


def environ(**variables: str) -> dict[str, str]:
    """This process's variables for another interpreter: without what leads Python to our packages."""
    return {key: value for key, value in os.environ.items() if key not in NO_PYTHONPATH} | variables


def build(name: str, options: Sequence[str] = (), *, base: Path | None = None, fresh: bool = False, dry_run: bool = False) -> Path:
    """Build an environment, or add options to one; what is built already stays. `base` is the Python to build it on.

    A build that fails or is killed leaves no environment, but for an option: what was there before stays usable without it.

    Returns:
        its interpreter. A dry run prints the commands on stdout instead of running them.

    Raises:
        UserError: no such environment or option, no Python of its version, no GPU or compiler where something has to be compiled,
            another definition in its place; a step failed (code 1).
    """
    cfg, definition = load(name)
    for option in options:
        if option not in cfg.options:
            raise UserError(f"environment '{name}' has no option '{option}'{did_you_mean(option, cfg.options)}")
    directory, built = home(name), None if fresh else found(name)
    if built is not None and built.definition != definition:
        raise UserError(f"{directory} was built from another definition of '{name}'; add --fresh to build it again")
    wanted = [option for option in cfg.options if option in options or (built is not None and option in built.options)]
    new = [option for option in wanted if built is None or option not in built.options]
    steps = list(_base_steps(cfg, directory, base, _pins(name))) if built is None else []
    steps += [step for option in new for step in _part_steps(cfg.options[option], directory)]
    if dry_run:
        for step in steps:
            print(step)
        return _interpreter(directory)
    if built is None and cfg.compiled and not (_has_gpu() and _has_nvcc()):
        raise UserError(
            f"environment '{name}' compiles {', '.join(cfg.compiled)} for the GPU, and this machine has no {'nvcc' if _has_gpu() else 'GPU'}; "
            "run this where both are, for example in a job on a GPU node"
        )
    if steps:
        with provenance.alone(directory):
            _run(cfg, definition, directory, steps, wanted, keep=built is not None)
    return _interpreter(directory)


def _run(cfg: Environment, definition: str, directory: Path, steps: Sequence[Step], options: Sequence[str], *, keep: bool) -> None:
    """Take the steps, with everything that they print in build.log, and then write the marker."""
    if not keep:
        for old in (MARKER, "venv", "src", "build.log"):
            path = directory / old
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    begun, log = time.monotonic(), directory / "build.log"
    with log.open("a", encoding="utf-8") as file, Progress(f"environment {directory.name}", len(steps)) as progress:
        for number, step in enumerate(steps, start=1):
            progress.console.print(f"{number}/{len(steps)} {step.title}", markup=False, highlight=False, soft_wrap=True)
            if not any(_succeeds(command, directory, file) for command in step.tries):
                raise UserError(f"environment '{directory.name}': {step.title} failed ({_last_words(log)}); all of it is in {log}", code=1)
            progress.advance()
    interpreter = _interpreter(directory)
    version, packages = json.loads(_output([str(interpreter), "-I", "-c", _CONTENTS]))
    built = Built(definition, tuple(options), version, packages, provenance.now(), round(time.monotonic() - begun, 1))
    records.write_json(directory / MARKER, built)


_CONTENTS = (
    "import importlib.metadata as m, json, platform;"
    "print(json.dumps([platform.python_version(), {d.metadata['Name']: d.version for d in m.distributions()}]))"
)


def _succeeds(command: Sequence[str], directory: Path, log: Any) -> bool:
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    try:
        done = subprocess.run(command, cwd=directory, env=environ(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except OSError as error:
        log.write(f"error: {error.filename}: {error.strerror}\n")
        log.flush()
        return False
    return done.returncode == 0


def _last_words(log: Path) -> str:
    """The line of a log that says what went wrong: the last one that calls itself an error, else the last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower() or line.startswith(("fatal:", "E:"))]
    return (errors or lines or ["no output"])[-1][:200]


def _base_steps(cfg: Environment, directory: Path, base: Path | None, pins: Path | None) -> Iterator[Step]:
    """The steps to a whole environment, without options."""
    interpreter = base or find_python(cfg.python, directory.name)
    yield Step(f"a virtual environment of Python {cfg.python}", ((str(interpreter), "-m", "venv", str(directory / "venv")),))
    install = _pip(directory, *(["-c", str(pins)] if pins else []))
    if cfg.torch is not None and platform.system() == "Linux" and not _has_gpu():
        cpu = f"torch=={cfg.torch}+cpu"
        yield Step(
            "torch's CPU build, as there is no GPU", (_pip(directory, "--no-deps", cpu), _pip(directory, "--no-deps", "--index-url", CPU_INDEX, cpu))
        )
    packages = [*([f"torch=={cfg.torch}"] if cfg.torch is not None else []), *cfg.packages]
    if packages:
        yield Step("packages", ((*install, *(["--extra-index-url", cfg.index] if cfg.index else []), *packages),))
    if cfg.compiled:
        yield Step("packages that are compiled", (_pip(directory, "--no-build-isolation", *cfg.compiled),))
    yield from _part_steps(cfg, directory, installed=True)


def _part_steps(part: Environment | Option, directory: Path, *, installed: bool = False) -> Iterator[Step]:
    """Packages unless they are installed, sources, and the check."""
    if part.packages and not installed:
        yield Step(f"packages for {part.title}", (_pip(directory, *part.packages),))
    interpreter = str(_interpreter(directory))
    for item in part.sources:
        folder = str(directory / "src" / item.repo.split("/")[1])
        yield Step(f"a folder for {item.repo}", (("git", "init", "-q", folder),))
        fetch = ("git", "-C", folder, "fetch", "-q", "--depth", "1", f"https://github.com/{item.repo}", item.commit)
        yield Step(f"{item.repo} at {item.commit[:10]}", (fetch,))
        yield Step("its files", (("git", "-C", folder, "checkout", "-q", "--detach", item.commit),))
        if item.install:
            yield Step(f"installing {item.repo}", (_pip(directory, "--no-build-isolation", folder),))
        else:
            line = f"import pathlib, sysconfig; pathlib.Path(sysconfig.get_path('purelib'), {Path(folder).name + '.pth'!r}).write_text({folder!r})"
            yield Step(f"{item.repo} on the import path", ((interpreter, "-I", "-c", line),))
    yield Step(f"a look whether {part.title} imports", ((interpreter, "-I", "-c", part.check),))


def _pip(directory: Path, *arguments: str) -> tuple[str, ...]:
    return (str(_interpreter(directory)), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments)


def _interpreter(directory: Path) -> Path:
    return directory / "venv" / "bin" / "python"


def _file(name: str) -> Path:
    return Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"


def _pins(name: str) -> Path | None:
    path = _file(name).with_suffix(".txt")
    return path if path.is_file() else None


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def _has_nvcc() -> bool:
    """Whether CUDA's compiler is where torch looks for it."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] or [Path("/usr/local/cuda")]
    return shutil.which("nvcc") is not None or any((home / "bin" / "nvcc").is_file() for home in homes)


def find_python(version: str, name: str) -> Path:
    """A Python of a version such as "3.11": on the search path, or one that pyenv or uv installed.

    Raises:
        UserError: there is none; says how to get one.
    """
    for path in _pythons(version):
        if path.is_file() and _output([str(path), "-I", "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]).strip() == version:
            return path
    raise UserError(
        f"environment '{name}' needs Python {version}, and none was found; install it (`uv python install {version}`, or pyenv), "
        f"or name one: rfbench env {name} --python /path/to/python{version}"
    )


def _pythons(version: str) -> Iterable[Path]:
    on_path = (Path(folder) / f"python{version}" for folder in os.get_exec_path())
    user = Path.home()
    yield from on_path
    yield from sorted((user / ".pyenv" / "versions").glob(f"{version}.*/bin/python"), reverse=True)
    yield from sorted((user / ".local" / "share" / "uv" / "python").glob(f"cpython-{version}.*/bin/python{version}"), reverse=True)


def _output(command: Sequence[str]) -> str:
    """What a command prints; nothing if it fails, as the stub of a Python that is not installed does."""
    try:
        done = subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
