"""Compare what the statistics of depthwise and grouped convolutions are over, on the digits of scikit-learn.

    python experiments/group_statistics.py

A small network of inverted residual blocks is built with batch normalization, converted, and trained.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from knlightning.commands.command import command
from knlightning.models import kernel_normalize
from knlightning.models.replaceable import GroupStatistics

WIDTH = 16
LEARNING_RATE = 0.01
BATCH_SIZE = 64
TRAINING_IMAGES = 1200


class Residual(nn.Sequential):
    """A row of layers around the identity."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


def make_network(groups: int | None) -> nn.Sequential:
    """Make a network of three inverted residual blocks; `groups` of None are as many as there are channels."""

    def conv(inputs: int, outputs: int, k: int, stride: int = 1, groups: int = 1) -> Iterator[nn.Module]:
        yield nn.Conv2d(inputs, outputs, k, stride, k // 2, groups=groups, bias=False)
        yield nn.BatchNorm2d(outputs)

    def block(inputs: int, outputs: int, stride: int = 1) -> Iterator[nn.Module]:
        inner = 2 * inputs
        yield from (*conv(inputs, inner, 1), nn.ReLU())
        yield from (*conv(inner, inner, 3, stride, groups or inner), nn.ReLU())
        yield from conv(inner, outputs, 1)

    return nn.Sequential(
        *(*conv(1, WIDTH, 3), nn.ReLU()),
        Residual(*block(WIDTH, WIDTH)),
        *block(WIDTH, 2 * WIDTH, 2),
        Residual(*block(2 * WIDTH, 2 * WIDTH)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDTH, 10)),
    )


def train(groups: int | None, dropout_p: float, statistics: GroupStatistics | None, epochs: int) -> float:
    """Train a network, with batch normalization if `statistics` is None; return its accuracy in % on other images."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    held_in, held_out = torch.randperm(len(images)).tensor_split([TRAINING_IMAGES])
    net: nn.Module = make_network(groups)
    if statistics is not None:
        net, _ = kernel_normalize(net, dropout_p, group_statistics=statistics)
    optimizer = torch.optim.AdamW(net.parameters(), LEARNING_RATE)
    steps = epochs * (len(held_in) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps)
    for _ in range(epochs):
        for batch in held_in[torch.randperm(len(held_in))].split(BATCH_SIZE)[: steps // epochs]:
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = net.eval()(images[held_out]).argmax(1) == labels[held_out]
    return 100 * right.double().mean().item()


def group_statistics(seeds: int = 3, epochs: int = 6) -> None:
    """Print a table in Markdown of mean and standard deviation over the seeds.

    Args:
        seeds: Number of runs of each network.
        epochs: Length of a run.
    """
    print(
        "| convolutions | dropout | batch normalization | all channels | own group |\n| --- | --- | --- | --- | --- |"
    )
    for name, groups, dropout_p in (("depthwise", None, 0.05), ("depthwise", None, 0.0), ("4 groups", 4, 0.05)):
        cells = []
        kinds: tuple[GroupStatistics | None, ...] = (None, "all", "own")
        for statistics in kinds:
            scores = torch.empty(seeds)
            for seed in range(seeds):
                torch.manual_seed(seed)
                scores[seed] = train(groups, dropout_p, statistics, epochs)
            cells.append(f"{scores.mean():.1f} ± {scores.std():.1f}")
        print(f"| {name} | {dropout_p} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    command(group_statistics, "python experiments/group_statistics.py")
