"""Ends of jobs on disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest

from statuswire import spool
from statuswire.spool import Entry, Spool

NOW_US = 1_700_000_000_000_000


def entry(key: str, at: int = NOW_US) -> Entry:
    return Entry(key, at, "job", msgspec.Raw(b'{"jobId":"job","status":"completed","message":"%s"}' % key.encode()), 2)


def adopted(heir: Spool) -> list[str]:
    return [found.key for found, _ in heir.adopt(100, NOW_US)]


def test_what_is_kept_can_be_read_until_it_is_done(tmp_path: Path) -> None:
    one = Spool(tmp_path / "made" / "by it")
    places = [one.keep(entry(f"{number}")) for number in range(3)]
    assert places[1].journal.read(places[1]) == b'{"jobId":"job","status":"completed","message":"1"}'
    for number, place in enumerate(places):
        one.done(place, f"{number}")
    assert places[0].journal.path.read_bytes() == b""
    again = one.keep(entry("again"))
    assert again.offset == 0
    assert again.journal.read(again).endswith(b'"again"}')
    one.done(again, "again")
    one.close()
    assert list(tmp_path.glob("**/*.journal")) == []


def test_only_what_was_not_done_is_left_to_others_and_only_when_the_owner_is_gone(tmp_path: Path) -> None:
    one, two, three = Spool(tmp_path), Spool(tmp_path), Spool(tmp_path)
    places = {key: one.keep(entry(key)) for key in "abcd"}
    one.done(places["b"], "b")
    assert adopted(two) == []
    one.close()
    found = list(two.adopt(100, NOW_US))
    assert [(left.key, left.at, left.job_id, left.attempt) for left, _ in found] == [
        (key, NOW_US, "job", 2) for key in "acd"
    ]
    assert [place.journal.read(place)[-4:] for _, place in found] == [b'"a"}', b'"c"}', b'"d"}']
    assert adopted(two) == []
    assert adopted(three) == []
    two.done(found[0][1], "a")
    two.close()
    found = list(three.adopt(100, NOW_US))
    assert [left.key for left, _ in found] == ["c", "d"]
    for left, place in found:
        three.done(place, left.key)
    assert list(tmp_path.iterdir()) == []
    three.close()


def test_a_line_that_is_cut_short_was_not_kept(tmp_path: Path) -> None:
    one, two = Spool(tmp_path), Spool(tmp_path)
    place = one.keep(entry("a"))
    one.keep(entry("b"))
    one.close()
    os.truncate(place.journal.path, place.length + 20)
    with place.journal.path.open("r+b") as file:
        file.seek(place.length)
        # Nor do lines that are not what they were.
        file.write(b'\0\n{}\n[1]\n{"done":"\xff"}\n{"key":"k","at":1,"jobId":"\xff","update":{}}\n')
    found = list(two.adopt(100, NOW_US))
    assert [left.key for left, _ in found] == ["a"]
    two.keep(entry("c"))
    two.done(found[0][1], "a")
    two.close()
    assert adopted(Spool(tmp_path)) == ["c"]


def test_what_is_done_is_done_behind_a_line_that_is_cut_short(tmp_path: Path) -> None:
    one, two, three = Spool(tmp_path), Spool(tmp_path), Spool(tmp_path)
    place = one.keep(entry("a"))
    one.keep(entry("b"))
    one.close()
    with place.journal.path.open("ab") as file:
        file.write(b'{"key":"c","at":')
    (first, where), _ = two.adopt(100, NOW_US)
    two.done(where, first.key)
    two.close()
    assert adopted(three) == ["b"]
    three.close()


def test_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Spool(tmp_path)
    one.keep(entry("a"))
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr(spool, "MAX_JOURNAL", 2 * size)
    one.keep(entry("b"))
    with pytest.raises(OSError, match="no more"):
        one.keep(entry("c"))
    monkeypatch.setattr(spool, "MAX_SPOOL", size)
    two = Spool(tmp_path)
    with pytest.raises(OSError, match="full"):
        two.keep(entry("d"))
    one.close()
    assert adopted(two) == ["a", "b"]
    two.close()
    assert [found.key for found, _ in Spool(tmp_path).adopt(100, NOW_US + spool.MAX_AGE_US + 1)] == []
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Spool(tmp_path)
    one.keep(entry("a"))
    whole = os.pwrite
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:10], offset))
        with pytest.raises(OSError, match="disk is full"):
            one.keep(entry("b"))
    one.keep(entry("c"))
    one.close()
    assert adopted(Spool(tmp_path)) == ["a", "c"]


def test_a_spool_that_was_closed_goes_on_with_another_journal(tmp_path: Path) -> None:
    one = Spool(tmp_path)
    place = one.keep(entry("a"))
    one.close()
    with pytest.raises(OSError, match="descriptor"):
        place.journal.read(place)
    with pytest.raises(OSError, match="descriptor"):
        place.journal.add(entry("b"))
    one.keep(entry("c"))
    assert len(list(tmp_path.iterdir())) == 2
    one.close()


def test_a_file_that_cannot_be_removed_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = Spool(tmp_path)
    place = left.keep(entry("a"))
    left.done(place, "a")
    left.abandon()

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        heir = Spool(tmp_path)
        assert adopted(heir) == []
        heir.keep(entry("b"))
        heir.close()
    later = Spool(tmp_path)
    assert adopted(later) == ["b"]
    later.close()
