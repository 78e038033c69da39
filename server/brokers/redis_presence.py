"""Who is connected to which node, in Redis: keys and scripts. What a node does with them is in ``server.cluster``.

All keys share the hash tag ``{statuswire}``, see ``redis_keys``.

- ``nodes``, a sorted set: node id -> when its lease runs out, in Redis' own time (unix milliseconds).
- ``present:clients``, a hash: client id -> msgpack of its ``ClientInfo``. All that follows is derived from it.
- ``present:user:t:<user>`` and ``…:r:<user>``, sets of client ids: those that take notifications, and the rest.
- ``present:node:t:<node>`` and ``…:r:<node>``, the same per node, as sorted sets, to be read in pieces.
- ``present:channel:<channel>``, a set of client ids; ``present:members:<channel>``, a hash: user -> its connections.
- ``present:node:<node>``, a hash: ``seq``, number of its last batch; ``info``, see ``PeerInfo``.
- ``present:outbox``, a list of ``StoredEvent``: who came and went, until a node has published it.
- ``present:events``, a number: names the next of them.
- ``control``, a channel: requests from node to node and their answers.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from protocol.presence import ClientInfo
from server.brokers.redis_client import Script
from server.brokers.redis_keys import PREFIX

NODES: Final = f"{PREFIX}nodes".encode()
CLIENTS: Final = f"{PREFIX}present:clients".encode()
OUTBOX: Final = f"{PREFIX}present:outbox".encode()
CONTROL: Final = f"{PREFIX}control".encode()
OUTBOX_MOST: Final = 10_000


class PeerInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a node tells the others with its heartbeats.

    Attributes:
        host: name of its machine.
        group: shared by the workers of one ``statuswire serve``.
        stats: its numbers, see ``server.metrics.Sample``.
    """

    host: str
    group: str
    stats: dict[str, float | dict[str, float]]


class StoredEvent(msgspec.Struct, frozen=True, array_like=True):
    """A ``PresenceEvent`` as scripts write it; ``channel`` is "" for None."""

    id: str
    kind: Literal["join", "leave"]
    user: str
    channel: str
    count: int


class Command(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """End connections: those of a client or of a user, at some nodes."""

    request: str
    nodes: list[str]
    kind: Literal["client", "user"]
    name: str


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A node's answer to a ``Command``: how many it has ended."""

    request: str
    node: str
    count: int


encode: Final = msgspec.msgpack.Encoder().encode
decode_client: Final = msgspec.msgpack.Decoder(ClientInfo).decode
decode_peer: Final = msgspec.msgpack.Decoder(PeerInfo).decode
decode_event: Final = msgspec.msgpack.Decoder(StoredEvent).decode
decode_control: Final = msgspec.msgpack.Decoder(Command | Done).decode


# Scripts. KEYS[1] is NODES in all of them; the other keys follow from it and the arguments.

_BEGIN = """
local call, sub = redis.call, string.sub
local P = sub(KEYS[1], 1, -6) .. 'present:'
local function now()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
"""

# ``set`` makes a client's entries what its new blob says ('' for gone), and writes down who came or went for those
# who listen. The second and seventh field of a ClientInfo are its user and whether it takes notifications, the eighth
# and ninth its channels and its node.
_SET = (
    _BEGIN
    + """
local pack, unpack = cmsgpack.pack, cmsgpack.unpack
local function tell(kind, user, channel, count)
  local listeners = channel == '' and 'user:' .. user or channel
  if call('EXISTS', P .. 'channel:presence:' .. listeners) == 0 then return end
  if call('LLEN', P .. 'outbox') >= OUTBOX_MOST then return end
  call('RPUSH', P .. 'outbox', pack({tostring(call('INCR', P .. 'events')), kind, user, channel, count}))
end
local function kind_of(info) return info[7] and 't:' or 'r:' end
local function held(user) return call('SCARD', P .. 'user:t:' .. user) + call('SCARD', P .. 'user:r:' .. user) end
local function set(client, blob)
  local old = call('HGET', P .. 'clients', client)
  if old == blob or (not old and blob == '') then return end
  local was, is = old and unpack(old), blob ~= '' and unpack(blob)
  local user = (is or was)[2]
  local had, has = {}, {}
  for _, channel in ipairs(was and was[8] or {}) do had[channel] = true end
  for _, channel in ipairs(is and is[8] or {}) do has[channel] = true end
  if is then call('HSET', P .. 'clients', client, blob) else call('HDEL', P .. 'clients', client) end
  for channel in pairs(had) do
    if not has[channel] and call('SREM', P .. 'channel:' .. channel, client) == 1 then
      local members = P .. 'members:' .. channel
      if call('HINCRBY', members, user, -1) <= 0 then
        call('HDEL', members, user)
        tell('leave', user, channel, call('HLEN', members))
      end
    end
  end
  local other = not was or not is or was[7] ~= is[7]
  if was and other then
    call('SREM', P .. 'user:' .. kind_of(was) .. user, client)
    call('ZREM', P .. 'node:' .. kind_of(was) .. was[9], client)
  end
  if is and other then
    call('SADD', P .. 'user:' .. kind_of(is) .. user, client)
    call('ZADD', P .. 'node:' .. kind_of(is) .. is[9], 0, client)
  end
  if not was and held(user) == 1 then tell('join', user, '', 1) end
  if not is and held(user) == 0 then tell('leave', user, '', 0) end
  for channel in pairs(has) do
    if not had[channel] and call('SADD', P .. 'channel:' .. channel, client) == 1 then
      local members = P .. 'members:' .. channel
      if call('HINCRBY', members, user, 1) == 1 then tell('join', user, channel, call('HLEN', members)) end
    end
  end
end
""".replace("OUTBOX_MOST", str(OUTBOX_MOST))
)

# A node's batch of states; about 15 µs of Redis' time each. A batch that is not the next one is refused, so that none
# can be lost, or executed late, without the next heartbeat noticing. The first write is one that a full Redis
# refuses: then nothing has been written.
# ARGV: node, number of the batch, then client id and blob of each. Answers: whether it was taken, events that wait.
WRITE: Final = Script(
    _SET
    + """
local its = P .. 'node:' .. ARGV[1]
if not call('ZSCORE', KEYS[1], ARGV[1]) then return {0, 0} end
if tonumber(call('HGET', its, 'seq') or -1) ~= ARGV[2] - 1 then return {0, 0} end
call('HSET', its, 'seq', ARGV[2])
for i = 3, #ARGV, 2 do set(ARGV[i], ARGV[i + 1]) end
return {1, call('LLEN', P .. 'outbox')}
"""
)

# A place for one more connection of a user. ARGV: node, client id, user, limit, blob.
# Answers: how many others the user has, and 1 if it was let in, 0 if not, -1 if the node has no lease.
ADMIT: Final = Script(
    _SET
    + """
if not call('ZSCORE', KEYS[1], ARGV[1]) then return {0, -1} end
local others = held(ARGV[3])
if others >= tonumber(ARGV[4]) then return {others, 0} end
set(ARGV[2], ARGV[5])
return {others, 1}
"""
)

# A piece of what a node without a lease has left, or of what one leaves that goes. Its number goes first: should it
# come back, it finds out. ARGV: node, how many at most, 1 to do so although it has a lease.
# Answers: whether there is more, events that wait.
REAP: Final = Script(
    _SET
    + """
local node, its = ARGV[1], P .. 'node:' .. ARGV[1]
local score = call('ZSCORE', KEYS[1], node)
if not score or (ARGV[3] ~= '1' and tonumber(score) > now()) then return {0, 0} end
call('HDEL', its, 'seq')
local left = tonumber(ARGV[2])
for _, kind in ipairs({'t:', 'r:'}) do
  if left > 0 then
    for _, client in ipairs(call('ZRANGE', P .. 'node:' .. kind .. node, 0, left - 1)) do
      set(client, '')
      call('ZREM', P .. 'node:' .. kind .. node, client)
      left = left - 1
    end
  end
end
if left > 0 then
  call('ZREM', KEYS[1], node)
  call('DEL', its)
end
return {left > 0 and 0 or 1, call('LLEN', P .. 'outbox')}
"""
)

# ARGV: node, lease in milliseconds, number of its last batch, PeerInfo or '' to leave it.
# Answers: 1 if all that the node wrote is there, events that wait, and nodes whose lease has run out.
BEAT: Final = Script(
    _BEGIN
    + """
local node, its, at = ARGV[1], P .. 'node:' .. ARGV[1], now()
local known = call('ZSCORE', KEYS[1], node) and tonumber(call('HGET', its, 'seq') or -1) == tonumber(ARGV[3])
call('ZADD', KEYS[1], at + ARGV[2], node)
call('HSET', its, 'seq', ARGV[3])
if ARGV[4] ~= '' then call('HSET', its, 'info', ARGV[4]) end
local answer = {known and 1 or 0, call('LLEN', P .. 'outbox')}
for _, dead in ipairs(call('ZRANGEBYSCORE', KEYS[1], '-inf', at, 'LIMIT', 0, 16)) do answer[#answer + 1] = dead end
return answer
"""
)

# Connections of all nodes, in the order of node, kind and client id. ARGV: how many at most; the node, kind and client
# to go on behind, '' for none; a node to stay with, '' for all. Answers: client id and blob of each, by turns.
PAGE: Final = Script(
    _BEGIN
    + """
local most, after, kind, client = tonumber(ARGV[1]), ARGV[2], ARGV[3], ARGV[4]
local nodes = ARGV[5] ~= '' and {ARGV[5]} or call('ZRANGE', KEYS[1], 0, -1)
table.sort(nodes)
local answer = {}
for _, node in ipairs(nodes) do
  for _, its in ipairs({'t:', 'r:'}) do
    local same = node == after and its == kind
    local passed = node < after or (node == after and kind == 'r:' and its == 't:')
    local room = most - #answer / 2
    if not passed and room > 0 then
      local from = same and '(' .. client or '-'
      local ids = call('ZRANGEBYLEX', P .. 'node:' .. its .. node, from, '+', 'LIMIT', 0, room)
      for _, id in ipairs(ids) do
        answer[#answer + 1] = id
        answer[#answer + 1] = call('HGET', P .. 'clients', id)
      end
    end
  end
end
return answer
"""
)

# Connections that take notifications. ARGV: the kind of target, and its ids.
COUNT: Final = Script(
    _BEGIN
    + """
local kind, count = ARGV[1], 0
if kind == 'broadcast' then
  for _, node in ipairs(call('ZRANGE', KEYS[1], 0, -1)) do count = count + call('ZCARD', P .. 'node:t:' .. node) end
elseif kind == 'client' then
  local blob = call('HGET', P .. 'clients', ARGV[2])
  if blob and cmsgpack.unpack(blob)[7] then count = 1 end
elseif #ARGV == 2 and kind ~= 'user' and kind ~= 'users' then
  count = call('SCARD', P .. 'channel:' .. ARGV[2])
else
  local seen = {}
  for i = 2, #ARGV do
    if kind == 'user' or kind == 'users' then
      count = count + call('SCARD', P .. 'user:t:' .. ARGV[i])
    else
      for _, client in ipairs(call('SMEMBERS', P .. 'channel:' .. ARGV[i])) do
        if not seen[client] then
          seen[client] = true
          count = count + 1
        end
      end
    end
  end
end
return count
"""
)

# ARGV: user, how many at most. Answers: blobs of the user's connections.
OF_USER: Final = Script(
    _BEGIN
    + """
local answer = {}
for _, kind in ipairs({'t:', 'r:'}) do
  for _, client in ipairs(call('SMEMBERS', P .. 'user:' .. kind .. ARGV[1])) do
    if #answer >= tonumber(ARGV[2]) then return answer end
    answer[#answer + 1] = call('HGET', P .. 'clients', client)
  end
end
return answer
"""
)

# Answers: node id and PeerInfo of every node with a lease, by turns.
PEERS: Final = Script(
    _BEGIN
    + """
local answer = {}
for _, node in ipairs(call('ZRANGEBYSCORE', KEYS[1], '(' .. now(), '+inf')) do
  local info = call('HGET', P .. 'node:' .. node, 'info')
  if info then
    answer[#answer + 1] = node
    answer[#answer + 1] = info
  end
end
return answer
"""
)
