"""Tables on stdout, for people or as JSON. rich is imported when one is printed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from rfbench.errors import UserError

STYLES = {"ok": "green", "missing": "yellow", "broken": "red", "pass": "green", "undecided": "yellow", "fail": "red"}


def print_table(rows: Sequence[dict[str, Any]], *, title: str, as_json: bool) -> None:
    """Rows of the same keys, as wide as the terminal or 200 letters; or one JSON document."""
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200)
    if not rows:
        console.print(f"no {title}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in rows[0]:
        table.add_column(key, overflow="fold", no_wrap=key in ("name", ""))
    for row in rows:
        cells = ["" if row.get(key) is None else str(row[key]) for key in rows[0]]
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in cells))
    console.print(table)


def print_profile(document: dict[str, Any], table: Callable[[dict[str, Any]], Sequence[dict[str, str]]], as_json: bool) -> None:
    """What was timed: a table, if that is wanted, and the JSON document in one line.

    Raises:
        UserError: something that was timed has `failed`, as the document says (code 1).
    """
    if not as_json:
        print_table(table(document), title=document["name"], as_json=False)
    print(json.dumps(document, ensure_ascii=False))
    if document.get("failed"):
        raise UserError(document["failed"], code=1)


def print_checks(checks: Sequence[Any], as_json: bool, *, strictly: bool = False) -> None:
    """A row per check, and exit 1 if something is broken, or `strictly` if anything is not there."""
    if as_json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1))
    else:
        rows = [{"": check.state, "what": check.name, "found": check.found, "fix": check.fix} for check in checks]
        print_table(rows, title="", as_json=False)
    if any(check.state == "broken" or (strictly and check.state != "ok") for check in checks):
        raise typer.Exit(1)
