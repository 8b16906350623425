"""`accuquant-inspect`: precision asked and got, and an exit code that a script can use."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accuquant.runtime.bundle import OperatorFacts
from accuquant.runtime.engines.base import Kernel
from accuquant.runtime.engines.rtx_log import Compiled
from accuquant.runtime.engines.saturation import saturates
from accuquant.runtime.inspection import judge, operator_precisions


def run(command, *arguments):
    return subprocess.run(
        [sys.executable, "-c", f"from accuquant.runtime.cli_{command} import main; main()", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def inspect(*arguments):
    return run("inspect", *arguments)


def facts(kind="conv"):
    return OperatorFacts(
        kind=kind, role="body", weight_bits=4, weight_container="int4", inputs=("uint8",), parameters=10, stored_bytes=5
    )


def test_a_verdict_says_why_an_operator_did_not_get_what_it_asked():
    operators = {name: facts() for name in ("good", "float", "gone")}
    got = {"good": "u8", "float": "f32"}
    good, left, gone = judge(operators, got)
    assert (good.asked, good.stored, good.got, good.why) == ("int4 weights, uint8", "int4", "u8", "")
    assert (left.got, "unfused" in left.why) == ("f32", True)
    assert (gone.got, "no kernel of that name" in gone.why) == ("not reported", True)
    assert [v.why for v in judge(operators, got, {"float": "as it likes"})][:2] == ["", "as it likes"]


def test_the_kernel_that_multiplies_is_believed_and_not_the_one_that_scales_its_result():
    """Both bear the operator's name on TensorRT-RTX; on other engines names may be derived."""
    kernels = [
        Kernel("correlation", "Int8", ("conv1.input0.dequantize", "conv1")),
        Kernel("kgen", "Float", ("conv1.input0.dequantize", "conv1", "act")),
        Kernel("Convolution", "u8", ("conv2/WithoutBiases",)),
        Kernel("Subgraph", "f32", ("softmax",)),
    ]
    running = SimpleNamespace(kernels=lambda: kernels, kept_in_float={})
    got = operator_precisions(running, ["conv1", "conv2", "softmax", "gone"])
    assert got == {"conv1": "Int8", "conv2": "u8", "softmax": "f32"}


def test_what_was_kept_in_float_is_in_float_though_its_kernel_bears_another_name():
    """OpenVINO 2026.4 without AVX-512: a linear layer that a Reshape follows is told of under the Reshape's name."""
    kernels = [Kernel("FullyConnected", "f32", ("behind",)), Kernel("Convolution", "i8", ("conv",))]
    running = SimpleNamespace(kernels=lambda: kernels, kept_in_float={"linear": "it saturates", "conv": "it saturates"})
    assert operator_precisions(running, ["conv", "linear", "gone"]) == {"conv": "i8", "linear": "f32"}


def test_of_a_layer_that_was_taken_apart_every_part_tells():
    kernels = (
        Kernel("gemm", "Int8", ("qkv",)),
        Kernel("gemm", "Half", ("qkv/1",)),
        Kernel("gemm", "Int8", ("qkv/2",)),
        *(Kernel("gemm", "Int8", (name,)) for name in ("out", "out/1", "out/3")),
    )
    running = SimpleNamespace(kernels=lambda: kernels, kept_in_float={})
    asked = {name: facts("linear") for name in ("qkv", "out")}
    for got in (operator_precisions(running, asked), Compiled(kernels, 0, 0).precisions(asked)):
        assert got == {"qkv": "Int8 and Half", "out": "Int8"}
        assert ["in float" in verdict.why for verdict in judge(asked, got)] == [True, False]


def test_all_operators_of_a_bundle_run_in_integers_where_these_do_not_saturate(tiny_bundle, tmp_path):
    done = inspect(tiny_bundle.folder, "--engine", "openvino", "--out", tmp_path / "inspect.json")
    assert done.returncode == (2 if saturates() else 0), done.stdout + done.stderr
    assert ("no VNNI" in done.stdout) == saturates()
    count = len(tiny_bundle.manifest.operators)
    assert f"{count} operators at W4A8" in done.stdout
    (result,) = json.loads((tmp_path / "inspect.json").read_text())["results"]
    assert len(result["verdicts"]) == count
    every = inspect(tiny_bundle.folder, "--engine", "openvino", "--all")
    assert all(name in every.stdout for name in tiny_bundle.manifest.operators)
    assert tiny_bundle.manifest.in_float == dict.fromkeys(["conv_in", "conv_out"]) | {
        "conv_in": "policy standard: first operators stay in float",
        "conv_out": "policy standard: last operators stay in float",
    }
    assert "conv_out" in every.stdout
    assert "2 more were left in float: 2 f32" in done.stdout
    assert [left["got"] for left in result["in_float"]] == ["f32", "f32"]


def test_an_engine_the_bundle_was_not_made_for_is_seen_to_multiply_in_float(tiny_bundle):
    done = inspect(tiny_bundle.folder, "--engine", "onnxruntime")
    assert done.returncode == 2
    assert "f32" in done.stdout
    assert "multiplies in float" in done.stdout


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("bits", "gpus", "got", "left"),
    [
        ("4/8", ["sm86", "sm120"], "49 operators at W4A8: 39 Int8, 10 looked up", "10 more were left in float: "),
        ("fp8", ["sm89"], "57 operators at FP8: 47 FP8, 10 looked up", "2 more were left in float: 2 Half"),
        ("4/16", ["sm86"], "49 operators at W4A16: 39 Half, 10 looked up", "10 more were left in float: "),
        ("fp16", ["sm86"], "0 operators at FP16: ", "left in float: 49 Half"),
        ("bf16", ["sm89"], "0 operators at BF16: ", "left in float: 49 BFloat16"),
    ],
)
def test_a_bundle_for_tensorrt_compiles_and_samples_here_too(tiny, tmp_path, bits, gpus, got, left):
    """Exported whole, sampled and compared on this CPU, compiled for GPUs."""
    from accuquant.calibrate.scheme import QuantScheme, parse_precision
    from accuquant.calibrate.spec import PRESETS, CalibrationSpec
    from accuquant.export.build import Request, build, prepare

    asked = Request(
        checkpoint=tiny.save_checkpoint(tmp_path, tiny.unet()),
        out=tmp_path / "bundle",
        scheme=QuantScheme(**{"target": "tensorrt", "rest": "float16"} | parse_precision(bits)),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        steps=4,
        pictures=4,
    )
    made = build(asked, prepare(asked), lambda *_: None)
    assert made.comparison.psnr.mean() > 15
    emulated = "bfloat16 emulated" in made.comparison.engine
    assert emulated == (bits == "bf16")
    if emulated:  # the bundle holds the graph itself, which nothing runs here
        done = inspect(made.bundle.folder, "--engine", "openvino")
        assert "computes in bfloat16" in done.stderr
    done = inspect(made.bundle.folder, "--gpu", ",".join(gpus))
    assert done.returncode == 0, done.stdout + done.stderr
    for gpu in gpus:
        assert f"TensorRT-RTX for {gpu}: {got}" in done.stdout
    assert done.stdout.count(left) == len(gpus), done.stdout
    assert "compiled ahead of time, not run" in done.stdout
    # The plans are kept: nothing is compiled a second time, but another batch is another plan.
    kept = run("build", made.bundle.folder, "--gpu", ",".join(gpus), "--out", tmp_path / "plans")
    assert kept.stdout.count("from the cache") == len(gpus), kept.stdout + kept.stderr
    assert sorted(p.name for p in (tmp_path / "plans").iterdir()) == sorted(f"bundle.{gpu}.plan" for gpu in gpus)
    if bits == "fp16":
        other = run("build", made.bundle.folder, "--gpu", gpus[0], "--batch", "1,2,4")
        assert "shapes: batch 1 to 16, best 8, not batch 1 to 4, best 2" in other.stdout


@pytest.mark.parametrize("batch", ["8", "4,2,1", "0,1,2", "a,b,c"])
def test_batches_that_make_no_sense_are_refused(tiny_bundle, batch):
    done = run("build", tiny_bundle.folder, "--batch", batch)
    assert done.returncode == 1
    assert "write three rising numbers" in done.stderr


@pytest.mark.usefixtures("rtx")
def test_a_bundle_for_cpus_is_refused_by_the_compiler_in_its_own_words(tiny_bundle):
    done = inspect(tiny_bundle.folder, "--gpu", "sm89")
    assert done.returncode == 1
    assert "TensorRT-RTX refused it for sm89: node " in done.stderr
    assert "Traceback" not in done.stderr
