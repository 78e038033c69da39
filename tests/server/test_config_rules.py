"""What a configuration may be: each value by itself, and keys that depend on each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import Config, ConfigError, is_loopback
from server.config_load import describe, load_config, load_with_sources
from server.limits import parse_proxies
from tests.server.configs import AUTH, PEM, SECRET, refused, toml_file

# --- bad values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("server.port", "abc", 'server.port = "abc" (flag --port): expected a whole number from 0 to 65535'),
        ("server.port", "65536", "whole number from 0 to 65535"),
        ("server.port", "-1", "whole number from 0 to 65535"),
        ("server.port", "1.5", "whole number from 0 to 65535"),
        ("server.port", True, "server.port = true (flag --port): expected a whole number"),
        ("server.host", 5, "server.host = 5 (flag --host): expected a string"),
        ("server.workers", "0", "whole number, 1 or more"),
        ("server.drain", "-1", "a number, 0 or more"),
        ("server.drain", "nan", "a number, 0 or more"),
        ("server.drain", "inf", "a number, 0 or more"),
        ("server.heartbeat", "0", "a number greater than 0"),
        ("history.max_age", "soon", "a number greater than 0"),
        ("history.max_updates", "0", "whole number, 1 or more"),
        ("limits.connections_per_user", "-1", "whole number, 0 or more"),
        ("server.trusted_proxies", "10.0.0.0/8,proxy", "'proxy' is neither an IP address nor a network"),
        ("server.trusted_proxies", "*", '"0.0.0.0/0" trusts everyone'),
        ("server.trusted_proxies", [1], "expected a list of strings"),
        ("server.base_path", "/a//b", "plain URL path"),
        ("server.base_path", "/../b", "plain URL path"),
        ("server.base_path", "/a?b", "plain URL path"),
        ("cors.origins", "https://a.example/path", "'https://a.example/path' is not an origin"),
        ("cors.origins", "a.example", "is not an origin"),
        ("log.level", "warn", "expected one of debug, error, info, warning; did you mean 'warning'?"),
        ("log.format", "xml", "expected one of json, plain"),
        ("debug.echo", "yes", "expected true or false"),
        ("auth.jwt_algorithm", "none", "expected one of ES256, "),
        ("auth.jwt_algorithm", "HS265", "did you mean 'HS256'?"),
        ("store.url", "sqlite", "expected memory:, sqlite:PATH or redis"),
        ("store.url", "sqlite:", "expected memory:, sqlite:PATH or redis"),
        ("store.url", "postgres://x", "expected memory:, sqlite:PATH or redis"),
        ("store.url", "sqlite:///x.db", "without //"),
        ("store.url", "sqlite::memory:", "write memory:"),
    ],
)
def test_bad_values_name_key_value_and_source(name: str, value: object, words: str) -> None:
    message = refused({name: value})
    assert message.startswith(f"{name} = ")
    assert "(flag " in message
    assert words in message


def test_bad_value_from_environment_and_file(tmp_path: Path) -> None:
    message = refused(environ={"STATUSWIRE_SERVER_PORT": "x"})
    assert message.startswith('server.port = "x" (environment variable STATUSWIRE_SERVER_PORT): ')
    file = toml_file(tmp_path, '[server]\nport = "3000"')
    assert refused(file=file).startswith(f'server.port = "3000" ({file}): ')
    assert "list of strings" in refused(file=toml_file(tmp_path, '[cors]\norigins = "https://a.example"'))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"auth.hook_url": "app/who"}, 'auth.hook_url = "app/who" (flag auth.hook_url): expected a URL like'),
        ({"auth.hook_url": "http://app:x/who"}, "auth.hook_url"),
        ({"server.tls_key": "k.pem"}, "server.tls_key (flag server.tls_key): there is no server.tls_cert"),
        ({"server.tls_cert": "c.pem", "server.unix_socket": "s.sock"}, "TLS is for TCP"),
    ],
)
def test_what_makes_no_sense(flags: dict[str, object], words: str) -> None:
    message = refused(flags)
    assert words in message
    assert "unknown" not in message
    assert "pw" not in message


def test_several_workers_need_a_store_that_they_share() -> None:
    message = refused({"server.workers": "4"})
    assert message.startswith("server.workers = 4 (flag --workers): several workers need a Redis store")
    assert "store.url is sqlite:statuswire.db" in message
    assert "need a Redis store" in refused({"server.workers": "2", "store.url": "memory:"})
    config = load_config({"server.workers": "4", "store.url": "redis://h"}, {}, None)
    assert config.server.workers == 4


def test_a_key_may_be_there_and_empty() -> None:
    assert load_config({}, {"STATUSWIRE_AUTH_HOOK_URL": "", "STATUSWIRE_SERVER_TLS_CERT": ""}, None) == Config()


# --- keys that depend on each other -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST.", True),
        ("api.localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.com", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_without_auth_only_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
    flags = {"server.host": host}
    if loopback:
        assert load_config(flags, {}, None).server.host == host
    elif host:
        message = refused(flags)
        assert "without auth everyone is an admin" in message
        assert "auth.jwt_key" in message
        assert load_config(flags | AUTH, {}, None).server.host == host
        # beside a Unix socket the TCP address is as open as alone
        assert "loopback only" in refused(flags | {"server.unix_socket": "/run/s"})


@pytest.mark.parametrize(
    ("flags", "host", "tcp"),
    [
        ({}, "", False),
        ({"server.port": "3000"}, "127.0.0.1", True),
        ({"server.host": "localhost"}, "localhost", True),
        ({"server.host": ""}, "", False),
    ],
)
def test_a_unix_socket_alone_replaces_tcp(flags: dict[str, object], host: str, tcp: bool) -> None:
    server = load_config(flags | {"server.unix_socket": "/run/s"}, {}, None).server
    assert (server.host, server.tcp, server.unix_socket) == (host, tcp, "/run/s")


def test_nowhere_to_listen() -> None:
    assert "nothing to listen on" in refused({"server.host": ""})
    assert "nothing to listen on" in refused({"server.host": ""} | AUTH)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"auth.jwt_key": "x" * 31}, "auth.jwt_key has 31 bytes; a secret for HS256 must have 32 or more"),
        ({"auth.jwt_key": "é" * 15, "auth.jwt_algorithm": "HS512"}, "has 30 bytes; a secret for HS512"),
        ({"auth.jwt_key": SECRET, "auth.jwt_key_file": "k"}, "auth.jwt_key and auth.jwt_key_file are set together"),
        ({"auth.jwt_key_file": "k", "auth.jwks_file": "j"}, "auth.jwt_key_file and auth.jwks_file are set together"),
        ({"auth.jwt_algorithm": "HS256"}, "auth.jwt_algorithm = HS256 needs a key"),
        ({"auth.jwks_file": "j"}, "auth.jwks_file is set but auth.jwt_algorithm is not"),
        ({"auth.jwt_key": PEM}, "auth.jwt_key is set but auth.jwt_algorithm is not"),
    ],
)
def test_auth_keys_that_do_not_fit(flags: dict[str, object], words: str) -> None:
    message = refused(flags)
    assert words in message
    assert SECRET not in message


def test_a_secret_alone_means_hs256() -> None:
    assert load_config(AUTH, {}, None).auth.jwt_algorithm == "HS256"
    assert load_config({"auth.jwt_key_file": "k"}, {}, None).auth.jwt_algorithm == ""
    assert load_config(AUTH | {"auth.jwt_algorithm": "hs384"}, {}, None).auth.jwt_algorithm == "HS384"


def test_a_pem_key_in_the_environment_may_have_escaped_line_ends() -> None:
    environ = {"STATUSWIRE_AUTH_JWT_KEY": PEM.replace("\n", "\\n"), "STATUSWIRE_AUTH_JWT_ALGORITHM": "EdDSA"}
    assert load_config({}, environ, None).auth.jwt_key == PEM


def test_secrets_stay_out_of_messages() -> None:
    assert "hunter2" not in refused({"auth.jwt_key": ["hunter2"]})
    assert "hunter2" not in refused({"auth.jwt_key": "hunter2"})
    assert "hunter2" not in refused({"store.url": "redis://:hunter2@host/none"})
    config, sources = load_with_sources(
        {"store.url": "redis+sentinel://:hunter2@h/N?sentinel_password=hunter2"}, {}, None
    )
    assert "hunter2" not in describe(config, sources)
    assert config.store.label == "redis+sentinel://(hidden)@h/N?sentinel_password=(hidden)"


# --- the store, proxies, origins ----------------------------------------------------------------------------------


def test_store_parts() -> None:
    store = load_config({"store.url": "sqlite:a:b.db"}, {}, None).store
    assert (store.kind, store.path) == ("sqlite", "a:b.db")
    store = load_config({"store.url": "memory:"}, {}, None).store
    assert (store.kind, store.path) == ("memory", "")
    for url in ("redis://:pw@h:6379/0", "rediss://h", "redis+sentinel://a:1,b:2/NAME/0", "redis+cluster://a:1"):
        store = load_config({"store.url": url}, {}, None).store
        assert (store.kind, store.url, store.path) == ("redis", url, "")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://a,b", "takes one host"),
        ("redis://host/x", "number of a database"),
        ("redis+sentinel://host", "needs the master's name"),
        ("redis+proxy://host", "begins with one of"),
        ("redis:host", "is not host"),
        ("postgres://host", "expected memory:, sqlite:PATH or redis://HOST"),
    ],
)
def test_a_store_that_cannot_be_meant(url: str, words: str) -> None:
    assert words in refused({"store.url": url})


def test_trusted_proxies_are_networks_or_the_unix_socket() -> None:
    server = load_config({"server.trusted_proxies": "10.1.2.3/8,::1,unix"}, {}, None).server
    proxies = parse_proxies(server.trusted_proxies)
    assert ([str(network) for network in proxies.networks], proxies.unix) == (["10.0.0.0/8", "::1/128"], True)


@pytest.mark.parametrize("origin", ["*", "null"])
def test_any_page_is_an_origin_only_with_auth(origin: str) -> None:
    assert load_config(AUTH | {"cors.origins": origin}, {}, None).cors.origins == (origin,)
    with pytest.raises(ConfigError, match="without auth every web page"):
        load_config({"cors.origins": origin}, {}, None)


def test_a_spool_is_for_redis() -> None:
    store = load_config({"store.url": "redis://h", "store.spool": "true"}, {}, None).store
    assert (store.spool, store.spool_file(), store.spool_file(3)) == (True, "statuswire.spool", "statuswire.spool.3")
    with pytest.raises(ConfigError, match=r"store\.spool = true \(flag store\.spool\): the store is sqlite:a.db"):
        load_config({"store.url": "sqlite:a.db", "store.spool": True}, {}, None)
    with pytest.raises(ConfigError, match=r"store\.spool_path is empty"):
        load_config({"store.url": "redis://h", "store.spool": True, "store.spool_path": ""}, {}, None)
