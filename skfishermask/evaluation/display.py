"""The picture of learning curves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Literal, Self

import numpy as np
from sklearn.utils import check_random_state

from skfishermask.data import Data, Estimator, Labels, UserValue
from skfishermask.evaluation.curve import Strategy, active_learning_curve


class ActiveLearningCurveDisplay:
    """Learning curves of query strategies, mean and band over the splits.

    Make one by :meth:`from_results` or :meth:`from_estimator`. Needs matplotlib.

    Parameters
    ----------
    results : dict of str to dict
        Results of :func:`active_learning_curve` by the name of the strategy.
    score_name : str, default="test_score"
        Which score of the results to draw.

    Attributes
    ----------
    ax_ : matplotlib Axes
        The axes with the curves.
    figure_ : matplotlib Figure
        The figure of the axes.
    lines_ : dict of str to matplotlib Line2D
        The mean curve of each strategy.
    bands_ : dict of str to matplotlib artist
        The band of each strategy, a collection or an error bar; empty without bands.

    See Also
    --------
    active_learning_curve : Computes the results.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.linear_model import LogisticRegression
    >>> from skfishermask import ActiveLearningCurveDisplay, active_learning_curve
    >>> X, y = load_iris(return_X_y=True)
    >>> result = active_learning_curve(
    ...     LogisticRegression(), X, y, query_strategy="random",
    ...     n_initial=6, n_instances=10, n_queries=3, random_state=0,
    ... )
    >>> display = ActiveLearningCurveDisplay.from_results({"random": result})
    >>> display.ax_.get_xlabel()
    'Labelled samples'
    """

    def __init__(
        self, results: Mapping[str, Mapping[str, np.ndarray]], score_name: str = "test_score"
    ) -> None:
        self.results = results
        self.score_name = score_name

    @classmethod
    def from_results(
        cls,
        results: Mapping[str, Mapping[str, np.ndarray]],
        *,
        score_name: str = "test_score",
        **plot_parameters: UserValue,
    ) -> Self:
        """Draw results that were computed before.

        Parameters
        ----------
        results : dict of str to dict
            Results of :func:`active_learning_curve` by the name of the strategy.
        score_name : str, default="test_score"
            Which score of the results to draw.
        **plot_parameters : dict
            Passed to :meth:`plot`.

        Returns
        -------
        ActiveLearningCurveDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there are no results, or one lacks the score.
        """
        if not results:
            raise ValueError("Expected results of at least one strategy, found none.")
        for name, result in results.items():
            if score_name not in result:
                scores = sorted(key for key in result if key.startswith("test_"))
                raise ValueError(
                    f"The results of {name!r} have no {score_name!r}; expected one of {scores}."
                )
        return cls(results, score_name).plot(**plot_parameters)

    @classmethod
    def from_estimator(
        cls,
        estimator: Estimator,
        X: Data,
        y: Labels,
        *,
        query_strategy: Strategy | Literal["random"] | Mapping[str, Strategy | Literal["random"]],
        n_initial: Data,
        n_instances: int,
        n_queries: int,
        cv: UserValue = None,
        groups: Labels = None,
        scoring: UserValue = None,
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: int = 0,
        **plot_parameters: UserValue,
    ) -> Self:
        """Compute the curves of one or several strategies, and draw them.

        Parameters
        ----------
        estimator, X, y
            See :func:`active_learning_curve`.
        query_strategy : callable, "random", or dict of str to one of these
            The strategy, or several by name.
        n_initial, n_instances, n_queries, cv, groups, scoring, n_jobs
            See :func:`active_learning_curve`.
        random_state : int, RandomState or None, default=None
            See :func:`active_learning_curve`; all strategies get the same seed.
        checkpoint : path-like or None, default=None
            A folder; each of several strategies has a folder of its name in it.
        verbose : int, default=0
            1 shows a progress bar for each strategy.
        **plot_parameters : dict
            Passed to :meth:`plot`.

        Returns
        -------
        ActiveLearningCurveDisplay
            The display, drawn.
        """
        _pyplot()  # Said before the work, not after it.
        strategies = (
            query_strategy
            if isinstance(query_strategy, Mapping)
            else {_name(query_strategy): query_strategy}
        )
        if not isinstance(random_state, Integral):
            random_state = check_random_state(random_state).randint(2**31 - 1)
        results = {}
        for name, strategy in strategies.items():
            folder = checkpoint
            if checkpoint is not None and isinstance(query_strategy, Mapping):
                folder = Path(checkpoint) / name
            results[name] = active_learning_curve(
                estimator,
                X,
                y,
                query_strategy=strategy,
                n_initial=n_initial,
                n_instances=n_instances,
                n_queries=n_queries,
                cv=cv,
                groups=groups,
                scoring=scoring,
                n_jobs=n_jobs,
                random_state=random_state,
                checkpoint=folder,
                verbose=verbose,
            )
        return cls.from_results(results, **plot_parameters)

    def plot(
        self,
        ax: UserValue = None,
        *,
        band: str | None = "std",
        band_style: str = "fill_between",
        score_label: str | None = None,
        line_kw: dict[str, UserValue] | None = None,
        band_kw: dict[str, UserValue] | None = None,
    ) -> Self:
        """Draw the curves.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            The axes to draw on; None makes a figure.
        band : {"std", "sem"} or None, default="std"
            Half the height of the band: the standard deviation over the splits, or the
            standard error of their mean. None draws no band.
        band_style : {"fill_between", "errorbar"}, default="fill_between"
            A shaded area, or a bar at each point.
        score_label : str or None, default=None
            Label of the vertical axis; None makes one from the name of the score.
        line_kw : dict or None, default=None
            Passed to :meth:`matplotlib.axes.Axes.plot`.
        band_kw : dict or None, default=None
            Passed to :meth:`matplotlib.axes.Axes.fill_between` or
            :meth:`matplotlib.axes.Axes.errorbar`.

        Returns
        -------
        ActiveLearningCurveDisplay
            The display itself.
        """
        for value, expected in [
            (band, ("std", "sem", None)),
            (band_style, ("fill_between", "errorbar")),
        ]:
            if value not in expected:
                raise ValueError(f"Expected one of {expected}, found {value!r}.")
        if ax is None:
            _, ax = _pyplot().subplots(layout="constrained")
        self.lines_, self.bands_ = {}, {}
        markers = "osD^vPX<>*"
        for i, (name, result) in enumerate(self.results.items()):
            n_labeled, scores = result["n_labeled"], result[self.score_name]
            mean = scores.mean(axis=0)
            look = {"marker": markers[i % len(markers)], "markersize": 4, "label": name}
            (line,) = ax.plot(n_labeled, mean, **look | (line_kw or {}))
            self.lines_[name] = line
            if band is None or len(scores) < 2:
                continue
            half = scores.std(axis=0, ddof=1)
            if band == "sem":
                half = half / np.sqrt(len(scores))
            shade = {"color": line.get_color()}
            if band_style == "fill_between":
                shade |= {"alpha": 0.15, "linewidth": 0}
                self.bands_[name] = ax.fill_between(
                    n_labeled, mean - half, mean + half, **shade | (band_kw or {})
                )
            else:
                shade |= {"fmt": "none", "capsize": 3}
                self.bands_[name] = ax.errorbar(
                    n_labeled, mean, yerr=half, **shade | (band_kw or {})
                )
        if score_label is None:
            score_label = self.score_name.removeprefix("test_").replace("_", " ").capitalize()
        ax.set(xlabel="Labelled samples", ylabel=score_label)
        ax.legend(frameon=False)
        self.ax_, self.figure_ = ax, ax.figure
        return self


def _name(strategy: UserValue) -> str:
    if isinstance(strategy, str):
        return strategy
    return str(getattr(strategy, "__name__", type(strategy).__name__))


def _pyplot() -> UserValue:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "ActiveLearningCurveDisplay needs matplotlib: pip install matplotlib"
        ) from error
    return plt
