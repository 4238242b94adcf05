"""Models and loaders of other libraries, as their users have them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_duo.calibration import calibrate_models
from lightning_duo.logits import collect_logits
from lightning_duo.tasks import Classes, Labels

GENERATOR = torch.Generator().manual_seed(0)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SMALLER = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}


def models(head: str, **config: Any) -> tuple[nn.Module, nn.Module]:
    """A BERT, and a DistilBERT, which takes no token_type_ids."""
    transformers = pytest.importorskip("transformers")
    base = transformers.BertConfig(**SIZES, num_labels=3, **config)
    sidekick = transformers.DistilBertConfig(**SMALLER, num_labels=3, **config)
    found = (
        getattr(transformers, f"BertFor{head}")(base),
        getattr(transformers, f"DistilBertFor{head}")(sidekick),
    )
    return found[0].eval(), found[1].eval()


def sentences(count: int = 24, length: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(1, 50, (count, length), generator=GENERATOR)
    mask = (torch.arange(length) < torch.randint(2, length, (count, 1), generator=GENERATOR)).long()
    return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}


def batches(parts: dict[str, Tensor], size: int = 10) -> list[Any]:
    from transformers import BatchEncoding

    columns = zip(*(part.split(size) for part in parts.values()), strict=True)
    return [BatchEncoding(dict(zip(parts, column, strict=True))) for column in columns]


def test_sentences() -> None:
    base, sidekick = models("SequenceClassification")
    text, y = sentences(), torch.randint(3, (24,), generator=GENERATOR)
    found = collect_logits(base, sidekick, batches({**text, "labels": y, "idx": torch.arange(24)}))
    with torch.no_grad():
        want = base(**text).logits
        torch.testing.assert_close(found.base, want)
        less = {k: v for k, v in text.items() if k != "token_type_ids"}
        torch.testing.assert_close(found.sidekick, sidekick(**less).logits)
        torch.testing.assert_close(found.fitted_sidekick(**text).logits, found.sidekick)
    assert torch.equal(found.targets, y)


def test_several_labels_of_a_sentence() -> None:
    base, sidekick = models("SequenceClassification", problem_type="multi_label_classification")
    text, y = sentences(60), (torch.rand(60, 3, generator=GENERATOR) > 0.5).float()
    with pytest.raises(ValueError, match=r"sum of 1 .*task=Labels\(\)"):
        collect_logits(base, sidekick, batches({**text, "labels": y}))
    duo, calibration = calibrate_models(
        base, sidekick, batches({**text, "labels": y}), task=Labels()
    )
    assert calibration.samples == 180
    assert duo(**text).probs.shape == (60, 3)


def test_tokens() -> None:
    base, sidekick = models("TokenClassification")
    text, y = sentences(), torch.randint(3, (24, 7), generator=GENERATOR)
    y[text["attention_mask"] == 0] = -100
    found = collect_logits(base, sidekick, batches({**text, "labels": y}))
    with torch.no_grad():
        torch.testing.assert_close(found.base, base(**text).logits[y != -100])
    assert torch.equal(found.targets, y[y != -100])
    assert torch.equal(found.items, (y != -100).nonzero()[:, 0])
    assert found.task == Classes(dim=-1)


def test_a_sidekick_of_other_tokens_is_refused() -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    base, _ = models("SequenceClassification")
    small = DistilBertForSequenceClassification(
        DistilBertConfig(**{**SMALLER, "vocab_size": 40}, num_labels=3)
    )
    data = batches({**sentences(), "labels": torch.zeros(24).long()})
    with pytest.raises(ValueError, match=r"40 tokens.*resize_token_embeddings\(50\)"):
        collect_logits(base, small, data)
    small.resize_token_embeddings(50)
    assert collect_logits(base, small, data).base.shape == (24, 3)


class OfGraphs(nn.Module):
    """PyTorch Geometric's example."""

    def __init__(self) -> None:
        from torch_geometric.nn import GCNConv

        super().__init__()
        self.conv, self.head = GCNConv(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
        from torch_geometric.nn import global_mean_pool

        return self.head(global_mean_pool(self.conv(x, edge_index).relu(), batch))


class OfWholeGraphs(OfGraphs):
    def forward(self, data: Any) -> Tensor:
        return super().forward(data.x, data.edge_index, data.batch)


class OfNodes(OfGraphs):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.head(self.conv(x, edge_index).relu())


def graphs() -> list[Any]:
    data = pytest.importorskip("torch_geometric.data")
    found = []
    for nodes in (4, 6, 5, 8, 4, 7, 5):
        edges = torch.randint(nodes, (2, 3 * nodes), generator=GENERATOR)
        x = torch.randn(nodes, 5, generator=GENERATOR)
        found.append(data.Data(x=x, edge_index=edges, y=torch.tensor([nodes % 3])))
    return found


@pytest.mark.parametrize("kind", [OfGraphs, OfWholeGraphs])
def test_graphs(kind: type[OfGraphs]) -> None:
    data = graphs()
    from torch_geometric.loader import DataLoader

    base, sidekick = kind(), kind()
    found = collect_logits(base, sidekick, DataLoader(data, batch_size=3))
    (whole,) = DataLoader(data, batch_size=7)
    for logits, model in ((found.base, base), (found.sidekick, sidekick)):
        want = OfGraphs.forward(model, whole.x, whole.edge_index, whole.batch).detach()
        torch.testing.assert_close(logits, want)
    assert torch.equal(found.targets, whole.y)


def test_nodes_of_which_a_mask_tells() -> None:
    graph = graphs()[3]
    graph.y = torch.arange(8) % 3
    graph.val_mask = torch.arange(8) > 2
    base, sidekick = OfNodes(), OfNodes()
    with pytest.raises(ValueError, match=r"\(val_mask\).*torch.where\(batch.val_mask, batch.y"):
        collect_logits(base, sidekick, [graph])
    del graph.val_mask  # without one all count
    assert len(collect_logits(base, sidekick, [graph]).targets) == 8
