"""Where six masks of a small convolutional network lie."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from _digits import fitted

from skfishermask import ParameterMask, fisher_diagonal

net, _, pool = fitted(100)
diagonal = fisher_diagonal(net.module_, torch.as_tensor(pool[:1024]).split(256))
names = {"0": "first convolution", "3": "second convolution", "7": "output layer"}
output = ["7.weight", "7.bias"]
size = 1000
strategies = ["global", "per_layer", "relative", "random", "output_layer", "all"]
colours = ["#4477AA", "#CCBB44", "#AA3377"]

figure, axes = plt.subplots(figsize=(5.6, 3.2))
left = np.zeros(len(strategies))
for (layer, label), colour in zip(names.items(), colours, strict=True):
    counts = []
    for strategy in strategies:
        mask = ParameterMask.from_diagonal(
            diagonal, strategy, size, output_layer=output, random_state=0
        )
        kept = (len(index) for name, index in mask.indices.items() if name.startswith(layer))
        counts.append(sum(kept))
    axes.barh(strategies, counts, left=left, color=colour, label=label, height=0.7)
    left += counts
for y, total in enumerate(left):
    axes.text(total + 40, y, f"{int(total):,}", va="center", fontsize=9)
axes.invert_yaxis()
axes.set(xlabel="parameters in the mask", xlim=(0, 3500))
axes.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9, columnspacing=1)
