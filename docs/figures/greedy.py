"""Two parameters, one direction: how each pick changes what the others would add."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from skfishermask import select_batch
from skfishermask.fisher import fisher_matrix

rng = np.random.default_rng(3)
angles = rng.choice([0.35, 0.5, 1.9], size=40) + rng.normal(scale=0.16, size=40)
radii = rng.uniform(0.5, 2.2, size=40)
V = torch.as_tensor(np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1))[:, None, :]
fisher = fisher_matrix(V)
chosen, gains = select_batch(V, 3, fisher)

figure, panels = plt.subplots(1, 3, figsize=(7.2, 2.9), sharex=True, sharey=True)
grid = np.stack(np.meshgrid(np.linspace(-1.8, 2.4, 121), np.linspace(0, 2.5, 81)), -1)
information = torch.eye(2, dtype=torch.float64)
points = V[:, 0].numpy()
for i, (axes, title) in enumerate(
    zip(panels, ["before any", "after the first", "after the second"], strict=True)
):
    inverse = torch.linalg.inv(information).numpy()
    middle = inverse @ fisher.numpy() @ inverse
    gain = np.einsum("yxi,ij,yxj->yx", grid, middle, grid)
    gain /= 1 + np.einsum("yxi,ij,yxj->yx", grid, inverse, grid)
    shown = axes.contourf(
        grid[..., 0],
        grid[..., 1],
        gain,
        levels=np.linspace(0, 1.2, 13),
        cmap="viridis",
        extend="max",
    )
    axes.scatter(*points.T, s=14, color="white", edgecolor="black", lw=0.6)
    done, following = points[chosen[:i]], points[chosen[i]]
    axes.scatter(*done.T, s=60, marker="X", color="white", edgecolor="black", lw=0.9)
    axes.scatter(*following, s=110, facecolor="none", edgecolor="#EE6677", lw=2.2)
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[], xlabel="parameter 1")
    information = information + V[chosen[i]].T @ V[chosen[i]] * 1.0
panels[0].set_ylabel("parameter 2")
figure.colorbar(shown, ax=panels, label="gain", ticks=[0, 0.4, 0.8, 1.2], shrink=0.9)
