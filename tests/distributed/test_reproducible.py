"""Two runs with one seed are equal bit for bit, over processes, workers and dropout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import fabric_run, write

SCRIPT = """
    import sys
    import torch
    from torch.utils.data import DataLoader, Dataset
    from fabric_lite import Fabric


    class Augmented(Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            return torch.full((4,), float(index)) / 40 + torch.randn(4)


    if __name__ == "__main__":
        fabric = Fabric()
        fabric.launch()
        fabric.seed_everything(int(sys.argv[2]), workers=True, deterministic=True)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
        loader = fabric.setup_dataloaders(DataLoader(Augmented(), batch_size=4, shuffle=True, num_workers=2))
        for epoch in range(2):
            for batch in loader:
                fabric.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
        fabric.save(sys.argv[1], {"model": model, "optimizer": optimizer}, state_dict_type="full")
"""


@pytest.mark.parametrize("words", [["--devices", 1], ["--devices", 2], ["--devices", 2, "--strategy", "fsdp"]], ids=str)
def test_two_runs_with_one_seed_write_the_same_bytes(tmp_path: Path, words: list[object]) -> None:
    script = write(tmp_path, SCRIPT)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        done = fabric_run(*words, script, tmp_path / name, seed, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other
