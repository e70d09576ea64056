"""The share of the Fisher information that the first r directions keep."""

import matplotlib.pyplot as plt
import torch
from _digits import fitted

from skfishermask.fisher.directions import kept_trace, squared_norms
from skfishermask.fisher.likelihood import categorical_factor

figure, axes = plt.subplots(figsize=(5.2, 3.2))
styles = {0: ("0.45", "o"), 20: ("#CCBB44", "s"), 100: ("#4477AA", "D"), 500: ("#AA3377", "^")}
for n_labeled, (colour, marker) in styles.items():
    if n_labeled:
        net, _, pool = fitted(n_labeled)
        p = torch.as_tensor(net.predict_proba(pool), dtype=torch.float64)
        label = f"trained on {n_labeled}"
    else:
        p, label = torch.full((1, 10), 0.1, dtype=torch.float64), "all equally probable"
    kept = kept_trace(squared_norms(categorical_factor(p)))
    axes.plot(range(1, 10), kept, color=colour, marker=marker, markersize=4, label=label)
axes.set(xlabel="n_directions, of 9 for 10 classes", ylabel="share of the trace", ylim=(0, 1.03))
axes.grid(alpha=0.3)
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, fontsize=9, loc="lower right")
