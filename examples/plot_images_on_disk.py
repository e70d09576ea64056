"""
Images in folders
=================

Your images are files: a few in a folder for each label, and many without one. This example goes
from there to a list of the files to label next, and on to a network that has learned from them. It
makes its own files, PNGs of the digits that come with scikit-learn; with yours, only the paths
change. It needs torchvision (``pip install ".[vision]"``).
"""

# %%
# Files
# -----
#
# A folder for each label, as :class:`~torchvision.datasets.ImageFolder` reads them, and a folder
# for what has no label yet. ImageFolder wants subfolders there, too: one will do (without it the
# error is "Couldn't find any class folder"). The test images are in folders of the first kind.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

from skfishermask import FisherMaskSampler

names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(digits))
temporary = tempfile.TemporaryDirectory()
root = Path(temporary.name)
truth = {}  # What a person would see: asked for the chosen files alone.
for position, row in enumerate(order[:1200]):
    name = names[y[row]]
    path = f"scan_{row:04d}.png"
    truth[path] = name
    folder = f"labelled/{name}" if position < 60 else "pool/no_label_yet"
    folder = f"test/{name}" if position >= 700 else folder
    (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = (digits[row].reshape(8, 8) * 15.9).astype("uint8")
    Image.fromarray(pixels).save(root / folder / path)
print(sorted(str(path.relative_to(root)) for path in root.glob("labelled/*/*.png"))[:3], "...")

# %%
# Augmentation in training, none in a query
# -----------------------------------------
#
# Two views of a folder: one whose transform turns and moves the images at random, for training, and
# a plain one, for everything else. A query must see the images as they are: augmented ones would be
# others at every reading. Images are read when they are needed, batch by batch, so a pool may be
# much larger than the memory. Photographs need ``transforms.Resize((64, 64))``, say, before
# ``ToTensor``, as all must be of one size; with colours, so without ``Grayscale``, the network's
# first layer has three input channels instead of one.

plain = transforms.Compose([transforms.Grayscale(), transforms.ToTensor()])
augmented = transforms.Compose([transforms.RandomAffine(10, translate=(0.1, 0.1)), plain])


def images(folder, transform=plain):
    return ImageFolder(root / folder, transform)


def labels(dataset):
    return [dataset.classes[target] for target in dataset.targets]


# %%
# The network
# -----------
#
# ``num_workers`` processes read and transform images beside the one that computes; they are worth
# their start with large images (with these small ones they are not, so training has none).
# ``iterator_valid`` is what predictions and queries read with. On Windows and macOS a script with
# workers needs the ``if __name__ == "__main__":`` that Python's multiprocessing asks for.


class SmallConvNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 10),
        )


net = NeuralNetClassifier(
    SmallConvNet,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=60,
    batch_size=32,
    iterator_valid__num_workers=2,
    train_split=None,
    verbose=0,
)

# %%
# One query
# ---------
#
# The labels are the names of the folders: the sampler takes them as they are, and predicts them.
# The rows that a query chooses are those of the dataset, whose ``samples`` know the files.

sampler = FisherMaskSampler(net, batch_size=128, random_state=0)


def fit():
    training = images("labelled", augmented)
    return sampler.fit(training, labels(training))


def accuracy():
    test = images("test")
    return float(np.mean(sampler.predict(test) == labels(test)))


fit()
before = accuracy()
print(f"{len(images('labelled'))} labels, accuracy {before:.2f}")
pool = images("pool")
indices, chosen, gains = sampler.query(
    pool, n_instances=40, X_labeled=images("labelled"), return_metrics=True
)
files = [Path(pool.samples[i][0]) for i in indices]
for path, gain in zip(files[:5], gains, strict=False):
    print(f"{path.relative_to(root)}   gain {gain:.2f}")

# %%
# ``chosen`` is the part of the pool that was chosen, as a :class:`~torch.utils.data.Subset`: here
# are its images, with what the network takes them for.

figure, axes = plt.subplots(4, 10, figsize=(9, 4.6), layout="constrained")
for ax, (image, _), guess in zip(axes.flat, chosen, sampler.predict(chosen), strict=True):
    ax.imshow(image[0], cmap="gray_r")
    ax.set_title(f"{guess}?", fontsize=9)
    ax.set_axis_off()
figure.suptitle("Label these forty next", fontsize=11)
plt.show()

# %%
# The answers
# -----------
#
# Labelling a file is moving it into the folder of its label. Then the network is trained anew, on
# all that the folders hold.

for path in files:
    name = truth[path.name]  # Here somebody would look at the image.
    (root / "labelled" / name).mkdir(exist_ok=True)
    path.rename(root / "labelled" / name / path.name)
fit()
after = accuracy()
print(f"{len(images('labelled'))} labels, accuracy {after:.2f}; {len(images('pool'))} in the pool")
temporary.cleanup()

# %%
# :doc:`/auto_examples/plot_person_in_the_loop` hands a batch to a labelling tool and takes the
# answers back.
