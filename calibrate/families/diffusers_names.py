"""Names of one U-Net in two layouts: CompVis's `input_blocks` and diffusers' `down_blocks`.

CompVis numbers stages from the first convolution on, down and up apart; diffusers numbers levels, and on the way up
counts them from the deepest. Inside an attention block both have the same names.
"""

from collections.abc import Collection, Mapping

RESIDUAL = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
    "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip


def unet_names(levels: int, blocks: int, attention: Collection[int]) -> dict[str, str]:
    """diffusers' names of modules by CompVis's; `attention` holds levels, counted from full resolution."""
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }

    def residual(ours: str, theirs: str) -> None:
        names.update({f"{ours}.{inner}": f"{theirs}.{other}" for inner, other in RESIDUAL.items()})

    residual("middle_block.0", "mid_block.resnets.0")
    residual("middle_block.2", "mid_block.resnets.1")
    for level in range(levels):
        for i in range(blocks):
            stage = f"input_blocks.{1 + level * (blocks + 1) + i}"
            residual(f"{stage}.0", f"down_blocks.{level}.resnets.{i}")
            if level in attention:
                names[f"{stage}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            names[f"input_blocks.{(level + 1) * (blocks + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for up, level in enumerate(reversed(range(levels))):
        for i in range(blocks + 1):
            stage = f"output_blocks.{up * (blocks + 1) + i}"
            residual(f"{stage}.0", f"up_blocks.{up}.resnets.{i}")
            if level in attention:
                names[f"{stage}.1"] = f"up_blocks.{up}.attentions.{i}"
        if level:
            place = 2 if level in attention else 1
            last = f"output_blocks.{up * (blocks + 1) + blocks}"
            names[f"{last}.{place}.conv"] = f"up_blocks.{up}.upsamplers.0.conv"
    return names


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """`name` with the longest beginning that `names` knows replaced; None if it knows none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        known = names.get(".".join(parts[:count]))
        if known is not None:
            return ".".join([known, *parts[count:]])
    return None
