"""What training would make of a data file, without a model: every sample's tokens, labels and pictures.

python -m twigvlm.training.inspect --data llava_v1_5_mix665k.json --images playground/data --out samples.jsonl
python -m twigvlm.training.inspect --data llava_v1_5_mix665k.json --images playground/data --show 3

Of the base only config.json and the tokenizer are read. --show prints the one sample (places are counted
from 0); everything is gone over as well if --out is given.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from .. import flags
from ..errors import InputError, RunError
from ..files import replacing
from ..program import called, run_program
from .data.examples import IMAGE_LABEL, Example, Records, Skipped, TwigDataset
from .data.survey import MAX_SKIPPED, counts, default_workers, in_parts

GREEN, RESET = "\033[32m", "\033[0m"
PART = 64  # samples that a worker takes at a time: pictures are slow


@dataclass
class Tally:
    """What was seen; all but `samples` is of usable samples only."""

    samples: int = 0
    with_images: int = 0
    images: int = 0
    images_not_shown: int = 0  # named, but no <image> asks for them
    tokens: int = 0  # visual ones included
    learnt_tokens: int = 0
    longest: int = 0
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, found: Example | Skipped) -> None:
        """One more sample."""
        self.samples += 1
        if isinstance(found, Skipped):
            self.skipped.append(found)
            return
        self.with_images += bool(found.images)
        self.images += len(found.images)
        self.images_not_shown += found.unshown
        self.tokens += found.length
        self.learnt_tokens += found.learnt
        self.longest = max(self.longest, found.length)

    def report(self) -> dict:
        """All figures."""
        usable = self.samples - len(self.skipped)
        facts = {**asdict(self), "usable": usable, "text_only": usable - self.with_images}
        facts["skipped"] = len(self.skipped)
        facts["skipped_share"] = len(self.skipped) / max(self.samples, 1)
        facts["reasons"] = counts(self.skipped)
        return facts


def look(dataset: TwigDataset, indices: Sequence[int], write: bool = True) -> list[tuple[Example | Skipped, str]]:
    """These samples and, with `write`, their lines; pictures are opened if their folder is known."""
    answers = []
    for i in indices:
        found = dataset.encode(i) if dataset.folder is None else dataset.check(i)
        answers.append((found, json.dumps(line(found), ensure_ascii=False) if write else ""))
    return answers


def line(found: Example | Skipped) -> dict:
    """A sample as --out has it."""
    facts = {"id": found.id, "index": found.index}
    if isinstance(found, Skipped):
        return {**facts, "reason": found.reason, "detail": found.detail, "input_ids": [], "labels": []}
    numbers = {"images": list(found.images), "length": found.length, "learnt": found.learnt}
    return {**facts, **numbers, "input_ids": found.input_ids, "labels": found.labels}


def open_dataset(args: argparse.Namespace) -> tuple[TwigDataset, object]:
    """(data, tokenizer) of the arguments."""
    if args.max_length < 1:
        raise InputError(f"--max-length is {args.max_length}; a positive number of tokens is needed")
    if args.workers < 0:
        raise InputError(f"--workers is {args.workers}; 0 (none) or more are needed")
    records = Records(args.data)
    from ..loading.describe import visual_tokens
    from ..prompt.processor import make_processor

    folder, config, original = _base(args.base)
    tokenizer = make_processor(config, folder, original).tokenizer
    dataset = TwigDataset(records, args.images, tokenizer, None, args.max_length, visual_tokens(config))
    dataset.drop(_indices(args.drop_indices))
    return dataset, tokenizer


def _base(base: str | None) -> tuple:
    """(folder, configuration, original layout) of a base of which even the vision tower may be missing."""
    from ..loading.describe import KNOWN_TOWERS, find_base, original_config, read_config

    try:
        return read_config(base)
    except (InputError, RunError) as fault:
        _, folder, facts, original = find_base(base)
        if not original:
            raise
        (name, tower), *_ = KNOWN_TOWERS.items()
        print(f"note: {fault}; an image's tokens are counted as with {name}", file=sys.stderr)
        # Only the count of tokens is wanted of it, whatever width the missing one has.
        return folder, original_config(folder, facts | {"mm_hidden_size": None}, tower), True


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as fault:
        raise InputError(f"--drop-indices is {text!r}; whole numbers with commas between are needed") from fault


def go_over(dataset: TwigDataset, args: argparse.Namespace) -> Tally:
    """Every sample, in file order; its line goes to --out."""
    tally = Tally()
    with _output(args) as write:
        work = partial(look, write=args.out is not None)
        for found, text in in_parts(work, dataset, range(len(dataset)), args.workers, "Inspecting", PART):
            tally.add(found)
            write(text)
    return tally


@contextmanager
def _output(args: argparse.Namespace) -> Iterator[Callable[[str], object]]:
    """Where lines go: a file that appears when it is complete, or nowhere."""
    if args.out is None:
        yield lambda text: None
        return
    file = Path(args.out)
    if file.is_dir() or (file.exists() and file.samefile(args.data)):
        raise InputError(f"--out is {file}: {'a folder' if file.is_dir() else 'the data itself'}; name another file")
    try:
        with replacing(file) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as out:
            yield lambda text: out.write(text + "\n")  # half characters stay JSON
    except OSError as fault:
        raise RunError(
            f"{file}: cannot be written ({fault.strerror or fault}); free the disk or name another"
        ) from fault


def show(found: Example | Skipped, record: object, tokenizer) -> str:
    """A sample to read: what is learnt is green on a terminal, else in [[double brackets]]."""
    head = f"sample {found.index} (id {found.id!r}): "
    if isinstance(found, Skipped):
        text = json.dumps(record, indent=1, ensure_ascii=False)
        return f"{head}skipped, {found.reason} ({found.detail})\n{_harmless(text)}"
    begin, end = (GREEN, RESET) if coloured() else ("[[", "]]")
    names, parts = iter(found.images), []
    pairs = zip(found.input_ids, found.labels, strict=True)
    for (is_image, is_learnt), run in groupby(pairs, lambda pair: (pair[0] == IMAGE_LABEL, pair[1] >= 0)):
        ids = [token for token, _ in run]
        if is_image:
            parts += [f"<image {_harmless(next(names))}>" for _ in ids]
            continue
        text = _harmless(_decode(tokenizer, ids))
        parts.append(f"{begin}{text}{end}" if is_learnt else text)
    return f"{head}{found.length} tokens, {found.learnt} learnt\n{''.join(parts)}"


def _decode(tokenizer, ids: list[int]) -> str:
    """Text with its leading space, which the decoder drops at the very beginning only."""
    anchor = [tokenizer.eos_token_id]
    text = tokenizer.decode([*anchor, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text.removeprefix(tokenizer.decode(anchor, skip_special_tokens=False))


def _harmless(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def coloured() -> bool:
    """Colour is for terminals, and only where it is welcome (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_report(facts: dict, images_opened: bool) -> None:
    """The table for people, then one line of JSON."""
    limit = f"; training stops above {100 * MAX_SKIPPED:g} %, unless --max-skipped is higher"
    too_much = limit if facts["skipped_share"] > MAX_SKIPPED else ""
    rows = [
        ("samples", facts["samples"], ""),
        ("usable", facts["usable"], _share(facts["usable"], facts["samples"])),
        ("  with pictures", facts["with_images"], ""),
        ("  text only", facts["text_only"], ""),
        ("skipped", facts["skipped"], _share(facts["skipped"], facts["samples"]) + too_much),
        *((f"  {reason}", number, "") for reason, number in facts["reasons"].items()),
        ("pictures", facts["images"], "all opened" if images_opened else "not opened: no --images"),
        ("pictures named, but not shown", facts["images_not_shown"], "no <image> asks for them"),
        ("tokens", facts["tokens"], "visual ones included"),
        ("  learnt", facts["learnt_tokens"], _share(facts["learnt_tokens"], facts["tokens"])),
        ("longest sample", facts["longest"], "tokens"),
    ]
    width = max(len(name) for name, _, _ in rows)
    for name, number, remark in rows:
        print(f"{name:{width}} {number:>12,} {remark}".rstrip())
    print(json.dumps(facts, ensure_ascii=False), flush=True)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=called("twigvlm.training.inspect"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, metavar="FILE", help="LLaVA's instruction JSON, or JSON lines")
    parser.add_argument("--images", metavar="DIR", help="folder that image names start from (none: not opened)")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="folder or hub id whose tokenizer and config.json to use (default: the embedded one)",
    )
    parser.add_argument(
        "--max-length", type=int, default=2048, metavar="N", help="longest sample in tokens (default %(default)s)"
    )
    parser.add_argument("--out", metavar="FILE.jsonl", help="write one line per sample")
    parser.add_argument("--show", type=int, metavar="N", help="print sample N with what is learnt in green")
    parser.add_argument(
        "--drop-indices", default="", metavar="N,N", help="places in the file to leave out (default: none)"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N", help="processes (default %(default)s)"
    )
    return flags.parse(parser, argv)


def run(args: argparse.Namespace) -> None:
    dataset, tokenizer = open_dataset(args)
    if args.show is not None:
        if not 0 <= args.show < len(dataset):
            raise InputError(f"--show is {args.show}; {args.data} holds samples 0 to {len(dataset) - 1}")
        [(found, _)] = look(dataset, [args.show], write=False)
        print(show(found, dataset.records[args.show], tokenizer))
    if args.show is None or args.out is not None:
        if args.images is None:
            print("note: without --images no picture is opened", file=sys.stderr)
        print_report(go_over(dataset, args).report(), dataset.folder is not None)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_program(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
