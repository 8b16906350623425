"""Training of reference models: loss falls, what is saved goes on, and what is released loads."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.calibrate.families.ddim_unet import UNetConfig
from accuquant.runtime.errors import AccuQuantError
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def trainer():
    sys.path.insert(0, str(TOOLS))
    try:
        import train_reference

        yield train_reference
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def training(trainer):
    import training

    return training


@pytest.fixture
def small(trainer, monkeypatch):
    """Both recipes' ways of training on 8x8 pictures of one colour each."""
    tiny = UNetConfig(8, 3, 3, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=())

    def read(folder, split):
        colours = np.random.default_rng(0).integers(0, 256, (64, 1, 1, 3), dtype=np.uint8)
        return np.broadcast_to(colours, (64, 8, 8, 3))

    made = {
        name: replace(trainer.RECIPES[name], read=read, config=tiny, batch=16) for name in ("cifar10", "cifar10-small")
    }
    monkeypatch.setattr(trainer, "RECIPES", made)


def run(trainer, out, **options):
    import inspect

    given = {name: p.default for name, p in inspect.signature(trainer.train).parameters.items()}
    trainer.train(**{**given, "out": out, "bf16": False, "save_every": 10, **options})


def errors(printed):
    return [float(line.split("error ")[1].split()[0]) for line in printed.splitlines() if line.startswith("step")]


@pytest.mark.parametrize("recipe", ["cifar10", "cifar10-small"])
def test_the_error_falls_and_what_is_released_loads(trainer, small, tmp_path, capsys, recipe):
    run(trainer, tmp_path, dataset=recipe, images=16 * 60, lr=2e-3)
    found = errors(capsys.readouterr().out)
    assert len(found) == 6
    assert found[-1] < 0.7 * found[0]
    name = trainer.RECIPES[recipe].name
    model = load_model(tmp_path / f"{name}.ckpt")
    assert model.sample_shape == (3, 8, 8)
    assert json.loads((tmp_path / f"{name}.json").read_text())["images_seen"] == 960
    # The five-item list loads as well, and its EMA is what was released.
    (tmp_path / "ckpt.yml").write_text((tmp_path / f"{name}.yml").read_text())
    kept, released = load_model(tmp_path / "ckpt.pth").network.state_dict(), model.network.state_dict()
    assert all(torch.equal(kept[k].half().float(), released[k]) for k in kept)


def test_a_training_begins_where_a_released_one_ended(trainer, small, tmp_path, capsys):
    run(trainer, tmp_path / "first", dataset="cifar10-small", images=16 * 60, lr=2e-3)
    before = errors(capsys.readouterr().out)
    begun = tmp_path / "first" / "cifar10-small-ddim.ckpt"
    run(trainer, tmp_path / "second", dataset="cifar10-small", images=16 * 10, lr=2e-4, start=begun)
    (after,) = errors(capsys.readouterr().out)
    assert after < 0.8 * before[0]
    facts = json.loads((tmp_path / "second" / "cifar10-small-ddim.json").read_text())
    assert facts["begun_from"]["images_seen"] == 960
    assert "--start cifar10-small-ddim.ckpt" in facts["command"]


def test_a_stopped_training_goes_on(trainer, small, tmp_path, capsys):
    run(trainer, tmp_path, dataset="cifar10-small", images=16 * 40, minutes=1e-9)
    stopped = capsys.readouterr().out
    assert "step 10/40" in stopped
    assert "--resume goes on" in stopped
    assert not list(tmp_path.glob("*.ckpt"))
    before = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    run(trainer, tmp_path, dataset="cifar10-small", images=16 * 40, resume=True)
    assert "step 40/40" in capsys.readouterr().out
    after = torch.load(tmp_path / "ckpt.pth", weights_only=True)
    assert (before[3], after[3]) == (10, 40)
    state = after[1]["state"][0]
    assert int(state["step"]) == 40  # Adam remembers the first ten
    with pytest.raises(AccuQuantError, match="does not exist"):
        run(trainer, tmp_path / "nothing", dataset="cifar10-small", resume=True)


def test_the_full_recipe_is_the_published_configuration(trainer):
    recipe = trainer.RECIPES["cifar10"]
    with torch.device("meta"):
        count = sum(p.numel() for p in trainer.UNet(recipe.config).parameters())
    assert count == 35_746_307
    told = trainer.ddim_yaml(recipe)
    assert told["model"]["ch_mult"] == [1, 2, 2, 2]
    assert told["model"]["dropout"] == 0.1
    assert told["diffusion"] == {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_diffusion_timesteps": 1000
    }  # fmt: skip
    # The original sums squared errors over a picture: 3072 of them.
    assert set(trainer.loss_weights(recipe, torch.tensor([0.1, 1.0, 10.0])).tolist()) == {3072.0}


def test_timesteps_come_in_mirrored_pairs_where_the_originals_do(trainer):
    t = trainer.timesteps(trainer.RECIPES["cifar10"], 7, torch.Generator().manual_seed(0))
    assert t.shape == (7,)
    assert (t[:3] + t[4:] == 999).all()
    assert ((t >= 0) & (t < 1000)).all()


def test_moving_averages_forget_their_start(training):
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = training.Ema(network, 0.9)
    with torch.no_grad():
        network.weight.fill_(1.0)
    wanted = 0.0
    for step in range(1, 30):
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay)
        assert float(ema.weights["weight"]) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 0.9


def test_a_network_without_gradients_is_noticed(training):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    network(torch.ones(1, 2)).sum().backward()
    training.check_gradients(network)
    network[0].weight.grad = None
    with pytest.raises(AccuQuantError, match=r"no gradient reaches 0\.weight"):
        training.check_gradients(network)


def test_another_trainings_checkpoint_is_refused(training, tmp_path):
    def parts(width):
        network = nn.Linear(width, 1)
        return network, torch.optim.Adam(network.parameters()), training.Ema(network, 0.9)

    network, optimizer, ema = parts(2)
    training.save_training(tmp_path / "ckpt.pth", network, optimizer, 0, 5, ema, 1.5)
    assert training.load_training(tmp_path / "ckpt.pth", *parts(2)) == (5, 1.5)
    with pytest.raises(AccuQuantError, match="is of another training"):
        training.load_training(tmp_path / "ckpt.pth", *parts(3))
