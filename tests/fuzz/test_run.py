"""A short coverage-guided run over all targets by turns, from the corpus on; ``make fuzz`` is the long one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv" / "fuzz" / "bin" / "python"
SECONDS = 6


def test_some_seconds_of_new_inputs_find_nothing(tmp_path: Path) -> None:
    command = [str(PYTHON), "-m", "tests.fuzz.run", "all", "--seconds", str(SECONDS)]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-5000:]
    executed = re.search(r"stat::number_of_executed_units: +(\d+)", done.stderr)
    assert executed
    # The corpus, and what the fuzzer has made of it.
    assert int(executed[1]) > len(list((ROOT / "tests" / "fuzz" / "corpus").glob("*/*")))
