"""Measured JSON as markdown: a table and a caption with n, seeds and machine for every kind of report."""

from typing import Any

from cpu_ratios import ratios
from scores import number


def machine(facts: dict[str, str]) -> str:
    cores = "1 core" if facts["cores"] == "1" else f"{facts['cores']} cores"
    return f"{facts['cpu']}, {cores} ({facts['instructions']}), {facts['memory']}"


def graph_bytes(row: dict[str, Any]) -> dict[str, int]:
    """What each graph takes on disk, with its weights."""
    return {kind: sum(v for k, v in row["files"].items() if k.startswith(kind)) for kind in ("twin", "denoiser")}


def export_table(report: dict[str, Any]) -> str:
    """Memory, time and size of exports at real sizes, as markdown."""
    gib = 2**30
    lines = [
        "| shape | | parameters | operators | peak (not droppable) | time | fp32 graph | quantized | compiled "
        "| plan | as |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["rows"]:
        files = graph_bytes(row)
        made = row.get("compiled") or {}
        told = ["-", "-", "-"]
        if "plan_bytes" in made:
            kinds = ", ".join(f"{n} {kind}" for kind, n in made["operators_by_precision"].items())
            told = [f"{made['peak_bytes'] / gib:.2f} GiB, {made['seconds']:.0f} s"]
            told += [f"{made['plan_bytes'] / gib:.2f} GiB", kinds]
        cells = [
            row["shape"], row["scheme"], f"{row['parameters'] / 1e6:.0f} M", str(sum(row["operators"].values())),
            f"{row['peak_bytes'] / gib:.2f} ({row['held_bytes'] / gib:.2f}) GiB", f"{row['seconds']:.0f} s",
            f"{files['twin'] / gib:.2f} GiB", f"{files['denoiser'] / gib:.2f} GiB", *told,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    caption = (
        f"Random weights, target tensorrt, {report['threads']} thread, beside other work; compiled ahead of time by "
        f"TensorRT-RTX {report['versions']['tensorrt-rtx']} for Ada, not run; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def full_size_table(report: dict[str, Any]) -> str:
    """Memory and time of one iteration of calibration and of the export, at real sizes, as markdown."""
    gib = 2**30
    lines = [
        "| shape | | parameters | operators | estimated | iteration, peak | CPU time | export, peak | CPU time "
        "| fp32 graph | quantized |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        cells = [row["shape"], row["scheme"], "-", "-", f"{row['estimated_bytes'] / gib:.1f} GiB"]
        if "files" in row:
            stages = row["stages"]
            learned = next(stage for title, stage in stages.items() if title.startswith("iteration"))
            rest = [stage for stage in stages.values() if stage is not learned]
            cells[2:4] = [f"{row['parameters'] / 1e6:.0f} M", str(sum(row["operators"].values()))]
            for part in ([learned], rest):
                cells.append(f"{max(s['peak_bytes'] for s in part) / gib:.2f} GiB")
                cells.append(f"{sum(s['cpu_seconds'] for s in part):.0f} s")
            cells += [f"{size / gib:.2f} GiB" for size in graph_bytes(row).values()]
        elif "free_bytes" in row:
            limit = min(report["limit_bytes"], row["free_bytes"])
            cells += [f"not begun: more than {limit / gib:.1f} GiB", *["-"] * 5]
        else:
            cells += [f"given up beyond {row['beyond_bytes'] / gib:.1f} GiB", *["-"] * 5]
        lines.append("| " + " | ".join(cells) + " |")
    targets = ", ".join(dict.fromkeys(row["target"] for row in report["rows"]))
    caption = (
        f"Random weights, target {targets}; the iteration simulates M = 4 steps at batch 1 with the exact gradient; "
        f"peaks of resident memory, mapped weights with it; {report['threads']} thread"
        f"{', ' + report['note'] if report['note'] else ''}; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def yardstick_table(report: dict[str, Any]) -> str:
    """Other quantizers beside ours, as markdown."""
    lines = [
        "| | calls, made in | PSNR to fp, mean (p10) | MSE, median | 8-bit kernels | in TensorRT-RTX: plan, weights "
        "| graph | step at 1 | step at 8 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["rows"].items():
        if "failed" in row:
            lines.append(f"| {name} | {row['failed']} |" + " |" * 7)
            continue
        rtx, covered = row.get("compiled"), row["coverage"]
        told = "no ONNX" if rtx is None else "refused" if "refused" in rtx else _plan(rtx)
        calls = row.get("samples", report["samples"] if "settings" in row else None)
        spent = f"{calls}, {row['quantize_seconds']:.0f} s" if calls else "-"
        steps = (f"{row['step_seconds'][batch]['cpu'] * 1e3:.2f} ms" for batch in ("1", "8"))
        cells = [
            name, spent, f"{row['psnr_mean']:.2f} ({row['psnr_p10']:.2f}) dB", f"{row['mse_median']:.2e}",
            f"{covered['low_bit']} of {covered['all']}, {row['engine']}", told, f"{row['file_bytes'] / 2**20:.2f} MiB",
            *steps,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    note = f", {report['note']}" if report["note"] else ""
    caption = (
        f"{report['bundle']}, {report['steps']} steps, seeds 0..{report['n'] - 1}; calls are those along trajectories "
        "of other seeds that calibration looked at; compiled by TensorRT-RTX ahead of time, not run; median CPU time "
        f"of {report['repeats']} interleaved steps, {report['threads']} thread{note}; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def _plan(made: dict[str, Any]) -> str:
    plan, weights = (f"{made[key] / 2**20:.2f}" for key in ("plan_bytes", "weights_bytes"))
    return f"{made['low_bit']} of {made['all']}: {plan}, {weights} MiB"


def bench_table(report: dict[str, Any]) -> str:
    """The sides of one interleaved run, as markdown."""
    sides = list(report["results"][0]["sides"])
    lines = ["| step at batch | " + " | ".join(sides) + " |", "|---:|" + "---:|" * len(sides)]
    for row in report["results"]:
        cells = (
            f"{side['step_seconds']['median'] * 1e3:.2f} ms, {side['step_speedup']:.2f}x"
            for side in row["sides"].values()
        )
        lines.append(f"| {row['batch']} | " + " | ".join(cells) + " |")
    sizes, n = report["bytes"], report["results"][0]["sides"][sides[0]]["step_seconds"]["n"]
    caption = (
        f"{report['scheme']} on {report['results'][0]['engine']}, medians of {n} interleaved steps, and how many times "
        f"faster than fp32; graphs on disk {sizes['twin'] / 2**20:.2f} MiB (fp32) and "
        f"{sizes['denoiser'] / 2**20:.2f} MiB; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def emoji_table(report: dict[str, Any]) -> str:
    """Bundles of the text-to-image model beside their twin, as markdown."""
    lines = [
        "| | graph on disk | PSNR to fp, mean (p10) | SSIM | caption first | among ten |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in report["sides"].items():
        close = (
            f"{row['psnr_mean']:.2f} ({row['psnr_p10']:.2f}) dB | {row['ssim_mean']:.4f}" if name != "fp32" else "- | -"
        )
        of = row["caption"]
        lines.append(
            f"| {name} | {row['bytes'] / 2**20:.2f} MiB | {close} | {of['first']:.1%} | {of['first_ten']:.1%} |"
        )
    real = report["real"]
    quantized = {side: row for side, row in report["sides"].items() if side != "fp32"}
    ran = "; ".join(f"{side} {kernels(row)}" for side, row in quantized.items())
    learned = ", ".join(f"{side} {row['iterations']}" for side, row in quantized.items())
    caption = (
        f"n = {report['n']} captions, one seed each, guidance {report['guidance']:g}, {report['steps']} steps, on "
        f"{report['sides']['fp32']['engine']}, whose kernels are: {ran}. Iterations of calibration: {learned}. "
        "Caption first, among ten: the caption's place when all "
        f"{report['captions']} captions are ordered by how close their real pictures come to the painted one "
        f"({report['features']}); real pictures of one style among those of the other reach {real['first']:.1%} and "
        f"{real['first_ten']:.1%} (n = {real['n']}). {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def kernels(row: dict[str, Any]) -> str:
    """How many operators ran in which precision, and why some are in float."""
    ran = ", ".join(f"{count} {precision}" for precision, count in row["operators"].items())
    return ran + "".join(f" ({count}: {why})" for why, count in row["kept_in_float"].items())


def emoji_sheets(report: dict[str, Any], folder: str) -> str:
    """The same prompts by every precision; the sheets lie in `folder`."""
    sides = list(report["sides"])
    lines = [
        "| " + " | ".join(sides) + " |",
        "|" + "---|" * len(sides),
        "| " + " | ".join(f"![{side}]({folder}emoji-{side.lower()}.png)" for side in sides) + " |",
        "",
        f"The same seeds under {', '.join(report['sheet'])}.",
    ]
    return "\n".join(lines)


def emoji_results(report: dict[str, Any]) -> str:
    """The sheets and the numbers."""
    return f"{emoji_sheets(report, '')}\n\n{emoji_table(report)}"


def serving_table(report: dict[str, Any]) -> str:
    """Phases of load against a server, as markdown."""
    lines = [
        "| | requests | answered | pictures/s | p50 | p95 | p99 | memory | rises |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["results"]:
        took, memory, line = row["accepted_seconds"], row["memory_mib"], row["memory_line"]
        answered = ", ".join(f"{count} x {status}" for status, count in row["statuses"].items())
        lines.append(
            f"| {row['lasted_seconds'] / 60:.0f} min, {row['phase']} | {row['requests']} | {answered} "
            f"| {row['pictures_per_second']:.2f} | {took['p50']:.2f} s | {took['p95']:.2f} s | {took['p99']:.2f} s "
            f"| {memory[0]:.0f} to {memory[-1]:.0f} MiB | {line['mib_per_hour']:.2f} MiB/h |"
        )
    bundle, settings, front = report["bundle"], report["settings"], report.get("front", "http")
    note = f", {report['note']}" if report.get("note") else ""
    caption = (
        f"{bundle['name']} ({bundle['scheme']}) behind accuquant-serve {front}, batch {settings['batch']}, "
        f"{settings['threads'] or 'all'} threads, queue {settings['queue']}, deadline {settings['deadline']:g} s; "
        f"load average {report['results'][0]['load_average']:.1f}{note}. The line of memory leaves the first fifth "
        f"out; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def cpu_table(report: dict[str, Any]) -> str:
    """Integers against the best float engine and against NNCF on this CPU, as markdown."""
    lines = [
        "| | batch | best fp32 | W8A8 | of fp32 | of bf16 | of NNCF | of NNCF, our float graph "
        "| SQNR, NNCF's | W4A8 takes | of the int8 limit |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in ratios(report):
        bf16 = f"{row.vs_bf16:.2f}x" if row.vs_bf16 else "-"
        cells = [
            row.network, str(row.batch), f"{row.fp_seconds * 1e3:.2f} ms, {row.fp.removeprefix('fp32, ')}",
            f"{row.seconds * 1e3:.2f} ms, {row.ours.rpartition(', ')[2]}", f"{row.vs_fp:.2f}x", bf16,
            f"{row.vs_peer:.2f}x, {row.peer.removeprefix('NNCF ')}",
            f"{row.vs_peer_on_ours:.2f}x, {row.peer_on_ours.removeprefix('NNCF ')}",
            f"{row.sqnr:.1f}, {row.peer_sqnr:.1f} dB",
            f"{row.four:.2f}", f"{row.share:.0%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    told = "; ".join(f"{name}: {one['told']} ({one['found']})" for name, one in report["networks"].items())
    limit = ", ".join(f"{kind} {rate / 1e9:.0f}" for kind, rate in report["limit"].items())
    note = f"; {report['note']}" if report["note"] else ""
    run_up = f", each behind {report['run_up_s'] * 1e3:.0f} ms of the same" if "run_up_s" in report else ""
    caption = (
        f"Median CPU time of {report['repeats']} interleaved steps{run_up}, {report['threads']} thread, everyone's "
        f"fastest in that run: {told}. Ranges only, nothing learned. NNCF begins with the graph that torch writes, or "
        "with our float graph. SQNR of single calls along trajectories, to ONNX Runtime in fp32. Limit: a product of "
        f"1024^3, in 10^9 operations per second: {limit}{note}; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def split_table(report: dict[str, Any]) -> str:
    """Three ways to quantize a convolution of a concatenation, as markdown."""
    forms = list(next(iter(report["layers"].values()))["forms"])
    lines = [
        "| convolution | channels | s_a / s_b | " + " | ".join(forms) + " |",
        "|---|---:|---:|" + "---:|" * len(forms),
    ]
    for name, layer in report["layers"].items():
        cells = (
            f"{row['sqnr']['8']:.1f}, {row['sqnr']['4']:.1f} dB; {row['seconds']['median'] * 1e6:.0f} us"
            for row in layer["forms"].values()
        )
        a, b = layer["channels"]
        lines.append(f"| {name} | {a} + {b} | {layer['scales']:.2f} | " + " | ".join(cells) + " |")
    made = {
        form: {(row["compiled"]["low_bit"], row["compiled"]["all"]) for row in rows if "low_bit" in row["compiled"]}
        for form in forms
        for rows in ([layer["forms"][form] for layer in report["layers"].values()],)
    }
    kernels = "; ".join(f"{form} {low} of {every}" for form, found in made.items() for low, every in sorted(found))
    caption = (
        f"SQNR of the result at W8, W4, activations in 8 bits, ranges min-max, n = {report['calls']} calls along "
        f"{report['checkpoint']}'s trajectories; median CPU time of {report['repeats']} calls of {report['batch']}, "
        f"forms in turn, one thread, OpenVINO. Products in 8 bits by TensorRT-RTX, compiled for {report['gpu']}, "
        f"not run: {kernels or 'not installed'}; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])


def evaluation_table(report: dict[str, Any]) -> str:
    """Every metric of an evaluation, as markdown."""
    lines = ["| | of | to | value | n | floor | by |", "|---|---|---|---:|---:|---:|---|"]
    for row in report["rows"]:
        counts = f"{row['n']}" + (f" / {row['n_to']}" if row.get("n_to") else "")
        floor = number(row["metric"], row["floor"]) if row.get("floor") else "-"
        cells = [
            row["metric"],
            row["of"],
            row["to"] or "-",
            number(row["metric"], row),
            counts,
            floor,
            row["net"] or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    subject = report["subject"]
    caption = (
        f"{subject['found']}: {subject['scheme']}, {subject['sampler']}, {subject['calls']} calls, seeds "
        f"{report['seeds'][0]}..{report['seeds'][1]}; {machine(report['machine'])}."
    )
    return "\n".join([*lines, "", caption])
