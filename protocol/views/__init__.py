"""The views: one module each, found by looking into this package. To add one, add a module with a ``VIEW``."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from protocol.view import View


@cache
def all_views() -> dict[str, View]:
    """Every view by its name.

    Raises:
        ValueError: two have the same name.
    """
    found: dict[str, View] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        view: View = importlib.import_module(f"{__name__}.{module.name}").VIEW
        if view.name in found:
            raise ValueError(f"protocol/views/{module.name}.py: there is a view {view.name!r} already")
        found[view.name] = view
    return found
