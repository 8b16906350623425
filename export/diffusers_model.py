"""A bundle's network as the model of a diffusers pipeline: `pipe.unet = accuquant.load_unet(bundle)`.

Everything else stays as it is in the pipeline - scheduler, text encoder, autoencoder, guidance, callbacks - and calls
the engine where it called a torch module. The pipeline's scheduler must be the one that the network was trained for,
and where the bundle knows its plan's timesteps only, be set to those.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..runtime.bundle import Bundle, ByClass, ByRows, ByText, NetworkName
from ..runtime.engines import choose, open_engine
from ..runtime.engines.base import Engine, EngineOptions, Rest
from ..runtime.errors import AccuQuantError

KEPT = 2  # engines of different batch sizes; a pipeline alternates between two at most
SHOWN = 8  # timesteps in a message
CALLED = {ByText: "encoder_hidden_states", ByClass: "class_labels"}  # diffusers' words for what a network takes


class EngineModel(nn.Module):
    """A bundle's network with the interface that diffusers pipelines call; it computes, and has no gradient.

    `batch` None compiles an engine for every batch size that comes; given, there is one, larger batches run in pieces
    and smaller ones are filled up. Latents may be of any float type and device, and come back as they were; `to()`
    only sets where and in what type a pipeline makes them. The network computes on the engine, wherever they are.
    """

    made: ClassVar[type] = UNet2DOutput

    def __init__(
        self,
        bundle: Bundle | Path | str,
        *,
        network: NetworkName = "denoiser",
        engine: str = "auto",
        batch: int | None = None,
        threads: int = 0,
        rest: Rest = "float32",
    ) -> None:
        super().__init__()
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))
        self._path, self._name = self.bundle.graph(network), choose(engine, self.bundle.manifest.target)
        self._batch, self._threads, self._rest = batch, threads, rest
        self._engines: dict[int, Engine] = {}
        self._known = _passed_by_pipelines(self.bundle)
        self._timesteps = {np.float32(t) for t in self.bundle.plan.timesteps}
        self.config = FrozenDict(_config(self.bundle))
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        return self._place.device  # type: ignore[return-value]

    @property
    def dtype(self) -> torch.dtype:
        return self._place.dtype  # type: ignore[return-value]

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        condition: Tensor | None = None,
        *,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """The prediction for latents (B, C, H, W) at one timestep or (B,) of them, of the latents' type and device.

        The third argument is whichever condition the network takes: encoder_hidden_states (B, tokens, width) or
        class_labels (B,).

        Raises:
            AccuQuantError: shapes, timesteps or classes that the bundle does not know; a condition it does not take or
                one it lacks; any other argument that is not empty.
        """
        asked = [name for name, value in others.items() if not _is_empty(value)]
        if asked:
            raise AccuQuantError(
                f"{asked[0]} was given and the network of {self.bundle.folder} takes none; leave it out"
            )
        shape = self.bundle.manifest.sample_shape
        if sample.ndim != 4 or tuple(sample.shape[1:]) != shape or not len(sample):
            raise AccuQuantError(
                f"latents are {tuple(sample.shape)} and {self.bundle.folder} takes N of {shape}; set "
                "the pipeline's height and width to that"
            )
        feed = {"x": sample.detach().float().cpu().numpy(), "t": self._times(timestep, len(sample))}
        given = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
        feed |= self._condition(condition, given, len(sample))
        out = torch.from_numpy(self._run(feed)).to(sample.device, sample.dtype)
        return self.made(sample=out) if return_dict else (out,)

    def close(self) -> None:
        """Free the engines; a further call compiles them anew."""
        while self._engines:
            self._engines.popitem()[1].close()

    def _times(self, timestep: Tensor | float, count: int) -> np.ndarray:
        times = torch.as_tensor(timestep).detach().cpu().reshape(-1).to(torch.float32).numpy()
        if len(times) not in (1, count):
            raise AccuQuantError(f"{len(times)} timesteps for {count} latents; give one, or one for each")
        unknown = [t for t in times.tolist() if np.float32(t) not in self._timesteps]
        if unknown and self.bundle.manifest.timesteps == "plan":
            known = [f"{t:g}" for t in sorted(self._timesteps, reverse=True)]
            shown = known if len(known) <= SHOWN else [*known[: SHOWN - 2], "...", known[-1]]
            raise AccuQuantError(
                f"{self.bundle.folder} knows the {len(known)} timesteps of its own plan ({', '.join(shown)}) and not "
                f"{unknown[0]:g}; set the scheduler to that plan ({self.bundle.manifest.sampler}), or export for any "
                "with --no-time-table"
            )
        return np.broadcast_to(times, count)

    def _condition(self, condition: Tensor | None, given: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
        """The network's own input, from the third argument or from the one that diffusers calls it by."""
        called = None if self._known is None else CALLED[type(self._known)]
        for name, value in given.items():
            if value is not None and name != called:
                takes = called or "neither encoder_hidden_states nor class_labels"
                raise AccuQuantError(f"{name} was given and the network of {self.bundle.folder} takes {takes}")
        if self._known is None or called is None:
            if condition is not None:
                raise AccuQuantError(f"a condition was given and the network of {self.bundle.folder} takes none")
            return {}
        value = given[called] if condition is None else condition
        if value is None:
            raise AccuQuantError(f"the network of {self.bundle.folder} needs {called}, one for each latent")
        rows = torch.as_tensor(value).detach().cpu()
        if len(rows) != count:
            raise AccuQuantError(f"{len(rows)} rows of {called} for {count} latents; give one for each")
        if isinstance(self._known, ByText):
            return {self._known.inputs[0]: rows.float().numpy()}
        wrong = [y for y in rows.tolist() if not 0 <= y < self._known.classes and y != self._known.null]
        if wrong:
            none = "" if self._known.null is None else f", {self._known.null} stands for none"
            raise AccuQuantError(
                f"class {wrong[0]} is out of range; the network knows 0 to {self._known.classes - 1}{none}"
            )
        return {self._known.input: rows.to(torch.int64).numpy()}

    def _run(self, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        """The engine's output for any number of rows, in pieces of its batch."""
        count = len(feed["x"])
        size = self._batch or count
        engine, made = self._engine(size), []
        for first in range(0, count, size):
            rows = np.minimum(np.arange(first, first + size), count - 1)
            piece = engine.run({name: np.ascontiguousarray(value[rows]) for name, value in feed.items()})
            made.append(piece[: count - first].copy())
        return np.concatenate(made)

    def _engine(self, size: int) -> Engine:
        """The one for that batch size, compiled if none of those kept is; the one last used longest ago goes."""
        engine = self._engines.pop(size, None)
        if engine is None:
            options = EngineOptions(size, self._threads, self._rest)
            engine = open_engine(self._path, options, self._name, self.bundle.manifest.target)
        self._engines[size] = engine
        while len(self._engines) > KEPT:
            self._engines.pop(next(iter(self._engines))).close()
        return engine


class EngineTransformer(EngineModel):
    """The same under the names that diffusers' transformers are called by."""

    made = Transformer2DModelOutput

    def forward(self, *latents: Any, hidden_states: Tensor | None = None, **named: Any) -> Any:
        """As EngineModel.forward."""
        given = latents if hidden_states is None else (hidden_states, *latents)
        return super().forward(*given, **named)


def load_unet(bundle: Bundle | Path | str, **options: Any) -> EngineModel:
    """A bundle's network for `pipe.unet`; options are those of EngineModel, errors those of opening a bundle."""
    return EngineModel(bundle, **options)


def load_transformer(bundle: Bundle | Path | str, **options: Any) -> EngineTransformer:
    """A bundle's network for `pipe.transformer` of pipelines that call it with latents, timestep and one condition."""
    return EngineTransformer(bundle, **options)


def _passed_by_pipelines(bundle: Bundle) -> ByClass | ByText | None:
    """What the network takes, if a diffusers pipeline passes it as one argument."""
    known = bundle.manifest.conditioning
    if isinstance(known, ByRows) or (isinstance(known, ByText) and len(known.inputs) > 1):
        names = ", ".join(known.shapes if isinstance(known, ByRows) else known.inputs)
        raise AccuQuantError(
            f"the network of {bundle.folder} takes {names}, which diffusers pipelines do not pass as one argument; "
            "sample it with accuquant.runtime.Pipeline"
        )
    return known


def _config(bundle: Bundle) -> dict[str, Any]:
    """What pipelines read of a model's config."""
    channels, height, width = bundle.manifest.sample_shape
    known = bundle.manifest.conditioning
    return {
        "_diffusers_version": diffusers.__version__,
        "_name_or_path": str(bundle.folder),
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": known.classes if isinstance(known, ByClass) else None,
        "time_cond_proj_dim": None,
        "addition_embed_type": None,
        "class_embed_type": None,
        "encoder_hid_dim_type": None,
    }


def _is_empty(value: Any) -> bool:
    """Pipelines pass arguments for features that are off as None, {} or {"name": None}."""
    return value is None or (isinstance(value, Mapping) and all(map(_is_empty, value.values())))
