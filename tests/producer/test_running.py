"""``statuswire run``: a command as a job."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from statuswire.running import PATTERN, progress_in
from tests.producer.workers import delivered
from tests.support import PATIENCE_S, InProcess, server, until

DEFAULT = re.compile(PATTERN)


@pytest.mark.parametrize(
    ("line", "percent"),
    [
        ("45%", 45),
        ("frame=  120 45.5 % done", 45.5),
        ("[120/300] compiling", 40),
        ("page 3 of 8", 37.5),
        ("10% … 20%", 20),
        ("100%", 100),
        ("250%", None),
        ("3/0", None),
        ("9/8", None),
        ("http://host/2024", None),
        ("no news", None),
        ("9" * 4000 + "%", None),
    ],
)
def test_progress_is_found_in_what_commands_print(line: str, percent: float | None) -> None:
    assert progress_in(line, DEFAULT) == percent


def test_a_pattern_of_ones_own() -> None:
    assert progress_in("step 7 complete", re.compile(r"step (\d+)")) == 7
    assert progress_in("step x", re.compile(r"step (\w+)")) is None
    assert progress_in("at 3 out of 4", re.compile(r"at (?P<done>\d+) out of (?P<total>\d+)")) == 75


async def run(at: InProcess, spool: Path, *command: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
    """Run a command in ``statuswire run``: its status, output and errors."""
    done = await trio.run_process(
        wrapped(at.url, *command, options=("--user", "alice", *options)),
        check=False, capture_stdout=True, capture_stderr=True, env=environment(spool),
    )  # fmt: skip
    await delivered(at.url, spool)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def wrapped(url: str, *command: str, options: tuple[str, ...] = ("--user", "a")) -> list[str]:
    """A command in ``statuswire run``."""
    return [sys.executable, "-m", "server", "run", "--url", url, *options, "--", *command]


def environment(spool: Path) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("STATUSWIRE_")}
    return clean | {"STATUSWIRE_SPOOL_DIR": str(spool), "PYTHONPATH": str(Path(__file__).parents[2])}


async def record(at: InProcess, job: str) -> dict[str, Any]:
    answer = await at.get(f"/api/v2/jobs/{job}")
    assert answer.status == 200, answer
    found: dict[str, Any] = answer.json
    return found


async def test_what_it_prints_passes_through_and_is_its_progress(tmp_path: Path) -> None:
    async with server() as at:
        script = "echo begin; echo '30% of it'; printf 'a\\r2 of 4\\r'; echo oops >&2; printf 'no end'"
        found = await run(at, tmp_path, "sh", "-c", script, options=("--job", "j1"))
        assert found == (0, "begin\n30% of it\na\r2 of 4\rno end", "oops\n")
        ended = await record(at, "j1")
        assert (ended["status"], ended["progress"], ended["kind"], ended["userId"]) == ("completed", 100, "sh", "alice")
        # What it was called with may be secret.
        assert "printf" not in str(ended)


async def test_how_it_ends_is_how_the_job_ends(tmp_path: Path) -> None:
    async with server() as at:
        status, _, errors = await run(at, tmp_path, "sh", "-c", "echo why >&2; exit 3", options=("--job", "j1"))
        assert (status, errors) == (3, "why\n")
        ended = await record(at, "j1")
        assert (ended["status"], ended["error"]) == ("failed", "exit status 3: why")
        status, _, _ = await run(at, tmp_path, "sh", "-c", "kill -9 $$", options=("--job", "j2"))
        assert status == 128 + 9
        assert (await record(at, "j2"))["error"] == "killed by SIGKILL"
        status, _, errors = await run(at, tmp_path, "/nonexistent/command", options=("--job", "j3"))
        assert status == 127
        assert "No such file" in errors
        assert (await record(at, "j3"))["status"] == "failed"


async def test_a_command_whose_name_is_no_id(tmp_path: Path) -> None:
    script = tmp_path / "my script.sh"
    script.write_text("#!/bin/sh\necho 1/2\n")
    script.chmod(0o755)
    async with server() as at:
        assert await run(at, tmp_path / "spool", str(script)) == (0, "1/2\n", "")
        (job,) = at.node.jobs.jobs.values()
        assert (job.latest.status, job.latest.job_id[:9]) == ("completed", "my-script")


async def test_without_a_server_the_command_runs_as_well(tmp_path: Path) -> None:
    async with server() as at:
        gone = at.url
    command = wrapped(gone, "sh", "-c", "echo done; exit 4", options=())
    done = await trio.run_process(command, check=False, capture_stdout=True, env=environment(tmp_path))
    assert (done.returncode, done.stdout) == (4, b"done\n")


@pytest.mark.parametrize("how", ["cancel", "signal"])
async def test_it_is_stopped_by_whoever_cancels_the_job_and_by_signals(tmp_path: Path, how: str) -> None:
    async with server() as at:
        command = wrapped(at.url, "sleep", "60", options=("--user", "a", "--job", "j1", "--ttl", "1"))
        process = subprocess.Popen(command, env=environment(tmp_path))  # noqa: ASYNC220
        try:
            await until(lambda: at.node.jobs.get("j1") is not None)
            if how == "cancel":
                assert (await at.ask("POST", "/api/v2/jobs/j1/cancel", {})).status == 202
            else:
                process.send_signal(signal.SIGTERM)
            status = await trio.to_thread.run_sync(process.wait)
        finally:
            process.kill()
            process.wait()
        assert status == 128 + signal.SIGTERM
        await delivered(at.url, tmp_path)
        ended = await record(at, "j1")
        assert ended["status"] == "cancelled"


async def test_what_is_ignored_here_is_ignored_there(tmp_path: Path) -> None:
    """Under ``nohup`` a command outlives its terminal."""
    async with server() as at:
        wait = 'until test -e "$0"; do sleep 0.02; done; exit 3'
        command = wrapped(at.url, "sh", "-c", wait, str(tmp_path / "go"), options=("--user", "a", "--job", "j1"))
        process = subprocess.Popen(["nohup", *command], env=environment(tmp_path), stdin=subprocess.DEVNULL)  # noqa: ASYNC220
        try:
            await until(lambda: at.node.jobs.get("j1") is not None)
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGHUP)
            (tmp_path / "go").touch()
            assert await trio.to_thread.run_sync(process.wait) == 3
        finally:
            process.kill()
            process.wait()


async def test_run_again_it_is_the_next_attempt(tmp_path: Path) -> None:
    async with server() as at:
        for attempt, end in ((1, "completed"), (2, "failed"), (3, "completed")):
            await run(at, tmp_path, "true" if end == "completed" else "false", options=("--job", "nightly"))
            job = await record(at, "nightly")
            assert (job["attempt"], job["status"]) == (attempt, end)


async def test_killed_itself_it_shows_and_without_output_it_runs(tmp_path: Path) -> None:
    async with server() as at:
        command = wrapped(at.url, "sleep", "60", options=("--user", "a", "--job", "j1", "--ttl", "0.3"))
        process = subprocess.Popen(command, env=environment(tmp_path), start_new_session=True)  # noqa: ASYNC220
        try:
            await until(lambda: at.node.jobs.get("j1") is not None)
            process.kill()
            await until(lambda: b'"error":"lost"' in at.node.jobs.jobs["j1"].latest.body)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        script = 'exec "$@" >&- 2>&-'
        inside = wrapped(at.url, "sh", "-c", "echo 50%; exit 7", options=("--user", "a", "--job", "j2"))
        done = await trio.run_process(["sh", "-c", script, "sh", *inside], check=False, env=environment(tmp_path))
        assert done.returncode == 7
        await delivered(at.url, tmp_path)
        assert (await record(at, "j2"))["progress"] == 50


async def test_a_prompt_is_shown_and_its_answer_passed_on(tmp_path: Path) -> None:
    async with server() as at:
        script = 'printf "name? "; read name; printf "%s\\r50%%\\r" "$name" >&2; read end'
        process = await trio.lowlevel.open_process(
            wrapped(at.url, "sh", "-c", script),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(tmp_path),
        )  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            with trio.fail_after(PATIENCE_S):
                assert await process.stdout.receive_some() == b"name? "
                await process.stdin.send_all(b"\xff\n")
                assert await process.stderr.receive_some() == b"\xff\r50%\r"
                await until(lambda: any(b'"progress":50' in job.latest.body for job in at.node.jobs.jobs.values()))
                await process.stdin.send_all(b"\n")
                assert await process.wait() == 0
        finally:
            process.kill()
            await process.wait()


async def test_output_without_any_end_of_line_goes_on_and_is_not_gathered(tmp_path: Path) -> None:
    async with server() as at:
        # Through a buffer, as a bare write may be cut short where the process is stopped and goes on.
        script = (
            "import sys; w = sys.stdout.buffer.write; [w(bytes(range(14, 256)) * 200) for _ in range(40)]; w(b' 70%')"
        )
        done = await trio.run_process(
            wrapped(at.url, sys.executable, "-c", script), capture_stdout=True, env=environment(tmp_path)
        )
        assert done.stdout == bytes(range(14, 256)) * 8_000 + b" 70%"
        await delivered(at.url, tmp_path)
        (job,) = at.node.jobs.jobs.values()
        assert (job.latest.status, b'"message"' in job.latest.body) == ("completed", True)


async def test_ctrl_c_in_a_terminal_comes_once(tmp_path: Path) -> None:
    """The terminal gives it to all that are in its foreground; many programs take a second one for an order."""
    script = (
        "import signal, time\n"
        "came = []\n"
        "signal.signal(signal.SIGINT, lambda *_: came.append(1))\n"
        "print('ready', flush=True)\n"
        "while not came: time.sleep(0.01)\n"
        "time.sleep(0.5)\n"  # a second one would come right behind the first
        "print(len(came), 'came')\n"
    )
    async with server() as at:
        command = wrapped(at.url, sys.executable, "-c", script)
        terminal = await trio.lowlevel.open_process(
            [sys.executable, "-c", "import pty, sys; pty.spawn(sys.argv[1:])", *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(tmp_path),
        )  # fmt: skip
        shown = b""
        try:
            assert terminal.stdin is not None
            assert terminal.stdout is not None
            with trio.fail_after(PATIENCE_S):
                while b"ready" not in shown:
                    shown += await terminal.stdout.receive_some()
                await terminal.stdin.send_all(b"\x03")
                while b" came" not in shown:
                    shown += await terminal.stdout.receive_some()
        finally:
            terminal.kill()
            await terminal.wait()
        assert b"1 came" in shown


@pytest.mark.parametrize("arguments", [["run"], ["run", "--"], ["run", "--pattern", "(", "--", "true"]])
def test_what_cannot_be_run_is_said(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", *arguments], capture_output=True, text=True, env=environment(tmp_path)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("statuswire: ")
