"""``python -m noctule_bench NAME``: the same as ``noctule bench NAME``."""

import sys

from noctule.core.errors import UsageError
from noctule_bench.program import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
