"""A process that makes ids: ``python -m tests.idworker CATALOG LAYOUT SLOT COUNT FILE``.

SLOT is a number, or ``spread`` for another one each time. The ids are written as 64-bit integers, in the order they
were made, then "done" is printed; the process ends when its input does.
"""

from __future__ import annotations

import random
import sys
from array import array

from shardkit.storage.idleases import IdLeases


def main(catalog: str, layout: str, slot: str, count: str, file: str) -> None:
    leases = IdLeases(catalog)
    make = leases.timed if layout == "timed" else leases.counted
    made = array("q")
    if slot == "spread":
        slots = random.Random(file)
        made.extend(make(slots.getrandbits(16)) for _ in range(int(count)))
    else:
        made.extend(make(int(slot)) for _ in range(int(count)))
    with open(file, "wb") as out:
        made.tofile(out)
    print("done", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
