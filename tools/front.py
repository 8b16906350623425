"""What a load needs of a front end: to ask it for one picture and learn what became of that, and its memory."""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

MARGIN = 10.0  # seconds after the deadline at which an answer counts as lost


@dataclass(frozen=True)
class Answer:
    """A picture, a refusal of the kind that the front end promises, or a failure; and how it was said.

    `again` is in how many seconds to come again, if that was said.
    """

    outcome: Literal["picture", "refused", "failed"]
    said: str
    again: float | None = None


NONE = Answer("failed", "no answer")


class Front(Protocol):
    """A server that was started for the load."""

    versions: Mapping[str, str]  # of what it runs on

    async def picture(self, seed: int) -> Answer: ...

    async def memory(self) -> float:
        """Resident bytes of the server."""
        ...

    def stop(self) -> int:
        """End it as an operator would; returns the exit code."""
        ...


@dataclass(frozen=True)
class Reply:
    status: int
    head: str
    content: bytes

    def number(self, header: str) -> float | None:
        found = re.search(rf"\r\n{header}: (\d+)", self.head, re.IGNORECASE)
        return float(found[1]) if found else None


async def exchange(address: tuple[str, int], path: str, body: bytes | None, patience: float) -> Reply | None:
    """One request on a connection of its own, POST if there is a body; None unless the answer came whole, in time."""
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: {address[0]}\r\nConnection: close\r\n"
    if body is not None:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    try:
        async with asyncio.timeout(patience):
            reader, writer = await asyncio.open_connection(*address)
            try:
                writer.write(head.encode() + b"\r\n" + (body or b""))
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    top, _, content = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", top)
    reply = Reply(int(status[1]) if status else 0, top.decode("latin-1"), content)
    return reply if status and reply.number("content-length") == len(content) else None
