"""
Your own folder of images
=========================

You have a folder of images, perhaps with folders in it, and no labels. Each day you label a few
dozen that the network chooses; in the end every image has a label, from you or from the network.

This page is also the script for your folder: copy it, change the settings below the imports, delete
what is *only for this page*, and run it. Write labels into the table that it makes, and run it
again, today or tomorrow. It changes no image. It needs ``pip install ".[vision,plot]" pandas``.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torchvision import models, transforms

from skfishermask import FisherMaskSampler, query_table

folder = Path(tempfile.mkdtemp()) / "photographs"  # Yours, as Path("/home/me/photographs").
work = folder.parent / "labels"  # A folder for tables and features. It is made.
names = list("0123456789")  # Your labels, as ["cat", "dog", "other"].
n_first, n_batch = 20, 40  # Images to label: at first, about two for each label, and then.
weights = None  # For your images models.ResNet18_Weights.DEFAULT, which is downloaded once.

# ==== Only for this page: delete from here ====
digits = load_digits()
for i, image in enumerate(digits.images[:600]):
    path = folder / f"day_{i % 3}" / f"{i:03d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 15.9).astype("uint8")).resize((64, 64)).save(path)
_ = path.write_bytes(path.read_bytes()[:60])  # One is damaged.
# ==== Only for this page: to here ====

# %%
# Features, once
# --------------
#
# Each image goes once through a ResNet-18 without its last layer, which is not trained further; on
# other days only new images are opened. Random weights will do for the digits of this page, but not
# for photographs.

torch.manual_seed(0)
backbone = models.resnet18(weights=weights).eval()
backbone.fc = torch.nn.Identity()
transform = weights.transforms() if weights else transforms.ToTensor()


def open_image(file):
    with Image.open(folder / file) as image:
        return ImageOps.exif_transpose(image).convert("RGB")  # Upright, also from a phone.


def read_features():
    saved = work / "features.pt"
    features = torch.load(saved) if saved.exists() else {}
    paths = [p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
    files = sorted(path.relative_to(folder).as_posix() for path in paths)
    for file in set(files) - set(features):
        try:
            with torch.no_grad():
                features[file] = backbone(transform(open_image(file))[None])[0]
        except Exception as error:  # Pillow raises many kinds.
            print(f"{file} is left out: {error}")
    if not features:
        raise ValueError(f"no readable .jpg, .jpeg or .png in {folder.resolve()}")
    torch.save(features, saved)
    files = np.array([file for file in files if file in features])
    return files, torch.stack([features[file] for file in files]).numpy()


# %%
# A step
# ------
#
# A table lists files to label, and what the network takes them for; a picture shows them in that
# order. Fill in the last column in a spreadsheet, and save it as CSV (UTF-8). Each step reads all
# tables, so correct a label where you wrote it. What you leave blank stays in the pool.
# ``result.csv`` has labels for all images, the least certain first, and yours last.


def read_tables(files):
    tables = [pd.DataFrame(columns=["file", "predicted", "label"])]
    for path in sorted(work.glob("batch_*.csv")):
        options = {"sep": None, "engine": "python", "dtype": str, "keep_default_na": False}
        tables.append(pd.read_csv(path, encoding="utf-8-sig", **options).fillna(""))
    lines = pd.concat(tables)
    is_right = lines["file"].isin(files) & lines["label"].isin(names)
    for line in lines[~is_right & (lines["label"] != "")].itertuples():
        print(f"no image {line.file!r}, or no label {line.label!r}")
    return lines[is_right].drop_duplicates("file", keep="last"), tables


def next_step():
    work.mkdir(parents=True, exist_ok=True)
    files, X = read_features()
    answers, tables = read_tables(files)
    labels = answers.set_index("file")["label"]
    is_known = np.isin(files, labels.index)
    sampler = FisherMaskSampler(LogisticRegression(max_iter=1000), random_state=0)
    if labels.nunique() > 1:  # Before, a batch covers the features.
        sampler.fit(X[is_known], labels[files[is_known]])
        result = pd.DataFrame({"file": files, "probability": sampler.predict_proba(X).max(axis=1)})
        result["label"] = result["file"].map(labels).fillna(pd.Series(sampler.predict(X)))
        result.loc[is_known, "probability"] = np.nan
        result.sort_values("probability").to_csv(work / "result.csv", index=False)
    if is_known.all() or (len(tables) > 1 and not tables[-1]["label"].any()):
        return print("All images have labels, or the last table has none yet")
    pool, n_instances = X[~is_known], min(n_batch if len(labels) else n_first, sum(~is_known))
    rows, _ = sampler.query(pool, n_instances, X_labeled=X[is_known])
    table = pd.DataFrame(query_table(sampler, pool, rows, files=files[~is_known]))
    new = work / f"batch_{len(tables):03d}.csv"
    table.assign(label="").to_csv(new, index=False, mode="x", encoding="utf-8-sig")
    picture = Image.new("RGB", (1600, 160 * -(-len(rows) // 10)), "white")
    for i, file in enumerate(table["file"]):
        picture.paste(open_image(file).resize((155, 155)), (i % 10 * 160, i // 10 * 160))
    picture.save(new.with_suffix(".png"))
    print(f"{len(labels)} labels so far; {new.name} asks for {len(rows)}")


next_step()
# %%
# Two days
# --------
#
# Here your script ends. Answers are looked up on this page, with one mistake in each table.

# ==== Only for this page: delete from here to the end ====
for day in ("batch_001.csv", "batch_002.csv"):
    table = pd.read_csv(work / day, dtype=str)
    table["label"] = [str(digits.target[int(file[-7:-4])]) for file in table["file"]]
    table.loc[3, "label"] = "O"
    table.to_csv(work / day, index=False)
    next_step()
result = pd.read_csv(work / "result.csv", dtype={"label": str}).dropna(subset="probability")
right = [digits.target[int(file[-7:-4])] == int(label) for file, _, label in result.to_numpy()]
print(f"of the other {len(result)} images the network names {np.mean(right):.0%} correctly")
plt.axes(frameon=False, xticks=[], yticks=[]).imshow(Image.open(work / "batch_002.png"))
plt.show()

# %%
# To know when to stop, label some more, drawn at random, as a test: :ref:`when-to-stop`. Where
# several people label, a tool takes the tables' place: :doc:`plot_person_in_the_loop`.
