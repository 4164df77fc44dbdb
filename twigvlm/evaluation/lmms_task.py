"""The old name of `python -m twigvlm.evaluation.lmms.task`."""

import sys

from .lmms.task import main

if __name__ == "__main__":
    sys.exit(main())
