"""
A network that is trained already, and a pool in files
======================================================

The network exists: it was trained elsewhere, and its weights are in a file. The pool is large and
lies in files of its own. This example asks that network what to label next, without training it,
and then goes on training it with the answers.
"""

# %%
# Weights in a file
# -----------------
#
# Here is the elsewhere: a network is trained on two hundred digits, and its weights are saved.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import Dataset

from skfishermask import FisherMaskSampler

X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
# It has not seen an 8 or a 9 yet.
known = np.flatnonzero(y < 8)
first, rest = known[:200], np.setdiff1d(np.arange(len(X)), known[:200])
X_test, y_test, rest = X[rest[-400:]], y[rest[-400:]], rest[:-400]


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_net(**more):
    return NeuralNetClassifier(
        Network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        batch_size=32,
        train_split=None,
        verbose=0,
        **more,
    )


temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
torch.manual_seed(0)
make_net(max_epochs=40).fit(X[first], y[first]).save_params(f_params=folder / "weights.pt")

# %%
# Loading it
# ----------
#
# A net is made, initialized and given the weights: it counts as fitted. A file that a plain PyTorch
# program wrote by ``torch.save(module.state_dict(), ...)`` is loaded by the same line. A module
# that you have in memory needs no file: ``NeuralNetClassifier(module, ...).initialize()``.

net = make_net(max_epochs=10).initialize()
net.load_params(f_params=folder / "weights.pt")
before = net.score(X_test, y_test)
print(f"accuracy before: {before:.3f}")

# %%
# A pool in files
# ---------------
#
# The pool is cut into files of a hundred samples. A :class:`~torch.utils.data.Dataset` that opens a
# file when one of its samples is asked for never holds more than a batch; a query reads it once, in
# order, for the embedding, and samples of it for the mask and for coverage. One large array needs
# no such class: ``numpy.load(..., mmap_mode="c")`` is read batch by batch as well
# (:doc:`/auto_examples/plot_big_pools`).

for number, start in enumerate(range(0, len(rest), 100)):
    np.save(folder / f"part_{number:02d}.npy", X[rest[start : start + 100]])


class FilesOfSamples(Dataset):
    def __init__(self, files):
        self.files = sorted(files)
        lengths = [len(np.load(file, mmap_mode="r")) for file in self.files]
        self.starts = np.concatenate([[0], np.cumsum(lengths)])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(row)
        file, position = self.where(row)
        return np.load(file, mmap_mode="r")[position].copy(), 0  # The 0 stands for a label.

    def where(self, row):
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.files[number], int(row - self.starts[number])


pool = FilesOfSamples(folder.glob("part_*.npy"))
print(len(pool), "samples in", len(pool.files), "files")

# %%
# A query, and no training
# ------------------------
#
# The strategy takes the net as it is. The weights are afterwards what they were.

fishermask = FisherMaskSampler(batch_size=256, random_state=0)
weights = {name: value.clone() for name, value in net.module_.state_dict().items()}
indices, gains = fishermask(net, pool, n_instances=30, X_labeled=X[first])
unchanged = all(torch.equal(weights[name], v) for name, v in net.module_.state_dict().items())
print("weights unchanged:", unchanged)
for row in indices[:3]:
    file, position = pool.where(row)
    print(f"{file.name}, sample {position}")

# %%
# Going on with the answers
# -------------------------
#
# ``partial_fit`` trains on from the weights that there are, where ``fit`` would begin anew. On new
# samples alone a network forgets; old ones among them help.

answers = y[rest[indices]]  # In practice, a person looks.
torch.manual_seed(1)
net.partial_fit(np.concatenate([X[first], X[rest[indices]]]), np.concatenate([y[first], answers]))
after = net.score(X_test, y_test)
print(f"accuracy after: {after:.3f}")

counts = np.bincount(answers, minlength=10)
expected = 30 * np.bincount(y[rest], minlength=10) / len(rest)
figure, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
ax.bar(np.arange(10) - 0.2, counts, 0.4, color="#0072b2", label="FisherMask chose")
ax.bar(np.arange(10) + 0.2, expected, 0.4, color="0.7", label="a random batch, on average")
ax.set(xlabel="digit (8 and 9 are new to the network)", ylabel="samples", xticks=range(10))
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()
print(
    f"{counts[8:].sum()} of 30 are an 8 or a 9; of the pool these are {np.mean(y[rest] >= 8):.0%}"
)
temporary.cleanup()
