"""Pipelines of diffusers run on a bundle's engine, and paint what they paint with the torch network."""

import importlib.util

import accuquant
import numpy as np
import pytest
import torch
from accuquant.calibrate.families import load_model
from accuquant.runtime.denoiser import Denoiser
from accuquant.runtime.engines import open_engine
from accuquant.runtime.engines.base import EngineOptions
from accuquant.runtime.errors import AccuQuantError
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file

TOLERANCE = 1e-3  # of pictures in [0, 1]: the same float32 in another order, along whole chains; a quarter of a level
SIDES = ["twin", "denoiser"]
# Of chains of two steps, where some prompts move a picture by less than TOLERANCE.
CLOSE = 1e-4
# What the integer network's error leaves of the variance of a picture, in dB, of bundles that hardly learned anything.
LEAST_SQNR = 26.0  # 8-bit weights and activations: 30 to 35 measured
LEAST_SQNR_OF_TEXT = 45.0  # 52 to 58 measured
LEAST_SQNR_OF_XL = 20.0  # 24 measured: guided by 5


@pytest.fixture(scope="module")
def many_classes(tiny, tmp_path_factory):
    """DiTPipeline takes class 1000 for none, whatever the network."""
    return tiny.export_classes(tmp_path_factory.mktemp("many"), 1000)


def ddim(tiny):
    return DDIMScheduler(**tiny.NOISE_SCHEDULE, clip_sample=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Torch(torch.nn.Module):
    """The family's own network behind what pipelines read and call."""

    def __init__(self, model, config):
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, config, torch.device("cpu"), torch.float32

    def forward(self, sample, timestep, **named):
        y = named.get("class_labels")
        condition = {} if y is None else {"y": y}
        out = self.model.network(sample, torch.as_tensor(timestep).float().expand(len(sample)), **condition)
        return accuquant.export.diffusers_model.UNet2DOutput(sample=out)


def check_alike(side, painted, expected, tolerance, least):
    """The twin paints what torch paints, the quantized network something close that is not the same."""
    assert painted.shape == expected.shape
    assert expected.std() > 0.1
    if side == "twin":
        np.testing.assert_allclose(painted, expected, rtol=0, atol=tolerance)
    else:
        error = np.square(painted.astype(np.float64) - expected).mean()
        assert error > 0
        assert 10 * np.log10(expected.var() / error) > least


def test_a_pipeline_given_the_engine_paints_as_with_torch(tiny, tiny_bundle):
    unet = accuquant.load_unet(tiny_bundle, network="twin")
    pipe = DDIMPipeline(Torch(load_model(tiny_bundle.folder.parent / "tiny.ckpt"), unet.config), ddim(tiny))
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(3, generator(), num_inference_steps=6, output_type="np").images
    pipe.unet = unet
    np.testing.assert_allclose(
        pipe(3, generator(), num_inference_steps=6, output_type="np").images, expected, rtol=0, atol=TOLERANCE
    )
    assert expected.std() > 0.1


def test_it_runs_the_quantized_network_as_the_bundles_own_loop_does(tiny, tiny_bundle):
    start = torch.randn(2, *tiny.SHAPE, generator=generator(5)).numpy()
    engine = open_engine(tiny_bundle.graph("denoiser"), EngineOptions(2))
    latents = tiny_bundle.plan.sample(Denoiser(engine, 2), lambda _: start)
    pipe = DDIMPipeline(accuquant.load_unet(tiny_bundle), ddim(tiny))
    pipe.set_progress_bar_config(disable=True)
    painted = pipe(2, generator(5), num_inference_steps=6, output_type="np").images
    expected = np.clip(latents / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    # A latent that differs in its last bit may cross a code's border: one code of 255 now and then.
    np.testing.assert_allclose(painted, expected, rtol=0, atol=0.01)


def test_stochastic_pipelines_too(tiny, tiny_bundle):
    """DDPM visits the timesteps of the same plan; noise comes from the pipeline's generator on both sides."""
    unet = accuquant.load_unet(tiny_bundle, network="twin", batch=2)
    scheduler = DDPMScheduler(**tiny.NOISE_SCHEDULE, clip_sample=False)
    pipe = DDPMPipeline(Torch(load_model(tiny_bundle.folder.parent / "tiny.ckpt"), unet.config), scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(3, generator(), num_inference_steps=6, output_type="np").images
    pipe.unet = unet
    np.testing.assert_allclose(
        pipe(3, generator(), num_inference_steps=6, output_type="np").images, expected, rtol=0, atol=TOLERANCE
    )


def test_a_guided_pipeline_of_classes_takes_it_as_transformer(many_classes):
    torch.manual_seed(0)
    vae = AutoencoderKL(1, 1, block_out_channels=(32,), latent_channels=1, norm_num_groups=8).eval()
    transformer = accuquant.load_transformer(many_classes, network="twin")
    model = load_model(many_classes.folder.parent / "classes.pt")
    scheduler = DDIMScheduler(**model.noise_schedule, clip_sample=False)
    pipe = DiTPipeline(Torch(model, transformer.config), vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe([7, 999], 2.5, generator(), 4, output_type="np").images
    pipe.transformer = transformer
    painted = pipe([7, 999], 2.5, generator(), 4, output_type="np").images
    np.testing.assert_allclose(painted, expected, rtol=0, atol=TOLERANCE)
    assert np.abs(pipe([8, 999], 2.5, generator(), 4, output_type="np").images[0] - painted[0]).max() > TOLERANCE


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="text pipelines of diffusers need transformers"
)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("image", [False, True], ids=["text-to-image", "image-to-image"])
def test_stable_diffusion_pipelines_run_unchanged(tiny, text_model, text_bundle, image, side):
    """Their prompt embeddings are ours; the first half of an img2img run's steps is left out by its strength."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(3, 3, block_out_channels=(32,), latent_channels=2, norm_num_groups=8).eval()
    toy = text_model.model()

    class Unet(Torch):
        def forward(self, sample, timestep, encoder_hidden_states, return_dict, **_):
            return (self.model.network(sample, timestep.float().expand(len(sample)), encoder_hidden_states),)

    unet = accuquant.load_unet(text_bundle, network=side)
    factory = StableDiffusionImg2ImgPipeline if image else StableDiffusionPipeline
    pipe = factory(vae, None, None, Unet(toy, unet.config), ddim(tiny), None, None, requires_safety_checker=False)
    pipe.scheduler = ddim(tiny)  # they set steps_offset to 1, as the published models have it
    pipe.set_progress_bar_config(disable=True)
    settings = {"image": torch.zeros(1, 3, 8, 8), "strength": 0.5} if image else {"height": 8, "width": 8}

    def paint():
        return pipe(
            prompt_embeds=toy.text(["red heart", "blue apple"])[0], negative_prompt_embeds=toy.text(["", ""])[0],
            guidance_scale=3.0, num_inference_steps=4, generator=generator(), output_type="np", **settings,
        ).images  # fmt: skip

    expected = paint()
    pipe.unet = unet
    check_alike(side, paint(), expected, TOLERANCE, LEAST_SQNR_OF_TEXT)


TEXTS = 2  # of the examples that the bundles were calibrated with


@pytest.fixture(scope="module")
def examples(folder_bundle):
    """`examples(name)`: rows of two texts and of none, by the graph's names for them."""

    def read(name):
        rows = load_file(folder_bundle(name).folder.parent / "rows.safetensors")
        wanted = {key: value[:TEXTS] for key, value in rows.items() if not key.startswith("empty.")}
        return wanted, {key: rows[f"empty.{key}"].expand_as(value).clone() for key, value in wanted.items()}

    return read


def first_stage():
    torch.manual_seed(0)
    return AutoencoderKL(3, 3, block_out_channels=(32,), latent_channels=4, norm_num_groups=8, shift_factor=0.1).eval()


def pixart(bundle, wanted, free):
    """Its small network is told sizes that pipelines pass for pictures of 1024 pixels alone."""
    from diffusers import PixArtAlphaPipeline

    network = PixArtTransformer2DModel.from_pretrained(bundle.folder.parent / "pixart").eval()

    def tell(_, arguments, named):
        sizes = {"resolution": torch.full((2 * TEXTS, 2), 64.0), "aspect_ratio": torch.ones(2 * TEXTS, 1)}
        return arguments, named | {"added_cond_kwargs": sizes}

    network.register_forward_pre_hook(tell, with_kwargs=True)
    schedule = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "epsilon"}
    pipe = PixArtAlphaPipeline(None, None, first_stage(), network, DPMSolverMultistepScheduler(**schedule))
    return pipe, {
        "prompt_embeds": wanted["context"], "prompt_attention_mask": wanted["mask"], "negative_prompt": None,
        "negative_prompt_embeds": free["context"], "negative_prompt_attention_mask": free["mask"],
        "guidance_scale": 2.0, "use_resolution_binning": False,
    }  # fmt: skip


def sd3(bundle, wanted, free):
    from diffusers import StableDiffusion3Pipeline

    network = SD3Transformer2DModel.from_pretrained(bundle.folder.parent / "sd3").eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(network, scheduler, first_stage(), None, None, None, None, None, None)
    return pipe, {
        "prompt_embeds": wanted["context"], "pooled_prompt_embeds": wanted["pooled"],
        "negative_prompt_embeds": free["context"], "negative_pooled_prompt_embeds": free["pooled"],
        "guidance_scale": 2.0,
    }  # fmt: skip


def flux(bundle, wanted, free):
    from diffusers import FluxPipeline

    network = FluxTransformer2DModel.from_pretrained(bundle.folder.parent / "flux").eval()
    shifts = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15,
              "base_image_seq_len": 256, "max_image_seq_len": 4096}  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(**shifts)
    pipe = FluxPipeline(scheduler, first_stage(), None, None, None, None, network)
    asked = {"prompt_embeds": wanted["context"], "pooled_prompt_embeds": wanted["pooled"], "guidance_scale": 2.5}
    return pipe, asked


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="text pipelines of diffusers need transformers"
)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [pixart, sd3, flux], ids=lambda kind: kind.__name__)
def test_pipelines_of_transformers_run_unchanged(folder_bundle, examples, kind, side):
    """With their own schedulers, guidance and packing of latents."""
    bundle = folder_bundle(kind.__name__)
    pipe, asked = kind(bundle, *examples(kind.__name__))
    pipe.set_progress_bar_config(disable=True)

    def paint(**other):
        settings = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "np"}
        return pipe(generator=generator(), **settings | asked | other).images

    expected = paint()
    pipe.transformer = accuquant.load_transformer(bundle, network=side)
    check_alike(side, paint(), expected, CLOSE, LEAST_SQNR)
    for name in [name for name in asked if name.endswith("embeds")]:  # else one that never arrived would go unseen
        others = paint(**{name: asked[name].flip(0) / 2})
        assert np.abs(others - expected).max() > 5 * CLOSE, name


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_stable_diffusion_xl_runs_unchanged(folder_bundle, side):
    from diffusers import StableDiffusionXLPipeline

    bundle = folder_bundle("sdxl")
    pipe = StableDiffusionXLPipeline.from_pretrained(bundle.folder.parent / "sdxl", add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)

    def paint(**told):
        return pipe(
            ["a b", "c"], num_inference_steps=2, guidance_scale=5.0, generator=generator(), height=16, width=16,
            output_type="np", **told,
        ).images  # fmt: skip

    expected = paint()
    pipe.unet = accuquant.load_unet(bundle, network=side)
    check_alike(side, paint(), expected, CLOSE, LEAST_SQNR_OF_XL)
    with pytest.raises(AccuQuantError, match=r"time_ids is 32, 16, 0, 0, 16, 16 and the graph of .* holds 16, 16"):
        paint(original_size=(32, 16))


def test_batches_run_in_pieces_or_on_an_engine_each(tiny_bundle):
    x = torch.randn(5, 1, 8, 8)
    t = torch.tensor([80, 64, 80, 0, 16])
    whole, pieces = accuquant.load_unet(tiny_bundle), accuquant.load_unet(tiny_bundle, batch=2)
    expected = whole(x, t).sample
    torch.testing.assert_close(pieces(x, t).sample, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(pieces(x[4:], 16)[0][0], expected[4], rtol=0, atol=TOLERANCE)
    for n in (1, 2, 3):
        torch.testing.assert_close(whole(x[:n], t[:n]).sample, expected[:n], rtol=0, atol=TOLERANCE)
    whole.close()
    torch.testing.assert_close(whole(x, t).sample, expected)


def test_latents_come_back_as_they_were(tiny_bundle):
    unet = accuquant.load_unet(tiny_bundle).to(torch.float64)
    (out,) = unet(torch.zeros(1, 1, 8, 8, dtype=torch.float16), 80.0, return_dict=False)
    assert (out.dtype, unet.dtype, unet.device.type) == (torch.float16, torch.float64, "cpu")


def refused(model, message, *arguments, **named):
    with pytest.raises(AccuQuantError, match=message):
        model(*arguments, **named)


def test_what_the_bundle_cannot_do_is_refused(tiny_bundle, class_bundle, text_bundle):
    unet, x = accuquant.load_unet(tiny_bundle), torch.zeros(2, 1, 8, 8)
    refused(
        unet, r"knows the 6 timesteps of its own plan \(80, 64, 48, 32, 16, 0\) and not 81; .* --no-time-table", x, 81
    )
    refused(unet, "set the pipeline's height and width", torch.zeros(2, 1, 16, 16), 80)
    refused(unet, "3 timesteps for 2 latents", x, torch.tensor([80, 80, 80]))
    refused(unet, "class_labels was given", x, 80, class_labels=torch.tensor([1, 2]))
    refused(unet, "takes none", x, 80, torch.tensor([1, 2]))
    refused(unet, "cross_attention_kwargs was given", x, 80, cross_attention_kwargs={"scale": 0.5})
    unet(x, 80, cross_attention_kwargs=None, added_cond_kwargs={"image_embeds": None})

    of_classes, t = accuquant.load_transformer(class_bundle), torch.tensor(0)
    refused(of_classes, "needs class_labels", x, t)
    refused(of_classes, "class 5 is out of range; the network knows 0 to 3, 4 stands for none", x, t,
            class_labels=torch.tensor([4, 5]))  # fmt: skip
    refused(of_classes, "1 rows of class_labels for 2 latents", x, t, class_labels=torch.tensor([1]))
    refused(of_classes, "takes class_labels", x, t, encoder_hidden_states=torch.zeros(2, 4, 8))
    refused(accuquant.load_unet(text_bundle), r"context is float32 \(2, 5, 8\)", torch.zeros(2, 2, 8, 8), t,
            encoder_hidden_states=torch.zeros(2, 5, 8))  # fmt: skip


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (
            {"down_block_additional_residuals": [torch.zeros(1)]},
            "a ControlNet or an adapter adds .* is not in the graph",
        ),
        ({"mid_block_additional_residual": torch.zeros(1)}, "a ControlNet or an adapter"),
        ({"added_cond_kwargs": {"image_embeds": [torch.zeros(1)]}}, r"\(image_embeds\) .* an IP-Adapter is not in the"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, r"LoRAs are fused at export, with --lora"),
    ],
)
def test_what_would_change_the_network_between_its_layers_is_refused(tiny_bundle, named, words):
    refused(accuquant.load_unet(tiny_bundle), words, torch.zeros(1, 1, 8, 8), 80, **named)


def test_what_a_graph_holds_as_a_constant_may_be_told_the_same_alone(folder_bundle, examples):
    wanted, _ = examples("flux")
    model = accuquant.load_transformer(folder_bundle("flux"))
    where = torch.cartesian_prod(torch.arange(1.0), torch.arange(4.0), torch.arange(4.0))
    asked = {
        "hidden_states": torch.zeros(TEXTS, 16, 16), "timestep": torch.ones(TEXTS),
        "encoder_hidden_states": wanted["context"], "pooled_projections": wanted["pooled"],
        "img_ids": where, "txt_ids": torch.zeros(5, 3), "guidance": torch.full((TEXTS,), 2.5),
    }  # fmt: skip
    assert model(**asked).sample.shape == (TEXTS, 16, 16)
    with model.cache_context("cond"):
        model(**asked, joint_attention_kwargs={"scale": 1.0})
    refused(model, "guidance is 3.5 and the graph of .* holds 2.5", **asked | {"guidance": torch.full((TEXTS,), 3.5)})
    refused(model, "takes 4 by 4 of 16", **asked | {"img_ids": where.flip(0)})
    refused(model, "takes 4 by 4 of 16", **asked | {"hidden_states": torch.zeros(TEXTS, 20, 16), "img_ids": None})
    refused(model, "texts stand at zero", **asked | {"txt_ids": torch.ones(5, 3)})
    refused(model, "a ControlNet", **asked, controlnet_block_samples=[torch.zeros(1)])
    refused(model, "an IP-Adapter", **asked, joint_attention_kwargs={"ip_adapter_image_embeds": [torch.zeros(1)]})

    wanted, _ = examples("pixart")
    of_sizes, x = accuquant.load_transformer(folder_bundle("pixart")), torch.zeros(TEXTS, 4, 8, 8)
    asked = {
        "timestep": torch.full((TEXTS,), max(folder_bundle("pixart").plan.timesteps)),
        "encoder_hidden_states": wanted["context"], "encoder_attention_mask": wanted["mask"],
    }  # fmt: skip
    same = {"resolution": torch.full((TEXTS, 2), 64.0), "aspect_ratio": torch.ones(TEXTS, 1)}
    torch.testing.assert_close(
        of_sizes(x, **asked, added_cond_kwargs=same).sample, of_sizes(x, **asked, added_cond_kwargs={}).sample
    )
    refused(
        of_sizes,
        "aspect_ratio is 2 and",
        x,
        **asked,
        added_cond_kwargs=same | {"aspect_ratio": torch.full((2, 1), 2.0)},
    )
    asked.pop("encoder_attention_mask")
    refused(of_sizes, "needs encoder_attention_mask", x, **asked)


@pytest.mark.slow
def test_a_bundle_for_any_timestep_takes_any(tiny, tmp_path):
    unet = accuquant.load_unet(tiny.export(tmp_path, time_table=False), network="twin")
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(unet(x, 81).sample, tiny.unet()(x, torch.tensor([81.0])), rtol=0, atol=TOLERANCE)
