"""What the command lines that start ranks have in common: errors, options, and the script that ends them."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, NoReturn

from fabric_lite.accelerator_names import ACCELERATOR_NAMES
from fabric_lite.errors import LaunchError
from fabric_lite.launch.rank import ScriptCall

__all__ = ["CommandLine"]

_OPTIONS: dict[str, dict[str, Any]] = {
    "--accelerator": {"choices": ACCELERATOR_NAMES, "help": "what to run on; the script's own choice if left out"},
    "--strategy": {"help": "ddp, fsdp, ...; the script's own choice if left out"},
    "--precision": {"help": "32-true, bf16-mixed, ...; the script's own choice if left out"},
    "--max-restarts": {
        "type": int,
        "default": 0,
        "help": "how often to start all ranks again after a failure (default: 0)",
    },
    "--check-collectives": {
        "action": "store_true",
        "help": "before each collective, compare operation, shapes and dtypes over the ranks",
    },
    "-m": {"dest": "is_module", "action": "store_true", "help": "SCRIPT is the name of a module"},
    "script": {
        "nargs": argparse.REMAINDER,
        "metavar": "SCRIPT [ARGS...]",
        "help": "what to run, and its own arguments",
    },
}


class CommandLine(argparse.ArgumentParser):
    """A parser whose errors are a ``LaunchError``; options of it have to be written out.

    Args:
        prog: What is typed to start it.
        example: A line of it that is right, after ``prog``.
        settings: Of ``argparse.ArgumentParser``.
    """

    def __init__(self, prog: str, example: str, **settings: Any) -> None:
        # --dev for --devices would change its meaning when options are added.
        super().__init__(prog=prog, allow_abbrev=False, **settings)
        self._example = f"{prog} {example}"

    def error(self, message: str) -> NoReturn:
        raise LaunchError(
            f"The command line could not be read: {message}.",
            given=" ".join(sys.argv[1:]) or "nothing",
            fix=f"{self.prog} --help",
        )

    def add_common(self, *names: str) -> None:
        """Add options that other command lines have too, by their names."""
        for name in names:
            self.add_argument(name, **_OPTIONS[name])

    def script_of(self, options: argparse.Namespace) -> ScriptCall:
        """The script and its arguments.

        Raises:
            LaunchError: There is none.
        """
        if not options.script:
            raise LaunchError("There is no script to run.", fix=self._example)
        target, *arguments = options.script
        if not options.is_module and not os.path.isfile(target):
            raise LaunchError(
                "The script does not exist.",
                given=f"{target}, looked for in {os.getcwd()}",
                fix=f"check the path; options of {self.prog} stand before it",
            )
        return ScriptCall(target, options.is_module, tuple(arguments))
