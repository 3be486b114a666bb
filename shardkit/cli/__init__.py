"""The commands: one small module a noun; parse, call, render."""

from .app import main

__all__ = ["main"]
