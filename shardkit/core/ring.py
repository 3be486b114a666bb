"""The ring: from a key to a position, from a position to its owner.

Re-exports one of two implementations of the same interface: the native core `shardkit._ring`, or where that is not
built its pure-Python twin. The environment variable ``SHARDKIT_RING`` (``cython`` or ``python``) forces one, and a
forced one that cannot be imported is an error. `HashRing`, consistent hashing over named nodes without any stored
state, is built on either. Nothing here knows shards, topologies or servers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ._ringargs import Key

if TYPE_CHECKING:
    from ._pyring import Ring, position, positions

    IMPLEMENTATION: str
else:
    _forced = os.environ.get("SHARDKIT_RING", "")
    if _forced not in ("", "cython", "python"):
        raise ImportError(f"SHARDKIT_RING is {_forced!r}; it can be 'cython' or 'python'")
    try:
        if _forced == "python":
            raise ImportError
        from shardkit._ring import Ring, position, positions

        IMPLEMENTATION = "cython"
    except ImportError:
        if _forced == "cython":
            raise
        from ._pyring import Ring, position, positions

        IMPLEMENTATION = "python"

__all__ = ["IMPLEMENTATION", "Key", "Ring", "position", "positions"]
