"""The same stations on the workers of a Dask cluster."""

from skfishermask.cluster.client import Cluster
from skfishermask.cluster.pool import ClusterPool

__all__ = ["Cluster", "ClusterPool"]
