"""Why a statement is not routed: short names of the reasons, for people and for counting.

Raised inside the planner, which turns them into `UnroutableQuery`. Owns no rule.
"""

from __future__ import annotations

from shardkit.core.errors import UnroutableQuery


class Refusal(Exception):
    """A reason: ``reason`` is its short name, ``text`` a clause for people."""

    def __init__(self, reason: str, text: str, hint: str | None = None) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
        self.hint = hint

    def again(self) -> Refusal:
        """The same reason to raise once more: an exception that is raised twice keeps the frames of both."""
        return Refusal(self.reason, self.text, self.hint)

    def error(self) -> UnroutableQuery:
        """What an application sees."""
        return UnroutableQuery(
            f"This statement cannot be routed: {self.text}.", hint=self.hint, reason=self.reason
        )
