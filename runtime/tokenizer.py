"""Text to tokens, by the tokenizer that the bundle carries: a `tokenizer.json` of the tokenizers library.

Padding and truncation stand in the file, so that every text has the length that its encoder was trained with.
"""

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer as Library

from .errors import AccuQuantError


class Tokenizer:
    """Raises AccuQuantError if `text`, a file's content, is no tokenizer, or one that leaves the length open."""

    def __init__(self, text: str, where: str) -> None:
        try:
            self._library = Library.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise AccuQuantError(f"{where} is not a tokenizer.json: {error}") from None
        padding, truncation = self._library.padding, self._library.truncation
        length = padding and padding.get("length")
        if not length or truncation is None or truncation["max_length"] != length:
            raise AccuQuantError(f"{where} does not pad and truncate to one length, which its text encoder needs")
        self.length, self.size = int(length), self._library.get_vocab_size()
        self.size = self._library.get_vocab_size()

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens, int64 (len(texts), length)."""
        return np.array([found.ids for found in self._library.encode_batch(list(texts))], np.int64)
