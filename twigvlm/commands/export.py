"""Write a twig as a checkpoint that other programs load: `twigvlm export --as draft-vlm --out FOLDER`.

draft-vlm: a stock Hugging Face LLaVA of K + T layers: the base's tower, projector and layers 0..K-1, then the twig's T, its
norm and its head. It drafts what the twig drafts from an unpruned prompt, logit for logit, wherever
LlavaForConditionalGeneration runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import flags
from ..config import hub_id, split_name
from ..errors import InputError, RunError
from ..files import PART, check_folder, copy, umask, write_text
from ..program import called, run_program

MARK = "twigvlm_export"  # in config.json: a folder of ours, which may be written again
FORMS = ("draft-vlm",)
SHARD = re.compile(r"\d+(\.\d+)?\s*([KMG]i?B)", re.IGNORECASE)
PROCESSOR_FILES = (
    "processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = flags.parser(
        called("twigvlm.commands.export"),
        __doc__,
        flags.model({"device", "attn_implementation", "wipe_layer", "load_8bit", "load_4bit", "draft_8bit"}),
    )
    say = parser.add_argument_group("what to write").add_argument
    say("--as", dest="form", required=True, choices=FORMS, help="a stock LLaVA of K + T layers that drafts")
    say("--out", type=Path, required=True, metavar="FOLDER", help="new, empty, or an export that is replaced")
    say("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file, such as 500MB (default %(default)s)")
    say("--license", metavar="ID", help="for the card, as the hub writes it (default: that of the base)")
    say("--json", action="store_true", help="print one JSON object")
    return flags.parse(parser, argv)


def check_target(out: Path) -> None:
    """Raises InputError for a file, and for a folder that holds what is not an export."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            ours = MARK in json.loads((out / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise InputError(f"--out {out}: is not empty and no export of twigvlm; name a new folder, or empty it")
    check_folder(out.parent, "--out")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to; it takes the place of `out` when all went well, else nothing is left of it."""
    out = out.absolute()
    part, old = (out.with_name(f"{PART}{os.getpid()}-{kind}-{out.name}") for kind in ("new", "old"))
    try:
        part.mkdir(parents=True)
        yield part
        if out.exists():
            os.replace(out, old)
        os.replace(part, out)
    except OSError as fault:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise RunError(f"--out {out}: cannot be written ({fault}); free space or name another folder") from fault
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def export(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint; what it is. Raises InputError for what cannot be, RunError where the disk refuses."""
    import torch

    from ..families.draft import load_draft
    from ..loading.device import pick_dtype

    check_target(args.out)
    if not SHARD.fullmatch(args.max_shard_size.strip()):
        raise InputError(
            f"--max-shard-size is {args.max_shard_size!r}; a size with its unit is needed, such as 5GB or 500MB"
        )
    model_of = flags.model_settings(args)
    if not model_of.has_twig:
        raise InputError("nothing to export: give the twig of this base as well (--twig-block)")
    dtype = pick_dtype(args.dtype, torch.device("meta")) if args.dtype else None
    model, loaded, twig = load_draft(model_of.base, model_of.twig, model_of.K, model_of.T, dtype)
    facts = facts_of(args.form, model, loaded, twig)
    setattr(model.config, MARK, facts)
    model.generation_config.suppress_tokens = wordless(model, twig) or None
    with whole_folder(args.out) as folder:
        with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed, if it is installed, then says its warnings
            model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        write_processor(loaded, model, folder)
        write_text(card(args, facts, loaded), folder / "README.md")
        flags.save(args, folder)
        for file in folder.iterdir():
            file.chmod(0o666 & ~umask())  # safetensors writes for the owner's eyes only
    return facts | {"out": str(args.out)}


def facts_of(form: str, model, loaded, twig) -> dict[str, Any]:
    base = split_name(loaded.name)[0] or loaded.name
    revision = {"base_revision": loaded.revision} if loaded.revision else {}
    letters = {"K": twig.config.K, "T": twig.config.T, "layers": twig.config.K + twig.config.T}
    parameters = sum(p.numel() for p in model.parameters())
    return {"as": form, "base": base, **revision, **letters, "dtype": str(model.dtype)[6:], "parameters": parameters}


def wordless(model, twig) -> list[int]:
    """Ids that no answer may contain: the image token, and rows of the head that belong to no word."""
    rows = range(twig.lm_head.out_features, model.lm_head.out_features)
    return sorted({model.config.image_token_id, *rows})


def write_processor(loaded, model, folder: Path) -> None:
    """Tokenizer and image processor: the base's own files, or, of LLaVA's own layout, Hugging Face's for them."""
    if not loaded.original:
        for name in PROCESSOR_FILES:
            if (loaded.folder / name).is_file():
                copy(loaded.folder / name, folder / name)
        return
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    from ..prompt.processor import make_processor, pads

    ours, size = make_processor(model.config, loaded.folder, True), model.config.vision_config.image_size
    pictures = LlavaImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_pad=pads(model.config)
    )
    LlavaProcessor(
        pictures, ours.tokenizer, patch_size=ours.patch_size, chat_template=ours.chat_template,
        vision_feature_select_strategy=ours.vision_feature_select_strategy, num_additional_image_tokens=1,
        image_token=ours.image_token,
    ).save_pretrained(folder)  # fmt: skip
    file = folder / "tokenizer_config.json"  # which does not keep this: a prefix space after every special token
    write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"legacy": True}, indent=2) + "\n", file)


CARD = """
# {base} cut to {layers} layers by its twig: a draft model

A stock `LlavaForConditionalGeneration` of {layers} layers: tower, projector and layers 0 to {last} of `{base}`, then the {T} layers, the
norm and the head of a [TwigVLM](https://arxiv.org/abs/2503.14075) twig. It is made to draft words which the whole base verifies: alone it
answers worse than its base.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

draft = LlavaForConditionalGeneration.from_pretrained("THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")
```

Written by `twigvlm export --as {as}`; {parameters:,} parameters in {dtype}, safetensors alone.
"""


def card(args: argparse.Namespace, facts: dict[str, Any], loaded) -> str:
    from ..hub.card import About, with_head

    text = CARD.format(**facts, last=facts["K"] - 1)
    about = About(
        args.out.name, hub_id(facts["base"]), loaded.folder, license=args.license, relation="finetune",
        library="transformers", tags=("llava", "speculative-decoding", "draft-model"),
    )  # fmt: skip
    return with_head(text, about)


def run(args: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    facts = export(args)
    if args.json:
        print(json.dumps(facts))
        return
    print(
        f"{args.out}: {facts['as']} of {facts['base']}, {facts['layers']} layers (K = {facts['K']}, T = {facts['T']}), "
        f"{facts['parameters']:,} parameters in {facts['dtype']}"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_program(lambda: run(args))


if __name__ == "__main__":
    raise SystemExit(main())
