"""A query where the pool's chunks are: on the workers of a Dask cluster."""

from skfishermask.cluster.pool import ClusterQuery

__all__ = ["ClusterQuery"]
