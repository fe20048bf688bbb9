"""Draw loss and accuracy of runs by epoch.

knl curves --runs '[runs/quickstart/0]' --out curves.png
"""

from pathlib import Path

from knlightning.analysis.curves import draw_curves
from knlightning.commands.command import command
from knlightning.commands.output import save_figure


def curves(runs: list[Path], out: Path = Path("curves.png")) -> None:
    """Draw the curves of runs into a PNG file.

    Args:
        runs: Directories of runs.
        out: The file.

    Raises:
        FileNotFoundError: If a directory holds no metrics.csv.
    """
    save_figure(draw_curves(runs), out)
    print(out)


def main(args: list[str]) -> None:
    """Run `knl curves`.

    Args:
        args: Command line after `curves`.
    """
    command(curves, "knl curves", args)
