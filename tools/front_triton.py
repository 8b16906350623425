"""A bundle on Triton Inference Server under load, asked in the inference protocol's JSON; pictures come as bytes.

Refusals are those of its queue: 503 at once when it is full, and for requests that waited until their deadline. Triton
does not say when to come again. ACCUQUANT_TRITON names the Python of the server's environment, see triton_server.py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.serve.triton import Serving, write_repository
from front import MARGIN, NONE, Answer, exchange
from triton_server import HERE, Triton, started

NAME = "loaded"
VERSIONS = """
from importlib import metadata
import json
print(json.dumps({name: metadata.version(name) for name in ("nvidia-pytriton", "openvino")}))
"""
QUEUE_SAYS = ("Exceeds maximum queue size", "Request timeout expired")


@dataclass(frozen=True)
class TritonFront:
    address: tuple[str, int]
    deadline: float
    server: Triton | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    async def picture(self, seed: int) -> Answer:
        asked = {
            "inputs": [{"name": "seed", "shape": [1, 1], "datatype": "UINT64", "data": [seed]}],
            "outputs": [{"name": "picture", "parameters": {"binary_data": True}}],
        }
        path, body = f"/v2/models/{NAME}/infer", json.dumps(asked).encode()
        reply = await exchange(self.address, path, body, self.deadline + MARGIN)
        if reply is None:
            return NONE
        if reply.status == 200:
            return Answer("picture", "200")
        refused = next((words for words in QUEUE_SAYS if words.encode() in reply.content), None)
        if reply.status == 503 and refused:
            return Answer("refused", f"503 {refused}")
        return Answer("failed", f"{reply.status} {reply.content[:200].decode(errors='replace')}")

    async def memory(self) -> float:
        """Of the server and the processes of its models, in which shared pages count more than once."""
        assert self.server is not None
        whole = psutil.Process(self.server.process.pid)
        return float(sum(one.memory_info().rss for one in [whole, *whole.children(recursive=True)]))

    def stop(self) -> int:
        assert self.server is not None
        return self.server.stop()


def start(bundle: Path, folder: Path, batch: int, queue: int, deadline: float, threads: int) -> TritonFront:
    """The server on free ports of the loopback, once the model is loaded; `folder` takes repository, backend and log.

    Raises:
        AccuQuantError: it did not start.
    """
    serving = Serving(NAME, batch, queue=queue, deadline=deadline, threads=threads)
    write_repository(Bundle(bundle), folder / "repository", serving)
    python = os.environ.get("ACCUQUANT_TRITON", sys.executable)
    try:
        server = started(python, folder, folder / "repository")
    except RuntimeError as error:
        raise AccuQuantError(
            f"{error}\nset ACCUQUANT_TRITON to a Python that has nvidia-pytriton and accuquant[cpu]"
        ) from None
    told = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout
    return TritonFront((HERE, server.ports[0]), deadline, server, json.loads(told))
