"""RQ: what was captured of it comes to the right records, and its pickles cannot do anything."""

from __future__ import annotations

import base64
import collections
import datetime
import json
import os
import pickle
import sys
import time
import tracemalloc
import zlib
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.queues.pickles import PickleRefusedError, read_pickle
from protocol.queues.rq import read_job
from tests.protocol.queues.replaying import Replay, captured

RQ = captured("rq")
OK, FAILED = RQ["job_ok"], RQ["job_failed_after_retry"]


def raw(value: Any) -> bytes:
    return base64.b64decode(value["b64"]) if isinstance(value, dict) else str(value).encode()


def replay(*, every: int = 1, results: bool = False) -> Replay:
    """Read a job after each command that wrote to it, or only after some: polled."""
    done = Replay("rq")
    hashes: dict[str, dict[str, bytes]] = {OK: {}, FAILED: {}}
    ends: dict[str, dict[str, bytes]] = {}
    commands = RQ["redis_write_commands_in_order"]
    for number, command in enumerate(commands):
        name, key, *arguments = command["args"]
        job = str(key).rpartition(":")[2]
        if name == "HSET" and key == f"rq:job:{job}":
            hashes[job] |= {str(k): raw(v) for k, v in zip(arguments[::2], arguments[1::2], strict=True)}
        elif name == "XADD":
            fields = arguments[arguments.index("*") + 1 :]
            ends[job] = {str(k): raw(v) for k, v in zip(fields[::2], fields[1::2], strict=True)}
        if number % every == 0 or number == len(commands) - 1 or name == "XADD":
            for known, data in hashes.items():
                fresh = done.known(known) is None
                # A status is written in the same transaction as the rest of a job and how it ended.
                if data.get("status") in (b"failed", b"finished") and known not in ends:
                    continue
                seen = read_job(known, data, ends.get(known), int(command["t"] * 1000), fresh=fresh, results=results)
                done.see(seen)
    return done


def test_hashes_come_to_the_records_of_the_table() -> None:
    done = replay()
    assert [row for row in done.of(OK) if row[0] != "queued"] == [
        ("processing", 0, None),
        ("processing", 25, "Encoding"),
        ("processing", 60, "Encoding"),
        ("completed", 100, "Encoding"),
    ]
    assert [row[0] for row in done.of(FAILED)] == ["queued", "processing", "queued", "processing", "failed"]
    ok, failed = done.shown(OK), done.shown(FAILED)
    assert ok["timestamp"] == "2026-11-21T21:21:07.176Z"
    assert (ok["kind"], ok["attempt"], ok["workerId"]) == ("jobs.encode", 1, "8ffdcb2f37de4bb7890595a8f9622f6d")
    assert failed["attempt"] == 2
    assert failed["error"] == failed["message"]
    assert "Traceback" not in failed["error"]
    assert "a.mov" not in json.dumps([ok, failed])


def test_the_owner_is_in_the_meta() -> None:
    created = next(command["args"] for command in RQ["redis_write_commands_in_order"] if len(command["args"]) > 20)
    data = {str(k): raw(v) for k, v in zip(created[2::2], created[3::2], strict=True)}
    for path in ("meta.user_id", "kwargs.user_id"):
        seen = read_job(OK, data, None, 1, path)
        assert seen is not None
        assert seen.owner == "user_789"


@pytest.mark.parametrize("every", [3, 7, 20])
def test_polled_now_and_then_it_ends_the_same(every: int) -> None:
    done = replay(every=every)
    assert done.of(OK)[-1][0] == "completed"
    assert done.of(FAILED)[-1][0] == "failed"


def test_a_retry_that_was_not_seen_waiting_is_another_attempt() -> None:
    done = Replay()
    for enqueued in ("2026-11-21T21:21:08.609791Z", "2026-11-21T21:21:08.629171Z"):
        data = {"status": b"started", "created_at": b"", "enqueued_at": enqueued.encode()}
        assert done.see(read_job("j", data, None, 5))
        assert not done.see(read_job("j", data, None, 6))
    assert done.shown("j")["attempt"] == 2


def test_json_metas_are_read_too() -> None:
    meta = b'{"user_id":"u","progress":60,"stage":"s"}'
    seen = read_job("j", {"status": b"started", "created_at": b"", "meta": meta}, None, 5)
    assert seen is not None
    assert (seen.owner, seen.progress, seen.stage) == ("u", 60, "s")


def test_results_if_they_are_wanted() -> None:
    assert replay(results=True).shown(OK)["result"] == {"url": "/out/1.mp4"}
    assert "result" not in replay().shown(OK)


@pytest.mark.parametrize(
    "data",
    [{}, {"status": b"wrong", "created_at": b""}, {"status": b"\xff", "created_at": b""}, {"status": b"started"}],
)
def test_what_is_no_job_is_passed_over(data: dict[str, bytes]) -> None:
    assert read_job("j", data, None, 5) is None


def test_damaged_fields_cost_only_themselves() -> None:
    data = {
        "created_at": b"",
        "status": b"failed",
        "meta": b"\x80\x04garbage",
        "data": b"no zlib",
        "enqueued_at": b"yesterday",
    }
    seen = read_job("j", data, {"exc_string": b"%%%"}, 5)
    assert seen is not None
    assert (seen.status, seen.error, seen.owner) == ("failed", "failed", None)
    bomb = zlib.compress(b"x" * 50_000_000)
    seen = read_job(
        "j", {"created_at": b"", "status": b"failed", "data": bomb}, {"exc_string": base64.b64encode(bomb)}, 5
    )
    assert seen is not None
    assert seen.error == "failed"


class Evil:
    """What a pickle of it runs when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nonexistent-parent/made-by-a-pickle",)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN, st.integers(0, 5))
def test_data_comes_out_as_it_went_in(value: Any, protocol: int) -> None:
    text = pickle.dumps(value, protocol)
    if protocol < 3 and (b"_codecs" in text or b"__builtin__" in text):
        return  # bytes of old protocols are made by a call
    try:
        found = read_pickle(text)
    except PickleRefusedError:
        return  # Hypothesis gives the same tuple twice
    assert found == value


def test_instances_are_nothing_and_run_nothing() -> None:
    moment = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    value = {"progress": 40, "evil": Evil(), "when": moment, "left": collections.OrderedDict(a=1), "s": {1, 2}, "z": 5}
    for protocol in range(6):
        found = read_pickle(pickle.dumps(value, protocol))
        assert (found["progress"], found["evil"], found["when"], found["z"]) == (40, None, None, 5)
    assert read_pickle(pickle.dumps(Evil())) is None
    assert not os.path.exists("/nonexistent-parent")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"garbage",
        b"\x80\x04",
        b"\x80\x04K\x01",
        b"t.",
        b"\x80\x04]q\x00h\x00h\x05.",
        b"\x80\x04\x8c\xffabc.",
        b"\x80\x04B\xff\xff\xff\x7f.",
        b"\x80\x04" + b")" + b"\x85" * 1000 + b".",
        b"K\x01" * 2_000_000 + b".",
        b"I" + b"9" * 5000 + b"\n.",
        b"\x80\x04](K\x01e]q\x07(K\x01eh\x07.",
        b"(K\x01K\x02s.",
        b"\x80\x04(" + b"N" * 100_000 + b"l.",
        b"\x80\x04" + b"(" * 40_000 + b"t" * 40_000 + b".",
        b"\x80\x04\x8b\xff\xff\xff\x7f.",
    ],
)
def test_pickles_that_are_refused(data: bytes) -> None:
    with pytest.raises(PickleRefusedError):
        read_pickle(data)


def _pairs(keys: list[int]) -> bytes:
    return b"\x80\x04}(" + b"".join(pickle.dumps(key, 2)[2:-1] + b"N" for key in keys) + b"u."


@pytest.mark.parametrize(
    "bomb",
    [
        # Numbers that all have the same hash: each is compared with all before it.
        _pairs([number * sys.hash_info.modulus for number in range(1, 16_000)]),
        # A number of a million bytes, of which the hash is wanted again and again.
        b"\x80\x04" + pickle.dumps(1 << 8_000_000, 2)[2:-1] + b"\x940}(" + b"h\x00N" * 16_000 + b"u.",
        b"\x80\x05\x95" + b"\xff" * 8 + b"N.",
        b"\x80\x05\x8d" + b"\xff" * 7 + b"\x7fx.",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7fx.",
        b"\x80\x05\x8e" + b"\xff" * 7 + b"\x7fx.",
        b"\x80\x04" + b"]\x94" * 24_000 + b"a" * 1_000 + b".",
        b"\x80\x04" + b"(" * 49_000 + b"1" * 900 + b"N.",
        b"\x80\x04\x8c\xff" + b"x" * 255 + b"\x94" + b"h\x00" * 49_000 + b".",
        b"\x80\x04" + b"\x88r\xff\xff\xff\x7f" * 24_000 + b".",
    ],
    ids=["same hash", "long hash", "frame", "text", "bytearray", "bytes", "lists", "marks", "copies", "memo"],
)
def test_a_bomb_takes_neither_long_nor_much(bomb: bytes) -> None:
    tracemalloc.start()
    began = time.process_time()
    try:
        with suppress(PickleRefusedError):
            read_pickle(bomb)
        took, (_, most) = time.process_time() - began, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < 2.0  # a tenth of it, if nothing is traced; without bounds it is many seconds
    assert most < 40 * 1024 * 1024


def test_a_memo_with_a_huge_index_costs_nothing() -> None:
    assert read_pickle(b"\x80\x04K\x07r\xff\xff\xff\x7f.") == 7


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for start in (b"", b"\x80\x04", b"}(", b"](K\x01"):
        try:
            read_pickle(start + data)
        except PickleRefusedError:
            continue
