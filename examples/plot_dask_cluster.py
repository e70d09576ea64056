"""
A pool on a Dask cluster
========================

Pools of millions of samples often lie in a Dask array, on machines that already have them in
memory. A query over such a pool runs where its chunks are, and chooses what a single machine would
choose. This example does so with two workers on one machine; a real cluster differs in one line.
"""

# %%
# A cluster, and a pool in chunks
# -------------------------------
#
# For a cluster of machines it would be ``Client("tcp://scheduler:8786")``. The two workers here
# are threads of this process; as processes of their own, without ``processes=False``, they need
# what follows to stand under ``if __name__ == "__main__":``, as Python's multiprocessing does. The
# pool would come from files that the workers can read; here it is the digits that come with
# scikit-learn, in four chunks of different lengths.

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
import torch
from distributed import Client, LocalCluster
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler

cluster = LocalCluster(n_workers=2, threads_per_worker=1, processes=False, dashboard_address=":0")
client = Client(cluster)

digits, y = load_digits(return_X_y=True)
digits = (digits / 16).astype("float32")
X_labelled, y_labelled = digits[:97], y[:97]
X_pool = da.from_array(digits[97:], chunks=((600, 500, 400, 200), (64,))).persist()
print(X_pool)

# %%
# A network
# ---------
#
# Training is not distributed: the labelled samples are few. It is any skorch classifier.


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
# The query
# ---------
#
# The strategy is called as ever. The active client decides where it runs.

# Fisher information alone: its embeddings stay where the chunks are.
fishermask = FisherMaskSampler(coverage_share=0, random_state=0)
indices, gains = fishermask(net, X_pool, n_instances=80, X_labeled=X_labelled)
print(indices[:10])

# %%
# The samples to label are rows of the Dask array, and few enough to fetch:

chosen = X_pool[indices].compute()
print(chosen.shape)

# %%
# The same batch as on one machine
# --------------------------------
#
# An array in memory never goes to a cluster. The picks are the same; in float32 the gains agree to
# rounding, since batches of samples end where chunks do.

here = FisherMaskSampler(coverage_share=0, random_state=0)
local_indices, local_gains = here(net, digits[97:], n_instances=80, X_labeled=X_labelled)
print("the same picks:", np.array_equal(indices, local_indices))
print(f"gains differ by at most {np.abs(gains / local_gains - 1).max():.0e}, relatively")

# %%
# What crossed the network
# ------------------------
#
# The greedy loop asks all workers at once about several picks, so there are fewer round trips than
# picks. The bytes are those between this process and the workers. They grow with the mask and the
# number of picks, hardly with the pool, which for so small a pool is of no use yet.

info = fishermask.query_info_
print(f"{info['round_trips']} round trips for 80 picks, {info['n_workers']} workers")
moved = {f"moved: {phase}": n_bytes for phase, n_bytes in info["bytes_moved"].items()}
megabytes = {"embeddings, which stay": info["embedding_bytes"], **moved}
figure, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
bars = ax.barh([*megabytes], [n_bytes / 1e6 for n_bytes in megabytes.values()], color="#0072b2")
bars[0].set_color("0.6")
ax.bar_label(bars, fmt="%.1f", padding=3)
ax.invert_yaxis()
ax.spines[["top", "right"]].set_visible(False)
ax.margins(x=0.1)
ax.set(xlabel="megabytes", title="What stays with the workers, and what moves")
plt.show()

# %%
# A worker that dies is no more than a delay: Dask computes again what it held, and the selection
# replays its steps there. What a query costs on a cluster, and what to do before reaching for one,
# is in :doc:`/user_guide/cluster`.

client.close()
cluster.close()
