"""Pictures behind addresses: kept in memory for a while, under names that cannot be guessed, up to some bytes."""

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    data: bytes
    media_type: str
    until: float


class PictureStore:
    """The oldest make room for new ones; after `seconds` they are gone."""

    def __init__(
        self, most_bytes: int = 64 * 2**20, seconds: float = 600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._most, self._seconds, self._clock = most_bytes, seconds, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.bytes = 0

    def put(self, data: bytes, output_format: str) -> str:
        """The name under which it is kept."""
        name = f"{secrets.token_urlsafe(24)}.{output_format}"
        self._kept[name] = Kept(data, f"image/{output_format}", self._clock() + self._seconds)
        self.bytes += len(data)
        self._forget()
        return name

    def get(self, name: str) -> Kept | None:
        self._forget()
        return self._kept.get(name)

    def _forget(self) -> None:
        now = self._clock()
        while self._kept:
            kept = next(iter(self._kept.values()))
            if self.bytes <= self._most and kept.until > now:
                return
            self._kept.popitem(last=False)
            self.bytes -= len(kept.data)
