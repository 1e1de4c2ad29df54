"""Names that a user may write, resolved to code when they are used and not before."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from rfbench.errors import UserError, did_you_mean


def pick(table: Mapping[str, str], name: str, *, what: str) -> Any:
    """The object that `table` spells as `module:object` under `name`; the module is imported here.

    Raises:
        UserError: `name` is not in the table.
    """
    if name not in table:
        raise UserError(f"there is no {what} '{name}'{did_you_mean(name, table)}")
    module, _, attribute = table[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
