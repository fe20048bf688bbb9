"""What a converted network keeps of its original, with and without calibration, on the digits or other images.

    python -m experiments.calibration --seeds 3
    python -m experiments.calibration --data CIFAR10DataModule --data.root data --data.eval_batch_size 500

A small ResNet of torchvision's blocks, and a preactivated one, are trained with batch normalization. Then they are
converted, and fine-tuned for a few epochs: as they are converted, calibrated on eight batches of training images, and,
for comparison, from random weights. It prints a table in Markdown: test accuracy in %, mean over the seeds.
"""

from itertools import islice
from statistics import mean

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

from knlightning.data import DigitsDataModule, ImageDataModule, batches
from knlightning.models import kernel_normalize
from knlightning.models.layers import Layers, Options
from knlightning.models.preact_resnet import PreactBlock

Batches = list[tuple[Tensor, Tensor]]
WIDTHS = ((16, 16), (16, 32), (32, 64))


def resnet() -> nn.Module:
    """Make a ResNet-8 of torchvision's blocks with 16, 32 and 64 filters, for images of 32x32."""
    blocks = [
        BasicBlock(i, o, 2 if i < o else 1, nn.Sequential(nn.Conv2d(i, o, 1, 2), nn.BatchNorm2d(o)) if i < o else None)
        for i, o in WIDTHS
    ]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def preactivated() -> nn.Module:
    """Make the same with normalization and activation before each convolution."""
    layers = Layers(Options(norm="batch"), bias=False)
    blocks = [PreactBlock(i, o, 2 if i < o else 1, False, layers) for i, o in WIDTHS]
    head = (layers.head(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), *blocks, *head)


def train(network: nn.Module, data: ImageDataModule, test: Batches, epochs: int) -> list[float]:
    """Train a network, and return its test accuracy in % before each epoch and after the last."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    scores = [accuracy(network, test)]
    for epoch in range(epochs):
        network.train()
        for images, labels in batches(data, "train", epoch=epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
        scores.append(accuracy(network, test))
    return scores


@torch.no_grad()
def accuracy(network: nn.Module, test: Batches) -> float:
    """Return the test accuracy of a network in %."""
    network.eval()
    hits = [network(images).argmax(dim=1) == labels for images, labels in test]
    return 100 * float(torch.cat(hits).float().mean())


def main(data: ImageDataModule | None = None, seeds: int = 3, pretraining: int = 8, epochs: int = 4) -> None:
    """Measure, and print the table.

    Args:
        data: Images of 32x32 in ten classes; the digits with batches of 32 if not given.
        seeds: Number of seeds.
        pretraining: Epochs with batch normalization.
        epochs: Epochs of fine-tuning.
    """
    data = data or DigitsDataModule(batch_size=32)
    test: Batches = list(batches(data, "test"))
    print(f"| network | original | start | before | {' | '.join(f'epoch {n}' for n in range(1, epochs + 1))} |")
    print(f"| --- | --- | --- | {' | '.join(['---'] * (epochs + 1))} |")
    for make in (resnet, preactivated):
        originals: list[float] = []
        curves: dict[str, list[list[float]]] = {"random": [], "converted": [], "calibrated": []}
        for seed in range(seeds):
            torch.manual_seed(seed)
            original = make()
            originals.append(train(original, data, test, pretraining)[-1])
            images = [images for images, _ in islice(batches(data, "train"), 8)]
            starts = {
                "random": kernel_normalize(make()),
                "converted": kernel_normalize(original),
                "calibrated": kernel_normalize(original, calibrate=images),
            }
            for name, (network, _) in starts.items():
                torch.manual_seed(seed)
                curves[name].append(train(network, data, test, epochs))
        for name, runs in curves.items():
            scores = " | ".join(f"{mean(values):.1f}" for values in zip(*runs, strict=True))
            print(f"| {make.__name__} | {mean(originals):.1f} | {name} | {scores} |", flush=True)


if __name__ == "__main__":
    auto_cli(main)
