"""A loop of one's own with callbacks and loggers: it stops by itself, keeps its best state, and goes on where it was.

Commands that work (scikit-learn has the digits):

    fabric-run --devices 2 examples/early_stopping.py
    fabric-run --devices 2 --strategy fsdp examples/early_stopping.py --folder early_stopping_fsdp
    python examples/early_stopping.py --folder early_stopping_alone

It writes into ``early_stopping/``, or ``--folder``: metrics and learning rates as CSV, run.json, and the checkpoints.
Started again, it goes on from the newest of them, and so does one that was stopped by Ctrl+C.
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from fabric_lite import Fabric
from fabric_lite.callbacks import EarlyStopping, GradientNormMonitor, LearningRateMonitor, ModelCheckpoint
from fabric_lite.loggers import CSVLogger


def read_digits():
    """Return 1438 images (64 numbers each) with their digits to learn from, and 359 to validate on."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    return random_split(data, [1438, 359], generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def validate(fabric, model, loader):
    """Return the mean loss and accuracy over all images, equal on all ranks."""
    model.eval()
    loss, right, shown = 0.0, 0, 0
    for images, targets in loader:
        output = model(images)
        loss += F.cross_entropy(output, targets, reduction="sum").item()
        right += (output.argmax(1) == targets).sum().item()
        shown += len(targets)
    model.train()
    loss, right, shown = fabric.all_reduce((loss, right, shown), reduce_op="sum")
    return {"val_loss": loss / shown, "val_accuracy": right / shown}


def main():
    parser = argparse.ArgumentParser(description="Learn to read handwritten digits until it gets no better.")
    parser.add_argument("--epochs", type=int, default=50, help="at most")
    parser.add_argument("--folder", default="early_stopping")
    args = parser.parse_args()

    early = EarlyStopping("val_loss", patience=2)
    checkpoint = ModelCheckpoint(f"{args.folder}/checkpoints", monitor="val_loss", save_top_k=1)
    fabric = Fabric(
        callbacks=[early, checkpoint, LearningRateMonitor(), GradientNormMonitor()], loggers=CSVLogger(args.folder)
    )
    fabric.launch()
    fabric.seed_everything(1)
    train_data, validation_data = read_digits()
    train = fabric.setup_dataloaders(DataLoader(train_data, batch_size=16, shuffle=True))
    validation = fabric.setup_dataloaders(DataLoader(validation_data, batch_size=64), pad=False)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 10))
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=5e-3))

    state = {"fabric": fabric, "model": model, "optimizer": optimizer, "train": train, "epoch": 0}
    fabric.call("on_train_start", state=state)  # goes on from the newest checkpoint, if there is one
    while state["epoch"] < args.epochs and not early.should_stop:
        bar = fabric.progress(train, f"epoch {state['epoch'] + 1:2d}")
        for images, targets in bar:
            loss = F.cross_entropy(model(images), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            bar.show(loss=loss)
            fabric.log("loss", loss, step=fabric.steps)
        state["epoch"] += 1
        metrics = validate(fabric, model, validation)
        fabric.log_dict(metrics, step=fabric.steps)
        loss, accuracy = metrics["val_loss"], metrics["val_accuracy"]
        fabric.print(f"epoch {state['epoch']:2d}  val_loss {loss:.4f}  accuracy {accuracy:.2%}")
        fabric.call("on_validation_end", state=state, metrics=metrics)
    if early.should_stop:
        fabric.print(f"no better for {early.patience} epochs: stopped after epoch {state['epoch']}")
    fabric.print(f"the best, with val_loss {checkpoint.best_model_score:.4f}, is {checkpoint.best_model_path}")


if __name__ == "__main__":
    main()
