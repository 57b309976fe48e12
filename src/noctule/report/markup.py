"""Text from anywhere made safe to stand in a page."""

import html
import re

# Control characters, lone surrogates and non-characters: HTML has no way to hold them.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def text(value: object) -> str:
    """`value` as text for an element or a quoted attribute, every special character escaped.

    >>> text('<b>"5" & more')
    '&lt;b&gt;&quot;5&quot; &amp; more'
    """
    return html.escape(_UNFIT.sub("\ufffd", str(value)))


def shorten(value: str, most: int) -> str:
    """`value`, its middle left out where it is longer than `most` characters."""
    if len(value) <= most:
        return value
    head = (most - 1) // 2
    return f"{value[:head]}…{value[len(value) - (most - 1 - head) :]}"
