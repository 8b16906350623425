"""Files of condition rows: what goes in comes out as float32, and a sentence for what does not fit."""

import numpy as np
import pytest
import torch
from accuquant.runtime.bundle import ByRows, ByText
from accuquant.runtime.conditions import check_guidance
from accuquant.runtime.errors import AccuQuantError
from accuquant.runtime.rows import Rows, read_rows, save_rows
from safetensors.torch import save_file

KNOWN = ByRows(shapes={"context": (None, 3), "mask": (None,)})
CONTEXT, MASK = torch.arange(12.0).reshape(2, 2, 3) / 7, torch.tensor([[1.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 0), (torch.float64, 1e-7), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)]
)
def test_every_float_becomes_float32(dtype, error, tmp_path):
    save_file({"context": CONTEXT.to(dtype), "mask": MASK.to(torch.int64)}, tmp_path / "r.safetensors")
    rows = read_rows(tmp_path / "r.safetensors", KNOWN)
    assert {value.dtype for value in rows.examples.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(rows.examples["context"], CONTEXT.to(dtype).float().numpy())
    np.testing.assert_allclose(rows.examples["context"], CONTEXT.numpy(), rtol=error)
    assert not rows.empty


def test_a_written_file_reads_the_same(tmp_path):
    rows = Rows(
        {"context": CONTEXT.numpy(), "mask": MASK.numpy()}, {"context": CONTEXT[0].numpy(), "mask": MASK[0].numpy()}
    )
    save_rows(tmp_path / "r.safetensors", rows)
    again = read_rows(tmp_path / "r.safetensors", KNOWN)
    for one, other in ((rows.examples, again.examples), (rows.empty, again.empty)):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    np.testing.assert_array_equal(again.of([0, 3, 2**40])["mask"], MASK[[0, 1, 0]])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": None}, r"lacks mask; needed are context \(n, any, 3\), mask \(n, any\), and for guidance"),
        ({"text": MASK}, "holds text; needed are"),
        ({"empty.text": MASK}, r"holds empty\.text"),
        ({"context": None, "empty.context": CONTEXT[0]}, "lacks context"),
        ({"context": CONTEXT[:, :, :2]}, r"a row of context has the shape \(2, 2\), \(any, 3\) is expected"),
        ({"mask": MASK[:1]}, r"holds \[1, 2\] rows"),
        ({"context": CONTEXT[:0], "mask": MASK[:0]}, r"holds \[0\] rows"),
        ({"empty.mask": MASK[0]}, "rows that stand for none for mask alone"),
        ({"empty.mask": MASK[0, :1], "empty.context": CONTEXT[0]}, r"a row of empty\.mask has the shape \(1\)"),
        ({"context": CONTEXT * float("nan")}, "context holds values that are not finite"),
        ({"context": CONTEXT.to(torch.complex64)}, "context is C64; float32, float16 or bfloat16 is expected"),
    ],
)
def test_what_does_not_fit_is_named(change, words, tmp_path):
    stored = {"context": CONTEXT, "mask": MASK} | change
    save_file({k: v.clone() for k, v in stored.items() if v is not None}, tmp_path / "r.safetensors")
    with pytest.raises(AccuQuantError, match=words):
        read_rows(tmp_path / "r.safetensors", KNOWN)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{}")])
def test_files_that_are_none_are_named(damage, tmp_path):
    save_file({"mask": MASK}, tmp_path / "r.safetensors")
    damage(tmp_path / "r.safetensors")
    with pytest.raises(AccuQuantError, match=r"r\.safetensors (cannot be read|is not a readable safetensors file)"):
        read_rows(tmp_path / "r.safetensors", KNOWN)


def test_guidance_needs_rows_that_stand_for_none():
    check_guidance(KNOWN.model_copy(update={"empty": True}), 2.0)
    with pytest.raises(AccuQuantError, match="nothing that stands for none"):
        check_guidance(KNOWN, 2.0)


def test_bundles_of_encoders_with_one_output_still_open():
    """Their manifests say `input`."""
    assert ByText.model_validate({"kind": "text", "input": "c", "examples": ["a"]}).inputs == ("c",)
    assert ByText(examples=("a",)).inputs == ("context",)
