"""What the gallery needs of Python: the order of the tutorials, and what is reset between them."""

from __future__ import annotations

import multiprocessing
import random

import numpy as np
import torch

ORDER = [
    "plot_first_steps.py",
    "plot_features_first.py",
    "plot_images_on_disk.py",
    "plot_sklearn_classifier.py",
    "plot_inside_fishermask.py",
    "plot_imbalanced.py",
    "plot_own_network.py",
    "plot_regression.py",
    "plot_several_labels.py",
    "plot_tokens.py",
    "plot_texts.py",
    "plot_trained_network.py",
    "plot_big_pools.py",
    "plot_dask_cluster.py",
    "plot_person_in_the_loop.py",
    "plot_compare_strategies.py",
    "fashion_mnist.py",
    "cifar10_resnet18.py",
]


def key(filename: str) -> tuple[int, str]:
    """In the order above; what is not there comes last."""
    return (ORDER.index(filename) if filename in ORDER else len(ORDER), filename)


def reset(gallery_conf: dict, fname: str) -> None:
    """No tutorial depends on what the one before it drew, nor on the process it runs in."""
    # joblib's processes start others in a way that a DataLoader's workers cannot be started in.
    multiprocessing.set_start_method(None, force=True)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, tutorials may use code that draws from it
    torch.manual_seed(0)
