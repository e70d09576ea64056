"""Which parameters to keep: index arithmetic on the diagonal Fisher information."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from torch import Tensor

MaskSize = float | int | Literal["auto"]
# Parameter name -> flat values, or sorted flat indices, of it.
Flat = Mapping[str, Tensor]

_AUTO_FRACTION = 0.002
# Larger masks choose nearly the same batches in many times the time: benchmarks/speed/mask_size.py.
_AUTO_LIMIT = 2000
# The authors' "relative" mask: entries above twice their tensor's mean, at most 2.5% of it.
_RELATIVE_THRESHOLD = 2.0
_RELATIVE_SHARE = 0.025


def mask_size(size: MaskSize, n_parameters: int, n_output: int) -> int:
    """Turn a mask size into a number of parameters.

    Parameters
    ----------
    size : float, int or "auto"
        A float in (0, 1] is the share of all parameters, rounded up; an int is the number
        itself; ``"auto"`` is the larger of 0.2 % of all parameters and twice the output layer,
        but at most 2,000.
    n_parameters : int
        Number of all parameters, P.
    n_output : int
        Number of parameters of the output layer.

    Returns
    -------
    int
        The number of parameters to keep, between 1 and P.

    Raises
    ------
    ValueError
        If `size` is none of these, or an int below 1 or above P.

    Examples
    --------
    >>> from skfishermask.fisher.mask import mask_size
    >>> mask_size(0.002, 701_456, 1_290)
    1403
    >>> mask_size("auto", 250_000, 650)
    1300
    """
    if isinstance(size, str) and size == "auto":
        k = max(math.ceil(_AUTO_FRACTION * n_parameters), 2 * n_output)
        return min(k, _AUTO_LIMIT, n_parameters)
    if isinstance(size, Integral) and not isinstance(size, bool):
        if 1 <= size <= n_parameters:
            return int(size)
        raise ValueError(
            f"As an int, the mask size must be between 1 and the {n_parameters} parameters of the "
            f"network, got {size}."
        )
    if isinstance(size, Real) and not isinstance(size, bool) and 0 < size <= 1:
        # Rounded first: 0.002 * 500 is a little more than 1 in floating point.
        return math.ceil(round(float(size) * n_parameters, 6))
    raise ValueError(
        'The mask size must be a float in (0, 1] (share of all parameters), an int or "auto", '
        f"got {size!r}."
    )


@dataclass(frozen=True, eq=False)
class ParameterMask:
    """The parameters that a Fisher embedding looks at.

    Its columns are in the order of the network's ``named_parameters()``, then by flat index.

    Parameters
    ----------
    indices : dict of str to Tensor
        Parameter name -> sorted flat indices of its kept entries, int64, on the CPU.
        Parameters without a kept entry are absent. Read-only.
    shapes : dict of str to torch.Size
        Shape of every trainable parameter of the network, kept or not, in order. Read-only.

    Examples
    --------
    >>> import torch
    >>> from skfishermask import ParameterMask
    >>> diagonal = {"hidden.weight": torch.tensor([[3.0, 1.0], [2.0, 5.0]]),
    ...             "output.bias": torch.tensor([0.5, 0.5])}
    >>> mask = ParameterMask.from_diagonal(diagonal, "global", 4, output_layer=["output.bias"])
    >>> len(mask), mask.indices["hidden.weight"].tolist(), mask.indices["output.bias"].tolist()
    (4, [0, 3], [0, 1])
    """

    indices: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]

    def __post_init__(self) -> None:
        indices = {}
        for name, shape in self.shapes.items():
            if name in self.indices and len(self.indices[name]) > 0:
                index = torch.as_tensor(self.indices[name], dtype=torch.int64, device="cpu")
                indices[name] = index
                if not (index[0] >= 0 and index[-1] < shape.numel() and (index.diff() > 0).all()):
                    raise ValueError(
                        f"Indices of {name!r} must be increasing and between 0 and "
                        f"{shape.numel() - 1}."
                    )
        unknown = [name for name in self.indices if name not in self.shapes]
        if unknown:
            raise ValueError(f"Indices of {unknown[0]!r} are given but no shape.")
        if not indices:
            raise ValueError("A mask must keep at least one parameter, found none.")
        object.__setattr__(self, "indices", MappingProxyType(indices))
        object.__setattr__(self, "shapes", MappingProxyType(dict(self.shapes)))

    def __len__(self) -> int:
        """Return k, the number of kept parameters."""
        return sum(len(index) for index in self.indices.values())

    def __eq__(self, other: object) -> bool:
        """Return whether the same entries of the same parameters are kept."""
        if not isinstance(other, ParameterMask):
            return NotImplemented
        return (
            self.shapes == other.shapes
            and self.indices.keys() == other.indices.keys()
            and all(torch.equal(i, other.indices[name]) for name, i in self.indices.items())
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by value: a read-only view of a dict has no pickle of its own."""
        return ParameterMask, (dict(self.indices), dict(self.shapes))

    def __repr__(self) -> str:
        """Describe how many parameters of how many are kept, and where."""
        n_parameters = sum(shape.numel() for shape in self.shapes.values())
        return (
            f"ParameterMask({len(self)} of {n_parameters} parameters, "
            f"in {len(self.indices)} of {len(self.shapes)} tensors)"
        )

    @classmethod
    def from_diagonal(
        cls,
        diagonal: Mapping[str, Tensor],
        strategy: str,
        size: MaskSize,
        *,
        output_layer: Collection[str],
        random_state: int | np.random.RandomState | None = None,
    ) -> ParameterMask:
        """Choose parameters by their diagonal Fisher information.

        Ties break towards the earlier parameter and the lower index.

        Parameters
        ----------
        diagonal : dict of str to Tensor
            Parameter name -> diagonal Fisher information, in the order of
            ``named_parameters()``, as :func:`skfishermask.fisher_diagonal` gives it.
        strategy : {"global", "per_layer", "relative", "random", "output_layer", "all"}
            One of these:

            - ``"global"``: the largest entries of all (the authors' "standard").
            - ``"per_layer"``: of each tensor its largest entries, in proportion to its
              size (their "dispersed").
            - ``"relative"``: entries above twice the mean of their tensor, at most 2.5 % of
              each tensor; where these are more than fit `size`, those largest in
              proportion to their tensor's mean. ``size=1.0`` keeps all of them, as the
              authors do.
            - ``"random"``: entries drawn without replacement.
            - ``"output_layer"``: the output layer alone, of any size: BAIT.
            - ``"all"``: every parameter.
        size : float, int or "auto"
            Number of parameters to keep, see :func:`skfishermask.fisher.mask.mask_size`;
            ``"output_layer"`` and ``"all"`` do not look at it.
        output_layer : collection of str
            Names of the output layer's parameters. The first four strategies keep them
            whole, within `size`, if they are fewer than `size`; if not, they compete like
            all others.
        random_state : int, RandomState or None
            For ``"random"``.

        Returns
        -------
        ParameterMask
            The mask.

        Raises
        ------
        ValueError
            If a name in `output_layer` is unknown, the diagonal holds NaN, infinite or
            negative values, or `strategy` or `size` is not one of the above.

        References
        ----------
        FisherMask, arXiv 2411.05752, Section III; the idea of a mask by diagonal Fisher
        information is that of Sung, Nair and Raffel, "Training Neural Networks with Fixed
        Sparse Masks", NeurIPS 2021.
        """
        _check(diagonal, strategy, output_layer)
        flat = {name: d.detach().flatten().double().cpu() for name, d in diagonal.items()}
        shapes = {name: d.shape for name, d in diagonal.items()}
        output = [name for name in flat if name in set(output_layer)]
        rng = random_state
        if not isinstance(rng, np.random.RandomState):
            rng = np.random.RandomState(rng)
        return cls(MASK_STRATEGIES[strategy].choose(flat, output, size, rng), shapes)


def _check(diagonal: Mapping[str, Tensor], strategy: str, output_layer: Collection[str]) -> None:
    if strategy not in MASK_STRATEGIES:
        raise ValueError(f"strategy must be one of {(*MASK_STRATEGIES,)}, got {strategy!r}.")
    if not diagonal:
        raise ValueError("The diagonal Fisher information is empty: the network has no parameters.")
    for name in output_layer:
        if name not in diagonal:
            raise ValueError(
                f"output_layer names {name!r}, expected names of the diagonal: {list(diagonal)}."
            )
    if strategy == "output_layer" and not output_layer:
        raise ValueError('The "output_layer" strategy needs at least one name in output_layer.')
    for name, d in diagonal.items():
        # NaN fails both comparisons.
        if d.numel() and not (d.min() >= 0 and d.max() < math.inf):
            raise ValueError(
                f"The diagonal Fisher information of {name!r} must be finite and not negative, "
                f"found values from {float(d.min())} to {float(d.max())}."
            )


def _largest(values: Tensor, count: int) -> Tensor:
    """Return the sorted indices of the largest values; ties go to the lower index."""
    count = min(count, len(values))
    if count == 0:
        return torch.empty(0, dtype=torch.int64)
    # topk leaves open which of equal entries it gives, so it only sets the threshold. That takes a
    # tenth of the time of a sort.
    least = torch.topk(values, count, sorted=False).values.amin()
    kept = values > least
    equal = torch.nonzero(values == least).squeeze(1)[: count - int(kept.sum())]
    return torch.nonzero(kept.index_fill_(0, equal, True)).squeeze(1)


def _split(positions: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Turn sorted positions in the concatenation of tensors into indices of each."""
    start = 0
    for name, values in tensors.items():
        stop = start + len(values)
        yield name, positions[(positions >= start) & (positions < stop)] - start
        start = stop


def _apportion(sizes: list[int], total: int) -> list[int]:
    """Share out `total` in proportion to sizes: floors, then the largest remainders."""
    everything = sum(sizes)
    total = min(total, everything)
    counts = [total * size // everything for size in sizes]
    remainders = [total * size % everything for size in sizes]
    for i in sorted(range(len(sizes)), key=lambda i: (-remainders[i], i))[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _global(diagonal: Flat, k: int, rng: np.random.RandomState) -> Flat:
    best = _largest(torch.cat(list(diagonal.values())), k)
    return dict(_split(best, diagonal))


def _per_layer(diagonal: Flat, k: int, rng: np.random.RandomState) -> Flat:
    counts = _apportion([len(d) for d in diagonal.values()], k)
    pairs = zip(diagonal.items(), counts, strict=True)
    return {name: _largest(d, count) for (name, d), count in pairs}


def _relative(diagonal: Flat, k: int, rng: np.random.RandomState) -> Flat:
    # Each entry over its tensor's mean where it is a candidate, else zero.
    scores = {}
    for name, d in diagonal.items():
        ratio = d / d.mean() if d.sum() > 0 else torch.zeros_like(d)
        ratio = torch.where(ratio > _RELATIVE_THRESHOLD, ratio, 0)
        keep = _largest(ratio, math.ceil(_RELATIVE_SHARE * len(d)))
        scores[name] = torch.zeros_like(d).index_copy_(0, keep, ratio[keep])
    return {name: i[scores[name][i] > 0] for name, i in _global(scores, k, rng).items()}


def _random(diagonal: Flat, k: int, rng: np.random.RandomState) -> Flat:
    n = sum(map(len, diagonal.values()))
    drawn = np.sort(rng.choice(n, size=min(k, n), replace=False))
    return dict(_split(torch.as_tensor(drawn), diagonal))


Choose = Callable[[Flat, Collection[str], MaskSize, np.random.RandomState], Flat]


def _keeping_output(choose: Callable[[Flat, int, np.random.RandomState], Flat]) -> Choose:
    """Keep a small output layer whole, and choose among the other parameters."""

    def choose_others(
        diagonal: Flat, output: Collection[str], size: MaskSize, rng: np.random.RandomState
    ) -> Flat:
        n_output = sum(len(diagonal[name]) for name in output)
        k = mask_size(size, sum(map(len, diagonal.values())), n_output)
        whole = output if n_output < k else []
        competing = {name: d for name, d in diagonal.items() if name not in whole}
        chosen = choose(competing, k - sum(len(diagonal[name]) for name in whole), rng)
        return {**chosen, **_whole(diagonal, whole)}

    return choose_others


def _whole(diagonal: Flat, names: Collection[str]) -> Flat:
    return {name: torch.arange(len(diagonal[name])) for name in names}


@dataclass(frozen=True)
class MaskStrategy:
    """A way to choose the parameters to keep."""

    # Diagonal, names of the output layer's parameters, size and random state -> indices.
    choose: Choose
    # Size, number of all parameters and of those of the output layer -> number of parameters to
    # keep; None where that depends on the diagonal.
    known_size: Callable[[MaskSize, int, int], int] | None
    uses_diagonal: bool = True  # whether the choice depends on the diagonal Fisher information


MASK_STRATEGIES: Mapping[str, MaskStrategy] = MappingProxyType(
    {
        "global": MaskStrategy(_keeping_output(_global), mask_size),
        "per_layer": MaskStrategy(_keeping_output(_per_layer), mask_size),
        "relative": MaskStrategy(_keeping_output(_relative), None),
        "random": MaskStrategy(_keeping_output(_random), mask_size, uses_diagonal=False),
        "output_layer": MaskStrategy(
            lambda diagonal, output, size, rng: _whole(diagonal, output),
            lambda size, n_parameters, n_output: n_output,
            uses_diagonal=False,
        ),
        "all": MaskStrategy(
            lambda diagonal, output, size, rng: _whole(diagonal, diagonal),
            lambda size, n_parameters, n_output: n_parameters,
            uses_diagonal=False,
        ),
    }
)
