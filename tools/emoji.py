"""Emoji as captioned pictures: npm's @iconify-json packs, drawn at any size; an icon's name is its caption.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat        # Apache-2.0, MIT

Left out are icons whose name does not tell what is seen at 64 pixels (flags, clocks, buttons, letters) and people in
all their variants, which outnumber everything else.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

# Pack -> the word that asks for its style, its licence, its author.
PACKS = {
    "noto": ("noto", "Apache-2.0", "Google"),
    "fluent-emoji-flat": ("flat", "MIT", "Microsoft"),
}
LEFT_OUT = re.compile(
    r"\b(flag|oclock|thirty|button|keycap|letter|input|squared|symbol|skin|medium|light-skin|dark|tone[0-9]|"
    r"man|men|woman|women|womans|person|people|boy|girl|child|baby|family|couple|kiss-|mans|older|old|mrs|"
    r"merman|mermaid|prince|princess|guard|detective|ninja|fairy|elf|genie|vampire|zombie|mage|merperson|troll|"
    r"cook|farmer|judge|mechanic|pilot|scientist|singer|student|teacher|technologist|artist|astronaut|firefighter|"
    r"police|office-worker|factory-worker|health-worker|construction-worker|superhero|supervillain|santa|deaf|"
    r"mouse-trap|zodiac|regional|tag)\b"
)
TONES = re.compile(r"-(light|medium-light|medium|medium-dark|dark)$")


def read_pack(path: Path) -> dict[str, str]:
    """Name -> SVG of every icon that is kept; `path` is the package, packed (.tgz) or not."""
    if path.suffix == ".tgz":
        with tarfile.open(path) as archive:
            member = archive.extractfile("package/icons.json")
            assert member is not None
            pack = json.load(member)
    else:
        pack = json.loads((path / "icons.json").read_text())
    kept = {}
    for name, icon in sorted(pack["icons"].items()):
        if LEFT_OUT.search(name) or TONES.search(name):
            continue
        left, top = icon.get("left", pack.get("left", 0)), icon.get("top", pack.get("top", 0))
        width, height = icon.get("width", pack.get("width", 16)), icon.get("height", pack.get("height", 16))
        kept[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return kept


def draw(svg: str, size: int) -> np.ndarray:
    """uint8 (3, size, size), on white, with a margin of a sixteenth on each side."""
    import cairosvg

    inner, edge = size - size // 8, size // 16
    png = cairosvg.svg2png(bytestring=svg.encode(), output_width=2 * inner, output_height=2 * inner)
    icon = Image.open(BytesIO(png)).convert("RGBA").resize((inner, inner), Image.Resampling.BOX)
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(icon, (edge, edge))
    return np.asarray(canvas.convert("RGB")).transpose(2, 0, 1)


def packages(folder: Path) -> Iterator[tuple[str, Path]]:
    """(pack, its package) for each of PACKS in `folder`."""
    for pack in PACKS:
        found = sorted(folder.glob(f"iconify-json-{pack}-[0-9]*.tgz"))
        if not found:
            raise SystemExit(f"{folder} holds no iconify-json-{pack}-*.tgz; get it with: npm pack @iconify-json/{pack}")
        yield pack, found[-1]


def load(folder: Path, size: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Pictures, uint8 (n, 3, size, size), their captions, and the words for their styles; kept as .npz in `folder`."""
    cache = folder / f"emoji-{size}.npz"
    if not cache.exists():
        pictures, captions, styles = [], [], []
        for pack, path in packages(folder):
            for name, svg in read_pack(path).items():
                pictures.append(draw(svg, size))
                captions.append(name.replace("-", " "))
                styles.append(PACKS[pack][0])
        np.savez_compressed(cache, pictures=np.stack(pictures), captions=captions, styles=styles)
    with np.load(cache) as held:
        return held["pictures"], [str(c) for c in held["captions"]], [str(s) for s in held["styles"]]
