"""Configuration files, and what is said of those that are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from server.config import ConfigError
from server.config_load import load_config

SECRET = "0123456789abcdef0123456789abcdef"
PEM = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"
AUTH = {"auth.jwt_key": SECRET}


def toml_file(directory: Path, text: str) -> Path:
    path = directory / "statuswire.toml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(
    flags: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None, file: Path | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(flags or {}, environ or {}, file)
    message = str(caught.value)
    assert "\n" not in message
    return message
