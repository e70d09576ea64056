"""Rows R(x) J(x) of a network for one batch, at chosen parameter entries.

One forward pass records, by hooks, the input of every layer that holds a wanted parameter and
the gradient edge of its output; one backward pass per direction brings the gradients at those
outputs; the layer rules contract the two. Parameters that no rule explains are read sample by
sample instead. Which are which is decided on the first batch, from the autograd graph: every
use of a parameter must be a recorded call of a layer with a rule, and the gradients of half
of the samples must not reach the slices of the other half.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from skfishermask.fisher.layers import Contraction, Rule, rule_for
from skfishermask.fisher.network import (
    Batch,
    ToLogits,
    autograd_graph,
    batch_length,
    batch_map,
    check_logits,
    logits_of,
    move,
    rows_of,
)
from skfishermask.fisher.visit import visiting

# Dense per-sample gradients, of parameters without a rule, are formed for so many numbers at once.
_CHUNK = 1 << 24


def _one_kind(parameters: Mapping[str, Tensor]) -> tuple[torch.device, torch.dtype]:
    kinds = {(str(p.dtype), str(p.device)) for p in parameters.values()}
    if len(kinds) != 1:
        found = ", ".join(f"{dtype} on {device}" for dtype, device in sorted(kinds))
        raise ValueError(
            "Expected all parameters of the network to have one dtype and one device, "
            f"found {found or 'no parameters'}."
        )
    first = next(iter(parameters.values()))
    return first.device, first.dtype


@dataclass(frozen=True)
class _Call:
    """One recorded call of a layer."""

    module: nn.Module
    rule: Rule
    x: Tensor
    version: int
    edge: GradientEdge

    def check_unchanged(self) -> None:
        if self.x._version != self.version:
            raise RuntimeError(
                f"The input of a {type(self.module).__name__} was overwritten in place after it "
                "was used, so its gradients cannot be read. Make that operation out of place."
            )


class JacobianReader:
    """Reads R(x) J(x) of one network, batch by batch.

    Parameters
    ----------
    module : nn.Module
        The network. In evaluation mode its output for a sample must not depend on the other
        samples of the batch.
    entries : dict of str to Tensor, optional
        Parameter name -> flat indices of the wanted entries, int64. None: whole parameters,
        which :meth:`squares` alone can serve.
    to_logits : callable, optional
        Maps the module's output to logits (n, C). Default: it is logits, or a tuple whose
        first element is.

    Raises
    ------
    ValueError
        If the parameters differ in dtype or device, or `entries` names an unknown one.
    """

    def __init__(
        self,
        module: nn.Module,
        entries: Mapping[str, Tensor] | None = None,
        to_logits: ToLogits | None = None,
    ) -> None:
        self.module = module
        self.to_logits = to_logits
        self.parameters = dict(module.named_parameters())
        self._name_of = {id(p): name for name, p in self.parameters.items()}
        self.wanted = dict.fromkeys(self.parameters if entries is None else entries)
        unknown = [name for name in self.wanted if name not in self.parameters]
        if unknown:
            raise ValueError(f"The module has no parameter {unknown[0]!r}.")
        self.device, self.dtype = _one_kind(self.parameters)
        self.entries = None
        if entries is not None:
            self.entries = {name: index.to(self.device) for name, index in entries.items()}
        # Decided on the first batch: how many calls explain each wanted parameter; absent
        # are those whose gradient the rules do not explain.
        self._calls_of: dict[str, int] | None = None
        self._calls: list[_Call] = []
        self._batch: Batch = None
        self._n = 0
        self._recording = False
        self._vectorize = True

    @contextmanager
    def open(self) -> Iterator[JacobianReader]:
        """Visit the network: hooks on, evaluation mode, and no trace afterwards."""
        wanted = {id(self.parameters[name]) for name in self.wanted}
        with visiting(self.module), ExitStack() as hooks:
            for module in self.module.modules():
                owned = {id(p) for p in module._parameters.values() if p is not None}
                rule = rule_for(module)
                if rule is not None and owned & wanted:
                    # First of all hooks: another one may replace the output.
                    handle = module.register_forward_hook(
                        partial(self._record, rule), prepend=True, with_kwargs=True
                    )
                    hooks.callback(handle.remove)
            for name in self.wanted:
                self.parameters[name].requires_grad_(True)
            try:
                yield self
            finally:
                self._calls, self._batch = [], None

    def _record(self, rule: Rule, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not (self._recording and isinstance(output, Tensor) and output.requires_grad):
            return
        inputs = [*args, *kwargs.values()]
        x = inputs[0]
        fits = len(inputs) == 1 and isinstance(x, Tensor) and rule.accepts(module, x, output)
        if fits and len(x) == len(output) and len(x) % self._n == 0:
            # The edge, not the tensor: an in-place ReLU may overwrite the output.
            edge = get_gradient_edge(output)
            self._calls.append(_Call(module, rule, x.detach(), x._version, edge))

    def forward(self, batch: Batch, first_row: int = 0) -> Tensor:
        """Run a forward pass and record it.

        Parameters
        ----------
        batch : tensor, list of tensors or dict of tensors
            Samples first, on the network's device.
        first_row : int
            The number of the batch's first sample, for messages.

        Returns
        -------
        Tensor of shape (n, C)
            The logits, with their graph.

        Raises
        ------
        ValueError
            If the logits have another shape, are not finite, or of a sample depend on the
            other samples of the batch.
        """
        self._calls, self._n, self._recording = [], batch_length(batch), True
        try:
            self._batch = move(batch, self.module)
            logits = logits_of(self.module, self._batch, self.to_logits)
        finally:
            self._recording = False
        check_logits(logits, self._n, first_row)
        if self._calls_of is None:
            self._calls_of = self._decide(logits)
        return logits

    def _decide(self, logits: Tensor) -> dict[str, int]:
        """Count, for each parameter that the rules explain, the calls that use it."""
        uses, reached = autograd_graph(logits, self._name_of)
        calls = [call for call in self._calls if call.edge.node in reached]
        clean = self._samples_first(logits, calls)
        if not all(clean):
            self._check_independent(logits)
        explained: Counter[str] = Counter()
        for call, ok in zip(calls, clean, strict=True):
            explained.update(name for _, name in self._own(call) if ok)
        return {name: uses[name] for name in self.wanted if uses[name] == explained[name]}

    @property
    def loose(self) -> list[str]:
        """Names of the wanted parameters that no rule explains; known after the first batch."""
        return [name for name in self.wanted if name not in (self._calls_of or {})]

    def _own(self, call: _Call) -> Iterator[tuple[str, str]]:
        """Give the names, in the layer and in the network, of the call's wanted parameters."""
        for local in ("weight", "bias"):
            p = call.module._parameters.get(local)
            if p is not None and (name := self._name_of[id(p)]) in self.wanted:
                yield local, name

    def _samples_first(self, logits: Tensor, calls: list[_Call]) -> list[bool]:
        """Tell, call by call, whether the gradients of half of the samples stay among them."""
        if self._n == 1 or not calls:
            return [True] * len(calls)
        weights = torch.linspace(1, 2, logits.numel(), dtype=logits.dtype, device=logits.device)
        weights = weights.view_as(logits).clone()
        weights[1::2] = 0
        grads = self._backward(logits, calls, weights, last=False)
        return [g is None or not g.unflatten(0, (self._n, -1))[1::2].any() for g in grads]

    def _check_independent(self, logits: Tensor) -> None:
        hint = (
            "In evaluation mode the network's output for a sample must not depend on the other "
            "samples of its batch (a BatchNorm with track_running_stats=False does that)"
        )
        with torch.no_grad():
            try:
                alone = logits_of(self.module, rows_of(self._batch, slice(1)), self.to_logits)
            except ValueError as error:
                raise ValueError(f"{hint}; alone it gave: {error}") from error
        scale = logits.detach().abs().max()
        gap = (alone - logits[:1]).abs().max()
        if gap > scale * torch.finfo(logits.dtype).eps ** 0.5:
            raise ValueError(f"{hint}; alone, its logits differ by {float(gap):.3g}.")

    def _backward(
        self, logits: Tensor, calls: list[_Call], weights: Tensor, *, last: bool
    ) -> Sequence[Tensor | None]:
        """Give the gradients of sum(weights * logits) at the outputs of the calls."""
        edges = [call.edge for call in calls]
        return torch.autograd.grad(
            logits, edges, grad_outputs=weights, retain_graph=not last, allow_unused=True
        )

    def _contractions(
        self,
        logits: Tensor,
        rows: Tensor,
        names: Collection[str],
        prepare: Callable[[_Call, dict[str, str]], Contraction],
    ) -> Iterator[tuple[int, str, Tensor]]:
        """Run one backward pass a direction; give direction, parameter and contraction."""
        if not logits.requires_grad:
            return
        own_of = [{k: v for k, v in self._own(call) if v in names} for call in self._calls]
        calls = [call for call, own in zip(self._calls, own_of, strict=True) if own]
        own_of = [own for own in own_of if own]
        prepared = [prepare(call, own) for call, own in zip(calls, own_of, strict=True)]
        if not calls:
            return
        n_rows = rows.shape[1]
        for i in range(n_rows):
            grads = self._backward(logits, calls, rows[:, i], last=i == n_rows - 1)
            for call, own, contract, g in zip(calls, own_of, prepared, grads, strict=True):
                call.check_unchanged()
                if g is not None:
                    for local, values in contract(g).items():
                        yield i, own[local], values

    def embed(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Contract one batch into its Fisher embedding.

        Parameters
        ----------
        logits : Tensor of shape (n, C)
            What the last call of :meth:`forward` returned. Its graph is freed.
        rows : Tensor of shape (n, r, C)
            Directions R(x).

        Returns
        -------
        Tensor of shape (n, r, k)
            R(x) J(x) at the entries, in the order of `entries`.
        """
        if self.entries is None:
            raise ValueError("A reader of whole parameters has no entries to embed at.")
        all_entries = self.entries
        rows = rows.to(self.dtype)
        spans, start = {}, 0
        for name, index in all_entries.items():
            spans[name] = slice(start, start := start + len(index))
        out = torch.zeros(*rows.shape[:2], start, dtype=self.dtype, device=self.device)

        def prepare(call: _Call, own: dict[str, str]) -> Contraction:
            entries = {local: all_entries[name] for local, name in own.items()}
            return call.rule.gather(call.module, call.x, self._n, entries)

        with torch.no_grad():
            explained = self._calls_of or {}
            for i, name, values in self._contractions(logits, rows, explained, prepare):
                out[:, i, spans[name]].add_(values)
            for samples, name, values in self._sample_by_sample(rows, self.loose):
                out[samples, :, spans[name]] = values.flatten(2)[:, :, all_entries[name]]
        return out

    def squares(self, logits: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Sum the squares of R(x) J(x) of one batch over samples and directions.

        Parameters
        ----------
        logits, rows
            As in :meth:`embed`.

        Returns
        -------
        dict of str to Tensor
            Wanted parameter name -> tensor of the parameter's shape.
        """
        rows = rows.to(self.dtype)
        totals = {name: torch.zeros_like(self.parameters[name]) for name in self.wanted}
        # The contributions of several calls must add up before they are squared.
        once = {name for name, n_calls in (self._calls_of or {}).items() if n_calls <= 1}

        def prepare(call: _Call, own: dict[str, str]) -> Contraction:
            return call.rule.squares(call.module, call.x, self._n, own)

        with torch.no_grad():
            for _, name, values in self._contractions(logits, rows, once, prepare):
                totals[name].add_(values)
            loose = [name for name in self.wanted if name not in once]
            for _, name, values in self._sample_by_sample(rows, loose):
                totals[name] += values.square().sum(dim=(0, 1))
        return totals

    def _sample_by_sample(
        self, rows: Tensor, names: list[str]
    ) -> Iterator[tuple[slice, str, Tensor]]:
        """Give (samples, name, gradients (m, r, *shape)) of parameters without a rule."""
        if not names:
            return
        n, r = rows.shape[:2]
        numel = sum(self.parameters[name].numel() for name in names)
        step = max(1, _CHUNK // (r * numel))
        for start in range(0, n, step):
            samples = slice(start, min(n, start + step))
            part = rows_of(self._batch, samples)
            if self._vectorize:
                try:
                    gradients = self._vectorized(part, rows[samples], names)
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError:  # vmap has no rule for an operation: recurrent layers, say.
                    self._vectorize = False
            if not self._vectorize:
                gradients = self._looped(part, rows[samples], names)
            for name, values in zip(names, gradients, strict=True):
                yield samples, name, values

    def _vectorized(self, batch: Batch, rows: Tensor, names: list[str]) -> list[Tensor]:
        parameters = {name: self.parameters[name].detach() for name in names}

        def read(sample: Batch, rows: Tensor) -> dict[str, Tensor]:
            alone = batch_map(sample, lambda t: t.unsqueeze(0))

            def logits(values: dict[str, Tensor]) -> Tensor:
                return logits_of(self.module, alone, self.to_logits, values)[0]

            pull_back = torch.func.vjp(logits, parameters)[1]
            gradients: dict[str, Tensor] = torch.vmap(lambda row: pull_back(row)[0])(rows)
            return gradients

        with warnings.catch_warnings():
            # vmap loops over samples where an operation has no batching rule: as intended.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            gradients = torch.vmap(read)(batch, rows)
        return [gradients[name] for name in names]

    def _looped(self, batch: Batch, rows: Tensor, names: list[str]) -> list[Tensor]:
        parameters = [self.parameters[name] for name in names]
        n, r = rows.shape[:2]
        out = [torch.zeros(n, r, *p.shape, dtype=p.dtype, device=p.device) for p in parameters]
        for s in range(n):
            with torch.enable_grad():
                alone = rows_of(batch, slice(s, s + 1))
                logits = logits_of(self.module, alone, self.to_logits)
            if not logits.requires_grad:
                continue
            for i in range(r):
                grads = torch.autograd.grad(
                    logits,
                    parameters,
                    rows[s : s + 1, i],
                    retain_graph=i < r - 1,
                    allow_unused=True,
                )
                for values, g in zip(out, grads, strict=True):
                    if g is not None:
                        values[s, i] = g
        return out
