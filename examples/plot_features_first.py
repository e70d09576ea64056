"""
Features first
==============

Most people should work like this. A pretrained network, the *backbone*, is run once over all
images, or texts, and what it returns is saved: a table with a row of *features* for each. From then
on only a small head is trained, on a few rows of that table, so that a round takes a second.
"""

# %%
# A backbone
# ----------
#
# The photographs here are digits from 5 to 9, each somewhere on a dark ground. The backbone stands
# in for one that you would download. It was not made for these classes, as ImageNet was not made
# for yours: it is trained, here and now, on the digits from 0 to 4.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler

digits = load_digits()
rng = np.random.default_rng(0)


def photographs(rows):
    images = np.zeros((len(rows), 1, 12, 12), dtype="float32")
    for image, row in zip(images, rows, strict=True):
        top, left = rng.integers(0, 5, size=2)
        image[0, top : top + 8, left : left + 8] = digits.images[row] / 16
    return torch.as_tensor(images)


torch.manual_seed(0)
layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 128, 3)]
backbone = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
training = {"criterion": nn.CrossEntropyLoss, "optimizer": torch.optim.Adam, "train_split": None}
elsewhere = np.flatnonzero(digits.target < 5)
network = NeuralNetClassifier(
    nn.Sequential(backbone, nn.Linear(128, 5)), lr=0.003, max_epochs=1, verbose=0, **training
)
for _ in range(25):  # Each time at other positions.
    network.partial_fit(photographs(elsewhere), digits.target[elsewhere])

# %%
# For photographs of your own, take one of torchvision's, which is downloaded once::
#
#     weights = torchvision.models.ResNet18_Weights.DEFAULT
#     backbone = torchvision.models.resnet18(weights=weights)
#     backbone.fc = nn.Identity()  # the 512 features before the last layer
#     transform = weights.transforms()  # from an image to what the network takes
#
# Once over all images
# --------------------
#
# In evaluation mode, without gradients, a few hundred at a time. The features of 100,000
# photographs by a ResNet-18 take 200 MB.

images, y = photographs(np.flatnonzero(digits.target >= 5)), digits.target[digits.target >= 5]
with torch.no_grad():
    features = torch.cat([backbone.eval()(batch) for batch in images.split(256)])
folder = tempfile.TemporaryDirectory()
np.save(Path(folder.name) / "features.npy", features.numpy())

# %%
# Ten rounds
# ----------
#
# The sampler takes scikit-learn's logistic regression as the linear network that it is. Its first
# batch, before there is a label, covers the features. Three hundred rows are a test set: they show
# what choosing gains over as many labels at random.

X = np.load(Path(folder.name) / "features.npy")
test, pool = np.split(rng.permutation(len(X)), [300])


def ten_rounds(head, choose_at_random=False, seed=0):
    sampler = FisherMaskSampler(head, random_state=seed)
    left, labelled, scores = np.random.default_rng(seed).permutation(pool), pool[:0], []
    for _ in range(10):
        rows = np.arange(10)
        if not choose_at_random:
            rows, _ = sampler.query(X[left], n_instances=10, X_labeled=X[labelled])
        labelled, left = np.append(labelled, left[rows]), np.delete(left, rows)
        sampler.fit(X[labelled], y[labelled])  # In practice, a person says what y is.
        scores.append(sampler.score(X[test], y[test]))
    return scores


head = LogisticRegression(max_iter=1000)
curves = {
    "chosen": [ten_rounds(head, seed=seed) for seed in range(4)],
    "at random": [ten_rounds(head, True, seed) for seed in range(4)],
}
figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, scores), colour in zip(curves.items(), ["#0072b2", "0.5"], strict=True):
    ax.plot(np.arange(10, 101, 10), np.mean(scores, axis=0), "o-", color=colour, label=name)
ax.set(xlabel="labels", ylabel="test accuracy, mean of four runs")
ax.legend(frameon=False)
plt.show()

# %%
# A head of PyTorch goes in its place, as a skorch net.

training |= {"module__in_features": 128, "module__out_features": 5, "max_epochs": 60, "verbose": 0}
net = NeuralNetClassifier(nn.Linear, lr=0.01, **training)
print(f"accuracy with 100 labels: {ten_rounds(net)[-1]:.3f}")

# %%
# :doc:`/auto_examples/plot_images_on_disk` does this with a folder of files and a person's answers.
# What the choice gains on features of real images and texts, :doc:`/label_efficiency` says.
