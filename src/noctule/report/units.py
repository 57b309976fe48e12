"""Numbers as people read them: counts, bytes, seconds, shares and ratios."""

import math

MISSING = "not available"
TIMES, MINUS = "\u00d7", "\u2212"
GAP = "\u00a0"  # between a number and its unit no line breaks


def count(value: float | None) -> str:
    """A whole number in groups of three: 125,685."""
    return MISSING if value is None else f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes, to three digits, in powers of a thousand: 1.52 MB."""
    return MISSING if value is None else _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def energy(value: float | None) -> str:
    """Joules, to three digits: 4.21 kJ."""
    return MISSING if value is None else _scaled(value, ("J", "kJ", "MJ", "GJ"))


def duration(value: float | None) -> str:
    """Seconds, in the unit that suits them: 8.1 ms, 2.34 s, 5 min 20 s, 3 h 5 min."""
    if value is None:
        return MISSING
    if value < 0.1:
        return f"{digits(value * 1e3, 3)}{GAP}ms"
    if value < 99.95:
        return f"{digits(value, 3)}{GAP}s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}{GAP}h {minutes}{GAP}min" if hours else f"{minutes}{GAP}min {seconds}{GAP}s"


def percent(share: float | None) -> str:
    """A share of one with one decimal, more where it would pass for none or all of it: 91.2 %, 0.045 %, 99.97 %."""
    if share is None:
        return MISSING
    for decimals in range(1, 6):
        text = f"{share * 100:.{decimals}f}"
        rounded = float(text)
        if share in (0, 1) or (rounded != 100 and abs(rounded) >= 10.0 ** (1 - decimals)):
            break
    return f"{text}{GAP}%"


def r2(value: float | None) -> str:
    """The coefficient of determination: R² 0.873."""
    return MISSING if value is None else f"R²{GAP}{value:.3f}"


def signed(value: float, decimals: int) -> str:
    """A number with its sign, which nought has not: +0.2, \u22120.3, 0.0."""
    rounded = round(value, decimals)
    return f"{'+' if rounded > 0 else MINUS if rounded < 0 else ''}{abs(rounded):.{decimals}f}"


def ratio(value: float | None) -> str:
    """How many times: 11×, 6.8×, 0.71×."""
    if value is None:
        return MISSING
    return (f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else digits(value, 2)) + TIMES


def digits(value: float, most: int) -> str:
    """`value` to `most` significant digits without an exponent, trailing zeros kept: 0.40, 12.3, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{most}g}")
    decimals = max(0, most - 1 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    whole = power == 0 and value == int(value)
    return f"{value:.0f}{GAP}{units[0]}" if whole else f"{digits(value, 3)}{GAP}{units[power]}"
