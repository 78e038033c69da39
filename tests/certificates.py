"""Certificates for servers of tests, and what their clients trust."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """An authority and what it has issued for this machine.

    Attributes:
        authority: the file that clients trust.
        cert, key: the server's files.
        trust: a client's context that trusts the authority.
    """

    issuer: trustme.CA
    authority: Path
    cert: Path
    key: Path
    trust: ssl.SSLContext

    @property
    def table(self) -> dict[str, object]:
        """The keys of ``[server]``."""
        return {"tls_cert": str(self.cert), "tls_key": str(self.key)}

    def issue(self) -> None:
        """Another certificate and key, in the same files."""
        issued = self.issuer.issue_cert("127.0.0.1", "localhost")
        self.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())


def make(directory: Path) -> Certificates:
    """An authority with a certificate for 127.0.0.1, in files."""
    issuer = trustme.CA()
    trust = ssl.create_default_context()
    issuer.configure_trust(trust)
    authority = directory / "authority.pem"
    issuer.cert_pem.write_to_path(str(authority))
    made = Certificates(issuer, authority, directory / "cert.pem", directory / "key.pem", trust)
    made.issue()
    return made
