"""A query as a table, and as tasks for a labelling tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.base import is_regressor

from skfishermask.data import Data, Estimator, UserValue, file_of, take_rows, with_labels


def query_table(
    estimator: Estimator,
    X_pool: Data,
    indices: np.ndarray,
    gains: np.ndarray | None = None,
    *,
    files: Sequence[str] | None = None,
) -> dict[str, np.ndarray]:
    """Return what a query chose as a table, the first choice first.

    Parameters
    ----------
    estimator : estimator or None
        What was queried, to predict. None, or a sampler that is not fitted: no predictions.
    X_pool : array-like, DataFrame, sparse matrix, tensor, dict of arrays or Dataset
        The pool that was queried.
    indices : ndarray of shape (n_instances,)
        The chosen rows, as the query returned them.
    gains : ndarray of shape (n_instances,), optional
        Of the same query.
    files : sequence of str, optional
        A name for each sample of the pool. None: those that torchvision's folders know.

    Returns
    -------
    dict of str to ndarray of shape (n_instances,)
        Columns, of which ``pandas.DataFrame`` makes a frame: ``"rank"``, from 1; ``"row"`` in the
        pool; ``"file"``, where names are known; ``"gain"``, if given; ``"predicted"``, the label
        (a list, where a sample has several: whether each is present); and ``"uncertainty"``,
        unless labels are numbers: one minus the largest probability, in the mean over several
        labels or positions.

    Examples
    --------
    >>> import numpy as np
    >>> from skfishermask import FisherMaskSampler, query_table
    >>> X = np.random.default_rng(0).normal(size=(60, 4))
    >>> y = np.where(X[:, 0] > 0, "yes", "no")
    >>> sampler = FisherMaskSampler(random_state=0).fit(X[:20], y[:20])
    >>> indices, instances, gains = sampler.query(X[20:], 3, return_metrics=True)
    >>> table = query_table(sampler, X[20:], indices, gains)
    >>> list(table), table["rank"].tolist()
    (['rank', 'row', 'gain', 'predicted', 'uncertainty'], [1, 2, 3])
    """
    rows = np.asarray(indices)
    table = {"rank": np.arange(1, len(rows) + 1), "row": rows}
    names = [file_of(X_pool, int(row)) if files is None else files[row] for row in rows]
    if None not in names:
        table["file"] = np.array([str(name) for name in names])
    if gains is not None:
        table["gain"] = np.asarray(gains)
    is_fitted = getattr(estimator, "__sklearn_is_fitted__", lambda: True)
    if estimator is not None and is_fitted():
        instances = with_labels(take_rows(X_pool, rows))
        predicted = table["predicted"] = np.asarray(estimator.predict(instances))
        if hasattr(estimator, "predict_proba") and not is_regressor(estimator):
            p = np.asarray(estimator.predict_proba(instances))
            has_several = predicted.ndim == 2 and predicted.shape == p.shape
            doubt = np.minimum(p, 1 - p) if has_several else 1 - p.max(axis=1)
            table["uncertainty"] = doubt.reshape(len(rows), -1).mean(axis=1)
            predicted = predicted.astype(bool) if has_several else predicted
        table["predicted"] = predicted
        if predicted.ndim > 1:  # columns of a frame have one axis
            table["predicted"] = np.empty(len(rows), dtype=object)
            table["predicted"][:] = predicted.tolist()
    return table


def label_studio_tasks(
    table: Mapping[str, np.ndarray],
    sources: Sequence[str] | None = None,
    *,
    from_name: str = "label",
    to_name: str = "image",
    model_version: str = "skfishermask",
) -> list[dict[str, UserValue]]:
    """Return a query as tasks that Label Studio imports as JSON, in the order chosen.

    It sorts tasks by their data, such as the rank, and by the score of their predictions.

    Parameters
    ----------
    table : dict of ndarray
        From :func:`query_table`.
    sources : sequence of str, optional
        An address of each chosen sample, or its text, in the order of the table. None: the column
        ``"file"``.
    from_name, to_name : str
        Names in the project's labelling interface, as in ``<Image name="image" value="$image"/>``
        and ``<Choices name="label" toName="image">``, or for numbers ``<Number name="label"
        toName="image"/>``.
    model_version : str, default="skfishermask"
        What the predictions are called there.

    Returns
    -------
    list of dict
        For ``json.dump``. The data of a task are the source, called `to_name`, and the columns of
        the table. The predicted label is a prediction, scored by its probability: choices, of
        several labels the numbers of those present; or a number.

    Raises
    ------
    ValueError
        If there is not one source for each row of the table, or predictions are several numbers or
        positions, of which no choice can be made: leave the column ``"predicted"`` out.
    """
    columns = {name: np.asarray(column).tolist() for name, column in table.items()}
    n_rows = len(columns["row"])
    if isinstance(sources, str) or (sources is not None and len(sources) != n_rows):
        given = repr(sources) if isinstance(sources, str) else len(sources)
        raise ValueError(
            f"Expected sources with one address for each of the {n_rows} rows of the table, found "
            f"{given}."
        )
    has_numbers = "uncertainty" not in columns
    tasks: list[dict[str, UserValue]] = []
    for i, source in enumerate(columns["file"] if sources is None else sources):
        data = {name: values[i] for name, values in columns.items()} | {to_name: source}
        tasks.append({"data": data})
        if "predicted" in data:
            result = _as_result(data["predicted"], has_numbers=has_numbers)
            result |= {"from_name": from_name, "to_name": to_name}
            prediction: dict[str, UserValue] = {"model_version": model_version, "result": [result]}
            if "uncertainty" in data:
                prediction["score"] = 1 - data["uncertainty"]
            tasks[-1]["predictions"] = [prediction]
    return tasks


def _as_result(label: UserValue, *, has_numbers: bool) -> dict[str, UserValue]:
    """Return a predicted label as Label Studio has it."""
    if has_numbers and isinstance(label, float):
        return {"type": "number", "value": {"number": label}}
    if isinstance(label, list):
        if not all(isinstance(is_present, bool) for is_present in label):
            raise ValueError(
                "Predictions of several numbers, or of positions, are no choice of Label Studio: "
                'leave them out, as by del table["predicted"].'
            )
        names = np.flatnonzero(label).tolist()
    else:
        names = [label]
    return {"type": "choices", "value": {"choices": [str(name) for name in names]}}
