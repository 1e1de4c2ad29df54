"""Imports point downward, heavy packages load late, and the bottom needs nothing but Python: read from the source text."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rfbench

PACKAGE = Path(rfbench.__file__).parent
LAYERS = [
    {"errors", "registry", "records"},
    {
        *("strict", "settings", "config", "suites", "world", "provenance", "progress", "statistics", "layouts", "learning"),
        *("vbench", "published", "envs", "processes", "store", "mirror", "weight_files", "launched"),
    },
    {"attention", "kernels", "proof", "transfer", "cache", "schedule", "unipc", "hardware", "data", "weights", "video", "fleet", "phases"},
    {
        "sampler",
        "rolling",
        "forcing",
        "rollouts",
        "backbones",
        "videoreward",
        "baselines",
        "checkpointing",
        "flops",
        "naive",
        "parallel",
        "vbench_worker",
    },
    {"methods", "scorers", "timing", "external", "length", "recipes", "updates", "resume", "outcome", "reward", "filming"},
    {"pairs", "stopwatch", "rungs", "ladder", "load", "logbook", "memory"},
    {
        "fetch",
        "items",
        "train",
        "generate",
        "evaluate",
        "importing",
        "profiling",
        "report",
        "studies",
        "budget",
        "reproduce",
        "listing",
        "doctor",
        "export",
        "rehearsal",
        "anatomy",
    },
    {"options", "output"},
    {"cli"},
]
VERBS = {"train", "generate", "evaluate", "importing", "profiling", "report"}
FAMILIES = {"backbones", "methods", "scorers"}
OPTIONAL = {"cv2", "lmdb", "pynvml", "ray", "transformers", "accelerate", "vbench", "flash_attn"}


def layer_of(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if part in names)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


RUNNERS = sorted((PACKAGE / "runners").glob("*.py"))  # run in other interpreters, which have none of our modules
PATHS = sorted(set(PACKAGE.rglob("*.py")) - set(RUNNERS))
KNOWN = {module_of(path) for path in PATHS}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at module level) of everything that a file imports; `from rfbench import x` is rfbench.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef | ast.Lambda) for node in ast.walk(function)}
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in KNOWN else str(node.module) for name in inner]
        found += [(name, id(node) not in inside) for name in names]
    return found


FILES = {module_of(path): path for path in PATHS}
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}


def test_every_module_has_a_layer():
    known = set().union(*LAYERS)
    assert {name.split(".")[1] for name in MODULES} <= known, "put the new module into its layer"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downward(name):
    own = name.split(".")[1]
    for target, _ in imports(MODULES[name]):
        if not target.startswith("rfbench."):
            continue
        other = target.split(".")[1]
        assert layer_of(target) <= layer_of(name), f"{name} imports {target}, which lies above it"
        if own in VERBS:
            assert other == own or other not in VERBS | {"reproduce"}, f"{name} imports the verb {target}"
        if own in FAMILIES and layer_of(target) == layer_of(name):
            assert other == own or other not in FAMILIES, f"{name} imports the family {other} beside it"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: {target for target, _ in imports(path) if target in MODULES} for name, path in MODULES.items()}
    while leaves := [name for name, targets in graph.items() if not targets]:
        for name in leaves:
            del graph[name]
        graph = {name: targets - set(leaves) for name, targets in graph.items()}
    assert not graph, f"these import each other: {sorted(graph)}"


@pytest.mark.parametrize("name", FILES)
def test_packages_load_no_earlier_than_they_are_needed(name):
    layer = layer_of(name) if name in MODULES else 0
    for target, at_module_level in imports(FILES[name]):
        top = target.split(".")[0]
        if layer == 0 and FILES[name].parent == PACKAGE:
            assert top in sys.stdlib_module_names or top == "rfbench", f"{name} imports {target}, but it has to run in any interpreter"
        if layer <= 1:
            assert top not in {"torch", "pandas"}, f"{name} imports {target}"
        assert not (at_module_level and top in OPTIONAL), f"{name} imports {target}, which need not be installed"


def test_help_and_completion_need_typer_alone():
    reached, todo = set(), ["rfbench.cli"]
    while todo:
        name = todo.pop()
        reached.add(name)
        for target, at_module_level in imports(FILES[name]):
            if at_module_level and target.startswith("rfbench."):
                todo += [target] if target not in reached else []
            elif at_module_level:
                assert target.split(".")[0] in {*sys.stdlib_module_names, "rfbench", "typer"}, f"{name} imports {target}"
    assert "rfbench.config" in reached


def test_what_is_imported_is_declared_and_pinned():
    """A package that comes along with another one today need not tomorrow."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.split(r"[^\w-]", line)[0] for line in wanted}
    pins = dict(line.split("==") for line in (PACKAGE.parent / "constraints.txt").read_text().splitlines() if "==" in line)
    spelled = {"cv2": "opencv-python-headless", "yaml": "pyyaml", "PIL": "pillow", "flash_attn": "flash-attn", "huggingface_hub": "huggingface-hub"}
    spelled |= {"pynvml": "nvidia-ml-py"}
    ours = [path for path in PATHS if path.parent.name != "vbench_worker"]  # runs in an environment of its own, which is pinned on its own
    tops = {target.split(".")[0] for path in ours for target, _ in imports(path)} - sys.stdlib_module_names - {"rfbench"}
    assert {spelled.get(top, top) for top in tops} <= declared
    core = {re.split(r"[^\w-]", line)[0] for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])}
    assert core <= set(pins)


def test_the_bottom_layer_runs_without_site_packages():
    """As in the interpreter of a scorer that shares no package with this one."""
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import rfbench.errors, rfbench.records, rfbench.registry"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)


@pytest.mark.parametrize("path", RUNNERS, ids=lambda path: path.stem)
def test_a_runner_needs_nothing_of_ours(path):
    for target, at_module_level in imports(path):
        top = target.split(".")[0]
        assert top != "rfbench" and (not at_module_level or top in sys.stdlib_module_names), f"{path.name} imports {target}"


def test_names_in_tables_resolve_to_code():
    from rfbench.methods.base import METHODS
    from rfbench.registry import pick
    from rfbench.scorers.base import SCORERS

    for table in (METHODS, SCORERS):
        for name in table:
            assert pick(table, name, what="entry") is not None


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_concept(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 500, f"{name} has {lines} lines: it is more than one concept"
