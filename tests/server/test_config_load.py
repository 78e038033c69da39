"""Configuration as it is loaded: layers, tables, text, names that nobody knows, and what is in effect."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from server import config_load as module
from server.config import Config, ConfigError
from server.config_load import describe, find_config_file, load_config, load_with_sources
from server.config_rules import toml
from tests.server.configs import AUTH, SECRET, refused, toml_file

# --- layers -------------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_defaults() -> None:
    config = load_config({}, {"PATH": "/bin", "STATUSWIREX": "1"}, None)
    assert config == Config()
    assert (config.server.host, config.server.port, config.store.url) == ("127.0.0.1", 3000, "sqlite:statuswire.db")
    assert config.auth.open


def test_each_layer_overrides_the_next(tmp_path: Path) -> None:
    file = toml_file(tmp_path, "[server]\nport = 1\ndrain = 1\nheartbeat = 1\n")
    environ = {"STATUSWIRE_SERVER_PORT": "2", "STATUSWIRE_SERVER_DRAIN": "2"}
    config, sources = load_with_sources({"server.port": "3"}, environ, file)
    assert (config.server.port, config.server.drain, config.server.heartbeat) == (3, 2.0, 1.0)
    assert sources == {
        "server.port": "flag --port",
        "server.drain": "environment variable STATUSWIRE_SERVER_DRAIN",
        "server.heartbeat": str(file),
    }


def test_a_flag_that_is_none_was_not_given() -> None:
    assert load_config({"server.port": None}, {"STATUSWIRE_SERVER_PORT": "2"}, None).server.port == 2


def test_a_value_that_another_layer_overrides_is_not_judged() -> None:
    assert load_config({"server.port": "3"}, {"STATUSWIRE_SERVER_PORT": "x"}, None).server.port == 3


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("server.port", "0", 0),
        ("server.port", " 65535 ", 65535),
        ("server.drain", "0", 0.0),
        ("server.drain", "2.5", 2.5),
        ("server.heartbeat", "0.05", 0.05),
        ("server.trusted_proxies", "10.0.0.0/8, ::1,", ("10.0.0.0/8", "::1")),
        ("server.trusted_proxies", "", ()),
        ("server.base_path", "/", ""),
        ("server.base_path", "live", "/live"),
        ("server.base_path", "/a/b/", "/a/b"),
        ("cors.origins", "https://App.Example:443/,http://localhost:8080", ("https://app.example", "http://localhost:8080")),
        ("cors.origins", "http://[::1]:80", ("http://[::1]",)),
        ("history.max_age", "60", 60.0),
        ("limits.publishes_per_second", "0.5", 0.5),
        ("limits.connections_per_user", "7", 7),
        ("log.format", "JSON", "json"),
        ("log.level", "Debug", "debug"),
        ("debug.echo", "true", True),
        ("debug.echo", "1", True),
        ("debug.echo", "false", False),
        ("debug.echo", "0", False),
        ("store.url", "memory:", "memory:"),
        ("store.url", "sqlite:/var/lib/x y.db", "sqlite:/var/lib/x y.db"),
    ],
)  # fmt: skip
def test_text_is_converted_alike_in_flags_and_environment(name: str, text: str, value: object) -> None:
    table, _, key = name.partition(".")
    variable = f"STATUSWIRE_{table}_{key}".upper()
    for config in (load_config({name: text}, {}, None), load_config({}, {variable: text}, None)):
        assert getattr(getattr(config, table), key) == value


def test_toml_has_its_own_types(tmp_path: Path) -> None:
    file = toml_file(
        tmp_path,
        """
        [server]
        port = 8080
        drain = 3          # an integer is a fine number of seconds
        base_path = "/x/"
        trusted_proxies = ["10.0.0.1"]
        [auth]
        jwt_algorithm = "HS384"
        jwt_key = "0123456789abcdef0123456789abcdef0123456789abcdef"
        [cors]
        origins = ["https://a.example"]
        [debug]
        echo = true
        """,
    )
    config = load_config({}, {}, file)
    assert (config.server.port, config.server.drain, config.server.base_path) == (8080, 3.0, "/x")
    assert isinstance(config.server.drain, float)
    assert config.cors.origins == ("https://a.example",)
    assert config.auth.jwt_algorithm == "HS384"
    assert not config.auth.open
    assert config.debug.echo


def test_the_documentation_has_every_key_and_its_default() -> None:
    text = (Path(module.__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `([a-z_.A-Z]+)` \| `(.*?)` \|", text, re.MULTILINE))
    keys = {name: toml(key.default) for name, key in module._KEYS.items()}
    for name, key in module._FAMILY_KEYS.items():
        keys[name.replace(".", ".NAME.")] = toml(key.default)
    assert documented == keys


def test_the_file_is_found(tmp_path: Path) -> None:
    assert find_config_file(None, tmp_path) is None
    file = toml_file(tmp_path, "")
    assert find_config_file(None, tmp_path) == file
    assert find_config_file("other.toml", tmp_path) == Path("other.toml")


def test_queues_without_names(tmp_path: Path) -> None:
    text = (
        "[[ingest]]\nkind = 'bullmq'\nurl = 'redis://a'\nqueues = ['video']\nuser = 'data.userId'\n"
        "[[ingest]]\nkind = 'rq'\n[[ingest]]\nkind = 'bullmq'\n[queues.rq]\nkind = 'celery'\n"
    )
    found = load_config({}, {}, toml_file(tmp_path, text)).queues
    assert {name: queue.kind for name, queue in found.items()} == {
        "rq": "celery", "bullmq": "bullmq", "rq-2": "rq", "bullmq-2": "bullmq",
    }  # fmt: skip
    assert (found["bullmq"].url, found["bullmq"].queues, found["bullmq"].user) == (
        "redis://a",
        ("video",),
        "data.userId",
    )


def test_loading_twice_gives_equal_configs(tmp_path: Path) -> None:
    file = toml_file(tmp_path, "[limits]\nmessages_per_second = 5\n")
    first = load_config(AUTH, {}, file)
    assert load_config(AUTH, {}, file) == first
    toml_file(tmp_path, "[limits]\nmessages_per_second = 6\n")
    assert load_config(AUTH, {}, file).limits.messages_per_second == 6.0


def test_tables_by_name(tmp_path: Path) -> None:
    file = toml_file(
        tmp_path,
        """
        [webhooks.payment]
        event = "payment"
        target_id = "/data/userId"
        secret = "overridden"
        [webhooks.system-notice]
        event = "notice"
        target = "broadcast"
        [callbacks.mail]
        url = "https://app.example/mail"
        types = ["job_failed"]
        unseen_after = 30
        """,
    )
    environ = {
        "STATUSWIRE_WEBHOOKS_PAYMENT_SECRET": SECRET,
        "STATUSWIRE_WEBHOOKS_SYSTEM_NOTICE_SECRET": SECRET[::-1],
    }
    config, sources = load_with_sources({}, environ, file)
    assert list(config.webhooks) == ["payment", "system-notice"]
    assert config.webhooks["payment"].secret == SECRET
    assert config.webhooks["system-notice"].secret == SECRET[::-1]
    assert config.callbacks["mail"].types == ("job_failed",)
    assert config.callbacks["mail"].unseen_after == 30.0
    shown = describe(config, sources)
    assert SECRET not in shown
    written = tomllib.loads(shown)
    assert written["webhooks"]["payment"]["target_id"] == "/data/userId"
    assert written["callbacks"]["mail"]["timeout"] == 10.0
    with pytest.raises(ConfigError, match="unknown environment variable STATUSWIRE_WEBHOOKS_OTHER_SECRET"):
        load_config({}, environ | {"STATUSWIRE_WEBHOOKS_OTHER_SECRET": SECRET}, file)


# --- unknown names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1", "unknown key server.prot in FILE; did you mean server.port?"),
        ("[server]\njwt_key = 'x'", "unknown key server.jwt_key in FILE; did you mean auth.jwt_key?"),
        ("[log]\nxyzzy = 1", "unknown key log.xyzzy in FILE; known keys: log.format, log.level"),
        ("[sever]\nport = 1", "unknown table [sever] in FILE; did you mean server?"),
        ("[xyzzy]\nport = 1", "unknown table [xyzzy] in FILE; known tables: server, auth, cors, "),
        ("port = 1", "unknown key 'port' outside of any table in FILE; did you mean server.port?"),
        ("server = 1", "server (FILE): expected a table, [server], not a single value"),
        ("[server]\nport = ", "FILE is not valid TOML: "),
        ("[webhooks]\nsecret = 'x'", "webhooks.secret (FILE): expected a table, [webhooks.NAME], with keys in it"),
        ("[webhooks.Pay]\nsecret = 'x'", "[webhooks.Pay] (FILE): a name is of a-z 0-9 _ -, at most 64 of them"),
        ("[webhooks.pay]\nsecrt = 'x'", "unknown key webhooks.pay.secrt in FILE; did you mean webhooks.pay.secret?"),
        ("[webhooks.pay]\nxyzzy = 'x'", "unknown key webhooks.pay.xyzzy in FILE; known keys: secret, event, "),
        ("[webhook.pay]\nsecret = 'x'", "unknown table [webhook] in FILE; did you mean webhooks?"),
        ("[webhooks.pay]\nsecret = 'x'", "webhooks.pay.secret must have 16 bytes or more"),
        (f"[webhooks.pay]\nsecret = '{SECRET}'", "webhooks.pay.event is not set"),
        (f"[webhooks.pay]\nsecret = '{SECRET}'\nevent = 'a b'", 'webhooks.pay.event = "a b" (FILE): expected a name'),
        (f"[webhooks.pay]\nsecret = '{SECRET}'\nevent = 'e'", "webhooks.pay.target = 'user' needs a target_id"),
        (
            f"[webhooks.pay]\nsecret = '{SECRET}'\nevent = 'e'\ntarget = 'broadcast'\ntarget_id = '/user'",
            "webhooks.pay.target = 'broadcast' goes to everyone",
        ),
        (
            f"[webhooks.pay]\nsecret = '{SECRET}'\nevent = 'e'\ntarget = 'channel'\ntarget_id = 'a'\nstore = true",
            "webhooks.pay.store keeps notifications for users",
        ),
        ("[webhooks.pay]\ntarget = 'usr'", 'webhooks.pay.target = "usr" (FILE): expected one of broadcast, channel,'),
        ("[webhooks.pay]\ntarget_id = 'user id'", 'webhooks.pay.target_id = "user id" (FILE): expected a JSON pointer'),
        ("[webhooks.pay]\ndata = '/a~2'", 'webhooks.pay.data = "/a~2" (FILE): expected a JSON pointer'),
        ("[callbacks.mail]\ntimeout = 3", "callbacks.mail.url is not set"),
        ("[queues.video]\nurl = 'redis://x'", "queues.video.kind is not set"),
        (
            "[queues.video]\nkind = 'bull'",
            'queues.video.kind = "bull" (FILE): expected one of bull4, bullmq, celery, rq; did you mean',
        ),
        (
            "[queues.video]\nkind = 'rq'\nurl = 'redis+cluster://x'",
            "queues.video.url: rq does not keep its jobs in a Redis Cluster",
        ),
        (
            "[queues.video]\nkind = 'bullmq'\nurl = 'redis+cluster://x'",
            "queues.video.prefix: in a Redis Cluster all keys of a queue have a hash tag",
        ),
        ("[queues.video]\nkind = 'rq'\nurl = ''", "queues.video.url is empty"),
        (
            "[queues.video]\nkind = 'rq'\nid_prefix = 'a b'",
            'queues.video.id_prefix = "a b" (FILE): expected at most 32',
        ),
        ("[[ingest]]\nurl = 'redis://x'", "queues.ingest.kind is not set"),
        ("[[ingest]]\nkind = 'bulmq'", 'queues.bulmq.kind = "bulmq" (FILE): expected one of'),
        ("[[ingest]]\nkind = 5", "queues.ingest.kind = 5 (FILE): expected one of"),
        ("[[ingest]]\nkind = 'rq'\npol = 1", "unknown key queues.rq.pol in FILE"),
        ("ingest = [1]", "ingest (FILE): expected tables, [[ingest]]"),
        ("queues = 1\n[[ingest]]\nkind = 'rq'", "queues (FILE): expected"),
        (
            "[queues.video]\nkind = 'rq'\nuser = 'meta..user'",
            'queues.video.user = "meta..user" (FILE): expected names with dots between',
        ),
        ("[queues.video]\nkind = 'celery'\nqueues = ['a']", "queues.video.queues: Celery does not say which queue"),
        ("[queues.video]\nkind = 'rq'\nevents_url = 'redis://x'", "queues.video.events_url is for Celery"),
        ("[callbacks.mail]\nurl = 'ftp://app'", 'callbacks.mail.url = "ftp://app" (FILE): expected a URL'),
        ("[callbacks.mail]\nurl = 'http://app'\nsecret = 'x'", "callbacks.mail.secret must have 16 bytes or more"),
        ("[callbacks.mail]\ntypes = ['job_lost']", "callbacks.mail.types = "),
    ],
)
def test_bad_names_in_a_file(tmp_path: Path, text: str, words: str) -> None:
    file = toml_file(tmp_path, text)
    assert refused(file=file).startswith(words.replace("FILE", str(file)))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in refused(file=tmp_path / "missing.toml")
    assert "Is a directory" in refused(file=tmp_path)
    (tmp_path / "latin1.toml").write_bytes(b'[store]\nurl = "\xe9"')
    assert "not valid TOML" in refused(file=tmp_path / "latin1.toml")


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("STATUSWIRE_SERVER_PROT", "STATUSWIRE_SERVER_PORT"),
        ("STATUSWIRE_PORT", "STATUSWIRE_SERVER_PORT"),
        ("STATUSWIRE_LIMIT_MAX_MESSAGE", "STATUSWIRE_LIMITS_MAX_MESSAGE"),
    ],
)
def test_unknown_environment_variable(variable: str, meant: str) -> None:
    assert refused(environ={variable: "1"}) == f"unknown environment variable {variable}; did you mean {meant}?"


def test_unknown_flag_key() -> None:
    assert refused({"server.hots": "x"}) == "unknown key server.hots; did you mean server.host?"


def test_client_variables_are_not_ours() -> None:
    environ = {"STATUSWIRE_URL": "http://x", "STATUSWIRE_TOKEN": "t", "STATUSWIRE_SPOOL_DIR": "/x"}
    assert load_config({}, environ, None) == Config()


def test_service_links_of_kubernetes_are_not_configuration() -> None:
    links = {
        "STATUSWIRE_PORT": "tcp://10.0.0.1:3000",
        "STATUSWIRE_PORT_3000_TCP": "tcp://10.0.0.1:3000",
        "STATUSWIRE_PORT_3000_TCP_ADDR": "10.0.0.1",
        "STATUSWIRE_SERVICE_HOST": "10.0.0.1",
        "STATUSWIRE_SERVICE_PORT_HTTP": "3000",
        # of a service named "statuswire-server": the same name as one of our keys
        "STATUSWIRE_SERVER_PORT": "tcp://10.0.0.2:3000",
        "STATUSWIRE_SERVER_SERVICE_HOST": "10.0.0.2",
    }
    assert load_config({}, links, None) == Config()
    assert "STATUSWIRE_SERVICE_HOST" in refused(environ={"STATUSWIRE_SERVICE_HOST": "10.0.0.1"})


# --- what is in effect --------------------------------------------------------------------------------------------


def test_describe_is_toml_that_loads_to_the_same(tmp_path: Path) -> None:
    flags = {
        "server.base_path": "live",
        "server.port": "1",
        "server.trusted_proxies": "::1,10.0.0.0/8",
        "store.url": 'sqlite:/tmp/"quoted"\x7f\\ü.db',
        "debug.echo": "1",
    }
    config, sources = load_with_sources(flags, {}, None)
    text = describe(config, sources)
    assert load_config({}, {}, toml_file(tmp_path, text)) == config
    assert "port = 1  # flag --port\n" in text
    assert "\ndrain = 3.0\n" in text


def test_describe_hides_secrets_and_explains_what_is_implied() -> None:
    config, sources = load_with_sources(AUTH | {"server.unix_socket": "/run/s"}, {}, None)
    text = describe(config, sources)
    assert SECRET not in text
    tables = tomllib.loads(text)
    assert tables["auth"]["jwt_key"] == "(hidden)"
    assert 'jwt_algorithm = "HS256"  # auth.jwt_key is a shared secret' in text
    assert 'host = ""  # no TCP' in text


def test_flags_name_known_keys_only() -> None:
    assert set(module.FLAGS) <= set(module._KEYS)
