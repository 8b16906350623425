"""Draw the README's results, the page of all results and the model card from measured JSON; no number is typed by hand.

python tools/publish.py   # README.md between its markers, tools/results/README.md, the cards in tools/reference
"""

import json
import re
from pathlib import Path

import typer
from cards import cifar_card, emoji_card, fashion_card
from comparison_tables import cost_table, methods_table
from tables import (
    bench_table,
    cpu_table,
    emoji_results,
    emoji_sheets,
    evaluation_table,
    export_table,
    full_size_table,
    serving_table,
    split_table,
    yardstick_table,
)

ROOT = Path(__file__).parents[1]
RESULTS, REFERENCE = ROOT / "tools" / "results", ROOT / "tools" / "reference"
SHOWN = ("w4a8", "w8a8")  # of the methods, in the README
HEADINGS = {
    "methods": "Calibration methods, by bits",
    "m": "How many steps a group has",
    "gradient": "How the gradient reaches the steps of a group",
    "start": "Where groups start and what they must end in",
    "sharing": "One set of activation parameters, or one for each stretch of the chain",
    "learned": "What is learned beside activation parameters",
    "correction": "What correcting the output by timestep adds",
    "budget": "Quality by calibration time",
    "terrain": "A pretrained consistency model of terrain",
}


def readme_pictures() -> str:
    """What the README opens with."""
    report = json.loads((RESULTS / "emoji.json").read_text())
    quantized = {side: row for side, row in report["sides"].items() if side != "fp32"}
    close = ", ".join(f"{side} {row['psnr_mean']:.1f} dB" for side, row in quantized.items())
    return (
        f"{emoji_sheets(report, 'tools/results/')} To the full-precision twin: {close} "
        f"(n = {report['n']}; [measured](tools/results/README.md#text-to-image)).\n"
    )


def readme_results() -> str:
    parts = [
        "| full precision | W4A8, integer kernels |",
        "|---|---|",
        "| ![64 garments sampled in full precision](tools/results/fp.png) "
        "| ![the same 64 seeds on integer kernels](tools/results/int.png) |",
        "",
    ]
    for bits in SHOWN:
        parts += [methods_table(json.loads((RESULTS / f"methods-{bits}.json").read_text())), ""]
    if (RESULTS / "methods.svg").exists():
        parts += ["![quality by method and bits](tools/results/methods.svg)", ""]
    for bits in SHOWN:
        drift, single = (f"tools/results/methods-{bits}.{kind}.svg" for kind in ("drift", "single"))
        parts += [
            "| accumulated | alone |",
            "|---|---|",
            f"| ![error along the chain by method]({drift}) | ![error of single steps by method]({single}) |",
            "",
        ]
    for path in sorted(RESULTS.glob("bench-*.json")):
        parts += [bench_table(json.loads(path.read_text())), ""]
    parts += ["More: [everything measured](tools/results/README.md).", ""]
    return "\n".join(parts)


def results_page() -> str:
    """All comparisons and costs that lie in the folder, with their plots."""
    parts = ["# Measured", "", "Drawn by `tools/publish.py` from the JSON beside it; every JSON names its machine.", ""]
    for sweep, heading in HEADINGS.items():
        found = sorted(RESULTS.glob(f"{sweep}-w*.json"))
        parts += [f"## {heading}", ""] if found else []
        for path in found:
            parts += [methods_table(json.loads(path.read_text())), ""]
            plot = ("error by time", "time") if sweep == "budget" else ("error along the chain", "drift")
            parts += [f"![{plot[0]}]({path.stem}.{plot[1]}.svg)", ""]
    costs = sorted(RESULTS.glob("cost-*.json"))
    parts += ["## Memory and time of an iteration", ""] if costs else []
    for path in costs:
        parts += [cost_table(json.loads(path.read_text())), "", f"![peak memory by M]({path.stem}.svg)", ""]
    for heading, pattern, draw in (
        ("Text to image", "emoji.json", emoji_results),
        ("CIFAR-10", "cifar10-*.json", evaluation_table),
        ("Steps on a CPU", "cpu*.json", cpu_table),
        ("Convolutions of a concatenation", "split.json", split_table),
        ("Other quantizers beside ours", "yardsticks*.json", yardstick_table),
        ("Export at real sizes", "export-sizes*.json", export_table),
        ("Calibration and export at real sizes", "full-sizes*.json", full_size_table),
        ("Serving under load", "serving*.json", serving_table),
        ("An hour of serving", "soak.json", serving_table),
    ):
        found = sorted(RESULTS.glob(pattern))
        parts += [f"## {heading}", ""] if found else []
        for path in found:
            parts += [draw(json.loads(path.read_text())), ""]
            parts += [f"![]({path.stem}.svg)", ""] if path.with_suffix(".svg").exists() else []
    return "\n".join(parts)


def main() -> None:
    """Rewrite README.md's blocks of pictures and results, the page of all results and the model cards."""
    readme = (ROOT / "README.md").read_text()
    for name, drawn in (("pictures", readme_pictures()), ("results", readme_results())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        block = re.compile(f"{re.escape(begin)}.*{re.escape(end)}", re.DOTALL)
        readme = block.sub(lambda _, text=f"{begin}\n{drawn}{end}": text, readme)  # type: ignore[misc]
    (ROOT / "README.md").write_text(readme)
    (RESULTS / "README.md").write_text(results_page())
    (REFERENCE / "MODEL_CARD.md").write_text(fashion_card(REFERENCE))
    (REFERENCE / "CIFAR_CARD.md").write_text(cifar_card(REFERENCE, RESULTS))
    (REFERENCE / "EMOJI_CARD.md").write_text(emoji_card(REFERENCE, RESULTS))


if __name__ == "__main__":
    typer.run(main)
