"""The TensorRT adapter without a GPU: its logic on a stand-in, its calls against the real libraries' names."""

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from accuquant.runtime import engines
from accuquant.runtime.engines import choose, compile_plan, open_engine, plans
from accuquant.runtime.engines.base import EngineOptions, Kernel
from accuquant.runtime.engines.onnxruntime import OnnxRuntimeEngine
from accuquant.runtime.engines.rtx_log import Compiled, parse_layers
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.pipeline import Pipeline

ENGINES = Path(engines.__file__).parent
RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def bundle(tiny, tmp_path_factory):
    return tiny.export(tmp_path_factory.mktemp("tensorrt"), weight_bits=8, target="tensorrt")


@pytest.fixture
def gpu(stand_in, bundle, tmp_path, monkeypatch):
    """A machine with a GPU and both libraries; what was asked of TensorRT's builder is in `asked`."""
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (pip install 'accuquant[rtx]')")
    cuda = stand_in.install(monkeypatch, bundle.graph("denoiser"))
    monkeypatch.setenv("ACCUQUANT_CACHE", str(tmp_path / "cache"))
    cuda.asked = []

    def compiled(request, out=None):
        cuda.asked.append(request)
        out.write_bytes(b"plan")
        return Compiled((Kernel("correlation", "Int8", ("conv_in",)),), 10, 20)

    monkeypatch.setattr(plans, "compile_plan", compiled)
    return cuda


def inputs(batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(batch, 1, 8, 8)).astype(np.float32), "t": np.full(batch, 80, np.float32)}


@pytest.mark.parametrize("name", ["tensorrt", RTX])
class TestOnTheStandIn:
    def open(self, bundle, name, batch=2):
        return open_engine(bundle.graph("denoiser"), EngineOptions(batch=batch), name, "tensorrt")

    def test_every_run_computes_what_the_graph_says_of_its_own_inputs(self, gpu, bundle, name):
        engine = self.open(bundle, name)
        standard = OnnxRuntimeEngine(bundle.graph("denoiser"), EngineOptions(batch=2, target="tensorrt"))
        assert [(p.name, p.dtype, p.shape) for p in engine.inputs] == [
            (p.name, p.dtype, p.shape) for p in standard.inputs
        ]
        for seed in range(4):
            np.testing.assert_array_equal(engine.run(inputs(seed=seed)), standard.run(inputs(seed=seed)))
        assert "Stand-in (sm89)" in engine.name
        engine.close()

    def test_from_the_third_run_on_a_graph_is_launched_where_the_library_does_not_do_it(self, gpu, bundle, name):
        engine = self.open(bundle, name)
        launched = []
        for seed in range(4):
            engine.run(inputs(seed=seed))
            launched.append(gpu.launched)
        assert launched == ([0, 0, 0, 0] if name == RTX else [0, 0, 1, 2])
        engine.close()

    def test_closing_gives_everything_back_and_may_be_done_twice(self, gpu, bundle, name):
        engine = self.open(bundle, name)
        for _ in range(3):
            engine.run(inputs())
        assert gpu.memory
        engine.close()
        engine.close()
        assert not gpu.memory
        assert not gpu.streams
        assert not gpu.graphs

    def test_a_gpu_without_room_is_named_and_left_as_it_was(self, gpu, bundle, name):
        gpu.room = 2
        with pytest.raises(AccuQuantError, match=r"CUDA: out of memory \(2\)"):
            self.open(bundle, name)
        assert not gpu.memory
        assert not gpu.streams

    def test_a_plan_is_compiled_once(self, gpu, bundle, name):
        for _ in range(2):
            self.open(bundle, name).close()
        (request,) = gpu.asked
        assert request.batches == (2, 2, 2)
        self.open(bundle, name, batch=3).close()
        assert len(gpu.asked) == 2

    def test_a_plan_that_holds_the_batch_is_taken(self, gpu, bundle, name):
        self.open(bundle, name, batch=1).close()
        made = replace(gpu.asked[0], batches=compile_plan.CompileRequest.batches)
        plans.cached_plan(made, engines.tensorrt.EngineCache(engines.tensorrt.cache_folder()))
        assert len(gpu.asked) == 2
        self.open(bundle, name, batch=5).close()
        assert len(gpu.asked) == 2

    def test_a_refused_plan_is_told_in_the_librarys_words(self, gpu, bundle, name, stand_in, monkeypatch):
        def refused(self, plan):
            self.logger.log(stand_in.ILogger.Severity.ERROR, "the version tag does not match")

        monkeypatch.setattr(stand_in.Runtime, "deserialize_cuda_engine", refused)
        with pytest.raises(AccuQuantError, match="the version tag does not match"):
            self.open(bundle, name)

    def test_a_failing_step_is_told_in_the_librarys_words(self, gpu, bundle, name, stand_in, monkeypatch):
        monkeypatch.setattr(stand_in.IExecutionContext, "execute_async_v3", lambda self, stream: False)
        engine = self.open(bundle, name)
        with pytest.raises(AccuQuantError, match=r"did not run denoiser\.onnx: no reason given"):
            engine.run(inputs())
        engine.close()

    def test_the_pipeline_samples_as_on_the_cpu(self, gpu, bundle, name):
        with Pipeline(bundle, engine=name, batch=2) as pipeline:
            sampled = pipeline.generate([5, 6, 7])
        with Pipeline(bundle, engine="onnxruntime", batch=2) as pipeline:
            np.testing.assert_array_equal(sampled, pipeline.generate([5, 6, 7]))

    def test_kernels_are_those_the_compiler_told(self, gpu, bundle, name):
        engine = self.open(bundle, name)
        assert engine.kernels() == [Kernel("correlation", "Int8", ("conv_in",))]
        engine.close()


def test_rtx_keeps_the_kernels_it_finished_on_the_device(gpu, bundle, stand_in):
    for _ in range(2):
        engine = open_engine(bundle.graph("denoiser"), EngineOptions(batch=2), RTX)
        engine.run(inputs())
        engine.close()
    assert stand_in.Runtime.log == [
        "runtime cache set", "context with whole graph",
        "runtime cache read: kernels", "runtime cache set", "context with whole graph",
    ]  # fmt: skip


def test_tensorrt_builds_for_the_gpu_it_runs_on_with_what_it_measured_before(gpu, bundle):
    open_engine(bundle.graph("denoiser"), EngineOptions(batch=2), "tensorrt").close()
    open_engine(bundle.graph("denoiser"), EngineOptions(batch=2), RTX).close()
    plain, ahead = gpu.asked
    assert plain.target == "Stand-in (sm89)"
    assert plain.timings.name == "timings.cache"
    assert ahead.target == "sm89"
    assert ahead.timings is None


def test_graphs_for_tensorrt_go_to_the_gpu_and_all_others_stay(gpu, monkeypatch):
    assert choose("auto", "tensorrt") == "tensorrt"
    assert choose("auto", "cpu") == "openvino"
    monkeypatch.delitem(sys.modules, "tensorrt")
    assert choose("auto", "tensorrt") == RTX
    monkeypatch.setattr(engines, "gpu", lambda: None)
    assert choose("auto", "tensorrt") == "openvino"
    with pytest.raises(AccuQuantError, match=r"needs an NVIDIA GPU .*accuquant\[rtx\]"):
        choose(RTX)


# -- what an inspector tells ------------------------------------------------------------------------------------------

LAYERS = """{"Layers": [
 {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [{"Name": "q", "Dimensions": [1, 32, 8, 8], %s}],
  "Outputs": [], "Metadata": "[ONNX Layer: conv_in.input0.quantize]\\u001e[ONNX Layer: conv_in]"},
 {"Name": "signal", "LayerType": "signal", "Inputs": [], "Outputs": []}
], "Bindings": ["x"]}"""


@pytest.mark.parametrize(
    ("said", "type_"),
    [
        ('"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"', "Int8"),
        ('"Format/Datatype": "Row major linear FP32"', "Float"),
        ('"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"', "Half"),
        ('"Datatype": "FP8"', "FP8"),
        ('"Datatype": "BFloat16"', "BFloat16"),
    ],
)
def test_an_inspectors_layers_are_read(said, type_):
    kernel, last = parse_layers(LAYERS.replace("%s", said)).kernels
    assert kernel == Kernel("CaskConvolution", type_, ("conv_in.input0.quantize", "conv_in"))
    assert last.precision == "-"


@pytest.mark.parametrize(
    "text", ["", "{}", '{"Layers": ["conv_in"]}', '{"Layers": [{"LayerType": "x", "Inputs": [{}]}]}']
)
def test_layers_without_detail_are_an_error(text):
    with pytest.raises(AccuQuantError, match="tells no layers"):
        parse_layers(text)


# -- names -----------------------------------------------------------------------------------------------------------

# What compile_plan calls on which class; a name it no longer calls fails the test, so the list cannot grow stale.
BUILDING = {
    "Builder": ("create_network", "create_builder_config", "create_optimization_profile", "build_serialized_network"),
    "OnnxParser": ("parse_from_file", "num_errors", "get_error"),
    "ParserError": ("node_name", "node_operator", "desc"),
    "INetworkDefinition": ("num_inputs", "get_input"),
    "ITensor": ("name", "shape"),
    "IOptimizationProfile": ("set_shape",),
    "IBuilderConfig": ("profiling_verbosity", "add_optimization_profile"),
}
TIMING = {
    "IBuilderConfig": ("create_timing_cache", "set_timing_cache", "get_timing_cache"),
    "ITimingCache": ("combine", "serialize"),
    "ICudaEngine": ("create_engine_inspector",),
    "EngineInspector": ("get_engine_information",),
    "LayerInformationFormat": ("JSON",),
}
AHEAD = {
    "IBuilderConfig": ("num_compute_capabilities", "set_compute_capability"),
    "ComputeCapability": tuple(target.upper() for target in compile_plan.TARGETS if target != "default"),
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
}
EVERYWHERE = {
    "ILogger": ("log", "Severity"),
    "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
    "ProfilingVerbosity": ("DETAILED",),
    "TensorIOMode": ("INPUT", "OUTPUT"),
    "nptype": (),
}

# Libraries that TensorRT's bindings want to be there when they are imported; nothing in them is called.
LIBRARIES = {
    "libnvinfer.so.11": (
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry", "getPluginRegistry",
    ),
    "libnvinfer_plugin.so.11": ("initLibNvInferPlugins",),
    "libnvonnxparser.so.11": (
        "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getNvOnnxParserVersion",
    ),
}  # fmt: skip

MISSING = """
import importlib, json, sys
trt = importlib.import_module(sys.argv[1])
wanted = json.loads(sys.argv[2])
found = {c: getattr(trt, c, None) for c in wanted}
print(json.dumps([c if found[c] is None else f"{c}.{n}" for c in wanted for n in ["", *wanted[c]]
                  if found[c] is None or n and not hasattr(found[c], n)]))
"""


def names(stand_in, flavour):
    """Every name that the adapter and the compiler's child use, by class, as the stand-in has them."""
    classes = stand_in.CLASSES + (stand_in.RTX_ONLY if flavour == "tensorrt_rtx" else ())
    used = {
        c.__name__: [n for n in vars(c) if not n.startswith("_") and n not in ("graph", "graphs", "gpu", "log")]
        for c in classes
    }
    if flavour == "tensorrt":
        used["ICudaEngine"] = [n for n in used["ICudaEngine"] if n != "create_runtime_config"]
    parts = (BUILDING, EVERYWHERE, AHEAD if flavour == "tensorrt_rtx" else TIMING)
    for part in parts:
        for owner, members in part.items():
            used.setdefault(owner, []).extend(members)
    return used


def missing(module, wanted, **environment):
    import json
    import os

    done = subprocess.run(
        [sys.executable, "-c", MISSING, module, json.dumps(wanted)],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_rtx_has_every_name_that_is_used(stand_in):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed (pip install 'accuquant[rtx]')")
    assert missing("tensorrt_rtx", names(stand_in, "tensorrt_rtx")) == []
    assert missing("tensorrt_rtx", {"Runtime": ["no_such_call"], "NoClass": []}) == ["Runtime.no_such_call", "NoClass"]


def test_tensorrt_11_has_every_name_that_is_used(stand_in, tmp_path):
    """Its bindings import with libraries that hold nothing but the symbols' names."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("TensorRT's bindings are not installed (pip install tensorrt-cu13-bindings)")
    compiler = shutil.which("cc") or pytest.skip("no C compiler to make stand-in libraries with")
    for library, symbols in LIBRARIES.items():
        source = tmp_path / f"{library}.c"
        source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in symbols))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / library), str(source)], check=True)
    wanted = names(stand_in, "tensorrt")
    assert missing("tensorrt_bindings", wanted, LD_LIBRARY_PATH=str(tmp_path)) == []
    of_rtx = missing(
        "tensorrt_bindings", {"IBuilderConfig": ["num_compute_capabilities"]}, LD_LIBRARY_PATH=str(tmp_path)
    )
    assert of_rtx, "it has compute capabilities now: one code path could serve both"


def test_cuda_has_every_name_that_is_used(stand_in):
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    used = {n for n in vars(stand_in.Cuda) if n.startswith("cuda")}
    assert used == set(re.findall(r"self\._cuda\.(cuda\w+)", (ENGINES / "cuda.py").read_text()))
    for name in used:
        real, ours = getattr(runtime, name), getattr(stand_in.Cuda, name)
        for member in vars(ours) if not callable(ours) else ():
            assert hasattr(real, member)


def test_no_name_is_listed_that_is_not_used(stand_in):
    text = "".join((ENGINES / f"{name}.py").read_text() for name in ("tensorrt", "compile_plan"))
    for part in (BUILDING, TIMING, AHEAD, EVERYWHERE):
        for owner, members in part.items():
            for name in members if owner != "ComputeCapability" else ():
                assert re.search(rf"\b{name}\b", text), f"{owner}.{name}"
