"""`shardkit route KEY`: where a key lives, or with ``--id`` what an id carries and where its row is looked for."""

from __future__ import annotations

import re
from collections.abc import Collection
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console

from shardkit.core import ids
from shardkit.core.errors import KeyTypeError
from shardkit.core.keyrange import ArcSet, hex_position, slot_arc, slot_of
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
        help="Of the key. Else what it reads as among the types that the declared tables have.",
    ),
]

IsId = Annotated[
    bool,
    typer.Option("--id", envvar="SHARDKIT_ID", help="KEY is an id made by slot_id(): tell what it carries."),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    # A negative number is a key and no flag.
    app.command("route", context_settings={"ignore_unknown_options": True})(route)


def route(
    key: Annotated[str, typer.Argument(help="The value of the shard key, or an id.")],
    catalog: CatalogUrl,
    type_: Family = None,
    is_id: IsId = False,
    as_json: AsJson = False,
) -> None:
    """Tell which shard owns a key, and the key's position and slot on the ring."""
    if is_id:
        route_id(key, catalog, as_json)
        return
    if type_ is not None:
        parse(key, type_)  # refused before the catalog is asked
    topology = _current(catalog)
    declared = sorted({table.key_type for table in topology.tables})
    family = type_ or guess(key, declared)
    place = position(parse(key, family))
    narrate_type(declared, family, guessed=type_ is None)
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


def route_id(text: str, catalog: str, as_json: bool) -> None:
    """Tell what a slot-carrying id is made of, and the shards that own keys of its slot."""
    parts = decoded(text)
    topology = _current(catalog)
    owned = ArcSet([slot_arc(parts["slot"])])
    shards = [shard.name for shard in topology.shards if topology.owned(shard.id) & owned]
    in_transit = [shard.name for shard in topology.shards if shard.in_transit & owned]
    document = {"id": text, **parts, "shards": shards, "in_transit": in_transit, "version": topology.version}

    def draw(console: Console) -> None:
        told = ", ".join(
            f"{name} {parts[name]}"
            for name in ("time", "slot", "lane", "sequence", "counter")
            if name in parts
        )
        console.print(f"{parts['layout']} id {text}: {told}", soft_wrap=True)
        console.print(f"Its row is on shard {' or '.join(shards)}.", soft_wrap=True)
        for name in in_transit:
            console.print(f"Rows of the slot may also be on shard {name}, in transit.", soft_wrap=True)

    show(document, as_json, draw)


def decoded(text: str) -> dict[str, Any]:
    """The parts of an id by name; `KeyTypeError` if it is none. An integer below 2^53 is a counted one: timed ones are
    above since 25 days after the beginning of their time."""
    try:
        if not _INTEGER.fullmatch(text):
            carried = ids.uuid_parts(UUID(text))
            return {"layout": "uuid", "time": _time(carried.unix_ms), "slot": carried.slot}
        if int(text) < 1 << 53:
            counted = ids.counted(int(text))
            return {"layout": "counted", **counted._asdict()}
        timed = ids.timed(int(text))
        return {"layout": "timed", "time": _time(timed.unix_ms), **timed._asdict()}
    except ValueError as error:
        raise KeyTypeError(
            f"{text!r} is no id that carries a slot.",
            hint="Such an id is an integer from 0 up to 2^63 - 1, or a UUID of version 7.",
        ) from error


def _time(unix_ms: int) -> str:
    try:
        moment = datetime.fromtimestamp(unix_ms / 1000, UTC)
    except (ValueError, OverflowError):  # a UUID counts to the year 10889
        return f"{unix_ms} ms after 1970"
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _current(catalog: str) -> Topology:
    with Catalog.open(catalog) as opened:
        return opened.require_current()


def guess(key: str, declared: Collection[str] = ()) -> KeyFamily:
    """The family that a key reads as, of those that the declared tables have; `KeyTypeError` if it is none of them."""
    readings = [KeyFamily.TEXT]
    if _INTEGER.fullmatch(key):
        readings.insert(0, KeyFamily.INT)
    elif _is_uuid(key):
        readings.insert(0, KeyFamily.UUID)
    for family in readings:
        if not declared or family.value in declared:
            return family
    raise KeyTypeError(
        f"{key!r} is no key of a declared table: their keys are {' and '.join(declared)}.",
        hint=f"Correct the key; or say what it is, as in `--type {readings[0]}`.",
    )


def _is_uuid(key: str) -> bool:
    try:
        UUID(key)
    except ValueError:
        return False
    return True


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


def narrate_type(declared: Collection[str], family: KeyFamily, *, guessed: bool) -> None:
    """Tell what a key was taken as, if nobody said; or that no table has such keys."""
    if guessed:
        narrate(f"The key is taken as {family}; --type says otherwise.")
    elif declared and family.value not in declared:
        narrate(f"No declared table has a key of type {family}; there are: {', '.join(declared)}.")
