"""Peak memory of sampling with one network of a bundle, measured in a process that does nothing else.

python -m accuquant.runtime.footprint BUNDLE NETWORK ENGINE OPTIONS      prints bytes; OPTIONS are EngineOptions as JSON
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from .bundle import Bundle, NetworkName
from .engines.base import EngineOptions
from .errors import AccuQuantError
from .pipeline import Pipeline


def footprint(bundle: Bundle, network: NetworkName, engine: str, options: EngineOptions) -> int:
    """Most bytes resident in a fresh interpreter that loads the network, compiles it and samples one batch.

    Raises:
        AccuQuantError: the process failed; its last words are given.
    """
    asked = [str(bundle.folder.resolve()), network, engine, json.dumps(asdict(options))]
    child = subprocess.run([sys.executable, "-m", __name__, *asked], capture_output=True, text=True, check=False)
    if child.returncode:
        raise AccuQuantError(f"memory of {network} could not be measured: {child.stderr.strip()[-300:]}")
    return int(child.stdout)


def peak_bytes() -> int:
    """Most bytes this process ever had resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: there it counts what the parent held when it forked.
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _main(bundle: str, network: NetworkName, engine: str, options: str) -> None:
    asked = EngineOptions(**json.loads(options))
    with Pipeline(
        Path(bundle), network=network, engine=engine, batch=asked.batch, threads=asked.threads, rest=asked.rest
    ) as pipeline:
        pipeline.generate(range(asked.batch))
    print(peak_bytes())


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
