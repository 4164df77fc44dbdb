"""Ask a model about a picture: `twigvlm demo`, by its name in a clone."""

from __future__ import annotations

import sys

from twigvlm.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
