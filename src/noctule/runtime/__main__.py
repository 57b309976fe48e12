"""``python -m noctule.runtime MODEL INPUTS.npy OUTPUTS.npy``: the outputs of a shipped model for an array of inputs."""

import sys
from collections.abc import Sequence

import numpy as np

from noctule.runtime.model import load


def main(words: Sequence[str]) -> int:
    """Run a model on the array in a file; the exit status."""
    if len(words) != 3 or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    try:
        np.save(words[2], load(words[0])(np.load(words[1], allow_pickle=False)))
    except (OSError, ValueError) as error:
        print(f"noctule.runtime: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
