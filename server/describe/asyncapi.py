"""AsyncAPI 3.0, from the messages of live connections."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from msgspec import Struct

from server.describe.messages import Channel, Said
from server.describe.model import Schema
from server.describe.schemas import REF, components


def asyncapi(channels: Mapping[str, Channel], *, version: str, base_path: str) -> dict[str, Any]:
    """The description of these channels; ``send`` is what the server does."""
    spoken = [each for channel in channels.values() for each in (*channel.says, *channel.hears)]
    schemas = components(dict.fromkeys(each for each in spoken if isinstance(each, type)))
    schemas |= {each.name: each.schema for each in spoken if isinstance(each, Said)}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "statuswire",
            "version": version,
            "description": "What is said over WebSocket and event streams",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "channels": {name: _channel(channel, base_path) for name, channel in channels.items()},
        "operations": {
            f"{name}{verb}": {
                "action": action,
                "channel": {"$ref": f"#/channels/{name}"},
                "messages": [{"$ref": f"#/channels/{name}/messages/{_name(each)}"} for each in said],
            }
            for name, channel in channels.items()
            for verb, action, said in (("Says", "send", channel.says), ("Hears", "receive", channel.hears))
            if said
        },
        "components": {
            "messages": {_name(each): _message(_name(each), schemas[_name(each)]) for each in spoken},
            "schemas": schemas,
        },
    }


def _name(each: type[Struct] | Said) -> str:
    return each.name if isinstance(each, Said) else each.__name__


def _channel(channel: Channel, base_path: str) -> Schema:
    address = base_path + channel.address
    names = dict.fromkeys(_name(each) for each in (*channel.says, *channel.hears))
    described: Schema = {
        "address": address,
        "description": channel.text,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in names},
    }
    if variables := re.findall(r"{(\w+)}", address):
        described["parameters"] = {name: {} for name in variables}
    return described


def _message(name: str, schema: Schema) -> Schema:
    types = schema["properties"].get("type", {}).get("enum", [name])
    return {
        "name": " | ".join(types),
        "summary": schema.get("description", name).partition("\n")[0],
        "payload": {"$ref": REF.format(name=name)},
    }
