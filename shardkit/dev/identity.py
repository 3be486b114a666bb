"""Give a copied data directory a system identifier of its own.

Copies of one `initdb` would all say that they are the same server, as servers elsewhere never do: whoever compares
identifiers ("are source and target one server?", `doctor`) would be wrong. Driven by the workspace, on a data
directory that was shut down in order and never started since.

The identifier is the first field of global/pg_control, its CRC-32C the last (src/include/catalog/pg_control.h; the
layout between differs by version, so the CRC is found by computing it). The write-ahead log repeats the identifier:
pg_resetwal writes it anew, as pg_createsubscriber does.
"""

from __future__ import annotations

import secrets
import struct
import time
from pathlib import Path

from shardkit.core.errors import ServerFailed

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, reflected."""

_ALIGNMENT = 4
_IDENTIFIER = struct.Struct("=Q")
_CRC = struct.Struct("=I")


def renew_identifier(data_dir: Path) -> None:
    """Write a new system identifier into pg_control; pg_resetwal must run on the folder next.

    Raises `ServerFailed` if the file is not what PostgreSQL writes.
    """
    control = data_dir / "global" / "pg_control"
    content = bytearray(control.read_bytes())
    end = _crc_offset(content)
    # Like initdb: seconds in the upper half; the lower is chance here, several are made in one microsecond's time.
    _IDENTIFIER.pack_into(content, 0, int(time.time()) << 32 | secrets.randbits(32))
    _CRC.pack_into(content, end, _crc32c(content[:end]))
    control.write_bytes(content)


def _crc_offset(content: bytes | bytearray) -> int:
    """Where the CRC of all bytes before it is stored."""
    crc = 0xFFFFFFFF
    for offset in range(0, min(len(content), 512) - _CRC.size, _ALIGNMENT):
        if offset > _IDENTIFIER.size and _CRC.unpack_from(content, offset)[0] == crc ^ 0xFFFFFFFF:
            return offset
        crc = _update(crc, content[offset : offset + _ALIGNMENT])
    raise ServerFailed("global/pg_control has no CRC-32C where PostgreSQL 15 to 18 keep it.")


def _crc32c(data: bytes | bytearray) -> int:
    return _update(0xFFFFFFFF, data) ^ 0xFFFFFFFF


def _update(crc: int, data: bytes | bytearray) -> int:
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (_POLYNOMIAL if crc & 1 else 0)
    return crc
