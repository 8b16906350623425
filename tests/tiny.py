"""Networks and runs small enough for a test, shared by fixtures and by the scripts that tests start and kill."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import onnx_ir as ir
import torch
import torch.nn.functional as F
import yaml
from accuquant.calibrate.families.adm_unet import timestep_embedding
from accuquant.calibrate.families.ddim import role_of
from accuquant.calibrate.families.ddim_unet import UNet, UNetConfig
from accuquant.calibrate.families.dit_net import DiT, DitConfig
from accuquant.calibrate.journal import Journal
from accuquant.calibrate.layers import MatMul, QuantizedOperator, quantize_operators
from accuquant.calibrate.model import DiffusionModel
from accuquant.calibrate.optimize import Outcome, Report, calibrate
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import Trajectory, simulate
from accuquant.export.build import Request, build
from accuquant.export.build import prepare as prepare_request
from accuquant.export.graph import save_graph, trace_float
from accuquant.export.verify import check_graph
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.plan import SamplingPlan
from torch import Tensor, nn

# 32 channels are the least that 32 norm groups allow.
CONFIG = UNetConfig(
    resolution=8, in_channels=1, out_ch=1, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,)
)
SHAPE = (1, 8, 8)

# A hundred training steps: alpha-bar ends at 0.36, so an untrained network's chain stays within a few units.
NOISE_SCHEDULE = {
    "num_train_timesteps": 100,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}

YAML = {
    "data": {"image_size": 8, "channels": 1},
    "diffusion": {
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_diffusion_timesteps": 100,
    },
}


def unet(seed: int = 0, config: UNetConfig = CONFIG) -> UNet:
    """A U-Net with weights of unit gain, so that its output is about as large as noise."""
    network = UNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim > 1:
                p.normal_(0.0, p[0].numel() ** -0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                p.normal_(1.0, 0.2, generator=generator)
            else:
                p.normal_(0.0, 0.1, generator=generator)
    return network.eval().requires_grad_(False)


def on_onnxruntime(graph: ir.Model, path: Path, inputs: dict[str, Tensor]) -> Tensor:
    """What a graph, written, checked and read again, makes of inputs (B, ...) by name.

    B other than the 2 of the exporter's example shows whether the graph goes for any batch.
    """
    save_graph(graph, path)
    check_graph(path)
    engine = OnnxRuntimeEngine(path, EngineOptions(batch=len(inputs["x"])))
    return torch.from_numpy(engine.run({name: value.numpy() for name, value in inputs.items()}))


@lru_cache
def float_graph() -> ir.Model:
    """The exported graph of `unet()`, not to be changed. One for all tests: the exporter is slow."""
    network = unet()
    return trace_float(
        network, quantize_operators(network, QuantScheme(weight_bits=8, activation_bits=8), role_of), SHAPE
    )


class Every(nn.Module):
    """One of every operator that is quantized, as networks have them, in the least that a compiler takes for real.

    Convolutions: of the latent, in groups, with a stride behind a Pad, of one point, behind a concatenation, last.
    Linear layers: of the timestep, of tokens, of what is pooled. And both products of an attention of two heads.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.time, self.pooled = nn.Linear(width, width), nn.Linear(width, width)
        self.grouped, self.down = nn.Conv2d(width, width, 3, padding=1, groups=4), nn.Conv2d(width, width, 3, stride=2)
        self.norm = nn.GroupNorm(8, width)
        self.q, self.kv = nn.Conv2d(width, width, 1), nn.Linear(width, 2 * width)
        self.qk, self.av = MatMul(), MatMul()
        self.joined = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        early = self.first(x)
        h = early + self.time(timestep_embedding(t, early.shape[1]))[:, :, None, None]
        h = self.down(F.pad(F.silu(self.norm(self.grouped(h))), (0, 1, 0, 1)))
        tokens = h.flatten(2).transpose(1, 2)
        q, k, v = (
            part.reshape(*part.shape[:2], 2, -1).transpose(1, 2)
            for part in (self.q(h).flatten(2).transpose(1, 2), *self.kv(tokens).chunk(2, dim=2))
        )
        seen = self.av(torch.softmax(self.qk(q, k.transpose(2, 3)) * q.shape[3] ** -0.5, -1), v)
        h = h + seen.transpose(2, 3).reshape(h.shape) + self.pooled(h.mean((2, 3)))[:, :, None, None]
        return self.last(F.silu(self.joined(torch.cat([F.interpolate(h, scale_factor=2.0), early], 1))))


EVERY_SHAPE = (3, 8, 8)


def every() -> DiffusionModel:
    """`Every` with seeded weights; the products alone are attention's, and no operator is left out by `uniform`."""
    torch.manual_seed(0)
    roles = {"first": "first", "last": "last", "time": "time", "qk": "attention", "av": "attention"}
    return DiffusionModel(
        family="every", found="every operator", network=Every().eval().requires_grad_(False), sample_shape=EVERY_SHAPE,
        noise_schedule=NOISE_SCHEDULE, role_of=lambda name: roles.get(name, "body"), block_of=lambda name: name,
        default_sampler="ddim", default_steps=4,
    )  # fmt: skip


@lru_cache
def every_graph() -> ir.Model:
    """The exported graph of `every()`, not to be changed."""
    model = every()
    scheme = QuantScheme(weight_bits=8, activation_bits=8, policy="uniform")
    return trace_float(model.network, quantize_operators(model.network, scheme, model.role_of), EVERY_SHAPE)


class Toy(nn.Module):
    """A smooth convolutional denoiser of (x, t) that also runs in float64; with `looks=False` it ignores x."""

    def __init__(self, seed: int, channels: int = 2, looks: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 6, 3, padding=1)
        self.time = nn.Linear(1, 6)
        self.second = nn.Conv2d(6, channels, 3, padding=1)
        self.looks = looks
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0.0, 0.4, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t.to(x.dtype)[:, None] / 100)[:, :, None, None]
        return self.second(torch.tanh(self.first(x if self.looks else torch.ones_like(x)) + time))


def save_checkpoint(folder: Path, network: nn.Module, name: str = "tiny.ckpt") -> Path:
    """The network's flat state dict in torch's format, its YAML beside it."""
    path = folder / name
    torch.save(network.state_dict(), path)
    path.with_suffix(".yml").write_text(yaml.safe_dump(YAML))
    return path


def export(folder: Path, weight_bits: int = 4, *, time_table: bool = True, target: str = "cpu") -> Bundle:
    """The U-Net as a bundle, six steps, made as `accuquant-export --preset smoke` does."""
    request = Request(
        checkpoint=save_checkpoint(folder, unet()),
        out=folder / "bundle",
        scheme=QuantScheme(weight_bits=weight_bits, activation_bits=8, target=target),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        steps=6,
        pictures=8,
        time_table=time_table,
    )
    return build(request, prepare_request(request), lambda *_: None).bundle


def save_class_checkpoint(folder: Path, classes: int) -> Path:
    """A DiT of 8x8 with weights of unit gain, so that its predictions are about as large as noise."""
    network = DiT(DitConfig(size=8, patch=2, channels=1, width=32, depth=2, heads=2, hidden=64, classes=classes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in network.named_parameters():
            gain = 0.3 if name.startswith(("final_layer", "blocks")) and "adaLN" in name else 1.0
            p.normal_(0.0, gain * p[0].numel() ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
        network.final_layer.linear.weight.mul_(0.3)  # untrained and guided, it would make latents without bound
    torch.save(network.state_dict(), folder / "classes.pt")
    (folder / "classes.yml").write_text("num_heads: 2")
    return folder / "classes.pt"


def export_classes(folder: Path, classes: int = 4, target: str = "cpu") -> Bundle:
    """That DiT as a W8A8 bundle of four steps and guidance 2.5."""
    request = Request(
        checkpoint=save_class_checkpoint(folder, classes),
        out=folder / "bundle",
        scheme=QuantScheme(weight_bits=8, activation_bits=8, target=target),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        steps=4,
        pictures=8,
        guidance=2.5,
    )
    return build(request, prepare_request(request), lambda *_: None).bundle


@dataclass
class Run:
    """A calibration ready to start."""

    network: UNet
    operators: dict[str, QuantizedOperator]
    plan: SamplingPlan
    teacher: Trajectory
    judge: Trajectory
    spec: CalibrationSpec

    def start(self, folder: Path, *, resume: bool = False, report: Report | None = None) -> Outcome:
        journal = Journal(folder, {"spec": self.spec.model_dump()})
        return calibrate(
            self.network,
            self.operators,
            self.plan,
            self.teacher,
            self.judge,
            self.spec,
            journal,
            resume=resume,
            report=report,
        )

    def snapshot(self, folder: Path) -> dict[str, Tensor]:
        """The last state written down, with the optimizer's."""
        read = Journal(folder, {"spec": self.spec.model_dump()}).read()
        assert read is not None
        return read.tensors

    def learned(self) -> dict[str, Tensor]:
        """Everything calibration may have changed."""
        state = {}
        for name, operator in self.operators.items():
            for i, q in enumerate(operator.inputs):
                state[f"{name}/{i}/log_scale"] = q.log_scale.detach()
                state[f"{name}/{i}/zero_point"] = q.zero_point.detach()
            if operator.weight_quantizer is not None:
                state[f"{name}/codes"] = operator.weight_quantizer.codes()
                state[f"{name}/scale"] = operator.weight_quantizer.scale.detach()
                if operator.weight_quantizer.choice is not None:
                    state[f"{name}/choice"] = operator.weight_quantizer.choice.detach()
        return state


# The rounding's rate is below the default's: random weights of so few trajectories overfit at once.
SMALL = {
    "initialisation": "min-max",
    "compensate": "never",
    "group": 2,
    "iterations": 8,
    "batch": 4,
    "trajectories": 8,
    "held_out": 3,
    "checks": 4,
    "zero_point_rate": 0.01,
    "scale_rate": 3e-4,  # a handful of iterations wants larger steps than the defaults' hundreds
    "weight_scale_rate": 2e-4,
    "rounding_rate": 5e-3,
}


@lru_cache
def _run(sampler: str, steps: int, first: int, count: int) -> Trajectory:
    return simulate(unet(), trace(sampler, NOISE_SCHEDULE, steps), range(first, first + count), SHAPE)


def prepare(
    weight_bits: int = 4, activation_bits: int = 8, sampler: str = "ddim", steps: int = 4, **settings: object
) -> Run:
    """The tiny U-Net, quantized and not yet calibrated, with its teacher's trajectories."""
    spec = CalibrationSpec.model_validate(SMALL | settings)
    network = unet()
    plan = trace(sampler, NOISE_SCHEDULE, steps)
    teacher = _run(sampler, steps, 0, spec.trajectories)
    judge = _run(sampler, steps, 1000, spec.held_out)
    scheme = QuantScheme(weight_bits=weight_bits, activation_bits=activation_bits)
    operators = quantize_operators(network, scheme, role_of)
    return Run(network, operators, plan, teacher, judge, spec)
