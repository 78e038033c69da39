from __future__ import annotations

import pytest

from protocol.errors import ApiError
from protocol.job import Record
from protocol.update import Update
from protocol.watch import (
    ANY,
    EVERYTHING,
    MAX_JOB_IDS,
    RECORD_FIELDS,
    Filter,
    Watch,
    channels_of,
    job_channel,
    parse_fields,
    parse_filter,
    parse_watch,
    user_channel,
    wants_all,
)


def update(type_: str = "status_update", kind: str | None = None, status: str = "queued") -> Update:
    return Update(1, 0, type_, "a", "u", kind, status, 1, b"{}", False, False)


def refused(query: dict[str, str]) -> tuple[int, str, str | None]:
    with pytest.raises(ApiError) as caught:
        parse_watch(query)
    assert caught.value.field is not None
    assert caught.value.field in caught.value.message
    return caught.value.status, caught.value.code, caught.value.field


def test_an_empty_question_asks_for_everything_allowed() -> None:
    assert parse_watch({}) == Watch(None, None, ANY, None)
    assert parse_watch({"unknown": "x", "last_seen": "y"}) == Watch()


def test_all_parts_of_a_question() -> None:
    query = {
        "jobIds": "a, b,a",
        "userId": "u",
        "types": "job_completed,job_failed",
        "kind": "export",
        "status": "queued",
        "fields": "progress,metadata",
    }
    assert parse_watch(query) == Watch(
        ("a", "b"),
        "u",
        Filter(frozenset({"job_completed", "job_failed"}), frozenset({"export"}), frozenset({"queued"})),
        frozenset({"progress", "metadata"}),
    )


@pytest.mark.parametrize("name", ["jobIds", "types", "kind", "status", "fields"])
@pytest.mark.parametrize("text", ["", ",", "a,", " , "])
def test_empty_items_are_refused(name: str, text: str) -> None:
    assert refused({name: text}) == (400, "invalid_parameter", name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("jobIds", "a/b"),
        ("jobIds", "x" * 129),
        ("jobIds", "ä"),
        ("userId", ""),
        ("userId", "a,b"),
        ("types", "heartbeat"),
        ("types", "job_completed,job_started"),
        ("status", "running"),
        ("fields", "secret"),
        ("fields", "Progress"),
    ],
)
def test_wrong_items_are_refused_and_named(name: str, text: str) -> None:
    assert refused({name: text}) == (400, "invalid_parameter", name)


def test_a_thousand_names() -> None:
    names = [f"j{number}" for number in range(MAX_JOB_IDS)]
    assert parse_watch({"jobIds": ",".join(names)}).job_ids == tuple(names)
    assert parse_watch({"jobIds": ",".join([*names, "j0"])}).job_ids == tuple(names)
    assert refused({"jobIds": ",".join([*names, "more"])})[2] == "jobIds"


@pytest.mark.parametrize(
    ("text", "wanted"), [(None, False), ("0", False), ("false", False), ("1", True), ("true", True)]
)
def test_all(text: str | None, wanted: bool) -> None:
    assert wants_all({} if text is None else {"all": text}) is wanted


def test_a_wrong_all_is_refused() -> None:
    for text in ("", "yes", "2", "True"):
        with pytest.raises(ApiError) as caught:
            wants_all({"all": text})
        assert caught.value.field == "all"


@pytest.mark.parametrize(
    ("query", "passing", "failing"),
    [
        ({}, [update(), update("job_deleted")], []),
        ({"types": "job_failed"}, [update("job_failed")], [update(), update("job_completed")]),
        ({"kind": "a,b"}, [update(kind="a"), update(kind="b")], [update(), update(kind="c")]),
        ({"status": "failed,stalled"}, [update(status="stalled")], [update()]),
        (
            {"types": "status_update", "kind": "a", "status": "queued"},
            [update(kind="a")],
            [update("job_failed", "a"), update(kind="b"), update(kind="a", status="stalled")],
        ),
    ],
)
def test_filters(query: dict[str, str], passing: list[Update], failing: list[Update]) -> None:
    wanted = parse_filter(query)
    assert wanted.is_any is (not query)
    assert all(wanted.passes(one) for one in passing)
    assert not any(wanted.passes(one) for one in failing)


def test_channels() -> None:
    assert channels_of(update()) == (EVERYTHING, user_channel("u"), job_channel("a"), job_channel("a", "u"))
    assert len(set(channels_of(update()))) == 4
    # Ids have no slash, so no name of one kind is another's.
    assert user_channel("a") != job_channel("a")


def test_every_record_field_can_be_asked_for() -> None:
    names = set(Record.__struct_encode_fields__)
    assert names <= RECORD_FIELDS
    # "weight" is published, not shown.
    assert {name for name in RECORD_FIELDS if name not in names} <= {"weight"}
    assert parse_fields({"fields": ",".join(sorted(RECORD_FIELDS))}) == RECORD_FIELDS
