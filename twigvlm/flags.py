"""Flags of every program: dataclasses whose fields say what they are, and files that stand for flags.

The fields of `config.ModelSettings` and `config.GenerationSettings` become flags here, so that a new option of
`generate` reaches every program by being there. Metadata of a field: its flag's name (`flag`) where it differs,
`parse` for texts, `unless` for what programs take where nobody says anything, and what argparse knows.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from .config import GenerationSettings, ModelSettings
from .errors import InputError
from .files import write_text

CONFIG = "config.yaml"  # the resolved flags, in the folder of a run or of its results
METHODS = "{methods}"  # stands for their names in a help text until somebody reads it: to know them takes seconds
PRUNING = (
    f"{METHODS}; settings stand behind a colon (NAME:KEY=VALUE,SWITCH), + joins one method before the decoder and one within it; "
    "python -m twigvlm.pruning.catalogue tells of each (default %(default)s)"
)
SWITCHED = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOT_KEPT = {"config", "json", "typed"}  # of what a command is asked: nothing that its result depends on


def group(title: str, kind: type, leave: Collection[str] = (), **defaults: Any) -> type:
    """The fields of a dataclass that carry help, as a group of flags for `parser`; `defaults` by the field's name."""
    hints, made = get_type_hints(kind), []
    for one in fields(kind):
        more = dict(one.metadata)
        if "help" not in more or one.name in leave:
            continue
        usual = more.pop("unless", one.default)
        default = defaults.get(one.name, usual if one.default is not MISSING else one.default_factory())
        if not isinstance(default, bool) and default not in (None, (), []) and "default" not in more["help"]:
            shown = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
            more["help"] += f" (default {shown:g})" if isinstance(shown, float) else f" (default {shown})"
        more["help"] = more["help"].replace("%", "%%")
        name, read = more.pop("flag", one.name), more.pop("parse", None)
        keep = {"default_factory": lambda d=default: d} if isinstance(default, list) else {"default": default}
        made.append((name, read or hints[one.name], field(**keep, metadata=more)))
    flags = make_dataclass(title, made)
    flags._argument_group_name = title
    return flags


def model(leave: Collection[str] = ()) -> type:
    """Which model: the arguments of `twigvlm.load`."""
    return group("model", ModelSettings, leave)


def writing(leave: Collection[str] = (), **defaults: Any) -> type:
    """How to answer: the options of `generate`, with other defaults where they are given."""
    flags = group("how to answer", GenerationSettings, leave, **defaults)
    for one in fields(flags):
        if one.name == "pruning":
            one.metadata = {**one.metadata, "help": PRUNING}
    return flags


def add_switches(parser: argparse.ArgumentParser) -> None:
    """What switches pruning and drafts off."""
    parser.add_argument("--no-pruning", action="store_true", help="keep all visual tokens")
    parser.add_argument("--no-speculation", action="store_true", help="no drafts: one forward per token")


class Help(argparse.RawDescriptionHelpFormatter):
    """Names that hold a hyphen are not parted at the end of a line: people copy them."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _expand_help(self, action: argparse.Action) -> str:
        text = super()._expand_help(action)
        if METHODS not in text:
            return text
        from . import pruning

        return text.replace(METHODS, ", ".join(pruning.METHODS))


def parser(prog: str | None, text: str | None, *groups: type) -> argparse.ArgumentParser:
    """A parser with these groups of flags; programs add their own and read them with `parse`."""
    shape = {"prog": prog, "description": text, "formatter_class": Help}
    if not groups:  # without transformers
        return argparse.ArgumentParser(**shape, allow_abbrev=False)
    from transformers.hf_argparser import HfArgumentParser

    made = HfArgumentParser(groups, **shape, allow_abbrev=False)
    for action in made._actions:
        action.option_strings.sort(key=lambda name: "_" in name)  # --a-b is shown first, --a_b means the same
    return made


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, those of `--config FILE.yaml` first, so that the command line has the last word.

    The file maps names of flags to values. An unknown one is refused with the list of those that are known.
    `typed` of the result names the flags of the command line: a file may hold the resolved ones of another run.
    """
    parser.add_argument(
        "--config", type=Path, metavar="FILE.yaml", help="flags from a file; those on the command line come after"
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    file = early.parse_known_args(argv)[0].config
    args = parser.parse_args([*(_words(parser, file) if file else ()), *argv])
    args.typed = {action.dest for action in parser._actions if any(_says(word, action) for word in argv)}
    return args


def _says(word: str, action: argparse.Action) -> bool:
    """Whether a word of the command line is this flag: --name, --name=value, -R, -R64."""
    return any(
        word.split("=", 1)[0] == name or (not name.startswith("--") and word.startswith(name))
        for name in action.option_strings
    )


def _words(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """What a file of flags would be on the command line."""
    known = _known(parser)
    try:
        found, lines = _read(file)
        _check_once(lines, known)
        return [word for name, value in found.items() for word in _word(str(name), value, known)]
    except InputError as fault:
        parser.error(f"--config {file}: {fault}")


def _read(file: Path) -> tuple[dict[Any, Any], list[tuple[str, int]]]:
    """What a file of flags holds, and all its keys with their lines."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        found, tree = yaml.safe_load(text) or {}, yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as fault:
        raise InputError(f"cannot be read ({' '.join(str(fault).split())})") from None
    if not isinstance(found, dict):
        raise InputError(f"a mapping of flags to values is expected, found {type(found).__name__}")
    return found, [(key.value, key.start_mark.line + 1) for key, _ in (tree.value if found else ())]


def _known(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags that a file may hold, by all their names."""
    known: dict[str, argparse.Action] = {}
    for action in parser._actions:
        if action.option_strings and action.help is not argparse.SUPPRESS and action.dest not in ("help", "config"):
            for name in (action.dest, *action.option_strings):
                known.setdefault(_plain(name), action)
    return known


def _check_once(lines: Sequence[tuple[str, int]], known: Mapping[str, argparse.Action]) -> None:
    """Raise InputError where two keys (name, line) set the same: YAML itself passes over the first without a word."""
    seen: dict[str, tuple[str, int]] = {}
    for name, line in lines:
        kind = known[_plain(name)].dest if _plain(name) in known else name
        if kind in seen:
            first, above = seen[kind]
            raise InputError(f"{first!r} (line {above}) and {name!r} (line {line}) set the same; leave one of them out")
        seen[kind] = name, line


def _word(name: str, value: Any, known: Mapping[str, argparse.Action]) -> list[str]:
    """A key of a file and its value as words of the command line. Raises InputError for what cannot be."""
    action = known.get(_plain(name))
    if action is None:
        names = sorted({action.dest for action in known.values()})
        raise InputError(f"unknown key {name!r}; known are {', '.join(names)}")
    option = max(action.option_strings, key=len)
    if value is None:
        return []
    if isinstance(action.const, bool):
        on = _switch(name, value)
        if action.nargs == "?":
            return [f"{option}={on}"]
        given = True if _plain(name) in map(_plain, action.option_strings) else action.const  # `no_x: true`, `x: false`
        return [option] if on == given else []
    items = [str(item) for item in value] if isinstance(value, list) else [str(value)]
    if isinstance(action, argparse._AppendAction):
        return [f"{option}={item}" for item in items]
    return [f"{option}={','.join(items)}"] if action.nargs in (None, "?") else [option, *items]


def _switch(name: str, value: Any) -> bool:
    """On or off, also as a text of YAML's words for it."""
    found = SWITCHED.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise InputError(f"{name} is {value!r}; true or false is needed (yes, no, on, off mean the same)")
    return found


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def resolved(args: argparse.Namespace) -> dict[str, Any]:
    """All flags with their values, as `--config` takes them."""
    return {name: _value(value) for name, value in vars(args).items() if name not in NOT_KEPT and value is not None}


def _value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


def save(args: argparse.Namespace, folder: Path) -> None:
    """Write the resolved flags into the folder of a run."""
    import yaml

    write_text(yaml.safe_dump(resolved(args), sort_keys=False, allow_unicode=True), folder / CONFIG)


# ---------------------------------------------------------------------- what they mean


def model_settings(args: argparse.Namespace) -> ModelSettings:
    names = {f.name: f.metadata.get("flag", f.name) for f in fields(ModelSettings)}
    return ModelSettings(**{name: getattr(args, flag) for name, flag in names.items() if hasattr(args, flag)})


def generation(args: argparse.Namespace, has_twig: bool = True) -> dict[str, Any]:
    """Options of `TwigVLM.generate`. Without a twig nothing is pruned by it unless that was asked for in words, which
    cannot be. Raises InputError for contradictions.
    """
    options = {f.name: getattr(args, f.name) for f in fields(GenerationSettings) if hasattr(args, f.name)}
    if not options.get("temperature", 0) >= 0:
        raise InputError(f"--temperature is {options['temperature']:g}; 0 (greedy) or more is needed")
    asked = {"retained_tokens", "pruning"} & getattr(args, "typed", set())
    whole = getattr(args, "no_pruning", False) or (args.pruning == "twig" and not has_twig and not asked)
    return settle(options, whole, getattr(args, "no_speculation", False))


def settle(options: Mapping[str, Any], whole: bool = False, plain: bool = False) -> dict[str, Any]:
    """Options as people give them (temperature 0 is greedy) as `generate` takes them; `whole` prunes nothing, `plain` drafts nothing.

    Raises InputError for filters of a sampling that there is none of.
    """
    made = dict(options)
    heat = made.get("temperature", 0.0)
    for name in ("top_p", "top_k"):
        if not heat and made.get(name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} filters what is sampled, and nothing is sampled without --temperature "
                "above 0; give both or neither"
            )
    made |= {"do_sample": heat > 0, "temperature": heat or 1.0}
    if whole:
        made["retained_tokens"] = None
    if plain:
        made["draft_length"] = 0
    return made


def of(model: ModelSettings, writing: GenerationSettings) -> dict[str, Any]:
    """The flags that say this: what `model_settings` and `generation` read."""
    said = {f.metadata.get("flag", f.name): getattr(model, f.name) for f in fields(ModelSettings)}
    said |= {f.name: getattr(writing, f.name) for f in fields(GenerationSettings) if "help" in f.metadata}
    said["temperature"] = writing.temperature if writing.do_sample else 0.0
    return said | {"no_pruning": writing.retained_tokens is None, "no_speculation": writing.draft_length == 0}


def budgets_of(text: str) -> list[float]:
    """`192,128,64` as numbers, for a flag. Raises ArgumentTypeError."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 192,128,64") from None
    if not found:
        raise argparse.ArgumentTypeError("no number given; 192,128,64, say")
    return list(dict.fromkeys(found))
