from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from server.auth import Authenticator
from server.cli import main
from server.config_load import load_config
from tests.support import PATIENCE_S

SECRET = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_configuration_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("STATUSWIRE_URL", "STATUSWIRE_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("statuswire: ")
    assert captured.err.count("\n") == 1
    return captured.err


def run_server(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


# --- the command line itself --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND; see `statuswire --help`"),
        (["watsh"], "invalid choice: 'watsh'"),
        (["serve", "--prot", "1"], "unrecognized arguments: --prot 1"),
        (["token"], "required: --sub; see `statuswire token --help`"),
        (["token", "--sub", "ann", "--capability", "fly"], "invalid choice: 'fly'"),
        (["token", "--sub", "ann", "--ttl", "0"], "argument --ttl: invalid number value: '0'"),
        (["token", "--sub", "ann", "--ttl", "soon"], "argument --ttl"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in usage_error(arguments, capsys)


@pytest.mark.parametrize("command", ["", "serve", "check-config", "export", "import", "token", "publish", "watch"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command.split(), "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: statuswire {command}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    name, version = capsys.readouterr().out.split()
    assert name == "statuswire"
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert version == pyproject["project"]["version"]


def test_starting_up_imports_only_what_is_needed() -> None:
    code = (
        "import sys; from server.cli import main\n"
        "try: main(['watch', '--help'])\n"
        "except SystemExit: print(sorted({'httpx', 'rich', 'jwt', 'trio', 'cryptography'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("\n[]\n")


def test_python_m_server() -> None:
    ran = run_server("check-config", "--port", "x")
    assert ran.returncode == 2
    assert ran.stderr == 'statuswire: server.port = "x" (flag --port): expected a whole number from 0 to 65535\n'
    assert ran.stdout == ""


# --- serve and check-config ---------------------------------------------------------------------------------------


def test_check_config_prints_what_is_in_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "statuswire.toml").write_text("[server]\nport = 1\ndrain = 2\n")
    monkeypatch.setenv("STATUSWIRE_AUTH_JWT_KEY", SECRET)
    assert main(["check-config", "--host", "0.0.0.0", "--store", "memory:"]) == 0
    text = capsys.readouterr().out
    assert SECRET not in text
    tables = tomllib.loads(text)
    assert tables["server"]["host"] == "0.0.0.0"
    assert tables["server"]["port"] == 1
    assert tables["store"]["url"] == "memory:"
    assert "drain = 2.0  # statuswire.toml\n" in text
    assert "# environment variable STATUSWIRE_AUTH_JWT_KEY\n" in text


def test_config_option_wins_over_the_file_in_the_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "statuswire.toml").write_text("nonsense")
    (tmp_path / "other.toml").write_text("[server]\nport = 5\n")
    assert main(["check-config", "--config", "other.toml"]) == 0
    assert "port = 5  # other.toml" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "check-config"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "missing.toml"], "cannot read the configuration file 'missing.toml'"),
        (["--host", "0.0.0.0"], "without auth everyone is an admin"),
        (["--jwt-key", "short"], "auth.jwt_key has 5 bytes"),
        (["--workers", "3"], "several workers need a Redis store"),
        (["--store", "redis://h/x"], "number of a database"),
        (["--log-level", "loud"], "expected one of debug"),
    ],
)
def test_a_bad_configuration_is_one_line_and_status_2(
    command: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("statuswire: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_check_config_reads_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("too short\n")
    (tmp_path / "statuswire.toml").write_text("[auth]\njwt_algorithm = 'HS256'\njwt_key_file = 'key'\n")
    assert main(["check-config"]) == 2
    assert "jwt_key_file" in capsys.readouterr().err


def test_serve_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "statuswire.toml").write_text("[server]\ndrain = 0\n")
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--store", "memory:"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert address is not None
            assert httpx.get(f"{address[0]}/health", trust_env=False).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_serve_says_why_it_cannot_listen() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ran = run_server("serve", "--port", str(port), "--store", "memory:")
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.splitlines()[-1].startswith(f"statuswire: cannot listen on 127.0.0.1 port {port}: ")


# --- token --------------------------------------------------------------------------------------------------------


def pem(key: Any, *, public: bool = False, password: bytes | None = None) -> str:
    if public:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        data: bytes = key.public_key().public_bytes(serialization.Encoding.PEM, form)
        return data.decode()
    encryption: Any = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    data = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return data.decode()


RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


@pytest.mark.parametrize(
    ("algorithm", "sign", "verify"),
    [
        ("HS256", SECRET, SECRET),
        ("HS512", SECRET * 2, SECRET * 2),
        ("RS256", pem(RSA), pem(RSA, public=True)),
        ("ES256", pem(EC), pem(EC, public=True)),
        ("EdDSA", pem(ED), pem(ED, public=True)),
    ],
)
@pytest.mark.parametrize("inline", [True, False])
def test_tokens_that_the_server_takes(
    algorithm: str, sign: str, verify: str, inline: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("STATUSWIRE_AUTH_JWT_ALGORITHM", algorithm)
    if inline:
        monkeypatch.setenv("STATUSWIRE_AUTH_JWT_KEY", sign)
    else:
        (tmp_path / "key").write_text(sign + "\n")
        monkeypatch.setenv("STATUSWIRE_AUTH_JWT_KEY_FILE", "key")
    options = ["--capability", "publish", "--capability", "notify", "--job", "export-*", "--ttl", "60"]
    assert main(["token", "--sub", "ann", *options, "--url", "http://unused", "--token", "unused"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    token = captured.out.strip()
    config = load_config({"auth.jwt_key": verify, "auth.jwt_algorithm": algorithm}, {}, None)
    identity = Authenticator(config.auth).verify(token)
    assert (identity.user, identity.admin) == ("ann", False)
    assert identity.capabilities == {"publish", "notify"}
    assert identity.jobs == ("export-*",)
    assert identity.expires_at is not None
    assert 50 < identity.expires_at - time.time() <= 61


def test_an_admin_for_a_day(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--sub", "root", "--admin", "--jwt-key", SECRET]) == 0
    claims = jwt.decode(capsys.readouterr().out.strip(), SECRET, algorithms=["HS256"])
    assert claims.keys() == {"sub", "exp", "admin"}
    assert claims["admin"] is True
    assert 86_000 < claims["exp"] - time.time() <= 86_401


def test_audience_and_issuer_are_those_of_the_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "statuswire.toml").write_text(
        f"[auth]\njwt_key = '{SECRET}'\njwt_audience = 'statuswire'\njwt_issuer = 'https://id.example'\n"
    )
    assert main(["token", "--sub", "ann"]) == 0
    token = capsys.readouterr().out.strip()
    config = load_config({}, {}, tmp_path / "statuswire.toml")
    assert Authenticator(config.auth).verify(token).user == "ann"
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["aud"], claims["iss"]) == ("statuswire", "https://id.example")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "signing a token needs auth.jwt_key or auth.jwt_key_file"),
        (["--jwt-key", pem(RSA, public=True), "--jwt-algorithm", "RS256"], "public key"),
        (["--jwt-key", pem(RSA, password=b"pw"), "--jwt-algorithm", "RS256"], "encrypted"),
        (["--jwt-key", pem(RSA), "--jwt-algorithm", "ES256"], "needs an EC key"),
        (["--jwt-key", pem(ED), "--jwt-algorithm", "HS256"], "PEM"),
        (["--jwt-key", SECRET, "--jwt-algorithm", "RS256"], "is not a PEM key"),
        (["--jwt-key", "short"], "has 5 bytes"),
    ],
)
def test_keys_that_cannot_sign(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--sub", "ann", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("sub", ["", "two words", "é", "x" * 129])
def test_users_that_no_server_would_take(sub: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "--sub", sub, "--jwt-key", SECRET]) == 2
    assert "a user is 1 to 128 characters" in capsys.readouterr().err
