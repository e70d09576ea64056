"""The parameters of the method: each with its default, its range and its description once."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError, dataclass, field, fields
from numbers import Integral, Real
from typing import Literal, TypeVar

import numpy as np
import torch
from sklearn.utils import check_random_state

from skfishermask.compat import HasMethods, Interval, StrOptions, validate_parameter_constraints
from skfishermask.fisher import LIKELIHOODS, MASK_STRATEGIES, Likelihood
from skfishermask.jacobian import ToOutputs
from skfishermask.selection import EMBEDDING_DTYPES

T = TypeVar("T")
Seed = int | np.random.RandomState | None
# What scikit-learn takes for one of the values that a parameter may have.
Constraint = object


# Parameters without a meaning where coverage alone chooses the batch.
_OF_FISHER_INFORMATION = (
    "mask",
    "mask_fraction",
    "n_mask_samples",
    "n_directions",
    "target",
    "use_labeled",
    "regularization",
    "oversample",
    "embedding_dtype",
)
# The method as its authors published it: Fisher information alone, exact, of the whole pool.
PUBLISHED: dict[str, float | None] = {
    "coverage_share": 0,
    "n_directions": None,
    "max_candidates": None,
    "n_mask_samples": 1024,
}


def parameter(default: T, *constraints: Constraint) -> T:
    """Declare a parameter of a dataclass that is a scikit-learn estimator.

    It may be one of the constraints, in the terms of scikit-learn.
    """
    return field(default=default, metadata={"constraints": list(constraints)})


def at_least_one() -> Interval:
    """Return the constraint of a count."""
    return Interval(Integral, 1, None, closed="left")


@dataclass(eq=False, repr=False, kw_only=True)
class MethodParameters:
    """The parameters of the method, which every query strategy of this package has.

    Parameters
    ----------
    mask : str, default="global"
        Which parameters to look at: ``"global"``, ``"per_layer"``, ``"relative"``, ``"random"``,
        ``"output_layer"``, which is BAIT, or ``"all"``. See
        :meth:`skfishermask.ParameterMask.from_diagonal`.
    mask_fraction : float, int or "auto", default="auto"
        Size of the mask. A float in (0, 1] is the share of all trainable parameters (the authors
        use 0.002), an int is the number itself, ``"auto"`` the larger of 0.2 % of
        these and twice the output layer, at most 2,000.
    n_mask_samples : int or None, default=128
        Number of samples, drawn from the labelled ones and the pool, for the diagonal Fisher
        information; None takes all. The authors use 1,024.
    likelihood : str or object, default="auto"
        The distribution of a label, given the network's output. ``"auto"``: by the net's
        criterion. ``"categorical"``: classes, of a sample or of each of its positions (cross
        entropy); ``"bernoulli"``: several labels a sample (binary cross entropy); ``"gaussian"``:
        numbers (squared errors and the like). An object: a
        :class:`skfishermask.fisher.Categorical`, ``Bernoulli`` or ``Gaussian`` with parameters, or
        one of your own, see :class:`skfishermask.fisher.Likelihood`.
    n_directions : int, float, None or "auto", default="auto"
        Rows of V(x). None: all, exact. An int: that number of leading ones or, where no row leads
        (a label a position, numbers), of random combinations, exact in the mean. A float in
        (0, 1): as many leading ones as keep that share of the trace. The cost of everything falls
        in proportion. ``"auto"``: the leading ones that keep 95% of the trace, or all where no row
        leads; in both cases at most 16. The diagonal Fisher information, which ranks parameters
        and nothing else, then takes 3 of them.
    target : {"pool", "identity"}, default="pool"
        F in the objective: the mean Fisher information of labelled and pool samples, or the
        identity matrix. Samples that a query is given as `X_target` go before it.
    use_labeled : bool, default=True
        Let the Fisher matrix of the labelled samples into M_0.
    regularization : float, default=1.0
        The multiple of the identity matrix in M_0.
    oversample : float, default=1.0
        Forward-select ``oversample * n_instances`` samples, then prune to `n_instances`.
        BAIT uses 2.
    coverage_share : float or "auto", default="auto"
        Share of the batch, in [0, 1], that is chosen first by coverage of the inputs: it reduces
        the posterior variance of a Gaussian process on them, weighted by the uncertainty of the
        predictions. The rest is chosen greedily given these, by Fisher information. 1: coverage
        alone, without gradients or a mask. 0: Fisher information alone. ``"auto"``: 1, but 0 where
        labels are numbers, where `coverage_inputs` are no real numbers, of several lengths, or
        more than 2,048 a sample, and where a parameter of the Fisher information is not at its
        default: `mask`, `mask_fraction`, `n_mask_samples`, `n_directions`, `target`, `use_labeled`,
        `regularization`, `oversample` or `embedding_dtype`.
    coverage_inputs : str, default="auto"
        What is covered. ``"inputs"``: what the network is given. The name of a module in it, such
        as ``"backbone"``: the output of that. ``"auto"``: where the network begins with frozen
        layers, what its first trained layer is given, else the inputs.
    max_candidates : int, None or "auto", default="auto"
        Choose from a random subset of the pool of at most this size, which also stands for the pool
        in F. None: all of it. ``"auto"``: at most 20,000 samples, or five times the batch.
    to_logits : callable or None, default=None
        Maps what the net's ``infer`` gives to logits (n, C), such as ``lambda out: out["scores"]``.
        None: by the net's criterion and ``predict_nonlinearity``, of a tuple the first element, of
        an output with ``logits`` (Hugging Face) these.
    embedding_dtype : {"float32", "float16", "bfloat16", "float64"}, default="float32"
        Storage of V; computation is in float32 at least.
    memory_share : float, default=0.5
        Share of the free memory, in (0, 1], that V may take. A larger V goes to a scratch file,
        which the selection reads again for every few picks and which is gone afterwards. With
        CUDA, V may first take that share of the card's memory, then of the host's.
    scratch_folder : str, path-like or None, default=None
        Where the scratch file goes: best a fast local disk. None: the system's temporary
        folder, which on some systems is memory.
    verbose : int, default=0
        1 shows the memory that the query takes and a progress bar for each step; where the standard
        error is no terminal, a line for each.
    """

    mask: str = parameter("global", StrOptions(set(MASK_STRATEGIES)))
    mask_fraction: float | int | Literal["auto"] = parameter(
        "auto", Interval(Real, 0, 1, closed="right"), at_least_one(), StrOptions({"auto"})
    )
    n_mask_samples: int | None = parameter(128, at_least_one(), None)
    likelihood: str | Likelihood = parameter(
        "auto", StrOptions({"auto", *LIKELIHOODS}), HasMethods(["check", "rank", "factor"])
    )
    n_directions: int | float | Literal["auto"] | None = parameter(
        "auto", Interval(Real, 0, 1, closed="neither"), at_least_one(), None, StrOptions({"auto"})
    )
    target: Literal["pool", "identity"] = parameter("pool", StrOptions({"pool", "identity"}))
    use_labeled: bool = parameter(True, "boolean")
    regularization: float = parameter(1.0, Interval(Real, 0, None, closed="neither"))
    oversample: float = parameter(1.0, Interval(Real, 1, None, closed="left"))
    coverage_share: float | Literal["auto"] = parameter(
        "auto", Interval(Real, 0, 1, closed="both"), StrOptions({"auto"})
    )
    coverage_inputs: str = parameter("auto", str)
    max_candidates: int | Literal["auto"] | None = parameter(
        "auto", at_least_one(), None, StrOptions({"auto"})
    )
    to_logits: ToOutputs | None = parameter(None, callable, None)
    embedding_dtype: Literal["float32", "float16", "bfloat16", "float64"] = parameter(
        "float32", StrOptions(set(EMBEDDING_DTYPES))
    )
    memory_share: float = parameter(0.5, Interval(Real, 0, 1, closed="right"))
    scratch_folder: str | os.PathLike[str] | None = parameter(None, str, os.PathLike, None)
    verbose: int = parameter(0, "verbose")


def check_parameters(estimator: object) -> None:
    """Raise scikit-learn's ``InvalidParameterError`` at a `parameter` that is out of range."""
    # The type of all dataclasses has no public name.
    described = fields(estimator)  # type: ignore[arg-type]
    declared = [f for f in described if "constraints" in f.metadata]
    validate_parameter_constraints(
        {f.name: f.metadata["constraints"] for f in declared},
        {f.name: getattr(estimator, f.name) for f in declared},
        type(estimator).__name__,
    )


# Candidates of a large pool, at least, and for each pick.
_N_CANDIDATES, _CANDIDATES_PER_PICK = 20_000, 5


def draw_candidates(
    n_pool: int,
    n_instances: int,
    max_candidates: int | Literal["auto"] | None,
    rng: np.random.RandomState,
) -> np.ndarray:
    """Return the rows of the pool to choose from, ascending: drawn, where they are not all.

    Raises ValueError if there are fewer candidates than `n_instances`.
    """
    if max_candidates == "auto":
        limit = max(_N_CANDIDATES, _CANDIDATES_PER_PICK * n_instances)
    else:
        limit = n_pool if max_candidates is None else max_candidates
    if limit < n_instances:
        raise ValueError(
            f"max_candidates={limit} leaves fewer candidates than n_instances={n_instances}."
        )
    if limit >= n_pool:
        return np.arange(n_pool)
    rows: np.ndarray = np.sort(rng.choice(n_pool, limit, replace=False))
    return rows


def check_n_instances(n_instances: object, n_pool: int) -> int:
    """Return `n_instances`; raise ValueError unless it is an int from 1 to the pool's length."""
    if n_pool == 0:
        raise ValueError("Expected a pool with at least one sample, found an empty one.")
    if not isinstance(n_instances, Integral) or isinstance(n_instances, bool):
        raise ValueError(f"n_instances must be an int, got {n_instances!r}.")
    n = int(n_instances)
    if not 1 <= n <= n_pool:
        raise ValueError(
            f"n_instances must be between 1 and the {n_pool} samples of the pool, "
            f"got {n_instances}."
        )
    return n


class Settings(MethodParameters):
    """The parameters of one query, checked, and from then on the same."""

    batch_size: int | None  # samples per pass through the network; None: the net's own
    rng: np.random.RandomState  # for every draw

    def __init__(
        self, parameters: MethodParameters, batch_size: int | None, random_state: Seed
    ) -> None:
        check_parameters(parameters)
        folder = parameters.scratch_folder
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(f"scratch_folder must be an existing folder, got {folder!r}.")
        if folder is not None and not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"scratch_folder must be a folder to write to, got {folder!r}.")
        own = {f.name: getattr(parameters, f.name) for f in fields(MethodParameters)}
        vars(self).update(own, batch_size=batch_size, rng=check_random_state(random_state))

    @property
    def wanted_coverage(self) -> float | Literal["auto"]:
        """The parameter `coverage_share`; 0 for "auto" where the Fisher information was set up."""
        defaults = {f.name: f.default for f in fields(MethodParameters)}
        is_set = any(getattr(self, name) != defaults[name] for name in _OF_FISHER_INFORMATION)
        return 0 if self.coverage_share == "auto" and is_set else self.coverage_share

    def __setattr__(self, name: str, value: object) -> None:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return EMBEDDING_DTYPES[self.embedding_dtype]


def with_method_parameters(cls: type[T]) -> type[T]:
    """Insert their description for the line ``<method parameters>`` of a class's docstring."""
    if cls.__doc__ and MethodParameters.__doc__:  # not with python -OO
        _, _, described = MethodParameters.__doc__.partition("----------\n")
        cls.__doc__ = cls.__doc__.replace("    <method parameters>\n", described.rstrip() + "\n")
    return cls
