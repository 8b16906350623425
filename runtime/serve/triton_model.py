"""The sampling loop as a Python model of Triton Inference Server; imported by the server's own Python alone.

Triton hands over the requests that it has merged. They are painted as one batch, and each gets its pictures; the one
that cannot be fulfilled is found by painting every request alone, and its neighbours do not notice.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from ..errors import AccuQuantError
from ..pipeline import Pipeline
from .together import LONGEST_PROMPT, merged

OPTIONAL = {"class": "classes", "prompt": "prompts", "negative_prompt": "unwanted", "guidance": "guidance"}
STEPS = "steps"
WATCH = 1.0  # seconds
Send = Callable[[int, np.ndarray, int], None]  # to which request, its pictures, steps done


class TritonPythonModel:
    """What Triton calls: `initialize`, `execute` with batches of requests, `finalize`."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        settings = {name: value["string_value"] for name, value in config["parameters"].items()}
        if args["model_instance_kind"] == "GPU":  # this process is the instance's own
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        self._previews = int(settings["previews"])
        guidance = settings.get("guidance")
        self._pipeline = Pipeline(
            Path(args["model_repository"]) / args["model_version"] / "bundle",
            engine=settings["engine"],
            batch=config["max_batch_size"],
            threads=int(settings["threads"]),
            guidance=None if guidance is None else float(guidance),
        )
        self._over = threading.Event()
        threading.Thread(target=_end_with, args=(os.getppid(), self._over), daemon=True).start()

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        if not self._previews:
            answers: dict[int, Any] = {}
            self._answer(requests, lambda k, pictures, _: answers.update({k: _response(pictures)}), answers.__setitem__)
            return [answers[k] for k in range(len(requests))]
        senders = [request.get_response_sender() for request in requests]

        def send(k: int, pictures: np.ndarray, step: int) -> None:
            senders[k].send(_response(pictures, step))

        self._answer(requests, send, lambda k, response: senders[k].send(response))
        for sender in senders:
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def finalize(self) -> None:
        self._over.set()
        self._pipeline.close()

    def _answer(self, requests: Sequence[Any], send: Send, fail: Callable[[int, Any], None]) -> None:
        """Paint all requests as one batch or, where that fails, each by itself."""
        try:
            self._paint(requests, send)
        except CancelledError:  # nobody waits for this batch any more
            for k in range(len(requests)):
                fail(k, _error("the request was cancelled", pb.TritonError.CANCELLED))
        except Exception as error:  # of a neighbour's request, perhaps; the server and the others go on
            if len(requests) == 1:
                fail(0, _refusal(error))
                return
            for k, request in enumerate(requests):
                self._answer(
                    [request],
                    lambda _, pictures, step, k=k: send(k, pictures, step),  # type: ignore[misc]
                    lambda _, response, k=k: fail(k, response),  # type: ignore[misc]
                )

    def _paint(self, requests: Sequence[Any], send: Send) -> None:
        asked = [_wishes(request, len(self._pipeline.plan)) for request in requests]
        ends = np.cumsum([len(wishes["seeds"]) for wishes in asked])
        rows = [slice(end - len(wishes["seeds"]), end) for wishes, end in zip(asked, ends, strict=True)]
        pipeline, plan = self._pipeline, self._pipeline.plan

        def on_output(i: int, x: np.ndarray, output: np.ndarray) -> None:
            if all(request.is_cancelled() for request in requests):
                raise CancelledError
            if self._previews and i and i % self._previews == 0:
                seen = pipeline.pictures(plan.glance(i, x, output))
                for k, row in enumerate(rows):
                    send(k, seen[row], i)

        pictures = pipeline.pictures(pipeline.generate(**merged(pipeline, asked), on_output=on_output))
        for k, row in enumerate(rows):
            send(k, pictures[row], len(plan))


def _end_with(server: int, over: threading.Event) -> None:
    """End this process with the server's: a killed one never says whether a request was cancelled, and we'd wait."""
    while not over.wait(WATCH):
        if os.getppid() != server:
            os._exit(1)


def _wishes(request: Any, steps: int) -> dict[str, list[Any]]:
    """A request's rows, under the names of `generate`'s arguments; `steps` is what the bundle's plan takes."""
    if (given := pb.get_input_tensor_by_name(request, STEPS)) is not None:
        wrong = [asked for asked in given.as_numpy().ravel().tolist() if asked != steps]
        if wrong:
            raise AccuQuantError(
                f"{wrong[0]} steps; the bundle was calibrated for {steps}: export another one with --steps"
            )
    seeds = pb.get_input_tensor_by_name(request, "seed")
    if seeds is None:  # where some inputs are optional, Triton counts them and does not look which they are
        raise AccuQuantError("the request has no seed; send one for every picture, uint64 of shape (pictures, 1)")
    found: dict[str, list[Any]] = {"seeds": [int(seed) for seed in seeds.as_numpy().ravel()]}
    for tensor, argument in OPTIONAL.items():
        given = pb.get_input_tensor_by_name(request, tensor)
        if given is None:
            continue
        values = given.as_numpy().ravel().tolist()
        found[argument] = [_text(tensor, value) if isinstance(value, bytes) else value for value in values]
    return found


def _text(tensor: str, value: bytes) -> str:
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise AccuQuantError(f"{tensor} is not UTF-8 text; encode it as such") from None
    if len(text) > LONGEST_PROMPT:
        raise AccuQuantError(f"{tensor} has {len(text)} characters; at most {LONGEST_PROMPT}: shorten it")
    return text


def _response(pictures: np.ndarray, step: int | None = None) -> Any:
    tensors = [pb.Tensor("picture", pictures)]
    if step is not None:
        tensors.append(pb.Tensor("step", np.full((len(pictures), 1), step, np.int32)))
    return pb.InferenceResponse(output_tensors=tensors)


def _refusal(error: Exception) -> Any:
    """In our own words, or, as others' may name files of this machine, in the server's log."""
    if isinstance(error, AccuQuantError):
        return _error(str(error), pb.TritonError.INVALID_ARG)
    pb.Logger.log_error(f"painting failed: {error!r}")
    return _error("the engine failed; the server's log says how", pb.TritonError.INTERNAL)


def _error(message: str, code: Any) -> Any:
    return pb.InferenceResponse(error=pb.TritonError(message, code))
