"""Coverage-guided fuzzing: ``python -m tests.fuzz.run [TARGET …] --seconds N``, in a place that has atheris.

Begins with the corpus, in a process of its own for each target (``all``: one for all of them, by turns). New inputs
that reach something new go to ``--keep``; an input that breaks something is left in the working directory as
``finding-…``, and the exit status says so. To replay one: ``python -m tests.fuzz.run TARGET --replay FILE``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"

with atheris.instrument_imports(include=["protocol", "server", "h11", "wsproto"]):
    from tests.fuzz.targets import TARGETS

NAMES = sorted(TARGETS)
ALL = "all"


def one_of_all(data: bytes) -> None:
    """The first byte says which target gets the rest."""
    if data:
        TARGETS[NAMES[data[0] % len(NAMES)]](data[1:])


def fuzz(target: str, seconds: int, seed: int, keep: Path) -> None:
    """Fuzz in this process; does not return."""
    directories = [keep, CORPUS / target]
    if target == ALL:
        gathered = Path(tempfile.mkdtemp(prefix="corpus"))
        for number, name in enumerate(NAMES):
            for file in (CORPUS / name).iterdir():
                (gathered / f"{name}-{file.name}").write_bytes(bytes([number]) + file.read_bytes())
        directories = [keep, gathered]
    options = [
        f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=4096", "-timeout=120", "-rss_limit_mb=2048",
        "-artifact_prefix=finding-", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options, *map(str, directories)], one_of_all if target == ALL else TARGETS[target])
    atheris.Fuzz()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[ALL, *NAMES, []], help="all, each by itself, without any")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--seed", type=int, default=0, help="0 is another one each time")
    parser.add_argument("--keep", type=Path, help="where new inputs go; nowhere without it")
    parser.add_argument("--replay", type=Path, help="only this input")
    options = parser.parse_args()
    targets = options.targets or NAMES
    if options.replay is not None:
        TARGETS[targets[0]](options.replay.read_bytes())
        return 0
    if len(targets) == 1:
        keep = options.keep / targets[0] if options.keep else Path(tempfile.mkdtemp(prefix="fuzz"))
        keep.mkdir(parents=True, exist_ok=True)
        fuzz(targets[0], options.seconds, options.seed, keep)
    failed = []
    for target in targets:
        print(f"== {target}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz.run", target, "--seconds", str(options.seconds)]
        command += ["--seed", str(options.seed)] + (["--keep", str(options.keep)] if options.keep else [])
        if subprocess.run(command).returncode:
            failed.append(target)
    print(f"found something: {', '.join(failed)}" if failed else "found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
