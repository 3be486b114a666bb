"""Passwords are kept as scrypt hashes, each with a salt of its own."""

from __future__ import annotations

import hmac
import os
from base64 import b64decode, b64encode
from hashlib import scrypt

_COST = {"n": 2**14, "r": 8, "p": 1}
"""16 MB of memory and some tens of milliseconds: run it in a thread, not in an event loop."""


def hashed(password: str) -> str:
    """What to keep of a password."""
    salt = os.urandom(16)
    return f"{_text(salt)}${_text(scrypt(password.encode(), salt=salt, **_COST))}"


def matches(password: str, kept: str) -> bool:
    """Whether it is the password of which that was kept."""
    salt, _, digest = kept.partition("$")
    return hmac.compare_digest(scrypt(password.encode(), salt=b64decode(salt), **_COST), b64decode(digest))


def _text(data: bytes) -> str:
    return b64encode(data).decode()
