"""The colour themes: the planet's bands by night and by day, and the terminal's own colours."""

from __future__ import annotations

from collections.abc import Mapping

from textual.theme import BUILTIN_THEMES, Theme

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


MUTED = ("primary", "secondary", "accent", "success", "warning", "error")


def _of_terminal(name: str, *, dark: bool, primary: str, accent: str, warning: str) -> Theme:
    """A theme of the sixteen colours that the terminal itself defines."""
    return Theme(
        name=name,
        ansi=True,
        dark=dark,
        primary=primary,
        secondary="ansi_cyan" if dark else "ansi_blue",
        accent=accent,
        success="ansi_green",
        warning=warning,
        error="ansi_red",
        foreground="ansi_default",
        background="ansi_default",
        surface="ansi_default",
        panel="ansi_default",
        boost="ansi_default",
        variables=BUILTIN_THEMES["ansi-dark" if dark else "ansi-light"].variables
        | {"footer-key-foreground": primary}
        # Half a colour cannot be had here, and a whole one would hide text of the same colour.
        | {f"{colour}-muted": "ansi_default" for colour in MUTED},
    )


ANSI_DARK = _of_terminal(
    "jupiter-ansi-dark",
    dark=True,
    primary="ansi_yellow",
    accent="ansi_bright_yellow",
    warning="ansi_bright_magenta",
)
ANSI_LIGHT = _of_terminal(
    "jupiter-ansi-light",
    dark=False,
    primary="ansi_blue",
    accent="ansi_magenta",
    warning="ansi_magenta",
)
THEMES = (DARK, LIGHT, ANSI_DARK, ANSI_LIGHT)
PAIRS = {DARK.name: LIGHT.name, ANSI_DARK.name: ANSI_LIGHT.name}
"""The light partner of each dark theme."""


def partner(theme: Theme) -> str:
    """The theme that is to `theme` as light to dark, or dark to light."""
    pairs = PAIRS | {light: dark for dark, light in PAIRS.items()}
    return pairs.get(theme.name, LIGHT.name if theme.dark else DARK.name)


def default_theme(environ: Mapping[str, str]) -> str:
    """The theme of a terminal whose user has not chosen one, by what it can show."""
    return DARK.name if colours(environ) >= 256 else ANSI_DARK.name


def colours(environ: Mapping[str, str]) -> int:
    """How many colours a terminal shows, as its environment tells; 0 for none, else 16 or more.

    The judgement is that of Rich, which writes the colours in the end, but for the old terminals
    without any.
    """
    if environ.get("TEXTUAL_COLOR_SYSTEM") == "truecolor":  # as in a browser
        return 1 << 24
    term = environ.get("TERM", "").lower()
    if term in ("", "dumb", "unknown") or term.startswith("vt") or term.endswith("-m"):
        return 0
    if environ.get("COLORTERM", "").lower() in ("truecolor", "24bit"):
        return 1 << 24
    return 256 if term.endswith("256color") or "kitty" in term else 16
