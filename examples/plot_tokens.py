"""
A label for each token
======================

A tagger has a class for each token of a sentence. Which sentences should be tagged next? The Fisher
information of a sentence is the sum over its tokens; padding counts nothing.
"""

# %%
# Sentences of several lengths
# ----------------------------
#
# Made up: of thirty words, and a word's tag depends on the word before it. Shorter sentences are
# padded by 0, and have the label -100 there, which ``CrossEntropyLoss`` ignores.

import numpy as np
import torch
from skorch import NeuralNetClassifier
from torch import nn

from skfishermask import FisherMaskSampler
from skfishermask.fisher import Categorical

rng = np.random.default_rng(0)
n, length = 500, 12
words = rng.zipf(1.4, size=(n, length)).clip(max=30)
before = np.pad(words, ((0, 0), (1, 0)))[:, :-1]
tags = (words + before) % 4
padding = np.arange(length) >= rng.integers(4, length + 1, size=(n, 1))
words[padding], tags[padding] = 0, -100


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(31, 16, padding_idx=0)
        self.cell = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 4)

    def forward(self, words):
        hidden, _ = self.cell(self.table(words))
        return self.head(hidden).transpose(1, 2)  # (n, classes, tokens)


net = NeuralNetClassifier(
    Tagger,
    criterion=nn.CrossEntropyLoss,
    optimizer=torch.optim.Adam,
    lr=0.01,
    max_epochs=40,
    batch_size=32,
    train_split=None,
    verbose=0,
)

# %%
# Rounds of queries
# -----------------
#
# ``Categorical`` is told which positions are padding; the inputs alone say so in a pool.

likelihood = Categorical(ignored=lambda words: words == 0)
train, test = np.arange(400), np.arange(400, n)
labeled = train[:30]
for _ in range(3):
    sampler = FisherMaskSampler(net, likelihood=likelihood, random_state=0)
    sampler.fit(words[labeled], tags[labeled])
    print(f"{len(labeled)} sentences: accuracy {sampler.score(words[test], tags[test]):.2f}")
    pool = np.setdiff1d(train, labeled)
    indices, _ = sampler.query(words[pool], n_instances=20, X_labeled=words[labeled])
    labeled = np.append(labeled, pool[indices])

# %%
# A sentence's tokens and classes would be up to 36 directions; 16 random combinations stand for
# them.

print(sampler.query_info_["n_directions"], "directions")
