"""What the scripts share: hyperparameters, flags, data, training, runs on disk, studies, figures.

A script defines `Config`, its hyperparameters, and a model with the method
`loss(images, labels) -> {name: mean over the batch}`. Training minimises "loss"; validation
reports all of them. `run` trains one model and writes its folder. A study is a loop over runs.
"""

import argparse
import ast
import copy
import csv
import dataclasses
import functools
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import tempfile
import textwrap
import time
import zlib
from collections import defaultdict, namedtuple
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F

# hyperparameters and flags ------------------------------------------------------------------------


def option(default, help, low, high=1_000_000):
    """A hyperparameter: a field of a `Config`, and a flag that takes values from low to high."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """All that decides what a run computes. An `option` is also a flag; scripts set the others."""

    epochs: int = option(16, "most epochs to train", low=1, high=99_999)
    batch_size: int = option(128, "most images in a training step", low=1)
    lr: float = option(4e-3, "learning rate between warm-up and decay", low=1e-8, high=10)
    weight_decay: float = option(0.0, "weight decay of AdamW", low=0, high=1000)
    warmup: float = option(0.05, "share of the steps in which the rate rises", low=0, high=1)
    constant_steps: int = option(2000, "step from which the rate falls, at most half of all", low=0)
    ema_decay: float = option(0.998, "share of the EMA weights that a step keeps", low=0, high=1)
    val_every: int = option(1, "epochs from one validation to the next", low=1)
    patience: int = option(0, "epochs without progress after which to stop; 0: never", low=0)
    min_delta: float = option(1e-3, "least fall of the validation loss that is progress", low=0)
    # An epoch draws with the seed 100,000 * seed + epoch, of which the generator takes 32 bits:
    # with up to 1,000 --seeds these are different ones.
    seed: int = option(0, "seed of initial weights, batches and noise", low=0, high=41_000)


def options(config_class):
    """The fields that are flags, with their metadata. A subclass's new default keeps them."""
    meta = {}
    for base in reversed(config_class.__mro__[:-1]):  # from Config on; the last is object
        meta |= {item.name: item.metadata for item in dataclasses.fields(base) if item.metadata}
    fields = dataclasses.fields(config_class)
    return [(item, meta[item.name]) for item in fields if item.name in meta]


def number(kind, low, high):
    """An argparse type: an int or a float from low to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # nan fails too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low:,} to {high:,}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it where `text` is not a number
    return parse


def make_parser(doc, config_class):
    """A flag for each hyperparameter, and those that all scripts share."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    for item, about in options(config_class):
        flag = "--" + item.name.replace("_", "-")
        kind = number(item.type, about["low"], about["high"])
        text = about["help"] + " (default: %(default)s)"
        add(flag, type=kind, default=item.default, metavar=item.type.__name__.upper(), help=text)
    text = "number of runs of each setting, with the seeds from --seed on (default: %(default)s)"
    add("--seeds", type=number(int, 1, 1000), default=1, metavar="N", help=text)
    text = "where to train; auto: on a GPU where there is one (default: %(default)s)"
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help=text)
    add("--data", type=Path, default="data", help="folder of the dataset (default: %(default)s)")
    add("--out", type=Path, default="results", help="folder of the results (default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on where this command stopped")
    mode.add_argument("--eval", action="store_true", help="only check the saved weights")
    return parser


def parse_args(parser, config_class, argv=None):
    """The flags, with `config` made of the hyperparameters, `device` a torch.device, `seeds` a
    range and `command` what was typed. A bad value ends in argparse's message and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    # A shell's unset variable leaves one of these.
    if any(word == "" or (word.startswith("--") and word.endswith("=")) for word in argv):
        parser.error("an argument is empty")
    for name, value in vars(args).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            parser.error(f"argument --{name}: the same value twice")
    values = {item.name: getattr(args, item.name) for item, _ in options(config_class)}
    args.config = config_class(**values)

    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.append("mps")
    if torch.cuda.is_available():
        available.append("cuda")
    name = available[-1] if args.device == "auto" else args.device
    if name not in available:
        parser.error(f"argument --device: {name} is not available, only {' '.join(available)}")
    if name == "cuda":
        torch.cuda.set_device(RANK % torch.cuda.device_count())
        torch.backends.cudnn.allow_tf32 = False  # evaluation is in float32
    args.device = torch.device(name)
    args.seeds = range(args.seed, args.seed + args.seeds)
    args.command = "".join(f" {shlex.quote(word)}" for word in argv if word != "--resume")
    plt.switch_backend("agg")  # figures go to files only
    return args


def cli(main):
    """Calls a script's `main`. Ctrl-C, a closed pipe and a failing disk end in one line at most."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("\nstopped; a run in training goes on with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `| head`: nobody reads on, not even what Python says at its exit
        os._exit(1)
    except OSError as error:  # of a full disk, a folder that is read-only
        if error.errno is None:  # not of the operating system
            raise
        sys.exit(f"{error}: check space and permissions, or give another folder")


# data ---------------------------------------------------------------------------------------------

Split = namedtuple("Split", "images labels")  # (N, 1, 28, 28) float32 in [0, 1] and (N,) int64
Data = namedtuple("Data", "train val test")

SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def read_genuine(path):
    """The bytes of one of the four files, unpacked. Ends the process on a wrong checksum."""
    advice = "put the genuine file into DIR/FashionMNIST/raw and give --data DIR"
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        sys.exit(f"{path} can't be read ({error}): {advice}")
    if hashlib.sha256(content).hexdigest() != SHA256[path.name.removesuffix(".gz")]:
        sys.exit(f"{path} is damaged or of another dataset (its SHA-256 differs): {advice}")
    return content


def fetch(raw, names):
    """Puts missing files into the folder `raw`, out of Debian's package, else of a download."""
    from torchvision.datasets import FashionMNIST

    with tempfile.TemporaryDirectory() as temporary:
        origin = DEBIAN
        if not DEBIAN.exists():
            print("data: downloading 30 MB", flush=True)
            try:
                origin = Path(FashionMNIST(temporary, download=True).raw_folder)
            except Exception as error:  # of urllib, http, zlib, torchvision: a dozen types
                advice = "go online, put it there or `apt-get install dataset-fashion-mnist`"
                sys.exit(f"no {raw / names[0]} and no download ({error!r:.200}): {advice}")
        print(f"data: unpacking {origin}", flush=True)
        for name in names:
            save(raw / name, read_genuine(origin / f"{name}.gz"))


def load_data(folder="data", device="cpu"):
    """Fashion-MNIST (Xiao et al., 2017) on `device`. All scripts and seeds validate on the same
    images: an encoder must not have seen another script's validation images."""
    from torchvision.datasets import mnist  # not at the top: --help would wait for it

    raw = Path(folder) / "FashionMNIST" / "raw"
    missing = [name for name in SHA256 if not (raw / name).exists()]
    if missing:
        fetch(raw, missing)
    for name in SHA256:
        read_genuine(raw / name)
    print(f"data: {raw}", flush=True)
    splits = []
    for name in ("train", "t10k"):
        images = mnist.read_image_file(raw / f"{name}-images-idx3-ubyte").to(device)
        labels = mnist.read_label_file(raw / f"{name}-labels-idx1-ubyte").to(device)
        splits.append(Split(images.unsqueeze(1).float() / 255, labels))
    full, test = splits
    count, val_count = len(full.labels), len(full.labels) // 6
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(device)
    parts = order.split([count - val_count, val_count])
    train, val = (Split(full.images[part], full.labels[part]) for part in parts)
    return Data(train, val, test)


# training and evaluation --------------------------------------------------------------------------


def uses_bf16(model, device):
    """Whether training uses bfloat16: the class has `bf16 = True` and the device is fast in it."""
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # old releases have none
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return fast and getattr(model, "bf16", False)


def forward(model, x):
    """model(x) in float32. In training it is computed in bfloat16 where `uses_bf16`."""
    enabled = model.training and uses_bf16(model, x.device)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
        return model(x).float()


def learning_rate(step, steps, config):
    """Linear warm-up, then constant, then linear decay to zero over at least half of the steps
    (Hägele et al., 2024, arXiv:2405.18392). Where the two overlap, the lower rate counts."""
    decay_start = min(config.constant_steps, steps // 2)
    rising = (step + 1) / max(1, round(config.warmup * steps))
    falling = (steps - step) / (steps - decay_start)
    return config.lr * min(rising, 1, falling)


def best_epoch(history, config):
    """The epoch whose weights are kept: the best in validation; without early stopping the last."""
    if config.patience == 0:
        return history[-1]["epoch"]
    validated = [row for row in history if "val" in row]
    return min(validated, key=lambda row: row["val"]["loss"])["epoch"]


def stops_early(history, config):
    """Whether the last epoch's validation ends `patience` epochs without progress."""
    if config.patience == 0 or not history or "val" not in history[-1]:
        return False
    lowest, progress_epoch = math.inf, 0
    for row in history:
        if "val" in row and row["val"]["loss"] < lowest - config.min_delta:
            lowest, progress_epoch = row["val"]["loss"], row["epoch"]
    return history[-1]["epoch"] - progress_epoch >= config.patience


@torch.no_grad()
def test_loop(model, split, seed=0, batch_size=250):
    """The means of `model.loss` over a split. Its noise is that of the seed."""
    model.eval()
    torch.manual_seed(seed)
    totals = defaultdict(float)
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size)):
        for name, mean in model.loss(images, labels).items():
            totals[name] += mean.item() * len(labels)
    return {name: round(total / len(split.labels), 7) for name, total in totals.items()}


def train_loop(model, data, config, folder, code_hash, resume):
    """Trains `model`, leaves it at `best_epoch`'s weights and returns the history, a row an epoch.
    Validated and kept is the exponential moving average (EMA) of weights and batch norm statistics:
    Polyak averaging, less noisy. `folder` gets the state after each epoch, in checkpoint.pt."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    ema, kept = copy.deepcopy(model), copy.deepcopy(model)
    pairs = zip(ema.state_dict().values(), model.state_dict().values())  # the tensors, no copies
    ema_pairs = [(average, latest) for average, latest in pairs if latest.is_floating_point()]
    state = {"model": model, "ema": ema, "kept": kept, "optimizer": optimizer}
    history = load_checkpoint(folder, state, config, code_hash) if resume else []

    count = len(data.train.labels)
    device = data.train.labels.device
    steps_per_epoch = math.ceil(count / config.batch_size)
    while len(history) < config.epochs and not stops_early(history, config):
        start = time.perf_counter()
        epoch = len(history) + 1
        step = (epoch - 1) * steps_per_epoch
        total_loss = torch.zeros((), device=device)
        model.train()
        torch.manual_seed(100_000 * config.seed + epoch)  # an epoch draws the same when resumed
        order = torch.randperm(count).to(device)  # drawn by the CPU: the same on every device
        for batch in order.tensor_split(steps_per_epoch):  # sizes differ by one at most
            rate = learning_rate(step, config.epochs * steps_per_epoch, config)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            loss = model.loss(data.train.images[batch], data.train.labels[batch])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # The EMA's memory is short at first: the initial weights are worth nothing.
            decay = min(config.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for average, latest in ema_pairs:
                    average.lerp_(latest, 1 - decay)
            total_loss += loss.detach() * len(batch)
            step += 1

        history.append({"epoch": epoch, "train_loss": round(total_loss.item() / count, 7)})
        if epoch % config.val_every == 0 or epoch == config.epochs:
            history[-1]["val"] = test_loop(ema, data.val)
            if best_epoch(history, config) == epoch:
                kept.load_state_dict(ema.state_dict())
        history[-1]["seconds"] = round(time.perf_counter() - start, 4)
        print_epoch(folder.name, history, config)
        losses = [history[-1]["train_loss"], *history[-1].get("val", {}).values()]
        if not all(math.isfinite(loss) for loss in losses):
            sys.exit(f"{folder.name}: the loss is not finite: try a lower --lr than {config.lr:g}")
        states = {name: part.state_dict() for name, part in state.items()}
        origin = {"config": vars(config), "code": code_hash}
        save(folder / "checkpoint.pt", {**origin, "history": history, **states})

    if len(history) < config.epochs:
        print(f"{folder.name}: stops early, after {config.patience} epochs without progress")
    model.load_state_dict(kept.state_dict())
    return history


def print_epoch(name, history, config):
    row = history[-1]
    epoch = row["epoch"]
    line = f"{name}  epoch {epoch:3d}/{config.epochs}  train {row['train_loss']:.5f}"
    if "val" in row:
        line += f"  val {describe(row['val'])}"
    pace = statistics.mean(row["seconds"] for row in history)
    minutes, seconds = divmod(round(pace * (config.epochs - epoch)), 60)
    print(f"{line}  {row['seconds']:.2f} s, {minutes}m{seconds:02d}s left", flush=True)


def load_checkpoint(folder, state, config, code_hash):
    """Puts back the state in checkpoint.pt and returns the history; [] without a checkpoint."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return []
    check_origin(read(path), config, path, code_hash)
    history = read(path, **state)["history"]
    # Fused AdamW needs its moments in the parameter's memory layout: another device has another.
    for parameter, moments in state["optimizer"].state.items():
        for name, moment in moments.items():
            if getattr(moment, "shape", None) == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(moment)
    print(f"{folder.name}: goes on after epoch {len(history)}", flush=True)
    return history


@torch.no_grad()
def knn(index, index_labels, queries, k=10):
    """Labels (Q,) of `queries` (Q, D): the most frequent among the k nearest in `index` (N, D), by
    Euclidean distance. Of equally frequent labels the one with the nearest image."""
    nearest = [torch.cdist(q, index).topk(k, largest=False).indices for q in queries.split(1000)]
    labels = index_labels[torch.cat(nearest)]  # (Q, k), the nearest first
    votes = (labels[:, :, None] == labels[:, None, :]).sum(2)
    return labels.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)


def accuracy(predicted, labels):
    return (predicted == labels).sum().item() / len(labels)


def confusion(predicted, labels):
    """Counts as nested lists: a row for each true class, a column for each predicted one."""
    return torch.bincount(10 * labels + predicted, minlength=100).view(10, 10).tolist()


def nearest_mse(images, train):
    """Mean squared error, a pixel, between `images` and the nearest of the images `train`."""
    train = train.flatten(1)
    nearest = [torch.cdist(part, train).amin(1) for part in images.flatten(1).split(1000)]
    return torch.cat(nearest).square().mean().item() / train.shape[1]


def loss_std(model, split, count=20):
    """Standard deviations of the mean loss of a split: over draws of the noise, and over samples
    of as many images, estimated from `count` equal parts of the split."""
    draws = [test_loop(model, split, seed=seed)["loss"] for seed in range(count)]
    parts = [Split(split.images[i::count], split.labels[i::count]) for i in range(count)]
    losses = [test_loop(model, part)["loss"] for part in parts]
    images = statistics.stdev(losses) / math.sqrt(count)
    return {"noise": statistics.stdev(draws), "images": images}


def class_means(vectors, labels):
    """The mean of the vectors (N, D) of each class, (10, D)."""
    return torch.stack([vectors[labels == label].mean(0) for label in range(10)])


def baselines(data, sizes):
    """What needs no network, {size: metrics}: the test errors of PCA, the best linear autoencoder
    (Baldi & Hornik, 1989), the 10-NN accuracy on its components, and that on the pixels."""
    (train, train_labels), (test, test_labels) = data.train, data.test
    train, test = train.flatten(1), test.flatten(1)
    pixel_knn = accuracy(knn(train, train_labels, test), test_labels)
    mean = train.cpu().double().mean(0)
    train, test = (images.cpu().double().sub_(mean) for images in (train, test))
    _, components = torch.linalg.eigh(train.T @ train)  # variances ascend
    metrics = {}
    for size in sizes:
        basis = components[:, -size:]
        index, queries = train @ basis, test @ basis
        predicted = knn(index.float(), train_labels.cpu(), queries.float())
        metrics[size] = {
            "pca_mse": F.mse_loss(queries @ basis.T, test).item(),
            "pca_l1": F.l1_loss(queries @ basis.T, test).item(),
            "pca_knn_accuracy": accuracy(predicted, test_labels.cpu()),
            "pixel_knn_accuracy": pixel_knn,
        }
    return metrics


def discriminant_plane(vectors, labels):
    """An orthonormal basis (2, D) of the plane in which the classes of `vectors` (N, D) are apart
    the most in relation to their spread: linear discriminant analysis (Fisher, 1936).
    Variances within the classes below a tenth of the largest are raised to it. Otherwise a
    dimension that is nearly constant would decide the plane."""
    vectors, labels = vectors.cpu().double(), labels.cpu()
    means = class_means(vectors, labels)
    spread = vectors - means[labels]
    variances, axes = torch.linalg.eigh(spread.T @ spread / len(spread))
    whiten = axes / variances.clamp(min=0.1 * variances.max() + 1e-12).sqrt()
    directions = torch.linalg.svd((means - means.mean(0)) @ whiten).Vh[:2]
    basis = torch.linalg.qr(whiten @ directions.T).Q.T.float()
    return F.pad(basis, (0, 0, 0, 2 - len(basis)))  # of one dimension: the other is nothing


# runs on disk -------------------------------------------------------------------------------------


def describe(metrics):
    return " ".join(f"{name} {value:.5f}" for name, value in metrics.items())


def save(path, content):
    """Writes bytes, text, JSON, weights or a figure. A file has its name only when complete."""
    buffer = io.BytesIO()  # torch.save straight to a full disk ends in a dump of C++
    if path.suffix == ".pt":
        torch.save(content, buffer)
    elif path.suffix == ".png":
        content.savefig(buffer, format="png")
        plt.close(content)
    elif path.suffix == ".json":
        buffer.write(json.dumps(content, indent=1).encode() + b"\n")
    else:
        buffer.write(content if isinstance(content, bytes) else content.encode())
    temporary = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        sys.exit(f"{path} can't be written ({error}): make space, or give another folder")
    finally:
        temporary.unlink(missing_ok=True)


def read(path, **parts):
    """The content of a run's .json or .pt file. Each of `parts` loads the state of its name."""
    path = Path(path)
    try:
        if path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(content[name])
        dict(content["config"])  # every file of a run has one
        return content
    except Exception as error:  # absent, damaged, of another network, a pickle with code
        sys.exit(f"{path} can't be used ({error!r:.200}): restore it, or give another path")


def as_json(content):
    """`content` as a .json file gives it back: a tuple becomes a list."""
    return json.loads(json.dumps(content))


def check_origin(saved, config, path, code_hash=None):
    """Ends the process where a file was made with another config or, if given, by other code."""
    own, then = as_json(vars(config)), as_json(saved["config"])
    for name in {**own, **then}:
        asked, recorded = own.get(name), then.get(name)
        if asked != recorded:
            advice = "give the flags of that run, or another --out"
            sys.exit(f"{path} was made with {name} {recorded}, not {asked}: {advice}")
    if code_hash is not None and saved.get("code") != code_hash:
        advice = "undo the edit, or give another --out"
        sys.exit(f"{path} was made by another model, loss or training loop: {advice}")


@functools.cache  # a file that is edited during a study does not change what the study runs
def source(thing):
    """The syntax of a class or function as text, without comments and what docstrings say."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = None
    # Whether empty lists are shown depends on Python's version.
    return re.sub(r"\w+=\[\]|[ ,]", "", ast.dump(tree))


def hash_code(model):
    """A hash of the code that trains: the model's own classes and the training loop."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    own = [item for item in classes if item.__module__.split(".")[0] not in ("torch", "builtins")]
    loop = [train_loop, test_loop, learning_rate, best_epoch, stops_early, forward]
    text = "\n".join(sorted(source(item) for item in [*own, *loop]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_complete(folder):
    """Whether `folder` holds a finished run. Its checkpoint is removed last."""
    return (folder / "model.pt").exists() and not (folder / "checkpoint.pt").exists()


def run(model, data, config, args, folder, evaluate):
    """Trains `model`, evaluates it, and writes losses.csv, metrics.json and model.pt to `folder`.
    `evaluate(model, data)` gives metrics, those of the test set as "test". With --resume an
    unfinished run goes on and a complete one is kept. With --eval nothing is trained or written."""
    if args.eval:
        confirm(model, data, config, folder, evaluate)
        return
    code_hash = hash_code(model)
    if args.resume and is_complete(folder):
        check_origin(read(folder / "metrics.json"), config, folder, code_hash)
        print(f"{folder.name}: complete", flush=True)
        return
    started = (folder / "model.pt").exists() or (folder / "checkpoint.pt").exists()
    if started and not args.resume:
        print(f"{folder}: this run will replace the one there; --resume keeps it", flush=True)

    history = train_loop(model, data, config, folder, code_hash, args.resume)
    metrics = {
        "config": vars(config),
        "code": code_hash,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": version("torchvision"),
            "device": args.device.type,
            "threads": torch.get_num_threads(),
            "bfloat16": uses_bf16(model, args.device),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "epochs_run": len(history),
        "best_epoch": best_epoch(history, config),
        "train_seconds": round(sum(row["seconds"] for row in history), 2),
        **evaluate(model.eval(), data),
        "validation": [{"epoch": row["epoch"], **row["val"]} for row in history if "val" in row],
    }
    losses = ["epoch,train_loss,val_loss"]
    for row in history:
        val_loss = row["val"]["loss"] if "val" in row else ""
        losses.append(f"{row['epoch']},{row['train_loss']:.7f},{val_loss}")
    save(folder / "losses.csv", "\n".join(losses) + "\n")
    save(folder / "metrics.json", metrics)
    save(folder / "model.pt", {"config": vars(config), "model": model.state_dict()})
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(f"{folder.name}: test {describe(metrics['test'])}", flush=True)


def confirm(model, data, config, folder, evaluate):
    """Ends the process where the saved weights miss a recorded test metric by over 1 in 2,000."""
    saved = read(folder / "metrics.json")
    check_origin(saved, config, folder)
    read(folder / "model.pt", model=model)
    recorded, measured = saved["test"], evaluate(model.eval(), data)["test"]
    for name in {**recorded, **measured}:
        now, then = measured.get(name, math.nan), recorded.get(name, math.nan)
        if not math.isclose(now, then, rel_tol=5e-4):  # nan never is
            reason = "the weights, the code or the data are not those of that run"
            sys.exit(f"{folder}: {name} is {now}, not {then} as recorded: {reason}")
    print(f"{folder}: confirmed: {describe(measured)}", flush=True)


# studies: many runs, then a summary ---------------------------------------------------------------

RANK, WORLD_SIZE = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun numbers its processes
    RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def share_out(runs, args):
    """Yields the runs {folder: config} of this process: all or, under torchrun, every n-th. With
    --eval those that have a model.pt."""
    if args.eval:
        saved = {folder: runs[folder] for folder in runs if (folder / "model.pt").exists()}
        print(f"{len(saved)} of {len(runs)} runs have a model.pt", flush=True)
        if not saved:
            sys.exit(f"no model.pt of this command below {args.out}: check its flags and --out")
        runs = saved
    for index, (folder, config) in enumerate(runs.items()):
        if index % WORLD_SIZE == RANK:
            print(f"--- {folder.name}: run {index + 1} of {len(runs)}", flush=True)
            yield folder, config


def read_runs(runs, args):
    """The metrics of the runs {folder: config}, with their folders' names. None with --eval and
    until all are complete: the process that completes the last one sums them up."""
    if args.eval or len(runs) <= RANK:  # torchrun has more processes than runs
        return None
    complete = []
    for folder, config in runs.items():
        saved = read(folder / "metrics.json") if is_complete(folder) else {}
        if saved.get("config") == as_json(vars(config)):
            saved["config"] = vars(config)  # in which a tuple is not a list
            complete.append({"folder": folder.name, **saved})
    codes = {(run.get("code"), *run["test"]) for run in complete}
    done = f"{len(complete)} of {len(runs)} runs complete"
    if len(complete) < len(runs):
        print(f"no summary yet: {done}")
        return None
    if len(codes) > 1:  # an older run is still to be replaced, or measured other things
        print(f"no summary yet: {done}, but some by other code: train those again, or use --out")
        return None
    return complete


# 97.5% quantiles of Student's t distribution with 1, 2, ... degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def mean_std_ci(name, values):
    """Entries of a summary's row: the mean of n values and, where n > 1, their sample standard
    deviation and the half width of the 95% t-interval of the mean. None without values."""
    mean = std = ci = None
    if values:
        mean = float(statistics.mean(values))
    if len(values) > 1 and math.isfinite(mean):
        std, freedom = statistics.stdev(values), len(values) - 1
        quantile = 1.96 + 2.4 / freedom + 2.8 / freedom**2  # within 0.005 from 10 on
        if freedom <= len(T_QUANTILES):
            quantile = T_QUANTILES[freedom - 1]
        ci = quantile * std / math.sqrt(len(values))
    return {f"{name}_mean": mean, f"{name}_std": std, f"{name}_ci": ci}


def group(runs, names):
    """The runs by setting, {values of the config's `names`: runs}, sorted."""
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run["config"][name] for name in names)].append(run)
    return dict(sorted(groups.items()))


def summarize(runs, names):
    """A row for each setting: the values of `names`, n, the count of parameters, and each test
    metric over the seeds."""
    summary = []
    for setting, same in group(runs, names).items():
        row = {**dict(zip(names, setting)), "n": len(same), "parameters": same[0]["parameters"]}
        for metric in same[0]["test"]:
            row |= mean_std_ci(metric, [run["test"][metric] for run in same])
        summary.append(row)
    return summary


def format_cell(row, name):
    """A mean with four significant digits, then its standard deviation. A difference has its 95%
    interval in brackets, and as many decimals as give two digits of the interval's half width."""
    value = row[name]
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    metric = name.removesuffix("_mean")
    std, ci = row.get(f"{metric}_std"), row.get(f"{metric}_ci")
    if "_minus_" in name and ci is not None:
        # ci is 0 where all seeds agree.
        decimals = max(0, 1 - math.floor(math.log10(max(ci, 1e-6))))
        rounded = [round(x, decimals) + 0.0 for x in (value, value - ci, value + ci)]  # no "-0.0"
        mean, low, high = (f"{x:.{decimals}f}" for x in rounded)
        return f"{mean} [{low}, {high}]"
    text = f"{value:.4g}"
    if name.endswith("_mean"):  # zeros at the end are digits too
        text = f"{value:#.4g}".removesuffix(".")
    if std is None:
        return text
    if "e" in text:  # too large or small for decimals
        return f"{text} ± {std:.2g}"
    decimals = len(text.partition(".")[2])
    return f"{text} ± {std:.{decimals}f}"


def format_table(summary):
    """A summary as a Markdown table, a column a name, without empty columns. A single row is
    turned: a line a name."""
    columns = []
    for name in summary[0]:
        cells = [format_cell(row, name) for row in summary]
        if any(cells) and not name.endswith(("_std", "_ci")):
            columns.append([name.removesuffix("_mean"), *cells])
    if len(summary) == 1:
        names, values = zip(*columns)
        columns = [["metric", *names], ["value", *values]]
    table = []
    for cells in columns:
        width = max(len(cell) for cell in cells)
        heading, *rest = [cell.ljust(width) for cell in cells]
        table.append([heading, "-" * width, *rest])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in zip(*table))


def save_study(folder, summary, runs, figures, args):
    """Writes a study's metrics.json, figures {name: figure} and report, and prints its table."""
    first = runs[0]["config"]
    varies = [name for name in first if any(run["config"][name] != first[name] for run in runs)]
    shared = {name: value for name, value in first.items() if name not in varies}
    lines = []
    for run in runs:
        names = ("parameters", "epochs_run", "best_epoch", "train_seconds", "test")
        own = {name: run["config"][name] for name in varies}
        lines.append({"folder": run["folder"], **own, **{name: run[name] for name in names}})
    save(folder / "metrics.json", {"config": shared, "summary": summary, "runs": lines})

    table = format_table(summary)
    pictures = [f"![{name.replace('_', ' ')}]({name}.png)" for name in figures]
    legend = "±: standard deviation over n seeds. Brackets: 95% t-interval, paired by seed."
    command = f"`python {folder.name}.py{args.command}`"
    report = folder / "README.md"
    if report.exists() and command not in report.read_text("utf-8", errors="replace"):
        print(f"{report}: replaces the report of another command", flush=True)
    parts = [f"# {folder.name}", command, table, legend, *pictures]
    for name, figure in figures.items():
        save(folder / f"{name}.png", figure)
    save(report, "\n\n".join(parts) + "\n")
    print(f"{table}\nfiles in {folder}", flush=True)


# figures ------------------------------------------------------------------------------------------

# fmt: off
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# Ten colours that stay apart for colour-blind readers, one a class (Petroff, arXiv:2107.02270).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
          "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")
# fmt: on

plt.rcParams.update({"font.size": 11, "legend.frameon": False, "savefig.dpi": 130})
plt.rcParams.update({"figure.constrained_layout.use": True, "savefig.bbox": "tight"})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLORS)


def plot_losses(path, best_epoch):
    """The losses in a losses.csv from the first validation on, with the epoch marked whose weights
    are kept. The training losses before, far above, would flatten the rest."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    train = {int(row["epoch"]): float(row["train_loss"]) for row in rows}
    val = {int(row["epoch"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    first = min(val)
    shown = {epoch: loss for epoch, loss in train.items() if epoch >= first}
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(shown.keys(), shown.values(), ".-", label="training (latest weights)")
    label, red = "validation (EMA weights)", COLORS[2]
    axes.plot(val.keys(), val.values(), "o-", markersize=3, color=red, label=label)
    label = f"kept: {val[best_epoch]:.4f}, epoch {best_epoch}"
    axes.plot(best_epoch, val[best_epoch], "*", markersize=14, color="black", label=label)
    axes.set(xlabel="epoch", ylabel="loss")
    if first > 1:
        axes.set_xlabel(f"epoch (not shown: those before {first}, from {train[1]:.3g} down)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    return figure


def one_of_each_class(split):
    """The first image of every class, (10, 1, 28, 28), and the classes' names, in short lines."""
    first = [(split.labels == label).nonzero()[0, 0] for label in range(10)]
    names = [name.replace(" ", "\n").replace("/", "/\n") for name in CLASSES]
    return split.images[torch.stack(first)], names


def image_grid(rows, row_labels=None, column_labels=None):
    """A figure of images (R, C, 1, 28, 28) in [0, 1] as R labelled rows and C labelled columns."""
    count, columns = rows.shape[:2]
    width = 0.75 * columns + (1.2 if row_labels else 0)
    height = 0.75 * count + (0.3 if column_labels else 0)
    figure, axes = plt.subplots(figsize=(width, height))
    tiles = F.pad(rows.squeeze(2).cpu(), (1, 1, 1, 1))  # a pixel around each image
    picture = tiles.permute(0, 2, 1, 3).reshape(count * 30, columns * 30)
    axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_yticks([30 * i + 14.5 for i in range(count)], row_labels or [""] * count)
    axes.set_xticks([30 * i + 14.5 for i in range(columns)], column_labels or [""] * columns)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    return figure
