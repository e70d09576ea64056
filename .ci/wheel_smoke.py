"""The wheel alone: train and query where none of the optional packages is installed."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn

import skfishermask
from skfishermask import FisherMaskSampler

OPTIONAL = ("modAL", "torchvision", "matplotlib")

present = [name for name in OPTIONAL if importlib.util.find_spec(name) is not None]
assert not present, f"found {present}; expected an environment without {OPTIONAL}"
assert Path(skfishermask.__file__).is_relative_to(sys.prefix), skfishermask.__file__

torch.manual_seed(0)
rng = np.random.default_rng(0)
X = rng.normal(size=(40, 4)).astype(np.float32)
y = (X[:, 0] > 0).astype(np.int64)
net = NeuralNetClassifier(
    nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    criterion=nn.CrossEntropyLoss,
    max_epochs=2,
    train_split=None,
    verbose=0,
).fit(X[:10], y[:10])

indices, gains = FisherMaskSampler(random_state=0)(net, X[10:], n_instances=2)
chosen = {int(i) for i in indices}
assert len(chosen) == 2, indices
assert chosen <= set(range(30)), indices
assert len(gains) == 2, gains
try:
    import skfishermask.modal
except ImportError as error:
    if "--no-deps modAL-python" not in str(error):
        raise
else:
    raise AssertionError("skfishermask.modal was imported without modAL")

print(f"wheel: skfishermask {skfishermask.__version__} trained, queried and chose {sorted(chosen)}")
