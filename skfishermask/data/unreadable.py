"""What is wrong with samples that a loader or a network did not take."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Subset

from skfishermask.data.handed import Data
from skfishermask.data.rows import Relabeled, inputs_of


def odd_sample(dataset: Data, rows: np.ndarray, name: str) -> str:
    """Say which sample cannot be read, or be in a batch with the first one.

    Parameters
    ----------
    dataset : Dataset
        The samples.
    rows : ndarray of int
        Those that made no batch.
    name : str
        What messages call the samples.

    Returns
    -------
    str
        A sentence or two for the user; if no sample is odd, what shape they have, if any.
    """
    first: Data = None
    for row in rows.tolist():
        sample = f"Row {row} of {name}{_file_of(dataset, row)}"
        try:
            found = inputs_of(dataset[row])
        except Exception as error:  # whatever a user's dataset raises, and as the loader met it
            return f"{sample} cannot be read: {type(error).__name__}: {error}"
        if "PIL." in str(type(found)):
            return (
                f"{sample} is an image of PIL: the Dataset must give tensors, as it does with "
                "torchvision's transforms.ToTensor()."
            )
        first = found if first is None else first
        if np.shape(found) != np.shape(first):
            return (
                f"{sample} has shape {tuple(np.shape(found))}, the first one "
                f"{tuple(np.shape(first))}; all must have the same. For images: transforms.Resize"
                '((64, 64)), with two numbers, and Image.open(path).convert("RGB").'
            )
    shape = tuple(np.shape(first))
    return f"A sample of {name} has shape {shape}. {image_hint(first)}".strip() if shape else ""


def _file_of(dataset: Data, row: int) -> str:
    """Name the file of a sample, where the dataset is one of torchvision's folders."""
    while isinstance(dataset, Subset | Relabeled):
        row = dataset.indices[row] if isinstance(dataset, Subset) else row
        dataset = dataset.dataset
    files = getattr(dataset, "samples", None)
    return f" ({files[row][0]})" if isinstance(files, list) else ""


def image_hint(data: Data) -> str:
    """Say what images as files hold them lack, if these are such.

    Parameters
    ----------
    data : array-like, dict or list of them
        Samples that a network did not take.

    Returns
    -------
    str
        A sentence or two for the user, or "".
    """
    found = []
    if str(getattr(data, "dtype", "")).endswith("uint8"):
        found.append("If these are images, make floating-point numbers of uint8: X / 255.")
    shape = tuple(getattr(data, "shape", ()))
    if len(shape) in (3, 4) and shape[-1] in (1, 3, 4) and shape[-3] not in (1, 3, 4):
        found.append("If these are images, channels come first: X.transpose(0, 3, 1, 2).")
    return " ".join(found)
