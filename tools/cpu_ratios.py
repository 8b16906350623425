"""What a run of bench_cpu.py says: our faster rest against everyone's fastest, each from the same interleaved steps."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

ON_OURS = ", our float graph"  # behind a peer's name: what it quantized


class Ratio(NamedTuple):
    """One network at one batch size. Seconds are medians; a factor says how many times ours goes into theirs."""

    network: str
    batch: int
    fp: str
    fp_seconds: float
    ours: str
    seconds: float
    sqnr: float
    vs_fp: float
    vs_bf16: float | None
    peer: str
    peer_sqnr: float
    vs_peer: float
    peer_on_ours: str  # from our float graph instead of torch's
    vs_peer_on_ours: float
    four: float  # W4A8's seconds, of W8A8's
    share: float  # of the rate that one large product in 8 bits reaches


def ratios(report: Mapping[str, Any]) -> Iterator[Ratio]:
    for name, network in report["networks"].items():
        for batch in report["batches"]:
            rows = {
                key: (row["seconds"][str(batch)]["median"], row)
                for key, row in network["rows"].items()
                if "failed" not in row
            }

            def fastest(whose: str, scheme: str = "", rows: Any = rows) -> tuple[str, float]:
                kind = {key: s for key, (s, row) in rows.items() if row["whose"] == whose and scheme in key}
                return min(kind.items(), key=lambda item: item[1])

            fp, fp_seconds = fastest("fp32")
            ours, seconds = fastest("ours", "W8A8")
            peer, peer_seconds = fastest("nncf")
            on_ours, on_ours_seconds = fastest("nncf on ours")
            short = [s for s, row in rows.values() if row["whose"] == "bf16"]
            rate = 2 * network["multiplications"] * batch / seconds
            yield Ratio(
                name, batch, fp, fp_seconds, ours, seconds, rows[ours][1]["sqnr"], fp_seconds / seconds,
                short[0] / seconds if short else None, peer, rows[peer][1]["sqnr"], peer_seconds / seconds,
                on_ours.replace(ON_OURS, ""), on_ours_seconds / seconds,
                fastest("ours", "W4A8")[1] / seconds, rate / report["limit"]["int8"],
            )  # fmt: skip
