"""Tokenizers by name, all of them with what our programs use of a tiktoken.Encoding. tiktoken is imported only for
those that need it."""

import base64
import importlib.resources
import json

import numpy as np

from plumbing.command import UserError


class Bytes:
    """An id per byte and one for the end of text."""

    n_vocab, eot_token = 257, 256
    _mergeable_ranks = {bytes([byte]): byte for byte in range(256)}
    _special_tokens = {"<|endoftext|>": 256}
    _pat_str = r"[\s\S]"

    def encode_to_numpy(self, text, disallowed_special=()):
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8)

    def encode_ordinary(self, text):
        return list(text.encode("utf-8", "replace"))


def get_tokenizer(name):
    """The tokenizer of this name; its eot_token delimits documents.

    Names are "bytes" (an id per byte and an end of text, 257 ids, no download), "gpt2", "tekken" (of Mistral-Nemo and
    the paper, 131072 ids) and all that tiktoken knows. UserError if the name is unknown or the tokenizer cannot be had.
    """
    if name == "bytes":
        return Bytes()
    if name == "tekken":
        return tekken()
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(f"unknown tokenizer {name!r}: known are bytes, tekken, {', '.join(known)}")
    try:
        # r50k_base has the ids of GPT-2, but is one file to download instead of two
        return tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    except Exception as error:
        failure = f"tokenizer {name!r} could not be downloaded ({type(error).__name__})"
        raise UserError(f"{failure}: connect once, set TIKTOKEN_CACHE_DIR, or use --tokenizer=bytes") from None


def tekken():
    """Mistral-Nemo's tokenizer, from the data file in the package mistral-common. Of its 131072 ids the first 1000 are
    special (2 is the end of text); the others are the first 130072 of the file's 150000 ranks."""
    try:
        files = importlib.resources.files("mistral_common")
    except ModuleNotFoundError:
        raise UserError("tokenizer 'tekken' is in an optional package: pip install mistral-common") from None
    import tiktoken

    table = json.loads((files / "data" / "tekken_240718.json").read_text("utf-8"))
    config = table["config"]
    n_special = config["default_num_special_tokens"]
    n_ranks = config["default_vocab_size"] - n_special
    ranks = {base64.b64decode(row["token_bytes"]): n_special + row["rank"] for row in table["vocab"][:n_ranks]}
    special = {"<|endoftext|>": 2}
    return tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens=special)
