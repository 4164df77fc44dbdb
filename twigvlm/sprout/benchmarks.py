"""The old name of `python -m twigvlm.world.drawn`."""

import sys

from ..world.drawn import main

if __name__ == "__main__":
    sys.exit(main())
