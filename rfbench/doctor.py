"""What this machine can run, found by trying it, and the exact fix for what it can't: `rfbench doctor`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rfbench import config, envs, provenance
from rfbench.config import Baseline, External
from rfbench.errors import UserError
from rfbench.records import atomic
from rfbench.settings import HOME, settings, settings_file

ROOM = 2 * 2**30  # bytes: a study at toy size writes less than a tenth of it


@dataclass(frozen=True)
class Check:
    """`missing` costs a feature, `broken` keeps rfbench from working; both come with what to do."""

    name: str
    state: Literal["ok", "missing", "broken"]
    found: str
    fix: str = ""


def examine() -> list[Check]:
    """Every check, in the order in which things are needed; none of them raises."""
    checks: list[Check] = []
    for look in (
        _python,
        _checkout,
        _settings,
        _torch,
        _gpu,
        _shortcuts,
        _memory,
        _disk,
        _video,
        _scorers,
        _vbench,
        _baselines,
        _environments,
        _extras,
    ):
        try:
            checks += look()
        except UserError as error:
            checks.append(Check(look.__name__.strip("_"), "broken", str(error), "do what the sentence says"))
        except Exception as error:  # a doctor who falls ill over one finding helps with none
            checks.append(Check(look.__name__.strip("_"), "broken", f"{type(error).__name__}: {error}", "install again: make clean test"))
    return checks


def _python() -> Iterator[Check]:
    here = provenance.machine()
    yield Check("python", "ok", f"{here['python']} on {here['system']}, {here['cpu']}, {here['cores']} cores")


def _checkout() -> Iterator[Check]:
    code = provenance.code()
    if not config.names_of(config.Recipe):
        yield Check("checkout", "broken", "no recipes beside the package", "install from a clone: pip install -e . -c constraints.txt")
    elif code["commit"] is None:
        yield Check("checkout", "missing", "not a git checkout: numbers made here name no commit", "clone the repository with git")
    else:
        yield Check("checkout", "ok", f"commit {code['commit'][:10]}{', with changes' if code['dirty'] else ''}")


def _settings() -> Iterator[Check]:
    settings()
    found = settings_file()
    yield Check("rfbench.toml", "ok", "the checkout's" if found == HOME / "rfbench.toml" else str(found or "none: defaults"))


def _torch() -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("torch", "broken", str(error), "pip install -c constraints.txt torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    yield Check("torch", "ok", f"{torch.__version__}, {build} build, {torch.get_num_threads()} threads")


def _gpu() -> Iterator[Check]:
    import torch

    from rfbench import hardware

    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        name, state = hardware.name(torch.device("cuda", i)), hardware.state(torch.device("cuda", i))
        if name in settings().hardware:
            told = state.get("nvidia-smi") or f"driver {state['driver_version']}, power limit {state['power.limit']} W"
            yield Check("gpu", "ok", f"{device.name}, {device.total_memory / 2**30:.0f} GiB, called {name}; {told}")
        else:
            yield Check("gpu", "missing", f"{device.name}: its peak is not known", f"add [hardware.{name}] to rfbench.toml to get shares of peak")
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        yield Check("gpu", "missing", "there is a GPU, but this torch is a CPU build", "pip install --force-reinstall torch, from the default index")
    else:
        yield Check("gpu", "missing", "none; the toy study does not need one", "the 1.3B models need a GPU of 24 GiB or more")


def _shortcuts() -> Iterator[Check]:
    """Which are taken; on a GPU some have to prove themselves, for which a small network of Wan's kind makes two clips."""
    from rfbench import baselines, proof, sampler, transfer, video
    from rfbench.backbones.wan.backbone import wan_1_3b
    from rfbench.backbones.wan.lean import taken

    device, cfg = baselines.device(), config.load(Baseline, "wan/reward-forcing").sampler
    names = taken(settings().fast.shortcuts, device)
    if {"kernels", "graphs"} & set(names):
        backbone = wan_1_3b(reduced=True)
        backbone.fresh(0)
        backbone.requires_grad_(False).to(device)
        lean = sampler.lean_of(backbone, cfg)
        assert lean is not None
        for seed in range(2):  # passes are recorded when they come for the second time
            for pixels in sampler.generate(backbone, ["a red disc"], 4 * (cfg.chunk or 1), cfg, [seed], lean=lean):
                transfer.to_host(video.as_uint8(pixels))()
        names = lean.taken
    yield Check("shortcuts", "ok", ", ".join(names))
    for name, why in proof.left_out.items():
        yield Check(f"shortcut {name}", "missing", f"left out: it {why}", "nothing has to be done; clips take longer")


def _memory() -> Iterator[Check]:
    total = provenance.machine()["memory_gib"]
    yield Check("memory", "ok", f"{total} GiB") if total >= 3 else Check("memory", "missing", f"{total} GiB", "the toy study needs 3 GiB")


def _disk() -> Iterator[Check]:
    runs = settings().runs
    with atomic(runs / "doctor.txt") as probe:
        probe.write_text("written and renamed", encoding="utf-8")
    (runs / "doctor.txt").unlink()
    free = shutil.disk_usage(runs).free
    found = f"{free / 2**30:.1f} GiB free where runs go"
    yield (
        Check("disk", "ok", found) if free >= ROOM else Check("disk", "missing", found, "free 2 GiB, or name another folder for runs in rfbench.toml")
    )


def _video() -> Iterator[Check]:
    import av
    import numpy as np

    from rfbench import video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grey.mp4"
        with video.writing(path, fps=16, height=48, width=64) as write:
            write(np.full((4, 48, 64, 3), 128, np.uint8))
        with av.open(str(path), "r") as container:
            frames = len(list(container.decode(video=0)))
    if frames == 4:
        yield Check("video", "ok", f"H.264 in and out, PyAV {importlib.metadata.version('av')}")
    else:
        yield Check("video", "broken", f"4 frames in, {frames} out", "pip install --force-reinstall -c constraints.txt av")


def _scorers() -> Iterator[Check]:
    from rfbench.registry import pick
    from rfbench.scorers.base import SCORERS

    def found(name: str) -> str:
        scorer = pick(SCORERS, name, what="scorer")
        return f"{len(scorer.metrics)} metrics, version {scorer.version}"  # the version of a network is that of its weights

    yield from _each("scorer", list(SCORERS), found)


def _vbench() -> Iterator[Check]:
    """Its dimensions one by one, where its environment is there; the scorer's own line says what is wrong with that."""
    from rfbench.scorers.vbench import SCORER

    try:
        ready = SCORER.ready()
    except UserError:
        return
    for one in ready:
        if one["version"]:
            yield Check(f"vbench {one['dimension']}", "ok", f"version {one['version']}")
        else:
            yield Check(f"vbench {one['dimension']}", "missing", one["problem"], one["fix"])


def _baselines() -> Iterator[Check]:
    from rfbench import external, weight_files

    def found(name: str) -> str:
        path = weight_files.resolve(config.load(Baseline, name).weights, config.find(Baseline, name))
        return f"{sum(file.stat().st_size for file in weight_files.files_of(path)) / 2**20:.1f} MiB of weights"

    def prepared(name: str) -> str:
        ready = external.prepare(name)
        return f"environment {ready.cfg.env}, weights {ready.sha256['weights'][:10]}"

    yield from _each("baseline", list(config.names_of(Baseline)), found)
    yield from _each("baseline", list(config.names_of(External)), prepared)


def _environments() -> Iterator[Check]:
    def found(name: str) -> str:
        envs.python(name)
        built = envs.found(name)
        assert built is not None
        return f"Python {built.python}, {len(built.packages)} packages{''.join(f', with {option}' for option in built.options)}"

    yield from _each("environment", envs.names(), found)


def _each(kind: str, names: list[str], look: Callable[[str], str]) -> Iterator[Check]:
    for name in names:
        try:
            yield Check(f"{kind} {name}", "ok", look(name))
        except UserError as error:
            yield Check(f"{kind} {name}", "missing", str(error), _fix(str(error), name))
        except ImportError as error:
            yield Check(f"{kind} {name}", "missing", str(error), f"pip install -c constraints.txt {error.name or ''}".strip())


def _extras() -> Iterator[Check]:
    extras = {"flash_attn": "gpu", "transformers": "wan", "accelerate": "wan"}
    for module, extra in extras.items():
        if importlib.util.find_spec(module):
            yield Check(module, "ok", importlib.metadata.version(module.replace("_", "-")))
        else:
            yield Check(module, "missing", "not installed; the toy study does not need it", f"pip install -c constraints.txt -e '.[{extra}]'")


def _fix(sentence: str, name: str) -> str:
    """The command that a sentence gives between backticks."""
    command = next((text for text in re.findall(r"`([^`]+)`", sentence) if text.startswith(("rfbench ", "pip "))), "")
    return f"{command} {name}" if command == "rfbench fetch" else command or "do what the sentence says, or leave it out"
