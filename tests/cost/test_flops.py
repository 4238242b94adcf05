"""FLOPs against fvcore, which counts a multiply-add once where PyTorch counts two."""

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from helpers import small_net
from torch import Tensor, nn

from lightning_duo.base import Call
from lightning_duo.cost import count_flops, count_flops_fvcore, flops_balance, measure_cost

# What fvcore counts beside convolutions and products, and PyTorch does not.
ELEMENTWISE = ("batch_norm", "layer_norm", "adaptive_avg_pool2d", "group_norm")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100"])
def test_against_fvcore(name: str) -> None:
    model, x = timm.create_model(name).eval(), torch.zeros(1, 3, 224, 224)
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False  # fvcore does not see inside fused attention
    analysis = FlopCountAnalysis(model, x).unsupported_ops_warnings(False)
    operators = analysis.by_operator()
    expected = sum(v for op, v in operators.items() if op not in ELEMENTWISE)
    fresh = timm.create_model(name).train()
    assert count_flops(fresh, x) == pytest.approx(2 * expected, rel=0.01)
    assert fresh.training


def test_learned_queries_are_counted() -> None:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.zeros(3, 10))
            self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.project = nn.Linear(10, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.project(self.query.expand(len(x), -1, -1)) + x

    pool = Pool()
    assert count_flops(pool, torch.zeros(2, 1, 1)) == 2 * 2 * 3 * 10 * 5
    wanted = {name: parameter.requires_grad for name, parameter in pool.named_parameters()}
    assert [name for name, wants in wanted.items() if not wants] == ["frozen"]
    fails = torch.zeros(2, 4, 4)
    with pytest.raises(RuntimeError, match="must match"):
        count_flops(pool, fails)
    assert pool.query.requires_grad


@pytest.mark.parametrize(("cell", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_are_counted(cell: type[nn.RNNBase], gates: int) -> None:
    layer, steps = cell(40, 64, num_layers=2, batch_first=True), 5
    expected = 2 * steps * gates * 64 * ((40 + 64) + (64 + 64))
    assert count_flops(layer, torch.zeros(1, steps, 40)) == expected
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled
    found, skipped = count_flops_fvcore(layer, torch.zeros(1, steps, 40))
    assert found == 0
    assert len(skipped) == 1


def _products(weight: Tensor, x: Tensor) -> Tensor:
    return torch.addmv(weight @ x, weight, x) + x.dot(x)


def test_products_with_a_vector_and_lazy_layers_are_counted() -> None:
    weight = torch.zeros(32, 10)
    times = count_flops(nn.Identity(), torch.zeros(10), lambda _, x: _products(weight, x))
    assert times == 2 * 2 * 32 * 10 + 2 * 10
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))
    counted = measure_cost(lazy, nn.Linear(16, 2), torch.zeros(1, 16))
    assert counted == (2 * 16 * 8 + 2 * 8 * 2, 2 * 16 * 2, 17 * 8 + 9 * 2, 17 * 2)


def test_a_model_that_cannot_be_counted_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.whole = nn.Module()
    model.whole._parameters["odd"] = 2 * model[0].weight  # no leaf, so it cannot be frozen
    with torch.inference_mode():
        model.inside = nn.Linear(2, 2)
    before = [p.requires_grad for p in model.parameters()]
    count = count_flops(model, torch.zeros(1, 4), lambda module, x: module[1](module[0](x)))
    assert count == 2 * 4 * 4 + 2 * 4 * 2
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_flops(model[:2], torch.zeros(1, 7))
    assert [p.requires_grad for p in model.parameters()] == before


def test_fused_attention_is_counted() -> None:
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.zeros(1, 50, 64)
    projections = 2 * 50 * 64 * (3 * 64 + 64)
    products = 2 * 2 * 50 * 50 * 64
    found = count_flops(attention, x, lambda module, inputs: module(inputs, inputs, inputs))
    assert found == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


def test_balance() -> None:
    x = torch.zeros(1, 3, 8, 8)
    assert flops_balance(small_net(width=32), small_net(width=8), x) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="no convolution or matrix product"):
        flops_balance(nn.Identity(), small_net(), x)


def test_calls_with_several_arguments() -> None:
    class Both(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, width), nn.Linear(6, width)

        def forward(self, x: torch.Tensor, *, y: torch.Tensor) -> torch.Tensor:
            return self.one(x) + self.other(y)

    call = Call((torch.zeros(1, 4),), {"y": torch.zeros(1, 6)})
    assert count_flops(Both(5), call) == 2 * 5 * (4 + 6)
    assert flops_balance(Both(50), Both(5), call) == 0.1
    with pytest.raises(ValueError, match=r"by position only.*'y'"):
        count_flops_fvcore(Both(5), call)
    twice = Call((torch.zeros(1, 4), torch.zeros(1, 6)), {})
    assert count_flops_fvcore(nn.Bilinear(4, 6, 3), twice)[0] >= 0
