"""What is wrong with samples or labels, in words for the user."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.sparse import issparse
from torch.utils.data import Subset

from skfishermask.data.net import has_own_dataset, is_net
from skfishermask.data.rows import input_arrays, is_multi_input, n_rows
from skfishermask.data.samples import Relabeled, as_rows, inputs_of
from skfishermask.data.types import Data, Estimator, Labels

# Samples of a Dataset that are read to find an odd one.
_LOOKED_AT = 10_000
# What PyTorch or scikit-learn say when a net is trained, and what to do: the first that is found.
_REMEDIES = {
    "target dtype|scalar type Long": (
        'This criterion takes class numbers as int64: y.astype("int64"), or train '
        "FisherMaskSampler(net), which takes labels of any type."
    ),
    "to the desired output type|Found dtype": (
        'This criterion takes labels in the dtype of the outputs: y.astype("float32").'
    ),
    "same dtype|scalar type|type .* should be the same": (
        "skorch gives a network numbers in the dtype that they have, and its parameters have "
        'another. Cast the samples, as by X.astype("float32"); what transformers of a Pipeline '
        "return, by a step FunctionTransformer(numpy.float32) before the net."
    ),
    "n_splits": (
        "The net sets a part of the labels aside to validate on. With few labels give it "
        "train_split=None."
    ),
    "more than 1 value per channel": (
        "The last batch has one sample, on which batch normalisation cannot be trained: give the "
        "net iterator_train__drop_last=True, or another batch_size."
    ),
}


@contextmanager
def explained(what: str, X: Data, classes: str = "") -> Iterator[None]:
    """Raise what PyTorch says about unfit data as an estimator's ValueError or TypeError.

    An IndexError is explained by `classes`, too, and of a Dataset the odd sample is named.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if isinstance(X, torch.utils.data.Dataset):
            note = odd_sample(X, np.arange(min(n_rows(X), _LOOKED_AT)), "X")
        else:
            note = image_hint(X)
        # "Target" is PyTorch's word for a label, which is no integer of X.
        is_of_inputs = isinstance(error, IndexError) and "Target" not in str(error)
        numbers = integers_hint(X, "X") if is_of_inputs else ""
        for hint in (note, _remedy(error), numbers, missing_text_hint(X, "X")):
            if hint:
                error.add_note(hint)
        if not isinstance(error, RuntimeError | IndexError | TypeError):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = classes if isinstance(error, IndexError) else ""
        explained = kind(f"{what}{reason}: {error}")
        for note in getattr(error, "__notes__", []):
            explained.add_note(note)
        raise explained from error


@contextmanager
def explaining_fit(estimator: Estimator, X: Data, y: Labels) -> Iterator[None]:
    """Add what samples and labels a net expects to an error in which it says nothing of them."""
    try:
        yield
    except Exception as error:
        names = [label for label in y if isinstance(label, str)] if hasattr(y, "__len__") else []
        if names and isinstance(error, TypeError):
            raise TypeError(
                f"{str(error).rstrip('.')}. A skorch net takes class numbers from 0, but y has "
                f"{str(names[0])!r}: encode the labels (sklearn.preprocessing.LabelEncoder), "
                "or train FisherMaskSampler(net), which takes labels of any type."
            ) from error
        for hint in (_remedy(error), _container_hint(estimator, X)):
            if hint:
                error.add_note(hint)
        raise


def _remedy(error: Exception) -> str:
    if not isinstance(error, RuntimeError | ValueError):
        return ""
    known = (remedy for words, remedy in _REMEDIES.items() if re.search(words, str(error)))
    return next(known, "")


def integers_hint(X: Data, name: str, rows: np.ndarray | None = None) -> str:
    """Name the rows of the least and the largest integer, where samples are such: ids of tokens.

    Without `rows` these are counted from 0.
    """
    values = X.numpy(force=True) if isinstance(X, torch.Tensor) else X
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.size == 0:
        return ""
    each = values.reshape(len(values), -1)
    least, largest = int(each.min(1).argmin()), int(each.max(1).argmax())
    numbers = np.arange(len(each)) if rows is None else rows
    return (
        f"{name} has integers from {each[least].min()}, in row {numbers[least]}, to "
        f"{each[largest].max()}, in row {numbers[largest]}: a table of the network, such as "
        "torch.nn.Embedding, must have a row for each."
    )


def missing_text_hint(X: Data, name: str) -> str:
    """Name the first sample that is missing, where others are text."""
    is_flat = isinstance(X, list | tuple) or len(getattr(X, "shape", ())) == 1
    samples = list(X) if is_flat and not is_multi_input(X) else []
    missing = [i for i, text in enumerate(samples) if text is None or type(text) is float]
    if not missing or not any(isinstance(text, str) for text in samples):
        return ""
    return (
        f"Row {missing[0]} of {name} is {samples[missing[0]]}, others are text: make text of it, "
        'such as "", or leave it out.'
    )


@contextmanager
def naming_samples(X: Data, name: str) -> Iterator[None]:
    """Add to an error what samples are called where the user gave them, and a missing text."""
    try:
        yield
    except Exception as error:
        if re.search(r"\bX\b", str(error)):
            error.add_note(f"X is {name} here.")
        if hint := missing_text_hint(X, name):
            error.add_note(hint)
        raise


def _container_hint(estimator: Estimator, X: Data) -> str:
    """Return what to change where skorch may not take rows of this container."""
    if not is_net(estimator):
        return ""
    try:
        taken = as_rows(X, "X", has_own_dataset=has_own_dataset(estimator))
    except (TypeError, ValueError) as error:
        return str(error)
    if all(map(operator.is_, input_arrays(taken), input_arrays(X))):
        return ""
    if issparse(X):
        remedy = "X.toarray()"
    else:
        remedy = (
            'numpy.ascontiguousarray(X, "float32"), of each input where there are several, or '
            "train FisherMaskSampler(net), which takes more kinds"
        )
    return (
        f"skorch may not take the samples of a {type(X).__name__} as they are here. Give {remedy}."
    )


def odd_sample(dataset: Data, rows: np.ndarray, name: str) -> str:
    """Describe the sample that cannot be read, or be in a batch with the first one.

    If none of the rows, which made no batch, is odd: what shape they have, if any. Messages call
    the samples `name`.
    """
    first: Data = None
    for row in rows.tolist():
        path = file_of(dataset, row)
        file = "" if path is None else f" ({path})"
        sample = f"Row {row} of {name}{file}"
        try:
            sample_inputs = inputs_of(dataset[row])
        except Exception as error:  # a user's dataset can raise anything
            return f"{sample} cannot be read: {type(error).__name__}: {error}"
        if "PIL." in str(type(sample_inputs)):
            return (
                f"{sample} is an image of PIL: the Dataset must give tensors, as it does with "
                "torchvision's transforms.ToTensor()."
            )
        first = sample_inputs if first is None else first
        if np.shape(sample_inputs) != np.shape(first):
            return (
                f"{sample} has shape {tuple(np.shape(sample_inputs))}, the first one "
                f"{tuple(np.shape(first))}; all must have the same. For images: transforms.Resize"
                '((64, 64)), with two numbers, and Image.open(path).convert("RGB").'
            )
    shape = tuple(np.shape(first))
    return f"A sample of {name} has shape {shape}. {image_hint(first)}".strip() if shape else ""


def file_of(dataset: Data, row: int) -> str | None:
    """Return the file of a sample, where the dataset is one of torchvision's folders."""
    while isinstance(dataset, Subset | Relabeled):
        row = dataset.indices[row] if isinstance(dataset, Subset) else row
        dataset = dataset.dataset
    files = getattr(dataset, "samples", None)
    return str(files[row][0]) if isinstance(files, list) else None


def image_hint(data: Data) -> str:
    """Return what to change where samples look like images as files hold them, or ""."""
    hints = []
    if str(getattr(data, "dtype", "")).endswith("uint8"):
        hints.append("If these are images, make floating-point numbers of uint8: X / 255.")
    shape = tuple(getattr(data, "shape", ()))
    if len(shape) in (3, 4) and shape[-1] in (1, 3, 4) and shape[-3] not in (1, 3, 4):
        hints.append("If these are images, channels come first: X.transpose(0, 3, 1, 2).")
    return " ".join(hints)


def check_no_missing_labels(y: Labels) -> None:
    """Raise ValueError at labels that are missing: None, NaN among others, or blank text."""
    # NumPy makes text of a NaN that is in a list with text.
    values = np.array(y, dtype=object) if isinstance(y, list | tuple) else np.asarray(y)
    if values.ndim != 1 or values.dtype.kind not in "OUT":
        return
    gaps = [
        row
        for row, label in enumerate(values.tolist())
        if label is None
        or (isinstance(label, float) and label != label)
        or (isinstance(label, str) and not label.strip())
        or type(label).__name__ == "NAType"  # of pandas
    ]
    if gaps:
        raise ValueError(
            f"y has no label for {len(gaps)} of {len(values)} samples, the first is row {gaps[0]}: "
            "leave these out of X and y. They stay in the pool."
        )


def check_known(y: np.ndarray, remedy: str = "") -> None:
    """Raise ValueError at NaN or infinity among numbers (n,) or (n, ...), with the place."""
    bad = ~np.isfinite(y)
    if bad.any():
        row, *others = np.argwhere(bad)[0].tolist()
        column = f", column {', '.join(map(str, others))}" if others else ""
        what = "NaN" if np.isnan(y[bad][0]) else "infinity"
        raise ValueError(
            f"Input y contains {what}, first in row {row}{column}: leave such samples out of X and "
            f"y, they stay in the pool.{remedy}"
        )


def check_no_lists_of_labels(y: Labels) -> None:
    """Raise ValueError at labels that are lists or sets, of names or of several lengths."""
    if not isinstance(y, list | tuple) and str(getattr(y, "dtype", "")) != "object":
        return
    several = [row for row in y if isinstance(row, list | tuple | set | frozenset)]
    sizes = {len(row) for row in several}
    has_names = any(isinstance(label, str) for row in several for label in row)
    is_table = len(sizes) <= 1 and not any(isinstance(row, set | frozenset) for row in several)
    if is_table and (not has_names or sizes == {1}):
        return
    raise ValueError(
        f"y has a {type(several[0]).__name__} of labels for a sample, such as {several[0]!r}. For "
        "several labels a sample, expected y of shape (n, n_labels) with 0 and 1, as "
        'sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y), and likelihood="bernoulli" '
        "or a net with BCEWithLogitsLoss."
    )


def counted(classes: np.ndarray, y: np.ndarray | None) -> str:
    """Name the classes, the rarest first: a misspelt one is among these."""
    if y is None:
        return ""
    counts = np.bincount(y.astype("int64"), minlength=len(classes))
    rarest = np.argsort(counts, kind="stable")[:10].tolist()
    named = ", ".join(f"{classes.tolist()[i]!r} ({counts[i]})" for i in rarest)
    return f". Those in y, the rarest first: {named}"


def check_classes(classes: np.ndarray) -> np.ndarray:
    """Return the classes; raise ValueError if there are fewer than two."""
    if len(classes) < 2:
        raise ValueError(
            f"Expected at least 2 classes in y, found {len(classes)} class: {classes.tolist()}. "
            "Label samples of another class first."
        )
    return classes
