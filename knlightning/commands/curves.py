"""Draw loss and accuracy by epochs, steps or hours.

knl curves --runs '[runs/quickstart/0]' --out curves.png
knl curves --runs '{batch: [runs/a/0, runs/a/1], kernel: [runs/b/0, runs/b/1]}' --x hours
"""

from functools import partial
from pathlib import Path

from knlightning.analysis.curves import XAxis, draw_curves
from knlightning.commands.command import command
from knlightning.commands.output import save_figure


def curves(runs: list[Path] | dict[str, list[Path]], x: XAxis = "epochs", out: Path = Path("curves.png")) -> None:
    """Draw the curves of runs into a PNG file.

    Args:
        runs: Directories of runs, a line for each; or by the name of a line its runs, such as those with several
            seeds: their mean, and a band of one standard deviation.
        x: What they are drawn against. Hours are those of training alone, without validation.
        out: The file.

    Raises:
        FileNotFoundError: If a directory holds no metrics.csv.
        ValueError: If the runs have not logged their time, and hours are wanted.
    """
    save_figure(draw_curves(runs, x), out)
    print(out)


main = partial(command, curves, "knl curves")
