"""What the three scripts share: the data, training, runs on disk, figures, flags.

A model has a method `loss(images, labels) -> {name: mean over the batch}`, of which training
minimises "loss". A run is one model, trained into a folder of its own. A study is a loop over runs.
"""

import argparse
import contextlib
import copy
import csv
import dataclasses
import gzip
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import shlex
import statistics
import sys
import time
from collections import defaultdict, namedtuple
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchvision import datasets
from torchvision.utils import make_grid

if "ipykernel" not in sys.modules:
    # `!python vae.py` in a notebook gets its backend, which is not needed and may be missing here.
    os.environ.pop("MPLBACKEND", None)
import matplotlib.style  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

torch.backends.cudnn.allow_tf32 = False  # float32 everywhere

# data ---------------------------------------------------------------------------------------------

# For another dataset of this format, say datasets.MNIST, edit these two: the first run tells its
# checksum, of the images and labels of the training part, then of the test part.
DATASET = datasets.FashionMNIST
SHA256 = "ece172613115fb18b120bec8f6c02271af90b8b8f0a5af5c51cbd5ceed68e619"
CLASSES = DATASET.classes
# Where the Debian package dataset-fashion-mnist has it.
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

# images: (N, 1, 28, 28) float32 in [0, 1]; labels: (N,) int64
Split = namedtuple("Split", "images labels")
Data = namedtuple("Data", "train val test")


def load_data(folder="data", device="cpu"):
    """Fashion-MNIST (Xiao et al., 2017), each split as one tensor on `device`.

    What is missing in `folder` comes from the Debian package, else from a download. All scripts and
    seeds validate on the same 10,000 images: an encoder must not have seen the classifier's.
    """
    folder = Path(folder)
    raw = folder / DATASET.__name__ / "raw"
    others = [path.name for path in folder.glob("[!.]*")]
    if others and not raw.exists():
        sys.exit(f"{folder} holds {others[0]}, not {DATASET.__name__}: give --data an empty folder")
    if DATASET is datasets.FashionMNIST:
        for archive in DEBIAN.glob("*.gz"):
            if not (raw / archive.stem).exists():
                save(raw / archive.stem, gzip.decompress(archive.read_bytes()))
    try:
        full = DATASET(folder, train=True, download=True)
        test = DATASET(folder, train=False, download=True)
    except Exception as error:  # of the network, the files or torchvision: a dozen types
        reason = " ".join(str(error).split())
        advice = "go online or `apt-get install dataset-fashion-mnist`, with an empty --data"
        sys.exit(f"no {DATASET.__name__} in {raw} ({reason:.150}): {advice}")

    checksum = hashlib.sha256()
    for tensor in (full.data, full.targets, test.data, test.targets):
        checksum.update(tensor.numpy())
    if checksum.hexdigest() != SHA256:
        reason = f"its SHA-256 is {checksum.hexdigest()}, not SHA256 in common.py"
        sys.exit(f"{raw} is not {DATASET.__name__} ({reason}): give --data an empty folder")

    def split(part, chosen):
        images = part.data[chosen].unsqueeze(1).to(device) / 255
        return Split(images, part.targets[chosen].to(device))

    generator = torch.Generator().manual_seed(0)
    train, val = torch.randperm(len(full), generator=generator).tensor_split([len(full) * 5 // 6])
    return Data(split(full, train), split(full, val), split(test, torch.arange(len(test))))


# training and evaluation --------------------------------------------------------------------------


def run(model, data, config, args, folder, evaluate):
    """Trains `model`, evaluates it and writes losses.csv, metrics.json and model.pt to `folder`.

    `evaluate(model, data)` gives {"test": {name: number}, ...}. With --resume an unfinished run
    goes on and a complete one is kept.
    """
    if args.resume and is_complete(folder):
        read(folder / "metrics.json", config)
        print(f"{folder.name}: complete", flush=True)
        return
    history = train_loop(model, data, config, folder, args.resume)
    print(f"{folder.name}: evaluating", flush=True)
    metrics = {
        "config": vars(config),
        "environment": {
            "torch": torch.__version__,
            "device": args.device.type,
            "threads": torch.get_num_threads(),
        },
        "epochs_run": len(history),
        "best_epoch": best_epoch(history, config),
        "train_seconds": round(sum(row["seconds"] for row in history), 1),
        "validation": [{"epoch": row["epoch"], **row["val"]} for row in history if row["val"]],
        **evaluate(model.eval(), data),
    }
    lines = ["epoch,train_loss,val_loss"]
    for row in history:
        val_loss = f"{row['val']['loss']:.6f}" if row["val"] else ""
        lines.append(f"{row['epoch']},{row['train_loss']:.6f},{val_loss}")
    save(folder / "losses.csv", "\n".join(lines) + "\n")
    save(folder / "metrics.json", metrics)
    save(folder / "model.pt", {"config": vars(config), "model": model.state_dict()})
    (folder / "checkpoint.pt").unlink()
    print(f"{folder.name}: test {describe(metrics['test'])}", flush=True)


def train_loop(model, data, config, folder, resume=False):
    """Trains `model` and returns its history, a row of losses and seconds for each epoch.

    The exponential moving average (EMA) of the weights is validated and kept: it is less noisy
    (Polyak & Juditsky, 1992). The model ends as the EMA that validated best or, without early
    stopping, the last. After each epoch checkpoint.pt holds all that `resume` needs to go on.
    """
    images, labels = data.train
    steps = math.ceil(len(labels) / config.batch_size)  # in an epoch
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.lr,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    schedule = make_schedule(optimizer, steps * config.epochs)
    ema = copy.deepcopy(model)
    history, kept = [], None
    checkpoint = folder / "checkpoint.pt"
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    if resume and checkpoint.exists():
        saved = read(checkpoint, config)
        with refuse_unusable(checkpoint):
            for name, part in parts.items():
                part.load_state_dict(saved[name])
        history, kept = saved["history"], saved["kept"]
        print(f"{folder.name}: goes on after epoch {len(history)}", flush=True)

    while len(history) < config.epochs and not stops_early(history, config):
        start = time.perf_counter()
        epoch = len(history) + 1
        torch.manual_seed(100_000 * config.seed + epoch)  # a resumed epoch draws the same
        order = torch.randperm(len(labels)).to(labels.device)
        total_loss = 0
        model.train()
        for batch in order.tensor_split(steps):
            loss = model.loss(images[batch], labels[batch])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            update_ema(ema, model, config.ema_decay, schedule.last_epoch)
            total_loss += loss.detach() * len(batch)

        train_loss = total_loss.item() / len(labels)
        row = {"epoch": epoch, "train_loss": train_loss, "val": {}}
        if epoch % config.val_every == 0 or epoch == config.epochs:
            row["val"] = test_loop(ema, data.val)
        row["seconds"] = time.perf_counter() - start
        history.append(row)
        print_epoch(folder.name, history, config)
        if not all(map(math.isfinite, [train_loss, *row["val"].values()])):
            sys.exit(f"{folder.name}: the loss is not finite: try a lower --lr than {config.lr:g}")
        if best_epoch(history, config) == epoch:
            kept = copy.deepcopy(ema.state_dict())
        state = {name: part.state_dict() for name, part in parts.items()}
        save(checkpoint, {"config": vars(config), "history": history, "kept": kept, **state})

    if len(history) < config.epochs:
        print(f"{folder.name}: stops early, no progress in {config.patience} epochs", flush=True)
    model.load_state_dict(kept)
    return history


@torch.no_grad()
def test_loop(model, split, batch_size=250):
    """The means of `model.loss` over a split, with the same random numbers every time."""
    model.eval()
    torch.manual_seed(0)
    totals = defaultdict(float)
    batches = zip(split.images.split(batch_size), split.labels.split(batch_size))
    for images, labels in batches:
        for name, mean in model.loss(images, labels).items():
            totals[name] += mean.item() * len(labels)
    return {name: total / len(split.labels) for name, total in totals.items()}


def make_schedule(optimizer, steps):
    """The learning rate rises linearly in the first twentieth of the steps, then falls to zero."""
    rise = steps / 20

    def share(step):
        return min((step + 1) / rise, 1, (steps - step) / (steps - rise))

    return LambdaLR(optimizer, share)


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Moves the averaged model towards the trained one, after `step` steps. Counters are copied."""
    # The memory is short at first, as in TensorFlow: the initial weights are worth nothing.
    decay = min(decay, (1 + step) / (10 + step))
    averages = itertools.chain(ema.parameters(), ema.buffers())
    for average, latest in zip(averages, itertools.chain(model.parameters(), model.buffers())):
        if latest.is_floating_point():
            average.lerp_(latest, 1 - decay)
        else:
            average.copy_(latest)


def best_epoch(history, config):
    """The epoch whose weights are kept: the best validated or, without early stopping, the last."""
    if config.patience == 0:
        return len(history)
    losses = {row["epoch"]: row["val"]["loss"] for row in history if row["val"]}
    return min(losses, key=losses.get, default=None)


def stops_early(history, config):
    """Whether the last validation ends `patience` epochs without progress of `min_delta`."""
    if config.patience == 0 or not history or not history[-1]["val"]:
        return False
    lowest, progress_epoch = math.inf, 0
    for row in history:
        if row["val"] and row["val"]["loss"] < lowest - config.min_delta:
            lowest, progress_epoch = row["val"]["loss"], row["epoch"]
    return len(history) - progress_epoch >= config.patience


def print_epoch(name, history, config):
    row = history[-1]
    line = f"{name}  epoch {row['epoch']:3d}/{config.epochs}  train {row['train_loss']:.5f}"
    if row["val"]:
        line += f"  val {describe(row['val'])}"
    pace = statistics.mean(row["seconds"] for row in history)
    minutes = pace * (config.epochs - len(history)) / 60
    print(f"{line}  {row['seconds']:.1f} s, {minutes:.1f} min left", flush=True)


def describe(metrics):
    return " ".join(f"{name} {value:.5f}" for name, value in metrics.items())


# baselines ----------------------------------------------------------------------------------------


@torch.no_grad()
def knn_accuracy(data, encode, k=10):
    """Test accuracy of the k nearest neighbours: each image becomes a vector by `encode`, images
    (B, 1, 28, 28) to (B, D), and the k nearest training images vote on the class of a test image.
    """
    train = torch.cat([encode(images) for images in data.train.images.split(500)])
    correct = 0
    for images, labels in zip(data.test.images.split(500), data.test.labels.split(500)):
        nearest = torch.cdist(encode(images), train).topk(k, largest=False).indices
        votes = data.train.labels[nearest]
        correct += (votes.mode(dim=1).values == labels).sum().item()
    return correct / len(data.test.labels)


def pca_baseline(data, size):
    """Test errors and 10-NN accuracy of PCA with `size` components, the best linear autoencoder
    (Baldi & Hornik, 1989)."""
    train = data.train.images.flatten(1)
    test = data.test.images.flatten(1)
    mean = train.mean(0)
    _, components = torch.linalg.eigh(train.T.cov())  # by ascending variance
    basis = components[:, -size:]

    def encode(images):
        return (images.flatten(1) - mean) @ basis

    reconstruction = encode(test) @ basis.T + mean
    return {
        "pca_mse": F.mse_loss(reconstruction, test).item(),
        "pca_l1": F.l1_loss(reconstruction, test).item(),
        "pca_knn_accuracy": knn_accuracy(data, encode),
    }


# runs on disk -------------------------------------------------------------------------------------


def save(path, content):
    """Writes bytes, text, JSON, weights, a figure or, as GIF, frames (N, H, W) in [0, 1].

    It is written beside its place, then moved: a file is complete or absent.
    """
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        elif path.suffix == ".pt":
            buffer = io.BytesIO()
            torch.save(content, buffer)
            temporary.write_bytes(buffer.getvalue())
        elif path.suffix == ".png":
            content.savefig(temporary, **PNG)
        elif path.suffix == ".gif":
            greys = (15 * content).round().byte() * 17  # 16 of them: half the size of 256
            first, *rest = [Image.fromarray(frame) for frame in greys.numpy()]
            first.save(temporary, append_images=rest, save_all=True, duration=70, loop=0)
        elif isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        sys.exit(f"{path} can't be written ({error}): make space, or give another folder")


@contextlib.contextmanager
def refuse_unusable(path):
    """Ends the process in one line where `path` is absent, damaged or of another network."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        sys.exit(f"{path} can't be used ({reason:.150}): restore it, or give another folder")


def read(path, config):
    """The content of a run's .json or .pt file. Ends the process where it can't be used, or was
    made with another `config`."""
    with refuse_unusable(path):
        if path.suffix == ".json":
            content = json.loads(path.read_text())
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        difference = find_difference(content["config"], config)
    if difference:
        advice = "give the flags of that run, or another --out"
        sys.exit(f"{path} was made with {difference}: {advice}")
    return content


def find_difference(saved, config):
    """The first hyperparameter that a saved config has otherwise, as text; None: it is the same.

    One that is newer than the saved config has its default.
    """
    own = vars(config)
    saved = {**vars(type(config)()), **saved}
    for name, then in saved.items():
        if then != own.get(name):
            return f"{name} {then}, not {own.get(name)}"


def load(folder, model_class, config_class):
    """The trained model in a run's folder, ready to use."""
    path = Path(folder) / "model.pt"
    with refuse_unusable(path):
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = model_class(config_class(**saved["config"]))
        model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False)


def is_complete(folder):
    """Whether `folder` holds a finished run: its checkpoint is removed last."""
    unfinished = (folder / "checkpoint.pt").exists()
    return (folder / "model.pt").exists() and not unfinished


# studies: a dictionary of runs {folder: config} ---------------------------------------------------

# Of the processes that share a study: set by torchrun, a job array or run_all.sh.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def share_out(runs):
    """Yields the runs of this process, every WORLD_SIZE-th of {folder: config}; ends it without."""
    study = next(iter(runs)).parent
    if RANK == 0 and (study / "metrics.json").exists():
        advice = f"`git checkout {study}` brings back a committed one"
        print(f"{study} holds a study already, which this one replaces: {advice}", flush=True)
    own = list(runs.items())[RANK::WORLD_SIZE]
    if not own:
        sys.exit(0)
    yield from own


def read_runs(runs):
    """The metrics of all runs, with their folders' names; None while one is not yet complete."""
    metrics = []
    for folder, config in runs.items():
        if is_complete(folder):
            with refuse_unusable(folder / "metrics.json"):
                saved = json.loads((folder / "metrics.json").read_text())
                if not find_difference(saved["config"], config):
                    metrics.append({"folder": folder.name, **saved, "config": vars(config)})
    if len(metrics) < len(runs):
        print(f"{len(metrics)} of {len(runs)} runs are complete: the last one brings the summary")
        return None
    print("all runs are complete: comparing with baselines, drawing figures", flush=True)
    return metrics


def confirm(runs, load, evaluate, data):
    """Evaluates saved weights (--eval). Ends the process where a recorded test metric differs."""
    saved = {folder: runs[folder] for folder in runs if (folder / "model.pt").exists()}
    if not saved:
        path = next(iter(runs)) / "model.pt"
        sys.exit(f"there is no {path}: give the flags of the runs, or their --out")
    for folder, config in list(saved.items())[RANK::WORLD_SIZE]:
        recorded = read(folder / "metrics.json", config)["test"]
        model = load(folder).to(data.test.images.device)
        measured = evaluate(model, data)["test"]
        for name, then in recorded.items():
            now = measured.get(name, math.nan)
            both_nan = math.isnan(now) and math.isnan(then)
            # Another CPU rounds differently.
            if not both_nan and not math.isclose(now, then, rel_tol=1e-3, abs_tol=1e-6):
                reason = "other weights, other code or other data"
                sys.exit(f"{folder}: {name} is {now:.5f}, recorded was {then:.5f}: {reason}")
        print(f"{folder}: confirmed: {describe(measured)}", flush=True)


def group(runs, names):
    """The runs by setting, {values of the hyperparameters `names`: runs}."""
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run["config"][name] for name in names)].append(run)
    return groups


def mean_std(name, values):
    """Entries of a summary's row: mean and standard deviation, None where there are too few."""
    mean = statistics.fmean(values) if values else None
    std = statistics.stdev(values) if len(values) > 1 else None
    return {f"{name}_mean": mean, f"{name}_std": std}


def summarize(runs, names):
    """A row for each setting of the hyperparameters `names`: n, and test metrics over the seeds."""
    summary = []
    for setting, same in group(runs, names).items():
        row = {**dict(zip(names, setting)), "n": len(same)}
        for metric in same[0]["test"]:
            row |= mean_std(metric, [run["test"][metric] for run in same])
        summary.append(row)
    return summary


def format_cell(value, std=None):
    if std is not None:
        decimals = 5 if abs(value) < 1 else 2
        return f"{value:.{decimals}f} ± {std:.{decimals}f}"
    if isinstance(value, float):
        return f"{value:#.4g}"  # with trailing zeros
    return "" if value is None else str(value)


def format_table(summary, columns):
    """A Markdown table with these columns of a summary; NAME stands for NAME_mean ± NAME_std."""
    lines = [[name.replace("_", " ") for name in columns], ["---"] * len(columns)]
    for row in summary:
        cells = []
        for name in columns:
            value = row.get(name, row.get(f"{name}_mean"))
            cells.append(format_cell(value, row.get(f"{name}_std")))
        lines.append(cells)
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    table = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths)]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def save_study(folder, about, runs, summary, columns, figures, args):
    """Writes a study's metrics.json, figures and report, and prints its table.

    `about` opens the report; `columns` of the summary are its table. `figures` is {file name:
    (function, arguments ...)}: the function draws the figure, and its docstring is the caption.
    """
    shared, varies = {}, []
    for name, value in runs[0]["config"].items():
        if all(run["config"][name] == value for run in runs):
            shared[name] = value
        else:
            varies.append(name)
    rows = []
    for run in runs:
        row = {"folder": run["folder"]}
        row |= {name: run["config"][name] for name in varies}
        row |= {name: run[name] for name in ("epochs_run", "train_seconds", "test")}
        rows.append(row)
    save(folder / "metrics.json", {"config": shared, "summary": summary, "runs": rows})

    table = format_table(summary, columns)
    command = f"python {folder.name}.py {args.command}".strip()
    n = summary[0]["n"]
    seeds = f"Test images, mean ± standard deviation over {n} seeds." if n > 1 else "One seed."
    report = [f"# {folder.name}", about.strip(), f"`{command}`", table, seeds]
    for name, (draw, *arguments) in figures.items():
        save(folder / name, draw(*arguments))
        report += [f"![{name}]({name})", inspect.getdoc(draw)]
    save(folder / "README.md", "\n\n".join(report) + "\n")
    print(f"{table}\n{seeds}\nreport and figures: {folder / 'README.md'}", flush=True)


# figures ------------------------------------------------------------------------------------------

# Ten colours that stay apart for colour-blind readers (Petroff, arXiv:2107.02270), one a class.
STYLE = {
    **matplotlib.style.library["petroff10"],
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PNG = {"dpi": 110, "bbox_inches": "tight"}
COLORS = STYLE["axes.prop_cycle"].by_key()["color"]
GRAY = "#717581"


def new_figure(width, height, rows=1, columns=1):
    """A figure of some inches, and its axes: one or an array of (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    with matplotlib.rc_context(STYLE):
        return figure, figure.subplots(rows, columns)


def one_of_each_class(split):
    """The first image of every class, (10, 1, 28, 28)."""
    first = [(split.labels == label).nonzero()[0, 0] for label in range(10)]
    return split.images[torch.stack(first)]


def image_grid(rows, row_names=(), column_names=()):
    """A figure of images (R, C, 1, 28, 28) in [0, 1] as R named rows of C named columns."""
    count, columns = rows.shape[:2]
    grid = make_grid(rows.flatten(0, 1).cpu(), nrow=columns, padding=2)
    figure, axes = new_figure(0.7 * columns + 1.5, 0.7 * count + 0.4)
    axes.imshow(grid[0].numpy(), cmap="gray_r", vmin=0, vmax=1)
    axes.set_yticks([30 * i + 16 for i in range(len(row_names))], row_names)
    axes.set_xticks([30 * i + 16 for i in range(len(column_names))], column_names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.spines[:].set_visible(False)
    return figure


def plot_losses(path, best_epoch):
    """The training loss is a mean over the epoch. The validation loss comes after it and is that of
    the averaged weights, so that it can lie lower. The first epochs lie above the picture."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    train = {int(row["epoch"]): float(row["train_loss"]) for row in rows}
    val = {int(row["epoch"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    figure, axes = new_figure(7, 3.6)
    axes.plot(train.keys(), train.values(), ".-", label="training")
    axes.plot(val.keys(), val.values(), "o-", label="validation")
    axes.plot(best_epoch, val[best_epoch], "k*", markersize=12, label=f"kept: epoch {best_epoch}")
    axes.set_xscale("log")
    ticks = [epoch for epoch in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if epoch <= len(rows)]
    axes.set_xticks(ticks, ticks)
    axes.minorticks_off()
    # The first epochs of training would flatten the rest.
    axes.set(xlabel="epoch", ylabel="loss", ylim=(None, 1.1 * max(val.values())))
    axes.legend(frameon=False)
    return figure


# flags --------------------------------------------------------------------------------------------


def option(default, help, low=0):
    """A hyperparameter, int or float from `low` on: a field of a `Config`, and a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low})


def options(config_class):
    return [item for item in dataclasses.fields(config_class) if item.metadata]


def at_least(low, kind):
    """A type for argparse: an int or a float from `low` on."""

    def parse(text):
        value = kind(text)
        if not low <= value < math.inf:  # nan fails too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `text` is not a number
    return parse


def device(name):
    """A type for argparse: a torch.device; auto is CUDA where there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception:  # PyTorch raises half a dozen types
        raise argparse.ArgumentTypeError(f"there is no {name} here") from None


def make_parser(doc, config_class):
    """A parser with the flags that all scripts share, and one for each hyperparameter."""
    parser = argparse.ArgumentParser(
        description=doc.partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--seeds", type=at_least(1, int), default=1, metavar="N", help="runs, from --seed on")
    add("--device", type=device, default="auto", help="cpu, cuda, ...; auto: cuda if there is one")
    add("--data", type=Path, default="data", metavar="DIR", help="folder of the dataset")
    add("--out", type=Path, default="results", metavar="DIR", help="folder of the results")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on where this command stopped")
    add("--eval", action="store_true", help="only check the saved weights")
    add = parser.add_argument_group("hyperparameters").add_argument
    for item in options(config_class):
        flag = "--" + item.name.replace("_", "-")
        kind = at_least(item.metadata["low"], item.type)
        add(flag, type=kind, default=item.default, metavar="N", help=item.metadata["help"])
    return parser


def parse_args(parser, config_class, argv=None):
    """The flags, with `config`, `seeds` (a range) and `command`, what was typed.

    A bad flag ends in argparse's message and exit code 2.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    values = {item.name: getattr(args, item.name) for item in options(config_class)}
    args.config = config_class(**values)
    args.seeds = range(args.seed, args.seed + args.seeds)
    args.command = shlex.join(word for word in argv if word != "--resume")
    return args
