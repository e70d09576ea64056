"""
Labelling with a person
=======================

The other examples look labels up. Here a person is asked: the program shows an image, the person
types what it is, and the answer is saved before the next image is shown. The work can be stopped at
any moment, and goes on where it was.

Download this script and run it with ``--ask``, and it asks you. On this page a function answers in
your place. It needs matplotlib (``pip install ".[plot]"``).
"""

# %%
# Images without labels
# ---------------------
#
# There are 600 unlabelled digits, and fifteen labelled ones to start from: without a few, there is
# no network that could know what to ask.

import base64
import csv
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler, label_studio_tasks, query_table

X, y_true = load_digits(return_X_y=True)
X = (X / 16).astype("float32")
shuffled = np.random.default_rng(0).permutation(len(X))
X, y_true = X[shuffled], y_true[shuffled]
X_pool, X_test, y_test = X[:600], X[600:], y_true[600:]
first_labels = {str(row): int(y_true[row]) for row in range(15)}

# %%
# The annotator
# -------------
#
# An annotator is a function of the image's row that returns a label, or raises
# ``KeyboardInterrupt`` for a break. ``ask_person`` shows the image as text and waits for the
# keyboard. ``look_up`` is for this page, which has no user. In a notebook you would show the image
# by matplotlib, and ``input`` makes a text field.


def show(image):
    shades = np.array(list(" .:*#"))
    for line in shades[(image.reshape(8, 8) * 4).round().astype(int)]:
        print("   ", "".join(np.repeat(line, 2)))


def ask_person(row):
    show(X_pool[row])
    while True:
        answer = input("Which digit is it? (q: stop) ").strip()
        if answer == "q":
            raise KeyboardInterrupt
        if answer.isdigit() and len(answer) == 1:
            return int(answer)
        print("A digit from 0 to 9, please.")


def look_up(row):
    return int(y_true[row])


annotator = ask_person if "--ask" in sys.argv else look_up
if annotator is look_up:
    show(X_pool[20])

# %%
# A record that is never half written
# -----------------------------------
#
# All that must not be lost is in one JSON file: the answers, and the queue of rows that the last
# query chose and that are not answered yet. It is text that anybody can read, and opening it runs
# no code, which a pickle might. A new version is written beside the old one and then takes its
# place, which the operating system does in one step: whenever the program is stopped, the file is
# either the old one or the new one.


class Record:
    def __init__(self, path, first_labels):
        self.path = Path(path)
        self.labels, self.queue = dict(first_labels), []
        if self.path.exists():
            saved = json.loads(self.path.read_text(encoding="utf-8"))
            self.labels, self.queue = saved["labels"], saved["queue"]

    def save(self):
        beside = self.path.with_suffix(".new")
        with beside.open("w", encoding="utf-8") as file:
            json.dump({"labels": self.labels, "queue": self.queue}, file)
            file.flush()
            os.fsync(file.fileno())  # On the disk before it takes the old one's place.
        os.replace(beside, self.path)


# %%
# The sitting
# -----------
#
# A sitting fits the network to the labels that there are, queries if nothing is left in the queue,
# and asks one image after the other. Nothing but the record is carried from one sitting to the
# next. With an int as ``random_state`` the fit and the query depend on the record alone, so that it
# makes no difference where a sitting ended.


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


net = NeuralNetClassifier(
    Network,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=40,
    batch_size=32,
    train_split=None,
    verbose=0,
)


def fit(record):
    rows = [int(row) for row in record.labels]
    sampler = FisherMaskSampler(net, batch_size=256, random_state=0)
    return sampler.fit(X_pool[rows], list(record.labels.values())), rows


def sitting(path, annotator, n_labels, n_instances=5):
    """Label until there are `n_labels`, or the annotator wants to stop."""
    record = Record(path, first_labels)
    try:
        while len(record.labels) < n_labels:
            if not record.queue:
                sampler, labelled = fit(record)
                left = np.setdiff1d(np.arange(len(X_pool)), labelled)
                indices, _ = sampler.query(
                    X_pool[left], n_instances=n_instances, X_labeled=X_pool[labelled]
                )
                record.queue = left[indices].tolist()
                record.save()
            row = record.queue[0]
            record.labels[str(row)] = annotator(row)
            record.queue = record.queue[1:]
            record.save()
    except KeyboardInterrupt:
        print(f"A break, with {len(record.labels)} labels. All is saved.")
    return record


folder = tempfile.TemporaryDirectory()
here = Path(folder.name if annotator is look_up else ".")
path = here / "digits.json"
record = sitting(path, annotator, n_labels=30)
sampler, _ = fit(record)
print(f"{len(record.labels)} labels, accuracy {sampler.score(X_test, y_test):.3f}")
print(path.read_text()[:120], "...")

# %%
# With ``--ask`` the record is ``digits.json`` in the current folder: stop by ``q``, start the
# script again, and it asks the next image of the batch.
#
# A break, and going on
# ---------------------
#
# Here is an annotator that gets tired: after a few answers it wants a break, in the midst of a
# batch. It is called again and again until 60 labels are there. Beside it one that works in one go.


def tires_after(n_answers):
    def answer(row):
        nonlocal n_answers
        if n_answers == 0:
            raise KeyboardInterrupt
        n_answers -= 1
        return look_up(row)

    return answer


def work(path, patience):
    n_sittings, record = 0, None
    while record is None or len(record.labels) < 60:
        record = sitting(path, tires_after(patience), n_labels=60)
        n_sittings += 1
    return record, n_sittings


in_one_go, _ = work(Path(folder.name) / "one_go.json", patience=1000)
with_breaks, n_sittings = work(Path(folder.name) / "breaks.json", patience=13)
print(f"{n_sittings} sittings")
same_answers = list(in_one_go.labels.items()) == list(with_breaks.labels.items())
print("same answers, in the same order:", same_answers)

one, other = fit(in_one_go)[0], fit(with_breaks)[0]
print("same network:", np.array_equal(one.predict_proba(X_test), other.predict_proba(X_test)))

# %%
# All three breaks fell within a batch; the queue in the record made up for it. A process that is
# killed loses at most the answer that was being typed.
#
# What was asked
# --------------
#
# All sixty images, in the order in which they were labelled.

rows = [int(row) for row in with_breaks.labels]
figure, axes = plt.subplots(5, 12, figsize=(9.5, 4.8), layout="constrained")
for number, (ax, row) in enumerate(zip(axes.flat, rows, strict=True)):
    asked = number >= len(first_labels)
    ax.imshow(X_pool[row].reshape(8, 8), cmap="gray_r")
    ax.set_title(with_breaks.labels[str(row)], fontsize=9, color="#0072b2" if asked else "0.5")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_color("#0072b2" if asked else "0.8")
figure.suptitle("Fifteen labels to start from (grey), and 45 answers (blue) in the order given")
plt.show()
print(f"{len(rows)} labels, accuracy {one.score(X_test, y_test):.3f}")

# %%
# By chance there is no 3, no 7 and no 8 among the first fifteen, and five of them are a 6. The
# first eight questions bring a 3, a 7 and an 8, and of the 45 images asked for only two are a 6.
#
# Handing a batch to a labelling tool
# -----------------------------------
#
# Where several people label, they use a tool, and a batch travels as a file.
# :func:`~skfishermask.query_table` lists the images of a batch, the first choice first, with their
# gain, what the network takes them for, and how unsure it is. The column ``row`` is what brings an
# answer back to its image. Where images are files, their names take its place, because rows shift
# when a file is added: :doc:`/auto_examples/plot_images_on_disk`.

rows_labelled = [int(row) for row in with_breaks.labels]
left = np.setdiff1d(np.arange(len(X_pool)), rows_labelled)
chosen, _, gains = one.query(
    X_pool[left], n_instances=10, X_labeled=X_pool[rows_labelled], return_metrics=True
)
table = query_table(one, X_pool[left], chosen, gains)
table["row"] = batch_rows = left[chosen]
for column, values in table.items():
    print(f"{column:<12}", *(f"{value:6.3g}" for value in values))

# %%
# Here are these images as tasks for `Label Studio <https://labelstud.io>`_. It shows them in the
# order of the file, sorts them by rank, gain or uncertainty if asked to, and knows the predictions
# and their probability as its score. A file in a bucket would be named by its address; these small
# images travel within the tasks.


def as_address(row):
    image, file = X_pool[row].reshape(8, 8), io.BytesIO()
    plt.imsave(file, np.kron(image, np.ones((16, 16))), cmap="gray_r", format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


addresses = [as_address(row) for row in batch_rows]
tasks = label_studio_tasks(table, addresses, from_name="digit", model_version="sixty labels")
tasks_file = Path(folder.name) / "tasks.json"
tasks_file.write_text(json.dumps(tasks, indent=1), encoding="utf-8")
print({key: str(value)[:40] for key, value in tasks[0]["data"].items()})

# %%
# In a project of Label Studio, *Import* takes this file. Its labelling interface shows the image
# and ten choices::
#
#     <View>
#       <Image name="image" value="$image"/>
#       <Choices name="digit" toName="image">
#         <Choice value="0"/> <Choice value="1"/> <!-- and so on -->
#       </Choices>
#     </View>
#
# *Export* as JSON gives the tasks back, with the annotations that people made. Of a task that
# the annotator skipped the task is ``was_cancelled``: it stays in the pool.


def read_label_studio(path):
    answers = {}
    for task in json.loads(path.read_text(encoding="utf-8")):
        for annotation in task["annotations"]:
            if not annotation["was_cancelled"] and annotation["result"]:
                answers[task["data"]["row"]] = int(annotation["result"][0]["value"]["choices"][0])
    return answers


# %%
# This page has no Label Studio, so here is what it would export, with the third image skipped.

exported = [
    {
        "data": task["data"],
        "annotations": [
            {
                "was_cancelled": task["data"]["rank"] == 3,
                "result": [
                    {
                        "from_name": "digit",
                        "to_name": "image",
                        "type": "choices",
                        "value": {"choices": [str(look_up(task["data"]["row"]))]},
                    }
                ],
            }
        ],
    }
    for task in tasks
]
export_file = Path(folder.name) / "export.json"
export_file.write_text(json.dumps(exported), encoding="utf-8")
from_tool = read_label_studio(export_file)
print(f"{len(from_tool)} answers to {len(tasks)} tasks")

# %%
# Other tools take the table as it is. CVAT knows no score of an image: give it the files in the
# order of the table, and "predefined" as its sorting method. FiftyOne keeps the columns as fields
# of a sample, the prediction as a ``Classification`` with one minus the uncertainty as its
# confidence, and ``sort_by("rank")`` shows them in order.
#
# A spreadsheet has a line for each image, and an empty column for labels. Lines without a label are
# left out when it is read back. The column has the name of the choices above, so that
# ``read_table`` also reads what Label Studio exports as CSV.


def write_table(path, labels):
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow(["rank", "row", "gain", "digit"])
        for rank, (row, gain) in enumerate(zip(batch_rows, gains, strict=True), start=1):
            lines.writerow([rank, row, f"{gain:.4g}", labels.get(int(row), "")])


def read_table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return {
            int(line["row"]): int(line["digit"]) for line in csv.DictReader(file) if line["digit"]
        }


table_file = Path(folder.name) / "batch.csv"
write_table(table_file, labels={})
print(table_file.read_text().splitlines()[:3])
write_table(table_file, labels=from_tool)  # In practice, a person fills the table in.
from_table = read_table(table_file)
print("the same answers from both:", from_table == from_tool)

# %%
# This was checked with Label Studio 1.23.2: the file of tasks was uploaded to a project with that
# interface, which showed the ten in the order of their rank, with their predictions, and sorted
# them by rank, uncertainty and score. Through the API eight were labelled, one was skipped and one
# left alone. Of what it exported as JSON and as CSV, ``read_label_studio`` and ``read_table`` gave
# just those eight answers.
#
# The answers join the labels, and the next round begins.

with_breaks.labels |= {str(row): label for row, label in from_tool.items()}
two = fit(with_breaks)[0]
print(f"{len(with_breaks.labels)} labels, accuracy {two.score(X_test, y_test):.3f}")

# %%
# To ask in your own way, on a web page for instance, replace ``look_up`` and keep the rest.
