from __future__ import annotations

import networks
import oracles
import pytest
import torch
from torch import Tensor, nn

from skfishermask.fisher.directions import directions
from skfishermask.fisher.jacobian import JacobianReader

# Parameters that no rule explains; all others must take the fast way.
GRU = ["gru.weight_ih_l0", "gru.weight_hh_l0", "gru.bias_ih_l0", "gru.bias_hh_l0"]
LSTM = [name.replace("gru", "lstm") for name in GRU]
ATTENTION = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
LOOSE = {
    "mlp": [],
    "conv_norm": [],
    "cifar_resnet18": [],
    "torchvision_resnet18": [],
    "vit": ["class_token", "encoder.pos_embedding"]
    + [
        f"encoder.layers.encoder_layer_{i}.self_attention.{name}"
        for i in range(2)
        for name in ATTENTION
    ],
    "text_gru": GRU,
    "time_first": [*LSTM, "mix.weight", "mix.bias"],
    "tied": ["position", *(f"encoder.self_attn.{name}" for name in ATTENTION)],
    "windows": [],
    "functional": [
        "hidden.weight",
        "output.parametrizations.weight.original0",
        "output.parametrizations.weight.original1",
    ],
    "compiled": [],
}


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_which_parameters_are_read_sample_by_sample(name: str) -> None:
    make, sample = networks.NETWORKS[name]
    reader = JacobianReader(make())
    with reader.open():
        reader.forward(sample(3))
    assert reader.loose == LOOSE[name]


def test_time_first_is_seen_also_when_there_are_as_many_steps_as_samples() -> None:
    module, x = networks.TimeFirst().double(), networks.tokens(5)
    assert x.shape == (5, 5)  # Shapes alone cannot tell the axes apart.
    g, p = oracles.scores(module, x)
    reader = JacobianReader(module)
    with reader.open():
        squares = reader.squares(reader.forward(x), directions(p))
    assert reader.loose == LOOSE["time_first"]
    found = torch.cat([s.flatten() for s in squares.values()]) / 5
    torch.testing.assert_close(found, oracles.diagonal(g, p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "tied", "functional"])
def test_vectorised_and_looped_fallback_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, sample = networks.NETWORKS[name]
    module, x = make().double(), sample(4)
    x = x.double() if x.is_floating_point() else x
    entries = {n: torch.arange(min(7, p.numel())) for n, p in module.named_parameters()}
    found = []
    for vectorize in (True, False):
        reader = JacobianReader(module, entries)
        reader._vectorize = vectorize
        with reader.open():
            logits = reader.forward(x)
            found.append(reader.embed(logits, directions(logits.detach().softmax(1))))
        assert reader._vectorize == vectorize  # vmap did not give up.
    torch.testing.assert_close(found[0], found[1])


def test_a_network_that_vmap_cannot_read_is_read_in_a_loop() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([s * self.scale if s[0] > 0 else s - self.scale for s in x])

    module, x = Branching().double(), torch.randn(6, 3).double()
    g, p = oracles.scores(module, x)
    reader = JacobianReader(module)
    with reader.open():
        squares = reader.squares(reader.forward(x), directions(p))
    assert not reader._vectorize
    torch.testing.assert_close(squares["scale"] / 6, oracles.diagonal(g, p))


def test_a_batch_of_one_and_a_network_that_does_not_use_its_parameters() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    reader = JacobianReader(Constant())
    with reader.open():
        squares = reader.squares(reader.forward(torch.randn(1, 3)), torch.ones(1, 2, 3))
    assert all(not s.any() for s in squares.values())


def test_unknown_entries() -> None:
    with pytest.raises(ValueError, match="no parameter 'weights'"):
        JacobianReader(nn.Linear(2, 2), {"weights": torch.arange(1)})
    reader = JacobianReader(nn.Linear(2, 2))
    with reader.open(), pytest.raises(ValueError, match="no entries"):
        reader.embed(reader.forward(torch.zeros(1, 2)), torch.zeros(1, 1, 2))
