"""The two colour themes: the bands of the planet, by night and by day."""

from __future__ import annotations

from textual.theme import Theme

DIM = "$foreground 60%"
"""The style of what is there but should not draw the eye."""

DARK = Theme(
    name="jupiter-dark",
    primary="#e0a05a",
    secondary="#7aa2c9",
    accent="#f2b774",
    success="#7fbf8e",
    warning="#e5c07b",
    error="#e06c75",
    foreground="#dcdfe6",
    background="#12141a",
    surface="#1a1d26",
    panel="#232733",
    dark=True,
)
LIGHT = Theme(
    name="jupiter-light",
    primary="#a65f1b",
    secondary="#356a9a",
    accent="#8f4f12",
    success="#2f7d4f",
    warning="#96690b",
    error="#b3343f",
    foreground="#2b2620",
    background="#fbf9f5",
    surface="#f3efe8",
    panel="#e9e3d8",
    dark=False,
)
