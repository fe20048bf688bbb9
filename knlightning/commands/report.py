"""Write one page of a run: curves, scores, mistakes, privacy; and a model card.

knl report runs/quickstart/0
"""

from pathlib import Path

from knlightning.analysis.model_card import write_model_card
from knlightning.analysis.report import write_page
from knlightning.analysis.run_results import read_run
from knlightning.commands.command import command
from knlightning.commands.output import say, write_text

PAGE, CARD = "report.html", "README.md"


def report(run: Path) -> None:
    """Write report.html into a run, and README.md, a model card, unless there is one.

    Args:
        run: Directory of the run.

    Raises:
        FileNotFoundError: If it is no directory of a run.
        ValueError: If a file in it is damaged.
    """
    results = read_run(run)
    write_text(run / PAGE, write_page(results))
    say(f"Report:     {run / PAGE}")
    if (run / CARD).exists():
        say(f"Model card: {run / CARD} was there, and is left as it is")
    else:
        write_text(run / CARD, write_model_card(results))
        say(f"Model card: {run / CARD}")


def main(args: list[str]) -> None:
    """Run `knl report`; `args` is the command line after it: the run, with or without `--run` before it."""
    named = ["--run", *args] if args and not args[0].startswith("-") else args
    command(report, "knl report", named)
