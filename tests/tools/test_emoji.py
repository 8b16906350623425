"""Training and judging the text-to-image model: which drawings it sees, how it goes on, how captions are counted."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def _tools():
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


def test_a_pack_gives_drawings_that_their_names_tell(tmp_path):
    import emoji

    icons = ["red-apple", "flag-france", "man-cook", "waving-hand-dark-skin-tone", "ogre", "five-oclock", "keycap-7"]
    pack = {"icons": {name: {"body": "<path/>"} for name in icons}, "width": 32, "height": 32}
    pack["icons"]["ogre"] |= {"width": 48, "left": -8}
    (tmp_path / "icons.json").write_text(json.dumps(pack))
    kept = emoji.read_pack(tmp_path)
    assert list(kept) == ["ogre", "red-apple"]
    assert 'viewBox="-8 0 48 32"' in kept["ogre"]
    assert 'viewBox="0 0 32 32"' in kept["red-apple"]


def test_a_training_that_was_killed_goes_on_bit_for_bit(tmp_path):
    import train_emoji

    def run(path, dies_at=None):
        torch.manual_seed(0)
        network, seen = nn.Linear(3, 1), []

        def loss_of(generator):
            seen.append(None)
            if len(seen) == dies_at:
                raise KeyboardInterrupt
            return network(torch.randn(8, 3, generator=generator)).square().mean()

        return train_emoji.train(network, loss_of, path, 7, 1e-2, seed=1, every=2)[0]

    whole = run(tmp_path / "whole.pth")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed.pth", dies_at=6)
    again = run(tmp_path / "killed.pth")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_every_caption_becomes_as_many_tokens_and_none_is_lost(tmp_path):
    import train_emoji

    tokenizer = train_emoji.make_tokenizer(["red apple", "blue heart", "face with sunglasses, noto"])
    assert len(tokenizer.encode("Red Apple").ids) == train_emoji.LENGTH
    assert tokenizer.encode("RED  apple").ids == tokenizer.encode("red apple").ids
    pieces = tokenizer.encode("a pearl")  # neither word was ever seen
    assert "<unk>" not in pieces.tokens
    assert tokenizer.encode("").ids == [0] * train_emoji.LENGTH


def test_latents_are_a_quarter_of_the_picture_and_the_decoder_leads_back():
    import train_emoji

    network = train_emoji.Autoencoder().eval()
    with torch.no_grad():
        mean, logvar = network.encode(torch.zeros(1, 3, 64, 64))
        assert mean.shape == logvar.shape == (1, 4, 16, 16)
        assert network.decode(mean).shape == (1, 3, 64, 64)


def test_places_count_captions_and_not_pictures():
    """Around a mean of zero: the asked caption's better drawing decides, and a caption counts once."""
    import evaluate_emoji

    real = np.array([[1, 0.1], [1, 0.0], [0, 1], [-1, 0], [-1, -1.1]], np.float32)
    captions = ["apple", "apple", "heart", "rocket", "heart"]
    painted = real.mean(axis=0) + np.array([[1, 0], [0.2, 1.0], [1, 0.05]], np.float32)
    found = evaluate_emoji.places(painted, real, captions, ["apple", "heart", "rocket"])
    assert found.tolist() == [1, 1, 3]


def test_a_deeper_denoiser_begins_as_the_one_it_was_made_from():
    """With weights that are not zero anywhere else, so that a branch which counted would be seen."""
    import train_emoji
    from accuquant.calibrate.families.adm_unet import AdmUNet

    generator = torch.Generator().manual_seed(0)
    shallow, deep = (AdmUNet(replace(train_emoji.UNET, depth=depth)).eval() for depth in (1, 2))
    for network in (shallow, deep):
        for parameter in network.parameters():
            parameter.data.normal_(0, 0.05, generator=generator)
    held = shallow.state_dict()
    deep.load_state_dict(train_emoji.deepened(held, deep))
    x, t = torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([10.0, 900.0])
    context = torch.randn(2, 12, 192, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(deep(x, t, context=context), shallow(x, t, context=context))
        assert not torch.equal(deep(x, t, context=context), deep(x, t, context=-context))
    assert any(v.any() for k, v in deep.state_dict().items() if ".transformer_blocks.1.attn1.to_q" in k)
