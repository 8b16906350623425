"""A bundle's network as the server holds it: what may be asked of it, and pictures for wishes."""

from collections.abc import Sequence

import numpy as np

from ..bundle import Bundle, ByClass, ByRows, ByText, NetworkName
from ..conditions import check_guidance
from ..errors import AccuQuantError
from ..pipeline import Pipeline
from .batching import OnRow, Wish

FULL_PRECISION = ":fp"  # after a bundle's name: its twin


class UnfitError(AccuQuantError):
    """A request that this bundle cannot fulfil, and the parameter that asks too much."""

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class Painter:
    """One network of a bundle, opened.

    `guidance` None leaves it as the bundle was calibrated. Opened with guidance, requests may choose how much; opened
    without, none can be had.

    Raises:
        AccuQuantError: no engine for it, or its samples are no pictures.
    """

    def __init__(
        self,
        bundle: Bundle,
        network: NetworkName = "denoiser",
        *,
        engine: str = "auto",
        batch: int = 8,
        threads: int = 0,
        guidance: float | None = None,
    ) -> None:
        manifest = bundle.manifest
        if isinstance(manifest.conditioning, ByRows):
            raise AccuQuantError(
                f"{bundle.folder} takes rows of a file, which requests of this API do not carry; sample it with "
                "accuquant-sample --conditions"
            )
        self.name = bundle.folder.resolve().name + (FULL_PRECISION if network == "twin" else "")
        self.precision = "full precision" if network == "twin" else manifest.scheme
        self.pipeline = Pipeline(
            bundle, network=network, engine=engine, batch=batch, threads=threads, guidance=guidance
        )
        self.batch, self.steps = batch, len(self.pipeline.plan)
        self.conditioning: ByClass | ByText | None = manifest.conditioning
        # Only a decoder knows how large its pictures are; it is opened here, not under the first request.
        nothing = self.pipeline.pictures(np.zeros((1, *manifest.sample_shape), np.float32))
        _, self.height, self.width, channels = nothing.shape
        if channels not in (1, 3):
            self.pipeline.close()
            raise AccuQuantError(f"{bundle.folder}: samples of {channels} channels are no pictures")

    @property
    def takes(self) -> str:
        """What stands in a request's prompt: "text", "class" or "nothing"."""
        return "nothing" if self.conditioning is None else self.conditioning.kind

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def guided(self) -> bool:
        return self.pipeline.denoiser.is_guided

    def facts(self) -> dict[str, object]:
        """What clients and the page are told, beside the API's own fields."""
        known = self.conditioning
        return {
            "takes": self.takes,
            "classes": known.classes if isinstance(known, ByClass) else None,
            "examples": list(known.examples) if isinstance(known, ByText) else [],
            "size": self.size,
            "steps": self.steps,
            "guidance": self.pipeline.denoiser.guidance if self.guided else None,
            "precision": self.precision,
            "sampler": self.pipeline.bundle.manifest.sampler,
            "engine": self.pipeline.engine.name,
            "batch": self.batch,
        }

    def check_steps(self, steps: int | None) -> None:
        """Raises UnfitError unless `steps` is what the bundle's plan has."""
        if steps not in (None, self.steps):
            raise UnfitError(
                "num_inference_steps",
                f"{self.name} samples in {self.steps} steps, which its plan is made for, not in {steps}; leave "
                "num_inference_steps out, or export a bundle with --steps",
            )

    def check_size(self, size: str) -> None:
        """Raises UnfitError unless `size` is the bundle's."""
        if size not in ("auto", self.size):
            raise UnfitError("size", f"{self.name} paints {self.size}, not {size}; leave size out")

    def wishes(
        self, prompt: str, seeds: Sequence[int], unwanted: str = "", guidance: float | None = None
    ) -> list[Wish]:
        """One wish for every seed.

        Of class-conditional networks the prompt is a class's number, or empty: then every seed has a class of its own.

        Raises:
            UnfitError: a prompt or guidance that the network cannot take.
        """
        condition = self._condition(prompt)
        if unwanted and (self.takes != "text" or not self.guided):
            raise UnfitError("negative_prompt", f"{self.name} takes no negative prompt; leave it out")
        if guidance is not None:
            try:
                check_guidance(self.conditioning, guidance)
            except AccuQuantError as error:
                raise UnfitError("guidance_scale", str(error)) from None
            if guidance != 1.0 and not self.guided:
                raise UnfitError(
                    "guidance_scale",
                    f"{self.name} is served without guidance; leave guidance_scale out, or start the server with "
                    "--guidance",
                )
        return [Wish(seed, condition, unwanted, guidance) for seed in seeds]

    def _condition(self, prompt: str) -> int | str | None:
        if isinstance(self.conditioning, ByText):
            return prompt
        if not prompt.strip():
            return None
        if self.conditioning is None:
            raise UnfitError("prompt", f"{self.name} takes no prompt: it paints what its seed says; send an empty one")
        last = self.conditioning.classes - 1
        if not prompt.strip().isdecimal() or len(prompt) > 9 or int(prompt) > last:
            raise UnfitError("prompt", f"{self.name} takes a class in place of a prompt: a number from 0 to {last}")
        return int(prompt)

    def paint(self, wishes: Sequence[Wish], on_row: OnRow) -> np.ndarray:
        """Pictures, uint8 (len(wishes), H, W, C), of at most `batch` wishes."""
        pipeline, plan = self.pipeline, self.pipeline.plan

        def on_output(row: int, x: np.ndarray, output: np.ndarray) -> None:
            on_row(row, lambda seen: pipeline.pictures(plan.glance(row, x[list(seen)], output[list(seen)])))

        seeds = [wish.seed for wish in wishes]
        usual = pipeline.denoiser.guidance
        latents = pipeline.generate(
            seeds,
            classes=self._classes(wishes) if isinstance(self.conditioning, ByClass) else None,
            prompts=[str(wish.condition) for wish in wishes] if isinstance(self.conditioning, ByText) else None,
            unwanted=[wish.unwanted for wish in wishes],
            guidance=[usual if wish.guidance is None else wish.guidance for wish in wishes] if self.guided else None,
            on_output=on_output,
        )
        return pipeline.pictures(latents)

    def _classes(self, wishes: Sequence[Wish]) -> list[int]:
        assert isinstance(self.conditioning, ByClass)
        classes = self.conditioning.classes
        return [wish.seed % classes if wish.condition is None else int(wish.condition) for wish in wishes]

    def close(self) -> None:
        self.pipeline.close()
