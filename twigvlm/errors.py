"""The two kinds of failure that a caller may want to tell apart."""


class InputError(ValueError):
    """What was asked for cannot be: names value, limit and remedy. Programs exit with 2."""


class RunError(RuntimeError):
    """It could have worked and did not (a network, a disk, a full memory). Programs exit with 1."""
