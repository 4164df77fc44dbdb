"""One picture from the web: http and https only, so many seconds and so many bytes, whatever the server does."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import re
import socket
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

from ..config import SHOWN
from ..errors import InputError

MAX_BYTES = 32 * 2**20
TIMEOUT = 15.0  # seconds for all of it: names, redirects, headers, content
CHUNK = 1 << 16
SCHEMES = ("http://", "https://")


def is_url(name: str) -> bool:
    return name.strip().lower().startswith(SCHEMES)


def download(url: str, public: bool = False) -> bytes:
    """What stands at an http(s) address.

    `public`: for an address that somebody else names. Only machines on the public internet are asked then, and no
    proxy: every address that a name leads to is judged, after each redirect again, and the judged one is connected to.

    Raises InputError for an address that is none, a server that says no, a redirect to anything but
    http(s), what is not complete after TIMEOUT seconds, and more than MAX_BYTES.
    """
    url = " ".join(url.split())
    _check_nameless(url)
    fetching = _Fetch(url, time.monotonic() + TIMEOUT, public)
    thread = threading.Thread(target=fetching.run, daemon=True)  # nothing else bounds the look-up of a name
    thread.start()
    thread.join(TIMEOUT)
    if fetching.fault is not None:
        raise fetching.fault
    if fetching.data is None:
        fetching.hang_up()
        raise InputError(f"{fetching.url}: not complete after {TIMEOUT:g} s; fetch it yourself and give the file")
    return fetching.data


def _check_nameless(url: str) -> None:
    """Raises InputError for an address with a user name, and says neither it nor the password: messages are logged."""
    scheme, _, rest = url.partition("://")
    server = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in server:
        raise InputError(
            f"{scheme}://…@{server.rpartition('@')[2][:SHOWN]}: an address with a user name cannot be fetched; fetch it "
            "yourself and give the file"
        )


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not private, of this machine, of this link, shared, reserved."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6:
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if found.is_site_local or found.sixtofour is not None or found.teredo is not None:
            return False  # the last two lead through others' machines to addresses within
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _connect_publicly(address: tuple[str, int], timeout=None, source_address=None) -> socket.socket:
    """What http.client does by `socket.create_connection`, to addresses that were judged and no others.

    The name is looked up once: who answers otherwise the next time gains nothing. Raises InputError.
    """
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not found or not all(is_public(str(where[0])) for *_, where in found):
        raise InputError(f"{host} is not on the public internet; only pictures that are can be fetched")
    fault: OSError | None = None
    for family, kind, protocol, _, where in found:
        one = socket.socket(family, kind, protocol)
        try:
            one.settimeout(timeout)
            one.connect(where)
            return one
        except OSError as failed:
            one.close()
            fault = failed
    raise fault


class _Fetch:
    """One download, by a thread of its own: `data` or `fault` when it has ended."""

    def __init__(self, url: str, end: float, public: bool = False):
        self.url, self.end, self.public = url, end, public
        self.data: bytes | None = None
        self.fault: InputError | None = None
        self.sockets: list[socket.socket] = []

    def run(self) -> None:
        try:
            self.data = self._read()
        except InputError as fault:
            self.fault = fault
        except Exception as fault:  # an address that is none, a name that is not known, a server that talks nonsense
            reason = " ".join(str(getattr(fault, "reason", None) or fault).split()) or type(fault).__name__
            code = f"{fault.code} " if isinstance(fault, urllib.error.HTTPError) else ""
            self.fault = InputError(f"{self.url}: cannot be fetched ({code}{reason}); check the address or give a file")

    def hang_up(self) -> None:
        """End the thread, which may wait for a server that sends a byte now and then."""
        self.end = 0.0
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _read(self) -> bytes:
        request = urllib.request.Request(_written(self.url), headers={"User-Agent": "twigvlm"})
        with _opener(self.sockets, self.public).open(request, timeout=TIMEOUT + 1) as answer:
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


def _written(url: str) -> str:
    """An address as a server reads it: letters beyond ASCII and blanks behind its name in per cents, as browsers do."""
    parts = urllib.parse.urlsplit(url)
    path, query = (urllib.parse.quote(text, safe=string.punctuation) for text in (parts.path, parts.query))
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, query, ""))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib's own would follow to ftp as well."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not is_url(newurl):
            raise InputError(f"{req.full_url}: leads to {newurl!r}, which is no http(s) address; give a file")
        _check_nameless(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener(sockets: list[socket.socket], public: bool) -> urllib.request.OpenerDirector:
    """Knows http and https and nothing else; the sockets that it opens are added to `sockets`."""

    class Kept:
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            if public:
                self._create_connection = _connect_publicly

        def connect(self):
            super().connect()
            sockets.append(self.sock)

    class Plain(Kept, http.client.HTTPConnection):
        pass

    class Secure(Kept, http.client.HTTPSConnection):
        pass

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req):
            return self.do_open(Plain, req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req):
            return self.do_open(Secure, req)

    opener = urllib.request.OpenerDirector()
    proxies = {kind: url for kind, url in urllib.request.getproxies().items() if kind in ("http", "https", "no")}
    proxies = {} if public else proxies  # a proxy looks names up by itself
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
