"""Whatever users hand over, down to a fitted skorch net and the batches that it sees."""

from skfishermask.data.batches import NetBatches, n_samples, naming_rows
from skfishermask.data.dask import ChunkBatches, DaskPool, active_client, chunk_batches, is_dask
from skfishermask.data.default_net import default_net
from skfishermask.data.logits import not_finite, to_logits_of
from skfishermask.data.net import (
    NetModule,
    check_no_module,
    explaining_labels,
    is_binary,
    net_module,
)
from skfishermask.data.net_state import net_from_state, net_state
from skfishermask.data.rows import (
    Relabeled,
    as_rows,
    check_finite,
    check_no_loader,
    check_no_text,
    is_several,
    is_text,
    map_inputs,
    n_rows,
    parts_of,
    stack_rows,
    take_rows,
)
from skfishermask.data.unwrap import Unwrapped, innermost, unwrap

__all__ = [
    "ChunkBatches",
    "DaskPool",
    "NetBatches",
    "NetModule",
    "Relabeled",
    "Unwrapped",
    "active_client",
    "as_rows",
    "check_finite",
    "check_no_loader",
    "check_no_module",
    "check_no_text",
    "chunk_batches",
    "default_net",
    "explaining_labels",
    "innermost",
    "is_binary",
    "is_dask",
    "is_several",
    "is_text",
    "map_inputs",
    "n_rows",
    "n_samples",
    "naming_rows",
    "net_from_state",
    "net_module",
    "net_state",
    "not_finite",
    "parts_of",
    "stack_rows",
    "take_rows",
    "to_logits_of",
    "unwrap",
]
