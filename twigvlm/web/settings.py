"""Where the page is served, and to whom."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass

from ..config import option
from ..errors import InputError, RunError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
HIGHEST_PORT = 65535


@dataclass(frozen=True)
class PageSettings:
    """The fields are flags. Raises InputError for a port that is none."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is every network that this machine is in")
    port: int = option(7860, "port to listen on; 0 takes a free one", metavar="PORT")
    allow_host: list[str] = option([], "further names by which browsers may ask for the page", metavar="NAME")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= HIGHEST_PORT:
            raise InputError(f"--port is {self.port}; 0 (a free one) to {HIGHEST_PORT} is possible")

    def welcomes(self, name: str) -> bool:
        """Whether a request for this host name is for us.

        A foreign site may have its own name resolve to this machine; its visitors' browsers would then take the page for
        that site's. Where every network is listened to, a bare address is trusted: no name stands for it.
        """
        name = name.lower().strip("[]").rstrip(".")
        known = {n.lower().strip("[]") for n in (*LOOPBACK, self.host, *self.allow_host)}
        return name in known or (self.everywhere and _is_address(name))

    @property
    def everywhere(self) -> bool:
        return _is_address(self.host) and ipaddress.ip_address(self.host).is_unspecified


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def listen(settings: PageSettings) -> socket.socket:
    """The socket, taken before a model is loaded. Raises RunError for a port that is taken, InputError for a host that is not here."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as fault:
        raise InputError(f"--host {settings.host}: no such host; 127.0.0.1 is this machine alone") from fault
    made = socket.socket(family, kind)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(128)
    except OSError as fault:
        made.close()
        if isinstance(fault, PermissionError):
            raise RunError(
                f"--port {settings.port}: may not be listened on ({fault.strerror}); choose one above 1023"
            ) from fault
        if fault.errno in _taken():
            raise RunError(
                f"--port {settings.port}: taken on {settings.host}; choose another, or 0 for a free one"
            ) from fault
        raise InputError(
            f"--host {settings.host}: no address of this machine; 127.0.0.1 is this machine alone"
        ) from fault
    return made


def _taken() -> tuple[int, ...]:
    import errno

    return errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)


def address_of(made: socket.socket, settings: PageSettings) -> str:
    """What to type into a browser on this machine."""
    host = "localhost" if settings.everywhere else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{made.getsockname()[1]}/"
