"""The colours of the page, light and dark, that stay apart for colour-blind readers too."""

COLORS = ("#0072d3", "#aa2f00", "#0b4f3a", "#d0409f", "#b08b00", "#41207a")
"""Colours of lines on a light page: at least 3:1 against it, 20 CIELAB units apart in every kind of colour blindness."""

COLORS_DARK = ("#5caef5", "#ff9346", "#008b66", "#ffa3d4", "#fff08b", "#8f6bff")
"""Colours of lines on a dark page."""

INK = {
    "page": "#ffffff",
    "ink": "#1b1f24",
    "soft": "#57606a",
    "line": "#d8dee4",
    "panel": "#f6f8fa",
    "accent": "#0067b8",
}
"""Colours of the page, its text, secondary text, rules and tracks, panels, and the accent."""

INK_DARK = {
    "page": "#12161c",
    "ink": "#e8ebef",
    "soft": "#a2abb6",
    "line": "#343c46",
    "panel": "#1b2129",
    "accent": "#6cb8f5",
}
"""Colours of a dark page."""


def variables(ink: dict[str, str], colors: tuple[str, ...]) -> str:
    """The colours as CSS custom properties."""
    named = {**ink, **{f"c{place}": color for place, color in enumerate(colors)}}
    return "".join(f"--{name}:{value};" for name, value in named.items())
