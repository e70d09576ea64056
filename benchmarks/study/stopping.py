"""Does the objective tell when to stop? Its fall, beside the accuracy that more labels still gain.

Run from the root of the repository, with the files of ``benchmarks.study.data``::

    python -m benchmarks.study.stopping --data-dir output/data --seeds 4

A curve of FisherMask in each of the study's settings with batches of 20, longer than there, with
what the sampler and the net say before each batch. It adds to ``stopping.csv``; the seeds and
settings that the table has are not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from benchmarks.common.networks import SeveralTrainings, make_net
from benchmarks.study.report import judge_signals
from benchmarks.study.run import STUDY, load, make_split, mean_scores
from benchmarks.study.strategies import fisher
from skfishermask import active_learning_curve
from skfishermask.fisher import margin_uncertainty

RESULTS = Path("benchmarks/results/label_efficiency/stopping.csv")
N_QUERIES = 25


def curve(setting: dict[str, Any], data_dir: Path, seed: int) -> pd.DataFrame:
    """Run a curve: accuracy by number of labels, and the signals before each batch."""
    X, y, n_train = load(str(data_dir / f"{setting['dataset']}.npz"), data_dir, download=False)
    split = make_split(
        y, n_train, seed, *(setting[n] for n in ("pool_size", "test_size", "imbalance"))
    )
    net = make_net(setting["network"], X.shape[1:], len(np.unique(y)), "cpu")
    sampler = fisher(random_state=seed)
    said = []

    def asked(learner: Any, X_pool: Any, n_instances: int = 1) -> np.ndarray:
        probabilities = torch.as_tensor(learner.predict_proba(X_pool))
        uncertainty = float(margin_uncertainty(probabilities).mean())
        indices, _ = sampler(learner, X_pool, n_instances)
        said.append((*sampler.query_info_["objective"], uncertainty))
        return indices

    result = active_learning_curve(
        SeveralTrainings(net, 1),
        X,
        y,
        query_strategy=asked,
        n_initial=setting["n_initial"],
        n_instances=setting["n_instances"],
        n_queries=setting["n_queries"],
        cv=[split],
        scoring=mean_scores,
        random_state=seed,
    )
    signals = pd.DataFrame([*said, (np.nan,) * 3], columns=["before", "after", "uncertainty"])
    names = {name: setting[name] for name in ("dataset", "imbalance")}
    return pd.DataFrame(
        names
        | {
            "seed": seed,
            "n_labeled": result["n_labeled"],
            "accuracy": result["test_accuracy"][0].round(6),
        }
    ).join(signals.round(6))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, default=Path("output/data"))
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--n-queries", type=int, default=N_QUERIES)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    settings = [s | {"n_queries": given.n_queries} for s in STUDY if s["n_instances"] == 20]
    runs = [
        (seed, s)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for s in settings
    ]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for seed, setting in tqdm(runs, unit="curve"):
        table = pd.read_csv(given.out) if given.out.exists() else None
        if table is not None:
            same = (table.dataset == setting["dataset"]) & (table.imbalance == setting["imbalance"])
            if (same & (table.seed == seed)).any():
                continue
        pd.concat([table, curve(setting, given.data_dir, seed)]).to_csv(given.out, index=False)
    print(judge_signals(pd.read_csv(given.out)).round(2).to_string())


if __name__ == "__main__":
    main()
