"""The shape of the package, read from its source: nothing is imported here."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "twigvlm"
TASKS = "twigvlm.evaluation.tasks"

FUNCTION_LINES, FILE_LINES, FOLDER_MODULES = 60, 450, 12
UNBOUNDED = {"evaluation/tasks", "pruning/methods"}  # one file a benchmark, one file a method: they may grow

# What was larger when the limits were set, with its size then. An entry may shrink and has to go once it is within the
# limit; none may grow or be added.
LONG_FUNCTIONS: dict[str, int] = {}
LONG_FILES: dict[str, int] = {}
LATE = {
    "twigvlm.files imports filelock",  # with the first lock, which no score takes
    f"{TASKS}.mmbench imports xlsxwriter",  # with the first spreadsheet, which no score writes
}
# Who may name a benchmark: its own file, the drawn world's writers, and words that mean something else as well.
NAMERS = ("evaluation/tasks/", "world/")
AMBIGUOUS = {"seed"}  # of sampling
FULL_FOLDERS: dict[str, int] = {}
MOVES, WRITTEN = ("os.rename", "shutil.copy", "shutil.move", "torch.save"), (".write_text", ".write_bytes")
# Who writes without `files.py`, and why it may.
IN_A_NEW_FOLDER = "the folder takes its place as a whole, when all is in it"
WRITERS = {
    "commands/export.py:whole_folder": IN_A_NEW_FOLDER,
    "training/run/checkpoints.py:seal": IN_A_NEW_FOLDER,
    "training/run/checkpoints.py:remove": "a folder that is going loses its name first",
    "world/benchmarks/folder.py:text": IN_A_NEW_FOLDER,
    "world/benchmarks/folder.py:picture": IN_A_NEW_FOLDER,
    "world/conversations.py:write": IN_A_NEW_FOLDER,
    "world/drawn.py:_generate": IN_A_NEW_FOLDER,
    "world/drawn.py:_replace": IN_A_NEW_FOLDER,
    "evaluation/asking/shards.py:_start": "a child's output, read while it comes",
}


@cache
def trees() -> dict[str, tuple[Path, ast.Module]]:
    """Dotted name → file and syntax tree of every module; a package's name stands for its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path, ast.parse(path.read_text("utf-8"))
    return found


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below this one that may be executed."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            child = ast.Module(child.orelse, [])  # what runs stands behind its else
        yield child
        yield from running(child)


def imports(name: str, path: Path, tree: ast.Module) -> Iterator[str]:
    """Dotted names of all that a module imports, be it late, but for the eyes of a type checker alone."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in running(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in trees() else source


def edges() -> dict[str, set[str]]:
    """Module of ours → modules of ours that it imports."""
    return {name: {i for i in imports(name, *found) if i in trees()} - {name} for name, found in trees().items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Some circle of the graph, or nothing."""
    done: set[str] = set()

    def search(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := search(other, [*above, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in graph if (found := search(name, []))), [])


def over(sizes: Mapping[str, int], limit: int, allowed: Mapping[str, int]) -> list[str]:
    """What is larger than it may be, and exceptions that nothing needs any more."""
    too_large = [f"{k} has {n}, {allowed.get(k, limit)} allowed" for k, n in sizes.items() if n > allowed.get(k, limit)]
    return too_large + [f"{k} is within {limit}: strike it" for k in allowed if sizes.get(k, 0) <= limit]


# Which room may look into which: those named and, everywhere, the ground floor. Each room may look at itself.
GROUND = {"config", "errors", "files", "processes", "program", "record", "threads", "workers"}
LOOKS_INTO: dict[str, set[str]] = {
    "hub": set(),  # of a folder and of facts; it knows no model
    "model": {"hub"},  # a twig pushes itself
    "loading": {"model"},
    "prompt": {"loading"},
    "world": {"flags"},  # its commands'
    "pruning": {"flags", "loading", "model", "prompt"},  # its commands have flags; some methods bring weights
    "families": {"model", "loading", "prompt"},
    "decoding": {"model", "prompt", "pruning"},
    "vlm": {"decoding", "families", "loading", "model", "prompt", "pruning"},
    "flags": {"pruning"},
    "foresight": {"loading", "pruning"},
    "web": {"vlm", "flags", "foresight", "serving", "decoding", "prompt", "pruning", "world"},
    "serving": {"vlm", "flags", "foresight", "decoding", "loading", "model", "prompt", "pruning"},
    "evaluation": {
        "vlm",
        "flags",
        "foresight",
        "decoding",
        "families",
        "loading",
        "model",
        "prompt",
        "pruning",
        "world",
    },
    "training": {
        "vlm",
        "flags",
        "foresight",
        "decoding",
        "families",
        "loading",
        "model",
        "prompt",
        "pruning",
        "world",
        "hub",
    },
    "sprout": {
        "vlm",
        "flags",
        "foresight",
        "evaluation",
        "families",
        "loading",
        "model",
        "prompt",
        "pruning",
        "training",
        "world",
        "hub",
    },
}
LOOKS_INTO["commands"] = LOOKS_INTO["evaluation"] | {"hub"}
LOOKS_INTO["__main__"] = {""}  # its commands are names until they are asked for
# Programs that lie in the room which they are about and look at more than the room may: nothing imports them.
COMMANDS = {
    "twigvlm.pruning.show": {"", "vlm", "foresight"},
    "twigvlm.serving.benchmark": {"evaluation", "world"},
}
# Who else needs transformers: its warpers, its processors, its parser, its log.
TRANSFORMERS = {"model", "loading", "prompt", "families", "training", "sprout"}
ALSO_TRANSFORMERS = {"decoding.choose", "flags", "evaluation.run", "commands.demo", "commands.export"}
ALSO_TRANSFORMERS |= {"serving.__main__", "serving.benchmark", "web.__main__"}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_rooms_look_one_way():
    wrong = []
    for name, others in edges().items():
        here = room(name)
        allowed = GROUND | {here} | LOOKS_INTO.get(here, set())
        allowed |= {""} if "vlm" in allowed else set()  # `import twigvlm` is a look at the public face
        allowed |= COMMANDS.get(name, set())
        wrong += [f"{name} imports {other}" for other in sorted(others) if here and room(other) not in allowed]
    assert not wrong
    assert not [name for name, others in edges().items() if others & COMMANDS.keys()], "a program is imported"
    assert {room(name) for name in trees()} - {""} <= set(LOOKS_INTO) | GROUND, "a room without a rule"


def test_who_needs_which_package():
    wrong = set()
    for name, found in trees().items():
        for other in imports(name, *found):
            package = other.split(".")[0]
            if package in ("accelerate", "deepspeed", "peft") and room(name) != "training":
                wrong.add(f"{name} imports {package}")
            known = room(name) in TRANSFORMERS or name.removeprefix("twigvlm.") in ALSO_TRANSFORMERS
            if package == "transformers" and not known:
                wrong.add(f"{name} imports {package}")
            if package in ("torch", "transformers") and room(name) == "world":
                wrong.add(f"{name} imports {package}")
    assert not wrong


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_no_circles():
    assert not circle(edges())


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert "twigvlm.model.cache" in edges()["twigvlm.model.trunk"], "relative imports are resolved"


def test_what_runs_beside_a_type_checkers_imports_is_seen():
    code = "if TYPE_CHECKING:\n    import torch\nelse:\n    import numpy\n"
    assert list(imports("twigvlm.a", Path("a.py"), ast.parse(code))) == ["numpy"]


def test_tasks_need_the_standard_library_only():
    """With all that they import of ours, and with the packages that they lie in."""
    graph, todo, reached = edges(), [name for name in trees() if name.startswith(TASKS)], set()
    todo += ["twigvlm", "twigvlm.evaluation"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += graph[name]
    foreign = {
        f"{name} imports {other}"
        for name in reached
        for other in imports(name, *trees()[name])
        if other.split(".")[0] not in sys.stdlib_module_names | {"twigvlm"}
    }
    assert foreign == LATE
    assert f"{TASKS}.gqa" in reached and "twigvlm.errors" in reached


def names_of_tasks() -> set[str]:
    """As their classes in evaluation/tasks say; `aliases` too."""
    found: set[str] = set()
    for name, (_, tree) in trees().items():
        for node in ast.walk(tree) if name.startswith(f"{TASKS}.") else ():
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) in ("name", "aliases"):
                        value = ast.literal_eval(line.value)
                        found |= {value} if isinstance(value, str) else set(value)
    return found


def namings(tree: ast.Module, names: set[str]) -> list[str]:
    """Where source speaks of a benchmark by its name; a word with a second meaning counts where it can have but one."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in names - AMBIGUOUS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(("task", "task.name")):
            found += [n for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in AMBIGUOUS]
        elif (
            isinstance(node, ast.Subscript)
            and ast.unparse(node.value) == "TASKS"
            and isinstance(node.slice, ast.Constant)
        ):
            found.append(node.slice)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            found += [n for n in ast.walk(node.args[1]) if isinstance(n, ast.Name) and n.id.casefold() in names]
    return [f"line {node.lineno}: {ast.unparse(node)}" for node in found]


def test_benchmarks_are_asked_by_attributes_and_never_by_name():
    names = names_of_tasks()
    assert {"gqa", "mmbench_cn", "vqa", "seed", "scienceqa"} <= names
    found = {
        relative(path): places
        for path, tree in trees().values()
        if not relative(path).startswith(NAMERS) and (places := namings(tree, names))
    }
    assert not found


def test_a_name_would_be_found():
    names = names_of_tasks()
    for code in ('x = "pope"', 'task.name == "seed"', "isinstance(task, VQA)", 'TASKS["seed"]', 'MAIN = ("gqa", "a")'):
        assert namings(ast.parse(code), names), code
    assert not namings(ast.parse('facts["seed"] = "gqa is one"; isinstance(x, str)'), names)


def writes(call: ast.Call) -> bool:
    """Whether a call writes or moves a file."""
    name, said = ast.unparse(call.func), [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
    last = name.split(".")[-1]
    if last == "open":
        modes = [a.value for a in said if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        return "O_CREAT" in ast.unparse(call) or any(len(mode) < 4 and set("wxa+") & set(mode) for mode in modes)
    if last == "replace":  # a text's takes two arguments, a dataclass's keywords
        return "." in name and (name == "os.replace" or (len(call.args) == 1 and not call.keywords))
    return last in ("savefig", "savez", "copyfile", "copy2") or name in MOVES or name.endswith(WRITTEN)


def unsafe(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Call]]:
    """(function, call) of what is written and not in a `with replacing(…)`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.With) and any("replacing(" in ast.unparse(item.context_expr) for item in child.items):
            continue
        if isinstance(child, ast.Call) and writes(child):
            yield function, child
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from unsafe(child, child.name if inside else function)


def test_files_are_written_by_one_writer():
    """Whole or not at all: whoever reads one while it is written, or after a power cut, finds the old or the new."""
    found = {
        f"{relative(path)}:{function}": f"line {call.lineno}: {ast.unparse(call)}"
        for path, tree in trees().values()
        for function, call in unsafe(tree)
        if relative(path) != "files.py"
    }
    assert not {place: call for place, call in found.items() if place not in WRITERS}
    assert WRITERS.keys() <= found.keys(), "strike what does not write any more"


def test_another_writer_would_be_found():
    calls = (
        'open(a, "w")',
        'open(a, mode="xb")',
        'a.open("a")',
        "os.replace(a, b)",
        "a.replace(b)",
        "figure.savefig(a)",
    )
    for call in (*calls, "a.write_text(b)", "shutil.copyfile(a, b)", "os.open(a, os.O_RDWR | os.O_CREAT)"):
        assert list(unsafe(ast.parse(f"def f():\n    {call}"))), call
        assert not list(unsafe(ast.parse(f"with x as y, replacing(a) as part:\n    {call}"))), call
    for call in (
        "open(a)",
        'open(a, "rb")',
        'a.replace("b", "c")',
        "replace(a, b=1)",
        "write_text(a, b)",
        "job.open()",
    ):
        assert not list(unsafe(ast.parse(call))), call


def test_functions_are_short():
    sizes = {
        f"{relative(path)}:{node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not over(sizes, FUNCTION_LINES, LONG_FUNCTIONS)


def test_files_are_short():
    sizes = {relative(path): len(path.read_text("utf-8").splitlines()) for path, _ in trees().values()}
    assert not over(sizes, FILE_LINES, LONG_FILES)


def test_folders_are_small():
    sizes: dict[str, int] = {}
    for path, _ in trees().values():
        if path.stem != "__init__":
            folder = relative(path.parent)
            sizes[folder] = sizes.get(folder, 0) + 1
    assert not over({k: n for k, n in sizes.items() if k not in UNBOUNDED}, FOLDER_MODULES, FULL_FOLDERS)


def test_larger_ones_would_be_found():
    assert over({"a": 5, "b": 3, "c": 9}, 4, {"c": 8}) == ["a has 5, 4 allowed", "c has 9, 8 allowed"]
    assert over({"a": 3}, 4, {"a": 8, "gone": 9}) == ["a is within 4: strike it", "gone is within 4: strike it"]
