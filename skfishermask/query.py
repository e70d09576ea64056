"""One query: the steps of the method, from a fitted net and the data it sees to a batch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor
from tqdm.auto import tqdm

from skfishermask.data import (
    ChunkBatches,
    DaskPool,
    NetBatches,
    NetModule,
    as_rows,
    check_finite,
    n_samples,
    naming_rows,
    net_module,
    not_finite,
    to_logits_of,
)
from skfishermask.fisher import (
    HELD_BYTES,
    Batch,
    FisherSum,
    NonFiniteOutputError,
    ParameterMask,
    embedding_blocks,
    fisher_diagonal,
    fisher_matrix,
    mask_size,
    n_rows,
    n_rows_for_share,
    output_layer,
    predicted_probabilities,
)
from skfishermask.selection import (
    EMBEDDING_DTYPES,
    Needs,
    Objective,
    Room,
    StoredEmbedding,
    coordinates,
    find_batch,
    stored,
)
from skfishermask.selection import (
    Batch as Chosen,
)

# The masks that are chosen without looking at the diagonal Fisher information.
_BLIND_MASKS = ("random", "output_layer", "all")


def _check_n_instances(n_instances: Any, n_pool: int) -> int:
    if n_pool == 0:
        raise ValueError("Expected a pool with at least one sample, found an empty one.")
    if not isinstance(n_instances, Integral) or isinstance(n_instances, bool):
        raise ValueError(f"n_instances must be an int, got {n_instances!r}.")
    n: int = int(n_instances)
    if not 1 <= n <= n_pool:
        raise ValueError(
            f"n_instances must be between 1 and the {n_pool} samples of the pool, "
            f"got {n_instances}."
        )
    return n


def _check_same_samples(X_pool: Any, X_labeled: Any) -> None:
    found, expected = (
        X.shape[1:] if isinstance(X, np.ndarray | torch.Tensor) else () for X in (X_pool, X_labeled)
    )
    if found and expected and found != expected:
        raise ValueError(
            f"X_pool has samples of shape {tuple(found)}, but the labelled samples have shape "
            f"{tuple(expected)}."
        )


def _describe(batch: Batch) -> str:
    if isinstance(batch, torch.Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} of shape {tuple(batch.shape)}"
    if isinstance(batch, dict):
        return "{" + ", ".join(f"{key!r}: {_describe(part)}" for key, part in batch.items()) + "}"
    return f"[{', '.join(map(_describe, batch))}]"


class Query:
    """One query: the net, the data that it sees, and the steps of the method.

    Parameters
    ----------
    parameters : object
        Has the parameters of :class:`skfishermask.FisherMaskSampler` as attributes.
    net : skorch classifier
        Fitted.
    X_pool : array-like, dict, Dataset or DaskPool
        What the net takes in ``predict``.
    X_labeled : array-like, dict, Dataset or None
        The same.
    n_instances : int
        Number of samples to choose.

    Attributes
    ----------
    mask : ParameterMask
        The mask, after :meth:`run`.
    diagonal : dict of str to Tensor, or None
        Diagonal Fisher information on the CPU, where the mask looked at it.
    info : dict
        See :class:`skfishermask.FisherMaskSampler`.
    """

    def __init__(
        self,
        parameters: Any,
        net: Any,
        X_pool: Any,
        X_labeled: Any,
        n_instances: int,
    ) -> None:
        self._p = parameters
        self._net = net
        self._module = NetModule(net)
        # The chunks of a DaskPool are checked when they are computed.
        in_chunks = isinstance(X_pool, DaskPool)
        self._X_pool = X_pool if in_chunks else as_rows(X_pool, "X_pool")
        self._n_pool = len(X_pool) if in_chunks else n_samples(net, self._X_pool)
        self._n_instances = _check_n_instances(n_instances, self._n_pool)
        self._n_labeled = 0
        if X_labeled is not None:
            self._X_labeled = as_rows(X_labeled, "X_labeled")
            self._n_labeled = n_samples(net, self._X_labeled)
            _check_same_samples(self._X_pool, self._X_labeled)
            check_finite(self._X_labeled, "X_labeled")
        if not in_chunks:
            check_finite(self._X_pool, "X_pool")
        limit = parameters.max_candidates
        if limit is not None and limit < n_instances:
            raise ValueError(
                f"max_candidates={limit} leaves fewer candidates than n_instances={n_instances}."
            )
        folder = parameters.scratch_folder
        if folder is not None and not os.path.isdir(folder):
            raise ValueError(f"scratch_folder must be an existing folder, got {folder!r}.")
        self._device = next(self._module.parameters()).device
        self._room = Room(self._device, parameters.memory_share, folder)
        self._to_logits = to_logits_of(net, parameters.to_logits)
        self._rng = check_random_state(parameters.random_state)
        self._seconds: dict[str, float] = {}
        self.mask: ParameterMask
        self.diagonal: dict[str, Tensor] | None = None
        self._fisher_labeled: Tensor | None = None
        self.info: dict[str, Any] = {}

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Go through the steps.

        Returns
        -------
        indices : ndarray of shape (n_instances,), int64
            Rows of the pool in the order chosen.
        gains : ndarray of shape (n_instances,), float64
            Decrease of the objective when each was chosen.
        """
        start = time.perf_counter()
        first = self._first_of_pool()
        n_classes = self._n_classes(first, "pool", "X_pool")
        self._module = net_module(self._net, first, self._to_logits)
        if self._n_labeled:
            labeled = self._batches(self._X_labeled, np.arange(1))
            self._n_classes(next(iter(labeled)), "labelled data", "X_labeled")
        rows = self._candidates()
        sample = self._mask_sample()
        r = self._n_directions(n_classes, sample)
        output = output_layer(self._module, first, to_logits=self._to_logits)
        if self._p.mask not in _BLIND_MASKS:
            # Before the diagonal; a relative mask may turn out smaller, so it is asked after.
            k = self._largest_mask(output)
            if self._p.mask != "relative":
                self._place(self._needs(len(rows), r, k))
        with self._step("diagonal"):
            self.mask = self._make_mask(output, sample, r)
        needs = self._needs(len(rows), r, len(self.mask))
        place = self._place(needs)
        found = self._choose(rows, needs, place)
        self._seconds["total"] = time.perf_counter() - start
        self.info = {
            "seconds": self._seconds,
            "n_candidates": len(rows),
            "n_labeled": self._n_labeled,
            "n_directions": r,
            "mask_size": needs.k,
            "embedding_bytes": needs.embedding,
            "embedding_storage": place,
            "dimensions": found.dimensions,
            "objective": found.objective,
            "candidates_read": found.n_read,
            **self._told(),
        }
        return rows[found.positions.cpu().numpy()], found.gains.cpu().numpy()

    def _told(self) -> dict[str, Any]:
        """Give what there is to say of a query of this kind alone."""
        return {}

    def _choose(self, rows: np.ndarray, needs: Needs, place: str) -> Chosen:
        """Embed the candidates, and choose among them."""
        with ExitStack() as cleanup:
            return self._select(rows, self._room.make(place, needs, cleanup), needs)

    def _select(self, rows: np.ndarray, V: StoredEmbedding, needs: Needs) -> Chosen:
        """Embed the candidates into V, and choose among them."""
        few_rows = needs.dimensions < needs.k
        with self._step("embedding"):
            labeled = self._embed_labeled(needs.r, keep=few_rows)
            self._embed(rows, V)
        with self._bar(2 * len(V), "Preparing", "sample") as bar:
            with self._step("fisher"):
                if few_rows:
                    # In no more dimensions than there are rows.
                    mine, labeled = coordinates(V, labeled)
                    V = stored(mine)
                    self._fisher_labeled = None if labeled is None else fisher_matrix(labeled)
                fisher = None
                if not self._aims_at_identity:
                    total = FisherSum(V.shape[2], V.device)
                    for _, values in V.chunks():
                        total.add(values)
                        bar.update(len(values))
                    fisher = total.mean()
                fisher = self._target(fisher, len(V), V.shape[2])
            with self._step("selection"):
                return self._found(rows, V, self._objective(fisher), bar.update)

    def _found(
        self,
        rows: np.ndarray,
        V: StoredEmbedding,
        objective: Objective,
        on_prepared: Callable[[int], object],
    ) -> Chosen:
        first = self._by_entropy(rows)
        with self._picks_bar(len(rows)) as bar:
            found = find_batch(
                V,
                objective,
                lazy=self._p.lazy,
                preselected=first,
                on_pick=bar.update,
                on_prepared=on_prepared,
            )
        return self._whole(found, V.shape[2])

    def _whole(self, found: Chosen, k: int) -> Chosen:
        """Count what of tr(M^-1) lies outside of the k coordinates, where M is a multiple of I."""
        if not self._aims_at_identity:
            return found
        outside = (len(self.mask) - k) / self._p.regularization
        before, after = found.objective
        return replace(found, objective=(before + outside, after + outside))

    @property
    def _aims_at_identity(self) -> bool:
        aims: bool = self._p.target == "identity"
        return aims

    def _objective(self, fisher: Tensor) -> Objective:
        """Say what to choose by."""
        return Objective(
            self._n_instances,
            fisher,
            fisher_labeled=self._fisher_labeled if self._p.use_labeled else None,
            n_labeled=self._n_labeled if self._p.use_labeled else 0,
            regularization=self._p.regularization,
            oversample=self._p.oversample,
        )

    def _picks_bar(self, n: int) -> Any:
        # With `oversample` more are taken than are kept.
        total = min(n, math.ceil(self._p.oversample * self._n_instances))
        return self._bar(total, "Selection", "pick")

    def _bar(self, total: int, text: str, unit: str) -> Any:
        return tqdm(total=total, desc=text, unit=unit, disable=not self._p.verbose)

    def _first_of_pool(self) -> Batch:
        if isinstance(self._X_pool, DaskPool):
            return next(iter(self._X_pool.first(self._net)))
        return next(iter(self._batches(self._X_pool, np.arange(1))))

    def _n_classes(self, first: Batch, what: str, name: str) -> int:
        """Try the network on one sample, before any long work."""
        try:
            p = predicted_probabilities(self._module, [first], to_logits=self._to_logits)
        except torch.OutOfMemoryError:
            raise
        except NonFiniteOutputError as error:
            raise not_finite(0, name, self._to_logits) from error
        except (RuntimeError, IndexError, TypeError) as error:
            raise ValueError(
                f"The network cannot read the {what}. The first sample is {_describe(first)}, and "
                f"PyTorch says: {error}"
            ) from error
        return p.shape[1]

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds[name] = time.perf_counter() - start

    def _batches(self, X: Any, rows: np.ndarray | None = None) -> NetBatches | ChunkBatches:
        if isinstance(X, DaskPool):
            rows = np.arange(len(X)) if rows is None else rows
            return ChunkBatches(self._net, X, rows, self._p.batch_size)
        name = "X_pool" if X is self._X_pool else "X_labeled"
        return NetBatches(self._net, X, rows, self._p.batch_size, name)

    def _progress(self, batches: Iterable[Any], total: int, text: str) -> Iterable[Any]:
        return tqdm(batches, total=total, desc=text, unit="batch") if self._p.verbose else batches

    def _candidates(self) -> np.ndarray:
        limit = self._p.max_candidates
        if limit is None or limit >= self._n_pool:
            return np.arange(self._n_pool)
        return np.sort(self._rng.choice(self._n_pool, limit, replace=False))

    def _mask_sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Draw samples for the diagonal: rows of the labelled ones, and of the pool."""
        n = self._n_labeled + self._n_pool
        wanted = min(self._p.n_mask_samples or n, n)
        drawn = np.sort(self._rng.choice(n, wanted, replace=False))
        labeled, pool = drawn[drawn < self._n_labeled], drawn[drawn >= self._n_labeled]
        return labeled, pool - self._n_labeled

    def _sample_batches(
        self, sample: tuple[np.ndarray, np.ndarray]
    ) -> list[NetBatches | ChunkBatches]:
        labeled, pool = sample
        batches = [self._batches(self._X_pool, pool)]
        if len(labeled):
            batches.insert(0, self._batches(self._X_labeled, labeled))
        return batches

    def _n_directions(self, n_classes: int, sample: tuple[np.ndarray, np.ndarray]) -> int:
        most = n_rows(n_classes, self._p.weighting)
        wanted = self._p.n_directions
        if isinstance(wanted, Real) and not isinstance(wanted, Integral):
            wanted = n_rows_for_share(self._sample_probabilities(sample), float(wanted))
        return most if wanted is None else min(int(wanted), most)

    def _sample_probabilities(self, sample: tuple[np.ndarray, np.ndarray]) -> Tensor:
        parts = self._sample_batches(sample)
        with naming_rows(parts, self._to_logits):
            return predicted_probabilities(
                self._module, chain.from_iterable(parts), to_logits=self._to_logits
            )

    def _sample_diagonal(self, sample: tuple[np.ndarray, np.ndarray], r: int) -> dict[str, Tensor]:
        parts = self._sample_batches(sample)
        total = sum(map(len, parts))
        batches = self._progress(chain.from_iterable(parts), total, "Fisher diagonal")
        with naming_rows(parts, self._to_logits):
            return fisher_diagonal(self._module, batches, n_directions=r, to_logits=self._to_logits)

    def _make_mask(
        self, output: list[str], sample: tuple[np.ndarray, np.ndarray], r: int
    ) -> ParameterMask:
        if self._p.mask in _BLIND_MASKS:
            diagonal = {name: torch.zeros(p.shape) for name, p in self._module.named_parameters()}
        else:
            diagonal = self._sample_diagonal(sample, r)
            # On the CPU, so that a sampler pickled on a machine with CUDA loads on one without.
            diagonal = self.diagonal = {name: d.cpu() for name, d in diagonal.items()}
        return ParameterMask.from_diagonal(
            diagonal,
            self._p.mask,
            self._p.mask_fraction,
            output_layer=output,
            random_state=self._rng,
        )

    def _largest_mask(self, output: list[str]) -> int:
        sizes = {name: p.numel() for name, p in self._module.named_parameters()}
        n_output = sum(sizes[name] for name in output)
        return mask_size(self._p.mask_fraction, sum(sizes.values()), n_output)

    def _needs(self, n: int, r: int, k: int) -> Needs:
        dtype = EMBEDDING_DTYPES[self._p.embedding_dtype]
        return Needs(n, r, k, dtype, self._n_labeled, HELD_BYTES)

    def _place(self, needs: Needs) -> str:
        """Say where the embedding goes; raise MemoryError where it cannot go anywhere."""
        return self._room.place(needs)

    def _blocks(self, X: Any, rows: np.ndarray | None, r: int, text: str) -> Iterator[Tensor]:
        batches = self._batches(X, rows)
        with naming_rows([batches], self._to_logits):
            yield from embedding_blocks(
                self._module,
                self._progress(batches, len(batches), text),
                self.mask,
                weighting=self._p.weighting,
                n_directions=r,
                to_logits=self._to_logits,
            )

    def _embed_labeled(self, r: int, keep: bool = False) -> Tensor | None:
        """Embed the labelled samples for their mean Fisher matrix, or to `keep` them embedded."""
        if self._n_labeled == 0:
            return None
        blocks = self._blocks(self._X_labeled, None, r, "Labelled")
        if keep:
            return torch.cat(list(blocks))
        total = FisherSum(len(self.mask), self._device)
        for block in blocks:
            total.add(block)
        self._fisher_labeled = total.mean()
        return None

    def _embed(self, rows: np.ndarray, V: StoredEmbedding) -> None:
        every = None if len(rows) == self._n_pool else rows
        start = 0
        for block in self._blocks(self._X_pool, every, V.shape[1], "Fisher embedding"):
            V.write(start, block)
            start += len(block)

    def _target(self, fisher: Tensor | None, n: int, k: int) -> Tensor:
        """Give F of the n candidates' mean Fisher matrix; None stands for the identity."""
        if fisher is None:
            return torch.eye(k, dtype=torch.float64, device=self._device)
        if self._fisher_labeled is None:
            return fisher
        n_labeled = self._n_labeled
        return (n * fisher + n_labeled * self._fisher_labeled) / (n + n_labeled)

    def _by_entropy(self, rows: np.ndarray) -> list[int]:
        """Give the positions of the most uncertain candidates, for the hybrid."""
        n = round(self._p.entropy_share * self._n_instances)
        if n == 0:
            return []
        p = self._pool_probabilities(rows)
        order = torch.special.entr(p).sum(1).sort(descending=True, stable=True).indices
        first: list[int] = order[:n].tolist()
        return first

    def _pool_probabilities(self, rows: np.ndarray) -> Tensor:
        batches = self._batches(self._X_pool, rows)
        return predicted_probabilities(self._module, batches, to_logits=self._to_logits)
