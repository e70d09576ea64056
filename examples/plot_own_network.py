"""
Your own network
================

FisherMask reads any PyTorch classifier: recurrent or convolutional, for text or tables, with one
input or several, with logits or probabilities at the end. This example asks three networks that are
not the usual stack of layers, and shows how to see what is fast and what is slower.
"""

# %%
# Text: an embedding, a recurrent layer, and a tuple
# --------------------------------------------------
#
# Which part of scikit-learn does a sentence of its manual come from? The sentences are cut from the
# docstrings of four modules; those that occur in more than one are left out.

import importlib
import inspect
import re
from collections import Counter

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import scale
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler, ParameterMask, fisher_diagonal, fisher_embedding


def sentences_of(name):
    module = importlib.import_module(f"sklearn.{name}")
    for public in sorted(module.__all__):
        text = (inspect.getdoc(getattr(module, public)) or "").split("\nExamples\n")[0]
        for sentence in re.findall(r"[A-Z][a-z]*[\sa-z,-]*\.(?=\s|$)", text):
            if 6 <= len(sentence.split()) <= 25:
                yield " ".join(sentence.split())


topics = ["cluster", "ensemble", "linear_model", "metrics"]
found = {topic: set(sentences_of(topic)) for topic in topics}
times_found = Counter(sentence for sentences in found.values() for sentence in sentences)
texts, labels = [], []
for topic, sentences in found.items():
    own = sorted(sentence for sentence in sentences if times_found[sentence] == 1)
    own = [own[i] for i in np.random.default_rng(0).permutation(len(own))[:160]]
    texts += own
    labels += [topic] * len(own)
for i in range(0, len(texts), 160):
    print(f"{labels[i]:>12}: {texts[i]}")

# %%
# A network wants numbers: a sentence becomes the positions of its words among the 600 most frequent
# ones, with zeros in front so that all have the same length. Such tokens stay integers in a query;
# they are not cast to floating point.

words = [re.findall(r"[a-z]{2,}", text.lower()) for text in texts]
frequent = Counter(word for text in words for word in text).most_common(600)
number = {word: i for i, (word, _) in enumerate(frequent, start=1)}
tokens = np.zeros((len(words), 12), dtype="int64")
for row, text in zip(tokens, words, strict=True):
    known = [number[word] for word in text if word in number][:12]
    row[12 - len(known) :] = known
X_pool, X_test, y_pool, y_test, texts_pool, _ = train_test_split(
    tokens, np.array(labels), texts, test_size=240, stratify=labels, random_state=0
)

# %%
# The network is an :class:`~torch.nn.Embedding`, a :class:`~torch.nn.GRU`, with states that are
# weighted by attention, and a linear layer. Its output is a tuple: logits, and the weights of the
# words. When it predicts, skorch takes the first element of a tuple, and so does FisherMask. For
# the loss, skorch wants to be told: by ``get_loss``.


class Reader(nn.Module):
    def __init__(self, n_words=601, n_hidden=24, n_classes=4):
        super().__init__()
        self.embedding = nn.Embedding(n_words, n_hidden, padding_idx=0)
        self.gru = nn.GRU(n_hidden, n_hidden, batch_first=True)
        self.attention = nn.Linear(n_hidden, 1)
        self.output = nn.Linear(n_hidden, n_classes)

    def forward(self, tokens):
        states, _ = self.gru(self.embedding(tokens))
        score = self.attention(states).squeeze(2).masked_fill(tokens == 0, -1e4)
        weights = score.softmax(dim=1)
        return self.output((weights[:, :, None] * states).sum(dim=1)), weights


class TupleNet(NeuralNetClassifier):
    def get_loss(self, y_pred, *args, **kwargs):
        return super().get_loss(y_pred[0], *args, **kwargs)


training = {
    "optimizer": torch.optim.Adam,
    "lr": 0.01,
    "max_epochs": 20,
    "batch_size": 32,
    "train_split": None,
    "verbose": 0,
}
reader_net = TupleNet(Reader, criterion=nn.CrossEntropyLoss, **training)

n_first = 150
X_first, X_left = X_pool[:n_first], X_pool[n_first:]
texts_left = texts_pool[n_first:]
fishermask = FisherMaskSampler(reader_net, batch_size=150, n_mask_samples=100, random_state=0)
fishermask.fit(X_first, y_pool[:n_first])
print(f"accuracy with {n_first} labels: {fishermask.score(X_test, y_test):.2f}")
indices, instances = fishermask.query(X_left, n_instances=8, X_labeled=X_first)

# %%
# These are the sentences it asks for, as far as the network knows their words. The shade is the
# weight that a word has in the sentence, the second element of the tuple.

module = fishermask.estimator_.module_
with torch.no_grad():
    logits, weights = module(torch.as_tensor(instances))
topic_of = fishermask.classes_[logits.argmax(dim=1)]
word_of = {i: word for word, i in number.items()}

figure, ax = plt.subplots(figsize=(9.5, 3.2), layout="constrained")
ax.imshow(weights, cmap="Blues", vmin=0, vmax=0.6, aspect="auto")
for (row, column), token in np.ndenumerate(instances):
    if token:
        dark = weights[row, column] > 0.35
        word = word_of[token]
        ax.text(
            column,
            row,
            word,
            ha="center",
            va="center",
            color="white" if dark else "black",
            fontsize=9 if len(word) < 10 else 7,
        )
truth = y_pool[n_first:][indices]
ax.set_yticks(range(8), [f"{t} ({p}?)" for t, p in zip(truth, topic_of, strict=True)])
ax.set_xticks([])
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
ax.set_title("Sentences asked for: their topic, and what the network takes it for")
plt.show()

# %%
# What is fast, and what is slower
# --------------------------------
#
# FisherMask looks at the operations that the network ran, not at the types of its layers. The steps
# of a recurrent layer are matrix products, as a linear layer is one, so the gradients of a whole
# batch are read at once, and only at the masked parameters.

for name, index in fishermask.mask_.indices.items():
    print(f"{name:<18} {len(index):>3} parameters in the mask")

# %%
# Half of the mask lies in the recurrent layer, none of it in the embedding, which has four fifths
# of the parameters: each word occurs in few sentences. Here are the seconds of this query, and of
# one with the output layer alone as its mask, which needs no gradients of the recurrent layer.

fast = FisherMaskSampler(mask="output_layer", batch_size=150)
fast(fishermask, X_left, n_instances=8, X_labeled=X_first)
for name, sampler in {"global": fishermask, "output_layer": fast}.items():
    seconds = sampler.query_info_["seconds"]
    print(f"{name:<13}", {step: round(seconds[step], 3) for step in ("embedding", "total")})

# %%
# With a large pool two things save time: ``mask="output_layer"``, which is BAIT, and
# ``max_candidates``.
#
# A table, a layer of your own, and probabilities
# -----------------------------------------------
#
# A radial-basis network: the first layer measures how near a sample is to each of ten centres,
# which are learned. No line of FisherMask knows such a layer, and none is needed: the centres meet
# the samples in a subtraction, which is an operation like any other. The widths go through an
# exponential first; for that there is no rule, so they are read sample by sample, just as exactly,
# and a warning says what is slow. The module ends in a softmax, as skorch's default loss,
# :class:`~torch.nn.NLLLoss`, expects. Two of the columns of the breast cancer data make a table
# that can be drawn.


class RadialBasis(nn.Module):
    def __init__(self, n_features, n_centres):
        super().__init__()
        self.centres = nn.Parameter(torch.randn(n_centres, n_features))
        self.log_width = nn.Parameter(torch.zeros(n_centres))

    def forward(self, X):
        distance = (X[:, None, :] - self.centres).square().sum(dim=2)
        return torch.exp(-distance * self.log_width.exp() / 2)


class RadialBasisNetwork(nn.Sequential):
    def __init__(self, n_centres=10):
        super().__init__(RadialBasis(2, n_centres), nn.Linear(n_centres, 2), nn.Softmax(dim=1))


# sphinx_gallery_thumbnail_number = 2
cancer = load_breast_cancer()
columns = ["worst radius", "worst smoothness"]
X = cancer.data[:, [list(cancer.feature_names).index(name) for name in columns]]
X = scale(X).astype("float32")
y = cancer.target_names[cancer.target]
start = np.random.default_rng(1).choice(len(X), 20, replace=False)
rest = np.delete(np.arange(len(X)), start)

radial = NeuralNetClassifier(RadialBasisNetwork, **training | {"lr": 0.05, "max_epochs": 60})
radial_mask = FisherMaskSampler(radial, batch_size=256, random_state=0).fit(X[start], y[start])
indices, instances = radial_mask.query(X[rest], n_instances=6, X_labeled=X[start])

side = np.linspace(-3, 5, 161, dtype="float32")
grid = np.stack(np.meshgrid(side, side), axis=-1)
malignant = radial_mask.predict_proba(grid.reshape(-1, 2))[:, 1].reshape(161, 161)

figure, ax = plt.subplots(figsize=(7, 5), layout="constrained")
surface = ax.contourf(side, side, malignant, np.linspace(0, 1, 11), cmap="PuOr_r", alpha=0.6)
ax.contour(side, side, malignant, [0.5], colors="0.3", linewidths=1)
ax.scatter(*X[rest].T, s=5, color="0.25", lw=0, label="pool")
for kind, marker in {"malignant": "^", "benign": "o"}.items():
    ax.scatter(
        *X[start][y[start] == kind].T, s=45, marker=marker, color="black", label=f"labelled, {kind}"
    )
for number, (x1, x2) in enumerate(instances, start=1):
    ax.scatter(x1, x2, s=120, color="white", edgecolor="black", zorder=3)
    ax.annotate(str(number), (x1, x2), size=8, weight="bold", ha="center", va="center", zorder=4)
ax.scatter([], [], s=90, color="white", edgecolor="black", label="asked for, in order")
ax.set(xlabel=f"{columns[0]} (scaled)", ylabel=f"{columns[1]} (scaled)", xlim=(-3, 5), ylim=(-3, 5))
ax.legend(fontsize=9, loc="upper left", framealpha=1)
figure.colorbar(surface, label="predicted probability: malignant")
plt.show()

# %%
# All six lie where the network is undecided, and they are spread along the border.
#
# Is it right for a layer of one's own? The Fisher information of one sample, from its
# definition and by plain autograd, is what the embedding gives:

radial_module = radial_mask.estimator_.module_
x = torch.as_tensor(X[:1])
p = radial_module(x)[0]
parameters = list(radial_module.parameters())
scores = [torch.autograd.grad(p_c.log(), parameters, retain_graph=True) for p_c in p]
g = torch.stack([torch.cat([part.flatten() for part in score]) for score in scores])
by_definition = (g.T * p.detach()) @ g

whole_mask = ParameterMask.from_diagonal(
    fisher_diagonal(radial_module, [x], to_logits=torch.log), "all", 1.0, output_layer=[]
)
V = fisher_embedding(radial_module, [x], whole_mask, to_logits=torch.log)[0]
print(f"largest entry      {by_definition.abs().max():.1e}")
print(f"largest difference {(V.T @ V - by_definition).abs().max():.1e}")

# %%
# Probabilities or logits
# -----------------------
#
# Whether a module gives probabilities or logits is read off the net: its criterion, or its
# ``predict_nonlinearity``. The same network with and without a softmax at its end chooses the same.

logits_module = nn.Sequential(*list(radial_module)[:-1])
with_logits = NeuralNetClassifier(logits_module, criterion=nn.CrossEntropyLoss).initialize()
with_softmax = NeuralNetClassifier(radial_module, criterion=nn.NLLLoss).initialize()
strategy = FisherMaskSampler(batch_size=256, random_state=0)
for name, net in {"logits": with_logits, "probabilities": with_softmax}.items():
    print(f"{name:<14}", strategy(net, X[rest], n_instances=8)[0])

# %%
# Several inputs
# --------------
#
# A network with several inputs takes a dict of arrays: its keys are the arguments of ``forward``.
# The instances that come back are a dict as well.


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.means = nn.Linear(10, 8)
        self.worst = nn.Linear(10, 8)
        self.output = nn.Linear(16, 2)

    def forward(self, mean_values, worst_values):
        h = torch.cat([self.means(mean_values), self.worst(worst_values)], dim=1)
        return self.output(torch.relu(h))


values = scale(cancer.data).astype("float32")
inputs = {"mean_values": values[:, :10], "worst_values": values[:, 20:]}


def rows(i):
    return {name: part[i] for name, part in inputs.items()}


two = FisherMaskSampler(
    NeuralNetClassifier(TwoInputs, criterion=nn.CrossEntropyLoss, **training), random_state=0
)
two.fit(rows(start), y[start])
indices, instances = two.query(rows(rest), n_instances=5, X_labeled=rows(start))
print("accuracy on the others:", round(two.score(rows(rest), y[rest]), 3))
print({name: part.shape for name, part in instances.items()})
