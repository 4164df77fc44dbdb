"""Pictures at addresses that strangers name: nothing but the public internet is asked, whatever names say."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from twigvlm.errors import InputError
from twigvlm.prompt import web

PRIVATE = (
    "127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "fec0::1",
    "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2", "::7f00:1", "2001:db8::1",
)  # fmt: skip
PUBLIC = ("93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8")


@pytest.mark.parametrize("address", PRIVATE)
def test_private(address):
    assert not web.is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public(address):
    assert web.is_public(address)


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:1/", "http://localhost/a.png", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://2130706433/",
     "http://0x7f.1/", "http://169.254.169.254/latest/meta-data", "https://10.0.0.1/", "http://0/"],
)  # fmt: skip
def test_addresses_that_are_not(url):
    with pytest.raises(InputError, match=r"not on the public internet|cannot be fetched"):
        web.download(url, public=True)


class Reply(BaseHTTPRequestHandler):
    """Redirects to where the path says, else content."""

    def do_GET(self):
        target = self.path.partition("?to=")[2]
        self.send_response(302 if target else 200)
        if target:
            self.send_header("Location", target)
        self.end_headers()
        self.wfile.write(b"" if target else b"picture")

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Reply)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class Names:
    """A name service that answers what it is told, one answer after the other; and who was connected to."""

    def __init__(self, monkeypatch, *answers: list[str]):
        self.answers, self.asked, self.connected = list(answers), [], []
        self.real = socket.socket.connect
        monkeypatch.setattr(web.socket, "getaddrinfo", self.look_up)
        names = self

        class Socket(socket.socket):
            def connect(self, where):
                names.connected.append(where[0])
                return super().connect(("127.0.0.1", where[1]))  # where the test's server is

        monkeypatch.setattr(web.socket, "socket", Socket)

    def look_up(self, host, port, *_args, **_more):
        self.asked.append(host)
        addresses = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


def test_the_judged_address_is_the_one_that_is_asked(monkeypatch):
    """A name that leads to a public machine at first and inside the next time."""
    with serving() as port:
        names = Names(monkeypatch, ["93.184.216.34"], ["127.0.0.1"])
        assert web.download(f"http://rebinding.example:{port}/a.png", public=True) == b"picture"
        assert names.asked == ["rebinding.example"] and names.connected == ["93.184.216.34"]
        with pytest.raises(InputError, match=r"rebinding\.example is not on the public internet"):
            web.download(f"http://rebinding.example:{port}/a.png", public=True)
        assert names.connected == ["93.184.216.34"]


def test_one_private_address_among_many(monkeypatch):
    names = Names(monkeypatch, ["93.184.216.34", "10.0.0.1"])
    with pytest.raises(InputError, match="not on the public internet"):
        web.download("http://two.example/a.png", public=True)
    assert names.connected == []


def test_redirects_are_judged_too(monkeypatch):
    with serving() as port:
        names = Names(monkeypatch, ["93.184.216.34"], ["10.0.0.1"])
        with pytest.raises(InputError, match=r"inside\.example is not on the public internet"):
            web.download(f"http://a.example:{port}/?to=http://inside.example/", public=True)
        names.answers = [["93.184.216.34"]]
        with pytest.raises(InputError, match="cannot be fetched"):
            web.download(f"http://a.example:{port}/?to=file:///etc/passwd", public=True)


def test_no_proxy_looks_names_up(monkeypatch):
    with serving() as port:
        monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
        names = Names(monkeypatch, ["93.184.216.34"])
        assert web.download(f"http://a.example:{port}/a.png", public=True) == b"picture"
        assert names.asked == ["a.example"]


def test_who_runs_the_program_may_name_any_machine():
    with serving() as port:
        assert web.download(f"http://127.0.0.1:{port}/a.png") == b"picture"
