"""Share a trained twig on the hub: `twigvlm push FOLDER OWNER/NAME`.

Uploads the folder's weights and description as they are, with a card that the hub understands. Whoever loads it
(`twigvlm.load(BASE, "OWNER/NAME")`) gets the same bytes, and a word if the base is not the one that it grew on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from .. import flags
from ..config import FORMAT_VERSION, hub_id, split_name
from ..errors import InputError
from ..files import copy, write_json, write_text
from ..hub.card import CARD, About, result, twig_text, with_head
from ..hub.upload import EMBEDDED, check_base, check_name, upload
from ..loading.find import read_json
from ..loading.twig import stored_twig
from ..model.twig import CONFIG, PICTURE
from ..program import called, run_program

NEEDED = ("K", "T", "F", "L", "base", "base_signature", "hidden_size", "vocabulary")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.commands.push"), description=__doc__, formatter_class=flags.Help, allow_abbrev=False
    )
    say = parser.add_argument
    say("folder", type=Path, metavar="FOLDER", help="of a twig: model.safetensors and twig_config.json")
    say("repository", metavar="OWNER/NAME", help="on the hub; made where there is none")
    say("--private", action="store_true", default=None, help="a new repository is for its owner alone")
    say("--token", metavar="TOKEN", help="of your account (default: HF_TOKEN, or that of `hf auth login`)")
    say("--commit-message", metavar="TEXT", help="what this commit is")
    say("--revision", metavar="BRANCH", help="branch, made where there is none (default: main)")
    say("--create-pr", action="store_true", help="propose it to whom the repository belongs")
    say("--base-model", metavar="OWNER/NAME[@REV]", help="the base on the hub, where the twig names a folder")
    say("--license", metavar="ID", help="as the hub writes it (default: that of the base, where its card is here)")
    say("--dataset", action="append", default=[], metavar="OWNER/NAME", help="that it learnt from; may be given again")
    say(
        "--results", action="append", default=[], type=Path, metavar="result.json", help="of twigvlm eval, for the card"
    )
    say("--dry-run", action="store_true", help="print the card, upload nothing")
    return flags.parse(parser, argv)


def gather(args: argparse.Namespace, place: Path) -> str:
    """Write what is uploaded to `place`; the card. Raises InputError for a folder that holds no twig of ours."""
    facts = read_json(args.folder / CONFIG)
    missing = [name for name in NEEDED if name not in facts]
    if missing or facts.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{args.folder / CONFIG}: {', '.join(missing) or 'format_version ' + repr(facts.get('format_version'))} "
            f"{'is missing' if missing else 'is unknown'}; give a folder that this program wrote"
        )
    if args.base_model is not None:
        if hub_id(args.base_model) is None:
            raise InputError(f"--base-model is {args.base_model!r}; the base's id on the hub is needed, owner/name")
        facts["base"], said = split_name(args.base_model)
        facts |= {"base_revision": said} if said else {}
    check_base(facts["base"], "give --base-model OWNER/NAME")
    files = stored_twig(args.folder).files
    for file in files:
        copy(file, place / file.name)
    if index := next(iter(args.folder.glob("*.index.json")), None):
        copy(index, place / index.name)
    write_json(facts, place / CONFIG)
    about = About(
        args.repository.split("/")[-1], facts["base"], _folder_of_base(facts), license=args.license,
        datasets=args.dataset, results=[result(read_json(file)) for file in args.results],
    )  # fmt: skip
    old = args.folder / CARD
    text = _read(old) if old.is_file() else twig_text(facts, args.repository)
    if PICTURE in text and (args.folder / PICTURE).is_file():
        copy(args.folder / PICTURE, place / PICTURE)
    card = with_head(text.replace("THIS FOLDER", args.repository), about)
    write_text(card, place / CARD)
    return card


def _read(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{card}: cannot be read as UTF-8 ({fault}); mend or remove it") from fault


def _folder_of_base(facts: dict) -> Path | None:
    """Where the base's card may lie on this disk; nothing is fetched for it."""
    from ..loading.describe import EMBEDDED_BASE

    if facts["base"] == EMBEDDED:
        return EMBEDDED_BASE
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(facts["base"], CARD, revision=facts.get("base_revision"))
    return Path(found).parent if isinstance(found, str) else None


def run(args: argparse.Namespace) -> None:
    check_name(args.repository)
    if not args.folder.is_dir():
        raise InputError(f"{args.folder}: no such folder; give that of a trained twig")
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        card = gather(args, place)
        if args.dry_run:
            sizes = ", ".join(f"{f.name} ({f.stat().st_size:,} bytes)" for f in sorted(place.iterdir()))
            print(f"{card.rstrip()}\n\nwould go to {args.repository}: {sizes}")
            return
        done = upload(
            place, args.repository, private=args.private, token=args.token, commit_message=args.commit_message,
            revision=args.revision, create_pr=args.create_pr,
        )  # fmt: skip
    print(done.pr_url or done.commit_url)
    print(json.dumps({"repository": args.repository, "revision": done.oid}))


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_program(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
