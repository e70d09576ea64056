"""
Inside FisherMask
=================

What does FisherMask look at in a network, what does it choose, and why does a batch not repeat
itself? This example takes one query apart, with the functions that
:class:`~skfishermask.FisherMaskSampler` is made of.
"""

# %%
# A network that has seen forty digits
# ------------------------------------
#
# Three convolutions and a linear layer, trained on forty of the digits that come with scikit-learn.
# Nine hundred others are the pool.

import matplotlib.pyplot as plt
import numpy as np
import torch
from modAL.uncertainty import entropy_sampling
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding, select_batch
from skfishermask.fisher import fisher_matrix

X, y = load_digits(return_X_y=True)
X = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
shuffled = np.random.default_rng(0).permutation(len(X))
X_labelled, y_labelled = X[shuffled[:40]], y[shuffled[:40]]
X_pool, y_pool = X[shuffled[40:940]], y[shuffled[40:940]]
X_test, y_test = X[shuffled[940:]], y[shuffled[940:]]


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.output = nn.Linear(32, 10)

    def forward(self, images):
        h = torch.relu(self.conv1(images))
        h = nn.functional.max_pool2d(torch.relu(self.conv2(h)), 2)
        h = torch.relu(self.conv3(h))
        return self.output(h.amax(dim=(2, 3)))


torch.manual_seed(0)
net = NeuralNetClassifier(
    ConvNet,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.005,
    max_epochs=60,
    batch_size=32,
    train_split=None,
    verbose=0,
).fit(X_labelled, y_labelled)
module = net.module_
n_parameters = sum(p.numel() for p in module.parameters())
print(f"{n_parameters:,} parameters, accuracy with 40 labels {net.score(X_test, y_test):.3f}")

# %%
# Where the Fisher information sits
# ---------------------------------
#
# The Fisher information of a parameter says how much the predicted probabilities move when it
# moves: the mean over images and predicted classes of the squared derivative of the
# log-probability. :func:`~skfishermask.fisher_diagonal` computes it for every parameter. No labels
# are needed, so the pool can be used.

batches = torch.as_tensor(X_pool).split(300)
diagonal = fisher_diagonal(module, batches)

total = sum(float(d.sum()) for d in diagonal.values())
names = list(diagonal)
information = np.array([float(diagonal[name].sum()) / total for name in names])
size = np.array([diagonal[name].numel() / n_parameters for name in names])
everything = torch.cat([d.flatten() for d in diagonal.values()]).sort(descending=True).values
cumulative = everything.cumsum(0).numpy() / total

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
rows = np.arange(len(names))
left.barh(rows - 0.2, size, 0.38, color="0.7", label="of the parameters")
left.barh(rows + 0.2, information, 0.38, color=BLUE, label="of the Fisher information")
left.set_yticks(rows, names)
left.invert_yaxis()
left.set(xlabel="share", title="By tensor")
left.legend(frameon=False)
right.semilogx(np.arange(1, n_parameters + 1), cumulative, color=BLUE, lw=2)
for share in (0.5, 0.9):
    k = int(np.searchsorted(cumulative, share)) + 1
    right.plot(k, share, "o", color=ORANGE)
    right.annotate(f" {k} hold {share:.0%}", (k, share), ha="left", va="top")
right.set(
    xlabel="parameters, largest first",
    ylabel="share of the Fisher information",
    title="Most of it sits in few parameters",
    ylim=(0, 1.03),
)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# The output layer has 2 % of the parameters and 74 % of the information. Most of the rest is in the
# last convolution. The second convolution has a third of the parameters and next to no information.
# 54 of the 14,378 parameters hold half of it all.
#
# Masks
# -----
#
# A Fisher matrix of all parameters would have 200 million entries. So FisherMask keeps the
# parameters with the largest diagonal entries, and the output layer as a whole.
# :meth:`~skfishermask.ParameterMask.from_diagonal` has this choice, ``"global"``, and others to
# compare it with. Each mask here has 660 parameters, half of them in the output layer: what
# ``mask_fraction="auto"`` gives for this network.

output_layer = ["output.weight", "output.bias"]
strategies = ["global", "per_layer", "relative", "random"]
masks = {
    strategy: ParameterMask.from_diagonal(
        diagonal, strategy, 660, output_layer=output_layer, random_state=0
    )
    for strategy in strategies
}
masks["output_layer"] = ParameterMask.from_diagonal(
    diagonal, "output_layer", 660, output_layer=output_layer
)

# %%
# The picture shows the 32 x 32 filters of the third convolution, 3 x 3 weights each: a row for
# every output channel, a column for every input channel. The grey is the logarithm of a weight's
# Fisher information; the orange ones are in the mask.

# sphinx_gallery_thumbnail_number = 4
weight = "conv3.weight"
n_out, n_in, height, width = diagonal[weight].shape


def as_picture(values):
    """Lay out filters (out, in, height, width) side by side, in two dimensions."""
    return np.asarray(values).transpose(0, 2, 1, 3).reshape(n_out * height, n_in * width)


background = as_picture(np.log10(diagonal[weight].numpy() + 1e-12))
figure, axes = plt.subplots(2, 2, figsize=(9, 9.4), layout="constrained")
for ax, strategy in zip(axes.flat, strategies, strict=True):
    kept = np.zeros(diagonal[weight].numel(), dtype=bool)
    kept[masks[strategy].indices.get(weight, [])] = True
    picture = as_picture(kept.reshape(n_out, n_in, height, width))
    ax.imshow(background, cmap="gray_r", vmin=background.max() - 6, vmax=background.max() + 4)
    coloured = np.zeros((*picture.shape, 4))
    coloured[picture] = (*plt.matplotlib.colors.to_rgb(ORANGE), 1)
    ax.imshow(coloured)
    ax.set_xticks(np.arange(0, n_in * width, width) - 0.5, [])
    ax.set_yticks(np.arange(0, n_out * height, height) - 0.5, [])
    ax.grid(color="white", lw=0.5)
    ax.tick_params(length=0)
    ax.set_title(f'"{strategy}": {kept.sum()} weights of this layer')
    ax.set(xlabel="input channels", ylabel="output channels")
plt.show()

# %%
# And the same by layer:

layers = ["conv1", "conv2", "conv3", "output"]
colours = ["#999999", "#56b4e9", BLUE, "#f0e442"]
figure, ax = plt.subplots(figsize=(8, 2.8), layout="constrained")
for row, mask in enumerate(masks.values()):
    start = 0
    for layer, colour in zip(layers, colours, strict=True):
        n = sum(len(i) for name, i in mask.indices.items() if name.startswith(layer))
        ax.barh(row, n, left=start, color=colour, label=layer if row == 0 else None)
        start += n
ax.set_yticks(range(len(masks)), [f'"{strategy}"' for strategy in masks])
ax.invert_yaxis()
ax.set(xlabel="parameters in the mask", xlim=(0, 680))
ax.spines[["top", "right"]].set_visible(False)
ax.legend(ncols=4, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1))
plt.show()

# %%
# At this size every strategy keeps the output layer whole, and they differ in the other half.
# ``"global"`` passes the second convolution by and takes many weights of the small first one; the
# next two give every tensor its share. In the third convolution these three like the same channels.
# The white bands are two input and eight output channels that are off for every image: only
# ``"random"`` spends parameters on them. ``"output_layer"`` is the mask of BAIT.
#
# What is chosen
# --------------
#
# At the mask every image x has a *Fisher embedding* V(x), nine rows of 660 numbers, such that
# :math:`V^\top V` is its Fisher information there. :func:`~skfishermask.select_batch` picks the
# batch that best covers the information of the pool: the one that most lowers
# :math:`\mathrm{tr}(M^{-1} F)`, with F the mean Fisher information of the pool and M that of
# labelled images and batch. Beside it: a random batch, and the twenty images of highest entropy.

mask = masks["global"]
V = fisher_embedding(module, batches, mask)
V_labelled = fisher_embedding(module, [torch.as_tensor(X_labelled)], mask)
F = fisher_matrix(V)
positions, gains = select_batch(
    V, 20, F, fisher_labeled=fisher_matrix(V_labelled), n_labeled=len(V_labelled)
)
entropy_result = entropy_sampling(net, X_pool, n_instances=20)
batches_of = {
    "random": np.random.default_rng(1).choice(len(X_pool), 20, replace=False),
    "entropy": np.asarray(entropy_result[0]),
    "FisherMask": positions.numpy(),
}

figure, axes = plt.subplots(3, 1, figsize=(9.5, 6.2), layout="constrained")
for ax, (name, chosen) in zip(axes, batches_of.items(), strict=True):
    tiles = np.pad(X_pool[chosen, 0], ((0, 0), (1, 1), (1, 1)))
    ax.imshow(np.block([list(tiles[:10]), list(tiles[10:])]), cmap="gray_r")
    counts = np.bincount(y_pool[chosen], minlength=10)
    ax.set_title(
        f"{name}: {np.count_nonzero(counts)} kinds of digits, at most {counts.max()} of one"
    )
    ax.set_axis_off()
plt.show()

# %%
# The random batch has every kind of digit. Entropy asks for fourteen images of one kind, most of
# which look alike. FisherMask has no more than five of a kind, and few plain ones: most of its
# images are oddly written.
#
# How gains fall within a batch
# -----------------------------
#
# The gain of an image is what it takes off the objective, and it depends on what was taken before.
# To see how much, here are the gains of *all* images, at the beginning and after each pick, by the
# formula that :func:`~skfishermask.select_batch` evaluates in a much faster way.

K, n_labelled = 20, len(V_labelled)
scale = K / (n_labelled + K)
M0 = torch.eye(len(mask), dtype=torch.float64)
M0 += (1 - scale) * fisher_matrix(V_labelled)


def information_of(chosen):
    """Compute M: the regularized information of the labelled images and these of the pool."""
    rows = V[chosen].double().reshape(-1, len(mask))
    return M0 + scale * rows.T @ rows


def all_gains(M):
    inverse = torch.linalg.inv(M)
    target = (inverse @ F @ inverse).float()
    inverse = inverse.float()
    A = scale * (V @ inverse) @ V.mT
    B = scale * (V @ target) @ V.mT
    return torch.linalg.solve(torch.eye(A.shape[1]) + A, B).diagonal(dim1=1, dim2=2).sum(1)


n_steps = (0, 1, 2, 5, 10, 19)
gains_after = {n: all_gains(information_of(positions[:n])) for n in n_steps}
first_gains = gains_after[0]
top = first_gains.argsort(descending=True)[:K]

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
steps = np.arange(1, K + 1)
left.semilogy(steps, first_gains[top], "s", color="0.5", label="highest gains at first")
left.semilogy(steps, first_gains[positions], "o", color=ORANGE, label="the batch, gains at first")
left.semilogy(steps, gains, "D-", color=BLUE, label="the batch, gains when chosen")
left.set(xlabel="pick", ylabel="gain", xticks=[1, 5, 10, 15, 20], title="Gains of the batch")
left.legend(frameon=False)
for n, shade in zip(n_steps, np.linspace(0.25, 1, len(n_steps)), strict=True):
    ranked = gains_after[n].sort(descending=True).values
    right.semilogy(np.arange(1, len(V) + 1), ranked, color=BLUE, alpha=shade, lw=1.5)
    right.annotate(f"{n}", (-12, ranked[0]), ha="right", va="center", fontsize=9)
right.set(
    xlabel="rank in the pool",
    ylabel="gain",
    title="Gains in the pool after 0, 1, 2, 5, 10, 19 picks",
    xlim=(-60, len(V)),
    ylim=(1e-3, 2e3),
)
for ax in (left, right):
    ax.spines[["top", "right"]].set_visible(False)
plt.show()

# %%
# Left: most of the batch had a lower gain at first than the images that were passed over, for those
# have nothing new to tell any more. Right: the first pick takes most of what was to be gained from
# all other images. At the end of the batch the best gain is a thousandth of the first.
#
# Why a batch does not repeat itself
# ----------------------------------
#
# Imagine an exact copy, a twin, of the best image in the pool. Before anything is chosen both have
# the highest gain. What is the twin worth when the other one has been taken?

best = int(positions[0])
after = all_gains(information_of([best]))
rank = int((after > after[best]).sum()) + 1
print(f"gain of the twin before: {first_gains[best]:.3f}, rank 1")
print(f"gain of the twin after:  {after[best]:.3f}, rank {rank} of {len(V)}")

# %%
# Little: it falls behind more than two hundred other images. Its gain is not zero, because a second
# look still makes the estimate of those parameters better.
#
# The same holds for images that are merely alike. How alike two images are to the network is the
# cosine between their Fisher information matrices, :math:`\|V_a V_b^\top\|^2 / (\|V_a
# V_a^\top\|\,\|V_b V_b^\top\|)`: one for a twin, zero for images that tell of different things.
# Beside the batch of FisherMask is that of entropy, and the one we would get by taking the twenty
# images of highest gain at first.


def similarity(chosen):
    v = V[torch.as_tensor(chosen)]
    inner = torch.einsum("ark,bsk->abrs", v, v).square().sum(dim=(2, 3))
    norm = inner.diagonal().sqrt()
    return inner / norm[:, None] / norm


figure, axes = plt.subplots(1, 4, figsize=(9.5, 2.9), layout="constrained")
shown = {
    "random": batches_of["random"],
    "high entropy": batches_of["entropy"],
    "high gain at first": top,
    "FisherMask": positions,
}
for ax, (name, chosen) in zip(axes, shown.items(), strict=True):
    alike = similarity(chosen)
    image = ax.imshow(alike, vmin=0, vmax=1, cmap="Blues")
    others = alike[~torch.eye(K, dtype=torch.bool)]
    ax.set_title(f"{name}\nmean {others.mean():.2f}", fontsize=11)
    ax.set(xticks=[0, 9, 19], xticklabels=[1, 10, 20], yticks=[0, 9, 19], yticklabels=[1, 10, 20])
figure.colorbar(image, ax=axes, label="similarity", shrink=0.7)
plt.show()


def objective(M):
    return float((torch.linalg.inv(M) @ F).trace())


print(f"objective before the query: {objective(M0):6.1f}")
for name, chosen in shown.items():
    print(f"{'with ' + name:<26}: {objective(information_of(chosen)):6.1f}")

# %%
# Entropy and high gain at first give batches of images that repeat each other. The batch
# of FisherMask is about as varied as a random one, and that alone does not make it good: the random
# batch is the one that lowers the objective least. The greedy choice gets both, images that tell
# much and different things, and so ends far below the others.
