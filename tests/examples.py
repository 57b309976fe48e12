"""How many examples a law is tried on."""

import os


def examples(full: int) -> int:
    """`full` in ``make test-slow``, a quarter of them else, for laws whose examples take long."""
    return full if os.environ.get("NOCTULE_TESTS") == "full" else max(10, full // 4)
