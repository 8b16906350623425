"""`accuquant-serve http` under load: refusals are 429, with Retry-After."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from accuquant.runtime.errors import AccuQuantError
from front import MARGIN, NONE, Answer, exchange

SERVE = "import sys; sys.argv[0] = 'accuquant-serve'; from accuquant.runtime.cli_serve import main; main()"


@dataclass(frozen=True)
class HttpFront:
    address: tuple[str, int]
    deadline: float
    process: "subprocess.Popen[str] | None" = None
    versions: Mapping[str, str] = field(default_factory=dict)

    async def picture(self, seed: int) -> Answer:
        body = json.dumps({"seed": seed}).encode()
        reply = await exchange(self.address, "/v1/images/generations", body, self.deadline + MARGIN)
        if reply is None:
            return NONE
        again = reply.number("retry-after")
        if reply.status == 429 and again is None:
            return Answer("failed", "429 without Retry-After")
        outcomes = {200: "picture", 429: "refused"}
        return Answer(outcomes.get(reply.status, "failed"), str(reply.status), again)  # type: ignore[arg-type]

    async def memory(self) -> float:
        """By the server's own account."""
        reply = await exchange(self.address, "/metrics", None, MARGIN)
        text = reply.content.decode() if reply else ""
        found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)


def start(bundle: Path, batch: int, queue: int, deadline: float, threads: int) -> HttpFront:
    """The server on a free port of the loopback, once it listens.

    Raises:
        AccuQuantError: it did not start.
    """
    settings = {"batch": batch, "queue": queue, "deadline": deadline, "threads": threads, "port": 0}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "http", str(bundle), *options], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"listening on http://(\S+):(\d+) ", line):
            versions = {name: metadata.version(name) for name in ("fastapi", "uvicorn", "openvino")}
            return HttpFront((found[1], int(found[2])), deadline, process, versions)
    raise AccuQuantError(f"the server did not start: {''.join(said)[-500:]}")
