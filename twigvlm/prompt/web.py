"""One picture from the web: http and https only, so many seconds and so many bytes, whatever the server does."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request

from ..errors import InputError

MAX_BYTES = 32 * 2**20
TIMEOUT = 15.0  # seconds for all of it: names, redirects, headers, content
CHUNK = 1 << 16
SCHEMES = ("http://", "https://")


def is_url(name: str) -> bool:
    return name.lower().startswith(SCHEMES)


def download(url: str) -> bytes:
    """What stands at an http(s) address.

    Raises InputError for an address that is none, a server that says no, a redirect to anything but
    http(s), what is not complete after TIMEOUT seconds, and more than MAX_BYTES.
    """
    fetching = _Fetch(url, time.monotonic() + TIMEOUT)
    thread = threading.Thread(target=fetching.run, daemon=True)  # nothing else bounds the look-up of a name
    thread.start()
    thread.join(TIMEOUT)
    if fetching.fault is not None:
        raise fetching.fault
    if fetching.data is None:
        fetching.hang_up()
        raise InputError(f"{url}: not complete after {TIMEOUT:g} s; fetch it yourself and give the file")
    return fetching.data


class _Fetch:
    """One download, by a thread of its own: `data` or `fault` when it has ended."""

    def __init__(self, url: str, end: float):
        self.url, self.end = url, end
        self.data: bytes | None = None
        self.fault: InputError | None = None
        self.sockets: list[socket.socket] = []

    def run(self) -> None:
        try:
            self.data = self._read()
        except InputError as fault:
            self.fault = fault
        except Exception as fault:  # an address that is none, a name that is not known, a server that talks nonsense
            reason = getattr(fault, "reason", None) or fault
            self.fault = InputError(f"{self.url}: cannot be fetched ({reason}); check the address or give a file")

    def hang_up(self) -> None:
        """End the thread, which may wait for a server that sends a byte now and then."""
        self.end = 0.0
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _read(self) -> bytes:
        request = urllib.request.Request(self.url, headers={"User-Agent": "twigvlm"})
        with _opener(self.sockets).open(request, timeout=TIMEOUT + 1) as answer:
            data = bytearray()
            while chunk := answer.read1(CHUNK):
                data += chunk
                if len(data) > MAX_BYTES:
                    raise InputError(f"{self.url}: more than {MAX_BYTES} bytes; fetch it yourself and give the file")
                if time.monotonic() > self.end:
                    raise InputError(
                        f"{self.url}: not complete after {TIMEOUT:g} s; fetch it yourself and give the file"
                    )
        return bytes(data)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's own would follow to ftp as well."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_url(newurl):
            raise InputError(f"{req.full_url}: leads to {newurl!r}, which is no http(s) address; give a file")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """Knows http and https and nothing else; the sockets that it opens are added to `sockets`."""

    class Plain(http.client.HTTPConnection):
        def connect(self):
            super().connect()
            sockets.append(self.sock)

    class Secure(http.client.HTTPSConnection):
        def connect(self):
            super().connect()
            sockets.append(self.sock)

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req):
            return self.do_open(Plain, req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req):
            return self.do_open(Secure, req)

    opener = urllib.request.OpenerDirector()
    proxies = {kind: url for kind, url in urllib.request.getproxies().items() if kind in ("http", "https", "no")}
    for handler in (
        urllib.request.ProxyHandler(proxies),
        Http(),
        Https(),
        _Redirects(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
