"""What goes wrong between a client and this server, in OpenAI's shape; no traceback and no path of this machine in it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..files import whole

LONGEST = 600  # letters of a message: clients' own words come back in it
BAD, MISSING, AUTH, LIMIT, SERVER = (
    "invalid_request_error",
    "not_found_error",
    "authentication_error",
    "rate_limit_error",
    "server_error",
)
RETRY_SECONDS = 1
PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/:;,()'\"]+/)+([^\s/:;,()'\"]*)")  # of a machine; its last name stays


@dataclass
class Fault(Exception):
    """One error as it is answered: HTTP status, one line, OpenAI's type, parameter and code."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = BAD
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        said = {"message": clean(self.message), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": said}


def clean(message: str) -> str:
    """One line of whole letters, not endless, without folders of this machine."""
    line = private(whole(message))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def private(text: str) -> str:
    """One line that says of this machine's folders no more than their last name."""
    return PATH.sub(r"\1", " ".join(text.split()))


def refused(param: str | None, message: str, code: str | None = None) -> Fault:
    """What a client asked for cannot be."""
    return Fault(400, message, param, code)


def busy(message: str) -> Fault:
    return Fault(429, message, None, "queue_full", LIMIT, {"Retry-After": str(RETRY_SECONDS)})


def closing() -> Fault:
    said = "the server is shutting down; ask again later"
    return Fault(503, said, None, "shutting_down", SERVER, {"Retry-After": str(RETRY_SECONDS)})


def late(seconds: float) -> Fault:
    said = f"not answered after {seconds:g} s; ask for fewer tokens (max_tokens), or start the server with a longer --timeout"
    return Fault(504, said, None, "timeout", SERVER)


def of(fault: Exception, param: str | None = None) -> Fault:
    """Any exception as a client may hear it: what it asked wrongly in full, of what is wrong here only that it is."""
    from .engine import Busy, Closed

    if isinstance(fault, Fault):
        return fault
    if isinstance(fault, Busy):
        return busy(str(fault))
    if isinstance(fault, Closed):
        return closing()
    if isinstance(fault, InputError):
        return refused(param, str(fault))
    return Fault(500, "the server could not answer this; its log says why", None, "internal_error", SERVER)
