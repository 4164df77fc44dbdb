"""What a server can be told: a dataclass whose fields are its flags."""

from __future__ import annotations

import ipaddress
import math
import os
from dataclasses import dataclass

from ..config import option
from ..errors import InputError

KEY = "TWIGVLM_API_KEY"  # in the environment, where no list of processes shows it
MIB = 2**20


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, to whom, and how much is too much. Raises InputError for what cannot be."""

    host: str = option("127.0.0.1", "address to listen at; 0.0.0.0 is every one of this machine", metavar="ADDRESS")
    port: int = option(8000, "port to listen at; 0 takes a free one", metavar="N")
    api_key: str | None = option(
        None, f"clients say it as Authorization: Bearer KEY (default: ${KEY}, else nobody is asked)", metavar="KEY"
    )
    model_name: str | None = option(
        None, "what clients call the model (default: sprout, the hub id, or the folder's last name)", metavar="NAME"
    )
    max_batch: int = option(8, "requests that are answered together at most", metavar="N")
    max_wait_ms: float = option(
        25.0, "milliseconds that a request waits for others like it, while others are being served", metavar="X"
    )
    max_queue: int = option(256, "requests that may wait; more are told to come again (429)", metavar="N")
    timeout: float = option(300.0, "seconds that a request may take, waiting included (504)", metavar="X")
    max_body: float = option(64.0, "MiB that a request may have, its pictures included (413)", metavar="X")
    allow_remote_images: bool = option(False, "fetch pictures from http(s) addresses on the public internet")
    grace: float = option(30.0, "seconds that running answers may take to end once the server is stopped", metavar="X")

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, legal: str) -> None:
            if not ok:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)!r}; {legal}")

        if self.api_key is None:
            object.__setattr__(self, "api_key", os.environ.get(KEY) or None)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.key):
            raise InputError("--api-key is empty or holds what no header can; printable ASCII letters are needed")
        check(0 <= self.port <= 65535, "port", "0 to 65535 is needed")
        check(self.model_name is None or bool(self.model_name.strip()), "model_name", "a name is needed")
        check(self.max_batch >= 1, "max_batch", "1 or more is needed")
        check(self.max_queue >= 1, "max_queue", "1 or more is needed")
        check(0 <= self.max_wait_ms <= 60_000, "max_wait_ms", "0 to 60000 is needed")
        check(0 < self.timeout < math.inf, "timeout", "a number of seconds above 0 is needed")
        check(0 < self.max_body <= 4096, "max_body", "above 0 and at most 4096 is needed")
        check(0 <= self.grace < math.inf, "grace", "0 or more seconds are needed")

    @property
    def key(self) -> bytes | None:
        return None if self.api_key is None else self.api_key.strip().encode("ascii")

    @property
    def body_bytes(self) -> int:
        return int(self.max_body * MIB)

    @property
    def local(self) -> bool:
        """Only this machine can reach it."""
        return _is_loopback(self.host)

    def welcomes(self, host: str) -> bool:
        """Whether a request for this host name is for us.

        A foreign site may have its own name resolve to this machine, and its visitors' browsers would ask in their name;
        where no key keeps them out, names do.
        """
        host = host.lower().rstrip(".")
        return self.key is not None or not self.local or _is_loopback(host) or host == self.host.lower()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False
