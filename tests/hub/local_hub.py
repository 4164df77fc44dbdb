"""A hub on this machine: as much of its protocol as huggingface_hub speaks to make, fill and read a model repository."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from conftest import tiny_model, write_base

from twigvlm.config import TwigConfig
from twigvlm.families import trunk_of
from twigvlm.model.twig import grow, save_twig

TOKEN = "hf_right"


class Hub:
    """Repositories with their branches and commits; what was asked of whom."""

    def __init__(self):
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository → commit → files
        self.branches: dict[str, dict[str, str]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []

    def create(self, name: str, private: bool = False) -> None:
        if name not in self.commits:
            self.commits[name], self.branches[name], self.private[name] = {}, {}, private
            self.commit(name, "main", {}, "initial commit")

    def commit(self, name: str, branch: str, files: dict[str, bytes], message: str) -> str:
        before = self.branches[name].get(branch)
        now = {**self.commits[name].get(before, {}), **files}
        told = hashlib.sha1(f"{name} {branch} {before} {message} {sorted(now)}".encode())
        for content in now.values():
            told.update(content)
        self.commits[name][told.hexdigest()] = now
        self.branches[name][branch] = told.hexdigest()
        self.messages.append(message)
        return told.hexdigest()

    def resolve(self, name: str, revision: str) -> str | None:
        return self.branches[name].get(revision, revision if revision in self.commits[name] else None)


def entry(name: str, content: bytes) -> dict:
    """A file as listings have it."""
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class Door(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def reply(self, facts: object = None, status: int = 200, head: dict | None = None, body: bytes | None = None):
        data = json.dumps(facts).encode() if body is None else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str):
        self.reply({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        if path == "/api/validate-yaml":
            text = json.loads(data)["content"]
            yaml.safe_load(re.match(r"---\n(.*?)\n---", text, re.S)[1])
            return self.reply({"errors": [], "warnings": []})
        if not self.allowed:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.hub.create(name, asked.get("private") or asked.get("visibility") == "private")
            return self.reply({"url": f"http://{self.headers['Host']}/{name}"})
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|paths-info)/(.+)", path)
        if asked is None:
            return self.refuse(404, "", f"this hub knows no {path}")
        name, what, revision = asked.groups()
        if name not in self.hub.commits:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if what == "branch":
            self.hub.branches[name].setdefault(revision, self.hub.branches[name]["main"])
            return self.reply({})
        if self.hub.resolve(name, revision) is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if what == "paths-info":
            there = self.hub.commits[name][self.hub.resolve(name, revision)]
            wanted = parse_qs(data.decode()).get("paths", [])
            return self.reply([entry(path, there[path]) for path in wanted if path in there])
        if what == "preupload":
            files = json.loads(data)["files"]
            return self.reply(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        lines = [json.loads(line) for line in data.splitlines()]
        files = {
            v["path"]: base64.b64decode(v["content"]) for v in (one["value"] for one in lines if one["key"] == "file")
        }
        summary = next(one["value"]["summary"] for one in lines if one["key"] == "header")
        wish = "create_pr=1" in query
        commit = self.hub.commit(name, "refs/pr/1" if wish else revision, files, summary)
        url = f"http://{self.headers['Host']}/{name}"
        more = {"pullRequestUrl": f"{url}/discussions/1"} if wish else {}
        self.reply({"success": True, "commitUrl": f"{url}/commit/{commit}", "commitOid": commit, **more})

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+?)/([^/]+)", path)
        name = (about or file)[1]
        if name not in self.hub.commits or (self.hub.private[name] and not self.allowed):
            return self.refuse(401 if name in self.hub.commits else 404, "RepoNotFound", "Repository not found")
        commit = self.hub.resolve(name, (about[3] if about else file[2]) or "main")
        if commit is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = self.hub.commits[name][commit]
        if about and about[2] == "tree":
            return self.reply([entry(*pair) for pair in files.items()])
        if about:
            return self.reply(
                {
                    "id": name,
                    "sha": commit,
                    "private": self.hub.private[name],
                    "siblings": [{"rfilename": n} for n in files],
                }
            )
        if file[3] not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        body = files[file[3]]
        self.reply(head={"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}, body=body)

    do_HEAD = do_GET


@pytest.fixture(name="hub")
def local_hub(monkeypatch, tmp_path):
    """huggingface_hub asks this one, and keeps what it fetches in a folder of the test."""
    from huggingface_hub import constants

    kind = type("Here", (Door,), {"hub": Hub()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield kind.hub
    server.shutdown()
    server.server_close()


@pytest.fixture(name="folders")
def base_and_twig(tmp_path):
    """A tiny base with a licence, and a twig of it that learnt something else than the base."""
    import torch

    base = write_base(tmp_path / "base", tiny_model())
    (base / "README.md").write_text("---\nlicense: llama2\n---\n# base\n")
    trunk = trunk_of(tiny_model())
    twig = grow(trunk, TwigConfig(trunk.L, 2, 2))
    with torch.no_grad():
        for parameter in twig.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) / 50)
    save_twig(twig, trunk, tmp_path / "twig", str(base))
    return base, tmp_path / "twig"
