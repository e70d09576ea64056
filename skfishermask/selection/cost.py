"""How long a choice will take, from a short run of its steps on candidates that are made up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from skfishermask.selection.batch import n_forward, picks_a_round
from skfishermask.selection.local import LocalCandidates
from skfishermask.selection.rounds import SHORTLIST, Information, choose
from skfishermask.selection.steps import CAREFUL, Step
from skfishermask.selection.storage import Needs, TensorEmbedding

# Rows of an embedding that are multiplied at full speed, and picks that are timed.
_ROWS, _PICKS = 512, 4
# Embeddings of so many bytes are read from memory, not from a processor's cache.
_OUT_OF_CACHE = 2**27


@torch.no_grad()
def expected_seconds(
    needs: Needs,
    n_instances: int,
    device: torch.device,
    *,
    n_labeled: int = 0,
    oversample: float = 1.0,
) -> dict[str, float]:
    """Time the steps of a choice for few candidates, and scale them to all.

    Gives the seconds of the steps after the embedding, by the names of their progress bars.

    Parameters
    ----------
    needs : Needs
        Sizes of the query.
    n_instances : int
        Number of samples to choose.
    device : torch.device
        Where it will be computed.
    n_labeled : int, default=0
        Labelled samples in M_0.
    oversample : float, default=1.0
        As for `skfishermask.select_batch`.
    """
    n, r, k = needs.n, needs.r, needs.k
    # In the space of the rows, where these are fewer than the parameters, all is in float64.
    has_few_rows = n * r < k
    d = min(k, n * r)
    dtype = torch.float64 if has_few_rows or needs.dtype == torch.float64 else torch.float32
    identity = torch.eye(d, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(0)
    few = torch.randn(min(n, math.ceil(_ROWS / r)), r, d, generator=generator, device=device)
    shape = torch.empty((), dtype=dtype, device=device).expand(n, r, d)
    width = picks_a_round(TensorEmbedding(shape))

    pool = LocalCandidates(TensorEmbedding(few.to(dtype)), width)
    start = _seconds(lambda: pool.candidates.start(identity, identity), device) / len(few)
    flop = start / (2 * r * d**2)
    n_picks = min(_PICKS * width, len(few))
    each = _seconds(
        lambda: choose(pool, Information(identity, identity), n_picks, r, picks_a_round=width),
        device,
    )
    forward = n_forward(n, n_instances, oversample)
    # Products of the first steps are in float64, which takes twice as long.
    n_steps = forward + (min(forward, CAREFUL) if dtype == torch.float32 else 0)
    others = (n - len(few)) * _step(needs, d, dtype, width, device)
    picks = forward * each / n_picks + n_steps * others

    # Numbers of operations in float64: products, factorisations and inverses.
    rows = needs.dimensions
    in_float32 = n * r * k**2 / 2
    fisher = flop * (2 * k * rows**2 + rows**3 / 3 if rows < k else in_float32)
    preparing = n * start
    if not n_labeled:
        preparing /= 2
    elif has_few_rows:
        preparing = preparing / 2 + flop * (2 * rows**3 + rows * d * (rows + 6 * d))
    else:
        preparing += flop * 5 * d**3
    return {"Fisher matrix": fisher, "Preparing": preparing, "Selection": picks}


def _step(needs: Needs, d: int, dtype: torch.dtype, width: int, device: torch.device) -> float:
    """Time one candidate's part of one step, with embeddings that come from memory."""
    r = needs.r
    m = min(needs.n, max(1, _OUT_OF_CACHE // (r * d * dtype.itemsize)))
    values = torch.full((m, r, d), 1e-3, dtype=dtype, device=device)
    pool = LocalCandidates(TensorEmbedding(values), width)
    pool.candidates.n_steps = CAREFUL  # no step of those that run in float64
    nothing = torch.zeros((), dtype=torch.float64, device=device)
    factors = torch.full((d, 2 * r), 1e-3, dtype=torch.float64, device=device)
    steps = [Step(nothing, nothing, nothing == 0, factors)] * width

    def go_on() -> None:
        pool.likely(SHORTLIST * width, width)
        pool.candidates.attempt(steps, pool.out)
        pool.candidates.keep(width)

    go_on()  # New memory is slower than memory that was written to.
    return _seconds(go_on, device) / (m * width)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    begun = now()
    work()
    return now() - begun
