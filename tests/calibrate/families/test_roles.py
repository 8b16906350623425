"""Roles of operators: every family's patterns have operators, or are said to be such as need none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accuquant.calibrate.families import FAMILIES, load_model
from accuquant.calibrate.model import quantize
from accuquant.calibrate.roles import Roles
from accuquant.calibrate.scheme import QuantScheme
from accuquant.runtime.errors import AccuQuantError

HERE = Path(__file__).parent
INTEGER = QuantScheme(weight_bits=8, activation_bits=8, policy="integer")
# Whose files are made in their own tests, which look at their roles too.
ELSEWHERE = {"consistency", "sd_folder"}


@pytest.fixture
def models(tiny, formula, stable, stable_xl, folders, tmp_path):
    """`models(family)`: small models of every form that the family has."""

    def golden(name, wrap=lambda state: state, config=lambda case: case["flags"]):
        for k, case in enumerate(json.loads((HERE / f"golden_{name}.json").read_text())["cases"].values()):
            path = tmp_path / f"{name}{k}.ckpt"
            torch.save(wrap(formula.formula_weights({n: torch.empty(s) for n, s in case["state"].items()})), path)
            path.with_suffix(".yml").write_text(yaml.safe_dump(config(case)))
            yield load_model(path)

    def folder(name):
        asked = folders.request(name, tmp_path, formula, INTEGER)
        yield load_model(asked.checkpoint, asked.config, asked.conditions)

    def ldm():
        params = {"linear_start": 0.0015, "linear_end": 0.0195, "timesteps": 1000, "image_size": 8, "scale_factor": 0.5}
        yield from golden(
            "ldm",
            lambda state: {"state_dict": state},
            lambda case: {"model": {"params": params | {"unet_config": {"params": case["unet"]}}}},
        )
        for version in ("1", "2"):
            yield load_model(stable.save(tmp_path, stable.whole(formula, version), stable.settings(version)))

    def xl(single):
        networks = stable_xl.save_folder(tmp_path / "xl", formula)
        model = load_model(tmp_path / "xl")
        yield load_model(stable_xl.save_single(tmp_path, stable_xl.single(model, networks))) if single else model

    known = {
        "ddim": lambda: [load_model(tiny.save_checkpoint(tmp_path, tiny.unet()))],
        "adm": lambda: golden("adm"),
        "dit": lambda: golden("dit"),
        "ldm": ldm,
        "sdxl": lambda: xl(True),
        "sdxl_folder": lambda: xl(False),
        "diffusers_dit": lambda: folder("dit"),
        **{name: lambda name=name: folder(name) for name in ("pixart", "sd3", "flux")},
    }
    return lambda family: list(known[family]())


NAMES = {family.__name__.rpartition(".")[2] for family in FAMILIES}


@pytest.mark.parametrize("family", sorted(NAMES - ELSEWHERE))
def test_every_pattern_of_a_family_has_an_operator(models, family):
    """In every form of the family; a pattern that need not have one has one in some form of its network."""
    made = models(family)
    assert made
    operators = [set(quantize(model, INTEGER)) for model in made]
    for model, names in zip(made, operators, strict=True):
        assert isinstance(model.role_of, Roles)
        assert model.role_of.unmatched(names) == {}
        assert {model.role_of(name) for name in names} >= {"first", "last", "time", "body"}


def test_what_need_not_have_an_operator_has_one_somewhere(models):
    """The only such pattern is for what XL is told beside its text, in a network that other families have too."""
    (model,) = models("sdxl_folder")
    assert model.role_of.sometimes
    assert replace(model.role_of, sometimes=frozenset()).unmatched(quantize(model, INTEGER)) == {}
    sometimes = {family.__name__: getattr(family, "role_of", None) for family in FAMILIES}
    assert {some for roles in sometimes.values() if roles for some in roles.sometimes} == model.role_of.sometimes


def test_a_pattern_that_matches_nothing_stops_what_goes_by_roles(tiny, tmp_path):
    model = load_model(tiny.save_checkpoint(tmp_path, tiny.unet()))
    model.network.conv_start = model.network.conv_in  # as if the network had been renamed and the family not
    del model.network.conv_in
    said = r"family ddim: its pattern conv_in for first layers matches none .*near it .*conv_out.*--policy uniform"
    with pytest.raises(AccuQuantError, match=said):
        quantize(model, INTEGER)
    assert "conv_start" in quantize(model, INTEGER.model_copy(update={"policy": "uniform", "split": False}))


def test_the_first_pattern_counts_and_names_are_matched_whole():
    roles = Roles("a", r"a|b", (r"c\..+",), inside=r"(x\.)?")
    assert [roles(name) for name in ("a", "b", "x.b", "c.d", "c.", "ab", "x.c.d")] == [
        "first", "last", "last", "time", "body", "body", "time",
    ]  # fmt: skip
    assert roles.unmatched(["a", "x.c.d"]) == {}
    assert roles.unmatched(["b"]) == {"a": "first", r"c\..+": "time"}
