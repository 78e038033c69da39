"""What one node asks of others: to end connections that are theirs. Over a channel of Redis, with answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, TypeAlias

import msgspec
import trio

from server.brokers.redis_client import Client, RedisClientError
from server.brokers.redis_presence import CONTROL, Command, Done, decode_control, encode

Kind: TypeAlias = Literal["client", "user"]

# How long answers are waited for; a request is repeated meanwhile, as somebody may be about to subscribe again.
ANSWER_S: Final = 3.0
ASK_AGAIN_S: Final = 0.5


class _Question:
    """A request, while its answers are awaited."""

    def __init__(self, nodes: set[str]) -> None:
        self.open = nodes
        self.count = 0
        self.answered = trio.Event()


class Requests:
    """One node's requests, and its answers to those of others.

    Args:
        node_id: its name.
        disconnect: ends connections of this node and says how many there were.
    """

    def __init__(self, node_id: str, disconnect: Callable[[Kind, str], int]) -> None:
        self._node_id = node_id
        self._disconnect = disconnect
        self._client: Client | None = None
        self._questions: dict[str, _Question] = {}

    def begin(self, client: Client) -> None:
        """Listen to the others."""
        self._client = client
        client.subscribe([CONTROL])

    async def disconnect(self, kind: Kind, name: str, nodes: set[str]) -> int:
        """Have other nodes end a client's or a user's connections; how many they have ended."""
        nodes = nodes - {self._node_id}
        if not nodes:
            return 0
        request = secrets.token_hex(8)
        question = self._questions[request] = _Question(nodes)
        try:
            with trio.move_on_after(ANSWER_S):
                while question.open:
                    self._tell(Command(request, sorted(question.open), kind, name))
                    with trio.move_on_after(ASK_AGAIN_S):
                        await question.answered.wait()
        finally:
            del self._questions[request]
        return question.count

    def take(self, data: bytes) -> None:
        """A message came."""
        try:
            message = decode_control(data)
        except (msgspec.DecodeError, UnicodeError):
            return  # of a newer version
        if isinstance(message, Done):
            question = self._questions.get(message.request)
            if question is not None and message.node in question.open:
                question.open.discard(message.node)
                question.count += message.count
                if not question.open:
                    question.answered.set()
        elif self._node_id in message.nodes:
            self._tell(Done(message.request, self._node_id, self._disconnect(message.kind, message.name)))

    def _tell(self, message: Command | Done) -> None:
        if self._client is not None:
            with suppress(RedisClientError):
                self._client.send("SPUBLISH" if self._client.sharded else "PUBLISH", CONTROL, encode(message))
