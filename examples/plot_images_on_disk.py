"""
Your own folder of images
=========================

You have a folder of images, and none has a label yet. In the end every file has one: some from you,
the others from the network that learned from these. No file is moved or changed. The page makes its
own files, from the digits that come with scikit-learn; for yours, change ``root``, ``folder``,
``names``, the size and the colours. It needs torchvision and matplotlib
(``pip install ".[vision,plot]"``).
"""

# %%
# Files
# -----
#
# The images lie in one folder. More of them, for testing, are in a folder for each label.

import csv
import json
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import Dataset
from torchvision import datasets, transforms

from skfishermask import FisherMaskSampler

names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits, y = load_digits(return_X_y=True)
temporary = tempfile.TemporaryDirectory()
root = Path(temporary.name)  # For yours a folder that stays: it gets the tables and the answers.
folder = root / "scans"
truth = {}  # What a person would see: asked for the chosen files alone.
for position, row in enumerate(np.random.default_rng(0).permutation(len(digits))[:1200]):
    path = folder / f"scan_{row:04d}.png"
    truth[path.name] = names[y[row]]
    if position >= 700:
        path = root / "test" / truth[path.name] / path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = Image.fromarray((digits[row].reshape(8, 8) * 15.9).astype("uint8"))
    pixels.resize((32, 28 + row % 9)).save(path)  # Of different sizes, as photographs are.
files = sorted(path.name for path in folder.glob("*.png"))

# %%
# A dataset opens a file when its image is needed, so the folder may be larger than the memory.
# ``convert`` gives all images the same channels: ``"L"`` is grey, one channel; for photographs use
# ``"RGB"``, three channels, which the network's first layer must then take. ``Resize`` needs two
# numbers, such as ``(64, 64)`` for photographs: with one it keeps the ratio of the sides, and then
# the images of a batch differ in shape. Training sees them turned and moved at random; a query must
# see them as they are, because augmented ones would be others at every reading.

plain = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
augmented = transforms.Compose([transforms.RandomAffine(10, translate=(0.1, 0.1)), plain])


def open_image(path):
    with Image.open(path) as image:
        return image.convert("L")


class Images(Dataset):
    def __init__(self, files, transform=plain):
        self.paths, self.transform = [folder / file for file in files], transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return self.transform(open_image(self.paths[row])), 0  # The 0 stands for a label.


for file in files:  # What cannot be opened would stop a query: leave it out of files.
    try:
        Image.open(folder / file).load()
    except OSError as error:
        print(f"{file}: {error}")

# %%
# The first batch
# ---------------
#
# It is drawn at random, about ten files for each label that you expect. Do not query an untrained
# network: it knows nothing. If a label is still missing after the answers, draw again from what is
# left.
#
# The batch is a table with an empty column: open it in a spreadsheet, look at each file, write its
# label, and save it as CSV again. Mode ``"x"`` never writes over a table that is there.


def write_table(path, columns, lines):
    with path.open("x", newline="", encoding="utf-8-sig") as table:
        csv.writer(table).writerows([columns, *lines])


columns = ["rank", "file", "gain", "label"]
first = np.random.default_rng(0).choice(len(files), 100, replace=False)
lines = [[rank, files[row], "", ""] for rank, row in enumerate(first, start=1)]
write_table(root / "batch_1.csv", columns, lines)


def fill_in(path):
    """Answer as a person may: one file is left blank, and one answer misspelt."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    filled = [line + truth.get(line.split(",")[1], "") for line in lines]
    filled[3], filled[5] = lines[3], filled[5][:-1]
    path.write_text("\n".join(filled), encoding="utf-8-sig")


# %%
# The answers
# -----------
#
# An answer belongs to a file name, never to a row number: rows shift when a file is added. A file
# without an answer, or with one that is not among ``names``, stays in the pool. Correct a misspelt
# answer in the table and read it again, or leave the file to a later batch.
#
# All answers are kept in ``labels.json``. A new version is written beside the old one and then
# takes its place, so the file is never half written. Nothing else needs to be kept: a process that
# is started tomorrow reads it, and with an int as ``random_state`` the fit is the same again.


def read_answers(path, names):
    answers = {}
    with path.open(newline="", encoding="utf-8-sig") as table:  # Spreadsheets may write a BOM.
        lines = csv.DictReader(table)
        if not {"file", "label"} <= set(lines.fieldnames or ()):
            found = f"no columns file and label, separated by commas, in {lines.fieldnames}"
            raise ValueError(f"{path.name}: {found}. Save it with commas, not semicolons.")
        for line in lines:
            answer = (line["label"] or "").strip()
            if answer in names:
                answers[line["file"]] = answer
            elif answer:
                print(f"{line['file']} stays in the pool: {answer!r} is not among the names")
    return answers


def add_answers(path):
    """Add the answers in a table to those that are kept, and give all of them."""
    kept, beside = root / "labels.json", root / "labels.new"
    labels = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    labels |= read_answers(path, names)
    beside.write_text(json.dumps(labels, indent=1), encoding="utf-8")
    os.replace(beside, kept)
    return labels


fill_in(root / "batch_1.csv")
labels = add_answers(root / "batch_1.csv")
print(len(labels), "labels; missing:", set(names) - set(labels.values()) or "none")

# %%
# The network
# -----------
#
# It has an output for each name; labels are given as the strings that they are. With large images
# let processes read them beside the one that computes: ``iterator_train__num_workers=4`` for
# training, ``iterator_valid__num_workers=4`` for predictions and queries. With these small ones
# they are not worth their start. On Windows and macOS, and from Python 3.14 on Linux, a script with
# workers needs the ``if __name__ == "__main__":`` that Python's multiprocessing asks for.


class SmallConvNet(nn.Sequential):
    def __init__(self):
        layers = [nn.Conv2d(1, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()]
        # The pooling makes nine numbers of each channel, whatever the size of the images.
        super().__init__(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, len(names)))


net = NeuralNetClassifier(
    SmallConvNet,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=60,
    batch_size=32,
    train_split=None,
    verbose=0,
)


def fit(labels):
    sampler = FisherMaskSampler(net, batch_size=128, random_state=0)
    return sampler.fit(Images(labels, augmented), list(labels.values()))


# %%
# :class:`~torchvision.datasets.ImageFolder` reads images that are sorted into a folder for each
# label, as those for testing are, and takes every subfolder as a label. Unlabelled images need not
# be moved for it. If you have no labelled ones for testing, draw some at random before the first
# batch, label them, and leave them out of ``files``.

test = datasets.ImageFolder(root / "test", plain, loader=open_image)
y_test = [test.classes[target] for target in test.targets]
sampler = fit(labels)
before = sampler.score(test, y_test)
print(f"{len(labels)} labels, accuracy {before:.3f}")

# %%
# The query
# ---------
#
# The pool must not hold the labelled files: nothing leaves them out by itself. They are given as
# ``X_labeled``, so that the batch does not ask again what they have told. The rows that a query
# chooses are those of the pool; ``chosen`` is a :class:`~torch.utils.data.Subset` of it. The
# picture shows its images, with the network's guesses.

pool = [file for file in files if file not in labels]
rows, chosen, gains = sampler.query(
    Images(pool), n_instances=40, X_labeled=Images(labels), return_metrics=True
)
lines = [[i + 1, pool[row], f"{gains[i]:.4g}", ""] for i, row in enumerate(rows)]
write_table(root / "batch_2.csv", columns, lines)
print("chosen first:", *lines[0])

figure, axes = plt.subplots(4, 10, figsize=(9, 4.6), layout="constrained")
for ax, (image, _), guess in zip(axes.flat, chosen, sampler.predict(chosen), strict=True):
    ax.imshow(image[0].numpy(), cmap="gray_r")
    ax.set_title(f"{guess}?", fontsize=9)
    ax.set_axis_off()
figure.suptitle("Label these forty next", fontsize=11)
plt.show()

# %%
# The answers join the others, and the network is trained anew on all of them. Repeat this until the
# accuracy is enough, or no longer grows.

fill_in(root / "batch_2.csv")
labels = add_answers(root / "batch_2.csv")
sampler = fit(labels)
after = sampler.score(test, y_test)
print(f"{len(labels)} labels, accuracy {after:.3f}")

# %%
# Labels for the rest
# -------------------
#
# They get the network's label and its probability, the least certain first: look through those.

rest = [file for file in files if file not in labels]
probabilities = sampler.predict_proba(Images(rest))
predicted, certainty = sampler.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1)
order = certainty.argsort()
lines = [[rest[row], predicted[row], f"{certainty[row]:.3f}"] for row in order]
write_table(root / "predicted.csv", ["file", "label", "probability"], lines)
print("least certain:", *lines[0])
right = predicted == [truth[file] for file in rest]  # Only this page can know.
print(f"right: {right[order[:50]].mean():.0%} of the 50 least certain, ", end="")
print(f"{right[order[50:]].mean():.0%} of the other {len(rest) - 50}")
temporary.cleanup()

# %%
# Where several people label, a tool such as Label Studio takes the place of the table:
# :doc:`/auto_examples/plot_person_in_the_loop` writes its tasks and reads its answers. To name a
# local file, put its bytes into the task as base64, as there, and its name in place of the ``row``.
