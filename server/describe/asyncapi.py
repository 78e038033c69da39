"""AsyncAPI 3.0, from the messages of live connections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from msgspec import Struct

from server.describe.messages import Channel
from server.describe.model import Schema
from server.describe.schemas import components, schema_of

_JSON: Final = "application/json"


def asyncapi(channels: Mapping[str, Channel], *, version: str, base_path: str) -> dict[str, Any]:
    """The description of these channels; ``send`` is what the server does."""
    types = dict.fromkeys(each for channel in channels.values() for each in (*channel.says, *channel.hears))
    schemas = components(types)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "statuswire",
            "version": version,
            "description": "What is said over WebSocket and event streams",
            "license": {"name": "MIT"},
        },
        "defaultContentType": _JSON,
        "channels": {name: _channel(channel, base_path) for name, channel in channels.items()},
        "operations": {
            f"{name}{verb}": {
                "action": action,
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{each.__name__}"} for each in spoken],
            }
            for name, channel in channels.items()
            for verb, action, spoken in (("Says", "send", channel.says), ("Hears", "receive", channel.hears))
            if spoken
        },
        "components": {
            "messages": {each.__name__: _message(each, schemas[each.__name__]) for each in types},
            "schemas": schemas,
        },
    }


def _channel(channel: Channel, base_path: str) -> Schema:
    spoken = dict.fromkeys((*channel.says, *channel.hears))
    return {
        "address": base_path + channel.address,
        "description": channel.text,
        "messages": {each.__name__: {"$ref": f"#/components/messages/{each.__name__}"} for each in spoken},
    }


def _message(each: type[Struct], schema: Schema) -> Schema:
    return {
        "name": " | ".join(schema["properties"]["type"]["enum"]),
        "summary": schema.get("description", each.__name__).partition("\n")[0],
        "payload": schema_of(each),
    }
