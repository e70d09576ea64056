"""How much memory a query needs, and where its embeddings go."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
import torch

from skfishermask.storage import ScratchEmbedding, StoredEmbedding, TensorEmbedding

EMBEDDING_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
# Selection holds the Fisher matrices, their factors and products: so many k x k in float64.
_N_MATRICES = 6
# It also holds A and B of every candidate, before each of two steps that it tries, and after
# them: so many r x r.
_N_STATES = 6


@dataclass(frozen=True)
class Needs:
    """Memory that a query needs beside the network.

    Attributes
    ----------
    n, r, k : int
        Candidates, directions and masked parameters.
    dtype : torch.dtype
        Of the embedding.
    """

    n: int
    r: int
    k: int
    dtype: torch.dtype

    @property
    def embedding(self) -> int:
        """Of V.

        Returns
        -------
        int
            In bytes.
        """
        return self.n * self.r * self.k * self.dtype.itemsize

    @property
    def matrices(self) -> int:
        """Of matrices of k x k.

        Returns
        -------
        int
            In bytes.
        """
        return _N_MATRICES * 8 * self.k**2

    @property
    def states(self) -> int:
        """Of the candidates' state in the selection.

        Returns
        -------
        int
            In bytes.
        """
        return _N_STATES * 8 * self.n * self.r**2


@dataclass(frozen=True)
class Room:
    """Where there is memory for a query on one machine.

    Attributes
    ----------
    device : torch.device
        Where the network is.
    share : float
        Share of the free memory that embeddings may take.
    folder : str or None
        For a scratch file. None: the system's temporary folder.
    """

    device: torch.device
    share: float
    folder: str | None

    def place(self, needs: Needs) -> str:
        """Say where the embedding goes.

        Parameters
        ----------
        needs : Needs
            What the query needs.

        Returns
        -------
        {"memory", "host memory", "scratch file"}
            The first of these that is large enough.

        Raises
        ------
        MemoryError
            If none is, or the rest of the selection is too large for the device.
        """
        host = psutil.virtual_memory().available
        on_cuda = self.device.type == "cuda"
        free = _free_on_cuda(self.device) if on_cuda else host
        others = needs.matrices + needs.states
        if needs.embedding <= self.share * free and needs.embedding + others <= free:
            return "memory"
        if on_cuda and needs.embedding <= self.share * host:
            place, room = "host memory", host
        else:
            place, folder = "scratch file", self.folder or tempfile.gettempdir()
            room = shutil.disk_usage(folder).free
        if others > free or needs.embedding > room:
            where = "" if place == "host memory" else f" and {gigabytes(room)} in {folder}"
            raise MemoryError(
                f"The Fisher embedding of {needs.n} candidates x {needs.r} directions x "
                f"{needs.k} parameters needs {gigabytes(needs.embedding)}, the {needs.k} x "
                f"{needs.k} Fisher matrices {gigabytes(needs.matrices)} and the candidates' gains "
                f"{gigabytes(needs.states)}, but {gigabytes(free)} are free on "
                f"{self.device}{where}. mask_fraction makes the first two smaller; max_candidates "
                "and n_directions the first and the last; embedding_dtype the first. An embedding "
                "larger than memory_share of the free memory goes to a file in scratch_folder."
            )
        return place

    def make(self, place: str, needs: Needs, cleanup: ExitStack) -> StoredEmbedding:
        """Make an embedding to be written.

        Parameters
        ----------
        place : {"memory", "host memory", "scratch file"}
            Where.
        needs : Needs
            Its sizes.
        cleanup : ExitStack
            Removes it, where that takes more than forgetting it.

        Returns
        -------
        StoredEmbedding
            With any values.
        """
        shape, dtype, device = (needs.n, needs.r, needs.k), needs.dtype, self.device
        if place == "scratch file":
            return cleanup.enter_context(ScratchEmbedding(shape, dtype, device, self.folder))
        if place == "host memory":
            return TensorEmbedding(torch.empty(shape, dtype=dtype, pin_memory=True), device)
        return TensorEmbedding(torch.empty(shape, dtype=dtype, device=device))


def gigabytes(n_bytes: float) -> str:
    """Say how large something is.

    Parameters
    ----------
    n_bytes : float
        Its size in bytes.

    Returns
    -------
    str
        The same in GB.
    """
    return f"{n_bytes / 1e9:.2f} GB"


def _free_on_cuda(device: torch.device) -> int:
    # PyTorch keeps what was freed for itself; the driver counts that as taken.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
