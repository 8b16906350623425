"""Previews on their way from the painting thread to a client: the newest of every picture, in server-sent events."""

import asyncio
import json
from typing import Any

import numpy as np


def event(name: str, data: dict[str, Any]) -> str:
    """One server-sent event; `data` carries its name too, as the API's clients expect."""
    body = data if name == "error" else {"type": name} | data
    return f"event: {name}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n"


class Glances:
    """Of every picture the newest preview that was not sent yet: a slow reader misses some, and holds nobody up."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._fresh, self._news = loop, dict[int, tuple[int, np.ndarray]](), asyncio.Event()

    def show(self, index: int, row: int, pixels: np.ndarray) -> None:
        """Called by the painting thread."""
        self._loop.call_soon_threadsafe(self._put, index, row, pixels)

    def _put(self, index: int, row: int, pixels: np.ndarray) -> None:
        self._fresh[index] = row, pixels
        self._news.set()

    async def next(self, finished: "asyncio.Future[Any]", seconds: float) -> dict[int, tuple[int, np.ndarray]]:
        """By picture, (row, pixels) of what is new; empty when `finished` is done or `seconds` are over."""
        waiting = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait({waiting, finished}, timeout=max(seconds, 0.0), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if finished.done():
            return {}
        fresh, self._fresh = self._fresh, {}
        self._news.clear()
        return fresh
