"""Is the graph the model? Ties may go either way, and nothing else may differ."""

import numpy as np
import onnx
import pytest
import torch
from accuquant.calibrate.layers import quantize_operators
from accuquant.calibrate.recipe import freeze
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.trace import trace
from accuquant.calibrate.trajectory import simulate
from accuquant.export.graph import save_graph, trace_float
from accuquant.export.lower import lower
from accuquant.export.verify import check_parity, sqnr, sqnr_range
from accuquant.runtime.errors import AccuQuantError
from onnx import numpy_helper
from torch import nn

SCALE, ZERO = 0.125, 128.0  # in float32 a boundary is exactly a boundary
SHAPE = (2, 4, 4)


class Net(nn.Module):
    """Adds two channels up, and gives every timestep another sign."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1, bias=False)
        nn.init.ones_(self.conv.weight)

    def forward(self, x, t):
        return self.conv(x) * torch.cos(t)[:, None, None, None]


class Case:
    """The first channel lies `beside` a boundary, in steps, the second rounds down by a quarter of one.

    Errors are -1/2 - 1/4 of a step, or, if ties go up, 1/2 - 1/4, which is 9.5 dB better.
    """

    def __init__(self, tiny, beside):
        self.network, self.plan = Net(), trace("ddim", tiny.NOISE_SCHEDULE, 4)
        scheme = QuantScheme(weight_bits=8, activation_bits=8)
        self.operators = quantize_operators(self.network, scheme, lambda name: "body")
        conv = self.operators["conv"]
        conv.inputs[0].set(torch.tensor(SCALE), torch.tensor(ZERO))
        conv.weight_quantizer.set_scale(torch.full_like(conv.weight_quantizer.scale, 1 / 64))
        self.judge = simulate(self.network, self.plan, range(2), SHAPE)
        whole = torch.randint(0, 40, self.judge.states[:, :, :1].shape)
        self.judge.states[:, :, :1] = SCALE * (2 * whole + 0.5 + beside)
        self.judge.states[:, :, 1:] = SCALE * (whole + 0.25)
        self.recipe = freeze(self.operators, scheme, {})

    def graphs(self, folder, factor, of_weights):
        """The lowered graph, one of whose scales is then changed by a factor, and its twin."""
        quantized, twin = lower(trace_float(self.network, self.operators, SHAPE), self.recipe, "cpu")
        for graph, name in ((quantized, "denoiser.onnx"), (twin, "twin.onnx")):
            save_graph(graph, folder / name)
        model = onnx.load(folder / "denoiser.onnx")
        scales = [one for one in model.graph.initializer if one.name.endswith("scale") and bool(one.dims) == of_weights]
        for one in scales:
            one.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(one) * np.float32(factor), one.name))
        assert scales, [one.name for one in model.graph.initializer]
        onnx.save(model, folder / "denoiser.onnx")
        return folder / "denoiser.onnx", folder / "twin.onnx"

    def check(self, folder, factor, of_weights=False):
        paths = self.graphs(folder, factor, of_weights)
        return check_parity(*paths, self.network, self.operators, self.plan, self.judge)


LAST_DIGIT = 1 - 2.0**-22


def test_a_graph_that_rounds_its_ties_the_other_way_is_the_model(tiny, tmp_path):
    facts = Case(tiny, 0.0).check(tmp_path, LAST_DIGIT)
    assert abs(facts["sqnr_graph_db"] - facts["sqnr_simulation_db"]) > 3, "no tie went the other way"


@pytest.mark.parametrize("beside", [0.0, 0.1])
def test_a_graph_whose_scale_is_off_is_refused(tiny, tmp_path, beside):
    with pytest.raises(AccuQuantError, match="by how ties are rounded"):
        Case(tiny, beside).check(tmp_path, 1.1, of_weights=True)


def test_without_ties_a_simulation_has_one_sqnr(tiny):
    """A tenth of a step away from its boundary a value rounds one way."""
    case = Case(tiny, 0.1)
    x = case.judge.states[0]
    t = torch.ones(len(x))

    def simulated():
        for operator in case.operators.values():
            operator.active = True
        with torch.no_grad():
            return case.network(x, t).double().numpy()[None]

    fp = (x.sum(1, keepdim=True).expand_as(x) * torch.cos(t)[:, None, None, None]).double().numpy()[None]
    lowest, highest = sqnr_range(fp, simulated(), simulated, case.operators)
    assert lowest == pytest.approx(highest, abs=1e-4)
    assert lowest == pytest.approx(sqnr(fp, simulated()), abs=1e-4)
