"""The old name of `python -m twigvlm.world.conversations`."""

import sys

from ..world.conversations import main

if __name__ == "__main__":
    sys.exit(main())
