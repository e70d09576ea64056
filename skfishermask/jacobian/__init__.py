"""R(x) J(x): the per-sample Jacobian of any torch module at chosen entries, times given rows."""

from skfishermask.jacobian.batch_jacobian import TENSOR_CACHE_BYTES, BatchJacobian
from skfishermask.jacobian.graph_facts import share_facts
from skfishermask.jacobian.isolation import (
    exact_mode,
    isolated,
    same_grad_mode,
    seeded,
    trainable_parameters,
)
from skfishermask.jacobian.module_io import (
    Inputs,
    NonFiniteGradientError,
    NonFiniteOutputError,
    ToOutputs,
    batch_length,
    first_output,
    output_layer,
    read_outputs,
    slice_batch,
)
from skfishermask.jacobian.reader import JacobianReader

__all__ = [
    "TENSOR_CACHE_BYTES",
    "BatchJacobian",
    "Inputs",
    "JacobianReader",
    "NonFiniteGradientError",
    "NonFiniteOutputError",
    "ToOutputs",
    "batch_length",
    "exact_mode",
    "first_output",
    "isolated",
    "output_layer",
    "read_outputs",
    "same_grad_mode",
    "seeded",
    "share_facts",
    "slice_batch",
    "trainable_parameters",
]
