"""The files that ``fabric-bench`` writes."""

from __future__ import annotations

import csv
import dataclasses
import errno
import io
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fabric_lite.bench.exports import as_csv, as_json, as_markdown, export, read_json, write_whole
from fabric_lite.bench.shown import Shown
from fabric_lite.errors import FabricRuntimeError, FabricValueError
from tests.unit.bench_rows import MIB, ran, results_of, several

MARKDOWN = """\
# train.py --steps 9

ddp is best.

```bash
fabric-run train.py
```

| combination | samples/s ± 95 % | p50 ms |
| --- | ---: | ---: |
| **ddp, 32-true, 2 devices** | 800 ±8.0 | 10.0 |
| hsdp, 32-true, 2 devices (failed) |  |  |

- hsdp, 32-true, 2 devices: failed: OutOfMemoryError on rank 1: tried to allocate 2.50 GiB

2026-01-02, A processor, 2 cores, Python 3.11.2, torch 2.9.0, 2 steps a round after 1 to warm up, one run at a time
"""


def test_json_goes_back_to_the_same_results(tmp_path: Path) -> None:
    results = results_of(several())
    export(tmp_path / "a.json", results, several(), ["A verdict."])
    read = read_json(tmp_path / "a.json")
    assert as_json(read) == as_json(results)
    assert read.rows[:4] == results.rows[:4]  # the last one has no steps: () is read as []


def test_json_keeps_what_is_infinite(tmp_path: Path) -> None:
    one = ran("ddp", 2)
    assert one.row.comparison is not None
    infinite = dataclasses.replace(one.row.comparison, loss=float("inf"))
    results = results_of([dataclasses.replace(one, row=dataclasses.replace(one.row, comparison=infinite))])
    write_whole(tmp_path / "a.json", as_json(results))
    assert read_json(tmp_path / "a.json") == results


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"rows": [{}]}', '{"rows": 1, "about": {}}'])
def test_a_file_without_results_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(FabricValueError, match=r"a\.json could not be read as results"):
        read_json(tmp_path / "a.json")


def test_csv_has_a_line_for_each_row_in_plain_numbers() -> None:
    lines = list(csv.DictReader(io.StringIO(as_csv(several()))))
    assert [line["name"] for line in lines] == [one.name for one in several()]
    assert {name: lines[1][name] for name in _SOME} == _SOME
    assert lines[2]["comparison"] == "differs"
    assert lines[4]["failure"] == "OutOfMemoryError on rank 1: tried to allocate 2.50 GiB"
    assert lines[4]["samples_per_second"] == ""


_SOME = {
    "strategy": "ddp",
    "devices": "2",
    "batch_size": "",
    "is_best": "True",
    "samples_per_second": "800.0",
    "samples_per_second_low": "792.0",
    "samples_per_second_high": "804.0",
    "steps_per_second": "",
    "step_p50_seconds": "0.01",
    "backward_seconds": "0.004",
    "resident_bytes": str(300 * MIB),
    "device_allocated_bytes": "",
    "collectives_per_step": "2",
    "collective_bytes_per_step": str(3 * MIB),
    "scaling_fraction": "0.9",
    "gradient_difference": "3e-06",
}


def test_markdown_is_exact() -> None:
    ddp, hsdp = several()[1], several()[-1]
    row = dataclasses.replace(
        ddp.row,
        tokens_per_step=None,
        phases={},
        memory=None,
        communication=None,
        comparison=None,
        startup_seconds=None,
    )
    shown = [dataclasses.replace(ddp, row=row, step_p95_seconds=None, scaling=None, kept=None), hsdp]
    assert as_markdown(results_of(shown), shown, ["ddp is best."], command="fabric-run train.py") == MARKDOWN


def test_markdown_has_the_command_once() -> None:
    text = as_markdown(
        results_of(several()), several(), ["Run it: fabric-run a.py", "More."], command="fabric-run a.py"
    )
    assert "\n\nRun it:\n\n```bash\nfabric-run a.py\n```\n\nMore.\n\n" in text
    assert text.count("fabric-run a.py") == 1


def test_markdown_shows_hostile_words_as_they_are() -> None:
    shown = [dataclasses.replace(ran("ddp", 2), name="a|b\n<script> *c* `d` [e](f)")]
    text = as_markdown(results_of(shown), shown, [], command="echo '```'")
    assert r"| a\|b &lt;script&gt; \*c\* \`d\` \[e\](f) |" in text
    assert "\n````bash\necho '```'\n````\n" in text


@pytest.mark.parametrize("shown", [several(), [], several()[-1:]], ids=["several", "none", "a failure"])
def test_a_picture_is_whole_by_itself(tmp_path: Path, shown: list[Shown]) -> None:
    export(tmp_path / "a.svg", results_of(shown), shown, [])
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    known = set(re.findall(r"\.([a-z]+) ", style.text or ""))
    used = {name for element in root.iter() for name in element.get("class", "").split()}
    assert used <= known
    words = "".join(root.itertext())
    ran_some = any(one.row.failure is None for one in shown)
    assert ("No combination ran." in words) == (not ran_some)
    assert "http" not in (tmp_path / "a.svg").read_text().replace("http://www.w3.org/2000/svg", "")


def test_a_picture_has_a_panel_for_each_unit(tmp_path: Path) -> None:
    shown = several()
    shown[0] = dataclasses.replace(shown[0], throughput_unit="steps/s")
    export(tmp_path / "a.svg", results_of(shown), shown, [])
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    svg = "{http://www.w3.org/2000/svg}"
    panels = root.findall(f"{svg}svg")
    words = [["".join(part.itertext()) for part in panel.iter(f"{svg}text")] for panel in panels]
    names = [[one.name for one in shown if one.name in said] for said in words]
    # Nobody knows the unit of the last one, which failed.
    assert names == [[one.name for one in shown[1:]], [shown[0].name, shown[4].name]]
    assert "samples/s, all ranks together" in words[0]
    assert "steps/s, all ranks together" in words[1]
    for panel in panels:
        assert panel.findtext(f"{svg}desc") in (root.findtext(f"{svg}desc") or "")
    above, below = (float(panel.get("y", 0)) for panel in panels)
    heights = [float(panel.get("height", 0)) for panel in panels]
    assert above + heights[0] <= below
    assert below + heights[1] <= float(root.attrib["viewBox"].split()[3])
    keys = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(keys) == len(set(keys)) == 2


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FabricValueError, match=r"not written to files of this kind[\s\S]*\.html"):
        export(tmp_path / "a.pdf", results_of([]), [], [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", [".json", ".csv", ".md", ".html", ".svg"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / f"a{ending}"
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(FabricRuntimeError, match=r"what was there before is as it was.*No space left on device"):
            export(path, results_of(several()), several(), [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    export(path, results_of(several()), several(), [])
    assert path.read_text() != "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_takes_no_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "a.csv").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refusing)  # not by permissions, which do not bind root
        with pytest.raises(FabricRuntimeError, match=r"Permission denied[\s\S]*a folder that exists, is writable"):
            write_whole(tmp_path / "a.csv", "new")
    assert (tmp_path / "a.csv").read_text() == "old"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FabricRuntimeError, match=r"No such file or directory[\s\S]*absent/a\.csv"):
        write_whole(tmp_path / "absent" / "a.csv", "new")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link.csv").symlink_to(tmp_path / "a.csv")
    write_whole(tmp_path / "link.csv", "new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "a.csv").read_text() == "new"


@pytest.mark.parametrize("ending", [".json", ".csv", ".md", ".html"])
def test_a_script_whose_path_is_no_text_is_written(tmp_path: Path, ending: str) -> None:
    shown = [dataclasses.replace(one, name=f"{one.name} \udc80") for one in several()]
    export(tmp_path / f"a{ending}", results_of(shown, ("\udc80.py",)), shown, ["\udc80"], command="run \udc80.py")
    assert "\\udc80" in (tmp_path / f"a{ending}").read_text(encoding="utf-8")
