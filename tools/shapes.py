"""Denoisers in their published configurations, with random weights, for measuring what real sizes take.

Stable Diffusion 1.5, XL and 3 (medium), LDM-4 on ImageNet, DiT-XL/2, PixArt-XL/2 for 512 pixels, and Flux (dev). All
but DiT are diffusers' networks in a thin coat, called as (x, t, **condition).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuquant.calibrate.families import dit, flux, pixart, sd3
from accuquant.calibrate.families.dit_net import DiT, DitConfig
from accuquant.calibrate.scheme import Role
from torch import Tensor, nn


class TextUNet(nn.Module):
    """UNet2DConditionModel as a network of (x, t, context) and, for SDXL, the pooled text and the picture's sizes."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel(**config)

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        added = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x, t, encoder_hidden_states=context, added_cond_kwargs=added, return_dict=False)[0]


def pixart_xl2() -> nn.Module:
    """PixArtTransformer2DModel with the texts' projection, without the variance that it learns."""
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(sample_size=64, out_channels=4, caption_channels=4096)
    with torch.device("cpu"):  # whatever the weights' device
        pixart.place(network, 32)
    return pixart.Told(network)


def sd3_medium() -> nn.Module:
    """SD3Transformer2DModel for 1024 pixels."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=128, num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192,
        joint_attention_dim=4096, pooled_projection_dim=2048, in_channels=16, out_channels=16,
    )  # fmt: skip
    places = network.pos_embed.pos_embed  # weights of the checkpoint that are no parameters: their values cost nothing
    network.pos_embed.register_buffer("pos_embed", torch.zeros(places.shape, device="cpu"))
    return sd3.Told(network)


def flux_dev() -> nn.Module:
    """FluxTransformer2DModel for 1024 pixels."""
    from diffusers import FluxTransformer2DModel

    return flux.Packed(FluxTransformer2DModel(guidance_embeds=True), 64, 3.5)


def role_of(name: str) -> Role:
    """The place of an operator of diffusers' networks, for the layer policy."""
    if name.endswith("conv_in"):
        return "first"
    if name.endswith("conv_out"):
        return "last"
    return "time" if "time_emb" in name or "add_embedding" in name else "body"


@dataclass(frozen=True)
class Shape:
    """How to make the network, the latent's shape (C, H, W), and one row (1, ...) of everything else that goes in."""

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    condition: Mapping[str, Tensor]
    role_of: Callable[[str], Role] = role_of


SHAPES: Mapping[str, Shape] = {
    "sd15": Shape(
        lambda: TextUNet(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        (4, 64, 64),
        {"context": torch.zeros(1, 77, 768)},
    ),
    "sdxl": Shape(
        lambda: TextUNet(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        (4, 128, 128),
        {"context": torch.zeros(1, 77, 2048), "pooled": torch.zeros(1, 1280), "sizes": torch.zeros(1, 6)},
    ),
    "ldm4-imagenet": Shape(
        lambda: TextUNet(
            sample_size=64,
            in_channels=3,
            out_channels=3,
            block_out_channels=(192, 384, 576, 960),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
            up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            cross_attention_dim=512,
            attention_head_dim=1,  # by which diffusers means the number of heads
        ),
        (3, 64, 64),
        {"context": torch.zeros(1, 1, 512)},  # the class's embedding, as one token
    ),
    "dit-xl2": Shape(
        lambda: DiT(DitConfig(32, 2, 4, width=1152, depth=28, heads=16, hidden=4608, classes=1000)),
        (4, 32, 32),
        {"y": torch.zeros(1, dtype=torch.int64)},
        dit.role_of,
    ),
    "pixart-xl2": Shape(
        pixart_xl2,
        (4, 64, 64),
        {"context": torch.zeros(1, 120, 4096), "mask": torch.ones(1, 120)},
        pixart.PLACES.role_of,
    ),
    "sd3-medium": Shape(
        sd3_medium,
        (16, 128, 128),
        {"context": torch.zeros(1, 333, 4096), "pooled": torch.zeros(1, 2048)},
        sd3.PLACES.role_of,
    ),
    "flux-dev": Shape(
        flux_dev,
        (16, 128, 128),
        {"context": torch.zeros(1, 512, 4096), "pooled": torch.zeros(1, 768)},
        flux.PLACES.role_of,
    ),
}


def parameters(shape: Shape) -> int:
    """How many it has; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in shape.make().parameters())


def random_network(shape: Shape, folder: Path) -> nn.Module:
    """The network with seeded weights of unit gain, mapped from a file in `folder`, as a checkpoint's can be."""
    with torch.device("meta"):
        network = shape.make().eval().requires_grad_(False)
    held = dict(network.named_parameters())
    pool = torch.from_file(str(folder / "weights.bin"), shared=True, size=sum(p.numel() for p in held.values()))
    generator, first = torch.Generator().manual_seed(0), 0
    for name, parameter in held.items():
        values = pool[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
        if parameter.ndim > 1:
            values.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            values.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        owner, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))
    return network


def activations(shape: Shape) -> int:
    """Bytes in float32 that convolutions and linear layers write in one call of one sample; nothing is allocated."""
    written = [0]

    def count(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        written[0] += 4 * result.numel()

    with torch.device("meta"):
        network = shape.make().to("meta")  # position tables are made by numpy
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(count)
        network(torch.zeros(1, *shape.sample), torch.zeros(1), **{k: v.to("meta") for k, v in shape.condition.items()})
    return written[0]
