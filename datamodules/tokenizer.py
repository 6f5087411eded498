"""Functions on tokenizers: reading one, its stop ids, its fingerprint and its files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from contextlib import suppress
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from app.core.errors import UserError, first_line
from app.core.files import refuse_absent
from datamodules.chat_template import TEMPLATE_DATE, ChatTemplate, Talk
from datamodules.records import Dropped, Message
from datamodules.tokenisation import Tokenisation

FILE_TEXT = ("utf-8", "surrogateescape")  # a vocabulary of SentencePiece is not text


def read_tokenizer(name: str, option: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or Hub id. Raises UserError that names the `option` if there is none."""
    refuse_absent(option, "tokenizer", name)
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise errors of many types
        reason = first_line(error).strip(" :")
        raise UserError(f"{option}: no tokenizer at {name!r} ({reason}): give the folder of one.") from error


def stop_ids(
    tokenizer: PreTrainedTokenizerBase, settings: Tokenisation, *further: int | list[int] | None
) -> list[int]:
    """Return the ids that end a response: the end-of-turn of the chat template, EOS, and those of `further`."""
    ends: list[int | None] = []
    if tokenizer.chat_template and settings.chat_template is not False:
        template = ChatTemplate(tokenizer, settings.chat_template_kwargs)
        with suppress(Dropped):  # a template that accepts no conversation has no end-of-turn
            ends.append(template.frame(Talk([Message("user", "Hello")])).stop)
    ends.append(tokenizer.eos_token_id)
    for given in further:
        ends += given if isinstance(given, list) else [given]
    return [end for end in dict.fromkeys(ends) if end is not None]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that decides the tokens: vocabulary, rules, special tokens, chat template."""
    digest = hashlib.blake2b(digest_size=16)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # truncation and padding are state of the last call, and this project uses neither
        rules.pop("truncation", None)
        rules.pop("padding", None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    else:
        for name, text in tokenizer_files(tokenizer).items():
            digest.update((name + text).encode(*FILE_TEXT))
    rest = [
        type(tokenizer).__qualname__,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.chat_template,
        getattr(tokenizer, "split_special_tokens", False),
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},  # chat templates may use them
        TEMPLATE_DATE.isoformat(),
    ]
    digest.update(json.dumps(rest, sort_keys=True).encode())
    return digest.hexdigest()


def tokenizer_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the files that `save_pretrained` writes, by name, as text that `FILE_TEXT` turns into their bytes."""
    with tempfile.TemporaryDirectory() as folder:
        # several named chat templates would be in a folder of their own
        tokenizer.save_pretrained(folder, save_jinja_files=not isinstance(tokenizer.chat_template, dict))
        return {path.name: path.read_bytes().decode(*FILE_TEXT) for path in sorted(Path(folder).iterdir())}
