"""The commands: one small module a noun; parse, call, render."""
