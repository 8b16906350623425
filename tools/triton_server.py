"""Triton Inference Server out of the nvidia-pytriton wheel, which brings its binaries and of backends Python's alone.

    PYTHON tools/triton_server.py FOLDER --model-repository=models

PYTHON is that of an environment with nvidia-pytriton and accuquant[cpu]; FOLDER takes the backend, and what follows are
tritonserver's own options. `started` does so from any other Python, on free ports, and waits until models are loaded.

Other backends are taken from the folder that ACCUQUANT_TRITON_BACKENDS names. ONNX Runtime's is built without a GPU
from the repositories onnxruntime_backend, backend, core and common of Triton's organisation, with ONNX Runtime's C
header of any version up to the wheel's; it lies in onnxruntime/ with the wheel's libonnxruntime.so.* as
libonnxruntime.so.1.
"""

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

HERE = "127.0.0.1"
BACKENDS = "ACCUQUANT_TRITON_BACKENDS"
PATIENCE = 300.0  # seconds in which models must be loaded


@dataclass(frozen=True)
class Triton:
    """A server's process, and its ports: HTTP, gRPC and metrics."""

    process: "subprocess.Popen[bytes]"
    ports: tuple[int, int, int]
    log: Path

    @property
    def http(self) -> str:
        return f"{HERE}:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        return f"{HERE}:{self.ports[1]}"

    def stop(self) -> int:
        """End it, and wait; returns the exit code."""
        self.process.terminate()
        return self.process.wait(60)


def started(python: str, folder: Path, repository: Path, ports: tuple[int, int, int] | None = None) -> Triton:
    """All models of `repository` on a server that is ready; `python` has nvidia-pytriton, `folder` takes a log.

    Raises:
        RuntimeError: it ended, or did not become ready.
    """
    http, grpc, metrics = ports or _free_ports()
    options = {
        "model-repository": repository, "model-control-mode": "explicit", "load-model": "*",
        "http-address": HERE, "grpc-address": HERE, "metrics-address": HERE,
        "http-port": http, "grpc-port": grpc, "metrics-port": metrics,
    }  # fmt: skip
    log, end = folder / "server.log", time.monotonic() + PATIENCE
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as written:
        process = subprocess.Popen(
            [python, __file__, str(folder), *(f"--{name}={value}" for name, value in options.items())],
            stdout=written, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while "Started HTTPService" not in log.read_text():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise RuntimeError(f"the server is not ready: {log.read_text()[-4000:]}")
        time.sleep(0.2)
    return Triton(process, (http, grpc, metrics), log)


def _free_ports() -> tuple[int, int, int]:
    sockets = [socket.create_server((HERE, 0)) for _ in range(3)]
    http, grpc, metrics = (one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    return http, grpc, metrics


def become(folder: Path, options: list[str]) -> None:
    """Turn this process into the server."""
    import pytriton

    package = Path(pytriton.__file__).resolve().parent
    triton, backend = package / "tritonserver", folder / "backends" / "python"
    backend.mkdir(parents=True, exist_ok=True)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for file in (
        triton / "backends" / "python" / "libtriton_python.so",
        triton / "backends" / "python" / "triton_python_backend_utils.py",
        triton / "python_backend_stubs" / version / "triton_python_backend_stub",
    ):
        shutil.copy(file, backend)
    if others := os.environ.get(BACKENDS):
        shutil.copytree(others, folder / "backends", dirs_exist_ok=True)
    libraries = [str(sysconfig.get_config_var("LIBDIR")), str(package.parent / "nvidia_pytriton.libs")]
    # The server's Python is the first one on the path, and takes packages from where it is told.
    search = {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": ":".join(filter(None, [*os.environ.get("PYTHONPATH", "").split(":"), str(package.parent)])),
    }
    program = triton / "bin" / "tritonserver"
    os.execve(program, [str(program), f"--backend-directory={folder / 'backends'}", *options], os.environ | search)


if __name__ == "__main__":
    become(Path(sys.argv[1]), sys.argv[2:])
