"""Several servers on one Redis know who is connected anywhere, whatever befalls one of them or Redis."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio

from protocol.errors import ApiError
from protocol.presence import PresenceEvent, Target
from server import cluster as cluster_module
from server.cluster import Cluster
from server.metrics import Sample
from tests.pacing import for_a_while
from tests.redis_nodes import joined, nodes
from tests.redis_servers import RedisServer, running_cluster
from tests.server.test_auth_hook import application
from tests.server.test_presence import Someone, presence, told_of_comings_and_goings
from tests.streams import event_stream, session, websocket
from tests.support import AUTH, PATIENCE_S, InProcess, bearer, request_bytes, server, spawned, token, until, until_so

pytestmark = pytest.mark.slow

EVERYBODY = Target("broadcast")


def cluster(at: InProcess) -> Cluster:
    assert at.node.cluster is not None
    return at.node.cluster


async def until_counted(at: InProcess, target: Target, number: int) -> None:
    async def counted() -> bool:
        return await at.node.presence.count(target) == number

    await until_so(counted)


async def until_there(at: InProcess, user: str, number: int) -> None:
    async def there() -> bool:
        return len(await at.node.presence.of_user(user)) == number

    await until_so(there)


async def until_found(at: InProcess, client_id: str) -> None:
    async def found() -> bool:
        return await at.node.presence.find(client_id) is not None

    await until_so(found)


async def until_peers(at: InProcess, condition: Callable[[dict[str, Sample]], bool]) -> None:
    async def fits() -> bool:
        return condition({peer.node_id: peer.stats for peer in await cluster(at).peers()})

    await until_so(fits)


def left_in(redis: RedisServer) -> set[str]:
    """Keys about connections."""
    with redis.oracle() as oracle:
        return {key.decode() for key in oracle.keys("{statuswire}:present:*")}


async def test_counts_are_exact_at_once_on_the_same_node_and_soon_on_the_others(redis: RedisServer) -> None:
    async with nodes(redis.url, 3, auth=AUTH) as (one, two, three):
        async with (
            session(one, token=token("ann")),
            session(two, token=token("ann")),
            event_stream(three, headers=bearer("ann")) as stream,
            session(three, token=token("bob")),
        ):
            await stream.until("snapshot")
            assert await three.node.presence.count(Target("user", ("bob",))) == 1
            for at in (one, two, three):
                await until_counted(at, EVERYBODY, 3)
                await until_counted(at, Target("user", ("ann",)), 2)
                await until_counted(at, Target("users", ("ann", "bob", "ann")), 3)
                await until(lambda at=at: joined(at))
                infos = await at.node.presence.of_user("ann")
                assert sorted(info.transport for info in infos) == ["sse", "websocket", "websocket"]
                assert len({info.node for info in infos}) == 3
            async with session(one, token=token("ann")):
                assert await one.node.presence.count(Target("user", ("ann",))) == 3
            await until_counted(two, Target("user", ("ann",)), 2)
        await until_counted(one, EVERYBODY, 0)
        await until(lambda: all(key.rpartition(":")[0].endswith(":node") for key in left_in(redis)))
    assert left_in(redis) <= {"{statuswire}:present:events"}


async def test_channels_count_each_connection_once_over_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        people = [Someone(str(number), f"user-{number % 3}") for number in range(6)]
        for number, someone in enumerate(people):
            at = (one, two)[number % 2].node.presence
            at.enter(someone)
            at.join(someone, "all")
            if number < 2:
                at.join(someone, "few")
        for at in (one, two):
            await until_counted(at, Target("channel", ("all",)), 6)
            await until_counted(at, Target("channel", ("few",)), 2)
            assert await at.node.presence.count(Target("channels", ("few", "all", "none"))) == 6
        one.node.presence.part(people[0], "few")
        assert await one.node.presence.count(Target("channel", ("few",))) == 1
        for number, someone in enumerate(people):
            (one, two)[number % 2].node.presence.leave(someone)


async def test_everyone_is_told_in_pages_over_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url, 3) as found_nodes:
        everybody = [Someone(f"{number:03}", "ann", takes_notices=number % 3 > 0) for number in range(100)]
        for number, someone in enumerate(everybody):
            found_nodes[number % 3].node.presence.enter(someone)
        one = found_nodes[0].node.presence
        await until_counted(found_nodes[0], EVERYBODY, 66)
        for size in (1, 7, 50, 100, 1000):
            found: list[str] = []
            after: str | None = None
            pages = 0
            while pages == 0 or after is not None:
                infos, after = await one.everyone(size, after)
                assert len(infos) <= size
                found += [info.client_id for info in infos]
                pages += 1
            assert sorted(found) == [someone.client_id for someone in everybody]
        info = await one.find("001")
        assert info is not None
        assert (info.client_id, info.node) == ("001", cluster(found_nodes[1]).node_id)
        assert await one.find("nobody") is None
        for number, someone in enumerate(everybody):
            found_nodes[number % 3].node.presence.leave(someone)


async def test_disconnecting_works_from_any_node(redis: RedisServer) -> None:
    async with nodes(redis.url, 3, auth=AUTH) as (one, two, three):
        async with websocket(one, token=token("ann")) as ws:
            client = (await ws.receive())["clientId"]
            await until_counted(two, EVERYBODY, 1)
            assert not await two.node.presence.disconnect_client("nobody")
            assert await two.node.presence.disconnect_client(client)
            assert (await ws.closed()).code == 1008
        async with (
            session(one, token=token("ann")) as first,
            session(two, token=token("ann")) as second,
            session(two, token=token("bob")) as other,
            event_stream(three, headers=bearer("ann")) as stream,
        ):
            await stream.until("snapshot")
            await until_counted(one, EVERYBODY, 3)
            await until(lambda: all(joined(at) for at in (one, two, three)))
            await until_there(two, "ann", 3)
            assert await two.node.presence.disconnect_user("ann") == 3
            assert (await first.closed()).code == 1008
            assert (await second.closed()).code == 1008
            assert [event.data.get("code") for event in await stream.rest()] == ["disconnected"]
            await other.quiet()


async def test_polls_of_whoever_is_sent_away_are_answered_wherever_they_wait(redis: RedisServer) -> None:
    async with nodes(redis.url, 2, auth=AUTH) as (one, two), two.connect() as http:
        await http.send(request_bytes("GET", "/api/v2/jobs/poll?jobIds=j&timeout=60", headers=bearer("ann")))
        await until(lambda: two.node.polls and joined(one) and joined(two))
        assert await one.node.presence.disconnect_user("ann") == 0
        assert (await http.answer()).json["updates"] == []
        assert not two.node.polls


async def test_no_node_remembers_the_sessions_of_whoever_is_sent_away(redis: RedisServer) -> None:
    """Also one that the user was not connected to."""
    async with application() as app, nodes(redis.url, 2, auth={"hook_url": app.url, "hook_cache": 60}) as (one, two):
        cookie = {"Cookie": "session=1"}
        assert (await two.get("/api/v2/jobs", cookie)).status == 200
        app.reply = lambda headers: (401, {})
        assert (await two.get("/api/v2/jobs", cookie)).status == 200
        assert await one.node.presence.disconnect_user("alice") == 0
        assert (await two.get("/api/v2/jobs", cookie)).status == 401


async def test_who_came_and_went_is_told_once_whoever_saw_it(redis: RedisServer) -> None:
    told: list[PresenceEvent] = []
    async with nodes(redis.url, 3) as three:
        keys: set[str | None] = set()

        def take(event: PresenceEvent, key: str | None) -> None:
            if key not in keys:  # as the log does
                keys.add(key)
                told.append(event)

        at = [each.node.presence for each in three]
        for each in at:
            each.on_event = take
        listener = Someone("listener", "zoe")
        at[0].enter(listener)
        for channel in ("presence:room", "presence:user:ann"):
            at[0].join(listener, channel)
        await until_counted(three[1], Target("channel", ("presence:user:ann",)), 1)
        people = [Someone(f"ann-{number}", "ann") for number in range(3)]
        for where, someone in zip(at, people, strict=True):
            where.enter(someone)
            where.join(someone, "room")
        await until(lambda: len(told) == 2)
        bob = Someone("bob", "bob")
        at[1].enter(bob)
        at[1].join(bob, "room")
        await until(lambda: len(told) == 3)
        for where, someone in zip(at, people, strict=True):
            where.part(someone, "room")
        await until(lambda: len(told) == 4)
        for where, someone in zip(at, people, strict=True):
            where.leave(someone)
        await until(lambda: len(told) == 5)
        at[0].leave(listener)
        await until_counted(three[1], Target("channel", ("presence:room",)), 0)
        at[1].leave(bob)
    assert told == [
        PresenceEvent("join", "ann", None, 1),
        PresenceEvent("join", "ann", "room", 1),
        PresenceEvent("join", "bob", "room", 2),
        PresenceEvent("leave", "ann", "room", 1),
        PresenceEvent("leave", "ann", None, 0),
    ]


async def test_those_who_ask_are_told_by_whichever_node(redis: RedisServer) -> None:
    async with nodes(redis.url, 3, auth=AUTH) as (one, two, _):
        await told_of_comings_and_goings(one, two)
        await told_of_comings_and_goings(two, two)


async def test_whatever_comes_and_goes_leaves_nothing_behind(redis: RedisServer) -> None:
    """The same as in the tables of one node, in Redis, with both nodes and Redis disturbed on the way."""
    dice = random.Random(7)
    async with nodes(redis.url) as pair:
        at = [each.node.presence for each in pair]
        there: dict[Someone, int] = {}
        for step in range(600):
            if there and dice.random() < 0.4:
                someone = dice.choice(list(there))
                at[there.pop(someone)].leave(someone)
            else:
                someone = Someone(f"client-{step}", dice.choice("abc"), takes_notices=dice.random() < 0.8)
                there[someone] = dice.randrange(2)
                at[there[someone]].enter(someone)
            for other in dice.sample(list(there), min(3, len(there))):
                change = dice.choice((at[there[other]].join, at[there[other]].part))
                if other.takes_notices:
                    change(other, dice.choice("xy"))
            if step in (200, 400):
                with redis.oracle() as oracle:
                    oracle.flushall() if step == 200 else oracle.script_flush()
            if dice.random() < 0.2:
                await for_a_while(0.003)  # so that the next step begins a batch of its own
        for each in pair:
            for channel in "xy":
                number = sum(channel in someone.channels for someone in there)
                await until_counted(each, Target("channel", (channel,)), number)
            for user in "abc":
                number = sum(someone.user == user and someone.takes_notices for someone in there)
                await until_counted(each, Target("user", (user,)), number)
            await until_counted(each, EVERYBODY, sum(someone.takes_notices for someone in there))
        for someone, where in there.items():
            at[where].leave(someone)
        allowed = {f"{{statuswire}}:present:node:{cluster(each).node_id}" for each in pair}
        await until(lambda: left_in(redis) <= allowed)


@pytest.mark.parametrize("how", ["flush", "restart"])
async def test_redis_that_lost_everything_is_told_anew(redis: RedisServer, how: str) -> None:
    async with (
        nodes(redis.url, auth=AUTH) as (one, two),
        session(one, token=token("ann")),
        session(two, token=token("bob")),
    ):
        await until_counted(one, EVERYBODY, 2)
        if how == "flush":
            with redis.oracle() as oracle:
                oracle.flushall()
        else:
            redis.kill()
            await until(lambda: not joined(one) and not joined(two))
            assert await one.node.presence.count(EVERYBODY) == 1  # what this node knows
            assert (await two.node.presence.everyone(10))[0][0].user == "bob"
            assert not await one.node.presence.disconnect_client("nobody")
            redis.start()
        await until_counted(one, EVERYBODY, 2)
        await until_counted(two, Target("user", ("ann",)), 1)


async def test_a_full_redis_is_written_to_when_there_is_room(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        first, second = Someone("1", "ann"), Someone("2", "ann")
        one.node.presence.enter(first)
        await until_counted(two, EVERYBODY, 1)
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", 1)
        one.node.presence.enter(second)
        await until(lambda: not joined(one))
        assert await one.node.presence.count(EVERYBODY) == 2
        with redis.oracle() as oracle:
            oracle.config_set("maxmemory", 0)
        await until_counted(two, EVERYBODY, 2)
        one.node.presence.leave(first)
        one.node.presence.leave(second)
        await until_counted(two, EVERYBODY, 0)


async def test_what_redis_forgot_of_a_node_is_written_again_and_does_not_keep_it_there(redis: RedisServer) -> None:
    """Nothing of ours deletes these keys alone, but people have tools."""
    async with nodes(redis.url) as (one, two):
        someone = Someone("1", "ann")
        two.node.presence.enter(someone)
        await until_counted(one, EVERYBODY, 1)
        with redis.oracle() as oracle:
            oracle.delete("{statuswire}:present:clients")
            oracle.delete(f"{{statuswire}}:present:node:{cluster(two).node_id}")  # its number, so that it looks
        await until_found(one, "1")
        with redis.oracle() as oracle:
            oracle.delete("{statuswire}:present:clients")
        two.node.presence.leave(someone)
    with redis.oracle() as oracle:
        assert not oracle.keys("{statuswire}:present:node:*")
        assert not oracle.exists("{statuswire}:nodes")


async def test_what_a_killed_node_leaves_is_taken_back_when_its_lease_is_over(
    redis: RedisServer, tmp_path: Path
) -> None:
    told: list[PresenceEvent] = []
    home = tmp_path / "node"
    home.mkdir()
    async with nodes(redis.url, auth=AUTH) as (one, two), AsyncExitStack() as stack:
        for each in (one, two):
            each.node.presence.on_event = lambda event, key: told.append(event)
        listener = await stack.enter_async_context(session(one, token=token("root", admin=True)))
        await listener.ask("subscribe", channels=["presence:user:ann"])
        async with spawned(home, auth=AUTH, store={"url": redis.url}) as doomed, session(doomed, token=token("ann")):
            await until_counted(one, Target("user", ("ann",)), 1)
            assert len(await cluster(one).peers()) == 3
            doomed.process.kill()
            await until_counted(two, Target("user", ("ann",)), 0)
            await until_peers(one, lambda peers: len(peers) == 2)
            # Who came was told by the node that died, if by anybody; who went by one of those that are left.
            await until(lambda: PresenceEvent("leave", "ann", None, 0) in told)


async def test_a_node_that_was_taken_for_dead_writes_everything_anew(redis: RedisServer, tmp_path: Path) -> None:
    home = tmp_path / "node"
    home.mkdir()
    async with (
        nodes(redis.url, 1, auth=AUTH) as (one,),
        spawned(home, auth=AUTH, store={"url": redis.url}) as frozen,
        session(frozen, token=token("ann")),
    ):
        await until_counted(one, Target("user", ("ann",)), 1)
        frozen.signal(19)
        await until_counted(one, Target("user", ("ann",)), 0)
        frozen.signal(18)
        await until_counted(one, Target("user", ("ann",)), 1)


async def test_a_node_that_goes_takes_its_connections_along_at_once(redis: RedisServer) -> None:
    async with nodes(redis.url, 1, auth=AUTH) as (one,):
        async with nodes(redis.url, 1, auth=AUTH) as (going,), session(going, token=token("ann")):
            await until_counted(one, EVERYBODY, 1)
            assert {peer.node_id for peer in await cluster(one).peers()} == {
                cluster(one).node_id,
                cluster(going).node_id,
            }
        assert await one.node.presence.count(EVERYBODY) == 0
        assert [peer.node_id for peer in await cluster(one).peers()] == [cluster(one).node_id]


async def test_nodes_tell_each_other_their_counters(redis: RedisServer) -> None:
    async with nodes(redis.url) as (one, two):
        cluster(two).stats = lambda: {"figure": 7.0}
        mine, other = cluster(one).node_id, cluster(two).node_id
        await until_peers(one, lambda peers: peers[other] == {"figure": 7.0} and "figure" not in peers[mine])


async def test_the_limit_of_connections_holds_over_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url, auth=AUTH, limits={"connections_per_user": 2}) as (one, two):
        async with session(one, token=token("ann")), session(two, token=token("ann")):
            for at in (one, two):
                async with websocket(at, token=token("ann")) as third:
                    assert (await third.receive())["code"] == "rate_limited"
                    assert (await third.closed()).code == 4429
                answer = await at.get("/api/v2/jobs/stream", bearer("ann"))
                assert (answer.status, answer.error) == (429, "rate_limited")
            async with event_stream(two, headers=bearer("bob")) as stream:
                await stream.until("snapshot")
        await until_there(two, "ann", 0)
        async with session(two, token=token("ann")), session(two, token=token("ann")):
            redis.kill()
            await until(lambda: not joined(one))
            async with session(one, token=token("ann")):  # while Redis is away each node counts for itself
                pass


async def test_places_at_the_same_moment_are_not_given_twice(redis: RedisServer) -> None:
    async with nodes(redis.url, limits={"connections_per_user": 5}) as pair:
        got: list[str] = []
        refused: list[int] = []

        async def ask(number: int) -> None:
            try:
                await pair[number % 2].node.presence.admit(f"client-{number}", "ann")
            except ApiError as error:
                refused.append(error.status)
            else:
                got.append(f"client-{number}")

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(ask, number)
        assert len(got) == 5
        assert refused == [429] * 35


async def test_a_place_that_nobody_takes_is_given_back(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "PLACE_S", 0.0)
    async with nodes(redis.url, limits={"connections_per_user": 1}) as (one, two):
        await one.node.presence.admit("never", "ann")

        async def admitted() -> bool:
            try:
                await two.node.presence.admit("other", "ann")
            except ApiError:
                return False
            return True

        assert not await admitted()
        await until_so(admitted)


async def test_a_rate_holds_over_all_nodes(redis: RedisServer) -> None:
    """Both nodes together take no more than one would, and each again its own while Redis is away."""
    rate = 50
    async with nodes(redis.url, limits={"messages_per_second": rate, "publishes_per_second": rate}) as (one, two):
        for check in ("check_message", "check_publish"):
            asked = taken = 0
            refusal: ApiError | None = None
            began = trio.current_time()
            with trio.fail_after(PATIENCE_S):
                while trio.current_time() < began + 1.0 or refusal is None:
                    for at in (one, two):
                        asked += 1
                        try:
                            await getattr(at.node.limits, check)("ann", trio.current_time())
                            taken += 1
                        except ApiError as error:
                            refusal = error
                    await for_a_while(0.002)  # they ask faster than they may, and for some seconds
            lasted = trio.current_time() - began
            # What a burst allows and what came meanwhile, and hardly less: a block may lie about unspent.
            assert min(asked, rate * (1 + lasted)) * 0.8 < taken <= rate * (1 + lasted) + 1
            assert (refusal.status, refusal.code, refusal.retry_after) == (429, "rate_limited", 1)
            await getattr(one.node.limits, check)("bob", trio.current_time())
        redis.kill()
        await until(lambda: not joined(one))
        taken = 0
        for _ in range(10 * rate):
            with suppress(ApiError):
                await one.node.limits.check_message("ann", trio.current_time())
                taken += 1
        assert rate <= taken < 5 * rate


async def test_a_frozen_redis_holds_nobody_up_for_long(redis: RedisServer) -> None:
    async with nodes(redis.url, 1, limits={"messages_per_second": 1000}) as (one,):
        redis.freeze()
        try:
            began = trio.current_time()
            for _ in range(100):
                await one.node.limits.check_message("ann", trio.current_time())
            assert trio.current_time() - began < 3 * cluster_module.TOKENS_S
        finally:
            redis.thaw()


async def test_a_large_batch_is_paid_off_over_all_nodes(redis: RedisServer) -> None:
    async with nodes(redis.url, limits={"publishes_per_second": 10}) as (one, two):
        await one.node.limits.check_publish("ann", trio.current_time(), 100)
        with pytest.raises(ApiError) as caught:
            await two.node.limits.check_publish("ann", trio.current_time(), 1)
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 8
        await two.node.limits.check_publish("bob", trio.current_time(), 1)


async def test_a_redis_cluster_does_as_well(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as redis:
        async with nodes(redis.url, auth=AUTH) as (one, two), websocket(one, token=token("ann")) as ws:
            client = (await ws.receive())["clientId"]
            await until_counted(two, EVERYBODY, 1)
            assert await two.node.presence.disconnect_client(client)
            assert (await ws.closed()).code == 1008
            await until_counted(two, EVERYBODY, 0)


async def test_without_redis_a_node_is_alone() -> None:
    async with server() as at:
        assert at.node.cluster is None
        these = presence()
        assert await these.count(EVERYBODY) == 0
