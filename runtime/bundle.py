"""The bundle: a folder that holds everything a sampler needs, described by `manifest.json`.

    manifest.json  plan.json  denoiser.onnx  twin.onnx  recipe.json  recipe.safetensors  report/

`denoiser.onnx` is the quantized network, `twin.onnx` its full-precision twin; text-to-image models have
`text_encoder.onnx` with `tokenizer.json`, latent ones `decoder.onnx` besides, and networks that take rows made
elsewhere `conditions.safetensors` (rows.py). Engines are not part of it: they are compiled from the graphs on the
machine that runs them.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from .errors import AccuQuantError
from .files import sha256, write_text
from .onnx_files import external_files
from .plan import SamplingPlan, one_line

NetworkName = Literal["denoiser", "twin", "text_encoder", "decoder"]
Words = Annotated[str, AfterValidator(one_line)]  # what is printed
MANIFEST = "manifest.json"
PLAN = "plan.json"
TOKENIZER = "tokenizer.json"
CONDITIONS = "conditions.safetensors"
IN_TABLE = "table"  # the container of weights whose results are stored for every timestep instead


class NetworkFile(BaseModel):
    """A graph of the bundle: its files' names (graph first, then external data) and their digests."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str] = Field(min_length=1)

    @property
    def graph(self) -> str:
        return next(iter(self.files))


class OperatorFacts(BaseModel):
    """What the manifest says of one quantized operator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["conv", "linear", "matmul"]
    role: str
    weight_bits: int | None
    weight_container: str
    inputs: tuple[str, ...]
    output: str | None = None  # None: it writes floats
    parameters: int
    stored_bytes: int

    @property
    def in_table(self) -> bool:
        """Is it computed no more, but looked up by the timestep?"""
        return self.weight_container == IN_TABLE


class ByClass(BaseModel):
    """A network that takes a class beside latent and timestep, int64 (B,) under the graph's name for it.

    `null` is the class that stands for none, which guidance needs; `guidance` is what calibration simulated, 1: none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["class"] = "class"
    input: str = "y"
    classes: int = Field(gt=0, lt=2**31)
    null: int | None = Field(default=None, ge=0, lt=2**31)
    guidance: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        return (self.input,)

    @property
    def can_be_guided(self) -> bool:
        return self.null is not None


class ByText(BaseModel):
    """A network that takes what a text encoder makes of a text, under one or several names; the empty text is none.

    Each is float32 (B, ...), in the order of the encoder's outputs: (B, tokens, width), say, and pooled (B, width).
    With `zeros_for_none` guidance holds against zeros, not against the encoded empty text, where nothing is unwanted.
    `examples` are what it is sampled under where nobody chose: the prompts of calibration and of the report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["text"] = "text"
    inputs: tuple[str, ...] = Field(default=("context",), min_length=1)
    examples: tuple[str, ...] = Field(min_length=1)
    guidance: float = 1.0
    zeros_for_none: bool = False

    @model_validator(mode="before")
    @classmethod
    def _as_once_written(cls, values: Any) -> Any:
        """Bundles whose encoders have one output may call it `input`."""
        if isinstance(values, dict) and "input" in values:
            values = dict(values)
            values["inputs"] = (values.pop("input"),)
        return values

    @property
    def names(self) -> tuple[str, ...]:
        return self.inputs

    @property
    def can_be_guided(self) -> bool:
        return True


class ByRows(BaseModel):
    """A network that takes rows made elsewhere, such as embeddings of a text encoder too large to be bundled.

    `shapes` has a row's shape by the name of its input, float32 all; None where a family takes any length. The bundle's
    `conditions.safetensors` holds examples, which it is sampled under where nobody chose, and where there is an `empty`
    row of each, which stands for none and which guidance needs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["rows"] = "rows"
    shapes: dict[str, tuple[int | None, ...]] = Field(min_length=1)
    empty: bool = False
    guidance: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def can_be_guided(self) -> bool:
        return self.empty


Conditioning = Annotated[ByClass | ByText | ByRows, Field(discriminator="kind")]


class Manifest(BaseModel):
    """The contract between export and runtime. `files` are all that belong to no network: names and digests.

    `constants` is what the graphs hold of what the network is told besides, the same for every picture, by the names
    that diffusers' networks have for it: a picture's sizes, or a distilled guidance.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[3] = 3
    family: Words
    found: Words
    sample_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    conditioning: Conditioning | None = None
    constants: dict[str, tuple[float, ...]] = {}
    scheme: Words
    target: Words
    policy: Words
    sampler: Words
    timesteps: Literal["any", "plan"] = "any"  # which ones the graphs know
    networks: dict[NetworkName, NetworkFile]
    files: dict[str, str]
    operators: dict[str, OperatorFacts]
    in_float: dict[str, str] = {}  # operators that were left so, and why
    provenance: dict[str, Any]
    quality: dict[str, Any]


class Bundle:
    """A bundle on disk, checked on opening: manifest understood, files present and unchanged, none outside the folder.

    Raises:
        AccuQuantError: says which of that does not hold, and names the file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / MANIFEST
        if not path.is_file():
            raise AccuQuantError(f"{folder} is not a bundle: it has no manifest.json; make one with accuquant-export")
        try:
            self.manifest = Manifest.model_validate_json(path.read_text("utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            raise AccuQuantError(f"{path} is not a manifest this version understands: {error}") from error
        for name, digest in self.digests.items():
            _check_file(folder, name, digest)
        # All that is read later must have been vouched for.
        known = self.manifest.conditioning
        needed = {PLAN} | (
            {TOKENIZER} if isinstance(known, ByText) or "text_encoder" in self.manifest.networks else set()
        )
        needed |= {CONDITIONS} if isinstance(known, ByRows) else set()
        if needed - self.digests.keys():
            raise AccuQuantError(f"{path} does not describe {', '.join(needed - self.digests.keys())}; export it again")
        for network in self.manifest.networks.values():
            _check_graph(folder, network)
        self.plan = SamplingPlan.load(folder / PLAN)

    @property
    def digests(self) -> dict[str, str]:
        """Of every file that the manifest describes, by its name in the folder."""
        return _digests(self.manifest.networks) | self.manifest.files

    def graph(self, network: NetworkName) -> Path:
        """Path of a network's graph.

        Raises:
            AccuQuantError: the bundle does not hold that network.
        """
        if network not in self.manifest.networks:
            held = ", ".join(self.manifest.networks)
            raise AccuQuantError(f"{self.folder} holds no {network} (it holds {held}); export it again")
        return self.folder / self.manifest.networks[network].graph

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def conditions(self) -> Path:
        return self.folder / CONDITIONS

    def weight_bytes(self, network: NetworkName) -> int:
        """Size on disk of a network's graph and data."""
        held = self.manifest.networks[network]
        return sum((self.folder / name).stat().st_size for name in held.files if name.startswith(held.graph))


def describe(folder: Path, graphs: Mapping[NetworkName, str]) -> dict[NetworkName, NetworkFile]:
    """NetworkFile of each graph just written into `folder`, with external data and what belongs to it."""
    described: dict[NetworkName, NetworkFile] = {}
    for network, graph in graphs.items():
        names = [graph] + [p.name for p in sorted(folder.glob(graph + ".data"))]
        names += [TOKENIZER] if network == "text_encoder" else []
        names += [CONDITIONS] if network == "denoiser" and (folder / CONDITIONS).exists() else []
        described[network] = NetworkFile(files={name: sha256(folder / name) for name in names})
    return described


def describe_rest(folder: Path, networks: Mapping[NetworkName, NetworkFile]) -> dict[str, str]:
    """Digests of all files in `folder` that belong to no network, for `Manifest.files`."""
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name: sha256(folder / name) for name in sorted(names - {MANIFEST} - _digests(networks).keys())}


def save_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")


def _digests(networks: Mapping[NetworkName, NetworkFile]) -> dict[str, str]:
    return {name: digest for network in networks.values() for name, digest in network.files.items()}


def _check_file(folder: Path, name: str, digest: str) -> None:
    path, inside = folder / name, PurePosixPath(name)
    # Neither another folder's file, nor the folder itself, nor a name that means something else on another system.
    if inside.is_absolute() or {"..", "."} & set(name.split("/")) or not inside.parts or set(name) & set("\\:\0"):
        raise AccuQuantError(f"{folder}: the manifest names {name!r}, which is not a file of the bundle")
    try:
        present = path.is_file()
    except OSError:  # no name that this system could have
        present = False
    if not present:
        raise AccuQuantError(f"{path} is missing; copy the bundle again, whole")
    if sha256(path) != digest:
        raise AccuQuantError(f"{path} is not the file the manifest describes (its digest differs); copy it again")


def _check_graph(folder: Path, network: NetworkFile) -> None:
    strange = external_files(folder / network.graph) - network.files.keys()
    if strange:
        raise AccuQuantError(
            f"{folder / network.graph} reads {', '.join(map(repr, sorted(strange)))}, which the manifest does not name "
            "as part of it; do not use this bundle"
        )
