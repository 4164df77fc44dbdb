"""What other packages say on being imported that nobody here can act on. Standard library only.

transformers imports torchao wherever it is installed, and torchao names every kernel for GPUs that does not fit this
torch; nothing here asks those. All else that these loggers say is still said.
"""

from __future__ import annotations

import logging

NOISE = {  # logger → how its messages that are left out begin
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported",),
}


def settle() -> None:
    """Leave them out from now on."""
    for name, starts in NOISE.items():
        logging.getLogger(name).addFilter(lambda record, starts=starts: not str(record.msg).startswith(starts))
