"""What there is to name on the command line, a row each: `rfbench list`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rfbench import config, envs, published, suites
from rfbench.config import Baseline, External, Recipe, Study
from rfbench.errors import UserError
from rfbench.registry import pick
from rfbench.settings import settings

Row = dict[str, Any]


def recipes() -> list[Row]:
    """The recipes that ship."""
    return [_loaded(Recipe, name, lambda recipe: {"title": recipe.title, "method": recipe.method, "needs": recipe.needs}) for name in _names(Recipe)]


def baselines() -> list[Row]:
    """The baselines that ship, and those that training wrote on this machine."""

    def row(baseline: Baseline) -> Row:
        where = baseline.weights.repo or baseline.weights.file
        return {
            "title": baseline.title,
            "paper": baseline.paper,
            "backbone": baseline.backbone,
            "weights": where,
            "licence": baseline.license.weights,
        }

    def elsewhere(cfg: External) -> Row:
        return {
            "title": cfg.title,
            "paper": cfg.paper,
            "backbone": f"its authors' code, in {cfg.env}",
            "weights": cfg.weights.repo,
            "licence": cfg.license.weights,
        }

    trained = sorted(settings().runs.glob("train/**/baseline.yaml"))
    rows = [_loaded(Baseline, name, row) for name in (*_names(Baseline), *map(_from_here, trained))]
    return [*rows, *(_loaded(External, name, elsewhere) for name in _names(External))]


def studies() -> list[Row]:
    """The studies that ship."""

    def row(study: Study) -> Row:
        return {"title": study.title, "contenders": len(study.contenders), "claims": len(study.claims), "needs": study.needs}

    return [_loaded(Study, name, row) for name in _names(Study)]


def claims() -> list[Row]:
    """The paper's claims with the numbers printed for them, then those of studies alone; and the studies that test each, with the metric."""
    tests: dict[str, list[str]] = {}
    own: dict[str, str] = {}
    for name in _names(Study):
        try:
            asked = config.load(Study, name).claims
        except UserError:  # `list studies` says what is wrong with it
            continue
        for claim in asked:
            about = claim.says or claim.id
            tests.setdefault(about, []).append(f"{name} ({claim.metric}{f', {claim.suite}' if claim.suite else ''})")
            if about not in published.statements():
                own.setdefault(about, claim.text)
    rows: list[Row] = []
    for about, statement in published.statements().items():
        better, than = published.pair(statement)
        printed = f"{better.text} against {than.text}"
        rows.append({"name": about, "title": statement.text, "said": statement.said, "quantity": better.metric, "published": printed})
    rows += [{"name": about, "title": text, "said": "here", "quantity": None, "published": None} for about, text in own.items()]
    return [{**row, "tested by": "; ".join(tests.get(str(row["name"]), ["no study"]))} for row in rows]


def suite_rows() -> list[Row]:
    """The built-in suites."""

    def row(name: str) -> Row:
        suite = suites.load_suite(name)
        more = len(suite.items) - len(suite.prompts) * suite.samples
        clips = f"{len(suite.prompts)} prompts x {suite.samples}{f' + {more}' if more else ''}"
        return {"clips": clips, "frames": suite.frames, "seconds": round(suite.frames / suite.fps, 1)}

    rows = []
    for name, header in suites.SUITES.items():
        try:
            rows.append({"name": name, "title": header.title, **row(name)})
        except UserError as error:
            rows.append({"name": name, "title": f"{header.title}: {error}"})
    return rows


def scorers() -> list[Row]:
    """The scorers, and what they measure."""
    from rfbench.scorers.base import SCORERS

    rows = []
    for name in SCORERS:
        scorer = pick(SCORERS, name, what="scorer")
        for metric, how in scorer.metrics.items():
            rows.append({"name": f"{name}.{metric}", "better": "higher" if how.higher_is_better else "lower", "unit": how.unit, "title": how.text})
    return rows


def policies() -> list[Row]:
    """The cache policies."""
    from rfbench.cache import POLICIES

    return _described(POLICIES)


def methods() -> list[Row]:
    """The training objectives."""
    from rfbench.methods.base import METHODS

    return _described({name: pick(METHODS, name, what="method") for name in METHODS})


def hardware() -> list[Row]:
    """The devices whose peak rfbench.toml knows, in TFLOP/s."""
    rows = []
    for name, device in settings().hardware.items():
        peaks = ", ".join(f"{dtype} {peak:g}" for dtype, peak in device.tflops.items())
        rows.append({"name": name, "title": device.title, "match": device.match, "peak TFLOP/s": peaks})
    return rows


def environments() -> list[Row]:
    """The environments that ship, and which of them are built on this machine."""
    rows = []
    for name in envs.names():
        cfg, definition = envs.load(name)
        built = envs.found(name)
        state = "not built" if built is None else f"built {built.built}" if built.definition == definition else "built from another definition"
        options = ", ".join(f"{option}{' (built)' if built and option in built.options else ''}" for option in cfg.options)
        rows.append({"name": name, "title": cfg.title, "python": cfg.python, "licence": cfg.license, "options": options, "state": state})
    return rows


ROWS: dict[str, Callable[[], list[Row]]] = {
    "recipes": recipes,
    "baselines": baselines,
    "suites": suite_rows,
    "studies": studies,
    "claims": claims,
    "scorers": scorers,
    "policies": policies,
    "methods": methods,
    "hardware": hardware,
    "environments": environments,
}


def _names(kind: type) -> list[str]:
    return list(config.names_of(kind))


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _loaded(kind: type, name: str, row: Callable[[Any], Row]) -> Row:
    """A row of what a file says; a file that is not valid says so in its own row, and does not hide the others."""
    try:
        return {"name": name, **row(config.load(kind, name))}
    except UserError as error:
        return {"name": name, "title": f"not usable: {error}"}


def _described(table: Mapping[str, Any]) -> list[Row]:
    return [{"name": name, "title": (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ")} for name, found in table.items()]
