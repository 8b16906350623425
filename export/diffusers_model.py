"""A bundle's network as the model of a diffusers pipeline: `pipe.unet = accuquant.load_unet(bundle)`.

Everything else stays as it is in the pipeline - scheduler, text encoder, autoencoder, guidance, callbacks - and calls
the engine where it called a torch module. The pipeline's scheduler must be the one that the network was trained for,
and where the bundle knows its plan's timesteps only, be set to those.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from ..runtime.bundle import Bundle, ByClass, NetworkName
from ..runtime.engines import choose, open_engine
from ..runtime.engines.base import Engine, EngineOptions, Rest
from ..runtime.errors import AccuQuantError
from .diffusers_calls import SIZES_WIDTH, config_of, rows_called, taken, width_of

KEPT = 2  # engines of different batch sizes; a pipeline alternates between two at most
SHOWN = 8  # timesteps in a message
ROUNDINGS = 2  # of a timestep's type, between the scheduler's and what comes here: Flux' is divided by 1000, say


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
        self._called = rows_called(self.bundle)
        self._timesteps = np.array(sorted(self.bundle.plan.timesteps, reverse=True), np.float32)
        self.config = FrozenDict(config_of(self.bundle))
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
        return_dict: bool = True,
        **given: Any,
    ) -> Any:
        """The prediction for latents (B, C, H, W) at one timestep or (B,) of them, of the latents' type and device.

        The third argument is whichever condition the network takes: encoder_hidden_states (B, tokens, width) or
        class_labels (B,). Others come under diffusers' names for them.

        Raises:
            AccuQuantError: shapes, timesteps or classes that the bundle does not know; a condition it does not take or
                one it lacks; any other argument that is not empty.
        """
        shape = self.bundle.manifest.sample_shape
        if sample.ndim != 4 or tuple(sample.shape[1:]) != shape or not len(sample):
            raise AccuQuantError(
                f"latents are {tuple(sample.shape)} and {self.bundle.folder} takes N of {shape}; set "
                "the pipeline's height and width to that"
            )
        feed = {"x": sample.detach().float().cpu().numpy(), "t": self._times(timestep, len(sample))}
        feed |= self._condition(condition, given, len(sample))
        out = torch.from_numpy(self._run(feed)).to(sample.device, sample.dtype)
        return self.made(sample=out) if return_dict else (out,)

    def close(self) -> None:
        """Free the engines; a further call compiles them anew."""
        while self._engines:
            self._engines.popitem()[1].close()

    def _times(self, timestep: Tensor | float, count: int) -> np.ndarray:
        given = torch.as_tensor(timestep).detach().cpu().reshape(-1)
        times, known = given.to(torch.float32).numpy(), self._timesteps
        if len(times) not in (1, count):
            raise AccuQuantError(f"{len(times)} timesteps for {count} latents; give one, or one for each")
        nearest = known[np.abs(known[None] - times[:, None]).argmin(axis=1)]
        slack = ROUNDINGS * torch.finfo(given.dtype).eps if given.dtype.is_floating_point else 0.0
        fits = np.abs(times - nearest) <= slack * nearest
        if not fits.all() and self.bundle.manifest.timesteps == "plan":
            names = [f"{t:g}" for t in known]
            shown = names if len(names) <= SHOWN else [*names[: SHOWN - 2], "...", names[-1]]
            raise AccuQuantError(
                f"{self.bundle.folder} knows the {len(names)} timesteps of its own plan ({', '.join(shown)}) and not "
                f"{times[~fits][0]:g}; set the scheduler to that plan ({self.bundle.manifest.sampler}), or export for "
                "any with --no-time-table"
            )
        return np.broadcast_to(np.where(fits, nearest, times), count)

    def _condition(self, condition: Tensor | None, given: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
        """The network's own inputs, from the third argument or from those that diffusers calls them by."""
        if condition is not None and not self._called:
            raise AccuQuantError(f"a condition was given and the network of {self.bundle.folder} takes none")
        asked = taken(self.bundle, self._called, given)
        if condition is not None:
            asked = {next(iter(self._called.values())): condition} | asked
        feed: dict[str, np.ndarray] = {}
        for name, called in self._called.items():
            if called not in asked:
                raise AccuQuantError(f"the network of {self.bundle.folder} needs {called}, one for each latent")
            rows = torch.as_tensor(asked[called]).detach().cpu()
            if len(rows) != count:
                raise AccuQuantError(f"{len(rows)} rows of {called} for {count} latents; give one for each")
            known = self.bundle.manifest.conditioning
            feed[name] = _classes(rows, known) if isinstance(known, ByClass) else rows.float().numpy()
        return feed

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

    def cache_context(self, name: str) -> AbstractContextManager[None]:
        """Some pipelines name their calls for caches of layers' results, which an engine has none of."""
        return nullcontext()


class EngineXL(EngineModel):
    """Of Stable Diffusion XL, whose pipelines add up the widths of what they are to tell the network."""

    def __init__(self, bundle: Bundle | Path | str, **options: Any) -> None:
        super().__init__(bundle, **options)
        sizes = SIZES_WIDTH * len(self.bundle.manifest.constants.get("time_ids", ()))
        linear = SimpleNamespace(in_features=sizes + width_of(self.bundle, "pooled"))
        self.add_embedding = SimpleNamespace(linear_1=linear)


class EngineFlux(EngineTransformer):
    """Of Flux: its pipelines pass tokens of 2x2 latent values, where each stands, and timesteps from 0 to 1."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        *,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        return_dict: bool = True,
        **named: Any,
    ) -> Any:
        """As EngineModel.forward, of tokens (B, H/2 * W/2, 4 C)."""
        channels, height, width = self.bundle.manifest.sample_shape
        rows, columns = height // 2, width // 2
        where = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        elsewhere = img_ids is not None and not torch.equal(img_ids.detach().cpu().long(), where)
        if tuple(hidden_states.shape[1:]) != (len(where), 4 * channels) or elsewhere:
            raise AccuQuantError(
                f"latents are {len(hidden_states)} times {tuple(hidden_states.shape[1:])} tokens and "
                f"{self.bundle.folder} takes {rows} by {columns} of {4 * channels}; set the pipeline's height and "
                "width to that"
            )
        if txt_ids is not None and txt_ids.any():
            raise AccuQuantError(f"txt_ids are not zero; in the graph of {self.bundle.folder} texts stand at zero")
        x = hidden_states.reshape(-1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        (out,) = super().forward(
            x.reshape(-1, channels, height, width), torch.as_tensor(timestep) * 1000, return_dict=False, **named
        )
        tokens = out.reshape(-1, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        made = tokens.reshape(hidden_states.shape)
        return self.made(sample=made) if return_dict else (made,)


# Of families that pipelines call in ways of their own.
UNETS: Mapping[str, type[EngineModel]] = {"sdxl": EngineXL}
TRANSFORMERS: Mapping[str, type[EngineTransformer]] = {"flux": EngineFlux}


def load_unet(bundle: Bundle | Path | str, **options: Any) -> EngineModel:
    """A bundle's network for `pipe.unet`; options are those of EngineModel, errors those of opening a bundle."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))
    return UNETS.get(opened.manifest.family, EngineModel)(opened, **options)


def load_transformer(bundle: Bundle | Path | str, **options: Any) -> EngineTransformer:
    """The same for `pipe.transformer`."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle(Path(bundle))
    return TRANSFORMERS.get(opened.manifest.family, EngineTransformer)(opened, **options)


def _classes(rows: Tensor, known: ByClass) -> np.ndarray:
    wrong = [y for y in rows.tolist() if not 0 <= y < known.classes and y != known.null]
    if wrong:
        none = "" if known.null is None else f", {known.null} stands for none"
        raise AccuQuantError(f"class {wrong[0]} is out of range; the network knows 0 to {known.classes - 1}{none}")
    return rows.to(torch.int64).numpy()
