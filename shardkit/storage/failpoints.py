"""Named points in the mover where a test may stop the process; inert unless armed by the environment.

``SHARDKIT_FAILPOINT=NAME`` kills the process with SIGKILL when it passes the point NAME; ``NAME:3`` when it passes it
the third time. Nothing else reads the variable, and a name that no code passes does nothing.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_ARMED, _, _TIMES = os.environ.get("SHARDKIT_FAILPOINT", "").partition(":")
_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Pass a named point."""
    if name != _ARMED:
        return
    _passed[name] += 1
    if _passed[name] == int(_TIMES or 1):
        os.kill(os.getpid(), signal.SIGKILL)
