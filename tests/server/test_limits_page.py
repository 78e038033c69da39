"""``docs/limits.md`` says what is true: every key with its default, and the bounds that cannot be set."""

from __future__ import annotations

import re

from protocol import fields, http1, messages, notice, proxy, request
from server import config_load, inbox, node, publishing, tls
from server.config_rules import toml
from server.routes import jobs, webhooks
from server.transports import websocket, websocket_messages
from tests.hostility.attacks import ATTACKS, SCARCITIES
from tests.support import ROOT

PAGE = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
FIXED = {
    "TLS handshake, received": tls.HANDSHAKE_BYTES,
    "TLS records without content": tls.EMPTY_BYTES,
    "PROXY header, version 1": proxy.MAX_LINE,
    "PROXY header, version 2, behind its head": proxy.MAX_REST,
    "request line": http1.MAX_REQUEST_LINE,
    "header section": http1.MAX_HEADER_SECTION,
    "query parameters": request.MAX_PARAMETERS,
    "one update": fields.MAX_UPDATE,
    "`result` and `metadata` together": fields.MAX_PAYLOAD,
    "one text field": fields.MAX_TEXT,
    "levels of nesting": fields.MAX_DEPTH,
    "one batch": jobs.MAX_BATCH,
    "updates in a batch, or in a message": publishing.MAX_UPDATES,
    "body of a webhook, read once its headers are in order": webhooks.MAX_BODY,
    "malformed messages in a row": websocket.MAX_MISTAKES,
    "unanswered publishes of a connection": websocket_messages.MAX_UNANSWERED,
    "channels of a connection": notice.MAX_CHANNELS,
    "kinds that a `subscribe` asks for, together": messages.MAX_KINDS,
    "notifications stored for a user": inbox.MAX_PER_USER,
    "sockets that are told that they are too many": node.REFUSED_SOCKETS,
}


def rows() -> dict[str, tuple[str, ...]]:
    found = {}
    for line in PAGE.splitlines():
        if line.startswith("| `") and line.count("|") == 5:
            key, default, *words = (cell.strip() for cell in line.strip("|").split("|"))
            found[key.strip("`")] = (default.strip("`"), *words)
    return found


def test_the_table_has_real_keys_with_their_defaults() -> None:
    table = rows()
    known = {name: toml(key.default) for name, key in config_load._KEYS.items()}
    assert {key: cells[0] for key, cells in table.items()} == {key: known.get(key) for key in table}
    assert not [key for key, cells in table.items() if not all(cells)], "a cell is empty"


def test_the_table_has_all_limits() -> None:
    bounds = {name for name in config_load._KEYS if name.startswith(("limits.", "history.max_"))}
    assert bounds <= rows().keys()


def test_what_cannot_be_set_is_as_it_says() -> None:
    said = dict(re.findall(r"^\| ([^|]+?) \| (\d+)[^|]* \| [^|]+ \|$", PAGE, re.MULTILINE))
    assert {name: int(value) for name, value in said.items()} == FIXED


def test_other_pages_lead_here() -> None:
    for name in ("configuration.md", "operations.md"):
        assert "(limits.md)" in (ROOT / "docs" / name).read_text(encoding="utf-8")


def test_the_page_says_what_readers_felt_under_every_attack() -> None:
    _, _, table = PAGE.partition("| attack | connects |")
    assert [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]] == [*ATTACKS, *SCARCITIES]
