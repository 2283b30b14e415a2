"""Run a command in a terminal of its own and draw what is on its screen at the end, as an SVG.

cd $(mktemp -d) && python .../docs/terminal_picture.py picture.svg fabric-run --devices 2 .../early_stopping.py
"""

from __future__ import annotations

import fcntl
import html
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

COLUMNS, ROWS = 100, 40
_TEXT = "font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:#e6e6e6;white-space:pre"
WIDTH, HEIGHT, MARGIN = 8.4, 20, 16  # of a character in pixels, and around all


def recorded(command: list[str]) -> str:
    """What the command writes to a terminal.

    Raises:
        SystemExit: It failed.
    """
    process, terminal = pty.fork()
    if process == 0:
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    output = b""
    try:
        while part := os.read(terminal, 65536):
            output += part
    except OSError:  # the command has ended
        pass
    _, status = os.waitpid(process, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{output.decode()}")
    return output.decode()


def screen(output: str) -> list[str]:
    """The lines as they stand in the end: a line that was drawn again is the last drawing of it."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output).replace("\r\n", "\n")
    return [line.rsplit("\r", 1)[-1] for line in plain.rstrip("\n").split("\n")]


def svg(title: str, lines: list[str]) -> str:
    """A window with these lines."""
    width, height = COLUMNS * WIDTH + 2 * MARGIN, (len(lines) + 2) * HEIGHT + MARGIN
    texts = [
        f'<text x="{MARGIN}" y="{MARGIN + (number + 2) * HEIGHT}">{html.escape(line)}</text>'
        for number, line in enumerate(lines)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img">',
            f"<title>{html.escape(title)}</title>",
            f"<style>text{{{_TEXT}}}</style>",
            f'<rect width="{width:.0f}" height="{height:.0f}" rx="8" fill="#1e2127"/>',
            f'<text x="{MARGIN}" y="{MARGIN + 12}" style="fill:#8fd18f">$ {html.escape(title)}</text>',
            *texts,
            "</svg>\n",
        ]
    )


def main() -> None:
    """Draw the command that the arguments name into the file that the first of them names."""
    picture, *command = sys.argv[1:]
    title = " ".join(re.sub(r".*/(examples/)", r"\1", word) for word in command)
    Path(picture).write_text(svg(title, screen(recorded(command))), encoding="utf-8")


if __name__ == "__main__":
    main()
