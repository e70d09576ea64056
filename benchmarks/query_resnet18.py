"""One query on a CIFAR-style ResNet-18: this library beside the FisherMask authors' way.

The authors' way is what their published code does, written out here without its bugs: for every
sample and class one backward pass through the graph of the sample's whole batch, and a greedy step
that multiplies every embedding by M^-1 again. It is measured on a few samples and steps and scaled
to the whole query, in the same process and alternating with ours; the result says so.

Run from the root of the repository::

    python -m benchmarks.query_resnet18 --out benchmarks/results/query_resnet18.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sklearn
import skorch
import torch
from skorch import NeuralNetClassifier
from torch import Tensor, nn
from tqdm.auto import tqdm

import skfishermask
from skfishermask import FisherMaskSampler
from skfishermask._skorch import NetBatches
from skfishermask.fisher import fisher_embedding, fisher_matrix
from skfishermask.selection import select_batch
from tests.networks import CifarResNet18


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def authors_gradients(module: nn.Module, batch: Tensor, n_samples: int) -> list[np.ndarray]:
    """Score vectors of a few samples: a backward pass each class, through the batch's graph."""
    module.eval()
    log_p = module(batch).log_softmax(1)
    found = []
    for i in range(n_samples):
        for c in range(log_p.shape[1]):
            grads = torch.autograd.grad(log_p[i, c], list(module.parameters()), retain_graph=True)
            flat = torch.cat([g.flatten() for g in grads]) * log_p[i, c].exp().sqrt().detach()
            found.append(flat.cpu().numpy().astype(np.float64))
    return found


def authors_step(V: Tensor, inverse: Tensor, fisher: Tensor) -> Tensor:
    """Gains of all candidates, with every embedding multiplied by M^-1 again."""
    identity = torch.eye(V.shape[1], device=V.device)
    gains = []
    for v in V.split(100):
        x = v @ inverse
        inner = torch.linalg.inv(identity + x @ v.mT)
        gains.append(torch.einsum("nij,nji->n", x @ fisher @ x.mT, inner))
    return torch.cat(gains)


def ordinary_backward_passes(module: nn.Module, batch: Tensor) -> None:
    """C backward passes of the summed batch: the yardstick, not even per-sample."""
    module.eval()
    logits = module(batch)
    parameters = list(module.parameters())
    for c in range(logits.shape[1]):
        torch.autograd.grad(logits[:, c].sum(), parameters, retain_graph=True)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(options: argparse.Namespace) -> dict[str, object]:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(options.n_pool, 3, 32, 32)).astype("float32")
    module = CifarResNet18().to(options.device)
    net = NeuralNetClassifier(
        module,
        criterion=nn.CrossEntropyLoss,
        batch_size=64,
        device=options.device,
        train_split=None,
        verbose=0,
    ).initialize()
    module = net.module_
    batch = torch.as_tensor(pool[:32]).to(options.device)

    sampler = FisherMaskSampler(random_state=0)
    runs = {name: [] for name in ("diagonal", "embedding", "fisher", "selection", "total")}
    theirs = {name: [] for name in ("gradients a sample", "greedy step", "C backward a sample")}
    for _ in tqdm(range(options.repeats), desc="repeats"):
        sampler(net, pool, options.n_instances)
        for name in runs:
            runs[name].append(sampler.query_info_["seconds"][name])
        few = options.few
        theirs["gradients a sample"].append(
            seconds(lambda: authors_gradients(module, batch, options.few)) / few
        )
        theirs["C backward a sample"].append(
            seconds(lambda: ordinary_backward_passes(module, batch)) / len(batch)
        )
        batches = NetBatches(net, pool[: options.n_step])
        V = fisher_embedding(module, batches, sampler.mask_)
        fisher = fisher_matrix(V).float()
        inverse = torch.eye(len(fisher), device=V.device)
        step = seconds(lambda V=V, i=inverse, f=fisher: authors_step(V, i, f))
        theirs["greedy step"].append(step * options.n_pool / options.n_step)
        first = authors_step(V, inverse, fisher).argmax()
        assert first == select_batch(V, 1, fisher)[0][0], "the first picks differ"

    info = {k: v for k, v in sampler.query_info_.items() if k != "seconds"}
    ours = {name: spread(values) for name, values in runs.items()}
    peer = {name: spread(values) for name, values in theirs.items()}
    n_mask = min(sampler.n_mask_samples, options.n_pool)
    a_sample, a_step = (peer[n]["median"] for n in ("gradients a sample", "greedy step"))
    scaled = {
        "diagonal": n_mask * a_sample,
        "embedding": options.n_pool * a_sample,
        "selection": options.n_instances * a_step,
    }
    scaled["total"] = sum(scaled.values())
    return {
        "what": f"{options.n_instances} of {options.n_pool} images, CIFAR-style ResNet-18",
        "query": info,
        "ours, seconds": ours,
        "authors' way, seconds, scaled": scaled,
        "authors' way, measured": peer
        | {
            "note": f"gradients on {options.few} samples of a batch of 32 and one greedy step on "
            f"{options.n_step} candidates, each repeat; scaled to the query"
        },
        "ratio": {name: scaled[name] / ours[name]["median"] for name in scaled},
        "embedding over C ordinary backward passes": ours["embedding"]["median"]
        / options.n_pool
        / peer["C backward a sample"]["median"],
        "repeats": options.repeats,
        "machine": {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scikit-learn": sklearn.__version__,
            "skorch": skorch.__version__,
            "skfishermask": skfishermask.__version__,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n-pool", type=int, default=2000)
    parser.add_argument("--n-instances", type=int, default=100)
    parser.add_argument("--n-step", type=int, default=500, help="candidates of a measured step")
    parser.add_argument("--few", type=int, default=4, help="samples of a measured gradient loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the result as JSON here")
    options = parser.parse_args()
    result = json.dumps(measure(options), indent=2)
    print(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(result + "\n")


if __name__ == "__main__":
    main()
