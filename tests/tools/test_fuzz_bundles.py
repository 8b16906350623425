"""A short run of the bundle fuzzer: mutated bundles are opened or refused in words, and it would notice if not."""

import json
import random
import sys
from pathlib import Path

import pytest
from accuquant.runtime.bundle import Bundle
from accuquant.runtime.errors import AccuQuantError

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        import fuzz_bundles

        # What the watch puts around parsers is taken off again.
        patch.setattr(fuzz_bundles.bundles, "external_files", fuzz_bundles.bundles.external_files)
        patch.setattr(fuzz_bundles.conditions, "read_rows", fuzz_bundles.conditions.read_rows)
        patch.setattr(fuzz_bundles.SamplingPlan, "load", fuzz_bundles.SamplingPlan.load)
        patch.setattr(sys, "argv", ["pytest"])
        yield fuzz_bundles


@pytest.fixture(scope="module")
def opened(fuzz, tmp_path_factory):
    """`opened(kind, numbers)`: outcomes of those bundles, and the one watch there is."""
    folder = tmp_path_factory.mktemp("fuzz")
    watch = fuzz.Watch(folder)

    def run(kind, numbers):
        made = fuzz.Mutations(kind, folder)
        watch.examine(by_command=True)
        watch.actions()
        outcomes = []
        for n in numbers:
            made.write(random.Random(f"0 {kind} {n}"))
            outcomes.append(watch.examine(by_command=n % 10 == 0))
        return outcomes

    yield run, watch, folder
    watch.on = False


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kind", "count"), [("manifest", 150), ("plan", 100), ("graph", 60)])
def test_only_refusals_come_out(opened, kind, count):
    run, watch, _ = opened
    outcomes = run(kind, range(count))
    assert [o for o in outcomes if o.startswith("escaped")] == []
    assert watch.actions() == []
    assert len(set(outcomes)) > 2


def test_harm_would_be_noticed(opened, fuzz, monkeypatch):
    """Digests unchecked, so that whatever lies there is parsed; and an error that is none of ours."""
    run, watch, _ = opened
    monkeypatch.setattr(fuzz.bundles, "_check_file", lambda *_: None)
    run("graph", range(20))
    assert any("parsed and its digest is not" in action for action in watch.actions())

    def fail(*_):
        open("/etc/hostname").close()
        raise KeyError("\x1b[2J")

    monkeypatch.setattr(fuzz, "Bundle", fail)
    assert set(run("plan", range(2))) == {"escaped: KeyError: '\\x1b[2J'"}
    assert "opened /etc/hostname" in watch.actions()


def test_rows_and_tokenizers_that_no_digest_vouches_for_are_refused(fuzz, tmp_path):
    manifests = fuzz.Mutations("manifest", tmp_path).manifests
    by_kind = {m["conditioning"] and m["conditioning"]["kind"]: m for m in manifests}
    for kind, name in (("rows", "conditions.safetensors"), ("text", "tokenizer.json")):
        manifest = json.loads(json.dumps(by_kind[kind]))
        for network in manifest["networks"].values():
            network["files"].pop(name, None)
        manifest["files"].pop(name, None)
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(AccuQuantError, match=f"does not describe {name}"):
            Bundle(tmp_path)
