"""
Big pools: what each knob costs and saves
=========================================

A query by Fisher information embeds its candidates: r rows of k numbers each, kept in memory until
the batch is chosen. For large pools, masks or numbers of classes that can be too much. Five
parameters of :class:`~skfishermask.FisherMaskSampler` make it smaller or quicker, and the defaults
turn three of them down already. This example measures what each of them saves, in bytes and
seconds, and what it costs, in the quality of the batch.
"""

# %%
# A larger pool of digits
# -----------------------
#
# The digits that come with scikit-learn, as they are and moved by one pixel, make a pool of 3,400
# images: large enough to see the effects, small enough to wait for the exact query. They lie in a
# file, as a large pool would, and are read through a memory map. Mode ``"c"``, copy on write, never
# changes the file and yet is writable, which PyTorch expects of an array.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler, fisher_embedding
from skfishermask.fisher import fisher_matrix

digits, y = load_digits(return_X_y=True)
digits = (digits / 16).astype("float32").reshape(-1, 8, 8)
X_labelled, y_labelled = digits[:97].reshape(97, 64), y[:97]
shifts = [(0, 0), (0, 1)]
larger = np.concatenate([np.roll(digits[97:], shift, axis=(1, 2)) for shift in shifts])

folder = tempfile.TemporaryDirectory()
file = Path(folder.name) / "pool.npy"
np.save(file, larger.reshape(-1, 64))
X_pool = np.load(file, mmap_mode="c")
print(type(X_pool).__name__, X_pool.shape, X_pool.dtype)


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


torch.manual_seed(0)
net = NeuralNetClassifier(
    Network,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=40,
    batch_size=32,
    train_split=None,
    verbose=0,
).fit(X_labelled, y_labelled)

# %%
# The exact query
# ---------------
#
# By default a query looks at 20,000 samples of the pool at most, at the directions that keep 95% of
# the trace, and ranks parameters by 128 samples. None leaves nothing out. A memory map is read
# batch by batch, never as a whole: what fills the memory is not the pool but its embedding.
# (``coverage_share=0``, so that all of the batch is chosen by the objective that it is judged by
# below.)

n_instances = 30
everything = {"n_directions": None, "max_candidates": None, "n_mask_samples": None}


def ask(**parameters):
    sampler = FisherMaskSampler(coverage_share=0, batch_size=512, random_state=0, **parameters)
    indices, _ = sampler(net, X_pool, n_instances=n_instances, X_labeled=X_labelled)
    return sampler, indices


exact, exact_indices = ask(**everything)
info = exact.query_info_
n, r, k = info["n_candidates"], info["n_directions"], info["mask_size"]
print(f"{n} candidates x {r} directions x {k} parameters: {info['embedding_bytes'] / 1e6:.0f} MB")
print({step: f"{seconds:.2f} s" for step, seconds in info["seconds"].items()})

# %%
# How good is a batch?
# --------------------
#
# FisherMask chooses the batch that makes :math:`\mathrm{tr}(M^{-1} F)` small. So a batch that was
# found with some knob turned down is judged by that objective, computed exactly: with the exact
# mask, the embedding of the whole pool, and all directions.

V = fisher_embedding(net.module_, torch.as_tensor(X_pool).split(500), exact.mask_)
V_labelled = fisher_embedding(net.module_, [torch.as_tensor(X_labelled)], exact.mask_)
n_labelled = len(X_labelled)
F_labelled = fisher_matrix(V_labelled)
F = (n * fisher_matrix(V) + n_labelled * F_labelled) / (n + n_labelled)


def objective(chosen):
    rows = V[chosen].double().flatten(0, 1)
    total = n_labelled + n_instances
    M = torch.eye(k, dtype=torch.float64) + n_labelled / total * F_labelled
    return float(torch.linalg.solve(M + n_instances / total * rows.T @ rows, F).trace())


random_indices = np.random.default_rng(0).choice(n, n_instances, replace=False)
print(f"objective with the exact batch {objective(exact_indices):.2f}")
print(f"objective with a random batch  {objective(random_indices):.2f}")

# %%
# Turning the knobs
# -----------------
#
# - ``n_directions``: rows of the embedding. The classes are sorted by falling probability, so the
#   first rows carry most of the information.
# - ``embedding_dtype``: how the embedding is stored.
# - ``max_candidates``: a random subset of the pool of this size is looked at.
# - ``mask_fraction``: the size of the mask, here as a number of parameters.
# - ``n_mask_samples``: samples for the diagonal Fisher information, from which the mask is made.

knobs = {
    "n_directions": [1, 2, 4],
    "embedding_dtype": ["float16", "bfloat16"],
    "max_candidates": [300, 1000],
    "mask_fraction": [165, 400],
    "n_mask_samples": [32, 256],
}
rows = [("exact", "0.35", exact, exact_indices), ("the defaults", "0.55", *ask())]
colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]
for (knob, values), colour in zip(knobs.items(), colours, strict=True):
    for value in values:
        rows.append((f"{knob}={value}", colour, *ask(**everything | {knob: value})))


def of_exact(sampler):
    size = sampler.query_info_["embedding_bytes"] / info["embedding_bytes"]
    return size, sampler.query_info_["seconds"]["total"] / info["seconds"]["total"]


columns = {
    "bytes\n(exact = 1)": [of_exact(sampler)[0] for _, _, sampler, _ in rows] + [np.nan],
    "seconds\n(exact = 1)": [of_exact(sampler)[1] for _, _, sampler, _ in rows] + [np.nan],
    "objective\n(exact = 1)": [
        objective(chosen) / objective(exact_indices)
        for chosen in [*(chosen for *_, chosen in rows), random_indices]
    ],
    f"common picks\n(of {n_instances})": [
        len(np.intersect1d(chosen, exact_indices))
        for chosen in [*(chosen for *_, chosen in rows), random_indices]
    ],
}
names = [name for name, *_ in rows] + ["a random batch"]

figure, axes = plt.subplots(1, 4, figsize=(10, 4.6), sharey=True, layout="constrained")
for ax, (title, values) in zip(axes, columns.items(), strict=True):
    bars = ax.barh(range(len(names)), values, color=[colour for _, colour, *_ in rows] + ["0.7"])
    text = [f"{v:.0f}" if "picks" in title else f"{v:.2f}" if v == v else "" for v in values]
    ax.bar_label(bars, text, padding=3, fontsize=9)
    ax.set_title(title, fontsize=11)
    ax.set_xlim(0, 1.35 * np.nanmax(values))
    ax.set_xticks([])
    ax.spines[["top", "right", "bottom"]].set_visible(False)
axes[0].set_yticks(range(len(names)), names)
axes[0].invert_yaxis()
plt.show()

# %%
# Fewer common picks need not mean a worse batch: in a pool of similar images there are
# many batches that are nearly as good. What the objective says:
#
# - The defaults take less than half of the time and the memory, and lose about one percent.
#   ``max_candidates`` has no part in that: the pool is smaller than 20,000.
# - Four of the nine directions do well, a single one costs most. Time and memory fall together. A
#   float, such as ``n_directions=0.95``, keeps as many as are needed for that share of the trace,
#   which is what the default does, up to 16.
# - Half precision chose the same batch from half of the memory. On a CPU it does not save time, as
#   products are computed in float32.
# - ``max_candidates`` saves most and loses something, as the best images may not be among those
#   looked at. It is the knob for pools of any size.
# - A quarter of the mask loses little here, and saves twice: the Fisher matrices are k x k.
# - A mask from few samples is another mask, and no worse here. With a large network, where the
#   diagonal is a good part of the time, that is worth knowing; here it is not.
#
# All of them are far better than a random batch.
#
# Before you turn any: how large would it be?
# -------------------------------------------
#
# The embedding has N x r x k numbers. Where it would take more than half of the free memory it
# goes to a scratch file by itself, and the batch stays the same; here we make it go there. Only
# where the disk is too small for it, too, the query says so before it starts.

scratch, scratch_indices = ask(**everything, memory_share=1e-6)
print(f"embeddings in a {scratch.query_info_['embedding_storage']}")
print(f"common picks: {len(np.intersect1d(scratch_indices, exact_indices))} of {n_instances}")

# %%
# An estimate for a million images, ten classes and a mask of 2,000 parameters, the most that
# ``"auto"`` gives:


def gigabytes(n, r, k, itemsize=4):
    return n * r * k * itemsize / 1e9


print(f"exact                                     {gigabytes(10**6, 9, 2000):7.1f} GB")
print(f"max_candidates=20_000, the default        {gigabytes(20_000, 9, 2000):7.1f} GB")
print(f"... and n_directions=3                    {gigabytes(20_000, 3, 2000):7.1f} GB")
print(f"... and embedding_dtype='float16'         {gigabytes(20_000, 3, 2000, 2):7.1f} GB")

folder.cleanup()
