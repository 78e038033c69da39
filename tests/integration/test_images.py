"""The image, the compose file and the manifests: checked by the tools made for them, and the image's steps done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from server.app import STOP_S
from server.config_load import load_config
from tests.integration.running import ROOT, free_port
from tests.support import SECRET

pytestmark = pytest.mark.slow

DOCKERFILE = ROOT / "tools" / "docker" / "Dockerfile"
COMPOSE = ROOT / "tools" / "docker" / "compose.yaml"
MANIFESTS = sorted((ROOT / "tools" / "kubernetes").glob("*.yaml"))


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One that came with the tests' own packages."""
    path = Path(sys.executable).with_name(name)
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, timeout=60, check=False)


# --- the image ------------------------------------------------------------------------------------------------------


@dataclass
class Image:
    """What a Dockerfile comes to; of several stages, each."""

    steps: list[tuple[str, str]] = field(default_factory=list)
    environ: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)


def stages() -> list[Image]:
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M))
    found: list[Image] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found.append(Image())
        elif word in ("RUN", "COPY", "WORKDIR"):
            found[-1].steps.append((word, rest))
            found[-1].settings[word] = rest
        elif word == "ENV":
            found[-1].environ |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif found:
            found[-1].settings[word] = rest
    return found


def command(image: Image, *names: str) -> list[str]:
    """What is run, which has to be in the exec form: no shell between the server and its signals."""
    found: list[str] = []
    for name in names:
        found += json.loads(
            image.settings[name].partition("CMD ")[2] if name == "HEALTHCHECK" else image.settings[name]
        )
    return found


def test_the_dockerfile_is_good() -> None:
    linted = program("hadolint", str(DOCKERFILE))
    assert (linted.returncode, linted.stdout) == (0, "")


def test_the_image_is_of_the_least_rights() -> None:
    *_, image = stages()
    user, _, group = image.settings["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert image.settings["STOPSIGNAL"] == "SIGTERM"
    assert image.settings["WORKDIR"] == image.settings["VOLUME"] == "/var/lib/statuswire"
    assert command(image, "ENTRYPOINT", "CMD") == ["statuswire", "serve"]


def test_the_steps_of_the_image(tmp_path: Path) -> None:
    """Each step, with this directory for the image's root; then what it runs: the server, and its health check."""
    root = tmp_path / "root"
    (root / "var/lib").mkdir(parents=True)
    inside = re.compile(r"(?<![\w./-])/(?=opt/|src\b|var/lib)")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "node_modules")
    build, image = stages()
    # Packages that were downloaded once need not be again; nobody but root may give files away.
    environ = os.environ | build.environ | {"PIP_NO_CACHE_DIR": "0"}
    for stage in (build, image):
        where = root
        for word, text in stage.steps:
            if word == "WORKDIR":
                where = root / text.lstrip("/")
                where.mkdir(parents=True, exist_ok=True)
            elif word == "COPY" and not text.startswith("--from"):
                *sources, target = text.split()
                for source in sources:
                    origin = ROOT / source
                    if origin.is_dir():
                        shutil.copytree(origin, where / target, ignore=ignored)
                    else:
                        shutil.copy(origin, where / target)
            elif word == "RUN":
                line = inside.sub(f"{root}/", text).replace("python -m venv", f"{sys.executable} -m venv")
                line = re.sub(r"chown \S+", "true", line)
                done = subprocess.run(
                    ["sh", "-ec", line],
                    cwd=where,
                    env=environ,
                    capture_output=True,
                    text=True,
                    timeout=300,
                    check=False,
                )
                assert done.returncode == 0, done.stdout + done.stderr
    assert not (root / "opt/statuswire/bin/pip").exists()

    port = free_port()
    plain = {"PATH": f"{root}/opt/statuswire/bin:/usr/bin:/bin", "STATUSWIRE_SERVER_PORT": str(port)}
    running = {name: value for name, value in image.environ.items() if name != "PATH"} | plain
    entry = command(image, "ENTRYPOINT", "CMD")
    data = root / "var/lib/statuswire"
    refused = subprocess.run(entry, cwd=data, env=running, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 2
    assert "without auth everyone is an admin" in refused.stderr, "an image without a key serves nobody"
    server = subprocess.Popen(
        entry, cwd=data, env=running | {"STATUSWIRE_AUTH_JWT_KEY": SECRET}, stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    try:
        assert b"listening on http://0.0.0.0:" in server.stdout.readline()
        check = command(image, "HEALTHCHECK")
        asked = running | {"STATUSWIRE_URL": f"http://127.0.0.1:{port}"}
        assert subprocess.run(check, env=asked, timeout=30, check=False).returncode == 0
        assert subprocess.run([*check, "--ready"], env=asked, timeout=30, check=False).returncode == 0
        assert (data / "statuswire.db").exists()
    finally:
        server.terminate()
        assert server.wait(30) == 0
        server.stdout.close()
    gone = subprocess.run(check, env=asked, capture_output=True, text=True, timeout=30, check=False)
    assert gone.returncode == 1
    assert gone.stderr.startswith(f"statuswire: http://127.0.0.1:{port}: ")


# --- the compose file -----------------------------------------------------------------------------------------------


def test_the_compose_file_is_good() -> None:
    text = COMPOSE.read_text()
    PyCompose.from_yaml(text).validate()
    for right, wrong in (("depends_on:", "depend_on:"), ("service_healthy", "healthy"), ("- jwt_key\n", "- jwt\n")):
        assert right in text
        with pytest.raises(ValueError, match="statuswire"):
            PyCompose.from_yaml(text.replace(right, wrong)).validate()


def test_the_compose_file_fits_the_server() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    service = document["services"]["statuswire"]
    assert document["services"]["redis"]["healthcheck"]["test"]
    assert service["depends_on"]["redis"]["condition"] == "service_healthy"
    assert (COMPOSE.parent / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKERFILE)
    assert service["image"].rpartition(":")[2] == version("statuswire")
    config = effective(service["environment"] | {"STATUSWIRE_AUTH_JWT_KEY_FILE": "/run/secrets/jwt_key"})
    assert service["secrets"] == ["jwt_key"]
    assert set(service["secrets"]) <= set(document["secrets"])
    assert float(service["stop_grace_period"].removesuffix("s")) > config.server.drain + STOP_S
    named = {mount.partition(":")[0] for each in document["services"].values() for mount in each.get("volumes", [])}
    assert named == set(document["volumes"])


def effective(environ: dict[str, str], text: str = "", tmp_path: Path | None = None) -> Any:
    """What the server makes of it, with the image's own settings."""
    file = None
    if tmp_path is not None:
        file = tmp_path / "statuswire.toml"
        file.write_text(text)
    *_, image = stages()
    return load_config({}, image.environ | environ, file)


# --- the manifests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.name)
def test_the_manifests_are_good(file: Path) -> None:
    checked = program("kubernetes-validate", "--strict", "--quiet", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_manifests_fit_the_server(tmp_path: Path) -> None:
    documents = [each for file in MANIFESTS for each in yaml.safe_load_all(file.read_text())]
    of = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    deployment = of["Deployment", "statuswire"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    text = of["ConfigMap", "statuswire"]["data"]["statuswire.toml"]
    config = effective({"STATUSWIRE_STORE_URL": "redis://redis:6379/0"}, text, tmp_path)
    assert config.server.host == "0.0.0.0"
    assert config.server.port == container["ports"][0]["containerPort"]
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + config.server.drain + STOP_S
    assert deployment["replicas"] == 2
    assert of["PodDisruptionBudget", "statuswire"]["spec"]["minAvailable"] == 1
    assert {
        probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    } == {
        "startupProbe": "/health",
        "livenessProbe": "/health",
        "readinessProbe": "/ready",
    }
    *_, image = stages()
    assert f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" == image.settings["USER"]
    assert container["args"][0] == command(image, "CMD")[0]
    assert container["image"].rpartition(":")[2] == version("statuswire")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert mounts["data"] == image.settings["WORKDIR"]
    assert mounts["config"] == container["args"][2]
    assert config.auth.jwt_key_file == f"{mounts['secret']}/{pod['volumes'][1]['secret']['items'][0]['path']}"
    selector = deployment["selector"]["matchLabels"]
    assert selector == deployment["template"]["metadata"]["labels"] == of["Service", "statuswire"]["spec"]["selector"]
    assert selector == of["PodDisruptionBudget", "statuswire"]["spec"]["selector"]["matchLabels"]
