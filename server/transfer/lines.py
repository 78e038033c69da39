"""The lines of ``statuswire export``: what is in a store, as one JSON object a line.

- the first, ``{"statuswire": {"format", "version", "epoch", "offset", "at", "first"}}``: where the log stands, and the
  lowest offset from which on nothing of it is missing;
- ``{"job": {"created", "private", "latest"}}`` for every job, in any order: see ``protocol.update.Job``;
- ``{"update": {…}}`` for every kept update, by offset: see ``protocol.update.Update``;
- ``{"stored": {"notice", "users"}}`` for every notification that is kept for users who have not acknowledged it;
- ``{"mark": {"name", "text"}}``: how far a reader of the whole log has come;
- the last, ``{"end": {"jobs", "updates", "sha256"}}``: how many, and the digest of all lines before.

Records stand in them as they were given out, byte for byte. Bounded memory: a line is written, or read, at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from typing import IO, Any, Final, NamedTuple

import msgspec
from msgspec import Raw

from protocol.rollup import fitted
from protocol.update import Job, Private, Update

FORMAT: Final = 1
# A record has 100 KiB and some at most.
_MAX_LINE: Final = 4 * 1024 * 1024

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_fields: Final = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_any: Final = msgspec.json.Decoder().decode
_FIELDS: Final = Update.__struct_fields__


class TransferError(Exception):
    """It cannot be exported or imported; the message says what to do."""


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """Where a log stands.

    Attributes:
        format: of the lines.
        version: of what wrote them.
        epoch: names the incarnation of the log.
        offset: of its newest entry.
        at: time of that, unix milliseconds.
        first: from this offset on every update is there; ``offset + 1`` if there is none.
    """

    format: int = FORMAT
    version: str = ""
    epoch: str
    offset: int
    at: int
    first: int


class End(msgspec.Struct, frozen=True):
    """What should have come before the last line."""

    jobs: int
    updates: int
    sha256: str


class Stored(NamedTuple):
    """A notification that is kept, and who has not acknowledged it."""

    notice: Update
    users: list[str]


class Mark(msgspec.Struct, frozen=True):
    """How far a reader of the whole log has come; see ``Broker.save_mark``."""

    name: str
    text: str


Item = Job | Update | Stored | Mark


class _StoredLine(msgspec.Struct):
    notice: Raw
    users: list[str]


class _JobLine(msgspec.Struct):
    created: int
    private: Private
    latest: Raw


class Writer:
    """Writes lines and counts them.

    Attributes:
        jobs, updates: how many have been written.
    """

    def __init__(self, file: IO[bytes], header: Header) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.jobs = self.updates = 0
        self._line({"statuswire": msgspec.structs.replace(header, version=version("statuswire"))})

    def job(self, job: Job) -> None:
        """Write one job."""
        self.jobs += 1
        self._line({"job": {"created": job.created, "private": job.private, "latest": _builtins(job.latest)}})

    def update(self, update: Update) -> None:
        """Write one update."""
        self.updates += 1
        self._line({"update": _builtins(update)})

    def stored(self, notice: Update, users: list[str]) -> None:
        """Write one notification that waits for users."""
        self._line({"stored": {"notice": _builtins(notice), "users": users}})

    def mark(self, name: str, text: str) -> None:
        """Write one mark."""
        self._line({"mark": Mark(name, text)})

    def end(self) -> None:
        """Write the last line."""
        self._line({"end": End(self.jobs, self.updates, self._digest.hexdigest())})
        self._file.flush()

    def _line(self, value: dict[str, Any]) -> None:
        line = _encode(value) + b"\n"
        self._digest.update(line)
        self._file.write(line)


class Reader:
    """Reads lines and checks them.

    Attributes:
        header: the first one.
        jobs, updates: how many have been read.

    Raises:
        TransferError: from every method: what is wrong, and in which line.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._number = 0
        self.jobs = self.updates = 0
        try:
            name, raw = self._line()
            if name != "statuswire":
                raise ValueError(name)
            self.header = msgspec.json.decode(raw, type=Header)
        except (ValueError, RecursionError, TransferError):
            raise TransferError("the input does not begin like an export of statuswire; name another file") from None
        if self.header.format != FORMAT:
            raise TransferError(
                f"the input has format {self.header.format}, this version reads format {FORMAT}; "
                f"import it with the version that wrote it ({self.header.version})"
            )

    def items(self) -> Iterator[Item]:
        """All there is; the whole input has been found sound only when this is exhausted."""
        offset = self.header.first - 1
        while True:
            sofar = self._digest.hexdigest()
            name, raw = self._line()
            try:
                if name == "job":
                    line = msgspec.json.decode(raw, type=_JobLine)
                    self.jobs += 1
                    yield Job(_update(line.latest), line.created, fitted(line.private))
                elif name == "update":
                    update = _update(raw)
                    if not offset < update.offset <= self.header.offset:
                        raise ValueError(f"offset {update.offset} comes after {offset}")
                    offset = update.offset
                    self.updates += 1
                    yield update
                elif name == "stored":
                    kept = msgspec.json.decode(raw, type=_StoredLine)
                    yield Stored(_update(kept.notice), kept.users)
                elif name == "mark":
                    yield msgspec.json.decode(raw, type=Mark)
                elif name == "end":
                    self._check(msgspec.json.decode(raw, type=End), sofar)
                    return
                else:
                    raise ValueError(f"{name!r} is nothing that is known here")
            except (ValueError, RecursionError) as error:
                raise self._wrong(str(error)) from None

    def _check(self, end: End, digest: str) -> None:
        if (end.jobs, end.updates) != (self.jobs, self.updates) or end.sha256 != digest:
            raise TransferError(
                f"the input is not what was exported: it has {self.jobs} jobs and {self.updates} updates of {end.jobs} "
                f"and {end.updates}, and its checksum {'fits' if end.sha256 == digest else 'does not fit'}; "
                "export or copy it again"
            )
        if self._file.read(1):
            raise TransferError("the input goes on behind its last line; export or copy it again")

    def _line(self) -> tuple[str, Raw]:
        self._number += 1
        line = self._file.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise TransferError(f"the input breaks off in line {self._number}; export or copy it again")
        self._digest.update(line)
        try:
            ((name, raw),) = _decode(line).items()
        except (ValueError, RecursionError) as error:
            raise self._wrong(str(error)) from None
        return name, raw

    def _wrong(self, reason: str) -> TransferError:
        return TransferError(f"line {self._number} of the input cannot be read ({reason}); export or copy it again")


def _builtins(update: Update) -> dict[str, object]:
    return {name: Raw(update.body) if name == "body" else getattr(update, name) for name in _FIELDS}


def _update(raw: Raw) -> Update:
    fields = _decode_fields(raw)
    values: dict[str, object] = {name: _decode_any(value) for name, value in fields.items() if name != "body"}
    values["body"] = bytes(fields.get("body", b""))
    if not values["body"]:
        raise ValueError("an update without body")
    try:
        return msgspec.convert([values[name] for name in _FIELDS], Update)
    except KeyError as error:
        raise ValueError(f"an update without {error.args[0]}") from None
