"""Whatever users hand over, down to a fitted skorch net and the batches that it sees."""

from skfishermask.data.batches import (
    Batches,
    NetSamples,
    Source,
    UnitInputs,
    flat_inputs,
    in_one_length,
    naming_rows,
)
from skfishermask.data.dask import DaskSamples, chunk_batches, is_dask
from skfishermask.data.default_net import default_net
from skfishermask.data.diagnostics import (
    check_classes,
    check_no_gaps,
    counted,
    image_hint,
    odd_sample,
)
from skfishermask.data.logits import to_logits_of
from skfishermask.data.net import NetModule, check_no_module, explaining_labels, is_binary
from skfishermask.data.probe import ReadableNet, read_net
from skfishermask.data.rows import (
    Relabeled,
    as_rows,
    check_finite,
    check_holds_samples,
    check_no_text,
    is_several,
    is_text,
    map_inputs,
    n_rows,
    parts_of,
    stack_rows,
    take_rows,
)
from skfishermask.data.serialization import net_from_state, net_state
from skfishermask.data.types import DaskObject, Data, Estimator, Labels, Whatever
from skfishermask.data.unwrap import (
    Unfitted,
    Unwrapped,
    has_no_labels,
    innermost,
    unwrap,
    unwrap_unfitted,
)

__all__ = [
    "Batches",
    "DaskObject",
    "DaskSamples",
    "Data",
    "Estimator",
    "Labels",
    "NetModule",
    "NetSamples",
    "ReadableNet",
    "Relabeled",
    "Source",
    "Unfitted",
    "UnitInputs",
    "Unwrapped",
    "Whatever",
    "as_rows",
    "check_classes",
    "check_finite",
    "check_holds_samples",
    "check_no_gaps",
    "check_no_module",
    "check_no_text",
    "chunk_batches",
    "counted",
    "default_net",
    "explaining_labels",
    "flat_inputs",
    "has_no_labels",
    "image_hint",
    "in_one_length",
    "innermost",
    "is_binary",
    "is_dask",
    "is_several",
    "is_text",
    "map_inputs",
    "n_rows",
    "naming_rows",
    "net_from_state",
    "net_state",
    "odd_sample",
    "parts_of",
    "read_net",
    "stack_rows",
    "take_rows",
    "to_logits_of",
    "unwrap",
    "unwrap_unfitted",
]
