"""What a network predicts: its outputs, batch by batch, and what their likelihood makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from skfishermask.fisher.directions import directions_that_keep, squared_norms
from skfishermask.fisher.likelihood import as_likelihood
from skfishermask.fisher.output_likelihood import Likelihood, OutputLikelihood
from skfishermask.jacobian import (
    Inputs,
    ToOutputs,
    batch_length,
    exact_mode,
    isolated,
    read_outputs,
    slice_batch,
)

_T = TypeVar("_T")


class ReadOptions(TypedDict, total=False):
    """How a network's outputs are read, see :func:`skfishermask.fisher_diagonal`."""

    likelihood: str | Likelihood
    to_logits: ToOutputs | None


def read_all(
    batches: Iterable[Inputs],
    read: Callable[[Inputs, int], _T],
    most_together: Callable[[], int | None] = lambda: None,
) -> Iterator[_T]:
    """Read batches, and where the device's memory runs out, halves of them from then on.

    `read` is given a batch and the number of its first sample. Batches of more samples than
    `most_together` returns are read in equal parts.
    """
    row, most = 0, None
    for batch in batches:
        n, start = batch_length(batch), 0
        while start < n:
            limit = min(most or n, most_together() or n)
            stop = start + -(-(n - start) // -(-(n - start) // limit))
            try:
                result = read(slice_batch(batch, slice(start, stop)), row + start)
            except torch.OutOfMemoryError as error:
                if stop - start == 1:
                    raise torch.OutOfMemoryError(
                        "Out of device memory with a single sample in the batch. A smaller "
                        f"mask_fraction or n_directions needs less. PyTorch said: {error}"
                    ) from error
                most = (stop - start + 1) // 2
            else:
                yield result
                start = stop
                continue
            # Not inside the handler: its traceback would hold on to the memory.
            torch.cuda.empty_cache()
        row += n


def map_outputs(
    function: Callable[[OutputLikelihood, Tensor, Tensor | None, Inputs], _T],
    module: nn.Module,
    batches: Iterable[Inputs],
    *,
    likelihood: str | Likelihood = "categorical",
    to_logits: ToOutputs | None = None,
) -> list[_T]:
    """Compute a function of each batch's outputs: the network in evaluation mode, left as it was.

    The function is given the likelihood, outputs (n, ...) that it has checked, the positions that
    count, and the batch. The other arguments are those of :func:`skfishermask.fisher_diagonal`.
    """
    model = as_likelihood(likelihood)

    def read(batch: Inputs, first_row: int) -> _T:
        outputs = read_outputs(module, batch, to_logits, first_row)
        model.check_samples(outputs)
        return function(model, outputs, model.counted(batch, outputs), batch)

    device = next(module.parameters()).device
    with isolated(module), exact_mode(device), torch.no_grad():
        return list(read_all(batches, read))


def predicted_means(
    module: nn.Module,
    batches: Iterable[Inputs],
    *,
    likelihood: str | Likelihood = "categorical",
    to_logits: ToOutputs | None = None,
) -> Tensor:
    """Predict the mean of each label's distribution.

    Parameters
    ----------
    module, batches, likelihood, to_logits
        As in :func:`skfishermask.fisher_diagonal`.

    Returns
    -------
    Tensor of shape (n, C)
        Class probabilities, float64, on the module's device; of other likelihoods as their
        outputs.
    """
    options: ReadOptions = {"likelihood": likelihood, "to_logits": to_logits}
    return torch.cat(
        map_outputs(lambda model, outputs, *_: model.mean(outputs), module, batches, **options)
    )


@dataclass(frozen=True)
class Predictions:
    """What a network predicts for n samples, as far as a query needs it."""

    uncertainty: Tensor  # (n,), see `OutputLikelihood.uncertainty`
    # What the samples are described by, (n, d); None where it is not wanted, or not of one length.
    inputs: Tensor | None = None

    def to(self, device: torch.device | str) -> Predictions:
        """Return the same on another device."""
        inputs = None if self.inputs is None else self.inputs.to(device)
        return Predictions(self.uncertainty.to(device), inputs)

    @property
    def nbytes(self) -> int:
        """Size of both tensors."""
        return self.uncertainty.nbytes + (0 if self.inputs is None else self.inputs.nbytes)

    @staticmethod
    def concatenate(sets: Sequence[Predictions]) -> Predictions:
        """Return the predictions for all samples of several sets."""
        return Predictions(
            torch.cat([one.uncertainty for one in sets]),
            in_one_length([one.inputs for one in sets]),
        )


def in_one_length(several: Sequence[Tensor | None]) -> Tensor | None:
    """Concatenate inputs (n, d); None where some are missing, or where they differ in d."""
    inputs = [one for one in several if one is not None]
    is_one_length = len({one.shape[1] for one in inputs}) == 1
    return torch.cat(inputs) if is_one_length and len(inputs) == len(several) else None


def predict(
    module: nn.Module,
    batches: Iterable[Inputs],
    *,
    inputs: Callable[[Inputs], Tensor | None] | None = None,
    **options: Unpack[ReadOptions],
) -> Predictions:
    """Predict the label of each sample, in float64, on the module's device.

    `inputs` is given each batch after the network has read it, and returns what describes its
    samples, (n, d).
    """

    def of_batch(
        model: OutputLikelihood, outputs: Tensor, counted: Tensor | None, batch: Inputs
    ) -> Predictions:
        return Predictions(model.uncertainty(outputs, counted), inputs and inputs(batch))

    return Predictions.concatenate(map_outputs(of_batch, module, batches, **options))


def direction_norms(
    module: nn.Module, batches: Iterable[Inputs], **options: Unpack[ReadOptions]
) -> Tensor:
    """Sum the squared norms of each row of R(x) over samples: (rank,), float64, on the CPU."""

    def norms(model: OutputLikelihood, outputs: Tensor, *_: object) -> Tensor:
        if not model.is_ordered(outputs):
            raise ValueError(
                "n_directions as a share of the trace needs directions in order of it, which "
                f"{type(model).__name__} has not for outputs of shape {tuple(outputs.shape)}: "
                "expected an int, the number of random combinations, or None."
            )
        return squared_norms(model.factor(outputs))

    return torch.stack(map_outputs(norms, module, batches, **options)).sum(0).cpu()


def largest_rank(
    module: nn.Module, batches: Iterable[Inputs], **options: Unpack[ReadOptions]
) -> int:
    """Return the number of rows of the exact factor R(x), in the batch with the most.

    Sequences of several lengths have several numbers of them.
    """
    ranks = map_outputs(lambda model, outputs, *_: model.rank(outputs), module, batches, **options)
    return max(ranks, default=0)


def directions_for_share(
    module: nn.Module,
    batches: Iterable[Inputs],
    share: float,
    *,
    likelihood: str | Likelihood = "categorical",
    to_logits: ToOutputs | None = None,
) -> int:
    """Find how many directions keep a share of the trace of R^T R.

    Parameters
    ----------
    module, batches, likelihood, to_logits
        As in :func:`skfishermask.fisher_diagonal`; `batches` must be readable again.
    share : float
        The share of the trace, summed over the samples; between 0 and 1.

    Returns
    -------
    int
        The smallest such number.
    """
    if isinstance(batches, Iterator):
        raise TypeError(
            "A float n_directions reads batches twice, so it must be a list, a DataLoader or the "
            f"like, found {type(batches).__name__}."
        )
    return directions_that_keep(
        direction_norms(module, batches, likelihood=likelihood, to_logits=to_logits), share
    )
