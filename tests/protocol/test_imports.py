"""Imports point one way, and the protocol touches nothing of the outside world."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOCOL = sorted((ROOT / "protocol").glob("**/*.py"))
SERVER = sorted((ROOT / "server").glob("**/*.py"))
WORKERS = sorted((ROOT / "statuswire").glob("**/*.py"))
OUTSIDE = frozenset({"asyncio", "os", "random", "secrets", "select", "selectors", "signal", "socket", "ssl", "time"})
ALLOWED = frozenset({"h11", "hiredis", "msgspec", "protocol", "wsproto"})
CLOCKS = frozenset({"now", "today", "utcnow", "time", "monotonic", "perf_counter"})


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module


def test_there_is_something_to_look_at() -> None:
    assert len(PROTOCOL) > 10
    assert len(SERVER) > 20
    assert len(WORKERS) > 5
    assert "protocol.errors" in set(imported(ROOT / "protocol" / "watch.py"))


@pytest.mark.parametrize("path", PROTOCOL, ids=lambda path: path.name)
def test_protocol_imports_parsers_and_the_standard_library_only(path: Path) -> None:
    for module in imported(path):
        top = module.partition(".")[0]
        assert top in ALLOWED or (top in sys.stdlib_module_names and top not in OUTSIDE), module


@pytest.mark.parametrize("path", PROTOCOL, ids=lambda path: path.name)
def test_protocol_is_given_the_time(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else ""
            assert not (name in ("datetime", "date", "time") and node.func.attr in CLOCKS), ast.unparse(node)


@pytest.mark.parametrize("path", SERVER, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_server_imports_neither_tests_nor_tools_nor_benchmarks(path: Path) -> None:
    assert not {module.partition(".")[0] for module in imported(path)} & {"tests", "tools", "perf", "asyncio"}


@pytest.mark.parametrize("path", WORKERS, ids=lambda path: path.name)
def test_the_package_for_workers_stands_alone(path: Path) -> None:
    allowed = {"httpx", "msgspec", "statuswire"} | ({"anyio"} if path.name == "aio.py" else set())
    if path.parent.name == "hooks":
        allowed.add(path.stem)  # the library that the hook is for
    for module in imported(path):
        top = module.partition(".")[0]
        assert top in allowed or top in sys.stdlib_module_names, module


def test_a_server_does_not_import_the_package_for_workers() -> None:
    for path in [*PROTOCOL, *SERVER]:
        assert "statuswire" not in {module.partition(".")[0] for module in imported(path)}, path


def test_a_worker_starts_without_what_it_may_never_need() -> None:
    heavy = {"anyio", "asyncio", "httpx", "protocol", "server", "trio"}
    program = f"import sys, statuswire; print(*{heavy!r} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []


def test_a_server_starts_without_what_it_may_never_need() -> None:
    heavy = {"hiredis", "httpx", "jwt", "prometheus_client", "rich"}
    program = f"import sys, server.app, server.commands.serve; print(*{heavy!r} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
