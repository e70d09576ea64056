from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from skfishermask import PUBLISHED, FisherMaskSampler
from skfishermask.data import NetSamples, SampleRole
from tests import nets

X, Y = nets.digits()


def batches_of(
    net: Any, X: Any, rows: np.ndarray | None = None, batch_size: int | None = None
) -> Any:
    return NetSamples(net, X, SampleRole.POOL, batch_size).batches(rows)


def rows_of(batches: Any) -> np.ndarray:
    return torch.cat([b if isinstance(b, Tensor) else b["x"] for b in batches]).cpu().numpy()


class OwnLoader(DataLoader):
    """A loader of the user's own that keeps the contract of DataLoader."""


@pytest.mark.parametrize(
    "iterator",
    [
        {},
        {"iterator_valid__shuffle": True},
        {"iterator_valid__drop_last": True},
        {"iterator_valid__batch_size": 7, "iterator_valid__drop_last": True},
        {"iterator_valid__sampler": list(range(5))},
        {"iterator_valid__batch_sampler": [[1, 2], [3]]},
        {"iterator_valid__num_workers": 1},
        {"iterator_valid__collate_fn": torch.utils.data.default_collate},
        {"iterator_valid": OwnLoader},
        {"batch_size": -1},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_rows_come_whole_and_in_order(iterator: dict[str, Any]) -> None:
    net = nets.logits_net(**iterator).initialize()
    np.testing.assert_array_equal(rows_of(batches_of(net, X[:50])), X[:50])
    rows = np.array([4, 3, 9, 30])
    np.testing.assert_array_equal(rows_of(batches_of(net, X[:50], rows)), X[rows])


@pytest.mark.parametrize(
    ("size", "batch_size", "expected"),
    [(None, 32, [32, 18]), (20, 32, [20, 20, 10]), (None, -1, [50])],
)
def test_batch_size(size: int | None, batch_size: int, expected: list[int]) -> None:
    net = NeuralNetClassifier(nets.mlp(), batch_size=batch_size).initialize()
    batches = batches_of(net, X[:50], batch_size=size)
    assert [len(b) for b in batches] == expected
    assert len(batches) == len(expected)
    assert len(batches.rows) == 50


def test_no_rows() -> None:
    assert list(batches_of(nets.logits_net().initialize(), X, np.arange(0))) == []


class Faulty(torch.utils.data.Dataset):
    """The digits, with something wrong at row 21."""

    def __init__(self, fault: Callable[[Tensor], Any]) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 50

    def __getitem__(self, i: int) -> Any:
        return self.fault(torch.as_tensor(X[i])) if i == 21 else (torch.as_tensor(X[i]), 0)


def stop(sample: Tensor) -> Any:
    raise StopIteration


def unreadable(sample: Tensor) -> Any:
    return None


def readable_only(samples: list[Any]) -> Any:
    return torch.utils.data.default_collate([s for s in samples if s is not None])


def each_twice(samples: list[Any]) -> Any:
    return torch.utils.data.default_collate([*samples, samples[-1]])


def one_input_short(samples: list[Any]) -> Any:
    batch = torch.stack([torch.as_tensor(x) for x, _ in samples])
    return {"x": batch, "also": batch[:-1]}, torch.zeros(len(batch))


class Shortened(DataLoader):
    """Leaves the last batch out."""

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        return iter(batches[:-1])


class Lengthened(DataLoader):
    """Gives the last batch twice."""

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        return iter([*batches, batches[-1]])


SECOND = r"8 samples in batch 2 of X_pool \(row 16 to row 23\), found"

FAULTS = {
    "stop": (Faulty(stop), {}, f"{SECOND} no batch"),
    "stop in a worker": (Faulty(stop), {"num_workers": 1}, f"{SECOND} no batch"),
    "dropped": (Faulty(unreadable), {"collate_fn": readable_only}, f"{SECOND} 7"),
    "dropped in a worker": (
        Faulty(unreadable),
        {"collate_fn": readable_only, "num_workers": 1},
        f"{SECOND} 7",
    ),
    "repeated": (X[:50], {"collate_fn": each_twice}, "8 samples in batch 0 of X_pool .* found 9"),
    "one input short": (X[:50], {"collate_fn": one_input_short}, r"lengths \[8, 7\]"),
    "last batch missing": (X[:50], Shortened, "2 samples in batch 6 of .* found no batch"),
    "one batch more": (X[:50], Lengthened, "0 samples in batch 7 of X_pool, found one more"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rows", [None, np.arange(50)], ids=["all", "some"])
def test_as_many_rows_come_as_were_asked_for(fault: str, rows: Any) -> None:
    data, how, message = FAULTS[fault]
    options = {"iterator_valid": how} if isinstance(how, type) else {}
    options |= {} if options else {f"iterator_valid__{name}": value for name, value in how.items()}
    net = nets.logits_net(**options).initialize()
    with pytest.raises(ValueError, match=message):
        list(batches_of(net, data, rows, batch_size=8))


def test_no_batch_is_made_of_other_samples_in_a_query() -> None:
    """The next sample is taken for the one that was left out, and the last for no sample at all."""
    net = nets.fitted(nets.logits_net(iterator_valid__collate_fn=readable_only))
    sampler = FisherMaskSampler(mask="output_layer", **PUBLISHED, random_state=0)
    with pytest.raises(ValueError, match=r"50 samples in batch 0 of X_pool .* found 49"):
        sampler(net, Faulty(unreadable), 5)
    with pytest.raises(ValueError, match=r"50 samples in batch 0 of X_labeled .* found no batch"):
        sampler(net, X[:60], 5, X_labeled=Faulty(stop))


INPUTS = {
    "array": X[:9],
    "tensor": torch.as_tensor(X[:9]),
    "dict": {"x": X[:9]},
    "dataset": TensorDataset(torch.as_tensor(X[:9]), torch.zeros(9)),
    "unlabelled dataset": TensorDataset(torch.as_tensor(X[:9])),
}


@pytest.mark.parametrize("data", INPUTS.values(), ids=INPUTS)
def test_kinds_of_input(data: Any) -> None:
    net = nets.logits_net().initialize()
    assert len(NetSamples(net, data, SampleRole.POOL)) == 9
    np.testing.assert_array_equal(rows_of(batches_of(net, data, batch_size=4)), X[:9])


def test_a_data_frame_gives_its_columns_by_name_as_skorch_does() -> None:
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0], "b": [4.0, 5.0, 6.0]})
    (batch,) = batches_of(nets.logits_net().initialize(), frame)
    assert batch["a"].tolist() == [[1.0], [2.0], [3.0]]


def test_a_memory_map_is_read_row_by_row(tmp_path: Any) -> None:
    path = tmp_path / "pool.npy"
    np.save(path, X[:50])
    mapped = np.load(path, mmap_mode="r")
    net = nets.logits_net().initialize()
    np.testing.assert_array_equal(rows_of(batches_of(net, mapped)), X[:50])


def test_an_iterable_without_length() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([1, 2])

    with pytest.raises(TypeError, match="found Stream"):
        batches_of(nets.logits_net().initialize(), Stream())


@pytest.mark.parametrize("iterator", [{}, {"iterator_valid__num_workers": 1}], ids=str)
def test_the_global_random_state_is_not_touched(iterator: dict[str, Any]) -> None:
    net = nets.logits_net(**iterator).initialize()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(batches_of(net, X[:50]))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
