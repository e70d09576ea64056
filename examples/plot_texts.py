"""
Texts
=====

Which of these messages should be sorted by hand next? First with word counts, in a scikit-learn
pipeline from strings to a network; then with a small Transformer that takes tokens and an attention
mask and gives an output with ``logits``, as models of Hugging Face do; then with that network
as a plain module, as Hugging Face's ``Trainer`` leaves one; and with low-rank adapters (LoRA).
"""

# %%
# Messages
# --------
#
# Six hundred messages to a shop, made up from parts. The labels are words.

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import (
    FisherMaskSampler,
    ParameterMask,
    fisher_diagonal,
    fisher_embedding,
    select_batch,
)
from skfishermask.fisher import fisher_matrix

parts = {
    "delivery": "has not arrived,came to the wrong address,is a week late,was left outside",
    "payment": "was charged twice,is not on my bill,costs more than shown,was not refunded",
    "quality": "broke at once,has a scratch,does not fit,smells of paint",
    "praise": "is lovely,does not disappoint,came a week early,costs less than I thought",
}
things = ["lamp", "chair", "kettle", "blanket", "bicycle", "desk", "rug", "radio", "mirror"]
openings = ["Hello,", "Dear all,", "Once more:", "Sorry, but", "Good morning,", "Please note:"]
endings = ["", "Thank you.", "What now?", "I am still waiting.", "My sister says so too."]
rng = np.random.default_rng(0)
texts, labels = [], []
for label in rng.choice(list(parts), 600, p=[0.4, 0.3, 0.2, 0.1]):
    words = (rng.choice(openings), "the", rng.choice(things), rng.choice(parts[label].split(",")))
    texts.append(f"{' '.join(words)}. {rng.choice(endings)}".strip())
    labels.append(str(label))
X_pool, X_test = texts[:400], texts[400:]
y_pool, y_test = labels[:400], labels[400:]
for text, label in zip(texts[:3], labels, strict=False):
    print(f"{label:>9}: {text}")

# %%
# From strings to a network
# -------------------------
#
# The pipeline makes numbers of the strings: a sparse matrix of weighted word counts, made dense,
# because networks take nothing else. The sampler wraps the whole pipeline. So it takes strings, and
# gives strings back. Nothing is labelled yet, so its first batch covers the messages, by their
# weighted word counts.


def dense(counts):
    return counts.toarray().astype("float32")


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LazyLinear(24), nn.ReLU(), nn.Linear(24, 4))


training = {
    "criterion": nn.CrossEntropyLoss,
    "optimizer": torch.optim.Adam,
    "lr": 0.01,
    "batch_size": 20,
    "train_split": None,
    "verbose": 0,
}
pipeline = make_pipeline(
    TfidfVectorizer(),
    FunctionTransformer(dense, accept_sparse=True),
    NeuralNetClassifier(Network, max_epochs=30, **training),
)
by_words = FisherMaskSampler(pipeline, batch_size=200, random_state=0)
rows, X_first = by_words.query(X_pool, n_instances=12)
y_first = [y_pool[row] for row in rows]  # In practice, a person reads them.
X_pool = [text for row, text in enumerate(X_pool) if row not in rows]
y_pool = [label for row, label in enumerate(y_pool) if row not in rows]

# %%
# With these labels the pipeline is fitted, and the network chooses the next ones.

by_words.fit(X_first, y_first)
accuracy_before = by_words.score(X_test, y_test)
indices, chosen = by_words.query(X_pool, n_instances=20, X_labeled=X_first)
for text in chosen[:4]:
    print(text)

# %%
# The answers are added, and the pipeline is fitted again, vocabulary included.

answers = [y_pool[i] for i in indices]
by_words.fit(X_first + chosen, y_first + answers)
accuracy_after = by_words.score(X_test, y_test)
print(f"accuracy with 12 labels {accuracy_before:.2f}, with 32 {accuracy_after:.2f}")

# %%
# Tokens, an attention mask and ``logits``
# ----------------------------------------
#
# A tokenizer turns a text into numbers of words and a mask that says where words are. As a
# transformer in the pipeline it gives a dict: its keys are the arguments of the module's
# ``forward``.


class Tokenizer(TransformerMixin, BaseEstimator):
    def fit(self, X, y=None):
        self.words_ = sorted({word for text in X for word in text.lower().split()})
        return self

    def transform(self, X):
        number = {word: i for i, word in enumerate(self.words_, start=2)}
        tokens = np.zeros((len(X), 16), dtype="int64")
        for row, text in zip(tokens, X, strict=True):
            known = [number.get(word, 1) for word in text.lower().split()][:16]
            row[: len(known)] = known
        return {"input_ids": tokens, "attention_mask": (tokens > 0).astype("int64")}


class SmallTransformer(nn.Module):
    def __init__(self, n_words=200, width=24, n_classes=4):
        super().__init__()
        self.words = nn.Embedding(n_words, width)
        self.positions = nn.Parameter(0.1 * torch.randn(16, width))
        self.encoder = nn.TransformerEncoderLayer(width, 4, 48, dropout=0.0, batch_first=True)
        self.classifier = nn.Linear(width, n_classes)

    def forward(self, input_ids, attention_mask):
        h = self.words(input_ids) + self.positions
        h = self.encoder(h, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[:, :, None]
        return SimpleNamespace(logits=self.classifier((mask * h).sum(1) / mask.sum(1)))


# %%
# A query takes an output's ``logits`` by itself. skorch, which trains and predicts, wants to be
# told, by one line in ``infer``.


class LogitsNet(NeuralNetClassifier):
    def infer(self, x, **more):
        return super().infer(x, **more).logits


by_tokens = FisherMaskSampler(
    make_pipeline(Tokenizer(), LogitsNet(SmallTransformer, max_epochs=30, **training)),
    batch_size=200,
    random_state=0,
)
by_tokens.fit(X_first, y_first)
indices, chosen = by_tokens.query(X_pool, n_instances=20, X_labeled=X_first)
for text, guess in zip(chosen[:4], by_tokens.predict(chosen), strict=False):
    print(f"{guess + '?':>10} {text}")

# %%
# With the package ``transformers`` the module is theirs, fine-tuned in the same net: pretrained, by
# ``BertForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=4)``, or, for a
# quick try without a download, from a configuration alone::
#
#     from transformers import BertConfig, BertForSequenceClassification
#
#     config = BertConfig(
#         vocab_size=200, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
#         intermediate_size=48, num_labels=4,
#     )
#     net = LogitsNet(BertForSequenceClassification(config), max_epochs=30, **training)
#
# and the tokenizer is theirs too: ``dict(tokenizer(list(X), padding="max_length", truncation=True,
# max_length=16, return_tensors="np"))`` in ``transform``. ``batch_size`` of the sampler is what
# bounds the memory.
#
# A model that ``Trainer`` trained
# --------------------------------
#
# A module that was trained without skorch is read by functions: the diagonal Fisher information, a
# mask of the parameters where it is largest, the embeddings at the mask, and the choice. Here it is
# the network from above; with Hugging Face, write ``trainer.model``.

module = by_tokens.estimator_[-1].module_
tokenizer = by_tokens.estimator_[0]


def batches(texts):
    for start in range(0, len(texts), 100):
        tokens = tokenizer.transform(texts[start : start + 100])
        yield {name: torch.as_tensor(values) for name, values in tokens.items()}


diagonal = fisher_diagonal(module, batches(X_pool))
output = ["classifier.weight", "classifier.bias"]
mask = ParameterMask.from_diagonal(diagonal, "global", 200, output_layer=output)
pool, labelled = (fisher_embedding(module, batches(texts), mask) for texts in (X_pool, X_first))
positions, gains = select_batch(
    pool,
    20,
    fisher_matrix(torch.cat([pool, labelled])),
    fisher_labeled=fisher_matrix(labelled),
    n_labeled=len(labelled),
)
for position in positions[:4]:
    print(X_pool[position])

# %%
# Adapters on frozen weights
# --------------------------
#
# LoRA leaves a trained layer as it is and learns a product of two thin matrices beside it. Here the
# network that was just trained gets adapters in its classifier and in one layer of its encoder;
# everything else is frozen.


class Adapted(nn.Module):
    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(0.1 * torch.randn(rank, layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.down.T @ self.up.T


torch.manual_seed(0)
module.requires_grad_(False)
module.classifier = Adapted(module.classifier)
module.encoder.linear1 = Adapted(module.encoder.linear1)
adapted_net = LogitsNet(module, max_epochs=20, **training)
answers = [y_pool[i] for i in indices]
classes, codes = np.unique(y_first + answers, return_inverse=True)
adapted_net.fit(tokenizer.transform(X_first + chosen), codes)

# %%
# A query reads the trained net. Frozen weights are left out of its mask. The size of the mask is
# given, because ``"auto"`` goes by the output layer, which is spread over three tensors here.

fishermask = FisherMaskSampler(mask_fraction=100, batch_size=200, random_state=0)
rows, _ = fishermask(adapted_net, tokenizer.transform(X_pool), n_instances=10)
in_mask = {name: len(entries) for name, entries in fishermask.mask_.indices.items()}
print("entries in the mask:", in_mask)
trained = [n for n, p in adapted_net.module_.named_parameters() if p.requires_grad]
print("trained:", trained)

figure, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
bars = ax.barh(list(in_mask), list(in_mask.values()), color="#0072b2")
ax.bar_label(bars, padding=3, fontsize=9)
ax.invert_yaxis()
ax.set(xlabel="parameters in the mask of adapters")
ax.spines[["top", "right"]].set_visible(False)
plt.show()
