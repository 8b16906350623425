"""Work spread over processes and machines, with Ray: chunks in, what workers make of them out, in the chunks' order.

What is made of a chunk may depend on nothing but the chunk and the worker's arguments, never on which worker had it or
had what before. So one worker and twenty make the same bytes, and a chunk that died with its worker is simply done
again by another. Sums of floats depend on how many are summed at once and by how many threads: who cuts the chunks
cuts them without regard to the number of workers, and says how many threads each has.
"""

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import AccuQuantError

try:
    import ray
    import ray.data
except ImportError:
    raise AccuQuantError("Ray is not installed; install it with: pip install 'accuquant[ray]'") from None

Chunk = Mapping[str, Any]
Made = dict[str, np.ndarray]  # (rows, ...) by name
Work = Callable[[Chunk], Made]


class _Worker:
    """A process's share: it makes ready once, then works chunk by chunk."""

    def __init__(self, make: Callable[..., Work], arguments: Mapping[str, Any]) -> None:
        self._work = make(**arguments)

    def __call__(self, pickled: Mapping[str, np.ndarray]) -> Made:
        return self._work(pickle.loads(pickled["chunk"][0]))


def map_chunks(
    make: Callable[..., Work],
    arguments: Mapping[str, Any],
    chunks: Sequence[Chunk],
    workers: int,
    *,
    size: int,
    threads: int,
    on_gpu: bool = False,
) -> Iterator[Made]:
    """Call `make(**arguments)` in each of `workers` processes and every chunk with what one of them returned.

    Yields the rows made of one chunk after the other: `size` of each, of the last perhaps fewer. A worker takes
    `threads` cores of its machine, or a GPU. Workers are on the cluster that RAY_ADDRESS names; else on this machine,
    as many as asked. Ray is left as it was found: if it did not run, it is started and ended.

    Raises:
        AccuQuantError: as `make` and its work; what else they raise comes from Ray.
    """
    started = not ray.is_initialized()
    if started:
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come as one sentence of ours
        cores = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads}
        ray.init(**cores, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True
    # Bytes, because columns would make numbers of another kind of what a chunk holds. They were pickled here, and go no
    # other way than the workers' code and arguments, which Ray pickles itself.
    items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    with ray.data.DataContext.current(context):
        made = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker,
            fn_constructor_kwargs={"make": make, "arguments": arguments},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
            **({"num_gpus": 1} if on_gpu else {"num_cpus": threads}),
        )
    try:
        for rows in made.iter_batches(batch_size=size, batch_format="numpy"):
            # Copied: Ray's arrays lie in memory that goes with it.
            yield {name: np.array(column) for name, column in rows.items()}
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AccuQuantError):
            raise error.cause from None
        raise
    finally:
        if started:
            ray.shutdown()
