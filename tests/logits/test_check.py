"""Logits from files, and what is said of those that do not fit."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_logits
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_duo.arrays import read_array
from lightning_duo.logits import Logits, check_logits, read_logits

BASE, SIDEKICK, TARGETS = make_logits(200, 5, seed=3)


def write(folder: Path, suffix: str, name: str, values: Tensor) -> str:
    path = folder / f"{name}{suffix}"
    if suffix == ".npy":
        np.save(path, values.numpy())
    elif suffix == ".npz":
        np.savez(path, values.numpy())
    elif suffix == ".safetensors":
        save_file({name: values}, path)
    else:
        text = "%d" if name == "targets" else "%.9g"
        np.savetxt(path, values.numpy(), delimiter=",", fmt=text)
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".csv"])
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    parts = {"base": BASE, "sidekick": SIDEKICK, "targets": TARGETS}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_logits(*(write(tmp_path, suffix, *part) for part in parts.items()))
    torch.testing.assert_close(found.base.float(), BASE, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.sidekick.float(), SIDEKICK, rtol=1e-6, atol=1e-7)
    assert torch.equal(found.targets, TARGETS)


def test_arrays_by_name_headers_and_half_precision(tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", a=BASE.numpy(), t=TARGETS.numpy().astype(np.uint8))
    save_file({"b": SIDEKICK.bfloat16(), "c": BASE}, tmp_path / "b.safetensors")
    csv = "label\n" + "\n".join(map(str, TARGETS.tolist())) + "\n"
    (tmp_path / "t.csv").write_text(csv, encoding="utf-8-sig")
    for targets in ("all.npz:t", "t.csv"):
        names = ("all.npz:a", "b.safetensors:b", targets)
        found = read_logits(*(str(tmp_path / name) for name in names))
        assert torch.equal(found.base, BASE)
        assert torch.equal(found.sidekick, SIDEKICK.bfloat16())
        assert torch.equal(found.targets, TARGETS)


def test_csv_as_pandas_writes_it(tmp_path: Path) -> None:
    base, targets = tmp_path / "base.csv", write(tmp_path, ".npy", "targets", TARGETS)
    rows = "".join(",".join(map(str, row)) + "\n" for row in BASE.tolist())
    base.write_text("0,1,2,3,4\n" + rows)
    with pytest.warns(UserWarning, match=r"first line .*base\.csv.*header"):
        found = read_logits(str(base), str(base), targets)
    torch.testing.assert_close(found.base.float(), BASE)
    numbered = "".join(f"{i},{line}\n" for i, line in enumerate(rows.splitlines()))
    base.write_text("1.5,,2,3,4\n" + rows)
    with pytest.raises(ValueError, match="could not convert string ''"):
        read_logits(str(base), str(base), targets)
    for header in ("", ",a,b,c,d,e\n", "id,a,b,c,d,e\n"):
        base.write_text(header + numbered)
        with pytest.raises(ValueError, match=r"base\.csv .*first column.*index=False"):
            read_logits(str(base), str(base), targets)
    shuffled = "".join(f"{7 * i % 200},{line}\n" for i, line in enumerate(rows.splitlines()))
    base.write_text(",a,b,c,d,e\n" + shuffled)
    with pytest.raises(ValueError, match=r"base\.csv .*first column.* no name.*index=False"):
        read_logits(str(base), str(base), targets)
    (tmp_path / "t.csv").write_text("0\n" + "".join(f"{t}\n" for t in TARGETS.tolist()))
    base.write_text("a,b,c,d,e\n" + rows)
    with pytest.raises(ValueError, match=r"t\.csv .*201 targets.*base\.csv 200 rows.*header"):
        read_logits(str(base), str(base), str(tmp_path / "t.csv"))


def test_csv_headers_as_other_programs_write_them(tmp_path: Path) -> None:
    path = tmp_path / "logits.csv"
    names = ["tench, Tinca tinca", "b", "c", "d", "e"]
    rows = "".join(",".join(map(str, row)) + "\n" for row in BASE.tolist())
    np.savetxt(path, BASE.numpy(), delimiter=",", header=",".join("abcde"))
    contents = [
        path.read_text(),  # NumPy's header begins with a hash
        ",".join(f'"{name}"' for name in names) + "\n" + rows,
        rows.replace("\n", "\r\n") + "\r\n  \r\n",
        "\ufeff" + rows.removesuffix("\n"),
    ]
    for content in contents:
        path.write_bytes(content.encode())
        torch.testing.assert_close(read_array(str(path)).float(), BASE)


@pytest.mark.filterwarnings("ignore:.*input contained no data")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.npy", None, "no file .*none.npy"),
        ("text.npy", b"these are no numbers", r"text\.npy .*\.npy: "),
        ("pickle.npy", "object", r"pickle\.npy .*\.npy: .*allow_pickle"),
        ("broken.npz", b"PK", r"broken\.npz .*\.npz: "),
        ("broken.safetensors", b"123", r"broken\.safetensors .*\.safetensors: .*header"),
        ("whole.csv", b"0,1\n1,0\n", "may number the columns or be a sample, .* names, or write"),
        ("words.csv", b"0,1\n0,one\n", "words.csv cannot be read as .csv: .*one"),
        (
            "ragged.csv",
            b"0.5,1\n0\n",
            r"ragged.csv cannot be .* first line has 2 cells, line 2 has 1",
        ),
        ("long.csv", b"a,b\n0.5,1\n0,1,2\n", "first line has 2 cells, line 3 has 3"),
        ("index.csv", b"a,b\n7,0.5,1\n4,0,2\n", "first line has 2 cells, line 2 has 3"),
        ("title.csv", b"# logits\n0.5,1\n0,2\n", "first line has 1 cells, line 2 has 2"),
        ("blank.csv", b"0.5,1\n\n0,2\n", "line 2 is blank and others follow"),
        ("spaces.csv", b"a,b\n0.5,1\n  \n0,2\n", "line 3 is blank and others follow"),
        ("first.csv", b"\n0.5,1\n0,2\n", "line 1 is blank and others follow"),
        ("comment.csv", b"0.5,1\n#1,2\n0,2\n", "'#1' .*one sample: numbers .* no comments"),
        ("half.csv", b"0.5,1\n0,2#3\n", "'2#3' .*no comments"),
        ("top.csv", b"#0.5,1\n0,2\n", "'#0.5' .*no comments"),
        ("mixed.csv", b"0,1,label\n0.5,1,0\n", r"first line holds numbers and words \('label'\)"),
        ("na.csv", b"0.5,n/a\n0.5,1\n", r"numbers and words \('n/a'\); .* write numbers only"),
        ("empty.csv", b"", "empty.csv"),
        ("base.pt", b"", r"base\.pt .*\.npy, \.npz, \.safetensors or \.csv"),
        ("two.npz", "two", r"two\.npz .*\['a', 'b'\].*two\.npz:a"),
        ("two.npz:c", "two", r"two\.npz .*\['a', 'b'\].*two\.npz:a"),
        ("text.npz", "text", r"text\.npz .*numbers.*<U3"),
        ("folder.npy", "folder", "folder.npy is a folder"),
        ("one.npy:a", "one", "one.npy .*one array.*':a'"),
    ],
)
def test_unreadable_files_are_named(
    name: str, content: bytes | str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name.split(":")[0]
    if content == "object":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif content == "two":
        np.savez(path, a=np.zeros(2), b=np.zeros(2))
    elif content == "text":
        np.savez(path, a=np.array(["cat", "dog"]))
    elif content == "folder":
        path.mkdir()
    elif content == "one":
        np.save(path, BASE.numpy())
    elif content is not None:
        path.write_bytes(content)
    others = [write(tmp_path, ".npy", *part) for part in (("s", SIDEKICK), ("t", TARGETS))]
    with pytest.raises((ValueError, OSError), match=message):
        read_logits(str(tmp_path / name), *others)


def changed(values: Tensor, row: int, value: float) -> Tensor:
    values = values.clone()
    values[row, 0] = value
    return values


def beside(logits: Tensor, column: int = 5) -> Tensor:
    """Logits with the targets in a column of their own."""
    parts = [logits[:, :column], TARGETS[:, None].to(logits), logits[:, column:]]
    return torch.cat(parts, dim=1)


NAMES = Logits("b.npy", "s.npy", "t.npy")


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ((BASE[:-1], SIDEKICK, TARGETS), r"s\.npy .*\(200, 5\), b\.npy \(199, 5\)"),
        ((BASE, SIDEKICK[:, :4], TARGETS), r"s\.npy .*\(200, 4\), b\.npy \(200, 5\)"),
        ((BASE, SIDEKICK, TARGETS[:9]), r"t\.npy .*9 targets, b\.npy 200 rows"),
        ((BASE[:, 0], SIDEKICK, TARGETS), r"b\.npy .*\(N, K\).*\(200,\)"),
        ((BASE[:0], SIDEKICK[:0], TARGETS[:0]), r"b\.npy .*at least one sample.*\(0, 5\)"),
        ((BASE, SIDEKICK.long(), TARGETS), r"s\.npy .*floating-point.*int64"),
        ((BASE, changed(SIDEKICK, 7, float("nan")), TARGETS), r"s\.npy .*NaN .*1 of 200 .*\[7\]"),
        ((changed(BASE, 3, float("inf")), SIDEKICK, TARGETS), r"b\.npy .*\+inf .*1 of 200 .*\[3\]"),
        ((BASE, SIDEKICK, TARGETS + 1), r"t\.npy .*0\.\.4.*1\.\.5.*subtract 1"),
        ((BASE, SIDEKICK, TARGETS - 1), r"t\.npy .*0\.\.4.*-1\.\.3"),
        ((BASE, SIDEKICK, TARGETS + 0.5), r"t\.npy .*whole numbers.*\.5 in row 0"),
        ((BASE, SIDEKICK, TARGETS > 2), r"t\.npy .*indices.*booleans.* 5 classes"),
        (
            (BASE, SIDEKICK, nn.functional.one_hot(TARGETS)),
            r"t\.npy .*\(200, 5\).*argmax",
        ),
        ((beside(BASE), beside(SIDEKICK), TARGETS), r"column 5 of b.npy .* holds the targets"),
        ((BASE.new_zeros(200, 6), beside(SIDEKICK, 0), TARGETS), r"column 0 of s.npy .* leave it"),
    ],
)
def test_what_does_not_fit_is_named(logits: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_logits(Logits(*logits), NAMES)


def test_big_endian_numbers_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "b.npy", BASE.numpy().astype(">f4"))
    names = [str(tmp_path / "b.npy")] * 2 + [write(tmp_path, ".npy", "targets", TARGETS)]
    assert torch.equal(read_logits(*names).base, BASE)


def test_columns_and_whole_floats_are_targets_too() -> None:
    for targets in (TARGETS[:, None], TARGETS.double(), TARGETS.int()):
        assert torch.equal(check_logits(Logits(BASE, SIDEKICK, targets)).targets, TARGETS)


ORDER = torch.randperm(200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        ((BASE.softmax(1), SIDEKICK, TARGETS), r"b\.npy .*probabilities.* 1\)"),
        ((BASE, SIDEKICK.softmax(1), TARGETS), r"s\.npy .*probabilities.* 1\)"),
        (((100 * BASE.softmax(1)).round(), SIDEKICK, TARGETS), r"b\.npy .*probabilities.* 100\)"),
        ((BASE, SIDEKICK, TARGETS * 0 + 2), r"t\.npy .*one class.*\(2\)"),
        ((BASE, SIDEKICK[ORDER], TARGETS), r"^s\.npy .*chance.*b\.npy .*order"),
        ((BASE[ORDER], SIDEKICK, TARGETS), r"^b\.npy .*chance.*s\.npy .*order"),
        ((BASE, SIDEKICK, TARGETS[ORDER]), r"b\.npy nor s\.npy .*t\.npy.*chance.*order"),
    ],
)
def test_probable_mistakes_are_warned_of(logits: tuple[Tensor, ...], message: str) -> None:
    with pytest.warns(UserWarning, match=message) as seen:
        check_logits(Logits(*logits), NAMES)
    assert len(seen) == 1


def test_weak_models_and_small_sets_are_not_warned_of() -> None:
    constant = torch.zeros_like(SIDEKICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_logits(Logits(BASE, constant, TARGETS))
        check_logits(Logits(BASE[:20], SIDEKICK[:20].flip(0), TARGETS[:20]))


def test_a_column_that_outdoes_all_classes_is_warned_of() -> None:
    rest = torch.where(TARGETS == 0, 1, TARGETS)  # class 0 is not the commonest
    base = torch.cat([1000 + torch.randn(len(BASE), 1), BASE[:, 1:]], dim=1)
    with pytest.warns(UserWarning, match="base_logits .*class 0 for every sample.*class 1"):
        check_logits(Logits(base, SIDEKICK, rest))


def test_probabilities_of_classes_are_checked() -> None:
    soft = BASE.softmax(1)
    assert check_logits(Logits(BASE, SIDEKICK, soft), NAMES).targets is soft
    with pytest.raises(ValueError, match=r"t\.npy .*rows \[3\].*sum of 1.*task=Labels\(\)"):
        check_logits(Logits(BASE, SIDEKICK, changed(soft, 3, 2.0)), NAMES)
    with pytest.warns(UserWarning, match="chance"):
        check_logits(Logits(BASE, SIDEKICK, soft[ORDER]), NAMES)
