"""
Texts
=====

Which of these messages should be sorted by hand next? First with word counts, in a scikit-learn
pipeline from strings to a network; then with a model of Hugging Face, trained in a skorch net; with
one that Hugging Face's ``Trainer`` trained; and with low-rank adapters (LoRA).

It needs ``pip install transformers accelerate``, and matplotlib (``pip install ".[plot]"``).
"""

# %%
# Messages
# --------
#
# Six hundred messages to a shop, made up from parts. The labels are words.

import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

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
    "max_epochs": 30,
    "batch_size": 20,
    "train_split": None,
    "verbose": 0,
}
pipeline = make_pipeline(
    TfidfVectorizer(),
    FunctionTransformer(dense, accept_sparse=True),
    NeuralNetClassifier(Network, lr=0.01, **training),
)
by_words = FisherMaskSampler(pipeline, batch_size=200, random_state=0)
X_labeled, y_labeled = [], []


def ask(indices):
    for i in sorted(indices, reverse=True):  # In practice, a person reads them.
        X_labeled.append(X_pool.pop(i))
        y_labeled.append(y_pool.pop(i))


indices, _ = by_words.query(X_pool, n_instances=12)
ask(indices)

# %%
# With these labels the pipeline is fitted, and the network chooses the next ones. The answers are
# added, and the pipeline is fitted again, vocabulary included.

by_words.fit(X_labeled, y_labeled)
words_before = by_words.score(X_test, y_test)
indices, chosen = by_words.query(X_pool, n_instances=20, X_labeled=X_labeled)
for text in chosen[:4]:
    print(text)
ask(indices)
words_after = by_words.fit(X_labeled, y_labeled).score(X_test, y_test)
print(f"accuracy with 12 labels {words_before:.2f}, with 32 {words_after:.2f}")

# %%
# A model of Hugging Face
# -----------------------
#
# Usually it is pretrained, and comes with its tokenizer::
#
#     tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
#     model = AutoModelForSequenceClassification.from_pretrained("bert-base-uncased", num_labels=4)
#
# and wants small steps, such as ``lr=5e-5``. This page is made without network, so here is a small
# model with random weights, and a tokenizer that learns its words from the pool.

words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
words.train_from_iterator(X_pool, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
config = BertConfig(
    vocab_size=len(tokenizer),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=20,
    num_labels=4,
)
torch.manual_seed(0)
model = BertForSequenceClassification(config)

# %%
# In the pipeline the tokenizer gives a dict: its keys are the arguments of the model's ``forward``.
# A query takes an output's ``logits`` by itself. skorch, which trains and predicts, wants to be
# told, by one line in ``infer``.


def tokens(texts):
    options = {"padding": "max_length", "truncation": True, "max_length": 20}
    return dict(tokenizer(list(texts), return_tensors="np", **options))


class LogitsNet(NeuralNetClassifier):
    def infer(self, x, **more):
        return super().infer(x, **more).logits


by_tokens = FisherMaskSampler(
    make_pipeline(FunctionTransformer(tokens), LogitsNet(model, lr=0.005, **training)),
    batch_size=200,  # It bounds the memory of a query.
    random_state=0,
)
tokens_scores = []
for n_labels in (12, 32):
    by_tokens.fit(X_labeled[:n_labels], y_labeled[:n_labels])
    tokens_scores.append(by_tokens.score(X_test, y_test))
    print(f"accuracy with {n_labels} labels {tokens_scores[-1]:.2f}")
indices, chosen = by_tokens.query(X_pool, n_instances=20, X_labeled=X_labeled)
for text, guess in zip(chosen[:4], by_tokens.predict(chosen), strict=False):
    print(f"{guess + '?':>10} {text}")
ask(indices)

# %%
# The sampler trains a copy: every fit starts from the weights that the model came with.
#
# A model that ``Trainer`` trained
# --------------------------------
#
# Hugging Face's own ``Trainer`` takes rows of tokens, with a number for each label.

classes = sorted(parts)
folder = tempfile.TemporaryDirectory()
arguments = TrainingArguments(
    folder.name,
    num_train_epochs=30,
    learning_rate=0.005,
    per_device_train_batch_size=20,
    dataloader_pin_memory=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)


def rows(texts, labels):
    columns = tokens(texts) | {"labels": np.searchsorted(classes, labels)}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(texts))]


def train():
    trainer = Trainer(
        BertForSequenceClassification(config), arguments, train_dataset=rows(X_labeled, y_labeled)
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    scores = trainer.predict(rows(X_test, y_test)).predictions
    return trainer, np.mean(scores.argmax(axis=1) == np.searchsorted(classes, y_test))


trainer, trainer_before = train()

# %%
# Its model is a module that no sampler has seen, so it is read by functions: the diagonal Fisher
# information, a mask of the parameters where it is largest, the embeddings at the mask, and the
# choice.

module = trainer.model


def batches(texts):
    for start in range(0, len(texts), 100):
        columns = tokens(texts[start : start + 100])
        yield {name: torch.as_tensor(column) for name, column in columns.items()}


diagonal = fisher_diagonal(module, batches(X_pool))
output = ["classifier.weight", "classifier.bias"]
mask = ParameterMask.from_diagonal(diagonal, "global", "auto", output_layer=output)
pool, labelled = (fisher_embedding(module, batches(texts), mask) for texts in (X_pool, X_labeled))
positions, gains = select_batch(
    pool,
    20,
    fisher_matrix(torch.cat([pool, labelled])),
    fisher_labeled=fisher_matrix(labelled),
    n_labeled=len(labelled),
)
for position in positions[:4]:
    print(X_pool[position])
ask(positions)
trainer, trainer_after = train()
folder.cleanup()
print(f"accuracy with 52 labels {trainer_before:.2f}, with 72 {trainer_after:.2f}")

# %%
# Adapters on frozen weights
# --------------------------
#
# LoRA leaves a trained layer as it is and learns a product of two thin matrices beside it. Here the
# model that was just trained gets adapters in its classifier and in one layer of its encoder;
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
module = trainer.model.requires_grad_(False)
module.classifier = Adapted(module.classifier)
last = module.bert.encoder.layer[-1].intermediate
last.dense = Adapted(last.dense)
adapted_net = LogitsNet(module, lr=0.005, **training)
adapted_net.fit(tokens(X_labeled), np.searchsorted(classes, y_labeled))

# %%
# A query reads the trained net. Frozen weights are left out of its mask. The size of the mask is
# given, because ``"auto"`` goes by the output layer, which is spread over several tensors here.

fishermask = FisherMaskSampler(mask_fraction=100, batch_size=200, random_state=0)
indices, _ = fishermask(adapted_net, tokens(X_pool), n_instances=10)
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
