"""The arguments and options that commands share, and the names that a shell completes them to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rfbench import config
from rfbench.config import Baseline, External, Recipe, Study
from rfbench.errors import UserError
from rfbench.records import run_name
from rfbench.settings import settings

COMPAT = "-compat"  # behind a scorer's name: with the habits of its original


def completes(names: Callable[[], Any]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def suite_names() -> list[str]:
    from rfbench.suites import SUITES

    return list(SUITES)


def runs() -> dict[str, Path]:
    """Name -> directory of the bench runs that there are: `<baseline>/<suite>`."""
    home = settings().runs / "bench"
    return {str(path.parent.relative_to(home)): path.parent for path in sorted(home.rglob("run.json"))}


def scorers() -> list[str]:
    from rfbench.scorers.base import SCORERS

    return list(SCORERS)


def compatible(names: list[str]) -> list[str]:
    """The scorers that have the habits of these ones' originals (`eval --compat`).

    Raises:
        UserError: none was named, or one has no other habits than its original.
    """
    there = [name.removesuffix(COMPAT) for name in scorers() if name.endswith(COMPAT)]
    other = next((name for name in names if name not in there), None)
    if other is not None or not names:
        told = f"'{other}' has no other habits than its original" if other else "name a scorer"
        raise UserError(f"--compat: {told}; it is for -s {', '.join(there)}")
    return [name + COMPAT for name in names]


Fields = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to set, e.g. sampler.shift=3.", show_default=False)]
Name = Annotated[str | None, typer.Option("--name", help="Call its directory this.", callback=run_name, show_default=False)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Remove what is there and start over.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the request and say what would be done.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a path or a table.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Only the first N prompts.", show_default=False)]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Name or YAML file.", autocompletion=completes(lambda: config.names_of(Recipe)), show_default=False)
]
Shard = Annotated[str | None, typer.Option("--shard", metavar="I/N", help="Only the I-th of N equal parts, from 1.", show_default=False)]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="Estimate the hours on so many; implies --dry-run.", show_default=False)]
EngineName = Annotated[str, typer.Option("--engine", metavar="here|ray", help="This process, or workers of a Ray cluster.")]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="With ray; by default one for each GPU, else for each core.", show_default=False)
]
BaselineName = Annotated[
    str,
    typer.Argument(
        metavar="BASELINE",
        help="Name or YAML file.",
        autocompletion=completes(lambda: [*config.names_of(Baseline), *config.names_of(External)]),
        show_default=False,
    ),
]
StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="Name or YAML file.", autocompletion=completes(lambda: config.names_of(Study)), show_default=False)
]
RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="<baseline>/<suite> or its directory.", autocompletion=completes(runs), show_default=False)
]
