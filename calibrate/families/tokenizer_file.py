"""The tokenizer of a text encoder: `<name>.tokenizer.json` beside a checkpoint, of the tokenizers library."""

from pathlib import Path

from ...runtime.errors import AccuQuantError
from ...runtime.tokenizer import Tokenizer


def beside(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".tokenizer.json")


def read_tokenizer(path: Path, length: int, known: int) -> str:
    """The file's text, of a tokenizer that makes `length` tokens out of at most `known`.

    Raises:
        AccuQuantError: unreadable, or of another length or with more tokens than the encoder knows.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise AccuQuantError(f"{path} cannot be read: {error}") from error
    tokenizer = Tokenizer(text, str(path))
    if tokenizer.length != length or tokenizer.size > known:
        raise AccuQuantError(
            f"{path} makes {tokenizer.length} tokens out of {tokenizer.size}; the text encoder reads {length} "
            f"out of {known}: it belongs to another model"
        )
    return text
