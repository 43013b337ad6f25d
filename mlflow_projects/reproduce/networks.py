"""Two small networks of convolutions, trained on few images: a plain chain and a residual network.

Their accuracy is low, since a thousand images teach little. What removal costs them is what is
measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

__all__ = [
    "NETWORKS",
    "Images",
    "SmallVGG",
    "SmallVGGConfig",
    "accuracy",
    "augmented",
    "macs",
    "positions",
    "read_images",
    "scaled",
    "trained",
]

FILES = ("cifar10/cifar10_train_sample1000.npz", "cifar10/cifar10_test_sample1000.npz")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 50
RATE, DECAY, PAD = 0.05, 5e-4, 4


class SmallVGGConfig(PreTrainedConfig):
    """Sizes of a :class:`SmallVGG`.

    Attributes:
        widths: channels of every convolution; 0 stands for a pooling.
        image_size: side of the images.
    """

    model_type = "small_vgg"

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 32, 0, 64, 64, 0, 128, 128, 0),
        image_size: int = 32,
        **kwargs: Any,
    ) -> None:
        self.widths = list(widths)
        self.image_size = image_size
        super().__init__(**kwargs)


class SmallVGG(PreTrainedModel):
    """Convolutions with batch norms, one after another, and one Linear that reads the last.

    As torchvision's VGGs with batch norms, whose convolutions have biases.
    """

    config_class = SmallVGGConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vgg"

    def __init__(self, config: SmallVGGConfig) -> None:
        super().__init__(config)
        parts: list[nn.Module] = []
        channels, side = 3, config.image_size
        for width in config.widths:
            if not width:
                parts.append(nn.MaxPool2d(2))
                side //= 2
                continue
            parts += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*parts)
        self.dropout = nn.Dropout(0.3)
        self.classifier = nn.Linear(channels * side**2, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutputWithNoAttention:
        """Logits of images ``(samples, 3, side, side)``, and with labels the loss."""
        hidden = self.features(pixel_values).flatten(1)
        logits = self.classifier(self.dropout(hidden))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels.view(-1))
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


# llm-compressor looks a model's config up by its type.
AutoConfig.register(SmallVGGConfig.model_type, SmallVGGConfig, exist_ok=True)
AutoModelForImageClassification.register(SmallVGGConfig, SmallVGG, exist_ok=True)


def _resnet() -> Any:
    """Six residual blocks of two convolutions. Its stem reduces images by four, so it is given
    them at twice their side."""
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )
    return ResNetForImageClassification(config)


class Network(NamedTuple):
    """How a network is made and read, and by how much the sides of its images grow."""

    build: Any
    model_class: Any
    scale: int


NETWORKS = {
    "VGG": Network(lambda: SmallVGG(SmallVGGConfig(num_labels=10)), SmallVGG, 1),
    "ResNet": Network(_resnet, ResNetForImageClassification, 2),
}


class Images(NamedTuple):
    """Normalized images ``(n, 3, 32, 32)`` and their classes ``(n,)``."""

    pixels: torch.Tensor
    labels: torch.Tensor


def read_images(data: Path) -> tuple[Images, Images]:
    """Training and test images.

    Raises:
        FileNotFoundError: a file is not in ``data``.
    """
    import numpy as np

    found = []
    for name in FILES:
        with np.load(data / name) as file:
            pixels, labels = torch.from_numpy(file["x"]), torch.from_numpy(file["y"]).long()
        scaled = pixels.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        found.append(Images((scaled - mean) / std, labels))
    return found[0], found[1]


def scaled(pixels: torch.Tensor, scale: int) -> torch.Tensor:
    """Images with ``scale`` times as long sides."""
    if scale == 1:
        return pixels
    return nn.functional.interpolate(pixels, scale_factor=scale, mode="bilinear")


def trained(name: str, images: Images, folder: Path, epochs: int, seed: int) -> Any:
    """The trained network, from ``folder`` where an earlier start left it."""
    network = NETWORKS[name]
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        model = network.build()
        _train(model, images, network.scale, epochs, seed)
        model.save_pretrained(folder)
    return network.model_class.from_pretrained(folder).eval()


def _train(model: Any, images: Images, scale: int, epochs: int, seed: int) -> None:
    """Stochastic gradient descent with momentum, the rate along half a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=RATE, momentum=0.9, nesterov=True, weight_decay=DECAY
    )
    steps = epochs * -(-len(images.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    started = time.perf_counter()
    model.train()
    for epoch in range(epochs):
        right = 0
        for pixels, labels in augmented(images, generator):
            out = model(pixel_values=scaled(pixels, scale), labels=labels)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            schedule.step()
            right += int((out.logits.argmax(-1) == labels).sum())
        if epoch % 5 == 4:
            share = right / len(images.labels)
            seconds = time.perf_counter() - started
            print(f"epoch {epoch + 1}: {share:.3f} of the training images, {seconds:.0f} s")
    model.eval()


def augmented(
    images: Images, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches in random order, of random crops and flips."""
    side = images.pixels.shape[-1]
    padded = nn.functional.pad(images.pixels, (PAD, PAD, PAD, PAD), mode="reflect")
    for rows in torch.randperm(len(images.labels), generator=generator).split(BATCH):
        crops = []
        for row in rows.tolist():
            top, left = torch.randint(0, 2 * PAD + 1, (2,), generator=generator).tolist()
            crop = padded[row, :, top : top + side, left : left + side]
            flipped = bool(torch.rand((), generator=generator) < 0.5)
            crops.append(crop.flip(-1) if flipped else crop)
        yield torch.stack(crops), images.labels[rows]


def positions(model: Any, image: torch.Tensor) -> dict[str, int]:
    """How often each convolution and Linear multiplies for one image, by its name."""
    from cur_modifier.passes.context import trial
    from cur_modifier.structure.patches import count_positions

    with trial(model, {"pixel_values": image}) as run:
        return count_positions(model, run)


def macs(model: Any, image: torch.Tensor, below: tuple[str, ...] = ("",)) -> int:
    """Multiply-accumulates of convolutions and Linears for one image, below some names."""
    return sum(
        times * int(model.get_parameter(f"{name}.weight").numel())
        for name, times in positions(model, image).items()
        if name.startswith(below)
    )


@torch.no_grad()
def accuracy(model: Any, images: Images, scale: int) -> float:
    """The share of images that get their class."""
    right = 0
    model.eval()
    for pixels, labels in zip(images.pixels.split(BATCH), images.labels.split(BATCH), strict=True):
        out = model(pixel_values=scaled(pixels, scale))
        right += int((out.logits.argmax(-1) == labels).sum())
    return right / len(images.labels)
