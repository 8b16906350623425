"""Checkpoints of other families than the reference model's, from file to integer kernels."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accuquant.calibrate.scheme import QuantScheme
from accuquant.calibrate.spec import PRESETS, CalibrationSpec
from accuquant.export.build import Request, build, prepare

ADM = json.loads((Path(__file__).parents[1] / "calibrate" / "families" / "golden_adm.json").read_text())["cases"]


@pytest.mark.parametrize("name", [name for name in ADM if "resampl" in name])
def test_an_adm_checkpoint_runs_in_integers(name, formula, tmp_path):
    """Both qkv orders, several heads, both kinds of resampling: every operator, by OpenVINO's word."""
    case = ADM[name]
    state = {key: torch.empty(shape) for key, shape in case["state"].items()}
    torch.save(formula.formula_weights(state), tmp_path / "m.pt")
    (tmp_path / "m.yml").write_text(yaml.safe_dump(case["flags"]))
    asked = Request(
        checkpoint=tmp_path / "m.pt",
        out=tmp_path / "bundle",
        scheme=QuantScheme(weight_bits=4, activation_bits=8),
        spec=CalibrationSpec(**PRESETS["smoke"]),
        steps=4,
        pictures=4,
    )
    made = build(asked, prepare(asked), lambda *_: None)
    ran = made.comparison.runs_as
    assert ran.keys() == {name for name, facts in made.bundle.manifest.operators.items() if not facts.in_table}
    assert {name for name, p in ran.items() if p not in {"i8", "u8"}} == made.comparison.kept_in_float.keys()
