"""Folders of diffusers' transformers the whole way: checkpoint, calibration, bundle, pictures under rows of a file."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from accuquant.calibrate.layers import quantization
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.calibrate.trajectory import simulate
from accuquant.export.build import build, prepare
from accuquant.export.verify import sqnr
from accuquant.runtime import cli_sample
from accuquant.runtime.engines.saturation import saturates
from accuquant.runtime.inspection import LOW_BIT
from accuquant.runtime.pipeline import Pipeline

TOLERANCE = 1.0  # dB between whole runs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_a_folder_becomes_pictures_in_integers(name, folders, formula, tmp_path, monkeypatch):
    """`build` itself raises where a layer, in the graph or on OpenVINO, is not its simulation."""
    scheme = QuantScheme(weight_bits=4, activation_bits=8, reserve=0)  # 4 bits saturate on no CPU
    asked = folders.request(name, tmp_path, formula, scheme, guidance=2.0)
    asked = replace(asked, spec=CalibrationSpec(**PRESETS["smoke"]), steps=4)
    prepared = prepare(asked)
    made = build(asked, prepared, lambda *_: None)
    known, ran = made.bundle.manifest.operators, made.comparison.runs_as
    roles = [facts.role for facts in known.values()]
    ends = {"first", "last"}
    assert {role: roles.count(role) for role in roles} == {
        role: count for role, count in folders.FOLDERS[name].roles.items() if role not in ends
    }
    assert ran.keys() == {name for name, facts in known.items() if not facts.in_table}
    assert any(facts.in_table for facts in known.values())  # the timestep's own embedding
    in_float = {name for name, precision in ran.items() if precision not in LOW_BIT}
    assert not in_float or (saturates() and {known[name].kind for name in in_float} == {"matmul"})

    model, seeds = prepared.model, [0, 1]
    arguments = (prepared.network, prepared.plan, seeds, model.sample_shape, model.condition(seeds))
    sides = []
    for active in (False, True):
        with quantization(prepared.operators, active):
            sides.append(simulate(*arguments).states[-1].numpy().astype(np.float64))
    with Pipeline(made.bundle, batch=2) as pipeline:
        latents = pipeline.generate(seeds)
    assert sqnr(sides[0], latents) > sqnr(*sides) - TOLERANCE

    given = ["--conditions", str(asked.conditions)] if asked.conditions else ["--class", "0,1"]
    command = ["x", str(made.bundle.folder), "-n", "2", *given, "--out", str(tmp_path / "made.npy")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as done:
        cli_sample.main()
    assert done.value.code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "made.npy"), latents)
