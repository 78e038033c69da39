"""What the fuzzing client must know beyond the description; loaded by it, not by the tests."""

from __future__ import annotations

import itertools
from typing import Any

import schemathesis

# Nobody wants to see a poll time out sixty seconds later.
SHORT_S = "0.02"
_numbers = itertools.count()


@schemathesis.hook
def filter_case(context: Any, case: Any) -> bool:
    """A parameter without a name is an unknown one, and those are let pass."""
    return not (isinstance(case.query, dict) and "" in case.query)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Each call is one of its own: no key comes twice, and no body names another job than its path."""
    if case.path.endswith("/poll"):
        case.query = case.query if isinstance(case.query, dict) else {}
        if _is_long(case.query.get("timeout", "30")):
            case.query["timeout"] = SHORT_S
    headers = case.headers or {}
    key = headers.get("Idempotency-Key")
    if isinstance(key, str) and 0 < len(key) < 200 and key.isascii() and key.isprintable() and " " not in key:
        headers["Idempotency-Key"] = f"{key}-{next(_numbers)}"
    if isinstance(case.body, dict | list):
        case.body = _whole(case.body)
    for update in case.body if isinstance(case.body, list) else [case.body]:
        if isinstance(update, dict):
            if isinstance(update.get("eventId"), str) and 0 < len(update["eventId"]) < 500:
                update["eventId"] += f"-{next(_numbers)}"
            for name, value in (case.path_parameters or {}).items():
                if isinstance(update.get(name), str):
                    update[name] = value


def _whole(value: Any) -> Any:
    """JSON Schema takes 8.0 for an integer, which no encoder writes for one."""
    if isinstance(value, dict):
        return {name: _whole(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_long(timeout: object) -> bool:
    try:
        return float(str(timeout)) > float(SHORT_S)
    except ValueError:
        return False
