"""Rates per user over all nodes, in Redis: one token bucket each, from which nodes take tokens in blocks.

``rate:<what>:<user>``, a hash: ``tokens`` as of ``at`` (unix seconds, in Redis' own time). It expires once it is full.
"""

from __future__ import annotations

from typing import Final

from server.brokers.redis_client import Script
from server.brokers.redis_keys import PREFIX


def rate_key(what: str, user: str) -> bytes:
    """Where a user's bucket is."""
    return f"{PREFIX}rate:{what}:{user}".encode()


# The same bucket as ``protocol.ratelimit.TokenBucket``: a batch larger than the burst passes on a full one and leaves
# it in debt. KEYS: the bucket. ARGV: rate, burst, tokens that are needed now, tokens to take if there are as many.
# Answers: tokens taken, and if there are none the milliseconds until there are enough.
TAKE: Final = Script("""
local time = redis.call('TIME')
local now, rate, burst, n = time[1] + time[2] / 1000000, tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local state = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens = burst
if state[1] then
  tokens = math.min(burst, tonumber(state[1]) + math.max(0, now - tonumber(state[2])) * rate)
end
local missing = math.min(n, burst) - tokens
if missing > 0.001 then return {0, math.ceil(missing / rate * 1000)} end
local taken = math.max(n, math.min(tonumber(ARGV[4]), math.floor(tokens)))
tokens = tokens - taken
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens), 'at', string.format('%.6f', now))
redis.call('PEXPIRE', KEYS[1], math.ceil((burst - tokens) / rate * 1000) + 1000)
return {taken, 0}
""")
