"""The spool: read once, checked, bounded, kept as it was, and gone afterwards."""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.data import DataLoader, TensorDataset

import planish
from planish.ir import Program, capture
from planish.ir.errors import UsageError
from planish.passes import calibrate
from planish.passes.calibrate import Spool, needs_calibration, spool
from planish.passes.recipe import Recipe
from tests.support.example_passes import Everything, NeedsCalibration, RoundWeights


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        found: Tensor = self.table(ids) * mask[..., None] * scale
        return found


@pytest.fixture(scope="module")
def one() -> Program:
    """One input ``x`` of any batch."""
    shapes = {"input": {0: Dim("batch")}}
    return capture(nn.Linear(4, 2).eval(), (torch.randn(3, 4),), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def two() -> Program:
    """Inputs ``ids`` and ``mask`` of one batch and at most 8 tokens."""
    axes = {0: Dim("batch"), 1: Dim("length", max=8)}
    sample = {"ids": torch.zeros(2, 4, dtype=torch.int64), "mask": torch.ones(2, 4)}
    return capture(Encoder().eval(), (), sample, dynamic_shapes={"ids": axes, "mask": axes})


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where spools spill to."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def ids(*shape: int) -> Tensor:
    return torch.randint(10, shape)


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- reading --------------------------------------------------------------------------------------


def test_every_form_of_a_batch_becomes_flat_inputs(two: Program) -> None:
    tokens, mask = ids(3, 5), torch.ones(3, 5)
    batches = [
        {"ids": tokens, "mask": mask},
        {"mask": mask, "ids": tokens},
        (tokens, mask),
        [tokens, mask],
        {"ids": tokens, "mask": mask, "scale": 1.0},
    ]
    with spool(batches, two) as held:
        assert len(held) == 5
        assert held.names == ("ids", "mask")
        assert all(same(batch, (tokens, mask)) for batch in held)


def test_a_bare_tensor_is_one_argument_and_sizes_may_differ(one: Program) -> None:
    batches = [torch.randn(n, 4) for n in (1, 2, 7)]
    with spool(batches, one) as held:
        assert [batch[0].shape[0] for batch in held] == [1, 2, 7]


def test_a_loader_is_read(one: Program) -> None:
    data = torch.randn(10, 4)
    loader = DataLoader(TensorDataset(data), batch_size=4)
    with spool(loader, one) as held:
        assert torch.equal(torch.cat([batch[0] for batch in held]), data)


@pytest.mark.parametrize("in_memory_bytes", [0, 40, 1 << 20])
def test_a_generator_is_read_once_and_iterated_as_often_as_wished(
    one: Program, temporary: Path, in_memory_bytes: int
) -> None:
    read = []

    def batches() -> Iterator[Tensor]:
        buffer = torch.empty(2, 4)
        for number in range(4):
            read.append(number)
            yield buffer.fill_(number)  # one buffer for all, as many loaders do

    with spool(batches(), one, in_memory_bytes=in_memory_bytes) as held:
        for _ in range(3):
            assert [float(batch[0][0, 0]) for batch in held] == [0, 1, 2, 3]
        on_disk = len(list(temporary.rglob("*.safetensors")))
        assert on_disk == {0: 4, 40: 3, 1 << 20: 0}[in_memory_bytes]
    assert read == [0, 1, 2, 3]
    assert list(temporary.iterdir()) == []


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64]
DTYPES += [torch.int32, torch.int8, torch.uint8, torch.bool]


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 3),
    transposed=st.booleans(),
)
def test_what_comes_back_from_disk_is_what_went_there(
    dtype: torch.dtype, rows: int, transposed: bool
) -> None:
    sample = torch.ones(2, 3).to(dtype)
    program = capture(Copy().eval(), (sample,), dynamic_shapes={"x": {0: Dim("rows", min=0)}})
    value = (torch.randn(3, rows).T if transposed else torch.randn(rows, 3)).to(dtype)
    with spool([value], program, in_memory_bytes=0) as held:
        ((again,),) = held
    assert again.dtype == dtype
    assert torch.equal(again, value)


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def test_a_batch_is_kept_as_it_was(one: Program) -> None:
    batch = torch.zeros(2, 4, requires_grad=True)
    with spool([batch], one) as held:
        with torch.no_grad():
            batch.add_(1)
        ((kept,),) = held
        assert not kept.any()
        assert not kept.requires_grad


# -- bounds ---------------------------------------------------------------------------------------


def test_reading_ends_at_the_limit_with_a_remark(one: Program) -> None:
    said: list[str] = []
    read = []

    def endless() -> Iterator[Tensor]:
        while True:
            read.append(1)
            yield torch.randn(64, 4)  # 1 KiB

    with spool(endless(), one, limit_bytes=3000, remark=said.append) as held:
        assert len(held) == 2
        assert held.bytes == 2048
    assert len(read) == 3
    assert said == ["calibration ended after 2 batches: more than 0 MiB are not kept"]


def test_one_batch_is_kept_whatever_the_limit(one: Program) -> None:
    with spool([torch.randn(64, 4)], one, limit_bytes=1) as held:
        assert len(held) == 1


def test_files_go_away_with_the_spool_also_if_nobody_closes_it(
    one: Program, temporary: Path
) -> None:
    held = spool([torch.randn(2, 4)], one, in_memory_bytes=0)
    assert len(list(temporary.rglob("*.safetensors"))) == 1
    del held
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_files_go_away_where_a_later_batch_is_wrong(one: Program, temporary: Path) -> None:
    with pytest.raises(UsageError, match="calibration batch 1"):
        spool([torch.randn(2, 4), torch.randn(2, 5)], one, in_memory_bytes=0)
    assert list(temporary.iterdir()) == []


def test_a_closed_spool_says_so(one: Program) -> None:
    held = spool([torch.randn(2, 4)], one)
    held.close()
    held.close()
    with pytest.raises(UsageError, match="is closed"):
        list(held)


def test_a_disk_that_cannot_be_written_is_named(
    one: Program, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda prefix: str(temporary / "gone"))
    with pytest.raises(UsageError, match=r"cannot be kept on disk: .*No such file") as caught:
        spool([torch.randn(2, 4)], one, in_memory_bytes=0)
    assert "TMPDIR" in str(caught.value)


# -- mistakes -------------------------------------------------------------------------------------


def raising() -> Iterator[Tensor]:
    yield torch.randn(2, 4)
    raise ValueError("broken file")


def used_up() -> Iterator[Tensor]:
    generator = raising()
    for _ in range(2):
        try:
            next(generator)
        except ValueError:
            break
    return generator


X = torch.randn(2, 4)
ONE: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: DataLoader(TensorDataset(X, torch.ones(2))), "looks like a label", "batch[0] for"),
    (lambda: [(X, X, X)], "it holds 3 inputs where the model takes 1 (input)", "calibration=("),
    (lambda: [{"input": X, "labels": X}], "'labels', which the model does not take", "labels"),
    (lambda: [], "calibration gave no batch", "fresh one"),
    (used_up, "calibration gave no batch", "only once"),
    (lambda: X, "calibration is one Tensor", "[inputs]"),
    (lambda: {"input": X}, "calibration is one dict of inputs", "[inputs]"),
    (lambda: "data.npz", "calibration is one str", "[inputs]"),
    (lambda: 3, "calibration is a int, which cannot be iterated", "DataLoader"),
    (raising, "calibration failed after 1 batches: ValueError: broken file", ""),
    (lambda: [X, "text"], "a str is no input", "calibration batch 1"),
    (lambda: [X.numpy()], "a ndarray is no input", "give tensors"),
    (lambda: [{}], "missing input 'input'", "calibration batch 0"),
    (lambda: [(None,)], "input 'input' is a NoneType", "calibration batch 0"),
    (lambda: [X.double()], "input 'input' is f64; the model takes f32", "input.to(torch.float32)"),
    (lambda: [torch.randn(2, 5)], "shape [2, 5]; the model takes [batch", "dynamic_shapes"),
    (lambda: [torch.randn(2, 4, 1)], "shape [2, 4, 1]", "calibration batch 0"),
    (lambda: [torch.randn(4)], "shape [4]", "calibration batch 0"),
]


@pytest.mark.parametrize(("make", "what", "also"), ONE)
def test_a_mistake_is_named(one: Program, make: Callable[[], Any], what: str, also: str) -> None:
    with pytest.raises(UsageError) as caught:
        spool(make(), one)
    assert what in str(caught.value)
    assert also in str(caught.value)


TWO: list[tuple[Any, str]] = [
    ((ids(2, 9), torch.ones(2, 9)), "shape [2, 9]; the model takes [batch (0 to any), length (0"),
    ((ids(2, 4), torch.ones(3, 4)), "input 'mask' has shape [3, 4]"),
    ((ids(2, 4), torch.ones(2, 5)), "input 'mask' has shape [2, 5]"),
    ((ids(2, 4).int(), torch.ones(2, 4)), "input 'ids' is i32; the model takes i64"),
    ((ids(2, 4),), "missing input 'mask'"),
    ({"ids": ids(2, 4), "masks": torch.ones(2, 4)}, "'masks', which the model does not take"),
    ({"ids": ids(2, 4), "mask": torch.ones(2, 4), "scale": 2.0}, "unknown input 'scale'"),
    ((ids(2, 4), torch.ones(2, 4), ids(2)), "the last looks like a label"),
]


@pytest.mark.parametrize(("batch", "what"), TWO)
def test_a_batch_that_does_not_fit_is_named(two: Program, batch: Any, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        spool([batch], two)
    assert what in str(caught.value)
    assert "calibration batch 0" in str(caught.value)


class Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y.reshape(-1, 2).sum(1)


def test_derived_sizes_must_follow() -> None:
    n = Dim("n", min=2, max=64)
    program = capture(
        Pair().eval(),
        (torch.randn(3), torch.randn(6)),
        dynamic_shapes={"x": {0: n}, "y": {0: 2 * n}},
    )
    with spool([(torch.randn(5), torch.randn(10))], program) as held:
        assert len(held) == 1
    with pytest.raises(UsageError, match="input 'y' has a size of 12; the other inputs ask for 10"):
        spool([(torch.randn(5), torch.randn(12))], program)


# -- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "needed"),
    [
        ((), False),
        ((Everything(),), False),
        ((Everything(), RoundWeights()), True),
        ((NeedsCalibration(),), True),
    ],
)
def test_calibration_is_of_use_where_a_pass_is_calibrated_or_measured(
    passes: Any, needed: bool
) -> None:
    assert needs_calibration(Recipe(passes)) is needed
    assert "was not read" in calibrate.UNUSED


def test_a_spool_can_be_filled_by_hand(one: Program) -> None:
    held = Spool(one)
    held.add((X,), 32)
    assert len(held) == 1
    assert held.bytes == 32


def test_an_input_that_was_not_captured_is_named() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, kinds: Tensor | None = None) -> Tensor:
            return x.relu() if kinds is None else x + kinds

    program = planish.optimize(Optional().eval(), {"x": X}, recipe="none").program
    assert len(spool([{"x": X, "kinds": None}], program)) == 1
    with pytest.raises(UsageError, match="'kinds', which the model was captured without") as error:
        spool([{"x": X, "kinds": X}], program)
    assert "leave it out of the data" in str(error.value)
