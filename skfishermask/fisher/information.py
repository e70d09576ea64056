"""Fisher information of a network: its diagonal, and embeddings of samples at a mask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from skfishermask.fisher.directions import check_n_directions
from skfishermask.fisher.likelihood import (
    Categorical,
    UnweightedCategorical,
    Weighting,
    as_likelihood,
)
from skfishermask.fisher.mask import ParameterMask
from skfishermask.fisher.output_likelihood import Likelihood, OutputLikelihood
from skfishermask.fisher.predictions import directions_for_share, read_all
from skfishermask.jacobian import (
    BatchJacobian,
    Inputs,
    JacobianReader,
    LinearHead,
    NonFiniteGradientError,
    ToOutputs,
    batch_length,
    exact_mode,
    slice_batch,
    trainable_parameters,
)


def _directions(
    likelihood: OutputLikelihood,
    jacobian: BatchJacobian,
    batch: Inputs,
    n_directions: int | None,
    first_row: int,
) -> Tensor:
    outputs = jacobian.outputs
    likelihood.check_samples(outputs)
    counted = likelihood.counted(batch, outputs)
    return likelihood.directions(outputs, n_directions, counted=counted, first_row=first_row)


def fisher_diagonal(
    module: nn.Module,
    batches: Iterable[Inputs],
    *,
    likelihood: str | Likelihood = "categorical",
    n_directions: int | None = None,
    to_logits: ToOutputs | None = None,
) -> dict[str, Tensor]:
    r"""Compute the mean diagonal Fisher information of every trainable parameter.

    For parameter j it is the mean over samples x of
    :math:`\sum_c p_c(x) (\partial \log p_c(x) / \partial \theta_j)^2`, computed as
    :math:`\sum_i (R J)_{ij}^2`: the expectation is over the network's own predictive
    distribution, so no labels are needed.

    Parameters
    ----------
    module : nn.Module
        A classifier. It is read in evaluation mode and left as it was. Frozen parameters are left
        out, unless all are frozen.
    batches : iterable of tensor, list of tensors or dict of tensors
        What the module's forward takes first, samples along the first axis; a dict gives
        keyword arguments. Moved to the module's device; in the dtypes that forward takes.
    likelihood : str or Likelihood, default="categorical"
        The distribution of a label, given the module's outputs: ``"categorical"``,
        ``"bernoulli"`` or ``"gaussian"``, a :class:`skfishermask.fisher.Categorical`,
        :class:`skfishermask.fisher.Bernoulli` or :class:`skfishermask.fisher.Gaussian`, or an
        object of your own (:class:`skfishermask.fisher.Likelihood`).
    n_directions : int, optional
        Use only the leading rows of R, see :func:`skfishermask.fisher_embedding`.
    to_logits : callable, optional
        Maps the module's output to logits (n, C). Default: it is logits, a tuple that
        begins with them, or an object that has them as ``.logits``.

    Returns
    -------
    dict of str to Tensor
        Parameter name -> float64 tensor of the parameter's shape on the module's device, in
        the order of ``module.named_parameters()``.

    Raises
    ------
    ValueError
        If there is no sample, the logits are not a finite (n, C) matrix, the output for a
        sample depends on its batch, the parameters differ in device or are complex, or
        `n_directions` is not an int of at least 1.

    References
    ----------
    FisherMask, arXiv 2411.05752, Section III.

    Examples
    --------
    >>> import torch
    >>> from skfishermask import fisher_diagonal
    >>> module = torch.nn.Linear(4, 3)
    >>> diagonal = fisher_diagonal(module, [torch.randn(8, 4), torch.randn(5, 4)])
    >>> {name: tuple(d.shape) for name, d in diagonal.items()}
    {'weight': (3, 4), 'bias': (3,)}
    """
    n, totals = diagonal_sums(
        module, batches, likelihood=likelihood, n_directions=n_directions, to_logits=to_logits
    )
    return {name: total / n for name, total in totals.items()}


def diagonal_sums(
    module: nn.Module,
    batches: Iterable[Inputs],
    *,
    likelihood: str | Likelihood = "categorical",
    n_directions: int | None = None,
    to_logits: ToOutputs | None = None,
    first_row: int = 0,
) -> tuple[int, dict[str, Tensor]]:
    """Count the samples, and sum what :func:`skfishermask.fisher_diagonal` averages over them.

    `first_row` is the number of the first sample, on which random combinations depend.
    """
    check_n_directions(n_directions, shares=False)
    model = as_likelihood(likelihood)
    reader = JacobianReader(module, None, to_logits)

    def read(batch: Inputs, row: int) -> tuple[int, dict[str, Tensor]]:
        jacobian = reader.forward(batch, row)
        rows = _directions(model, jacobian, batch, n_directions, first_row + row)
        squares = jacobian.sum_of_squares(rows)
        if not are_finite(squares):
            raise NonFiniteGradientError(row + first_bad(batch))
        return len(rows), squares

    def are_finite(squares: Mapping[str, Tensor]) -> bool:
        # One number is read, because a device is waited for.
        return bool(torch.stack([values.isfinite().all() for values in squares.values()]).all())

    def first_bad(batch: Inputs) -> int:
        # Each sample is read alone.
        for i in range(batch_length(batch)):
            alone = slice_batch(batch, slice(i, i + 1))
            jacobian = reader.forward(alone)
            squares = jacobian.sum_of_squares(_directions(model, jacobian, alone, n_directions, 0))
            if not are_finite(squares):
                return i
        return 0

    n = 0
    with exact_mode(reader.entries.device), reader.open():
        totals = {
            name: torch.zeros_like(p, dtype=torch.float64, requires_grad=False)
            for name, p in reader.entries.parameters.items()
        }
        for n_samples, squares in read_all(batches, read, lambda: reader.most_together):
            n += n_samples
            for name, values in squares.items():
                totals[name] += values
    if n == 0:
        raise ValueError("Expected at least one sample in batches, found none.")
    return n, totals


def embedding_blocks(
    module: nn.Module,
    batches: Iterable[Inputs],
    mask: ParameterMask,
    *,
    likelihood: str | Likelihood = "categorical",
    n_directions: int | None = None,
    to_logits: ToOutputs | None = None,
    first_row: int = 0,
    head: LinearHead | None = None,
) -> Iterator[Tensor]:
    """Compute what :func:`skfishermask.fisher_embedding` does batch by batch, (n_batch, r, k).

    The blocks are in the widest dtype of the parameters, float32 at least, on the module's device.
    The network is isolated until the generator is exhausted or closed. `first_row` is as in
    :func:`diagonal_sums`. With a linear `head` they are the factors there, one row a sample:
    (n_batch, 1, d + r C).
    """
    shapes = {name: p.shape for name, p in module.named_parameters()}
    trainable = {name: shapes[name] for name in trainable_parameters(module)}
    if not trainable.items() <= mask.shapes.items() <= shapes.items():
        raise ValueError(
            f"The mask was made for parameters {_shapes(mask.shapes)}, the module has "
            f"{_shapes(trainable)}."
        )
    model = as_likelihood(likelihood)
    reader = JacobianReader(module, mask.indices, to_logits)

    def read(batch: Inputs, row: int) -> Tensor:
        jacobian = reader.forward(batch, row)
        rows = _directions(model, jacobian, batch, n_directions, first_row + row)
        block = jacobian.multiply(rows) if head is None else jacobian.factors(rows, head)
        bad = ~block.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise NonFiniteGradientError(row + int(bad.nonzero()[0]))
        return block

    with reader.open():
        yield from read_all(batches, read, lambda: reader.most_together)


def _shapes(shapes: Mapping[str, torch.Size]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())


def fisher_embedding(
    module: nn.Module,
    batches: Iterable[Inputs],
    mask: ParameterMask,
    *,
    likelihood: str | Likelihood = "categorical",
    weighting: Weighting = "probability",
    n_directions: int | float | None = None,
    dtype: torch.dtype = torch.float32,
    to_logits: ToOutputs | None = None,
) -> Tensor:
    r"""Compute the Fisher embedding V of samples at the masked parameters.

    V(x) = R(x) J(x) restricted to the mask's columns, with J the Jacobian of the logits and
    R a factor of diag(p) - p p^T, so that :math:`V^\top V` is the masked Fisher information
    :math:`\sum_c p_c g_c g_c^\top` of the sample.

    Parameters
    ----------
    module : nn.Module
        A classifier. It is read in evaluation mode and left as it was.
    batches : iterable of tensor, list of tensors or dict of tensors
        What the module's forward takes first, samples along the first axis; a dict gives
        keyword arguments. Moved to the module's device; in the dtypes that forward takes.
    mask : ParameterMask
        The parameters to look at, k of them.
    likelihood : str or Likelihood, default="categorical"
        The distribution of a label, given the module's outputs: ``"categorical"``,
        ``"bernoulli"`` or ``"gaussian"``, a :class:`skfishermask.fisher.Categorical`,
        :class:`skfishermask.fisher.Bernoulli` or :class:`skfishermask.fisher.Gaussian`, or an
        object of your own (:class:`skfishermask.fisher.Likelihood`).
    weighting : {"probability", "none"}
        ``"none"`` leaves the probabilities out: rows :math:`g_c` (r = C), as in the
        FisherMask authors' code.
    n_directions : int or float, optional
        None: all C - 1 rows, exact. An int: that many leading rows, the classes sorted by
        falling probability; the cost of everything falls in proportion. A float in (0, 1):
        as many as keep that share of the trace of diag(p) - p p^T over all samples, found
        by a forward pass of its own.
    dtype : torch.dtype
        Storage of V; the computation is in the widest dtype of the parameters.
    to_logits : callable, optional
        Maps the module's output to logits (n, C). Default: it is logits, a tuple that
        begins with them, or an object that has them as ``.logits``.

    Returns
    -------
    Tensor of shape (n, r, k)
        On the module's device. Columns are in the mask's order.

    Raises
    ------
    ValueError
        As for :func:`skfishermask.fisher_diagonal`, or if the mask was made for another network.
    TypeError
        If `n_directions` is a float and `batches` an iterator, which can be read only once.

    References
    ----------
    FisherMask, arXiv 2411.05752; the objective is that of BAIT: Ash et al., "Gone Fishing:
    Neural Active Learning with Fisher Embeddings", NeurIPS 2021.

    Examples
    --------
    >>> import torch
    >>> from skfishermask import ParameterMask, fisher_diagonal, fisher_embedding
    >>> module, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
    >>> diagonal = fisher_diagonal(module, [x])
    >>> mask = ParameterMask.from_diagonal(diagonal, "global", 5, output_layer=[])
    >>> fisher_embedding(module, [x], mask).shape
    torch.Size([8, 2, 5])
    """
    check_n_directions(n_directions)
    r = None if n_directions is None else int(n_directions)
    if n_directions is not None and n_directions < 1:  # a share, of any type of float
        r = directions_for_share(
            module, batches, n_directions, likelihood=likelihood, to_logits=to_logits
        )
    if weighting == "none":
        if type(as_likelihood(likelihood)) is not Categorical:
            raise ValueError(f'weighting="none" is for classes, found likelihood={likelihood!r}.')
        likelihood = UnweightedCategorical()
    blocks = embedding_blocks(
        module, batches, mask, likelihood=likelihood, n_directions=r, to_logits=to_logits
    )
    V = [block.to(dtype) for block in blocks]
    if not V:
        raise ValueError("Expected at least one sample in batches, found none.")
    # Batches of shorter sequences have fewer rows.
    r = max(block.shape[1] for block in V)
    return torch.cat([nn.functional.pad(block, (0, 0, 0, r - block.shape[1])) for block in V])
