"""The configuration in tools/nginx/ as it stands, with the places changed: for the example, and for its tests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# `make system` only unpacks it where it is not installed.
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:{ROOT}/.venv/nginx/usr/sbin")
UNIX = "server unix:/run/statuswire/statuswire.sock;"


def configure(
    directory: Path, site: str, listen: str, statuswire: str, application: str = "", certificate: Path | None = None
) -> Path:
    """Write an nginx.conf, and what it includes.

    Args:
        directory: for the files, for what nginx keeps, and for its log.
        site: the name of a file in tools/nginx/.
        listen: address and port.
        statuswire: address and port, or ``unix:`` and a path.
        application: address and port, for a site that has one.
        certificate: a PEM file with certificate and key, for HTTPS.
    """
    changes = [("statuswire.conf", "server 127.0.0.1:3000;", f"server {statuswire};")]
    if statuswire.startswith("unix:"):
        changes = [
            ("statuswire.conf", "server 127.0.0.1:3000;", ""),
            ("statuswire.conf", f"# {UNIX}", f"server {statuswire};"),
        ]
    if application:
        changes.append((site, "server 127.0.0.1:8000;", f"server {application};"))
    if certificate is None:
        changes.append((site, "listen 80;\n", f"listen {listen};\n"))
    else:
        changes += [
            (site, "listen 80;\n", "\n"),
            (site, "# include statuswire-tls.conf;", "include statuswire-tls.conf;"),
            ("statuswire-tls.conf", "listen 443 ssl http2;", f"listen {listen} ssl http2;"),
            ("statuswire-tls.conf", "/etc/ssl/status.example.com.pem", str(certificate)),
            ("statuswire-tls.conf", "/etc/ssl/status.example.com.key", str(certificate)),
        ]
    changes.append(("statuswire-proxy.conf", "/var/log/nginx/", f"{directory}/"))
    for file in (ROOT / "tools" / "nginx").glob("*.conf"):
        text = file.read_text()
        for name, old, new in changes:
            if name == file.name:
                if text.count(old) != 1:
                    raise ValueError(f"{file} does not have {old!r} once")
                text = text.replace(old, new)
        (directory / file.name).write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    # It runs as whoever starts it, who alone may enter the directory with the socket, and keeps nothing outside of it.
    user = "user root;\n" if os.geteuid() == 0 else ""
    kept = "".join(f"{kind}_temp_path {directory}/{kind};\n" for kind in kinds)
    main = directory / "nginx.conf"
    main.write_text(
        f"{user}daemon off;\nerror_log stderr warn;\npid {directory}/nginx.pid;\nworker_processes 1;\nevents {{}}\n"
        f"http {{\n{kept}access_log off;\ninclude statuswire.conf;\ninclude {site};\n}}\n"
    )
    return main
