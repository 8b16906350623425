"""Protocol buffers' text form, as far as Triton's config.pbtxt needs it."""

import json
from collections.abc import Mapping
from typing import Any


class Word(str):
    """A name out of an enumeration, which stands without quotes."""

    __slots__ = ()


def render(message: Mapping[str, Any], depth: int = 0) -> str:
    """Fields in their order: mappings are messages, lists repeated fields, the rest scalars."""
    text, pad = "", "  " * depth
    for name, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                text += f"{pad}{name} {{\n{render(one, depth + 1)}{pad}}}\n"
            else:
                text += f"{pad}{name}: {one if isinstance(one, Word) else json.dumps(one)}\n"
    return text
