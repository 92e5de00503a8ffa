"""What the scripts share: data, training and test loops, results on disk, studies, flags, figures.

A script brings a model and `loss_fn(model, images, labels) -> {name: mean over the batch}`; training minimises "loss".
`run` trains it (`train_loop`), evaluates it and writes the files; `study` does so for every value of a flag. `args` is
a run's config (every hyperparameter, with or without a flag), its device, its paths and its modes.
"""
import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
import zlib
from collections import defaultdict, namedtuple
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

class RunError(Exception):
    """The run can't go on. The message is one line that says what is wrong and what to do."""

# ----------------------------------------------------------------------------------------------------------------- data

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FILES = {  # name: (bytes, SHA-256), both of the decompressed file
    "train-images-idx3-ubyte": (47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
HOW_TO_GET = "put its files into FashionMNIST/raw below --data, `apt-get install dataset-fashion-mnist`, or go online"

Split = namedtuple("Split", "images labels")  # (N, 1, 28, 28) float32 in [0, 1], and (N,) int64

def find_file(name, data_dir):
    raw = data_dir / "FashionMNIST" / "raw"
    return next((path for path in (raw / name, raw / f"{name}.gz", DEBIAN / f"{name}.gz") if path.exists()), None)

def read_idx(name, data_dir):
    """The bytes of one file after its IDX header, (N,) uint8. RunError where it is not the genuine file."""
    path = find_file(name, data_dir)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path} can't be read ({error}): delete it, then {HOW_TO_GET}") from None
    if (len(content), hashlib.sha256(content).hexdigest()) != FILES[name]:
        raise RunError(f"{path} is damaged (its size or SHA-256 is not {name}'s): delete it, then {HOW_TO_GET}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16 if "images" in name else 8)

def load_data(data_dir, device):
    """Fashion-MNIST (Xiao et al., 2017) as `Split`s .train, .val and .test on `device`: a batch is an index into them.
    The 60,000 training images are split 5:1 by one fixed permutation, for every script and seed the same: an encoder
    must not have seen another script's validation images."""
    missing = [name for name in FILES if find_file(name, data_dir) is None]
    if missing:
        from torchvision.datasets import FashionMNIST  # here, because the import takes seconds and few runs need it
        try:
            with locked(data_dir, wait=True):  # of several ranks one downloads, the others find its files
                print(f"downloading Fashion-MNIST (30 MB) into {data_dir}", flush=True)
                FashionMNIST(data_dir, download=True)
        except (OSError, RuntimeError) as error:
            raise RunError(f"no {missing[0]} and no download ({' '.join(str(error).split())}): {HOW_TO_GET}") from None
    arrays = [read_idx(name, data_dir).to(device) for name in FILES]
    full, test = (Split(images.view(-1, 1, 28, 28).float() / 255, labels.long())
                  for images, labels in (arrays[:2], arrays[2:]))
    order = torch.randperm(len(full.labels), generator=torch.Generator().manual_seed(0)).to(device)
    parts = order.split([len(order) - len(order) // 6, len(order) // 6])
    train, val = (Split(full.images[part], full.labels[part]) for part in parts)
    return SimpleNamespace(train=train, val=val, test=test)

# ------------------------------------------------------------------------------------------------------------- training

def has_bf16(device):
    """Whether the device computes in bfloat16 faster than in float32, by what it reports of itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    reported = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(reported.get("amx_bf16") or reported.get("avx512_bf16"))

def forward(model, x):
    """model(x) as float32. Training computes it in bfloat16 where the device is faster in it; evaluation never does."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=model.training and has_bf16(x.device)):
        return model(x).float()

def best_epoch(history):
    return min((row for row in history if "val" in row), key=lambda row: row["val"]["loss"])["epoch"]

def stops_early(history, patience, min_delta):
    """Whether the validation loss has not fallen by more than `min_delta` since `patience` epochs (0: never stops)."""
    reference, since = math.inf, 0
    for row in history:
        if "val" in row and row["val"]["loss"] < reference - min_delta:
            reference, since = row["val"]["loss"], row["epoch"]
    return 0 < since and 0 < patience <= len(history) - since

def learning_rate(step, steps, args):
    """Linear warm-up, a constant rate, linear decay to zero from step `constant_steps` on, or from half of all steps if
    that is earlier (Hägele et al., 2024, arXiv:2405.18392)."""
    decay_steps = steps - min(steps // 2, args.constant_steps)
    return args.lr * min((step + 1) / max(1, min(args.warmup_steps, steps)), 1, (steps - step) / decay_steps)

def update_ema(pairs, step, decay):
    """Moves each EMA tensor towards the latest. The memory is short at first: the initial weights are worth nothing."""
    decay = min(decay, (1 + step) / (10 + step))
    for ema, latest in pairs:
        ema.lerp_(latest, 1 - decay)

@torch.no_grad()
def test_loop(model, loss_fn, split, batch_size=250):
    """The means of `loss_fn` over a split. Its noise is the same in every evaluation."""
    totals = defaultdict(float)
    model.eval()
    torch.manual_seed(0)
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size)):
        for name, mean in loss_fn(model, images, labels).items():
            totals[name] += mean.item() * len(labels)
    return {name: round(total / len(split.labels), 7) for name, total in totals.items()}

@torch.no_grad()
def knn_accuracy(index, index_labels, queries, query_labels, k=10):
    """Share of `queries` (Q, D) whose label is the most frequent of their k nearest, Euclidean, in `index` (N, D)."""
    nearest = [torch.cdist(points, index).topk(min(k, len(index)), largest=False).indices
               for points in queries.split(1000)]
    votes = index_labels[torch.cat(nearest)].cpu().mode(1).values  # mode is not implemented on MPS
    return (votes == query_labels.cpu()).double().mean().item()

def train_loop(model, loss_fn, data, args):
    """Trains `model` in place, leaves it at its best weights, returns the history, a row an epoch. Validated and kept
    is the exponential moving average (EMA) of the weights (Polyak & Juditsky, 1992): it is less noisy."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    ema, best = copy.deepcopy(model), copy.deepcopy(model)
    pairs = zip(ema.state_dict().values(), model.state_dict().values())  # with batch norm's statistics, not its counter
    pairs = [(old, new) for old, new in pairs if old.is_floating_point()]
    state = {"model": model, "ema": ema, "best": best, "optimizer": optimizer}
    history = load_checkpoint(state, args) if args.resume else []
    steps_per_epoch = math.ceil(len(data.train.labels) / args.batch_size)
    while len(history) < args.epochs and not stops_early(history, args.patience, args.min_delta):
        epoch, start, total = len(history) + 1, time.perf_counter(), torch.zeros((), device=args.device)
        model.train()
        torch.manual_seed(100_000 * args.seed + epoch)  # of all devices: an epoch draws the same, resumed or not
        order = torch.randperm(len(data.train.labels)).to(args.device)  # drawn by the CPU: the same on every device
        for step, batch in enumerate(order.split(args.batch_size), (epoch - 1) * steps_per_epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(step, args.epochs * steps_per_epoch, args)
            loss = loss_fn(model, data.train.images[batch], data.train.labels[batch])["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            update_ema(pairs, step, args.ema_decay)
            total += loss.detach() * len(batch)
        history.append({"epoch": epoch, "train_loss": round(total.item() / len(order), 7)})
        if epoch % args.val_every == 0 or epoch == args.epochs:
            history[-1]["val"] = test_loop(ema, loss_fn, data.val)
            if best_epoch(history) == epoch:
                best.load_state_dict(ema.state_dict())
        history[-1]["seconds"] = round(time.perf_counter() - start, 4)
        if not all(map(math.isfinite, flatten(history[-1]).values())):
            raise RunError(f"the loss is not finite in epoch {epoch} at --lr {args.lr:g}: try {args.lr / 3:.1g}")
        print(epoch_line(history, args), flush=True)
        save_checkpoint(state, history, args)
    model.load_state_dict(best.state_dict())
    return history

def epoch_line(history, args):
    """What the terminal shows of the last epoch."""
    row, pace = history[-1], statistics.mean(row["seconds"] for row in history)
    val = f"val {row['val']['loss']:.5f}" if "val" in row else " " * 11
    left = (args.epochs - row["epoch"]) * pace
    return (f"epoch {row['epoch']:3d}/{args.epochs}  train {row['train_loss']:.5f}  {val}  {pace:.2f} s/epoch"
            f"  {left // 60:.0f}m{left % 60:02.0f}s left  {args.folder.name}")

def save_checkpoint(state, history, args):
    write_files(args.folder, {"checkpoint.pt": {
        "config": config(args), "history": history, **{name: part.state_dict() for name, part in state.items()}}})

def load_checkpoint(state, args):
    """Puts back what `save_checkpoint` wrote and returns the history; [] where there is no checkpoint."""
    path = args.folder / "checkpoint.pt"
    if not path.exists():
        return []
    check_config(load(path)["config"], args, path)
    return load(path, **state)["history"]

# -------------------------------------------------------------------------------------------------------------- results

def write_files(folder, files):
    """Writes {name: content} into `folder`, all or none: to temporary files first, then each is moved into place."""
    temporary = {name: folder / f".{name}.{platform.node()}-{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            buffer = io.BytesIO()  # torch.save straight to a full disk ends in a dump of C++
            if name.endswith(".pt"):
                torch.save(content, buffer)
            elif name.endswith(".png"):
                content.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
            else:
                buffer.write((content if isinstance(content, str) else json.dumps(content, indent=1) + "\n").encode())
            temporary[name].write_bytes(buffer.getvalue())
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)

def load(path, **parts):
    """The content of a run's .json or .pt file, which can't run code. Each of `parts` loads the state of its name."""
    try:
        saved = json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path, "cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        return {**saved, "config": dict(saved["config"])}
    except Exception as error:  # half a dozen types: not there, damaged, other shapes, a pickle with code
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} can't be used ({reason}): run again without --eval and --resume") from None

def config(args):
    """All of `args` that decides what a run computes, as JSON holds it: neither paths nor modes nor the device."""
    return json.loads(json.dumps({name: value for name, value in vars(args).items()
                                  if name not in ("resume", "eval", "device") and not isinstance(value, Path)}))

def check_config(saved, args, path):
    """RunError where a file was made with another config."""
    own = config(args)
    for name in {**own, **saved}:
        if saved.get(name) != own.get(name):
            raise RunError(f"{path} was made with {name} {saved.get(name)}, not {own.get(name)}: give the "
                           "same flags and code, or another --out")

def fingerprint(model):
    """A hash of the network: its layers with their settings, the shapes of its tensors."""
    layers = str(model).replace(", bias=True", "")  # in the shapes; only new releases print it for batch norm
    shapes = [(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]
    return hashlib.sha256(f"{layers}{shapes}".encode()).hexdigest()[:16]

@contextlib.contextmanager
def locked(folder, wait=False):
    """Makes `folder` and holds it until the block or the process ends. RunError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # no flock there: do not start two runs into one folder
        yield
        return
    import fcntl
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError:
        raise RunError(f"another process is writing to {folder}: wait for it, or give another --out") from None
    finally:
        os.close(handle)

def flatten(value, where=""):
    """All values in nested dicts and lists, by where they stand: {".test.loss": 0.07}."""
    if not isinstance(value, (dict, list)):
        return {where: value}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: leaf for key, part in parts for place, leaf in flatten(part, f"{where}.{key}").items()}

def compare(recorded, measured, path):
    """RunError where a number is not the recorded one. Another device may round: counts by 5, others by 1 in 2,000."""
    recorded = flatten(recorded)
    for name, value in flatten(measured).items():
        known, tolerance = recorded.get(name), 5 if isinstance(value, int) else abs(value) / 2000
        if not isinstance(known, (int, float)) or not abs(value - known) <= tolerance:
            raise RunError(f"{path}: {name[1:]} is {value:.6g} now, not {known}: the weights, the code or the data "
                           "are not those of that run; train it again")

def run(args, model, loss_fn, data, evaluate=None, plot=None, trained=None):
    """One run in `args.folder`: trains `model` (or only its part `trained`), evaluates it, writes the files.

    `evaluate(model)` gives what goes into metrics.json, test metrics as {"test": {name: value}}; without it, the values
    of `loss_fn`. `plot(model, history)` gives {file name: figure}. --resume continues an unfinished run and leaves a
    complete one alone. --eval evaluates the saved weights and writes nothing."""
    folder, checkpoint = args.folder, args.folder / "checkpoint.pt"
    evaluate = evaluate or (lambda model: {"test": test_loop(model, loss_fn, data.test)})
    describe = lambda test: "  ".join(f"{name} {value:.5f}" for name, value in test.items())
    if args.eval:
        load(folder / "model.pt", model=model)
        measured = evaluate(model)
        compare(load(folder / "metrics.json"), measured, folder / "metrics.json")
        print(f"{folder}: confirmed: {describe(measured['test'])}", flush=True)
        return
    args.network = fingerprint(model)
    with locked(folder):
        if args.resume and (folder / "metrics.json").exists() and not checkpoint.exists():
            check_config(load(folder / "metrics.json")["config"], args, folder)
            print(f"{folder}: complete", flush=True)
            return
        if not args.resume and (checkpoint.exists() or (folder / "metrics.json").exists()):
            print(f"{folder}: the results there will be replaced; --resume keeps them", flush=True)
        environment = {"python": platform.python_version(), "torch": torch.__version__, "device": args.device.type,
                       "threads": torch.get_num_threads(), "torchvision": version("torchvision")}
        history = train_loop(trained or model, loss_fn, data, args)
        checks = [{"epoch": row["epoch"], **row["val"]} for row in history if "val" in row]
        metrics = {"config": config(args), "environment": environment, "epochs_run": len(history),
                   "best_epoch": best_epoch(history), "train_seconds": round(sum(row["seconds"] for row in history), 2),
                   "parameters": sum(p.numel() for p in model.parameters()), **evaluate(model), "validation": checks}
        losses = [f"{row['epoch']},{row['train_loss']:.7f},{row.get('val', {}).get('loss', '')}" for row in history]
        write_files(folder, {**(plot(model, history) if plot else {}), "metrics.json": metrics,
                             "losses.csv": "\n".join(["epoch,train_loss,val_loss", *losses, ""]),
                             "model.pt": {"config": config(args), "model": model.state_dict()}})
        checkpoint.unlink(missing_ok=True)
        print(f"test {describe(metrics['test'])}")
        print(f"files in {folder}", flush=True)

# -------------------------------------------------------------------------------------------------------------- studies

RUN_METRICS = ("parameters", "epochs_run", "best_epoch", "train_seconds", "test")  # what a study keeps of a run

def study(args, runs, make_model, train, plot, cost=lambda varies: 1):
    """The runs of a study, each in a folder of its own, then its metrics.json and figures in `args.folder`.

    `runs` is {folder name: what varies in that run}; `args` holds what does not. `make_model(args)` builds a run's
    network, and may add to its args what it starts from. `train(args, model)` ends in `run`. `plot(runs)` gives summary
    and {file name: figure} from the metrics of all runs in the folder whose args differ only in what varies."""
    varying = sorted({name for varies in runs.values() for name in varies})
    if args.eval:
        runs = {path.parent.name: load(path)["config"] for path in sorted(args.folder.glob("*/model.pt"))}
        runs = {name: saved for name, saved in runs.items() if saved.keys() >= set(varying)}
        if not runs:
            raise RunError(f"no model.pt below {args.folder}: run the same command without --eval first")
    start, costs = time.perf_counter(), [1 if args.eval else cost(varies) for varies in runs.values()]
    for done, (turn, (name, varies)) in enumerate(share_out(list(enumerate(runs.items())))):
        left = (time.perf_counter() - start) * sum(costs[turn:]) / max(sum(costs[:turn]), 1) / 60
        known = done > 0 and not args.resume  # complete runs take no time
        print(f"--- {name}: run {turn + 1} of {len(runs)}{f', about {left:.0f} min left' * known}", flush=True)
        own = argparse.Namespace(**{**vars(args), **varies, "folder": args.folder / name})
        torch.manual_seed(own.seed)  # before the model, so that a run is the same in any study or alone
        train(own, make_model(own))
    if args.eval or torch.distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
        return
    comparable = comparable_runs(args, varying, make_model)
    summary, figures = plot(comparable)
    short = [{"folder": run["folder"], **{name: run["config"][name] for name in varying},
              **{name: run[name] for name in RUN_METRICS}} for run in comparable]
    write_files(args.folder, {**figures, "metrics.json": {"config": config(args), "summary": summary, "runs": short}})
    print(f"files in {args.folder}")

def share_out(jobs):
    """The jobs of this process: of torchrun's ranks, the one that is free takes the next. Ends when all are done."""
    store, ranks = torch.distributed.HashStore(), 1
    if torch.distributed.is_torchelastic_launched():
        store, _, ranks = next(torch.distributed.rendezvous("env://"))
    while (turn := store.add("turn", 1) - 1) < len(jobs):
        yield jobs[turn]
    store.add("ranks done", 1)
    while store.add("ranks done", 0) < ranks:  # not store.wait: no signal would reach Python in it
        time.sleep(0.2)

def comparable_runs(args, varying, make_model):
    """The metrics of the runs in `args.folder` that differ from `args` only in what varies; names the others."""
    runs = []
    for path in sorted(args.folder.glob("*/metrics.json")):
        try:
            metrics = load(path)
            own = argparse.Namespace(**{**vars(args), **{name: metrics["config"][name] for name in varying}})
            own.network = fingerprint(make_model(own))
            check_config(metrics["config"], own, "it")
            runs.append({"folder": path.parent.name, **{name: metrics[name] for name in RUN_METRICS}, **metrics})
        except (RunError, KeyError) as error:
            print(f"{path.parent} is left out of the summary: {error}")
    return runs

def mean_std(values):
    """Mean and sample standard deviation (None for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None

# ---------------------------------------------------------------------------------------------------------------- flags

def number(kind, low, high):
    """An argparse type: a number of that kind from low to high, both included; nan and inf are neither."""
    def parse(text):
        if not low <= kind(text) <= high:
            raise ValueError
        return kind(text)
    parse.__name__ = f"{'whole ' * (kind is int)}number from {low:,} to {high:,}"  # argparse shows it in its message
    return parse

def path(text):
    if not text:
        raise ValueError
    return Path(text)

def make_parser(description, **defaults):
    """The flags that all scripts share. `defaults` are the script's, for hyperparameters without a flag too."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 100_000), help="at most so many (default: %(default)s)")
    add("--batch-size", type=number(int, 1, 10_000), help="images a step (default: %(default)s)")
    add("--lr", type=number(float, 1e-8, 10), help="AdamW's peak learning rate (default: %(default)s)")
    add("--seed", type=number(int, 0, 42_948), default=0, help="of weights, batches, noise (default: %(default)s)")
    add("--patience", type=number(int, 0, 100_000), help="early stopping, in epochs; 0: off (default: %(default)s)")
    add("--min-delta", type=number(float, 0, 1000), default=1e-3, help="a fall that counts (default: %(default)s)")
    add("--val-every", type=number(int, 1, 100_000), help="epochs between validations (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: %(default)s)")
    add("--data", type=path, default=Path("data"), help="folder of the dataset (default: %(default)s)")
    add("--out", type=path, default=Path("results"), help="root of the results (default: %(default)s)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", action="store_true", help="go on where the same command was stopped")
    mode.add_argument("--eval", action="store_true", help="no training: compare the saved weights with metrics.json")
    parser.set_defaults(**dict(weight_decay=0.0, warmup_steps=200, constant_steps=2000, ema_decay=0.998) | defaults)
    return parser

def parse_args(parser, argv, script):
    """The args of a script, whose results go to `args.folder`. With --eval the config is the one recorded there."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, list) and len(set(value)) < len(value):
            parser.error(f"argument --{name.replace('_', '-')}: the same value twice")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = ["cpu", accelerator.type] if accelerator and accelerator.type in ("cuda", "mps") else ["cpu"]
    if args.device not in (*there, "auto"):
        parser.error(f"argument --device: there is no {args.device} here, try --device auto")
    args.device = there[-1] if args.device == "auto" else args.device
    if args.device == "cuda":  # under torchrun each rank its own
        torch.backends.cudnn.allow_tf32 = False  # evaluation is in float32
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    args.device, args.folder = torch.device(args.device), args.out / script
    if args.eval:
        recorded = load(args.folder / "metrics.json")["config"]
        vars(args).update({name: recorded[name] for name in config(args) if name in recorded})
    return args

@contextlib.contextmanager
def cli():
    """Around a script's main: errors end in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""
    def stop(number, frame):
        print("\nstopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + number)
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except (RunError, OSError) as error:
        sys.exit(f"error: {error}{': check the space and the permissions there' * isinstance(error, OSError)}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

# -------------------------------------------------------------------------------------------------------------- figures

# Ten colours that stay apart for colour-blind readers, in the order of CLASSES (Petroff, arXiv:2107.02270).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")

def new_figure(width, height):
    """An empty matplotlib figure, in inches, in the style of all figures here."""
    import matplotlib.figure  # here, so that --help does not wait for it
    matplotlib.rcParams.update({
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS), "figure.constrained_layout.use": True})
    return matplotlib.figure.Figure(figsize=(width, height))

def one_of_each_class(split):
    """The first image of every class, (C, 1, 28, 28), and the classes' names, broken into lines."""
    first = torch.stack([(split.labels == label).nonzero()[0, 0] for label in split.labels.unique()])
    names = [CLASSES[label].replace(" ", "\n").replace("/", "/\n") for label in split.labels[first].tolist()]
    return split.images[first], names

def image_grid(rows, row_labels=None, column_labels=None, scale=0.75):
    """A figure of images (R, C, 1, 28, 28) in [0, 1], dark on light, as R labelled rows and C labelled columns."""
    count, columns = rows.shape[:2]
    figure = new_figure(scale * columns + 1.2 * bool(row_labels), scale * count + 0.3 * bool(column_labels))
    tiles = torch.nn.functional.pad(rows.squeeze(2).cpu(), (1, 1, 1, 1))  # a pixel of background around each image
    picture = tiles.permute(0, 2, 1, 3).reshape(count * 30, columns * 30)
    axes = figure.subplots()
    axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_yticks([30 * i + 14.5 for i in range(count)], row_labels or [""] * count)
    axes.set_xticks([30 * i + 14.5 for i in range(columns)], column_labels or [""] * columns)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    return figure
