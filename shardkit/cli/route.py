"""`shardkit route KEY`: where a key lives."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console

from shardkit.core.errors import KeyTypeError, NotInitialised
from shardkit.core.keyrange import hex_position, slot_of
from shardkit.core.ring import position
from shardkit.core.topology import Topology
from shardkit.storage.catalog import Catalog

from .options import AsJson, CatalogUrl
from .output import narrate, show

_INTEGER = re.compile(r"[+-]?[0-9]+")


class KeyFamily(StrEnum):
    """The families of shard keys."""

    INT = "int"
    TEXT = "text"
    UUID = "uuid"


Family = Annotated[
    KeyFamily | None,
    typer.Option(
        "--type",
        envvar="SHARDKIT_TYPE",
        help="Of the key. Else an int if it reads as one, a uuid if it reads as one, else text.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    # A negative number is a key and no flag.
    app.command("route", context_settings={"ignore_unknown_options": True})(route)


def route(
    key: Annotated[str, typer.Argument(help="The value of the shard key.")],
    catalog: CatalogUrl,
    type_: Family = None,
    as_json: AsJson = False,
) -> None:
    """Tell which shard owns a key, and the key's position and slot on the ring."""
    family = type_ or guess(key)
    place = position(parse(key, family))
    with Catalog.open(catalog) as opened:
        topology = opened.current()
    if topology is None:
        raise NotInitialised(
            "The catalog has no shard yet.", hint="Add the first with `shardkit shard add NAME URL`."
        )
    _narrate_type(topology, family, guessed=type_ is None)
    owner = topology.by_id[topology.ring.owner_at(place)]
    in_transit = [shard.name for shard in topology.shards if place in shard.in_transit]
    document = {
        "key": key,
        "type": family.value,
        "type_guessed": type_ is None,
        "position": place,
        "position_hex": hex_position(place),
        "slot": slot_of(place),
        "shard": owner.name,
        "in_transit": in_transit,
        "version": topology.version,
    }

    def draw(console: Console) -> None:
        console.print(
            f"{family} {key!r}: position {hex_position(place)}, slot {slot_of(place)}, shard {owner.name}",
            soft_wrap=True,
        )
        for name in in_transit:
            console.print(f"Rows of it may also be on shard {name}, in transit.", soft_wrap=True)

    show(document, as_json, draw)


def guess(key: str) -> KeyFamily:
    """The family that a key reads as."""
    if _INTEGER.fullmatch(key):
        return KeyFamily.INT
    try:
        UUID(key)
    except ValueError:
        return KeyFamily.TEXT
    return KeyFamily.UUID


def parse(key: str, family: KeyFamily) -> int | str | UUID:
    """The key as a value of a family; `KeyTypeError` if it is none."""
    try:
        if family is KeyFamily.INT and _INTEGER.fullmatch(key):
            return int(key)
        if family is KeyFamily.UUID:
            return UUID(key)
    except ValueError:
        pass
    if family is KeyFamily.TEXT:
        return key
    raise KeyTypeError(f"{key!r} is no {family}.")


def _narrate_type(topology: Topology, family: KeyFamily, *, guessed: bool) -> None:
    declared = sorted({table.key_type for table in topology.tables})
    if guessed:
        narrate(f"The key is taken as {family}; --type says otherwise.")
    if declared and family.value not in declared:
        narrate(f"No declared table has a key of type {family}; there are: {', '.join(declared)}.")
