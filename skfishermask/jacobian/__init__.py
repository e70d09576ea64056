"""Per-sample gradients of any torch module's outputs at chosen parameter entries."""

from skfishermask.jacobian.batch_jacobian import HELD_BYTES
from skfishermask.jacobian.isolation import exact_mode, seeded, visit
from skfishermask.jacobian.module_io import (
    Inputs,
    NonFiniteOutputError,
    ToLogits,
    batch_length,
    first_output,
    output_layer,
    read_outputs,
    rows_of,
)
from skfishermask.jacobian.reader import JacobianReader

__all__ = [
    "HELD_BYTES",
    "Inputs",
    "JacobianReader",
    "NonFiniteOutputError",
    "ToLogits",
    "batch_length",
    "exact_mode",
    "first_output",
    "output_layer",
    "read_outputs",
    "rows_of",
    "seeded",
    "visit",
]
