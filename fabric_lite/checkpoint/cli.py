"""``fabric-ckpt``: looks at checkpoints, checks them, and makes one kind into another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fabric_lite.checkpoint.archive import CheckpointNotFoundError, damaged
from fabric_lite.checkpoint.commit import recovered
from fabric_lite.checkpoint.conversion import KINDS, convert, kind_for
from fabric_lite.checkpoint.folder_reading import CheckpointFolder
from fabric_lite.checkpoint.formats import opened
from fabric_lite.checkpoint.inspection import described, kind_of, lines, printable
from fabric_lite.checkpoint.plain import Place, values_where
from fabric_lite.checkpoint.stored import is_tensor
from fabric_lite.errors import FabricError, FabricKeyError, FabricValueError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 1 for a damaged checkpoint, 2 for what can't be asked for."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except FabricError as error:
        print("\n".join(map(printable, f"fabric-ckpt: {error}".split("\n"))), file=sys.stderr)
        asked_wrongly = isinstance(error, (CheckpointNotFoundError, FabricKeyError, FabricValueError))
        return 2 if asked_wrongly else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fabric-ckpt", description="Look at, check and convert checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    inspect = _command(commands, "inspect", _inspect, "say what a checkpoint is and what is in it")
    inspect.add_argument("--tensors", action="store_true", help="a line for each tensor")
    inspect.add_argument("--json", action="store_true", help="all of it as JSON")
    _command(commands, "verify", _verify, "compare a checkpoint with its checksums")
    change = _command(commands, "convert", _convert, "make one kind of checkpoint into another")
    change.add_argument("destination", help="NAME.safetensors, a name without an ending for a folder, else a file")
    change.add_argument("--to", choices=KINDS, help="the kind, whatever the name ends with")
    change.add_argument("--key", help="one of the top keys, such as model: write only what is there")
    change.add_argument("--force", action="store_true", help="replace a checkpoint at the destination")
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("path", help="a file or a folder")
    parser.set_defaults(run=run)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    description = described(recovered(Path(options.path)))
    if options.json:
        print(json.dumps(dataclasses.asdict(description), indent=2))
        return
    for line in lines(description, options.path, options.tensors):
        print(printable(line))


def _verify(options: argparse.Namespace) -> None:
    path = recovered(Path(options.path))
    checkpoint = opened(path)
    checkpoint.verify()
    kind = kind_of(path, checkpoint)
    checked = "all checksums are right"
    if kind == "file of torch.save":
        _check_zip(path)
        checked = "the zip's checksums are right" if zipfile.is_zipfile(path) else "it has no checksums"
    elif not kind.endswith("of fabric_lite") or kind.startswith("safetensors"):
        checked = "it has no checksums; its sizes are right"
    tensors = sum(1 for _ in values_where(is_tensor, checkpoint.content(), Place()))
    files = f" in {len(checkpoint.manifest.parts)} parts" if isinstance(checkpoint, CheckpointFolder) else ""
    print(f"OK: {options.path}, {kind}, {tensors} tensors{files}: {checked}")


def _check_zip(path: Path) -> None:
    """A file of plain ``torch.save`` has no manifest, but its zip has a checksum of each record, unless told not to."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.CRC:
                _check_record(archive, info, path)


def _check_record(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> None:
    try:
        with archive.open(info) as record:
            while record.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        raise damaged(path, str(error)) from error


def _convert(options: argparse.Namespace) -> None:
    kind = options.to or kind_for(options.destination)
    convert(recovered(Path(options.path)), Path(options.destination), kind, key=options.key, force=options.force)
    print(f"{options.destination}: {kind} written")


if __name__ == "__main__":
    raise SystemExit(main())
