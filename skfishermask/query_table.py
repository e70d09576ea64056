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
        (a list of them, where a sample has several); and ``"uncertainty"``, unless labels are
        numbers: one minus the largest probability, in the mean over several labels or positions.

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
        predicted = np.asarray(estimator.predict(instances))
        table["predicted"] = predicted
        if predicted.ndim > 1:  # columns of a frame have one axis
            table["predicted"] = np.empty(len(rows), dtype=object)
            table["predicted"][:] = predicted.tolist()
        if hasattr(estimator, "predict_proba") and not is_regressor(estimator):
            p = np.asarray(estimator.predict_proba(instances))
            has_several = predicted.ndim == 2 and predicted.shape == p.shape
            doubt = np.minimum(p, 1 - p) if has_several else 1 - p.max(axis=1)
            table["uncertainty"] = doubt.reshape(len(rows), -1).mean(axis=1)
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
        An address of each chosen sample, or its text. None: the column ``"file"``.
    from_name, to_name : str
        Names in the project's labelling interface, as in ``<Image name="image" value="$image"/>``
        and ``<Choices name="label" toName="image">``.
    model_version : str, default="skfishermask"
        What the predictions are called there.

    Returns
    -------
    list of dict
        For ``json.dump``. The data of a task are the source, called `to_name`, and the columns of
        the table. The predicted label is a prediction, scored by its probability.
    """
    columns = {name: column.tolist() for name, column in table.items()}
    tasks: list[dict[str, UserValue]] = []
    for i, source in enumerate(columns["file"] if sources is None else sources):
        data = {name: values[i] for name, values in columns.items()} | {to_name: source}
        tasks.append({"data": data})
        if "predicted" in data:
            label = data["predicted"]
            labels = np.flatnonzero(label).tolist() if isinstance(label, list) else [label]
            choice: dict[str, UserValue] = {"value": {"choices": [str(name) for name in labels]}}
            choice |= {"from_name": from_name, "to_name": to_name, "type": "choices"}
            prediction = {"model_version": model_version, "result": [choice]}
            if "uncertainty" in data:
                prediction["score"] = 1 - data["uncertainty"]
            tasks[-1]["predictions"] = [prediction]
    return tasks
