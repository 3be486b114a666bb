"""Sessions of the web: a token says who somebody is and until when, and is signed, so nobody has to look it up.

Any service that has the secret can read it, none has to ask another.
"""

from __future__ import annotations

import hmac
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from uuid import UUID

SECONDS = 14 * 24 * 3600


class TokenInvalid(Exception):
    """The token is none of ours, or too old."""


class Tokens:
    """Makes and reads the tokens of one secret."""

    def __init__(self, secret: str) -> None:
        if len(secret) < 16:
            raise ValueError("The secret of tokens needs 16 characters at least.")
        self._secret = secret.encode()

    def make(self, user_id: UUID, seconds: float = SECONDS) -> str:
        """A token for a user."""
        said = user_id.bytes + int(time.time() + seconds).to_bytes(8)
        return urlsafe_b64encode(said + self._signature(said)).decode()

    def user(self, token: str) -> UUID:
        """Whose token it is. Raises `TokenInvalid`."""
        try:
            data = urlsafe_b64decode(token)
        except ValueError as error:
            raise TokenInvalid("this is no token") from error
        said, signature = data[:24], data[24:]
        if len(said) != 24 or not hmac.compare_digest(signature, self._signature(said)):
            raise TokenInvalid("this is no token of ours")
        if int.from_bytes(said[16:]) < time.time():
            raise TokenInvalid("this token is too old; log in again")
        return UUID(bytes=said[:16])

    def _signature(self, said: bytes) -> bytes:
        return hmac.digest(self._secret, said, "sha256")
