import unittest

import numpy as np
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression

from skactiveml.classifier import ParzenWindowClassifier, SklearnClassifier
from skactiveml.pool import Bait
from skactiveml.tests.template_query_strategy import (
    TemplateSingleAnnotatorPoolQueryStrategy,
)
from skactiveml.utils import MISSING_LABEL, is_labeled


class WithEmbeddings(SklearnClassifier):
    """Returns representations beside the probabilities, if asked."""

    def predict_proba(self, X, return_embeddings=False):
        probas = super().predict_proba(X)
        return (probas, 2 * np.asarray(X)) if return_embeddings else probas


class TestBait(TemplateSingleAnnotatorPoolQueryStrategy, unittest.TestCase):
    def setUp(self):
        self.X = np.linspace(0, 1, 20).reshape(10, 2)
        self.y = np.hstack([[0, 1], np.full(8, MISSING_LABEL)])
        self.classes = [0, 1]
        super().setUp(
            qs_class=Bait,
            init_default_params={},
            query_default_params_clf={
                "X": self.X,
                "y": self.y,
                "clf": ParzenWindowClassifier(
                    classes=self.classes, random_state=42
                ),
            },
        )

    def test_init_param_clf_embedding_flag_name(self):
        test_cases = [
            (None, None),
            (1, TypeError),
        ]
        self._test_param("init", "clf_embedding_flag_name", test_cases)

        clf = WithEmbeddings(LogisticRegression(), classes=self.classes)
        for flag in ["flag", {"flag": True}]:
            qs = Bait(clf_embedding_flag_name=flag)
            self.assertRaises(TypeError, qs.query, self.X, self.y, clf)
        utilities = [
            Bait(clf_embedding_flag_name=flag, random_state=0).query(
                factor * self.X,
                self.y,
                clf.fit(self.X, self.y),
                fit_clf=False,
                return_utilities=True,
            )[1]
            for flag, factor in [
                (None, 1),
                ("return_embeddings", 1),
                ({"return_embeddings": True}, 1),
            ]
        ]
        np.testing.assert_array_equal(utilities[1], utilities[2])
        self.assertFalse(np.allclose(utilities[0][:, 2:], utilities[1][:, 2:]))

    def test_init_param_regularization(self):
        test_cases = [
            (1, None),
            (0.1, None),
            (0, ValueError),
            (-1.0, ValueError),
            ("1", TypeError),
            (None, TypeError),
        ]
        self._test_param("init", "regularization", test_cases)

    def test_init_param_oversample(self):
        test_cases = [
            (1, None),
            (1.5, None),
            (3, None),
            (0.5, ValueError),
            ("2", TypeError),
            (None, TypeError),
        ]
        self._test_param("init", "oversample", test_cases)

    def test_query_param_clf(self):
        test_cases = [
            (ParzenWindowClassifier(classes=self.classes), None),
            (
                SklearnClassifier(LogisticRegression(), classes=self.classes),
                None,
            ),
            (ParzenWindowClassifier(missing_label="missing"), TypeError),
        ]
        super().test_query_param_clf(test_cases=test_cases)

    def test_target_contract(self):
        self.assertEqual(
            Bait()._target_capabilities,
            frozenset(
                {("classification", "single-output", "single-annotator")}
            ),
        )

    def test_query(self):
        # The selection as it is written down, with `M` inverted anew.
        X, y_true = make_blobs(
            40, n_features=2, centers=3, cluster_std=2.0, random_state=0
        )
        y = np.where(np.arange(40) < 9, y_true, MISSING_LABEL)
        clf = SklearnClassifier(LogisticRegression(), classes=[0, 1, 2])
        clf.fit(X, y)
        for oversample in [1, 1.5, 2]:
            for regularization in [1e-2, 1.0]:
                qs = Bait(
                    oversample=oversample,
                    regularization=regularization,
                    random_state=0,
                )
                indices, utilities = qs.query(
                    X,
                    y,
                    clf,
                    fit_clf=False,
                    batch_size=4,
                    return_utilities=True,
                )
                expected, gains = select(
                    X, y, clf, 4, oversample, regularization
                )
                np.testing.assert_array_equal(indices, expected)
                np.testing.assert_allclose(utilities, gains, rtol=1e-6)

        # All samples are taken if the batch is as large as the pool.
        indices = Bait(oversample=5.0).query(X, y, clf, batch_size=31)
        np.testing.assert_array_equal(np.sort(indices), np.arange(9, 40))

        # Without any label, all probabilities are equal.
        y = np.full(40, MISSING_LABEL)
        clf = ParzenWindowClassifier(classes=[0, 1, 2])
        indices, utilities = Bait(oversample=1).query(
            X, y, clf, return_utilities=True
        )
        self.assertEqual(indices[0], np.argmax(utilities[0]))


def information(X, probas):
    return np.array(
        [
            np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x))
            for x, p in zip(X, probas)
        ]
    )


def select(X, y, clf, batch_size, oversample, regularization):
    info = information(X, clf.predict_proba(X))
    labeled = is_labeled(y)
    pool = np.flatnonzero(~labeled)
    n_total = labeled.sum() + batch_size
    fisher = info.mean(axis=0)
    start = regularization * np.eye(len(fisher))
    start += info[labeled].sum(axis=0) / n_total

    def objective(batch):
        M = start + info[batch].sum(axis=0) * batch_size / n_total
        return np.trace(np.linalg.solve(M, fisher))

    def gains(batch):
        utilities = np.full(len(X), np.nan)
        for i in np.setdiff1d(pool, batch):
            utilities[i] = objective(batch) - objective([*batch, i])
        return utilities

    batch = []
    for _ in range(int(np.ceil(oversample * batch_size))):
        batch.append(int(np.nanargmax(gains(batch))))
    while len(batch) > batch_size:
        losses = [objective([j for j in batch if j != i]) for i in batch]
        batch.pop(int(np.argmin(losses)))
    return batch, [gains(batch[:i]) for i in range(batch_size)]
