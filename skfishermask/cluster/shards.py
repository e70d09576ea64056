"""Requests of the greedy loop to the shards of a selection on the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from skfishermask.cluster import worker
from skfishermask.cluster.client import Cluster, Future
from skfishermask.cluster.remote import Reply, Request, merge_replies
from skfishermask.selection import N_FLOAT64_PICKS, Pick


class Shards:
    """The embeddings of a dtype on all workers, as the greedy loop sends requests to them.

    There is a `worker.Shard` for each worker that has embeddings, to start from a
    `worker.InitialState`. Picks are made on the device. `round_trips` counts how often the workers
    were reached.
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
        # What the shards have applied, and the last attempt.
        self._history: list[Pick] = []
        self._attempted: Sequence[Pick] = ()
        self.round_trips = 0

    def send(self, request: Request) -> Reply:
        """Send a request to all shards, with the whole history to those that lost their state."""
        cluster, is_first = self._cluster, request.number == 0
        # Shards apply the first picks in float64, together with those that are applied with them.
        in_float64 = len(self._history) < N_FLOAT64_PICKS or self._dtype == torch.float64
        request = request.to("cpu", torch.float64 if in_float64 else torch.float32)
        self._history += [*self._attempted[: request.n_committed], *request.updates]
        self._attempted = request.picks
        # For a shard that starts anew these are part of the history.
        anew = replace(request, n_committed=0, updates=())
        replies: list[Reply] = []
        waiting = [(shard, is_first) for shard in self._shards]
        while waiting:
            tasks = [
                cluster.submit(worker.ask, shard, anew, self._start, self._history)
                if is_lost
                else cluster.submit(worker.ask, shard, request)
                for shard, is_lost in waiting
            ]
            self.round_trips += 1
            results: list[Reply | None] = cluster.results(tasks)
            for (_, is_lost), reply in zip(waiting, results, strict=True):
                size = (anew if is_lost else request).n_bytes
                size += sum(pick.factors.nbytes for pick in self._history) if is_lost else 0
                cluster.count("selection", size + (reply.n_bytes if reply is not None else 0))
            waiting = [
                (shard, True)
                for (shard, _), reply in zip(waiting, results, strict=True)
                if reply is None
            ]
            replies += [reply for reply in results if reply is not None]
        return merge_replies([reply.to(self._device) for reply in replies])
