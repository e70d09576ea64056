"""The wheel alone: train and query with no package but those that it declares.

Run as ``python -I wheel_smoke.py FOLDER``, where the wheel lies unpacked in FOLDER. The environment
has its dependencies and more: nothing else can be imported.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

FOLDER = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(FOLDER))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(name: str, found: set[str]) -> set[str]:
    """Collect a distribution and what it requires, without extras."""
    if normal(name) not in found:
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:  # for another system or version
            return found
        found.add(normal(name))
        for requirement in requirements:
            if "extra ==" not in requirement:
                declared(re.match(r"[\w.-]+", requirement)[0], found)
    return found


ALLOWED = declared("skfishermask", set())
OTHERS = {
    module
    for module, names in packages_distributions().items()
    if not any(normal(name) in ALLOWED for name in names)
}


class Without:
    """A finder of modules that does not find those."""

    def __init__(self, finder: object) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._finder, name)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> object:
        known = fullname.split(".")[0] not in OTHERS
        return self._finder.find_spec(fullname, path, target) if known else None


sys.meta_path[:] = map(Without, sys.meta_path)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from skorch import NeuralNetClassifier  # noqa: E402
from torch import nn  # noqa: E402

import skfishermask  # noqa: E402
from skfishermask import FisherMaskSampler  # noqa: E402

assert Path(skfishermask.__file__).is_relative_to(FOLDER), skfishermask.__file__
assert {"matplotlib", "modAL", "dask"} <= OTHERS, "expected an environment with optional packages"

torch.manual_seed(0)
rng = np.random.default_rng(0)
X = rng.normal(size=(40, 4)).astype(np.float32)
y = (X[:, 0] > 0).astype(np.int64)
net = NeuralNetClassifier(
    nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    criterion=nn.CrossEntropyLoss,
    max_epochs=2,
    train_split=None,
    verbose=0,
).fit(X[:10], y[:10])

indices, gains = FisherMaskSampler(random_state=0)(net, X[10:], n_instances=2)
chosen = {int(i) for i in indices}
assert len(chosen) == 2, indices
assert chosen <= set(range(30)), indices
assert len(gains) == 2, gains
try:
    import skfishermask.modal
except ImportError as error:
    if "--no-deps modAL-python" not in str(error):
        raise
else:
    raise AssertionError("skfishermask.modal was imported without modAL")

print(f"wheel: skfishermask {skfishermask.__version__} trained, queried and chose {sorted(chosen)}")
