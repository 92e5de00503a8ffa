"""What the three scripts share: data, early stopping, the training and test loops, results on disk, flags, figures.

A script brings a model and a loss function, `loss_fn(model, images, labels) -> {name: mean over the batch}`, whose first
entry is what training minimises. `run` does the rest: trains it (`train_loop`), tests it (`test_loop`), writes the files.
"""
import argparse
import contextlib
import copy
import functools
import gzip
import hashlib
import importlib.metadata
import io
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

try:
    import fcntl
except ImportError:  # Windows: no lock, so do not start two runs into one folder there
    fcntl = None

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
EMA_DECAY = 0.998  # per step: an average over about the last 500 steps
CONSTANT_STEPS = 2000  # at the peak learning rate before the decay, in runs long enough
HARD_EPOCHS = 15  # with hard images drawn more often; for longer, a run learns the ambiguous ones by heart
NOT_SETTINGS = ("data", "out", "resume", "eval", "encoder")  # flags that do not change what a run computes
OF_ONE_RUN = ("seed", "latent", "strategy", "labels")  # flags in which the runs of a study differ
OF_STUDY = ("seeds", "latents", "strategies")  # flags that say which runs a study has


class RunError(Exception):
    """The run can't go on. The message is one line that says what is wrong and what to do."""


# ------------------------------------------------------------------------------------------------------------------ data

FILES = {  # name: (bytes, SHA-256), both of the decompressed file
    "train-images-idx3-ubyte": (47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


class Split(NamedTuple):
    images: torch.Tensor  # (N, 1, 28, 28), float32 in [0, 1]
    labels: torch.Tensor  # (N,), int64


class Data(NamedTuple):
    train: Split  # 50,000 images
    val: Split  # 10,000
    test: Split  # 10,000


def three_ways(data_dir):
    return (f"put Fashion-MNIST's four files into {data_dir}/FashionMNIST/raw, or `apt-get install dataset-fashion-mnist`, "
            "or run once with network for torchvision's download")


def find_file(name, data_dir):
    """The first place that holds `name`, decompressed or not; None where there is none."""
    raw = data_dir / "FashionMNIST" / "raw"
    return next((path for path in (raw / name, raw / f"{name}.gz", DEBIAN / f"{name}.gz") if path.exists()), None)


def download(data_dir):
    """torchvision's download, into a folder of its own first: a download that breaks off leaves nothing behind."""
    from torchvision.datasets import FashionMNIST  # here, because it takes seconds and few runs need it

    raw = data_dir / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as scratch:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            FashionMNIST(scratch, download=True)
        for name in FILES:
            os.replace(Path(scratch, "FashionMNIST", "raw", name), raw / name)


def read_idx(name, data_dir):
    """The bytes of one file after its IDX header, as a uint8 tensor. RunError where it is not the genuine file."""
    path = find_file(name, data_dir)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path} can't be read ({error}): delete it, then {three_ways(data_dir)}") from None
    if (len(content), hashlib.sha256(content).hexdigest()) != FILES[name]:
        raise RunError(f"{path} is damaged (its size or SHA-256 is not {name}'s): delete it, then {three_ways(data_dir)}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=16 if "images" in name else 8)


def load_data(data_dir, device):
    """Fashion-MNIST (Xiao et al., 2017) as one tensor per split on `device`, so that a batch is an index into it.

    The 60,000 training images are split 5:1 into training and validation by one fixed permutation, the same for every
    script and every seed: an encoder must not have seen another script's validation images.
    """
    if data_dir.exists() and not data_dir.is_dir():
        raise RunError(f"--data {data_dir} is not a folder: {three_ways(data_dir)}")
    missing = [name for name in FILES if find_file(name, data_dir) is None]
    if missing:
        try:
            download(data_dir)
        except (OSError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"no {missing[0]} and no download ({reason}): {three_ways(data_dir)}") from None

    def read_split(prefix):
        images, labels = (read_idx(f"{prefix}-{kind}-ubyte", data_dir).to(device) for kind in ("images-idx3", "labels-idx1"))
        return Split(images.view(-1, 1, 28, 28).float() / 255, labels.long())

    both, test = read_split("train"), read_split("t10k")
    order = torch.randperm(len(both.labels), generator=torch.Generator().manual_seed(0)).to(device)
    parts = order.split([len(order) - len(order) // 6, len(order) // 6])
    train, val = (Split(both.images[part], both.labels[part]) for part in parts)
    return Data(train, val, test)


# -------------------------------------------------------------------------------------------------------------- training


def get_device(name):
    """The torch.device for --device; `auto` takes the accelerator where there is one, under torchrun each rank its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device(name)


def has_bf16(device):
    """Whether the device computes in bfloat16 faster than in float32, by what it reports of itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    reported = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(reported.get("amx_bf16") or reported.get("avx512_bf16"))


class EarlyStopping:
    """Says when to stop, and keeps the best weights.

    Stops once the validation loss has not fallen by more than `min_delta` below the last such fall for `patience`
    epochs (0: never). The weights kept are those of the lowest loss seen, by however little it is the lowest.
    """

    def __init__(self, patience, min_delta):
        self.patience, self.min_delta = patience, min_delta
        self.best_loss, self.best_epoch, self.best_weights = math.inf, 0, None
        self.reference_loss, self.reference_epoch = math.inf, 0

    def step(self, epoch, loss, model):
        """Takes one validation loss; True if training should stop now."""
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, epoch
            self.best_weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        if loss < self.reference_loss - self.min_delta:
            self.reference_loss, self.reference_epoch = loss, epoch
        return 0 < self.patience <= epoch - self.reference_epoch


def learning_rate(peak, step, steps, warmup_steps):
    """Linear warm-up, a constant stretch, linear decay to zero, fitted to the run's length: any run ends cooled down
    (Hägele et al., 2024, arXiv:2405.18392). Half of a short run is constant, a long one decays nearly throughout. The
    warm-up is there because Adam's second moments are poor estimates in the first steps."""
    decay = steps - min(steps // 2, CONSTANT_STEPS)
    return peak * min((step + 1) / min(warmup_steps, steps), 1, (steps - step) / decay)


def get_rng_state(device):
    """The states of all random generators that training draws from: the CPU's and the accelerator's."""
    return [torch.get_rng_state()] + ([getattr(torch, device.type).get_rng_state()] if device.type != "cpu" else [])


def set_rng_state(device, states):
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        getattr(torch, device.type).set_rng_state(states[1])


@torch.no_grad()
def test_loop(model, loss_fn, split, batch_size=250, bf16=False):
    """The loss function's entries over a whole split, each a mean over its images.

    Random draws (the VAE's) are seeded here and the generators put back: the same model gives the same figures, and
    evaluating does not disturb the training.
    """
    device, training = split.images.device, model.training
    model.eval()
    sums, state = [], get_rng_state(device)
    torch.manual_seed(0)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size)):
            entries = loss_fn(model, images, labels)
            sums.append(torch.stack(list(entries.values())) * len(images))
    set_rng_state(device, state)
    model.train(training)
    totals = torch.stack(sums).cpu().double().sum(0) / len(split.images)
    return {name: round(total, 7) for name, total in zip(entries, totals.tolist())}  # float32 carries no more digits


def train_loop(model, loss_fn, data, args, checkpoint, weight_decay=0.0, bf16=False, warmup_steps=200):
    """Trains `model` in place and leaves it at its best weights; returns what happened.

    The weights validated, kept and returned are an exponential moving average over the steps (Polyak & Juditsky, 1992):
    they are where a constant learning rate's noise cancels out. Where the loss function also returns `difficulty`, a number
    in [0, 1] for each image of the batch, hard images are drawn up to three times as often as easy ones from epoch 2 to
    HARD_EPOCHS (online batch selection, Loshchilov & Hutter, 2016). Everything needed to go on is in the file `checkpoint`
    after every epoch (or every few, where an epoch is short). RunError where the loss is not finite, or where the
    checkpoint has other flags.
    """
    device = data.train.images.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=weight_decay, fused=True)
    average = copy.deepcopy(model)
    # Of the buffers too: batch norm's statistics must be those of the weights beside them.
    pair = [[tensor for tensor in m.state_dict().values() if tensor.is_floating_point()] for m in (average, model)]
    stopping, history = EarlyStopping(args.patience, args.min_delta), []
    seconds, first, saved, save_seconds = 0.0, 1, 0, 0
    count = len(data.train.images)
    difficulty = torch.zeros(count, device=device)  # of each image when it was last seen
    if args.resume and checkpoint.exists():
        state = load_file(checkpoint)
        check_settings(state["config"], args, checkpoint)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        vars(stopping).update(state["stopping"])
        history, seconds, first = state["history"], state["seconds"], state["history"][-1]["epoch"] + 1
        difficulty = state["difficulty"].to(device)
        set_rng_state(device, state["rng"])
    elif checkpoint.exists():
        print(f"{checkpoint} of an unfinished run is replaced; --resume would have continued it")
    steps_per_epoch = math.ceil(count / args.batch_size)
    steps = steps_per_epoch * args.epochs
    for epoch in range(first, args.epochs + 1):
        start = time.perf_counter()
        model.train()
        total = torch.zeros((), device=device)
        if epoch <= HARD_EPOCHS and difficulty.any():
            order = torch.multinomial(0.5 + difficulty, count, replacement=True)
        else:
            order = torch.randperm(count, device=device)
        for i, batch in enumerate(order.split(args.batch_size)):
            step = (epoch - 1) * steps_per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, step, steps, warmup_steps)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                entries = loss_fn(model, data.train.images[batch], data.train.labels[batch])
            loss = next(iter(entries.values()))
            if "difficulty" in entries:
                difficulty[batch] = entries["difficulty"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(EMA_DECAY, (1 + step) / (10 + step))  # short at first: the initial weights are worth nothing
            torch._foreach_lerp_(*pair, 1 - decay)
            total += loss.detach() * len(batch)
        row = {"epoch": epoch, "train_loss": round(total.item() / count, 7)}  # as losses.csv has it
        if epoch % args.val_every == 0 or epoch == args.epochs:
            row["val"] = test_loop(average, loss_fn, data.val, bf16=bf16)
            row["val_loss"] = next(iter(row["val"].values()))
        if not all(math.isfinite(row.get(name, 0)) for name in ("train_loss", "val_loss")):
            raise RunError(f"the loss is not finite in epoch {epoch} at --lr {args.lr:g}: try --lr {args.lr / 3:.1g}")
        history.append(row)
        stop = "val_loss" in row and stopping.step(epoch, row["val_loss"], average)
        seconds += time.perf_counter() - start
        left = (args.epochs - epoch) * seconds / epoch
        val = f"val {row['val_loss']:.5f}" if "val_loss" in row else " " * 11
        print(f"epoch {epoch:3d}/{args.epochs}  train {row['train_loss']:.5f}  {val}  {seconds / epoch:.2f} s/epoch"
              f"  {left // 60:.0f}m{left % 60:02.0f}s left  {checkpoint.parent.name}", flush=True)
        if stop:
            print(f"early stopping: best epoch {stopping.best_epoch}")
            break
        if time.perf_counter() - saved > 50 * save_seconds:  # so that checkpoints cost under 2% of the time
            saved = time.perf_counter()
            write_files(checkpoint.parent, {checkpoint.name: torch_bytes({
                "config": settings(args), "model": model.state_dict(), "average": average.state_dict(),
                "optimizer": optimizer.state_dict(), "stopping": vars(stopping), "history": history,
                "difficulty": difficulty, "seconds": seconds, "rng": get_rng_state(device)})})
            save_seconds = time.perf_counter() - saved
    model.load_state_dict(stopping.best_weights)
    outcome = {"epochs_run": history[-1]["epoch"], "best_epoch": stopping.best_epoch, "train_seconds": round(seconds, 2)}
    return outcome, history


# --------------------------------------------------------------------------------------------------------------- results


def write_files(folder, files):
    """Writes {name: bytes} into `folder`, all or none: each beside its place first, then all are moved there."""
    beside = {name: folder / f".{name}.tmp" for name in files}
    try:
        for name, content in files.items():
            with open(beside[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            os.replace(beside[name], folder / name)
    except OSError as error:
        raise RunError(f"{folder} can't be written ({error.strerror}): make room, or give another --out") from None
    finally:
        for path in beside.values():
            path.unlink(missing_ok=True)


def torch_bytes(value):
    buffer = io.BytesIO()  # torch.save on a full disk raises RuntimeError with a dump; a buffer leaves writing to us
    torch.save(value, buffer)
    return buffer.getvalue()


def json_bytes(value):
    return (json.dumps(value, indent=1) + "\n").encode()


def read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunError(f"no {path}: run without --eval first") from None
    except ValueError:
        raise RunError(f"{path} is not JSON: delete it and run again") from None


def load_file(path):
    """What torch.save wrote, without running any code that the file may carry."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"no {path}: run without --eval first") from None
    except Exception as error:  # torch raises half a dozen types here, for a damaged file and for a pickle with code
        reason = str(error).splitlines()[0][:100]
        raise RunError(f"{path} is not a file of weights ({reason}): delete it and run again") from None


def load_weights(path, model):
    """Loads `model.pt` into `model`. RunError where the shapes do not fit."""
    try:
        model.load_state_dict(load_file(path)["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise RunError(f"{path} does not fit this model: {str(error).splitlines()[-1].strip()}") from None


def settings(args):
    """The flags that decide what a run computes."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def plain(args):
    """Every flag, as JSON can hold it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def check_settings(saved, args, path):
    for name, value in settings(args).items():
        if saved.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise RunError(f"{path} was made with {flag} {saved.get(name)}, not {value}: give that, or another --out, "
                           "or leave out --resume to start anew")


@contextlib.contextmanager
def locked(folder, wait=False):
    """Holds `folder` for this process; waits, or RunError, where another one does. The lock dies with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} can't be made ({error.strerror}): give another --out") from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"{folder} is not writable: give another --out")
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunError(f"another process is writing to {folder}: wait for it, or give another --out") from None
    finally:
        os.close(handle)


def environment(device):
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def compare(recorded, measured, where):
    """RunError where a number of `measured` is not `recorded`'s within 1e-4, relative."""
    for name, value in measured.items():
        if not math.isclose(value, recorded.get(name, math.nan), rel_tol=1e-4):
            raise RunError(f"{where}: {name} is {value:.6g} now, {recorded.get(name)} in metrics.json")


def run(args, folder, model, loss_fn, data, evaluate, draw=None, **training):
    """One run in its own folder: trains, tests, writes the files.

    `evaluate(model)` gives the entries that the test adds to metrics.json, `draw(model, history)` the figures as
    {name: bytes}, `training` is handed to `train_loop`. With --resume an unfinished run is continued and a complete one
    is only read; with --eval the weights are tested anew, and RunError says which number differs from metrics.json.
    """
    checkpoint = folder / "checkpoint.pt"
    with locked(folder):
        complete = (folder / "metrics.json").exists() and not checkpoint.exists()
        if args.eval or args.resume and complete:
            metrics = read_json(folder / "metrics.json")
            if args.eval:
                vars(args).update({name: metrics["config"][name] for name in settings(args)})
            else:
                check_settings(metrics["config"], args, folder)
            if args.eval or draw:
                load_weights(folder / "model.pt", model)
            if args.eval:
                compare(metrics["test"], evaluate(model)["test"], folder)
            if draw:
                write_files(folder, draw(model, read_losses(folder / "losses.csv")))
            print(f"{folder}: " + ("confirmed, " if args.eval else "complete, ") + describe(metrics["test"]), flush=True)
            return
        outcome, history = train_loop(model, loss_fn, data, args, checkpoint, **training)
        config = plain(args)
        metrics = {"config": config, "environment": environment(data.train.images.device),
                   "parameters": sum(p.numel() for p in model.parameters()), **outcome, **evaluate(model),
                   "validation": [{"epoch": row["epoch"], **row["val"]} for row in history if "val" in row]}
        losses = "".join(f"{row['epoch']},{row['train_loss']:.7f},{row.get('val_loss', '')}\n" for row in history)
        write_files(folder, {**(draw(model, history) if draw else {}),
                             "losses.csv": f"epoch,train_loss,val_loss\n{losses}".encode(),
                             "model.pt": torch_bytes({"config": config, "model": model.state_dict()}),
                             "metrics.json": json_bytes(metrics)})
        checkpoint.unlink(missing_ok=True)
        print(f"test {describe(metrics['test'])}\nfiles in {folder}", flush=True)


def shared_out(jobs):
    """The jobs of this process. Where torchrun started several processes, the one that is free takes the next job.

    Ends when the jobs of all ranks are done. A rank that fails is torchrun's to notice: it stops the others.
    """
    jobs = list(jobs)
    if "WORLD_SIZE" not in os.environ:
        yield from jobs
        return
    store, _, ranks = next(torch.distributed.rendezvous("env://"))
    while (turn := store.add("turn", 1) - 1) < len(jobs):
        yield jobs[turn]
    store.add("ranks done", 1)
    while store.add("ranks done", 0) < ranks:  # not store.wait: no signal would reach Python in it
        time.sleep(0.2)


def study(args, folder, jobs, train, draw):
    """The runs of a study, then its metrics.json and figures, drawn from all runs of these flags in `folder`.

    `jobs` is {run folder's name: the run's own flags}; `train(run_args, run_folder)` makes one run; `draw(runs)` gives
    the summary and the figures as {name: bytes}. With --eval the runs are those whose weights are there.
    """
    config = settings(args)
    if args.eval:
        config = read_json(folder / "metrics.json")["config"]
        names = sorted(path.parent.name for path in folder.glob("*/model.pt"))
        jobs = {name: read_json(folder / name / "metrics.json")["config"] for name in names}
        if not jobs:
            raise RunError(f"no model.pt below {folder}: run without --eval first")
    for name, own in shared_out(jobs.items()):
        print(f"--- {name}", flush=True)
        flags = {**vars(args), **{key: own[key] for key in own if key not in NOT_SETTINGS}}
        torch.manual_seed(flags["seed"])  # before the model, so that a run is the same in any study or alone
        train(argparse.Namespace(**{key: flags[key] for key in flags if key not in OF_STUDY}), folder / name)
    if os.environ.get("RANK", "0") != "0":
        return
    shared = {name: config[name] for name in config if name not in (*NOT_SETTINGS, *OF_ONE_RUN, *OF_STUDY)}
    runs = []
    for path in sorted(folder.glob("*/metrics.json")):
        run = {"folder": path.parent.name, **read_json(path)}
        if all(run["config"].get(name) == value for name, value in shared.items()):
            runs.append(run)
        else:
            print(f"left out of the study, its flags are others: {path.parent}")
    summary, figures = draw(runs)
    short = [{"folder": run["folder"], **{name: run["config"][name] for name in OF_ONE_RUN if name in run["config"]},
              **{name: run[name] for name in ("parameters", "epochs_run", "best_epoch", "train_seconds", "test")}}
             for run in runs]
    with locked(folder, wait=True):
        write_files(folder, figures if args.eval else {
            **figures, "metrics.json": json_bytes({"config": plain(args), "summary": summary, "runs": short})})
    print(f"files in {folder}")


def mean_std(values):
    """Mean and sample standard deviation; None in its place for a single value."""
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def describe(test):
    return "  ".join(f"{name} {value:.5f}" for name, value in test.items())


def read_losses(path):
    """losses.csv as train_loop's history: one {"epoch", "train_loss", "val_loss" where evaluated} an epoch."""
    rows = [line.split(",") for line in path.read_text().split()[1:]]
    return [{"epoch": int(epoch), "train_loss": float(train), **({"val_loss": float(val)} if val else {})}
            for epoch, train, val in rows]


# ------------------------------------------------------------------------------------------------------------- the flags


def number(kind, low, high):
    """An argparse type: a number of that kind from low to high, both included; nan and inf are neither."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low:,} to {high:,}")

    return parse


def path(text):
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def make_parser(description, **defaults):
    """The flags that all scripts share; `defaults` are those of the script that asks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 1, 100_000), help="at most so many (default: %(default)s)")
    add("--batch-size", type=number(int, 1, 10_000), help="images a step (default: %(default)s)")
    add("--lr", type=number(float, 1e-8, 10), help="AdamW's peak learning rate (default: %(default)s)")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, batches and noise (default: %(default)s)")
    add("--patience", type=number(int, 0, 100_000), help="early stopping, in epochs; 0: off (default: %(default)s)")
    add("--min-delta", type=number(float, 0, 1000), default=1e-3,
        help="the fall in validation loss that early stopping counts (default: %(default)s)")
    add("--val-every", type=number(int, 1, 100_000), help="epochs between validations (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="(default: %(default)s)")
    add("--data", type=path, default=Path("data"), help="folder of the dataset (default: %(default)s)")
    add("--out", type=path, default=Path("results"), help="root of the results (default: %(default)s)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on where the same command was stopped")
    either.add_argument("--eval", action="store_true", help="no training: test the saved weights, compare with metrics.json")
    parser.set_defaults(**defaults)
    return parser


class Distinct(argparse.Action):
    """A list in which no value stands twice."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(set(values)) < len(values):
            raise argparse.ArgumentError(self, "the same value twice")
        setattr(namespace, self.dest, values)


def parse_args(parser, argv):
    args = parser.parse_args(argv)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available.get(args.device, lambda: True)():
        parser.error(f"argument --device: there is no {args.device} here, try --device auto")
    return args


def entry(main):
    """Around a script's main: errors end in one line and exit code 1, Ctrl-C in 130, SIGTERM in 143."""

    def stop(number, frame):
        print("\nstopped; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        sys.exit(128 + number)

    @functools.wraps(main)
    def wrapped(argv=None):
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            main(argv)
        except (RunError, OSError) as error:
            sys.exit(f"error: {error}")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return wrapped


# --------------------------------------------------------------------------------------------------------------- figures

# Ten colours that stay apart for colour-blind readers, in the order of CLASSES (Petroff, arXiv:2107.02270).
COLORS = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")


def new_figure(width, height):
    """An empty matplotlib figure, in inches, in the style of all figures here."""
    import matplotlib.figure  # here, so that --help does not wait for it

    matplotlib.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                                "axes.prop_cycle": matplotlib.cycler(color=COLORS), "figure.constrained_layout.use": True})
    return matplotlib.figure.Figure(figsize=(width, height))


def png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight")
    return buffer.getvalue()


def one_of_each_class(split):
    """The first image of every class, (C, 1, 28, 28), and the classes' names, broken into lines."""
    first = torch.stack([(split.labels == label).nonzero()[0, 0] for label in split.labels.unique()])
    names = [CLASSES[label].replace(" ", "\n").replace("/", "/\n") for label in split.labels[first].tolist()]
    return split.images[first], names


def image_grid(rows, row_labels=None, column_labels=None, scale=0.75):
    """Images (R, C, 1, 28, 28) in [0, 1] as R labelled rows and C labelled columns, dark on light: PNG bytes."""
    count, columns = rows.shape[:2]
    tiles = torch.nn.functional.pad(rows.squeeze(2).cpu(), (1, 1, 1, 1))  # a pixel of background around each image
    picture = tiles.permute(0, 2, 1, 3).reshape(count * 30, columns * 30)
    width, height = scale * columns + 1.2 * (row_labels is not None), scale * count + 0.3 * (column_labels is not None)
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.spines[:].set_visible(False)
    axes.set_yticks([30 * i + 14.5 for i in range(count)], row_labels or [""] * count)
    axes.set_xticks([30 * i + 14.5 for i in range(columns)], column_labels or [""] * columns)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    return png(figure)
