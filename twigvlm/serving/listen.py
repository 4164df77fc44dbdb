"""From a desk to a server that listens: a port, signals, an orderly end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError, RunError
from ..program import extra
from .app import make_app
from .desk import Desk
from .settings import ServerSettings

BACKLOG = 2048
KEEP_ALIVE = 75  # seconds that a connection may be idle
LAST_WORDS = 5  # seconds to tell clients that an answer was given up
PATIENCE = 1.0  # seconds for the engine to end the step in work


def need() -> None:
    """Raises InputError where the packages of a server are not installed."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as fault:
        raise InputError(f"the server needs {fault.name}, which is not installed: {extra('serve')}") from fault


def bind(settings: ServerSettings) -> socket.socket:
    """The port, ours from now on. Raises InputError for an address that is none here, RunError where it is taken."""
    host, port = settings.host, settings.port
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as fault:
        raise InputError(f"--host {host}: no address of this machine ({fault}); 127.0.0.1 is always one") from fault
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(BACKLOG)
    except OSError as fault:
        made.close()
        if fault.errno == errno.EADDRINUSE:
            raise RunError(
                f"{shown} is taken by another program; choose another --port (0 takes a free one)"
            ) from fault
        if fault.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"--host {host}: no address of this machine; 127.0.0.1 is always one") from fault
        raise RunError(f"cannot listen at {shown} ({fault.strerror or fault}); choose another --port") from fault
    return made


def address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(desk: Desk):
    """A uvicorn.Server whose running answers end, one way or another, within the grace that the settings give."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None) -> None:
            asyncio.get_running_loop().call_later(desk.settings.grace, desk.end)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        make_app(desk), loop="asyncio", ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE, backlog=BACKLOG,
        timeout_graceful_shutdown=int(desk.settings.grace) + LAST_WORDS,
    )  # fmt: skip
    return Server(config)


@contextmanager
def ending(server) -> Iterator[None]:
    """SIGTERM and SIGINT end this uvicorn.Server however early they come, before it listens to them itself.

    It sends itself the signal again once it has ended; that is then no death by a signal either.
    """
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(desk: Desk, sock: socket.socket) -> None:
    """Tell the address, and answer until SIGTERM or SIGINT; whoever is being answered then is answered first."""
    server = make_server(desk)
    try:
        with ending(server):
            print(f"{desk.model} at {address(sock)}/v1 (Ctrl-C ends)", flush=True)
            server.run(sockets=[sock])
    finally:
        desk.close()
    print("stopped", file=sys.stderr, flush=True)
