"""TLS on this server's own sockets: the certificate, the handshake, and a socket that encrypts what goes through it.

``TlsSocket`` stands where a plain socket stands, so everything behind it, above all the hub, knows nothing of TLS: a
``send`` is still synchronous and takes what the kernel takes.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from typing import Final

from server.config import ConfigError, Server

# A client's part of it is a kilobyte or two. OpenSSL itself would take more from who never comes to its end.
HANDSHAKE_BYTES: Final = 65536
# Plaintext in one record, and what is read at once. OpenSSL's buffers in memory keep the size that they once needed, so
# this bounds what a connection holds while it idles. 64 KiB cost 33 µs in pieces of 4 KiB, 21 in pieces of 16.
PIECE_BYTES: Final = 4096
# Encrypted before the socket is asked: what waits for a full one is held a second time, as ciphertext.
AHEAD_BYTES: Final = 65536
# Bytes that may come without any content: two of the largest records. Else a peer could keep the loop busy with changes
# of keys, which cost us ten microseconds for 27 bytes of its own.
EMPTY_BYTES: Final = 2 * 17_000
# The smallest record with content has some 23 bytes for one.
WIRE_BYTES_PER_BYTE: Final = 32
# A record that begins a handshake (RFC 8446 section 5.1); no HTTP request does.
HANDSHAKE_RECORD: Final = 0x16
# Forward secrecy and authenticated encryption, in TLS 1.2; all of 1.3 are such.
_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"


class _Encrypted(Exception):
    pass


def load_context(server: Server) -> ssl.SSLContext | None:
    """What ``server.tls_cert`` and ``server.tls_key`` say; None without them.

    Raises:
        ConfigError: a file cannot be read, is no PEM, or certificate and key do not fit.
    """
    if not server.tls_cert:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    key = server.tls_key or server.tls_cert
    for name, path in (("server.tls_cert", server.tls_cert), ("server.tls_key", key)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(f"{name} = {path!r}: {error.strerror}") from error
    try:
        context.load_cert_chain(server.tls_cert, key, _no_password)
    except _Encrypted:
        raise ConfigError(
            f"server.tls_key = {key!r}: the key is encrypted; nobody is there to type a password"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"server.tls_key = {key!r} is not the key of the certificate in {server.tls_cert!r}; a chain "
                "begins with the server's own certificate"
            ) from error
        raise ConfigError(
            f"server.tls_cert = {server.tls_cert!r}, server.tls_key = {key!r}: expected a certificate (with its chain) "
            f"and a key as PEM ({_reason(error)})"
        ) from error
    return context


def _no_password() -> str:
    raise _Encrypted


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()


class TlsSocket:
    """A non-blocking socket behind TLS, with as much of a socket's manners as this server uses.

    As with any non-blocking socket, what ``send`` did not take has to be sent again, and here nothing else may come
    before it: part of it may be encrypted already. Sockets here are written to in order anyway.

    Raises OSError (``ssl.SSLError`` is one) where a socket would, and BlockingIOError where it would.
    """

    __slots__ = ("_ahead", "_empty", "_ended", "_incoming", "_outgoing", "_rest", "_shut", "_sock", "_tls")

    def __init__(self, sock: socket.SocketType, context: ssl.SSLContext) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._rest: bytes | memoryview = b""  # encrypted, and not taken by the socket
        self._ahead = 0  # bytes that were reported as not sent, and are in ``_rest``
        self._empty = 0  # received without content, beyond what content excuses
        self._ended = False
        self._shut = False

    @property
    def family(self) -> int:
        """The socket's."""
        return self._sock.family

    def fileno(self) -> int:
        """The socket's: to wait for it, and to ask the kernel about it."""
        return self._sock.fileno()

    def setsockopt(self, level: int, option: int, value: int | bytes) -> None:
        """The socket's."""
        self._sock.setsockopt(level, option, value)

    def shake_hands(self, wire: bytes) -> bool:
        """Go on with the handshake; ``push`` what it has to say then.

        Args:
            wire: what the client said.

        Returns:
            Whether it is done. Content may have come behind it: the next ``recv`` has that, if there is some.

        Raises:
            OSError: it failed.
        """
        self._incoming.write(wire)
        self._empty += len(wire)
        if self._empty > HANDSHAKE_BYTES:
            raise ConnectionError("the handshake is too long")
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError:
            self._push_quietly()  # the alert that says why
            raise
        finally:
            self._rest = bytes(self._rest) + self._outgoing.read()
        self._empty = 0
        return True

    def send(self, data: bytes | memoryview) -> int:
        """Encrypt and send; how much of ``data`` the socket has taken."""
        done = 0
        if self._rest:
            self.push()
        if self._ahead:
            done, self._ahead = self._ahead, 0
        size = len(data)
        tls, outgoing = self._tls, self._outgoing
        while done < size:
            if size <= PIECE_BYTES:
                taken = tls.write(data if not done else memoryview(data)[done:])
                wire = outgoing.read()
            else:
                taken, wire = self._encrypt(memoryview(data)[done : done + AHEAD_BYTES])
            try:
                sent = self._sock.send(wire)
            except BlockingIOError:
                sent = 0
            if sent < len(wire):
                self._rest, self._ahead = memoryview(wire)[sent:], taken
                if not done:
                    raise BlockingIOError
                return done
            done += taken
        return done

    def _encrypt(self, data: memoryview) -> tuple[int, bytes]:
        parts = []
        taken = 0
        while taken < len(data):
            taken += self._tls.write(data[taken : taken + PIECE_BYTES])
            parts.append(self._outgoing.read())
        return taken, b"".join(parts)

    def push(self) -> None:
        """Send what is encrypted already. Raises BlockingIOError while some of it is left."""
        while self._rest:
            self._rest = memoryview(self._rest)[self._sock.send(self._rest) :]
        self._rest = b""

    def recv(self, size: int) -> bytes:
        """Some content, all that can be read without asking the socket again: whoever waits for that misses nothing.

        So it may be more than ``size``, by a record. ``b""`` at the end of the peer's sending; an end without TLS's own
        is one, too: nothing here is complete because the connection ended.
        """
        if self._shut:
            return self._sock.recv(size)  # read away, unseen
        if self._incoming.pending and (content := self._decrypt()):  # it came with the end of the handshake
            return content
        while not self._ended:
            wire = self._sock.recv(PIECE_BYTES)
            if not wire:
                self._ended = True
                break
            self._empty += len(wire)
            self._incoming.write(wire)
            content = self._decrypt()
            if content:
                return content
        return b""

    def _decrypt(self) -> bytes:
        parts: list[bytes] = []
        try:
            while part := self._tls.read(PIECE_BYTES):
                parts.append(part)
            self._ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._ended = True
        except ssl.SSLError:
            if not parts:
                self._push_quietly()
                raise
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        self._empty = max(0, self._empty - WIRE_BYTES_PER_BYTE * len(content))
        if self._empty > EMPTY_BYTES:
            raise ConnectionError("too many records without content")
        if self._outgoing.pending:  # the answer to a change of keys
            if len(self._rest) > 2 * AHEAD_BYTES:
                raise ConnectionError("the peer takes no answers to its changes of keys")
            self._rest = bytes(self._rest) + self._outgoing.read()
            with suppress(BlockingIOError):
                self.push()
        return content

    def shutdown(self, how: int) -> None:
        """``SHUT_WR`` only: tell the peer that no more comes, in TLS's words and in TCP's.

        Raises BlockingIOError if there is no room for that; call it again then.
        """
        self._bid_farewell()
        if not self._ahead:
            self.push()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close it, with a farewell if the socket takes it at once."""
        self._bid_farewell()
        if not self._ahead:
            with suppress(OSError):
                self.push()
        self._sock.close()

    def _bid_farewell(self) -> None:
        if self._shut:
            return
        self._shut = True
        if not self._ahead:  # else somebody gave up in the middle of a record
            with suppress(OSError):  # the peer has not said farewell yet, or the handshake was never done
                self._tls.unwrap()
            self._rest = bytes(self._rest) + self._outgoing.read()

    def _push_quietly(self) -> None:
        with suppress(OSError):
            self._sock.send(self._outgoing.read())
