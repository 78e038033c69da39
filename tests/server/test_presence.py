from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ApiError
from protocol.presence import PresenceEvent, Target, Transport
from server import config, limits
from server.limits import Limits
from server.presence import Presence
from tests.streams import clean_server, connect, event_stream, session, websocket
from tests.support import AUTH, PATIENCE_S, InProcess, bearer, request_bytes, token, until, until_so


@dataclass(eq=False)
class Someone:
    """A connection that does nothing but be there."""

    client_id: str
    user: str
    takes_notices: bool = True
    username: str | None = None
    transport: Transport = "websocket"
    address: str = "192.0.2.1"
    since_ms: int = 1_700_000_000_000
    channels: Collection[str] = ()
    ended: list[str] = field(default_factory=list)

    def disconnect(self) -> None:
        self.ended.append("disconnected")


def presence(limit: int = 0) -> Presence:
    return Presence(Limits(config.Limits(connections_per_user=limit)))


def tables(these: Presence) -> dict[str, Any]:
    return {
        "clients": set(these.clients),
        "users": {user: {each.client_id for each in its} for user, its in these.users.items()},
        "channels": {name: {each.client_id for each in members} for name, members in these.channels.items()},
    }


# The tables

_NAMES = st.sampled_from("abcd")
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["enter", "leave"]), _NAMES),
        st.tuples(st.sampled_from(["join", "part"]), _NAMES, st.sampled_from(["x", "y", "presence:x"])),
    ),
    max_size=40,
)


@given(_STEPS)
def test_whatever_the_order_the_tables_say_who_is_there_and_keep_nothing_of_who_left(steps: list[Any]) -> None:
    these = presence()
    told: list[tuple[str | None, int, int]] = []

    def tell(event: PresenceEvent, key: str | None) -> None:
        on = {each.user for each in these.channels.get(event.channel or "", ())}
        told.append((event.channel, event.count, len(on)))

    these.on_event = tell
    people = {name: Someone(f"client-{name}", "ann" if name < "c" else "bob") for name in "abcd"}
    there: dict[str, set[str]] = {}
    for step, name, *rest in steps:
        someone = people[name]
        if step == "enter":
            if name in there:
                continue  # a connection enters once
            there[name] = set()
            these.enter(someone)
        elif step == "leave":
            there.pop(name, None)
            these.leave(someone)
        elif step == "join":
            if name in there:
                there[name] |= set(rest)
            these.join(someone, *rest)
        else:
            if name in there:
                there[name] -= set(rest)
            these.part(someone, *rest)
    users: dict[str, set[str]] = {}
    channels: dict[str, set[str]] = {}
    for name, joined in there.items():
        users.setdefault(people[name].user, set()).add(f"client-{name}")
        for channel in joined:
            channels.setdefault(channel, set()).add(f"client-{name}")
    assert tables(these) == {"clients": {f"client-{name}" for name in there}, "users": users, "channels": channels}
    for name in there:
        these.leave(people[name])
    assert tables(these) == {"clients": set(), "users": {}, "channels": {}}
    assert not these._users_on
    assert all(channel == "x" and count == on for channel, count, on in told)
    assert all(not someone.channels for someone in people.values())


async def test_targets_count_each_connection_that_takes_notices_once() -> None:
    these = presence()
    one, two, deaf, other = (
        Someone("1", "ann"),
        Someone("2", "ann"),
        Someone("3", "ann", takes_notices=False),
        Someone("4", "bob"),
    )
    for someone in (one, two, deaf, other):
        these.enter(someone)
    for someone, channel in ((one, "x"), (one, "y"), (other, "y"), (deaf, "x")):
        these.join(someone, channel)
    counts = {
        Target("client", ("1",)): 1,
        Target("client", ("3",)): 0,
        Target("client", ("none",)): 0,
        Target("user", ("ann",)): 2,
        Target("users", ("ann", "bob", "ann", "nobody")): 3,
        Target("channel", ("x",)): 1,
        Target("channels", ("x", "y")): 2,
        Target("channel", ("nowhere",)): 0,
        Target("broadcast"): 3,
    }
    assert {target: await these.count(target) for target in counts} == counts


async def test_everyone_is_told_in_pages() -> None:
    these = presence()
    for number in range(25):
        these.enter(Someone(f"{number:02}", "ann"))
    found: list[str] = []
    after: str | None = None
    pages = 0
    while pages == 0 or after is not None:
        infos, after = await these.everyone(10, after)
        found += [info.client_id for info in infos]
        pages += 1
    assert found == [f"{number:02}" for number in range(25)]
    assert pages == 3


async def test_the_limit_of_connections_counts_those_who_are_there() -> None:
    these = presence(limit=1)
    first = Someone("1", "ann")
    await these.admit("1", "ann")
    these.enter(first)
    with pytest.raises(ApiError) as caught:
        await these.admit("2", "ann")
    assert (caught.value.status, caught.value.code) == (429, "rate_limited")
    await these.admit("3", "bob")
    these.leave(first)
    await these.admit("2", "ann")


# Real connections


async def test_connections_are_there_from_connected_on_and_gone_afterwards() -> None:
    async with clean_server(auth=AUTH) as running:
        people = running.node.presence
        async with (
            websocket(running, token=token("ann")) as ws,
            event_stream(running, headers=bearer("ann")) as stream,
        ):
            client = (await ws.receive())["clientId"]
            (hello,) = await stream.events(1)
            found = await people.find(client)
            assert found is not None
            assert (found.user, found.transport, found.address, found.takes_notices, found.channels) == (
                *("ann", "websocket", "127.0.0.1", True),
                (),
            )
            its = {info.client_id: info for info in await people.of_user("ann")}
            assert its.keys() == {client, hello.data["clientId"]}
            assert its[hello.data["clientId"]].transport == "sse"
            assert await people.count(Target("user", ("ann",))) == 1  # a stream of jobs takes no notifications
        await until(lambda: not people.clients)
        assert await people.find(client) is None


async def test_who_has_not_said_who_it_is_is_nobody_yet() -> None:
    async with clean_server(auth=AUTH) as running, websocket(running) as ws:
        await running.get("/health")
        assert not running.node.presence.clients
        assert (await ws.ask("auth", token=token("ann")))["type"] == "connected"
        assert list(running.node.presence.users) == ["ann"]


async def test_a_websocket_that_is_disconnected_is_told_not_to_come_back_at_once() -> None:
    async with clean_server(auth=AUTH) as running, websocket(running, token=token("ann")) as ws:
        client = (await ws.receive())["clientId"]
        assert not await running.node.presence.disconnect_client("somebody else")
        assert await running.node.presence.disconnect_client(client)
        closed = await ws.closed()
        assert (closed.code, closed.reason) == (1008, "disconnected by the application")
        await until(lambda: not running.node.presence.clients)
        assert not await running.node.presence.disconnect_client(client)


async def test_disconnecting_a_user_ends_its_websockets_and_streams_alone() -> None:
    async with (
        clean_server(auth=AUTH) as running,
        session(running, token=token("ann")) as ws,
        session(running, token=token("bob")) as other,
        event_stream(running, headers=bearer("ann")) as stream,
    ):
        await stream.until("snapshot")
        assert await running.node.presence.disconnect_user("ann") == 2
        assert (await ws.closed()).code == 1008
        (last,) = await stream.rest()
        assert (last.type, last.data["code"], last.retry) == ("error", "disconnected", None)
        await other.quiet()
        assert await running.node.presence.disconnect_user("nobody") == 0


async def test_disconnecting_a_user_answers_its_polls_alone() -> None:
    """Whoever has logged out is told no more."""
    poll = "/api/v2/jobs/poll?jobIds=j&timeout=60"
    async with clean_server(auth=AUTH) as running, connect(running) as its, connect(running) as anothers:
        for http, user in ((its, "ann"), (anothers, "bob")):
            await http.send(request_bytes("GET", poll, headers=bearer(user)))
        await until(lambda: len(running.node.polls) == 2)
        assert await running.node.presence.disconnect_user("ann") == 0
        answer = await its.answer()
        assert (answer.json["updates"], answer.json["timedOut"]) == ([], False)
        (left,) = running.node.polls
        assert left.exchange.caller.user == "bob"


async def test_one_connection_too_many_is_refused_on_either_transport() -> None:
    async with (
        clean_server(auth=AUTH, limits={"connections_per_user": 1}) as running,
        session(running, token=token("ann")),
    ):
        async with websocket(running, token=token("ann")) as second:
            error = await second.receive()
            assert (error["type"], error["code"]) == ("error", "rate_limited")
            assert (await second.closed()).code == 4429
        async with websocket(running) as late:
            error = await late.ask("auth", token=token("ann"), ref="late")
            assert (error["type"], error["code"], error["ref"]) == ("error", "rate_limited", "late")
            assert (await late.closed()).code == 4429
        answer = await running.get("/api/v2/jobs/stream", bearer("ann"))
        assert (answer.status, answer.error) == (429, "rate_limited")
        with trio.fail_after(PATIENCE_S):
            async with event_stream(running, headers=bearer("bob")) as stream:
                await stream.until("snapshot")
        assert set(running.node.presence.users) <= {"ann", "bob"}


# Who asks is told


async def test_those_who_ask_are_told_who_comes_and_goes() -> None:
    async with clean_server(auth=AUTH) as running:
        await told_of_comings_and_goings(running, running)


async def told_of_comings_and_goings(at: InProcess, there: InProcess) -> None:
    """``root`` listens at one server to who is at the other."""
    async with websocket(at, token=token("root", admin=True)) as ws:
        await ws.receive()
        await ws.ask("subscribe", channels=["presence:room", "presence:user:ann"])
        if at.node.cluster is not None:  # as soon as Redis knows of the listener, both do
            await until_so(lambda: there.node.presence.count(Target("channel", ("presence:room",))))
        async with (
            websocket(there, token=token("ann", channels=["*"])) as first,
            websocket(there, token=token("ann", channels=["*"])) as second,
            websocket(there, token=token("bob", channels=["*"])) as third,
        ):
            messages = []
            for each, number in ((first, 2), (second, 0), (third, 1)):
                await each.receive()
                await each.ask("subscribe", channels=["room"])
                # What comes and goes before Redis has answered is nothing, so one thing after the other.
                messages += await ws.messages(number)
            await first.ask("unsubscribe", channels=["room"])
            await second.ask("unsubscribe", channels=["room"])
            messages.append(await ws.receive())
        messages += await ws.messages(2)
        told = [(message["event"], message["data"]) for message in messages]
        assert told[:4] == [
            ("join", {"userId": "ann", "count": 1}),
            ("join", {"userId": "ann", "count": 1, "channel": "room"}),
            ("join", {"userId": "bob", "count": 2, "channel": "room"}),
            ("leave", {"userId": "ann", "count": 1, "channel": "room"}),
        ]
        assert sorted(told[4:], key=str) == [
            ("leave", {"userId": "ann", "count": 0}),
            ("leave", {"userId": "bob", "count": 0, "channel": "room"}),
        ]
        await ws.quiet()


async def test_one_who_comes_and_goes_all_the_time_fills_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EVENTS_AT_ONCE", 5)
    monkeypatch.setattr(limits, "EVENTS_PER_SECOND", 0.001)
    async with clean_server(auth=AUTH) as at, websocket(at, token=token("root", admin=True)) as ws:
        await ws.receive()
        await ws.ask("subscribe", channels=["presence:room"])
        async with websocket(at, token=token("ann")) as restless, websocket(at, token=token("bob")) as other:
            await restless.receive()
            for _ in range(20):
                await restless.ask("subscribe", channels=["room"])
                await restless.ask("unsubscribe", channels=["room"])
            assert at.node.history.last == 5
            await other.receive()
            await other.ask("subscribe", channels=["room"])
            told = await ws.messages(6)
            assert [message["data"]["userId"] for message in told] == ["ann"] * 5 + ["bob"]
            assert told[-1]["data"]["count"] == 1
