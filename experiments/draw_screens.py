"""Draw what a terminal of 80 and of 120 columns shows of a mistyped option and of a short run, as SVG files.

    python experiments/draw_screens.py --out docs/pictures

Each command runs in a pseudo-terminal of that width. Nothing is drawn that it has not printed.
"""

import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.text import Text

from knlightning.commands.command import command
from knlightning.run_directory import replacing

MISTAKE = "knl fit --config configs/quickstart.yaml --trainer.max_epocks 2"
RUN = "knl fit --config configs/quickstart.yaml --trainer.max_epochs 2 --trainer.limit_train_batches 15"


def capture(args: Sequence[str], columns: int) -> str:
    """Run a program in a pseudo-terminal, and return what it prints."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with subprocess.Popen(args, stdin=follower, stdout=follower, stderr=follower, close_fds=True):
        os.close(follower)
        output = b""
        with suppress(OSError):  # the end of a pseudo-terminal is an error
            while part := os.read(leader, 65536):
                output += part
    os.close(leader)
    return output.decode().replace("\r\n", "\n")


def halfway(output: str) -> str:
    """Cut an output in the middle of what a progress bar shows of the last epoch."""
    epoch = re.findall(r"\rEpoch (\d+)", output)[-1]
    ends = [state.end() for state in re.finditer(rf"\rEpoch {epoch}\b[^\r\n]*", output)]
    return output[: ends[len(ends) // 2]]


def lines_of(output: str, columns: int) -> list[str]:
    """Return the lines that a terminal shows: of its commands those that progress bars use, without colours."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|.", output, re.DOTALL):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif not part.startswith("\x1b"):
            if part == "\n" or column == columns:
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            if part != "\n":
                lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
                column += 1
    return [line.rstrip() for line in lines]


def draw(output: str, columns: int) -> str:
    """Draw a terminal as SVG."""
    console = Console(record=True, width=columns, file=io.StringIO())
    for line in lines_of(output.rstrip("\n"), columns):
        console.print(Text(line), no_wrap=True)
    svg = console.export_svg(title=f"{columns} columns", unique_id=f"columns-{columns}")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # a font would be fetched


def main(out: Path = Path("docs/pictures"), columns: tuple[int, ...] = (80, 120)) -> None:
    """Run the commands, and draw the terminal within the last epoch and at the end.

    Args:
        out: Where terminal_80.svg, terminal_80_running.svg, ... are written.
        columns: Widths of terminals.
    """
    for width in columns:
        screens = []
        for typed in (MISTAKE, RUN):
            program = [sys.executable, "-m", "knlightning.commands.main", *shlex.split(typed)[1:]]
            screens.append(f"$ {typed}\n{capture(program, width)}")
        for name, screen in (("_running", halfway(screens[1])), ("", "".join(screens))):
            with replacing(out / f"terminal_{width}{name}.svg") as temporary:
                temporary.write_text(draw(screen, width), encoding="utf-8")


if __name__ == "__main__":
    command(main, "python experiments/draw_screens.py")
