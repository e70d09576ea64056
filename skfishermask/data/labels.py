"""Labels: that none is missing, that there are several classes, and which."""

from __future__ import annotations

import numpy as np

from skfishermask.data.handed import Labels


def check_no_gaps(y: Labels) -> None:
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


def counted(classes: np.ndarray, y: np.ndarray | None) -> str:
    """Name the classes, the rarest first: a misspelt one is among these."""
    if y is None:
        return ""
    counts = np.bincount(y.astype("int64"), minlength=len(classes))
    rarest = np.argsort(counts, kind="stable")[:10].tolist()
    named = ", ".join(f"{classes.tolist()[i]!r} ({counts[i]})" for i in rarest)
    return f". Those in y, the rarest first: {named}"


def check_classes(classes: np.ndarray) -> np.ndarray:
    """Give the classes back; raise ValueError if there are fewer than two."""
    if len(classes) < 2:
        raise ValueError(
            f"Expected at least 2 classes in y, found {len(classes)} class: {classes.tolist()}. "
            "Label samples of another class first."
        )
    return classes
