"""The shards of a selection, as the greedy loop asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from skfishermask.cluster import worker
from skfishermask.cluster.client import Cluster, Future
from skfishermask.cluster.remote import Reply, Request, merged
from skfishermask.selection import N_FLOAT64_PICKS, Pick


class Shards:
    """The embeddings on all workers, as the greedy loop asks them.

    Parameters
    ----------
    cluster : Cluster
        The workers.
    shards : sequence of Future
        One `worker.Shard` for each worker that has embeddings.
    start : Future
        A `worker.Start`.
    dtype : torch.dtype
        Of the embeddings.
    device : torch.device
        Where the picks are made.

    Attributes
    ----------
    round_trips : int
        How often the workers were asked.
    """

    def __init__(
        self,
        cluster: Cluster,
        shards: Sequence[Future],
        start: Future,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._cluster, self._shards, self._start = cluster, shards, start
        self._dtype, self._device = dtype, device
        # What the shards were told: all updates for good, and the last attempt.
        self._history: list[Pick] = []
        self._attempt: Sequence[Pick] = ()
        self.round_trips = 0

    def ask(self, question: Request) -> Reply:
        """Put a question to all shards; tell those that have lost their state all over again."""
        cluster, first = self._cluster, question.number == 0
        # Shards compute the first steps in float64, together with those that wait for them.
        careful = len(self._history) < N_FLOAT64_PICKS or self._dtype == torch.float64
        question = question.to("cpu", torch.float64 if careful else torch.float32)
        self._history += [*self._attempt[: question.keep], *question.updates]
        self._attempt = question.steps
        # To a shard that is told everything, what went before is history.
        anew = replace(question, keep=0, updates=())
        found: list[Reply] = []
        waiting = [(shard, first) for shard in self._shards]
        while waiting:
            told = [
                cluster.submit(worker.ask, shard, anew, self._start, self._history)
                if lost
                else cluster.submit(worker.ask, shard, question)
                for shard, lost in waiting
            ]
            self.round_trips += 1
            answers: list[Reply | None] = cluster.results(told)
            for (_, lost), given in zip(waiting, answers, strict=True):
                size = (anew if lost else question).n_bytes
                size += sum(step.factors.nbytes for step in self._history) if lost else 0
                cluster.count("selection", size + (given.n_bytes if given is not None else 0))
            waiting = [
                (shard, True)
                for (shard, _), given in zip(waiting, answers, strict=True)
                if given is None
            ]
            found += [given for given in answers if given is not None]
        return merged([given.to(self._device) for given in found])
