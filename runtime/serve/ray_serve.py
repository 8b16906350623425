"""Behind Ray Serve: replicas of the HTTP server on one machine or many, as many as there are requests for.

A replica is the whole server with its own engines, queue and limits. So strangers share a batch as they do without Ray,
an overloaded replica answers 429 itself, and a picture is the same bytes whoever paints it. Ray spreads requests over
the replicas, keeps their number between two bounds by how many requests each has at work, and replaces those that died.
Connections are accepted by Ray's own proxy, which waits for the head of a request without end: cut those off before it.

Every machine must see the bundles under the same path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle, NetworkName
from ..errors import AccuQuantError
from .app import application
from .listen import LAST_BYTES
from .painter import Painter
from .server import Limits, Server

try:
    import ray
    from ray import serve
except ImportError:
    raise AccuQuantError("Ray Serve is not installed; install it with: pip install 'accuquant[ray]'") from None

NAME = "accuquant"
UPSCALE_DELAY = 5.0  # seconds of load before there are more; Ray's 30 are half of what a request may take at all


@dataclass(frozen=True)
class Serving:
    """What every replica serves, and how many there may be.

    Of a machine's cores, a replica takes as many as it has `threads`; of bundles for GPUs, it takes one GPU.
    """

    folders: Sequence[Path]
    least: int = 1
    most: int = 1
    networks: Sequence[NetworkName] = ("denoiser",)
    engine: str = "auto"
    batch: int = 4
    threads: int = 1
    guidance: float | None = None
    limits: Limits = field(default_factory=Limits)
    api_key: str | None = None

    def painters(self) -> list[Painter]:
        return [
            Painter(
                Bundle(folder), network, engine=self.engine, batch=self.batch, threads=self.threads,
                guidance=self.guidance,
            )
            for folder in self.folders
            for network in self.networks
        ]  # fmt: skip

    @property
    def needs(self) -> dict[str, Any]:
        """What Ray reserves for a replica."""
        on_gpu = any(Bundle(folder).manifest.target == "tensorrt" for folder in self.folders)
        return {"num_cpus": self.threads, "num_gpus": int(on_gpu)}


class _Replica:
    """The server in a replica's process; Ray calls these methods by their names."""

    def __init__(self, serving: Serving) -> None:
        self._server = Server(serving.painters(), serving.limits)
        self._api_key = serving.api_key

    async def __serve_build_asgi_app__(self) -> Any:
        await self._server.warm_up()
        return application(self._server, self._api_key)

    def check_health(self) -> None:
        if not self._server.ready:
            raise RuntimeError("an engine's thread has ended")

    async def __del__(self) -> None:
        await self._server.drain()


def deployment(serving: Serving) -> serve.Application:
    """The application for `ray.serve.run`, or for a file of `serve deploy`.

    Raises:
        AccuQuantError: as `Bundle`, before any replica starts, or bounds that make no sense.
    """
    if not 1 <= serving.least <= serving.most:
        raise AccuQuantError(f"{serving.least} to {serving.most} replicas: the least is 1, and no more than the most")
    # A picture's address would be asked of any replica, and one alone has it.
    limits = replace(serving.limits, addresses=serving.limits.addresses and serving.most == 1)
    serving = replace(serving, folders=[folder.resolve() for folder in serving.folders], limits=limits)
    engines = len(serving.folders) * len(serving.networks)
    made = serve.deployment(
        name=NAME,
        ray_actor_options=serving.needs,
        autoscaling_config={
            "min_replicas": serving.least, "max_replicas": serving.most, "target_ongoing_requests": serving.batch,
            "upscale_delay_s": UPSCALE_DELAY,
        },
        # More than a replica's queues hold, so that it is the replica that refuses, in the API's words.
        max_ongoing_requests=2 * engines * (limits.waiting + serving.batch),
        graceful_shutdown_timeout_s=limits.deadline + LAST_BYTES,
    )(serve.ingress()(_Replica))  # fmt: skip
    return made.bind(serving)


def start(serving: Serving, host: str, port: int) -> None:
    """Run it behind HTTP on the cluster that RAY_ADDRESS names, or on this machine; returns when a replica is ready.

    Raises:
        AccuQuantError: as `deployment`, or no replica starts.
    """
    served = deployment(serving)
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "ERROR"})
    try:
        serve.run(served, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise AccuQuantError(f"no replica starts: {error}") from error


def stop() -> None:
    """Let every replica finish what it accepted, and leave the cluster."""
    serve.delete(NAME)
    serve.shutdown()
    ray.shutdown()
