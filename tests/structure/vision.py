"""Tiny networks of convolutions with random weights: a chain, residual blocks, and what is tied."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

SIDE = 8


class Chain(nn.Module):
    """Convolutions one after another, and a Linear that reads the last ones' pixels."""

    def __init__(self, *, norms: bool = True, bias: bool = True, pooled: bool = False) -> None:
        super().__init__()
        widths = (3, 6, 8, 10)
        parts: list[nn.Module] = []
        for place, (before, after) in enumerate(pairwise(widths)):
            parts.append(nn.Conv2d(before, after, 3, padding=1, bias=bias))
            if norms:
                parts.append(nn.BatchNorm2d(after))
            parts.append(nn.ReLU(inplace=True))
            if place == 1:
                parts.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*parts)
        self.pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
        pixels = 1 if pooled else (SIDE // 2) ** 2
        self.classifier = nn.Linear(widths[-1] * pixels, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.classifier(self.pool(self.features(pixel_values)).flatten(1))
        return hidden


class Tied(nn.Module):
    """A convolution whose channels a residual sum, a concatenation or groups tie to others."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first = nn.Conv2d(6, 6, 3, padding=1, groups=6 if how == "depthwise" else 1)
        self.norm = nn.BatchNorm2d(6)
        groups = 2 if how == "groups" else 1
        self.second = nn.Conv2d(12 if how == "concatenation" else 6, 6, 1, groups=groups)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(pixel_values))
        if self.how == "sum":
            hidden = hidden + pixel_values
        if self.how == "concatenation":
            hidden = torch.cat([hidden, pixel_values], dim=1)
        answer: torch.Tensor = self.second(hidden.relu())
        return answer + hidden if self.how == "two readers" else answer


def resnet(layer_type: str = "basic") -> Any:
    """Two stages of two residual blocks."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type=layer_type, num_labels=5
    )
    return settled(ResNetForImageClassification(config))


def settled(model: Any, seed: int = 0) -> Any:
    """In evaluation mode, with batch norms that have seen something and weights that differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                size = module.running_mean.shape
                module.running_mean.copy_(0.3 * torch.randn(size, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(size, generator=generator))
    return model.eval()


def images(count: int = 2, side: int = SIDE, channels: int = 3, seed: int = 1) -> torch.Tensor:
    """Random images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, side, side, generator=generator)
