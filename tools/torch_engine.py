"""The network itself as an engine: torch, eager or compiled by its inductor, to be timed beside engines of a bundle."""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from accuquant.calibrate.model import DiffusionModel
from accuquant.runtime.engines.base import Engine, EngineOptions, Kernel, Port
from torch import nn


class TorchEngine(Engine):
    """A model's float network at a fixed batch, in channels-last, which convolutions on CPUs like best.

    torch has one number of threads for the process; compiling happens while this is constructed.
    """

    def __init__(self, model: DiffusionModel, options: EngineOptions, path: Path, *, compiled: bool) -> None:
        super().__init__(path, options)
        self.name = f"torch {torch.__version__}"
        self.outputs = ()
        batch = options.batch
        self.inputs = (
            Port("x", np.dtype(np.float32), (batch, *model.sample_shape)),
            Port("t", np.dtype(np.float32), (batch,)),
        )
        if options.threads:
            torch.set_num_threads(options.threads)
        network: nn.Module = model.network.to(memory_format=torch.channels_last)
        self._network = torch.compile(network, dynamic=False) if compiled else network
        begun = time.perf_counter()
        self.run({port.name: np.zeros(port.shape, port.dtype) for port in self.inputs})
        self.ready_seconds = time.perf_counter() - begun

    def _infer(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        x = torch.from_numpy(inputs["x"]).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode():
            return [self._network(x, torch.from_numpy(inputs["t"])).numpy()]

    def kernels(self) -> list[Kernel]:
        return []

    def close(self) -> None:
        self._network = None
