"""TLS clients that have their records, and their keys, in hand."""

from __future__ import annotations

import ctypes
import ctypes.util
import socket
import ssl

import trio

from tests.support import PATIENCE_S


class Peer:
    """A client whose records are its own: what it does with the connection below them is the test's affair."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        self.sock = sock
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")
        self.got = b""

    @classmethod
    def connect(cls, port: int, context: ssl.SSLContext) -> Peer:
        return cls(socket.create_connection(("127.0.0.1", port), PATIENCE_S), context).shake_hands()

    def shake_hands(self) -> Peer:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                assert self.more(), "closed in the handshake"
            else:
                self.flush()
                return self

    def flush(self) -> None:
        self.sock.sendall(self.outgoing.read())

    def more(self) -> bool:
        data = self.sock.recv(65536)
        self.incoming.write(data)
        return bool(data)

    def send(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    def read(self) -> bytes | None:
        """More content; None once the server has said that there is no more."""
        while True:
            try:
                return self.tls.read(65536) or None
            except ssl.SSLZeroReturnError:
                return None
            except ssl.SSLWantReadError:
                assert self.more(), "the connection ended without TLS's farewell"

    def rest(self) -> bytes:
        while (data := self.read()) is not None:
            self.got += data
        return self.got


class KeyChanger:
    """A client that may ask for new keys, which Python's own cannot: OpenSSL's, by hand."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        name = ctypes.util.find_library("ssl")
        assert name is not None
        self.lib = ctypes.CDLL(name)
        for function in ("TLS_client_method", "SSL_CTX_new", "SSL_new"):
            getattr(self.lib, function).restype = ctypes.c_void_p
        self.context = ctypes.c_void_p(self.lib.SSL_CTX_new(ctypes.c_void_p(self.lib.TLS_client_method())))
        self.tls = ctypes.c_void_p(self.lib.SSL_new(self.context))
        self.sock = socket.socket()
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(("127.0.0.1", port))
        assert self.lib.SSL_set_fd(self.tls, self.sock.fileno()) == 1
        assert self.lib.SSL_connect(self.tls) == 1

    def change(self) -> bool:
        """New keys, both ways. Whether the connection still stands."""
        return bool(self.lib.SSL_key_update(self.tls, 1) == 1 and self.lib.SSL_do_handshake(self.tls) == 1)

    def send(self, data: bytes) -> bool:
        """Send some. Whether the connection still stands."""
        return bool(self.lib.SSL_write(self.tls, data, len(data)) == len(data))

    def ask(self, data: bytes) -> bytes:
        """Send some, and read to the end."""
        assert self.send(data)
        got, buffer = b"", ctypes.create_string_buffer(65536)
        while (count := self.lib.SSL_read(self.tls, buffer, 65536)) > 0:
            got += buffer.raw[:count]
        return got

    def close(self) -> None:
        self.lib.SSL_free(self.tls)
        self.lib.SSL_CTX_free(self.context)
        self.sock.close()


async def in_thread(task: object, *arguments: object) -> object:
    with trio.fail_after(2 * PATIENCE_S):
        return await trio.to_thread.run_sync(task, *arguments)  # type: ignore[arg-type]
