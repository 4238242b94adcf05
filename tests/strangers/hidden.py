"""Targets that hide in what the model is given, or in its logits."""

from typing import Any

import lightning as L
import torch
from strangers.data import generator
from strangers.disguised import BinaryAutoencoder, BinaryDecoderModule
from strangers.refused import OneLoss, Unfit
from torch import Tensor, nn
from torch.nn import functional as F


class DenoisingModule(BinaryDecoderModule):
    def loss(self, batch: Any) -> Tensor:
        x, _ = batch
        keep = torch.rand(x.shape, generator=generator(4)) > 0.3
        return F.binary_cross_entropy_with_logits(self(x * keep), x)


class Denoising(BinaryAutoencoder):
    """The targets are the inputs before some of them were blanked."""

    def module(self) -> L.LightningModule:
        return DenoisingModule()


class ArcFaceLoss(nn.Module):
    """pytorch_metric_learning's: weights and margin are in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(8, 3, generator=generator(5)))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        cosine = F.normalize(embeddings) @ F.normalize(self.W, dim=0)
        angle = torch.acos(cosine.clamp(-0.9999, 0.9999))
        mask = F.one_hot(labels, 3)
        return F.cross_entropy(8 * torch.where(mask > 0, torch.cos(angle + 0.5), cosine), labels)


class ArcFaceModule(OneLoss):
    def __init__(self) -> None:
        super().__init__(8)
        self.loss_func = ArcFaceLoss()

    def loss(self, batch: Any) -> Tensor:
        return self.loss_func(self(batch[0]), batch[1])


class MarginInTheLoss(Unfit):
    """Classes, but every logit that can be seen knows its label."""

    def module(self) -> L.LightningModule:
        return ArcFaceModule()
