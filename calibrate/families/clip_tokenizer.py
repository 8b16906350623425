"""CLIP's byte-pair encoding as a `tokenizer.json` of the tokenizers library, from its merges.

Text is lower-cased, cut by CLIP's pattern and merged inside pieces; a start and an end token stand around it. What
follows up to the length is where models differ: the end token again (OpenAI's, Stable Diffusion 1), or token 0, which
is "!" (OpenCLIP's, Stable Diffusion 2). The originals' repair of broken Unicode and HTML entities is left out, as
transformers leaves it out.
"""

import gzip
from collections.abc import Sequence
from importlib.resources import files

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
PIECES = (  # the original's pattern
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)

Merges = Sequence[tuple[str, str]]


def published_merges() -> Merges:
    """Those of CLIP, which all its trainings share."""
    packed = files(__package__).joinpath("clip_merges.txt.gz").read_bytes()
    return [(left, right) for left, right in (line.split() for line in gzip.decompress(packed).decode().splitlines())]


def vocabulary(merges: Merges) -> dict[str, int]:
    """Tokens to numbers: bytes, bytes that end a word, merges in their order, start and end."""
    letters = _letters()
    joined = [left + right for left, right in merges]
    return {token: i for i, token in enumerate([*letters, *(c + WORD_END for c in letters), *joined, START, END])}


def tokenizer_json(merges: Merges, tokens: dict[str, int], length: int, padding: str) -> str:
    """The file's text; every text becomes `length` tokens, filled up with `padding`."""
    library = Tokenizer(BPE(vocab=tokens, merges=list(merges), end_of_word_suffix=WORD_END, unk_token=END))
    library.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, tokens[token]) for token in (START, END)]
    )
    library.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
    library.enable_truncation(length)
    library.enable_padding(length=length, pad_id=tokens[padding], pad_token=padding)
    return str(library.to_str())


def _letters() -> list[str]:
    """A printable character for each byte, in the original's order: those that print as they are come first."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printing] + [chr(256 + i) for i in range(256 - len(printing))]
