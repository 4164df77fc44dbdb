"""A tiny model behind the server's application, asked without a socket."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from conftest import BYTES_END, speaking, tiny_model, tiny_tokenizer, write_base
from PIL import Image

from twigvlm.loading.base import Loaded
from twigvlm.serving.desk import Desk
from twigvlm.serving.settings import ServerSettings
from twigvlm.vlm import TwigVLM

CHAT = "/v1/chat/completions"
R = {"tokens": 2.0}  # of four visual tokens
DEFAULTS = {"retained_tokens": 2.0, "max_new_tokens": 12}


@pytest.fixture(scope="session")
def vlm(tmp_path_factory) -> TwigVLM:
    """A tiny twig on a tiny base that has a tokenizer."""
    shape = {"vocabulary": len(tiny_tokenizer()), "context": 1024, "rare": BYTES_END}
    model = tiny_model(**shape)
    folder = write_base(tmp_path_factory.mktemp("base"), model)
    return TwigVLM(Loaded(model, folder, str(folder), False), speaking().twig)


@contextmanager
def desk_of(vlm: TwigVLM, **settings) -> Iterator[Desk]:
    desk = Desk(vlm, DEFAULTS, ServerSettings(**{"model_name": "tiny", **settings}))
    try:
        yield desk
    finally:
        desk.close()


@pytest.fixture
def desk(vlm) -> Iterator[Desk]:
    with desk_of(vlm) as desk:
        yield desk


class Client:
    """Asks an application in this process; every call is an event loop of its own."""

    def __init__(self, desk: Desk):
        from twigvlm.serving.app import make_app

        self.desk, self.app = desk, make_app(desk)

    def __call__(self, method: str, path: str, **more):
        import httpx

        async def ask():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                return await client.request(method, path, **more)

        return asyncio.run(ask())

    def chat(self, messages="What?", **body):
        said = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self("POST", CHAT, json={"model": self.desk.model, "messages": said, **body})

    def text(self, messages="What?", **body) -> str:
        found = self.chat(messages, **body)
        assert found.status_code == 200, found.text
        return found.json()["choices"][0]["message"]["content"]

    def stream(self, messages="What?", **body) -> list[dict]:
        """The chunks of an answer; [DONE] ends them."""
        found = self.chat(messages, stream=True, **body)
        assert found.status_code == 200, found.text
        assert found.headers["content-type"].startswith("text/event-stream")
        events = found.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@pytest.fixture
def client(desk) -> Client:
    return Client(desk)


def data_url(picture: Image.Image, kind: str = "png") -> str:
    out = io.BytesIO()
    picture.save(out, kind.upper())
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def shown(*pictures: Image.Image) -> list[dict]:
    """Parts of a message."""
    return [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]


def picture(seed: int = 0) -> Image.Image:
    import numpy as np

    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 20, 3), np.uint8))
