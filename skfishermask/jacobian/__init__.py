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
from skfishermask.jacobian.linear_head import LinearHead, NoLinearHeadError
from skfishermask.jacobian.module_io import (
    Inputs,
    NonFiniteGradientError,
    NonFiniteOutputError,
    ToOutputs,
    batch_length,
    find_linear_head,
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
    "LinearHead",
    "NoLinearHeadError",
    "NonFiniteGradientError",
    "NonFiniteOutputError",
    "ToOutputs",
    "batch_length",
    "exact_mode",
    "find_linear_head",
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
