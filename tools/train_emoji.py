"""Train the bundled text-to-image model: emoji by their names, as CompVis saves latent diffusion.

First an autoencoder, 64x64x3 to latents 16x16x4,

    L = |x - D(z)| + |grad x - grad D(z)| + 1e-3 KL(q(z|x) || N(0, 1)),      z ~ q(z|x) = E(x)

then a denoiser of its latents with cross-attention to a text encoder that is trained with it, on v-prediction,

    L = E_{x, t, eps} || v - UNet(a_t z + s_t eps, t, T(caption)) ||^2,      v = a_t eps - s_t z

where a tenth of the captions is empty, so that guidance has something to lead away from. Rombach et al. 2022; Salimans
and Ho 2022 for v. Each stage writes a checkpoint every few hundred steps, atomically, from which the same command goes
on.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat
    python tools/train_emoji.py --data . --out build/emoji

Out come `emoji-ldm.ckpt` (the state dict in half precision), its tokenizer, its YAML and the facts of the run.
"""

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import emoji
import numpy as np
import torch
import torch.nn.functional as F
import typer
import yaml
from accuquant.calibrate.checkpoint import load_weights, read_checkpoint
from accuquant.calibrate.families.adm_unet import AdmConfig, AdmUNet, ResBlock
from accuquant.calibrate.families.bert_text import BertText
from accuquant.calibrate.families.first_stage import Attention, Network, Residual, norm
from accuquant.calibrate.families.ldm import FIRST_STAGE
from accuquant.calibrate.families.spatial_transformer import TransformerBlock
from accuquant.runtime.console import machine_facts
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from training import Ema, check_gradients, save_atomically, warmup_cosine

SIZE, LATENT, FACTOR = 64, 4, 4
CHANNELS, WIDTHS, BLOCKS = 64, (64, 64, 128), 1
LENGTH, TOKENS, TEXT_WIDTH, TEXT_DEPTH = 12, 1500, 192, 2
UNET = AdmConfig(
    LATENT, LATENT, 64, (1, 2), 1, (1,), heads=None, head_channels=32, resblock_updown=False, scale_shift_norm=False,
    context=TEXT_WIDTH, depth=2,
)  # fmt: skip
TIMESTEPS, LINEAR_START, LINEAR_END = 1000, 0.0015, 0.0195
GUIDANCE = 3.0
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
EMPTY, STYLED = 0.1, 0.5  # how often a caption is left out, and how often one names its style


class Encoder(nn.Module):
    """The original's Encoder: a picture to its latent's mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(WIDTHS):
            before = WIDTHS[max(i - 1, 0)]
            blocks = nn.ModuleList(Residual(width if j else before, width) for j in range(BLOCKS))
            level = nn.ModuleDict({"block": blocks})
            if i < len(WIDTHS) - 1:
                level["downsample"] = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2)})
            self.down.append(level)
        deepest = WIDTHS[-1]
        self.mid = nn.ModuleDict(
            {"block_1": Residual(deepest, deepest), "attn_1": Attention(deepest), "block_2": Residual(deepest, deepest)}
        )
        self.norm_out, self.conv_out = norm(deepest), nn.Conv2d(deepest, 2 * LATENT, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in cast(list[nn.ModuleDict], list(self.down)):
            for block in cast(nn.ModuleList, level["block"]):
                h = block(h)
            if "downsample" in level:
                h = cast(nn.ModuleDict, level["downsample"])["conv"](F.pad(h, (0, 1, 0, 1)))
        for part in self.mid.values():
            h = part(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))


class Autoencoder(nn.Module):
    """AutoencoderKL, under its names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Network(LATENT, list(WIDTHS), BLOCKS + 1, set(), 3)
        self.quant_conv = nn.Conv2d(2 * LATENT, 2 * LATENT, 1)
        self.post_quant_conv = nn.Conv2d(LATENT, LATENT, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.post_quant_conv(z)))


class Denoiser(nn.Module):
    """The U-Net and the text encoder that is trained with it, under the names of the release."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"diffusion_model": AdmUNet(UNET)})
        self.cond_stage_model = nn.ModuleDict({"transformer": BertText(TOKENS, LENGTH, TEXT_WIDTH, TEXT_DEPTH)})

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        return cast(Tensor, self.model["diffusion_model"](x, t, context=self.cond_stage_model["transformer"](tokens)))


def train(
    network: nn.Module, loss_of: Callable[[torch.Generator], Tensor], path: Path, steps: int, lr: float, seed: int,
    every: int = 250,
) -> tuple[dict[str, Tensor], float]:  # fmt: skip
    """Adam with warm-up and a cosine, going on from `path` if it is there; the averaged weights, and seconds spent."""
    ema = Ema(network, 0.999)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-3, betas=(0.9, 0.99))
    step, spent = 0, 0.0
    if path.exists():
        held = torch.load(path, weights_only=True)
        network.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        ema.load(held["ema"])
        step, spent = held["step"], held["seconds"]
    first, begun, losses = step, time.monotonic(), list[float]()
    network.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, lr, warmup=200)
        # A generator of the step's own: resumed and uninterrupted runs see the same pictures and noise.
        loss = loss_of(torch.Generator().manual_seed(seed * 1_000_003 + step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if step == first + 2:  # by then layers that began at zero pass gradients on
            check_gradients(network)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        ema.update(step)
        losses.append(loss.item())
        if step % every == 0 or step == steps:
            elapsed = spent + time.monotonic() - begun
            mean = sum(losses) / len(losses)
            print(f"{path.stem}  step {step}/{steps}  loss {mean:.4f}  {elapsed:.0f} s", flush=True)
            losses.clear()
            save_atomically(
                {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.weights, "step": step,
                 "seconds": elapsed}, path,
            )  # fmt: skip
    network.load_state_dict(ema.weights)
    network.eval()
    return ema.weights, spent + time.monotonic() - begun


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte pairs of lower-case words, learned on `texts`; every text becomes LENGTH tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["<pad>", "<unk>"], end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=[*ALPHABET],
    )  # fmt: skip
    # Single letters as words, so that any word ends in a token that is known.
    tokenizer.train_from_iterator([*texts, *ALPHABET], trainer)
    tokenizer.enable_padding(length=LENGTH, pad_id=0, pad_token="<pad>")
    tokenizer.enable_truncation(LENGTH)
    return tokenizer


def tokens_of(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    return torch.tensor([found.ids for found in tokenizer.encode_batch(texts)])


def train_autoencoder(pixels: Tensor, folder: Path, images: int, seed: int) -> tuple[Autoencoder, float]:
    """On quarters of pictures first, which cost a quarter and teach nearly as much, then on whole ones."""
    network = Autoencoder().to(memory_format=torch.channels_last)

    def losses(size: int, batch: int) -> Callable[[torch.Generator], Tensor]:
        def loss_of(generator: torch.Generator) -> Tensor:
            pick = torch.randint(len(pixels), (batch,), generator=generator)
            corners = torch.randint(SIZE - size + 1, (batch, 2), generator=generator).tolist()
            cut = [pixels[i, :, y : y + size, x : x + size] for i, (y, x) in zip(pick.tolist(), corners, strict=True)]
            shown = (torch.stack(cut).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            mean, logvar = network.encode(shown)
            made = network.decode(mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator))
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            edges = sum((made.diff(dim=d) - shown.diff(dim=d)).abs().mean() for d in (2, 3))
            return (made - shown).abs().mean() + edges + 1e-3 * kl

        return loss_of

    _, first = train(
        network, losses(SIZE // 2, 8), folder / "quarters.pth", math.ceil(images * 14 / 15 / 8), 1e-3, seed
    )
    _, second = train(network, losses(SIZE, 4), folder / "wholes.pth", math.ceil(images / 15 / 4), 3e-4, seed + 1)
    return network, first + second


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of all pictures' latents."""
    made = [autoencoder.encode(part.float() / 127.5 - 1) for part in pixels.split(64)]
    return torch.cat([mean for mean, _ in made]), torch.cat([(0.5 * logvar).exp() for _, logvar in made])


def train_denoiser(
    network: Denoiser,
    latents: tuple[Tensor, Tensor],
    scale: float,
    tokens: dict[str, Tensor],
    path: Path,
    images: int,
    batch: int,
    seed: int,
    bf16: bool,
) -> float:
    """Seconds spent; `tokens` holds those of every caption, "plain" and "styled", and of the "empty" text."""
    mean, deviation = latents
    betas = torch.linspace(LINEAR_START**0.5, LINEAR_END**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)
    signal, noise = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    network.to(memory_format=torch.channels_last)
    if bf16:  # block by block: compiled whole, torch 2.13 loses the gradient of all that lies behind a downsampling
        for part in network.modules():
            if isinstance(part, ResBlock | TransformerBlock | BertText):
                part.compile(dynamic=False)

    def loss_of(generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(mean), (batch,), generator=generator)
        z = scale * (mean[pick] + deviation[pick] * torch.randn(mean[pick].shape, generator=generator))
        # One timestep from each of as many stretches as there are samples: the same expectation, less variance.
        t = ((torch.arange(batch) + torch.rand(batch, generator=generator)) * TIMESTEPS / batch).long()
        eps = torch.randn(z.shape, generator=generator)
        chance = torch.rand(batch, 1, generator=generator)
        words = torch.where(chance < EMPTY + STYLED * (1 - EMPTY), tokens["styled"][pick], tokens["plain"][pick])
        words = torch.where(chance < EMPTY, tokens["empty"], words)
        a, s = signal[t, None, None, None], noise[t, None, None, None]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            made = network(a * z + s * eps, t.float(), words)
        return F.mse_loss(made.float(), a * eps - s * z)

    return train(network, loss_of, path, math.ceil(images / batch), 1e-3, seed)[1]


def deepened(held: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The held weights, and for transformer blocks that they lack those of `network`, such that these change nothing.

    A block is h + branch(h) three times: with their last layers at zero, the deeper network computes what was held.
    """
    new = {k: v for k, v in network.state_dict().items() if k not in held and ".transformer_blocks." in k}
    last = re.compile(r"\.(to_out\.0|ff\.net\.2)\.(weight|bias)$")
    return held | {k: torch.zeros_like(v) if last.search(k) else v for k, v in new.items()}


def settings(scale: float, prompts: list[str]) -> dict[str, Any]:
    """The repository's own YAML form, as far as the loader reads it, and prompts to calibrate with."""
    return {
        "model": {
            "params": {
                "linear_start": LINEAR_START,
                "linear_end": LINEAR_END,
                "timesteps": TIMESTEPS,
                "image_size": SIZE // FACTOR,
                "channels": LATENT,
                "scale_factor": round(scale, 6),
                "parameterization": "v",
                "unet_config": {"params": {"num_head_channels": UNET.head_channels}},
            }
        },
        "prompts": prompts,
        "guidance": GUIDANCE,
    }


def main(
    data: Annotated[Path, typer.Option(help="Folder with the packed icon sets.")] = Path("."),
    out: Annotated[Path, typer.Option(help="Where checkpoints go.")] = Path("build/emoji"),
    name: Annotated[str, typer.Option(help="Stem of the released files.")] = "emoji-ldm",
    autoencoder_images: Annotated[int, typer.Option(help="Pictures that the autoencoder sees in all.")] = 37_500,
    images: Annotated[int, typer.Option(help="Latents that the denoiser sees in all.")] = 200_000,
    seed: Annotated[int, typer.Option()] = 0,
    start: Annotated[
        Path | None,
        typer.Option(help="A released checkpoint whose denoiser is to learn on, deepened; its autoencoder stays."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Latents of a step of the denoiser.")] = 32,
    bf16: Annotated[
        bool, typer.Option(help="The denoiser compiled and in bfloat16: twice as fast on CPUs with AMX.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.")] = 0,
) -> None:
    """Train both stages, or go on where they stopped, and release the averaged weights."""
    out.mkdir(parents=True, exist_ok=True)
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    pictures, captions, styles = emoji.load(data, SIZE)
    pixels = torch.from_numpy(pictures)
    styled = [f"{caption}, {style}" for caption, style in zip(captions, styles, strict=True)]
    begin = read_checkpoint(start)["state_dict"] if start is not None else {}
    before = json.loads(start.with_suffix(".json").read_text()) if start is not None else {}
    tokenizer = (
        make_tokenizer(captions + styled)
        if start is None
        else Tokenizer.from_file(str(start.with_suffix(".tokenizer.json")))
    )
    tokens = {
        "plain": tokens_of(tokenizer, captions),
        "styled": tokens_of(tokenizer, styled),
        "empty": tokens_of(tokenizer, [""]),
    }
    if start is None:
        autoencoder, first = train_autoencoder(pixels, out, autoencoder_images, seed)
    else:
        autoencoder, first = Autoencoder().eval(), 0.0
        load_weights(
            autoencoder, {k.removeprefix(FIRST_STAGE): v for k, v in begin.items() if k.startswith(FIRST_STAGE)}, start
        )
    latents = latents_of(autoencoder, pixels)
    scale = float(1 / latents[0].std())
    denoiser = Denoiser()
    if start is not None:
        held = {k: v for k, v in begin.items() if not k.startswith(FIRST_STAGE)}
        load_weights(denoiser, deepened(held, denoiser), start)
    second = train_denoiser(denoiser, latents, scale, tokens, out / "denoiser.pth", images, batch, seed, bf16)

    state = {**denoiser.state_dict(), **{f"{FIRST_STAGE}{k}": v for k, v in autoencoder.state_dict().items()}}
    save_atomically({"state_dict": {k: v.half() for k, v in state.items()}}, out / f"{name}.ckpt")
    tokenizer.save(str(out / f"{name}.tokenizer.json"))
    prompts = [captions[i] for i in np.random.default_rng(seed).permutation(len(captions))[:64]]
    (out / f"{name}.yml").write_text(yaml.safe_dump(settings(scale, prompts), sort_keys=False))
    of_stages = f"--start {start.name}" if start is not None else f"--autoencoder-images {autoencoder_images}"
    how = f" --batch {batch}" * (batch != 32) + " --bf16" * bf16
    command = f"python tools/train_emoji.py {of_stages} --images {images}{how} --seed {seed}"
    facts = {
        "pictures": len(pixels),
        "autoencoder_images_seen": before.get("autoencoder_images_seen", autoencoder_images),
        "latents_seen": before.get("latents_seen", 0) + images,
        "seconds": {
            "autoencoder": before["seconds"]["autoencoder"] if before else round(first),
            "denoiser": (before["seconds"]["denoiser"] if before else 0) + round(second),
        },
        "commands": [*before.get("commands", []), command],
        "device": f"{machine_facts()['cpu']}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "parameters": {
            "denoiser": sum(p.numel() for p in denoiser.model.parameters()),
            "text_encoder": sum(p.numel() for p in denoiser.cond_stage_model.parameters()),
            "autoencoder": sum(p.numel() for p in autoencoder.parameters()),
        },
        "data": [f"@iconify-json/{pack}, {author}, {licence}" for pack, (_, licence, author) in emoji.PACKS.items()],
    }
    (out / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {out / name}.ckpt, .tokenizer.json, .yml and .json")


if __name__ == "__main__":
    typer.run(main)
