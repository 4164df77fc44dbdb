"""What a base speaks: its tokenizer, its chat template, and what ends its answers.

Their files lie beside config.json, so that they are judged before any weight is fetched.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, LlamaTokenizer, LlavaConfig

from ...config import IMAGE
from ...errors import InputError
from ...files import check_regular
from ..describe import check_id, end_tokens
from ..find import read_json
from .fields import shown
from .probe import heard, says

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
READ = ("*.json", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")  # by transformers, for a tokenizer
FRAME = ("<im_start>", "<im_end>")  # what some checkpoints have around each picture
PROBE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]


def judge_language(folder: Path, facts: dict, config: LlavaConfig, original: bool) -> GenerationConfig:
    """What ends an answer; `facts` are config.json, `config` what was made of it.

    A base without a tokenizer takes ids all the same. Raises InputError for one whose tokenizer or
    template is of no use, or another model's, and where nothing would end an answer.
    """
    tokenizer = None
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(folder, config, original)
        if not original:
            _check_image(folder, tokenizer, config)
        _check_template(folder, tokenizer, read_template(folder, tokenizer))
    return _generation_config(folder, facts, config, tokenizer)


# ---------------------------------------------------------------------- tokenizer


def read_tokenizer(folder: Path, config: LlavaConfig, original: bool):
    """A model's tokenizer, with the ids of its `image_frame` where it has one. Raises InputError where there is none."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: no tokenizer; fetch tokenizer.model (or tokenizer.json) of this model into it")
    for file in (file for pattern in READ for file in folder.glob(pattern)):
        check_regular(file)
    try:
        # The plain class gives the original ids: AutoTokenizer drops LLaVA's prefix space there.
        kind = LlamaTokenizer if original else AutoTokenizer
        tokenizer = kind.from_pretrained(folder, legacy=True, local_files_only=True)
        knows = tokenizer.encode("a", add_special_tokens=False)
    except Exception as fault:  # damaged files can raise anything
        reason = " ".join(str(fault).split())[:200]
        raise InputError(f"{folder}: no usable tokenizer ({reason}); fetch tokenizer.model") from fault
    if not knows:
        raise InputError(f"{folder}: its tokenizer knows no words; fetch tokenizer.model again")
    if getattr(tokenizer, "backend_tokenizer", None) is None or tokenizer.eos_token_id is None:
        raise InputError(
            f"{folder}: its tokenizer names no end token, or is not a fast one; fetch tokenizer_config.json and tokenizer.json"
        )
    _check_words(folder, tokenizer, config)
    return tokenizer


def _check_words(folder: Path, tokenizer, config: LlavaConfig) -> None:
    """All ids that text can have are rows of the embeddings, and so are those of what frames a picture."""
    rows = config.text_config.vocab_size
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    largest = max((*words.values(), *(i for i in special if i is not None)))
    if largest >= rows:
        raise InputError(
            f"{folder}: its tokenizer writes ids up to {largest}, but the vocabulary has {rows}; it is another model's, "
            "fetch this one's"
        )
    if not getattr(config, "mm_use_im_start_end", False):
        return
    known = tokenizer.get_vocab()
    for word in FRAME:
        if known.get(word, rows) >= rows:
            raise InputError(
                f"{folder}: config.json says mm_use_im_start_end, but the tokenizer has no {word} within the vocabulary of "
                f"{rows}; fetch added_tokens.json"
            )
    tokenizer.add_tokens(list(FRAME), special_tokens=True)  # words of the vocabulary as a rule, which are never cut now
    tokenizer.image_frame = tuple([known[word]] for word in FRAME)


def _check_image(folder: Path, tokenizer, config: LlavaConfig) -> None:
    """Pictures are marked by the id that the model knows."""
    image = tokenizer.get_vocab().get(IMAGE)
    if image not in (None, config.image_token_id):
        raise InputError(
            f"{folder}: {IMAGE} is token {image} of its tokenizer, but image_token_index in config.json is "
            f"{config.image_token_id}; fetch both files again"
        )


# ---------------------------------------------------------------------- chat template


def read_template(folder: Path, tokenizer) -> str | None:
    """The chat template that a checkpoint brings, in any of the files that it may stand in.

    Of several by name it is `default`, or the only one. Raises InputError where none is meant more than another.
    """
    for name in ("chat_template.json", "processor_config.json"):
        place = folder / name
        if place.exists() and (found := read_json(place).get("chat_template")):
            break
    else:
        place, found = folder, tokenizer.chat_template
    if isinstance(found, list) and all(isinstance(entry, dict) and "name" in entry for entry in found):
        found = {str(entry["name"]): entry.get("template") for entry in found}  # as some tokenizers have them
    if isinstance(found, dict) and found:
        if "default" not in found and len(found) > 1:
            raise InputError(
                f"{place}: its chat templates are {', '.join(sorted(found))}, and none of them is 'default'; name the one so "
                "that is meant"
            )
        found = found["default"] if "default" in found else next(iter(found.values()))
    if found and not isinstance(found, str):
        raise InputError(f"{place}: the chat template is {shown(found)}; a text, or texts by name, is needed")
    return found or None


def _check_template(folder: Path, tokenizer, template: str | None) -> None:
    """It can be read, and says what is asked wherever it says anything; what it does not take is seen when it is asked for."""
    from jinja2 import TemplateSyntaxError

    if template is None:
        return

    def render(messages: list[dict]) -> str:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )

    try:
        render(PROBE)
    except TemplateSyntaxError as fault:
        raise InputError(f"{folder}: its chat template cannot be read ({fault}); fetch it again") from fault
    except Exception:  # a template is a program
        pass
    for pictures, about in ((1, "about a picture"), (0, "without a picture")):
        found = heard(render, pictures)
        if found and not any(map(says, found.values())):
            raise InputError(
                f"{folder}: its chat template does not say a question {about} once, as it was asked; fetch this model's own"
            )


# ---------------------------------------------------------------------- ends


def _generation_config(folder: Path, facts: dict, config: LlavaConfig, tokenizer) -> GenerationConfig:
    """The folder's generation_config.json; without end tokens there, config.json's, the outer ones first, else the tokenizer's."""
    file, described, text = folder / "generation_config.json", folder / "config.json", config.text_config
    told = read_json(file) if file.exists() else {}
    for key in ("bos_token_id", "pad_token_id"):
        if told.get(key) is not None:
            check_id(file, key, told[key], text.vocab_size)
    places = (
        (file, told.get("eos_token_id")),
        (described, facts.get("eos_token_id")),
        (described, text.eos_token_id),
        (folder, getattr(tokenizer, "eos_token_id", None)),
    )
    ends = next((found for place, ids in places if (found := end_tokens(place, ids, text.vocab_size))), [])
    if not ends:
        raise InputError(f"{described}: no eos_token_id, here or beside it, so that no answer would end; add it")
    if config.image_token_id in ends:
        raise InputError(
            f"{folder}: the image token {config.image_token_id} is an end token as well; fetch the files again"
        )
    if not file.exists():
        return GenerationConfig(bos_token_id=text.bos_token_id, eos_token_id=ends, pad_token_id=text.pad_token_id)
    try:
        return GenerationConfig.from_dict(told | {"eos_token_id": ends})
    except Exception as fault:  # transformers raises what it likes
        raise InputError(f"{file}: not a generation configuration ({fault}); fetch it again") from fault
