"""
Your own folder of images
=========================

You have a folder of images, and none has a label yet. In the end every image has one: some from
you, the others from the network that learned from these. No file is moved or changed.

This page is also the script for your folder. Copy it, and

- change the settings below the imports: ``folder``, ``work``, ``sorted_folder``, ``names``,
  ``size``, ``mode``, ``n_test``, ``n_first`` and ``n_batch``;
- delete the two parts marked *only for this page*: they make digits, and answer as a person would;
- run it. It writes tables; write your labels into them and run it again, as often as you like.

It needs torchvision and matplotlib (``pip install ".[vision,plot]"``).
"""

import csv
import functools
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn
from torch.utils.data import Dataset
from torchvision import datasets, models, transforms

from skfishermask import FisherMaskSampler

temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name) / "scans"  # Your images, as Path("/home/me/photographs").
work = Path(temporary.name) / "tables"  # It is made, for your answers alone. Not a temporary one.
sorted_folder = Path(temporary.name) / "sorted"  # Images in a folder for each label, or None.
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]  # Labels.
size = (16, 16)  # What the network sees, in two numbers; for photographs (64, 64) or more.
mode = "L"  # Grey; for photographs "RGB".
n_test, n_first, n_batch = 200, 20, 40  # Images you label: to test, at first (two a label), then.

# ==== Only for this page: delete from here ====
digits, y = load_digits(return_X_y=True)
folder.mkdir()  # An error if it exists: nothing is written among your images.
truth = {}  # What a person would see.
for position, row in enumerate(np.random.default_rng(0).permutation(len(digits))[:920]):
    path, label = folder / f"scan_{row:04d}.png", names[y[row]]
    truth[path.name] = label
    if position >= 900:  # Twenty are sorted already.
        path = sorted_folder / label / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
    pixels = Image.fromarray((digits[row].reshape(8, 8) * 15.9).astype("uint8"))
    pixels.resize((32, 28 + row % 9)).save(path)  # Of different sizes, as photographs are.
(folder / "half_a_scan.PNG").write_bytes(path.read_bytes()[:100])
# ==== Only for this page: to here ====

# %%
# Images
# ------
#
# A dataset opens a file when its image is needed, so the folder may be larger than the memory. It
# keeps up to 2,000 images in the small size. Training sees them turned and moved at random; a query
# must see them as they are, because augmented ones would be others at every reading. Images that
# are sorted into a folder for each label are read by :class:`~torchvision.datasets.ImageFolder`:
# here its paths and labels join those from the tables.

plain = transforms.ToTensor()
augmented = transforms.Compose([transforms.RandomAffine(10, translate=(0.1, 0.1)), plain])


def open_image(path):
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert(mode)  # Upright, also from a phone.


@functools.lru_cache(2000)
def open_small(path):
    return transforms.functional.resize(open_image(path), size)


def readable(path):
    try:
        return open_small(path) is not None
    except Exception as error:  # Pillow raises many kinds.
        print(f"{path.name} is left out: {error}")
        return False


class Images(Dataset):
    def __init__(self, files, transform=plain):
        self.paths, self.transform = [folder / file for file in files], transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        return self.transform(open_small(self.paths[row])), 0  # The 0 stands for a label.


found = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
files = [path.name for path in sorted(found) if readable(path)]
if len(files) <= n_test + n_first:
    raise ValueError(f"{folder.resolve()}: {len(files)} readable .jpg, .jpeg or .png are too few")
sorted_labels = {}
if sorted_folder is not None:
    images = datasets.ImageFolder(sorted_folder.resolve())
    if not set(images.classes) <= set(names):
        raise ValueError(f"{sorted_folder}: {images.classes} are not all among the names")
    sorted_labels = {p: images.classes[i] for p, i in images.samples if readable(Path(p))}
print(f"{len(files)} images, and {len(sorted_labels)} that are sorted already")

# %%
# Tables
# ------
#
# Open a table in a spreadsheet, write labels into its last column, and save it as CSV (UTF-8), with
# commas or semicolons. Each run reads all tables, and needs nothing else: correct a label where you
# wrote it. You may add lines for other images of the folder, say of a label that is missing. A line
# names the file, not the number of a row: rows shift when a file is added.


def write_table(name, columns, lines, how="x"):  # "x" never writes over a table that is there.
    with (work / name).open(how, newline="", encoding="utf-8-sig") as table:
        csv.writer(table).writerows([columns, *lines])


def ask(name, chosen):
    lines = [[rank, file, ""] for rank, file in enumerate(chosen, start=1)]
    write_table(name, ["rank", "file", "label"], lines)
    print(f"{name}: write labels for {len(chosen)} images, and run this again")


def read_table(name):
    try:
        text = (work / name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not in UTF-8: save it as CSV UTF-8") from error
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    lines = csv.DictReader(text.splitlines(), delimiter=delimiter)
    if not {"file", "label"} <= set(lines.fieldnames or ()):
        raise ValueError(f"{name} has the columns {lines.fieldnames}, but needs file and label")
    labels, known = {}, set(files)
    for line in lines:
        file, label = (line["file"] or "").strip(), (line["label"] or "").strip()
        if file not in known and (file or label):
            print(f"{name}: {file!r} is not an image of the folder")
        elif label and label not in names:
            print(f"{name}: {label!r}, for {file}, is not among the names")
        labels[file] = label if file in known and label in names else labels.get(file, "")
    return labels


# %%
# The network
# -----------
#
# It has an output for each name; labels are given as the strings that they are. For many images
# ``iterator_valid__num_workers=4`` lets processes read them, where Python forks (on Linux, before
# 3.14). A small network that starts from nothing is weak on photographs: write ``pretrained`` in
# place of ``SmallConvNet`` then, with ``"RGB"`` and ``(224, 224)``, for a ResNet-18 with weights
# that torchvision downloads; only its new last layer is trained. Frozen weights are left
# out of the mask. What a query gains on
# pretrained features, :doc:`/label_efficiency` says.


class SmallConvNet(nn.Sequential):
    def __init__(self):  # "L" has one channel, "RGB" three.
        layers = [nn.Conv2d(len(mode), 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU()]
        # Pooling reduces each channel to nine numbers, for images of any size.
        super().__init__(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(144, len(names)))


def pretrained():
    network = models.resnet18(weights="DEFAULT").requires_grad_(False)
    network.fc = nn.Linear(network.fc.in_features, len(names))
    colours = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return nn.Sequential(colours, network)


net = NeuralNetClassifier(
    SmallConvNet,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=60,
    batch_size=32,
    train_split=None,  # All labels are trained on; by default skorch holds a fifth of them back.
    verbose=0,
)

# %%
# A step
# ------
#
# The images for testing are drawn at random. The first batch covers the others: there is no trained
# network yet, so it goes by the pixels, and images that are sorted already count as covered. The
# pixels of photographs say little about what is in them (:ref:`no-labels`). When half of a batch
# has labels, the network is trained on all labels and chooses the next batch; what was left blank
# stays in the pool. The pool must not hold labelled images. They are given as ``X_labeled``, so
# that the batch does not ask again what they have told. With an int as ``random_state`` the same
# tables give the same network tomorrow.
#
# Each step gives every image a label, in ``result.csv``: the network's, the least certain first,
# then yours. It is written anew each time, so correct a label in a table and not there. Accept the
# network's labels only above a probability, such as 0.9. The picture has the batch in the order of
# its table, with what the network takes each image for.


def next_step():
    work.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    if not (work / "test.csv").exists():
        ask("test.csv", generator.choice(files, n_test, replace=False))
    test = read_table("test.csv")  # Never trained on.
    rest = [file for file in files if file not in test]
    batches = sorted(path.name for path in work.glob("batch_[0-9][0-9][0-9].csv"))
    if not batches:
        known = Images(sorted_labels) if sorted_labels else None
        sampler = FisherMaskSampler(net, random_state=0)
        rows, _ = sampler.query(Images(rest), n_first, X_labeled=known)
        return ask("batch_001.csv", [rest[row] for row in rows])

    labels = dict(sorted_labels)
    for name in batches:
        batch = read_table(name)
        labels |= {file: label for file, label in batch.items() if label and file not in test}
    last = {"test.csv": test, name: batch}
    short = [
        name for name, table in last.items() if 2 * sum(map(bool, table.values())) < len(table)
    ]
    if short:
        return print("Fewer than half of the images have a label in", *short)

    labels = dict(sorted(labels.items()))  # Independent of the order in which a table was saved.
    sampler = FisherMaskSampler(net, batch_size=128, random_state=0)
    sampler.fit(Images(labels, augmented), list(labels.values()))
    tested = {file: label for file, label in test.items() if label}
    accuracy = sampler.score(Images(tested), list(tested.values())) if tested else np.nan
    print(f"{len(labels)} labels, accuracy {accuracy:.3f} on {len(tested)} other images")
    if missing := sorted(set(names) - set(labels.values())):
        print("No image yet of", *missing)
    write_result(sampler, labels | tested)

    pool = [file for file in rest if file not in labels]
    if not pool:
        return print("All images have a label of yours")
    rows, _ = sampler.query(Images(pool), min(n_batch, len(pool)), X_labeled=Images(labels))
    chosen, name = [pool[row] for row in rows], f"batch_{int(batches[-1][6:9]) + 1:03d}"
    draw(chosen, sampler.predict(Images(chosen))).savefig(work / f"{name}.png")
    ask(f"{name}.csv", chosen)


def write_result(sampler, known):
    probabilities = sampler.predict_proba(Images(files))
    guesses, certainty = sampler.classes_[probabilities.argmax(axis=1)], probabilities.max(axis=1)
    lines = [
        [file, known[file], "person", ""] if file in known else [file, guess, "network", f"{p:.3f}"]
        for file, guess, p in zip(files, guesses, certainty, strict=True)
    ]
    lines.sort(key=lambda line: (line[2], line[3]))
    write_table("result.csv", ["file", "label", "source", "probability"], lines, how="w")


def draw(chosen, guesses):
    n_rows = -(-len(chosen) // 10)
    figure = plt.figure(figsize=(9, 1.15 * n_rows), layout="tight")
    for i, (file, guess) in enumerate(zip(chosen, guesses, strict=True), start=1):
        image = open_image(folder / file)
        image.thumbnail((128, 128))
        ax = figure.add_subplot(n_rows, 10, i)
        ax.imshow(image, cmap="gray" if mode == "L" else None)
        ax.set_title(f"{i} {guess}?", fontsize=8)
        ax.set_axis_off()
    return figure


next_step()

# %%
# The answers
# -----------
#
# Here your script ends. On this page a function answers. It leaves one image out, and misspells one
# label and one file name.

# ==== Only for this page: delete from here to the end ====


def fill_in(name):
    lines = (work / name).read_text(encoding="utf-8-sig").splitlines()
    filled = [line + truth.get(line.split(",")[1], "") for line in lines]
    if name == "batch_001.csv":
        filled[3], filled[5], filled[6] = lines[3], filled[5][:-1], filled[6].replace("scan", "scn")
    (work / name).write_text("\n".join(filled), encoding="utf-8-sig")


fill_in("test.csv")
fill_in("batch_001.csv")
next_step()

# %%
# The file name is corrected, and a step without answers to the second batch changes nothing.

text = (work / "batch_001.csv").read_text(encoding="utf-8-sig")
(work / "batch_001.csv").write_text(text.replace("scn", "scan"), encoding="utf-8-sig")
next_step()
fill_in("batch_002.csv")
next_step()

# %%
# Stop when the accuracy is enough, or no longer grows. Only this page can know how many of the
# network's labels are right.

table = csv.DictReader((work / "result.csv").read_text(encoding="utf-8-sig").splitlines())
result = [line for line in table if line["source"] == "network"]
for low, high in ((0, 0.5), (0.5, 0.9), (0.9, 1.01)):
    lines = [line for line in result if low <= float(line["probability"]) < high]
    share = np.mean([line["label"] == truth[line["file"]] for line in lines])
    print(f"probability from {low} to {min(high, 1)}: {share:.0%} of {len(lines)} are right")
temporary.cleanup()

# %%
# Where several people label, a tool such as Label Studio takes the place of the tables:
# :doc:`/auto_examples/plot_person_in_the_loop`.
