"""
Labelling with a person
=======================

The other examples look labels up. Here a person is asked: the program shows an image, the person
types what it is, and the answer is saved before the next image is shown. The work can be stopped at
any moment, and goes on where it was. Then a batch goes to a labelling tool and back.

Download this script and run it with ``--ask``, and it asks you. On this page a function answers in
your place. It needs matplotlib (``pip install ".[plot]"``).
"""

import base64
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from skfishermask import FisherMaskSampler, label_studio_tasks, query_table

X, y_true = load_digits(return_X_y=True)
X_pool, X_test, y_test = X[:1200], X[1200:], y_true[1200:]

# %%
# The annotator
# -------------
#
# An annotator is a function of the image's row that returns a label, or raises
# ``KeyboardInterrupt`` for a break. ``ask_person`` shows the image as text and waits for the
# keyboard; ``look_up`` is for this page, which has no user. To ask on a web page, or in a notebook,
# write one of your own.


def show(image):
    shades = np.array(list(" .:*#"))
    for line in shades[(image.reshape(8, 8) / 4).round().astype(int)]:
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
# All that must not be lost is in one JSON file: the answers, and the rows that the last query chose
# and that are not answered yet. A new version is written beside the old one and then takes its
# place, which the operating system does in one step: whenever the program is stopped, the file is
# either the old one or the new one.


class Record:
    def __init__(self, path):
        self.path, self.labels, self.queue = Path(path), {}, []
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

    def fit(self):
        rows = [int(row) for row in self.labels]
        sampler = FisherMaskSampler(LogisticRegression(max_iter=2000), random_state=0)
        if rows:  # Before there are labels, a query covers the images.
            sampler.fit(X_pool[rows], list(self.labels.values()))
        return sampler, rows, np.setdiff1d(np.arange(len(X_pool)), rows)


# %%
# The sitting
# -----------
#
# A sitting fits the network to the labels that there are, queries if nothing is left in the queue,
# and asks one image after the other. Nothing but the record is carried from one sitting to the
# next. With an int as ``random_state`` the fit and the query depend on the record alone, so that it
# makes no difference where a sitting ended.


def sitting(path, annotator, n_labels, n_instances=20):
    """Label until there are `n_labels`, or the annotator wants to stop."""
    record = Record(path)
    try:
        while len(record.labels) < n_labels:
            if not record.queue:
                sampler, labelled, left = record.fit()
                indices, _ = sampler.query(X_pool[left], n_instances, X_labeled=X_pool[labelled])
                record.queue = left[indices].tolist()
                record.save()
            row = record.queue[0]
            record.labels[str(row)] = annotator(row)
            record.queue = record.queue[1:]
            record.save()
    except KeyboardInterrupt:
        print(f"A break, with {len(record.labels)} labels. All is saved.")
    return record


# %%
# Here is an annotator that gets tired: after 25 answers it wants a break, in the midst of a batch,
# and another sitting goes on. With ``--ask`` the record is ``digits.json`` in the current folder.


def tires_after(n_answers):
    answers = iter(range(n_answers))

    def answer(row):
        if next(answers, None) is None:
            raise KeyboardInterrupt
        return annotator(row)

    return answer


temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)
path = (folder if annotator is look_up else Path()) / "digits.json"
n_answers = 25 if annotator is look_up else 1000
for _ in range(3):
    record = sitting(path, tires_after(n_answers), n_labels=60)
sampler, labelled, left = record.fit()
print(f"{len(labelled)} labels, accuracy {sampler.score(X_test, y_test):.3f}")

# %%
# All sixty images, in the order in which they were asked for.

figure, axes = plt.subplots(5, 12, figsize=(9.5, 4.8), layout="constrained")
for ax, (row, label) in zip(axes.flat, record.labels.items(), strict=True):
    ax.imshow(X_pool[int(row)].reshape(8, 8), cmap="gray_r")
    ax.set_title(label, fontsize=9)
    ax.set_axis_off()
plt.show()

# %%
# To a labelling tool and back
# ----------------------------
#
# Where several people label, they use a tool, and a batch travels as a file.
# :func:`~skfishermask.query_table` lists the images of a batch, the first choice first, with their
# gain, what the network takes them for, and how unsure it is. The column ``row`` is what brings an
# answer back to its image; where images are files, their names take its place
# (:doc:`/auto_examples/plot_images_on_disk`).

chosen, _, gains = sampler.query(
    X_pool[left], n_instances=10, X_labeled=X_pool[labelled], return_metrics=True
)
table = query_table(sampler, X_pool[left], chosen, gains)
table["row"] = left[chosen]
for column, values in table.items():
    print(f"{column:<12}", *(f"{value:7.4g}" for value in values))

# %%
# Here they are as tasks for `Label Studio <https://labelstud.io>`_. It shows them in the order of
# the file, sorts them by rank, gain or uncertainty if asked to, and knows the predictions. A file
# in a bucket would be named by its address; these small images travel within the tasks.


def as_address(row):
    image, file = X_pool[row].reshape(8, 8), io.BytesIO()
    plt.imsave(file, np.kron(image, np.ones((16, 16))), cmap="gray_r", format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


addresses = [as_address(row) for row in table["row"]]
tasks = label_studio_tasks(table, addresses, from_name="digit", model_version="sixty labels")
(folder / "tasks.json").write_text(json.dumps(tasks), encoding="utf-8")

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
# This page has no Label Studio, so here is what it would export, with the third image skipped. The
# answers join the labels, and the next round begins.

exported = []
for task in tasks:
    choices = {"choices": [str(look_up(task["data"]["row"]))]}
    annotation = {"was_cancelled": task["data"]["rank"] == 3, "result": [{"value": choices}]}
    exported.append({"data": task["data"], "annotations": [annotation]})
(folder / "export.json").write_text(json.dumps(exported), encoding="utf-8")
answers = read_label_studio(folder / "export.json")
record.labels |= {str(row): label for row, label in answers.items()}
print(f"{len(record.labels)} labels, accuracy {record.fit()[0].score(X_test, y_test):.3f}")
temporary.cleanup()

# %%
# This file was imported into Label Studio 1.23.2. A project with that interface showed the ten in
# the order of their rank, with their predictions, handed them out in that order, and sorted them by
# rank, gain, uncertainty and score. Eight were labelled, one was skipped; of what it exported
# ``read_label_studio`` gave those eight.
#
# Other tools take the table as it is. CVAT knows no score of an image: give it the files in the
# order of the table, and "predefined" as its sorting method. FiftyOne keeps the columns as fields
# of a sample, the prediction as a ``Classification`` with one minus the uncertainty as its
# confidence, and ``sort_by("rank")`` shows them in order.
