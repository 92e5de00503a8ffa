"""Fast, offline tests through the scripts' own `main`, on a small dataset that they write."""

import ast
import contextlib
import copy
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import re
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import classifier
import common
import conv_ae
import vae

SCRIPTS = (vae, conv_ae, classifier)
CPU = torch.device("cpu")
TRAIN, VAL, TEST = 200, 40, 60  # images of the small dataset
STEPS = 4  # of an epoch, with batches of 50
VAE = ["--epochs", "3", "--batch-size", "50", "--val-every", "2", "--seeds", "2"]
CONV_AE = ["--epochs", "2", "--batch-size", "50", "--latents", "3", "32", "--seeds", "2"]
CLASSIFIER = ["--epochs", "2", "--batch-size", "50", "--labels", "20", "200", "--seeds", "2"]
CLASSIFIER += ["--epoch-images", "40"]
STUDIES = list(zip(SCRIPTS, (VAE, CONV_AE, CLASSIFIER)))
SCRATCH = ["--strategies", "scratch", "--labels", "200", "--seeds", "1", "--epoch-images", "1"]


@pytest.fixture(scope="session", autouse=True)
def dataset(tmp_path_factory):
    """A folder in Fashion-MNIST's format that the scripts take for the genuine one. Each class is
    a bright block of its own height."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    hashes, generator = {}, torch.Generator().manual_seed(0)
    for prefix, count in (("train", TRAIN + VAL), ("t10k", TEST)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 40, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels):
            image[4 : 6 + 2 * label, 6:22] = 255
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.dim()}i", 2048 + values.dim(), *values.shape)
            content = header + bytes(values.flatten().tolist())
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)
            hashes[f"{prefix}-{kind}-ubyte"] = hashlib.sha256(content).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHA256", hashes)
        patch.setattr(common, "DEBIAN", folder / "nowhere")
        patch.setattr(vae, "COUNT", 100)
        patch.setattr(common.loss_std, "__defaults__", (2,))
        # Layout is most of the time that a figure takes.
        for name, value in (("dpi", 20), ("bbox", None)):
            patch.setitem(plt.rcParams, f"savefig.{name}", value)
        patch.setitem(plt.rcParams, "figure.constrained_layout.use", False)
        yield folder


@pytest.fixture
def rendered():
    """The test's figures become pictures, as those of `studies`. Otherwise they are only made."""


@pytest.fixture(autouse=True)
def fixed_start(request, monkeypatch):
    if "rendered" not in request.fixturenames:
        monkeypatch.setattr(plt.Figure, "savefig", lambda figure, file, format: file.write(b"-"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    plt.close("all")


class Pipe(io.StringIO):
    """A standard output that knows the lines that were not sent on at once."""

    late, pending = "", ""

    def write(self, text):
        if self.pending.endswith("\n"):
            self.late += self.pending
            self.pending = ""
        self.pending += text
        return super().write(text)

    def flush(self):
        self.pending = ""


@pytest.fixture(scope="session")
def studies(dataset, tmp_path_factory):
    """A small study of each script: where it lies, and what it printed."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("studies")
    printed = {}
    for script, own in STUDIES:
        with contextlib.redirect_stdout(Pipe()) as text:
            script.main(["--data", str(dataset), "--out", str(out), "--device", "cpu", *own])
        printed[script] = text.getvalue()
        assert text.late + text.pending == ""  # who watches a log sees each line in time
    return SimpleNamespace(
        out=out, printed=printed, encoder=out / "conv_ae/latent032-seed0/model.pt"
    )


@pytest.fixture
def here(dataset, tmp_path):
    return ["--data", str(dataset), "--out", str(tmp_path / "out"), "--device", "cpu"]


@pytest.fixture
def flags(here):
    return [*here, "--epochs", "2", "--batch-size", "50"]


@pytest.fixture
def again(studies, here, tmp_path):
    """The flags of a copy of the small studies."""
    shutil.copytree(studies.out, tmp_path / "out")
    return {script: here + own for script, own in STUDIES}


@pytest.fixture
def data(dataset):
    return common.load_data(dataset, CPU)


@pytest.fixture
def no_figures(monkeypatch):
    """Blank figures. The genuine ones take most of the time of a short run."""
    names = [(script, name) for script in SCRIPTS for name in vars(script)]
    for script, name in [(common, "image_grid"), *names]:
        if name == "image_grid" or name.startswith("plot_"):
            monkeypatch.setattr(script, name, lambda *args: plt.Figure((1, 1)))


@pytest.fixture
def started(monkeypatch):
    """Collects what a script would train, {name of the folder: model, data and config}."""
    runs = {}

    def run(model, data, config, args, folder, evaluate):
        runs[folder.name] = SimpleNamespace(model=copy.deepcopy(model), data=data, config=config)

    monkeypatch.setattr(common, "run", run)
    return runs


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def same(first, second):
    """Whether two state_dicts are the same, bit by bit."""
    return all(torch.equal(first[name], second[name]) for name in {**first, **second})


def files(folder):
    """{path: (time of the last change, content)} of all files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def failure(main, *args):
    """The line that a run ends with, besides exit code 1. Its advice destroys nothing."""
    with pytest.raises(SystemExit) as end:
        main(*args)
    message = end.value.code
    assert isinstance(message, str), message  # Python prints it and exits with code 1
    assert len(message.splitlines()) == 1 and "Traceback" not in message
    assert not re.search("again|anew|delete|remove|overwrite", message), message
    return message


def interrupt(monkeypatch, model_class, call, main, argv):
    """Presses Ctrl-C in the given call of the model's loss."""
    genuine, calls = model_class.loss, itertools.count(1)

    def loss(*args):
        if next(calls) == call:
            raise KeyboardInterrupt
        return genuine(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model_class, "loss", loss)
        main(argv)


COPIES = itertools.count()


def edited(folder, monkeypatch, module, old="", new=""):
    """A copy of `module`, imported from a file in which `old` is replaced by `new`, with the
    figures of the module: blank ones stay blank."""
    text = Path(module.__file__).read_text(encoding="utf-8")
    assert old == "" or text.count(old) == 1
    name = f"{module.__name__}_{next(COPIES)}"
    path = folder / f"{name}.py"
    path.write_text(text.replace(old, new) if old else text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copied)
    spec.loader.exec_module(copied)
    for name in [name for name in vars(module) if name.startswith("plot_")]:
        monkeypatch.setattr(copied, name, getattr(module, name))
    return copied


# hyperparameters and flags ------------------------------------------------------------------------

NOT_COUNTS = ("0", "-1", "1.5", "x", "nan", "inf", "", "1e30", "1" * 30)
NOT_FROM_ZERO = NOT_COUNTS[1:]
NOT_REALS = ("-1", "x", "nan", "inf", "", "1e30")
BAD_VALUES = {
    "--epochs": NOT_COUNTS,
    "--batch-size": NOT_COUNTS,
    "--lr": ("0", *NOT_REALS),
    "--weight-decay": NOT_REALS,
    "--warmup": ("1.01", *NOT_REALS),
    "--constant-steps": NOT_FROM_ZERO,
    "--ema-decay": ("1.01", *NOT_REALS),
    "--val-every": NOT_COUNTS,
    "--patience": NOT_FROM_ZERO,
    "--min-delta": NOT_REALS,
    "--seed": NOT_FROM_ZERO,
    "--seeds": NOT_COUNTS,
    "--data": ("",),
    "--out": ("",),
    "--device": ("gpu", "", *(() if torch.cuda.is_available() else ("cuda",))),
}
OWN_BAD_VALUES = {
    vae: {"--alpha": NOT_REALS, "--latent": NOT_COUNTS},
    conv_ae: {"--latents": NOT_COUNTS},
    classifier: {
        "--label-smoothing": ("1.01", *NOT_REALS),
        "--dropout": ("1.01", *NOT_REALS),
        "--epoch-images": NOT_COUNTS,
        "--latent": NOT_COUNTS,
        "--labels": (*NOT_COUNTS, "9", "50001", "1000000"),
        "--strategies": ("distill", ""),
        "--encoder": ("",),
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_flag_is_refused_before_data_is_read_or_a_file_touched(
    script, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(common, "load_data", lambda *args: pytest.fail("data was read"))
    monkeypatch.chdir(tmp_path)
    values = {**BAD_VALUES, **OWN_BAD_VALUES[script]}
    bad = [[flag, value] for flag in values for value in values[flag]]
    bad += [["--eval", "--resume"], ["--epoch", "3"], ["--batch", "3"], ["--nothing"], ["5"]]
    bad += [[flag, "64", "64"] for flag in ("--latents", "--labels")]
    bad += [["--strategies", "scratch", "scratch"], ["--seeds"], ["--strategies"]]
    bad += [["--out="], ["--data="], ["--seed", "41001"]]
    for argv in bad:
        with pytest.raises(SystemExit) as end:
            script.main(argv)
        message = capsys.readouterr().err.splitlines()[-1]
        assert end.value.code == 2 and ": error: " in message
        named = argv[0] if argv[0] in message else argv[-1]
        assert named in message or message.endswith("an argument is empty"), (argv, message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_hyperparameter_is_a_flag_and_reaches_the_runs(
    script, here, studies, started, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")  # argparse wraps
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "(default: 0.0" in text and "python " in text
    given = {"lr": 0.123, "weight_decay": 0.1, "ema_decay": 0.5, "min_delta": 7.5, "patience": 11}
    given |= {"epochs": 41, "batch_size": 17, "warmup": 0.5, "constant_steps": 19}
    given |= {"val_every": 21, "seed": 31}
    own = {vae: {"alpha": 0.25, "latent": 5}, conv_ae: {}, classifier: {"latent": 6}}[script]
    if script is classifier:
        own |= {"label_smoothing": 0.25, "dropout": 0.75, "epoch_images": 37}
        here += ["--strategies", "scratch", "--labels", "20"]
    for name, value in {**given, **own}.items():
        flag = "--" + name.replace("_", "-")
        assert re.search(rf"^  {flag} (INT|FLOAT)\b", text, re.MULTILINE), flag
        here += [flag, str(value)]
    script.main([*here, "--seeds", "2"])
    for run in started.values():
        config = vars(run.config)
        assert {**config, **given, **own, "seed": config["seed"]} == config
    assert {run.config.seed for run in started.values()} == {31, 32}


def test_flags_say_where_and_how_and_the_command_is_kept_as_typed(tmp_path, monkeypatch):
    plt.switch_backend("svg")
    parser = common.make_parser("doc", vae.Config)
    argv = ["--out", str(tmp_path / "a b"), "--resume", "--seed", "3", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["vae.py", *argv])
    args = common.parse_args(parser, vae.Config, None)
    assert shlex.split(args.command) == [word for word in argv if word != "--resume"]
    assert args.out == tmp_path / "a b" and args.resume and not args.eval
    assert (args.data, list(args.seeds), args.config.seed) == (Path("data"), [3, 4], 3)
    assert plt.get_backend().lower() == "agg"  # no window opens
    best = "cuda" if torch.cuda.is_available() else "cpu"
    best = "mps" if best == "cpu" and torch.backends.mps.is_available() else best
    assert args.device.type == best
    with pytest.raises(AttributeError):
        args.config.lr = 1.0


def test_each_process_on_a_cuda_machine_takes_a_gpu_and_evaluates_in_float32(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    parser = common.make_parser("doc", vae.Config)
    assert common.parse_args(parser, vae.Config, ["--device", "cpu"]).device == CPU
    assert taken == [] and torch.backends.cudnn.allow_tf32
    for rank in range(3):
        monkeypatch.setattr(common, "RANK", rank)
        assert common.parse_args(parser, vae.Config, []).device.type == "cuda"
    assert taken == [0, 1, 0] and not torch.backends.cudnn.allow_tf32


def test_studies_have_three_seeds_by_default_and_the_longest_runs_first(here, studies, started):
    conv_ae.main(here)
    names = [
        f"latent{size}-seed{seed}" for size in ("128", "032", "008", "002") for seed in range(3)
    ]
    assert list(started) == names
    started.clear()
    classifier.main([*here, "--encoder", str(studies.encoder), "--strategies", *STRATEGIES[::-1]])
    names = [
        f"{strategy}-labels{count}-seed{seed}"
        for count in (50_000, 10_000, 1000, 100)
        for strategy in STRATEGIES
        for seed in range(3)
    ]
    assert list(started) == names


def test_ctrl_c_and_a_closed_pipe_end_in_one_line_at_most(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        common.cli(stop)
    text = capsys.readouterr()
    assert end.value.code == 130 and text.out == ""
    assert "--resume" in text.err and len(text.err.strip().splitlines()) == 1

    class ClosedPipe(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    codes = []
    monkeypatch.setattr(common.os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdout", ClosedPipe())
    common.cli(lambda: print("a line"))
    assert codes == [1] and capsys.readouterr().err == ""


# data ---------------------------------------------------------------------------------------------


def test_the_split_is_disjoint_complete_and_the_same_for_every_seed(dataset, data, capsys):
    torch.manual_seed(1)
    other = common.load_data(dataset, CPU)
    assert [len(split.labels) for split in data] == [TRAIN, VAL, TEST]
    for split, again in zip(data, other):
        assert torch.equal(split.images, again.images) and torch.equal(split.labels, again.labels)
    raw = dataset / "FashionMNIST" / "raw"
    assert f"data: {raw}" in capsys.readouterr().out
    for prefix, parts in (("train", (data.train, data.val)), ("t10k", (data.test,))):
        pixels = (raw / f"{prefix}-images-idx3-ubyte").read_bytes()[16:]
        labels = (raw / f"{prefix}-labels-idx1-ubyte").read_bytes()[8:]
        given = sorted((pixels[784 * i : 784 * (i + 1)], label) for i, label in enumerate(labels))
        assert len(set(given)) == len(given)  # so that equal lists mean disjoint parts
        found = []
        for part in parts:
            assert part.images.dtype == torch.float32 and part.labels.dtype == torch.int64
            assert part.images.shape[1:] == (1, 28, 28)
            scaled = part.images.mul(255)
            assert (scaled - scaled.round()).abs().max() < 1e-4  # in [0, 1]
            rows = [bytes(row) for row in scaled.round().int().flatten(1).tolist()]
            found += zip(rows, part.labels.tolist())
        assert sorted(found) == given
    order = torch.randperm(TRAIN + VAL, generator=torch.Generator().manual_seed(0))
    labels = (raw / "train-labels-idx1-ubyte").read_bytes()[8:]
    assert data.val.labels.tolist() == [labels[i] for i in order[TRAIN:]]  # as it always was


def make_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x0b"),
        lambda path: path.write_bytes(b""),
        make_folder,
    ],
)
def test_damaged_data_is_refused_by_name(name, damage, dataset, tmp_path, flags):
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / "FashionMNIST" / "raw" / name
    damage(path)
    message = failure(vae.main, [*flags, "--data", str(tmp_path / "data")])
    assert str(path) in message and "damaged" in message and "--data" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture
def debian(dataset, tmp_path, monkeypatch):
    """A folder like that of Debian's package."""
    folder = tmp_path / "debian"
    folder.mkdir()
    for path in (dataset / "FashionMNIST" / "raw").iterdir():
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(common, "DEBIAN", folder)
    return folder


def test_missing_files_come_from_debians_package_and_own_files_stay(
    dataset, debian, data, tmp_path, capsys
):
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    genuine = {path.name: path.read_bytes() for path in (dataset / "FashionMNIST/raw").iterdir()}
    (raw / "t10k-images-idx3-ubyte").write_bytes(genuine["t10k-images-idx3-ubyte"])
    (raw / "notes.txt").write_text("mine")
    before = files(raw)
    loaded = common.load_data(tmp_path / "data", CPU)
    after = files(raw)
    assert {**after, **before} == after
    found = {path.name: content for path, (_, content) in after.items()}
    assert found == {**genuine, "notes.txt": b"mine"}
    assert str(debian) in capsys.readouterr().out
    for split, expected in zip(loaded, data):
        assert torch.equal(split.images, expected.images)


def test_a_damaged_file_of_debians_package_is_refused_by_name(debian, tmp_path):
    path = debian / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    other = gzip.compress(gzip.decompress(content)[:-1] + b"\x0b")
    for damaged in (content[:20], content[:30] + b"\xff\xff" + content[32:], b"no gzip", other):
        path.write_bytes(damaged)
        assert str(path) in failure(common.load_data, tmp_path / "data", CPU)
        assert not (tmp_path / "data" / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte").exists()
    path.unlink()
    assert str(path) in failure(common.load_data, tmp_path / "data", CPU)


def test_without_a_package_the_data_is_downloaded(debian, dataset, data, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DEBIAN", tmp_path / "nowhere")

    class Download:
        def __init__(self, folder, download):
            assert download
            self.raw_folder = str(Path(folder) / "FashionMNIST" / "raw")
            shutil.copytree(debian, self.raw_folder)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Download)
    common.fetch(tmp_path / "raw", list(common.SHA256))
    for name in common.SHA256:
        genuine = (dataset / "FashionMNIST" / "raw" / name).read_bytes()
        assert (tmp_path / "raw" / name).read_bytes() == genuine


@pytest.mark.parametrize(
    "error", [http.client.IncompleteRead(b""), RuntimeError("no\nroute"), OSError()]
)
def test_a_failed_download_ends_in_one_line_with_two_ways_out(error, flags, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fail)
    message = failure(vae.main, [*flags, "--data", str(tmp_path / "data")])
    assert str(tmp_path / "data" / "FashionMNIST" / "raw") in message
    assert "train-images-idx3-ubyte" in message and "no download" in message
    assert "apt-get install dataset-fashion-mnist" in message
    assert repr(error)[:200] in message


# training and evaluation --------------------------------------------------------------------------


class Tiny(nn.Module):
    """A model that can be followed by hand: a weight is pulled to 1, a buffer counts the steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))
        self.register_buffer("steps", torch.zeros(()))
        self.seen, self.draws = [], []

    def loss(self, images, labels):
        self.seen.append((images, labels))
        self.draws.append(torch.rand(()).item())
        if self.training:
            self.steps += 1
        pull = (self.weight - 1).square().sum() / 2
        return {"loss": pull + images.mean(), "brightness": images.mean()}


def tiny_config(**changes):
    return replace(common.Config(batch_size=60, epochs=2), **changes)  # steps of 60, 60, 60, 20


def numbered(count=TRAIN):
    """A training set whose i-th image has the brightness i / count and the label i."""
    labels = torch.arange(count)
    images = (labels / count).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    flat = [common.Split(torch.full((7, 1, 28, 28), b), torch.zeros(7).long()) for b in (0.5, 0.75)]
    return common.Data(common.Split(images, labels), *flat)


def train(tmp_path, model=None, resume=False, data=None, **changes):
    """A training of a Tiny: model and history."""
    model = model or Tiny()
    config = tiny_config(**changes)
    data = data or numbered()
    return model, common.train_loop(model, data, config, tmp_path / "tiny", "code", resume)


def test_steps_and_kept_weights_are_those_of_the_recipe_by_hand(tmp_path, monkeypatch):
    clock = itertools.count(100, 2)
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=clock.__next__))
    own = {
        "lr": 0.1,
        "weight_decay": 0.5,
        "warmup": 0.25,
        "constant_steps": 3,
        "ema_decay": 0.25,
    }
    model, history = train(tmp_path, **own)
    shares = [0.5, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]  # of the peak rate: rising, constant, falling
    weight, ema, average_steps, losses = 2.0, 2.0, 0.0, []
    m = v = 0.0
    for t, share in enumerate(shares, 1):
        losses.append((weight - 1) ** 2 / 2)
        gradient = weight - 1
        m = 0.9 * m + 0.1 * gradient  # AdamW (Loshchilov & Hutter, 2019), algorithm 2
        v = 0.999 * v + 0.001 * gradient**2
        step = m / (1 - 0.9**t) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        weight -= 0.1 * share * (step + 0.5 * weight)
        decay = min(0.25, t / (9 + t))
        ema = decay * ema + (1 - decay) * weight
        average_steps = decay * average_steps + (1 - decay) * t
    assert model.weight.item() == pytest.approx(ema, rel=1e-6)
    assert model.steps.item() == pytest.approx(average_steps, rel=1e-6)
    brightness = (TRAIN - 1) / TRAIN / 2  # batches of 60 at most are four of 50
    for epoch in (1, 2):
        mean = statistics.mean(losses[4 * epoch - 4 : 4 * epoch])
        assert history[epoch - 1]["epoch"] == epoch and history[epoch - 1]["seconds"] == 2
        assert history[epoch - 1]["train_loss"] == pytest.approx(mean + brightness, abs=2e-6)
    assert history[1]["val"]["loss"] == pytest.approx((ema - 1) ** 2 / 2 + 0.5, abs=2e-6)
    assert history[1]["val"]["brightness"] == 0.5  # of the validation images


@pytest.mark.parametrize("warmup, constant", [(0.1, 30), (0, 0), (1, 1000), (0.4, 20)])
def test_the_rate_warms_up_holds_and_decays_to_zero(warmup, constant):
    config = common.Config(lr=2.0, warmup=warmup, constant_steps=constant)
    rates = [common.learning_rate(step, 100, config) for step in range(100)]
    start, top = min(constant, 50), max(100 * warmup, 1)
    for step, rate in enumerate(rates):
        rising = (step + 1) / top if step < top else 1
        falling = 1 if step <= start else 1 - (step - start) / (100 - start)
        assert rate == pytest.approx(2.0 * min(rising, falling))


def test_an_epoch_takes_every_image_once_with_its_label_in_an_order_of_its_own(tmp_path):
    orders = []
    for seed in (0, 1, 2):
        model, _ = train(tmp_path, seed=seed)
        assert [len(labels) for _, labels in model.seen] == [50] * 8  # of 60 at most
        for images, labels in model.seen:
            assert torch.equal((images[:, 0, 0, 0] * TRAIN).round().long(), labels)
        labels = torch.cat([labels for _, labels in model.seen]).tolist()
        orders += [labels[:TRAIN], labels[TRAIN:]]
    assert all(sorted(order) == list(range(TRAIN)) for order in orders)
    assert len(set(map(tuple, orders))) == 6
    model, _ = train(tmp_path, batch_size=70)
    assert [len(labels) for _, labels in model.seen] == [67, 67, 66] * 2
    again, _ = train(tmp_path, seed=1)
    assert torch.cat([labels for _, labels in again.seen]).tolist() == orders[2] + orders[3]


def test_noise_differs_by_epoch_and_seed_and_does_not_depend_on_what_came_before(tmp_path):
    draws = set()
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, _ = train(tmp_path, seed=seed, epochs=3)
        draws |= set(model.draws)
        torch.manual_seed(5)
        other, _ = train(tmp_path, seed=seed, epochs=3)
        assert other.draws == model.draws
    assert len(draws) == 2 * 3 * 4


def history_of(losses):
    rows = [{"epoch": epoch} for epoch in range(1, len(losses) + 1)]
    for row, loss in zip(rows, losses):
        if loss is not None:
            row["val"] = {"loss": loss}
    return rows


@pytest.mark.parametrize(
    "losses, stops_at, best",
    [
        ([1.0, 0.5, 0.5, 0.5, 0.5, 0.4], 5, 2),  # epochs 3, 4, 5 bring nothing
        ([1.0, 0.5, 0.495, 0.49, 0.485, 0.4], 5, 5),  # less than min_delta; the best is the lowest
        ([1.0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4], 8, 5),  # in time: the count starts anew
        ([1.0, 0.9, 0.8, 0.7, 0.6], None, 5),
        ([None, None, None, None, 1.0], None, 5),  # never before the first validation
        ([*[None] * 4, 1.0, *[None] * 4, 1.0, None], 10, 5),  # judged only where it validates
        ([1.0, None, None, None, None, 1.0], 6, 1),
    ],
)
def test_training_stops_after_patience_epochs_without_progress(losses, stops_at, best):
    config = common.Config(patience=3, min_delta=0.05)
    history = history_of(losses)
    stops = [common.stops_early(history[:count], config) for count in range(len(losses) + 1)]
    assert stops.index(True) == stops_at if stops_at else not any(stops)
    assert common.best_epoch(history[:stops_at], config) == best
    never = replace(config, patience=0)
    assert not any(common.stops_early(history[:count], never) for count in range(len(losses) + 1))
    assert common.best_epoch(history, never) == len(losses)


@pytest.mark.parametrize(
    "own, validated, kept",
    [
        ({"patience": 2}, [3.0, 1.0, 2.0, 9.0], 2),  # stops early: the best
        ({"patience": 9, "epochs": 3}, [3.0, 1.0, 2.0], 2),
        ({}, [3.0, 1.0, 2.0, 9.0, 5.0, 7.0], 6),  # never stops: the last
        ({"val_every": 4, "patience": 1}, [1.0, 2.0], 4),  # in epochs 4 and 6, the last
    ],
)
def test_the_weights_of_the_best_epoch_are_kept_with_patience_and_without_it_the_last(
    own, validated, kept, tmp_path, monkeypatch, capsys
):
    losses, seen = iter(validated), []

    def test_loop(model, split):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"loss": next(losses)}

    monkeypatch.setattr(common, "test_loop", test_loop)
    model, history = train(tmp_path, **{"epochs": 6, "lr": 0.1, **own})
    epochs = [row["epoch"] for row in history if "val" in row]
    assert len(epochs) == len(seen) == len(validated)
    assert epochs[-1] == len(history)
    assert not same(seen[0], seen[1])
    assert same(model.state_dict(), seen[epochs.index(kept)])
    early = len(history) < own.get("epochs", 6)
    assert early == ("stops early, after 2 epochs" in capsys.readouterr().out)


def test_evaluation_is_the_mean_over_images_with_the_same_noise_every_time():
    class Noisy(nn.Linear):
        def loss(self, images, labels):
            assert not self.training and not torch.is_grad_enabled()
            return {"loss": self(images.flatten(1)).mean(), "noise": torch.rand(())}

    model = Noisy(784, 1).train()
    split = common.Split(torch.rand(301, 1, 28, 28), torch.zeros(301).long())
    ragged = common.test_loop(model, split, batch_size=100)
    torch.rand(5)
    assert ragged == common.test_loop(model, split, batch_size=100)
    mean = model(split.images.flatten(1)).mean().item()
    assert ragged["loss"] == pytest.approx(mean, abs=2e-6)
    assert common.test_loop(model, split)["loss"] == pytest.approx(mean, abs=2e-6)


def test_an_epochs_line_names_the_run_its_losses_and_the_time_left(capsys):
    history = [{"epoch": 1, "train_loss": 0.25, "seconds": 10.0}]
    history.append(
        {"epoch": 2, "train_loss": 0.125, "seconds": 50.0, "val": {"loss": 1, "kl": 2.5}}
    )
    common.print_epoch("seed7", history[:1], common.Config(epochs=5))
    common.print_epoch("seed7", history, common.Config(epochs=5))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "seed7  epoch   1/5  train 0.25000  10.00 s, 0m40s left"
    expected = "train 0.12500  val loss 1.00000 kl 2.50000  50.00 s, 1m30s left"
    assert second == f"seed7  epoch   2/5  {expected}"


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_what_was_there(
    again, tmp_path, monkeypatch
):
    before, genuine = files(tmp_path / "out" / "vae"), vae.VAE.loss
    for value in (math.nan, math.inf):
        for only_validation in (False, True):

            def loss(self, *batch, value=value, only_validation=only_validation):
                losses = genuine(self, *batch)
                if self.training and only_validation:
                    return losses
                return {name: mean * value for name, mean in losses.items()}

            with monkeypatch.context() as patch:
                patch.setattr(vae.VAE, "loss", loss)
                message = failure(vae.main, [*again[vae], "--val-every", "1"])
            assert "seed0" in message and "not finite" in message and "--lr" in message
            assert files(tmp_path / "out" / "vae") == before


def test_bfloat16_is_used_in_training_alone_and_where_class_and_device_say_so(monkeypatch):
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this release of torch does not tell")

    class Fast(nn.Linear):
        bf16 = True

    fast, plain, x = Fast(100, 100), nn.Linear(100, 100), torch.randn(10, 100)
    for name, expected in (("amx_bf16", True), ("avx512_bf16", True), ("avx2", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        assert common.uses_bf16(fast, CPU) is expected
        assert common.uses_bf16(plain, CPU) is False
        rounded = not torch.equal(common.forward(fast, x), fast(x))
        assert rounded is expected and common.forward(fast, x).dtype == torch.float32
        assert torch.equal(common.forward(plain, x), plain(x))
        assert torch.equal(common.forward(fast.eval(), x), fast(x))
        fast.train()
    assert common.uses_bf16(fast, torch.device("mps")) is False
    for native in (True, False):

        def supported(including_emulation, native=native):
            return native or including_emulation

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert common.uses_bf16(fast, torch.device("cuda")) is native


def test_the_use_of_bfloat16_is_recorded(flags, tmp_path, monkeypatch, no_figures):
    for uses in (True, False):
        monkeypatch.setattr(common, "uses_bf16", lambda model, device, uses=uses: uses)
        vae.main([*flags, "--epochs", "1"])
        run = metrics(tmp_path / "out" / "vae" / "seed0")
        assert run["environment"]["bfloat16"] is uses


def vote(index, labels, queries, truth, k=10):
    """The accuracy of a vote of the k nearest. The nearest of the winners breaks a tie."""
    right = 0
    for query, label in zip(queries, truth.tolist()):
        nearest = labels[(index - query).square().sum(1).argsort()[:k]].tolist()
        counts = [nearest.count(other) for other in nearest]
        right += nearest[counts.index(max(counts))] == label
    return right / len(truth)


def test_nearest_neighbours_vote_and_the_nearest_breaks_a_tie():
    index, labels = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]]), torch.tensor([1, 1, 2, 3, 3])
    queries = torch.tensor([[0.05], [5.04], [0.3]])
    assert common.knn(index, labels, queries, k=3).tolist() == [1, 3, 1]
    # All five vote: 1 and 3 are equal.
    assert common.knn(index, labels, queries, k=len(index)).tolist() == [1, 3, 1]
    assert common.knn(index, labels, queries, k=1).tolist() == [1, 3, 2]
    index, queries = torch.randn(50, 3), torch.randn(1500, 3)
    labels, truth = torch.randint(4, (50,)), torch.randint(4, (1500,))
    predicted = common.knn(index, labels, queries)
    assert common.accuracy(predicted, truth) == pytest.approx(vote(index, labels, queries, truth))


@pytest.mark.parametrize(
    "script, model_class, own, call",
    [
        (vae, vae.VAE, ["--val-every", "2"], 4 * STEPS + 5),  # two calls are validations
        (classifier, classifier.Classifier, SCRATCH, 1 * (STEPS + 1) + 2),
        (conv_ae, conv_ae.Autoencoder, ["--latents", "4", "--seeds", "1"], 2 * STEPS + 2),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    script, model_class, own, call, flags, tmp_path, capsys, monkeypatch, no_figures
):
    flags += ["--epochs", "5" if script is vae else "3", "--patience", "40", *own]
    script.main([*flags, "--out", str(tmp_path / "whole")])
    interrupt(monkeypatch, model_class, call, script.main, flags)
    (checkpoint,) = (tmp_path / "out").glob("*/*/checkpoint.pt")
    done = len(torch.load(checkpoint, weights_only=True)["history"])
    if script is conv_ae:  # as from a device with another memory layout
        content = torch.load(checkpoint, weights_only=True)
        for moments in content["optimizer"]["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                moments[name] = moments[name].contiguous()
        torch.save(content, checkpoint)
    capsys.readouterr()
    script.main([*flags, "--resume"])
    printed = capsys.readouterr().out
    name = checkpoint.parent.name
    assert f"{name}: goes on after epoch {done}\n" in printed and done >= 1
    assert f"epoch   {done}/" not in printed and f"epoch   {done + 1}/" in printed
    assert not checkpoint.exists()
    whole = tmp_path / "whole" / checkpoint.parent.relative_to(tmp_path / "out")
    assert same(weights(whole), weights(checkpoint.parent))
    assert (whole / "losses.csv").read_bytes() == (checkpoint.parent / "losses.csv").read_bytes()
    assert metrics(whole)["test"] == metrics(checkpoint.parent)["test"]


def test_a_failed_evaluation_loses_no_training(flags, tmp_path, capsys, monkeypatch, no_figures):
    vae.main([*flags, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as broken, pytest.raises(ZeroDivisionError):
        broken.setattr(vae, "evaluate", lambda *args: 1 / 0)
        vae.main(flags)
    capsys.readouterr()
    vae.main([*flags, "--resume"])
    assert "train" not in capsys.readouterr().out
    whole, resumed = (tmp_path / name / "vae" / "seed0" for name in ("whole", "out"))
    assert same(weights(whole), weights(resumed))


# runs on disk -------------------------------------------------------------------------------------

RUN_KEYS = {"config", "environment", "parameters", "epochs_run", "best_epoch", "train_seconds"}
TEST_KEYS = {
    vae: {
        *("loss", "recon", "kl", "kl_max", "active_dimensions", "loss_unbounded"),
        *("images_at_bound", "latent_knn_accuracy", "nearest_reconstruction"),
        *("nearest_midpoint", "nearest_blend", "nearest_sample", "step_ratio"),
    },
    conv_ae: {"loss", "mse", "l1", "latent_knn_accuracy"},
    classifier: {"loss", "accuracy"},
}


def run_folders(studies, script):
    folders = sorted(path for path in (studies.out / script.__name__).iterdir() if path.is_dir())
    assert len(folders) == {vae: 2, conv_ae: 4, classifier: 12}[script]
    return folders


@pytest.mark.parametrize("script, own", STUDIES)
def test_a_run_writes_losses_metrics_and_weights(script, own, studies, data):
    for folder in run_folders(studies, script):
        run = metrics(folder)
        assert {path.name for path in folder.iterdir()} == {
            "losses.csv",
            "metrics.json",
            "model.pt",
        }
        assert {*RUN_KEYS, "validation", "test"} <= run.keys()
        environment = {"python", "torch", "torchvision", "device", "threads", "bfloat16"}
        assert run["environment"].keys() == environment
        assert run["environment"]["device"] == "cpu" and run["environment"]["threads"] == 1
        assert run["test"].keys() >= TEST_KEYS[script]
        assert run["config"]["batch_size"] == 50 and not {"out", "eval"} & run["config"].keys()
        epochs = int(own[1])
        assert run["epochs_run"] == epochs and run["train_seconds"] > 0

        saved = torch.load(folder / "model.pt", weights_only=True)
        assert saved.keys() == {"config", "model"} and saved["config"] == run["config"]
        model = script.load(str(folder))
        assert not model.training and same(model.state_dict(), saved["model"])
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert run["parameters"] == sum(parameter.numel() for parameter in model.parameters())

        lines = (folder / "losses.csv").read_text().splitlines()
        assert lines[0] == "epoch,train_loss,val_loss" and len(lines) == 1 + epochs
        rows = {row["epoch"]: row for row in run["validation"]}
        for number, line in enumerate(lines[1:], 1):
            epoch, train_loss, val_loss = line.split(",")
            assert epoch == str(number) and re.fullmatch(r"\d+\.\d{7}", train_loss)
            assert re.fullmatch(r"(\d+\.\d{1,7})?", val_loss)
            assert val_loss == str(rows[number]["loss"] if number in rows else "")
        assert list(rows) == [epoch for epoch in range(1, epochs + 1) if val_loss_due(run, epoch)]

        # The kept weights have the recorded losses, on the validation and on the test images.
        kept = {name: value for name, value in rows[run["best_epoch"]].items() if name != "epoch"}
        splits = [(data.val, kept)]
        if script is not classifier:  # its test is of six views, see below
            splits.append((data.test, run["test"]))
        for split, recorded in splits:
            measured = common.test_loop(model, split)
            assert measured.items() and {*measured} <= {*recorded}
            for name, value in measured.items():
                assert recorded[name] == pytest.approx(value, rel=1e-4)
        assert kept["loss"] != pytest.approx(run["test"]["loss"], rel=1e-3)


def val_loss_due(run, epoch):
    return epoch % run["config"]["val_every"] == 0 or epoch == run["config"]["epochs"]


def test_a_seed_decides_a_run_whatever_ran_before(studies, again, here, tmp_path, no_figures):
    first, second = (weights(studies.out / "vae" / f"seed{seed}") for seed in (0, 1))
    assert not same(first, second)
    for script, name in ((vae, "seed1"), (conv_ae, "latent003-seed1")):
        own = dict(STUDIES)[script] + (["--latents", "3"] if script is conv_ae else [])
        script.main([*here, "--out", str(tmp_path / "alone"), *own, "--seed", "1", "--seeds", "1"])
        alone = weights(tmp_path / "alone" / script.__name__ / name)
        assert same(alone, weights(studies.out / script.__name__ / name))
    own = ["--strategies", "frozen", "--labels", "20", "--seed", "1", "--seeds", "1"]
    shutil.rmtree(tmp_path / "out" / "classifier")
    classifier.main([*again[classifier], *own])
    name = "classifier/frozen-labels20-seed1"
    assert same(weights(tmp_path / "out" / name), weights(studies.out / name))


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_confirms_every_run_and_writes_nothing(script, again, tmp_path, capsys):
    if script is classifier:  # which needs no autoencoder now
        shutil.rmtree(tmp_path / "out" / "conv_ae")
    before = files(tmp_path / "out")
    script.main([*again[script], "--eval"])
    printed = capsys.readouterr().out
    folders = [path.parent for path in (tmp_path / "out" / script.__name__).glob("*/model.pt")]
    assert printed.count(": confirmed: ") == len(folders)
    assert len(folders) == {vae: 2, conv_ae: 4, classifier: 12}[script]
    assert all(f"{folder}: confirmed: loss" in printed for folder in folders)
    assert files(tmp_path / "out") == before
    if script is not vae:
        return
    for name, change in (("alpha", ["--alpha", "0.1"]), ("lr", ["--lr", "0.1"])):
        assert f"made with {name} " in failure(script.main, [*again[script], "--eval", *change])
    assert "no model.pt" in failure(script.main, [*again[script], "--eval", "--seed", "7"])
    assert files(tmp_path / "out") == before


def test_a_model_is_evaluated_in_evaluation_mode(flags, monkeypatch, no_figures):
    seen, genuine = [], vae.evaluate

    def evaluate(model, data):
        seen.append(model.training)
        return genuine(model, data)

    monkeypatch.setattr(vae, "evaluate", evaluate)
    vae.main(flags)
    vae.main([*flags, "--eval"])
    assert seen == [False, False]


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_refuses_each_changed_metric_and_allows_what_another_device_rounds(
    script, again, tmp_path, monkeypatch
):
    genuine, measured = script.evaluate, {}

    def evaluate(model, data):  # once for each run: it takes most of the time
        key = sum(parameter.sum().item() for parameter in model.parameters())
        if key not in measured:
            measured[key] = genuine(model, data)
        return measured[key]

    monkeypatch.setattr(script, "evaluate", evaluate)
    folder = sorted((tmp_path / "out" / script.__name__).glob("*seed0"))[0]
    run = metrics(folder)
    for name, value in run["test"].items():
        changed = {**run, "test": {**run["test"], name: value * 1.001 + 1e-9}}
        (folder / "metrics.json").write_text(json.dumps(changed))
        message = failure(script.main, [*again[script], "--eval"])
        assert str(folder) in message and f" {name} is " in message
    missing = dict(run["test"])
    del missing["loss"]
    for test in (missing, {**run["test"], "f1": 0.5}):
        (folder / "metrics.json").write_text(json.dumps({**run, "test": test}))
        assert re.search(" (loss|f1) is ", failure(script.main, [*again[script], "--eval"]))
    rounded = {name: value * 1.0003 for name, value in run["test"].items()}
    (folder / "metrics.json").write_text(json.dumps({**run, "test": rounded}))
    script.main([*again[script], "--eval"])


def test_eval_refuses_the_weights_of_another_run_and_other_data(again, tmp_path, monkeypatch, data):
    first, second = (tmp_path / "out" / "vae" / f"seed{seed}" for seed in (0, 1))
    with monkeypatch.context() as patch:
        patch.setattr(common, "load_data", lambda *args: data._replace(test=data.val))
        assert "not those of that run" in failure(vae.main, [*again[vae], "--eval"])
    shutil.copy(second / "model.pt", first / "model.pt")
    assert f"{first}: " in failure(vae.main, [*again[vae], "--eval"])


def test_eval_confirms_the_runs_whose_weights_are_there(again, tmp_path, capsys):
    study = tmp_path / "out" / "classifier"
    for path in study.glob("*/model.pt"):
        if path.parent.name not in ("scratch-labels200-seed0", "frozen-labels200-seed0"):
            path.unlink()
    classifier.main([*again[classifier], "--eval"])
    assert capsys.readouterr().out.count("confirmed") == 2
    shutil.rmtree(tmp_path / "out" / "conv_ae")  # what git holds: no encoder of any other seed
    (study / "frozen-labels200-seed0" / "model.pt").unlink()
    classifier.main([*again[classifier], "--eval"])
    assert capsys.readouterr().out.count("confirmed") == 1


class Code:
    """A pickle of it calls `touch` when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["metrics.json", "model.pt", "checkpoint.pt"])
def test_missing_and_damaged_files_are_refused_by_name_and_stay(name, again, tmp_path):
    folder = tmp_path / "out" / "vae" / "seed0"
    path, argv = folder / name, [*again[vae], "--eval"]
    if name == "checkpoint.pt":
        argv[-1] = "--resume"
        content = {"config": metrics(folder)["config"], "code": metrics(folder)["code"]}
        torch.save({**content, "history": []}, path)
    content = path.read_bytes()
    damages = [b"", content[: len(content) // 2], content[1:], b"[]", b"{}", b"\xff\xfe"]
    for damage in damages:
        path.write_bytes(damage)
        message = failure(vae.main, argv)
        assert str(path) in message and path.read_bytes() == damage
    if name.endswith(".pt"):
        saved = {
            **torch.load(io.BytesIO(content), weights_only=True),
            "more": Code(tmp_path / "ran"),
        }
        torch.save(saved, path)
        torch.load(path, weights_only=False)
        (tmp_path / "ran").unlink()  # it does run where it is allowed to
        assert str(path) in failure(vae.main, argv)
        assert not (tmp_path / "ran").exists()
    if name == "model.pt":
        other = {"config": metrics(folder)["config"], "model": {"mu.weight": torch.zeros(9, 64)}}
        torch.save(other, path)
        assert str(path) in failure(vae.main, argv)
    elif name == "metrics.json":
        path.unlink()
        assert str(path) in failure(vae.main, argv)


def test_resume_keeps_complete_runs_and_refuses_another_config_by_name(
    again, tmp_path, capsys, no_figures
):
    study = tmp_path / "out" / "vae"
    before = files(study)
    vae.main([*again[vae], "--resume"])
    runs = [path for path in before if path.parent != study]
    assert len(runs) == 6 and {**files(study), **{path: before[path] for path in runs}} == files(
        study
    )
    printed = capsys.readouterr().out
    assert "seed0: complete" in printed and "seed1: complete" in printed and "epoch" not in printed
    before = files(tmp_path / "out")
    for name, change in (("lr", "0.1"), ("epochs", "9"), ("alpha", "0.1"), ("latent", "3")):
        message = failure(vae.main, [*again[vae], "--resume", f"--{name}", change])
        assert f"{study / 'seed0'} was made with {name} " in message
        assert message.split(", not ")[1].startswith(f"{change}:")
    assert files(tmp_path / "out") == before
    vae.main([*again[vae], "--seeds", "1"])  # without --resume it trains anew and says so
    printed = capsys.readouterr().out
    assert "will replace" in printed and "README.md: replaces the report of another" in printed
    (study / "seed0" / "model.pt").rename(study / "seed0" / "checkpoint.pt")  # unfinished
    vae.main([*again[vae], "--seeds", "1"])
    assert "will replace" in capsys.readouterr().out
    assert (study / "seed0" / "model.pt").stat().st_mtime_ns > before[study / "seed0" / "model.pt"][
        0
    ]


def test_a_hyperparameter_may_be_a_tuple(flags, tmp_path, capsys, monkeypatch, no_figures):
    @dataclass(frozen=True)
    class Config(vae.Config):
        hidden: tuple = (16, 8)

    monkeypatch.setattr(vae, "Config", Config)
    interrupt(monkeypatch, vae.VAE, STEPS + 2, vae.main, flags)
    vae.main([*flags, "--resume"])
    assert (tmp_path / "out" / "vae" / "README.md").exists()
    vae.main([*flags, "--resume"])
    assert "seed0: complete" in capsys.readouterr().out
    vae.main([*flags, "--eval"])
    runs = {tmp_path / "out/vae/seed0": Config(epochs=2, batch_size=50)}
    complete = common.read_runs(runs, SimpleNamespace(eval=False))
    (row,) = common.summarize(complete, ["hidden"])  # a study over it
    assert row["hidden"] == (16, 8) and common.format_cell(row, "hidden") == "(16, 8)"


def test_resume_refuses_a_checkpoint_of_another_config_by_name(flags, monkeypatch):
    interrupt(monkeypatch, vae.VAE, STEPS + 2, vae.main, flags)
    for name, change in (("lr", "0.1"), ("epochs", "9"), ("patience", "0")):
        message = failure(vae.main, [*flags, "--resume", f"--{name}", change])
        assert f"checkpoint.pt was made with {name} " in message


@pytest.mark.parametrize("finished", [False, True])
def test_resume_refuses_other_code_but_not_other_comments(
    finished, flags, tmp_path, monkeypatch, no_figures
):
    if finished:
        vae.main(flags)
    else:
        interrupt(monkeypatch, vae.VAE, STEPS + 2, vae.main, flags)
    resume = [*flags, "--resume"]
    line = "recon = F.l1_loss(reconstruction, images)"
    for old, new in (
        ("recon + self.alpha * kl", "recon + 2 * self.alpha * kl"),
        (line, "recon = F.mse_loss(reconstruction, images)"),
        ("nn.Sigmoid(),", "nn.Hardsigmoid(),"),
    ):
        script = edited(tmp_path, monkeypatch, vae, old, new)
        assert "was made by another model" in failure(script.main, resume)
    for old, new in (
        ("average.lerp_(latest, 1 - decay)", "average.copy_(latest)"),
        ("return config.lr * min(rising, 1, falling)", "return config.lr * min(1, falling)"),
    ):
        other = edited(tmp_path, monkeypatch, common, old, new)
        with monkeypatch.context() as patch:
            patch.setattr(common, "train_loop", other.train_loop)
            patch.setattr(common, "learning_rate", other.learning_rate)
            assert "was made by another model" in failure(vae.main, resume)
    comment = f"# A comment.\n        {line}  # another one"
    script = edited(tmp_path, monkeypatch, vae, line, comment)
    old = "average.lerp_(latest, 1 - decay)"
    other = edited(tmp_path, monkeypatch, common, old, f"{old}  # a comment")
    monkeypatch.setattr(common, "train_loop", other.train_loop)
    shutil.copy(Path(vae.__file__).with_name("explorer.html"), tmp_path)
    script.main(resume)
    assert (tmp_path / "out" / "vae" / "README.md").exists()


def test_the_base_class_of_a_model_counts_as_its_code_and_its_docstrings_do_not(
    tmp_path, monkeypatch
):
    def subclass(script):
        class Own(script.VAE):
            pass

        return Own(vae.Config())

    text = Path(vae.__file__).read_text(encoding="utf-8")
    docstring = next(part for part in text.split('"""')[3::2] if "Gaussian" in part)
    words = edited(tmp_path, monkeypatch, vae, docstring, "Other words.\n\n    And more.")
    code = edited(tmp_path, monkeypatch, vae, "nn.Sigmoid(),", "nn.Hardsigmoid(),")
    original = common.hash_code(subclass(vae))
    assert common.hash_code(subclass(words)) == original != common.hash_code(subclass(code))


def test_what_is_hashed_of_code_is_the_same_for_every_release_of_python():
    def swap(pair):
        """Words."""
        a, b = pair  # a comment
        return b, a

    argument = "args=arguments(args=[arg(arg='pair')])"
    assigned = "Assign(targets=[Tuple(elts=[Name(id='a'ctx=Store())Name(id='b'ctx=Store())]"
    returned = "Return(value=Tuple(elts=[Name(id='b'ctx=Load())Name(id='a'ctx=Load())]ctx=Load()))"
    assert common.source(swap) == (
        f"Module(body=[FunctionDef(name='swap'{argument}body=[Expr(value=Constant(value=None))"
        f"{assigned}ctx=Store())]value=Name(id='pair'ctx=Load())){returned}])])"
    )


def test_an_out_that_is_a_file_ends_in_one_line(flags, tmp_path):
    (tmp_path / "out").write_text("mine")
    message = failure(common.cli, lambda: vae.main(flags))
    assert str(tmp_path / "out") in message and (tmp_path / "out").read_text() == "mine"


def test_a_full_disk_ends_in_one_line_and_leaves_earlier_results_intact(
    again, tmp_path, monkeypatch
):
    resource = pytest.importorskip("resource")
    before, limits = files(tmp_path / "out"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as on a full disk
    try:
        message = failure(common.cli, lambda: vae.main(again[vae]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path / "out" / "vae" / "seed0") in message and "space" in message
    assert files(tmp_path / "out") == before  # and no part of a file is left


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file.json"
    common.save(path, {"old": 1})
    assert json.loads(path.read_text()) == {"old": 1}

    def stop(path, content):
        with open(path, "wb") as file:
            file.write(content[:3])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", stop)
        common.save(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1} and list(path.parent.iterdir()) == [path]


# studies: many runs, then a summary ---------------------------------------------------------------


def fake_run(test, parameters=9, **config):
    return {"config": config, "parameters": parameters, "test": test}


def test_a_summary_has_a_row_for_each_setting_with_means_over_its_seeds():
    runs = [
        fake_run({"loss": 4.0}, size=5, kind="b", seed=0),
        fake_run({"loss": 1.0}, size=3, kind="a", seed=0, parameters=7),
        fake_run({"loss": 2.0}, size=5, kind="b", seed=1),
        fake_run({"loss": 6.0}, size=5, kind="a", seed=0),
    ]
    keys = ("size", "kind", "n", "parameters", "loss_mean", "loss_std", "loss_ci")
    rows = [(3, "a", 1, 7, 1.0, None, None), (5, "a", 1, 9, 6.0, None, None)]
    rows.append((5, "b", 2, 9, 3.0, pytest.approx(math.sqrt(2)), pytest.approx(12.706)))
    summary = common.summarize(runs, ["size", "kind"])
    assert summary == [dict(zip(keys, row)) for row in rows]
    assert list(summary[0]) == list(keys)
    (row,) = common.summarize(runs[:3:2], [])
    assert list(row.values()) == [2, *rows[2][3:]]
    assert set(common.mean_std_ci("x", []).values()) == {None}
    infinite = common.mean_std_ci("x", [math.inf, 1.0])
    assert list(infinite.values()) == [math.inf, None, None]
    assert common.format_cell(infinite, "x_mean") == "inf"
    assert common.format_cell(common.mean_std_ci("x", [0, 0]), "x_mean") == "0.000 ± 0.000"


@pytest.mark.parametrize("n", [2, 3, 5, 10, 11, 20, 100])
def test_the_interval_of_a_mean_is_students(n):
    values = torch.randn(n).tolist()
    row = common.mean_std_ci("x", values)
    quantile = row["x_ci"] / statistics.stdev(values) * math.sqrt(n)
    # The density between -quantile and quantile, integrated.
    points = torch.linspace(-quantile, quantile, 200_001, dtype=torch.float64)
    density = torch.distributions.StudentT(n - 1.0).log_prob(points).exp()
    assert torch.trapezoid(density, points).item() == pytest.approx(0.95, abs=2e-4)
    assert row["x_mean"] == pytest.approx(statistics.mean(values))


def test_a_table_shows_four_digits_with_deviations_and_intervals_with_two_digits():
    first = {"size": 1234, "kind": "a", "loss_mean": 0.0745678, "loss_std": 0.00012}
    second = {"size": 5, "kind": "bb", "loss_mean": 12.3456, "loss_std": None}
    first |= {"loss_ci": 0.1, "a_minus_b_mean": None, "a_minus_b_std": None, "a_minus_b_ci": None}
    large = {"loss_mean": 1234.5, "loss_std": 3.2}
    assert common.format_cell(large, "loss_mean") == "1234 ± 3"
    second |= {"loss_ci": None, "a_minus_b_mean": 0.5, "a_minus_b_std": 7.0, "a_minus_b_ci": 0.75}
    assert common.format_table([first, second]).splitlines() == [
        "| size  | kind | loss              | a_minus_b          |",
        "| ----- | ---- | ----------------- | ------------------ |",
        "| 1,234 | a    | 0.07457 ± 0.00012 |                    |",
        "| 5     | bb   | 12.35             | 0.50 [-0.25, 1.25] |",
    ]
    assert common.format_table([first]).splitlines() == [  # one setting: a line a metric
        "| metric | value             |",
        "| ------ | ----------------- |",
        "| size   | 1,234             |",
        "| kind   | a                 |",
        "| loss   | 0.07457 ± 0.00012 |",
    ]
    for mean, ci, cell in (
        (0, 0.0125, "0.000 [-0.013, 0.013]"),
        (-0.0001, 0.0125, "0.000 [-0.013, 0.012]"),
        (-0.0012, 1e-16, "-0.0012000 [-0.0012000, -0.0012000]"),
        (-0.00792, 0.00070, "-0.00792 [-0.00862, -0.00722]"),
        (140, 12, "140 [128, 152]"),
        (5000, 1234, "5000 [3766, 6234]"),
        (0.25, None, "0.2500"),  # a single seed has no interval
    ):
        row = {"a_minus_b_mean": float(mean), "a_minus_b_std": ci, "a_minus_b_ci": ci}
        assert common.format_cell(row, "a_minus_b_mean") == cell


@pytest.mark.parametrize("script, own", STUDIES)
def test_a_study_writes_its_metrics_figures_and_report(script, own, studies):
    folder = studies.out / script.__name__
    study = metrics(folder)
    assert study.keys() == {"config", "summary", "runs"}
    varies = {vae: {"seed"}, conv_ae: {"seed", "latent"}}.get(script)
    varies = varies or {"seed", "labels", "strategy", "encoder_hash"}
    runs = {path.name: metrics(path) for path in run_folders(studies, script)}
    assert [run["folder"] for run in study["runs"]] == sorted(runs, key=expected_order)
    for line in study["runs"]:
        whole = runs[line["folder"]]
        own_keys = {"parameters", "epochs_run", "best_epoch", "train_seconds", "test"}
        assert line.keys() == {"folder", *varies, *own_keys}
        assert all(line[name] == whole[name] for name in own_keys)
        assert all(line[name] == whole["config"][name] for name in varies)
        together = {**study["config"], **{name: line[name] for name in varies}}
        assert together == whole["config"] and not varies & study["config"].keys()

    settings = [name for name in ("latent", "labels", "strategy") if name in varies]
    assert len(study["summary"]) == len(runs) // 2
    for row in study["summary"]:
        same_setting = [
            run["test"]
            for run in runs.values()
            if all(run["config"][name] == row[name] for name in settings)
        ]
        assert row["n"] == len(same_setting) == 2
        for name in TEST_KEYS[script]:
            values = [test[name] for test in same_setting]
            assert row[f"{name}_mean"] == pytest.approx(statistics.mean(values))
            assert row[f"{name}_std"] == pytest.approx(statistics.stdev(values))

    report = (folder / "README.md").read_text(encoding="utf-8")
    assert "95% t-interval" in report
    command = re.search("`(.*)`", report)[1]
    assert command.split()[:2] == ["python", f"{script.__name__}.py"]
    assert shlex.split(command)[2:] == [
        *("--data", shlex.split(command)[3], "--out", str(studies.out), "--device", "cpu"),
        *own,
    ]
    table = common.format_table(study["summary"])
    assert f"\n\n{table}\n\n" in report
    assert studies.printed[script].endswith(f"\n{table}\nfiles in {folder}\n")
    links = set(re.findall(r"!\[.+\]\((.+)\)", report))
    assert links == FIGURES[script] <= {path.name for path in folder.iterdir()}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in links)
    page = {"explorer.html"} if script is vae else set()
    written = {path.name for path in folder.iterdir() if path.is_file()}
    assert written == {"metrics.json", "README.md", *links, *page}


STRATEGIES = ("scratch", "finetune", "frozen")
FIGURES = {
    vae: {
        *("losses", "reconstructions", "samples", "latent_pairs", "interpolations"),
        *("interpolation_distances", "kl_dimensions"),
    },
    conv_ae: {"latent_vs_error", "reconstructions"},
    classifier: {"learning_curves", "differences", "confusion_matrix"},
}
FIGURES = {script: {f"{name}.png" for name in names} for script, names in FIGURES.items()}


def expected_order(name):
    """The longest runs first: by size, then scratch, finetune, frozen, then seeds."""
    first, *_ = name.split("-")
    size = int(re.search(r"(?:latent|labels)?(\d+)", name)[1]) if "-" in name else 0
    strategy = STRATEGIES.index(first) if first in STRATEGIES else 0
    return -size, strategy, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_terminal_shows_the_data_each_run_each_epoch_and_each_result(script, studies, dataset):
    lines = studies.printed[script].splitlines()
    assert lines[0] == f"data: {dataset / 'FashionMNIST' / 'raw'}"
    folders = sorted((path.name for path in run_folders(studies, script)), key=expected_order)
    places = [line for line in lines if line.startswith("--- ")]
    count = len(folders)
    expected = [f"--- {name}: run {i} of {count}" for i, name in enumerate(folders, 1)]
    assert places == expected
    for name in folders:
        run = metrics(studies.out / script.__name__ / name)
        epochs = [line for line in lines if line.startswith(f"{name}  epoch ")]
        assert len(epochs) == run["epochs_run"]
        for row in run["validation"]:
            shown = " ".join(f"{key} {row[key]:.5f}" for key in row if key != "epoch")
            assert f"  val {shown}  " in epochs[row["epoch"] - 1]
        assert all(re.search(r"  \d+\.\d\d s, \d+m\d\ds left$", line) for line in epochs)
        assert f"{name}: test loss {run['test']['loss']:.5f} " in "\n".join(lines)


def test_a_study_covers_the_runs_of_its_command_whatever_else_lies_there(
    again, tmp_path, monkeypatch, no_figures
):
    study = tmp_path / "out" / "conv_ae"
    for name in ("metrics.json", "model.pt"):
        (study / "latent003-seed0" / name).write_bytes(b"damaged")
    conv_ae.main(
        [*again[conv_ae], "--latents", "32", "4", "--seed", "1", "--seeds", "1", "--resume"]
    )
    covered = [run["folder"] for run in metrics(study)["runs"]]
    assert covered == ["latent032-seed1", "latent004-seed1"]
    assert [row["latent"] for row in metrics(study)["summary"]] == [4, 32]
    assert (study / "latent003-seed0" / "model.pt").read_bytes() == b"damaged"


def test_processes_share_a_study_and_the_last_one_sums_up_the_same_bytes(
    flags, tmp_path, capsys, monkeypatch, no_figures
):
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    flags += ["--epochs", "1", "--seeds", "3"]
    study = tmp_path / "out" / "vae"
    vae.main(flags)
    alone = {path: content for path, (_, content) in files(study).items()}
    shutil.rmtree(study)
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    shares = []
    for rank in (1, 0):
        monkeypatch.setattr(common, "RANK", rank)
        capsys.readouterr()
        vae.main(flags)
        printed = capsys.readouterr().out
        shares.append(re.findall(r"^--- (seed\d): run", printed, re.MULTILINE))
        if rank == 1:
            assert "no summary yet: 1 of 3 runs complete" in printed
            assert [path.name for path in study.iterdir()] == ["seed1"]
    assert shares == [["seed1"], ["seed0", "seed2"]]
    monkeypatch.setattr(common, "RANK", 3)  # a process without a run
    vae.main(flags)
    printed = capsys.readouterr().out
    assert "summary" not in printed and "files in" not in printed
    assert {path: content for path, (_, content) in files(study).items()} == alone


def test_only_torchrun_numbers_processes(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over from something else
    other = edited(tmp_path, monkeypatch, common)
    assert (other.RANK, other.WORLD_SIZE) == (0, 1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    other = edited(tmp_path, monkeypatch, common)
    assert (other.RANK, other.WORLD_SIZE) == (1, 2)


TRAINS = SimpleNamespace(eval=False)


def test_runs_of_other_code_or_config_are_not_summed_up(again, tmp_path, capsys, monkeypatch):
    study = tmp_path / "out" / "vae"
    runs = {study / f"seed{seed}": metrics(study / f"seed{seed}") for seed in (0, 1)}
    configs = {folder: vae.Config(**run["config"]) for folder, run in runs.items()}
    found = common.read_runs(configs, TRAINS)
    assert [run["folder"] for run in found] == ["seed0", "seed1"]
    assert found[1] == {"folder": "seed1", **runs[study / "seed1"]}
    other = {study / "seed0": configs[study / "seed0"], study / "seed1": vae.Config(seed=1)}
    assert common.read_runs(other, TRAINS) is None and "1 of 2" in capsys.readouterr().out
    changed = {**runs[study / "seed1"], "code": "other"}
    (study / "seed1" / "metrics.json").write_text(json.dumps(changed))
    assert common.read_runs(configs, TRAINS) is None
    run = runs[study / "seed1"]
    changed = {**run, "test": {**run["test"], "f1": 0.5}}  # by another `evaluate`
    (study / "seed1" / "metrics.json").write_text(json.dumps(changed))
    assert common.read_runs(configs, TRAINS) is None
    (study / "seed1" / "metrics.json").write_text(json.dumps(run))
    monkeypatch.setattr(common, "RANK", 2)  # a process without a run does not know today's code
    assert common.read_runs(configs, TRAINS) is None
    monkeypatch.setattr(common, "RANK", 1)
    assert common.read_runs(configs, TRAINS) is not None
    (study / "seed1" / "checkpoint.pt").touch()  # a run that replaces it has begun
    assert common.read_runs(configs, TRAINS) is None


# figures ------------------------------------------------------------------------------------------


def test_a_figure_of_images_has_each_in_its_place_with_its_label(data):
    images, names = common.one_of_each_class(data.test)
    assert torch.equal(images, data.test.images[:10]) and len(names) == 10  # labels 0 to 9
    assert names[0].split() == ["T-shirt/", "top"] and names[9].split() == ["Ankle", "boot"]
    rows = torch.stack([images, 1 - images])
    figure = common.image_grid(rows, ["first", "second"], names)
    (axes,) = figure.axes
    picture = torch.tensor(axes.images[0].get_array())
    for row, column in ((0, 0), (1, 3), (0, 9)):
        tile = picture[30 * row + 1 : 30 * row + 29, 30 * column + 1 : 30 * column + 29]
        assert torch.equal(tile, rows[row, column, 0])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "second"]
    assert [label.get_text() for label in axes.get_xticklabels()] == names


# simulated MPS ------------------------------------------------------------------------------------


class SimulatedMPS(torch.overrides.TorchFunctionMode):
    """A device on the CPU that behaves like a Mac's GPU: its own random numbers, no float64, no
    `mode`, no numpy, no operation on tensors of two devices."""

    LACKS = ("mode", "numpy", "__array__", "multinomial", "eigh", "svd", "double")
    # With gradients, that it does not see, or that torch allows:
    MIXES = ("copy_", "__get__", "__set__", "_has_compatible_shallow_copy_type", "_fused_adamw_")

    def __init__(self):
        super().__init__()
        self.storages, self.rng = {}, torch.Generator().manual_seed(99).get_state()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, dict(kwargs or {})

        def flat(value):
            if isinstance(value, torch.Tensor):
                return [value]
            parts = value.values() if isinstance(value, dict) else value
            return (
                [t for p in parts for t in flat(p)]
                if isinstance(value, dict | list | tuple)
                else []
            )

        tensors = flat([args, kwargs])
        known = [tensor.untyped_storage().data_ptr() in self.storages for tensor in tensors]
        if func == torch.Tensor.device.__get__ and known[0]:
            return torch.device("mps")
        if name == "_parse_to":
            return func(*args, **kwargs)
        target = [p.type for p in (*args, *kwargs.values()) if isinstance(p, torch.device)]
        args = tuple(CPU if isinstance(p, torch.device) else p for p in args)
        kwargs = {key: CPU if isinstance(p, torch.device) else p for key, p in kwargs.items()}
        leaves = name in ("cpu", "item", "tolist") or target == ["cpu"]
        if any(known) and not leaves:
            assert name not in self.LACKS, f"{name} on MPS"
            alone = all(own or not tensor.dim() for own, tensor in zip(known, tensors))
            allowed = name in self.MIXES or name == "__getitem__" and known[0]
            assert alone or allowed, f"{name} of tensors on two devices"
        arrives = not leaves and (target == ["mps"] or any(known))
        if arrives:  # the device has a generator of its own
            cpu = torch.get_rng_state()
            torch.set_rng_state(self.rng)
        result = func(*args, **kwargs)
        if arrives:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(cpu)
        if name in ("to", "cpu") and any(known) != arrives:  # a copy on the other device
            result = result.clone(memory_format=torch.preserve_format)
        for tensor in flat(result) if arrives else ():
            assert tensor.dtype != torch.float64, f"float64 from {name}"
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return result


@pytest.mark.parametrize(
    "script, own",
    [
        (vae, []),
        (conv_ae, ["--latents", "32", "--seeds", "1"]),
        (classifier, ["--labels", "20", "--seeds", "1", "--epochs", "1", "--epoch-images", "40"]),
    ],
)
def test_a_run_on_a_simulated_mac_is_confirmed_by_the_cpu(
    script, own, flags, studies, tmp_path, capsys, monkeypatch, request
):
    flags += [*own, "--encoder", str(studies.encoder)] if script is classifier else own
    genuine = common.parse_args

    def parse_args(*given):
        args = genuine(*given)
        args.device = torch.device("mps")
        return args

    with monkeypatch.context() as patch, SimulatedMPS():
        patch.setattr(common, "parse_args", parse_args)
        # Of torch 2.9, which asks the machine itself when a context for MPS is made.
        patch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *release: True, raising=False)
        script.main(flags)
        model = conv_ae.to_device(conv_ae.Autoencoder(8), torch.device("mps"))
        assert model.encoder.features[4].weight.is_contiguous()  # see conv_ae.to_device
    script.main([*flags, "--eval"])
    assert "confirmed" in capsys.readouterr().out
    if script is vae:  # nothing but batches and noise is random, and the CPU draws both
        request.getfixturevalue("no_figures")
        vae.main([*flags, "--out", str(tmp_path / "cpu")])
        losses = [tmp_path / name / "vae" / "seed0" / "losses.csv" for name in ("cpu", "out")]
        assert losses[0].read_bytes() == losses[1].read_bytes()


# vae ----------------------------------------------------------------------------------------------


def clusters(train=120, val=90, test=70):
    """Noisy copies of one image a class. Five classes have wrong labels in the test set, so that
    10-NN is right for half of it. Of another set, or with another's labels, it is not."""
    prototypes, splits = torch.rand(10, 1, 28, 28), []
    for count in (train, val, test):
        labels = torch.randperm(count) % 10
        noise = 0.03 * torch.randn(count, 1, 28, 28)
        splits.append(common.Split((prototypes[labels] + noise).clamp(0, 1), labels))
    wrong = 5 + (splits[2].labels + 1) % 5
    labels = torch.where(splits[2].labels < 5, splits[2].labels, wrong)
    return common.Data(splits[0], splits[1], common.Split(splits[2].images, labels))


def random_vae(**changes):
    """A VAE whose output depends on z, unlike that of a VAE before its first step."""
    model = vae.VAE(vae.Config(**changes))
    nn.init.kaiming_normal_(model.decoder[-3].weight)
    return model


def test_the_vae_is_the_given_network():
    model = random_vae()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    shapes = [(784, 128), (128, 64), (64, 8), (64, 8), (8, 64), (64, 128), (128, 784)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == shapes
    slopes = [layer.negative_slope for layer in model.modules() if isinstance(layer, nn.LeakyReLU)]
    assert slopes == [0.01] * 4
    images = torch.rand(5, 1, 28, 28)
    reconstruction, mu, logvar = model(images)
    assert reconstruction.shape == images.shape and mu.shape == logvar.shape == (5, 8)
    assert reconstruction.min() >= 0 and reconstruction.max() <= 1


def test_the_vae_starts_from_centred_images_and_a_dark_grey_output_elsewhere_with_kaiming():
    model = vae.VAE(vae.Config())
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        std = math.sqrt(2 / (1 + 0.01**2) / layer.in_features)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.weight.requires_grad and layer.bias.requires_grad
    assert not any(layer.bias.any() for layer in layers[1:-1])
    mean_image = torch.full((1, 1, 28, 28), 0.286)
    assert model.encoder[:2](mean_image).abs().max() < 1e-5
    grey = torch.full((3, 1, 28, 28), 1 / (1 + math.exp(2)))
    assert torch.allclose(model.decode(torch.randn(3, 8)), grey)


def test_the_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(2, 7, 8, dtype=torch.float64)
    normal = torch.distributions.Normal
    prior = normal(torch.zeros(()).double(), torch.ones(()).double())
    expected = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), prior)
    assert torch.allclose(vae.VAE(vae.Config()).kl(mu, logvar), expected)


def test_the_vaes_loss_is_l1_plus_alpha_times_the_kl_summed_over_dimensions(monkeypatch):
    model, images = random_vae(alpha=0.25), torch.rand(5, 1, 28, 28)
    monkeypatch.setattr(torch, "randn", torch.zeros)  # z = mu
    losses = model.loss(images, None)
    mu, logvar = model.encode(images)
    recon = (model.decode(mu) - images).abs().sum() / (5 * 784)
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum() / 5
    assert torch.allclose(losses["recon"], recon) and torch.allclose(losses["kl"], kl)
    assert torch.allclose(losses["loss"], recon + 0.25 * kl)


def test_bounds_act_only_on_unusual_images():
    model, images = vae.VAE(vae.Config()), torch.rand(100, 1, 28, 28) / 2
    h = model.encoder(images)
    mu, logvar = model.encode(images)
    assert torch.equal(mu, model.mu(h)) and torch.equal(logvar, model.logvar(h).clamp(max=1))
    with torch.no_grad():
        model.mu.bias += torch.tensor([1e6, -1e6]).repeat(4)
        model.logvar.bias += torch.tensor([1e6, 1e6, -1e6, -1e6]).repeat(2)
    mu, logvar = model.encode(images)
    assert torch.equal(mu, torch.tensor([10.0, -10.0]).repeat(100, 4))
    assert torch.equal(logvar, torch.tensor([1.0, 1.0, -20.0, -20.0]).repeat(100, 2))
    assert model.kl(mu, logvar).max().item() == pytest.approx(59.5)  # as the docstring says


def test_latent_samples_have_the_moments_of_the_posterior_and_pass_gradients():
    mu = torch.full((200_000, 1), 3.0, requires_grad=True)
    logvar = torch.full((200_000, 1), math.log(0.25), requires_grad=True)
    z = vae.VAE(vae.Config()).reparameterize(mu, logvar)
    assert abs(z.mean() - 3.0) < 0.01 and abs(z.std() - 0.5) < 0.01
    z.sum().backward()
    assert torch.equal(mu.grad, torch.ones_like(mu))
    assert torch.allclose(logvar.grad, (z - mu).detach() / 2, atol=1e-6)


def test_the_vaes_evaluation_is_that_of_the_test_set_with_training_images_as_index():
    data, model = clusters(), random_vae()
    with torch.no_grad():
        scale = model.encode(data.test.images)[0].std(0)
        model.mu.weight[3] *= 0.05 / scale[3]  # variances of 0.0025 and 0.0225, about 0.01
        model.mu.weight[4] *= 0.15 / scale[4]
    result = vae.evaluate(model, data)
    test = result["test"]
    with torch.no_grad():
        mu, logvar = model.encode(data.test.images)
        train_mu, _ = model.encode(data.train.images)
    expected = vote(train_mu, data.train.labels, mu, data.test.labels)
    assert test["latent_knn_accuracy"] == expected == 0.5
    assert expected != pytest.approx(vote(mu, data.test.labels, mu, data.test.labels))
    predicted = common.knn(train_mu, data.train.labels, mu)
    for true, row in enumerate(result["latent_knn_confusion"]):
        guesses = predicted[data.test.labels == true]
        assert row == [guesses.eq(guess).sum().item() for guess in range(10)]
    kl = -0.5 * (1 + logvar - mu**2 - logvar.exp())
    assert result["kl_dimensions"] == pytest.approx(kl.mean(0).tolist(), rel=1e-5)
    assert test["active_dimensions"] == 7
    kl = kl.sum(1)
    assert test["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert test["kl_max"] == pytest.approx(kl.max().item(), rel=1e-5)
    assert test["loss"] == pytest.approx(test["recon"] + 1e-3 * test["kl"], rel=1e-5)


def test_the_loss_without_the_bounds_and_the_images_at_a_bound_are_measured():
    data, model = clusters(), random_vae()
    at_bound = 0
    with torch.no_grad():
        model.mu.bias[0], model.logvar.bias[1] = 9, 0.5
        for image in data.test.images:
            h = model.encoder(image[None])
            at_bound += bool(model.mu(h).abs().max() > 10 or model.logvar(h).max() > 1)
        test = vae.evaluate(model, data)["test"]
        torch.manual_seed(0)
        h = model.encoder(data.test.images)
        posterior = torch.distributions.Normal(model.mu(h), (0.5 * model.logvar(h)).exp())
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0, 1))
        z = posterior.mean + posterior.stddev * torch.randn(len(h), 8)
        loss = (model.decode(z) - data.test.images).abs().mean() + 1e-3 * kl.sum(1).mean()
    assert 0 < at_bound == test["images_at_bound"] < len(data.test.labels)
    assert test["loss_unbounded"] == pytest.approx(loss.item(), rel=1e-5)
    assert test["loss"] < test["loss_unbounded"] and model.bounded


def test_the_test_loss_has_a_standard_deviation_over_noise_and_over_images(monkeypatch):
    monkeypatch.setattr(common.loss_std, "__defaults__", (20,))
    data, model, losses = clusters(test=400), random_vae(), []
    deviations = vae.evaluate(model, data)["loss_std"]
    with torch.no_grad():
        for _ in range(100):
            reconstruction, mu, logvar = model(data.test.images)
            recon = (reconstruction - data.test.images).abs().mean((1, 2, 3))
            losses.append(recon + 1e-3 * model.kl(mu, logvar).sum(1))
    losses = torch.stack(losses)
    assert deviations["noise"] == pytest.approx(losses.mean(1).std().item(), rel=0.5)
    assert deviations["images"] == pytest.approx(losses[0].std().item() / 20, rel=0.5)  # n = 400


class Square(nn.Module):
    """One latent dimension, the brightness. A pixel is the square of its value in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Linear(1, 1)

    def encode(self, images):
        return images[:, :, 0, 0], None

    def decode(self, z):
        return z.clamp(0, 1).square().view(-1, 1, 1, 1).expand(-1, 1, 28, 28)


def test_what_lies_between_two_images_is_measured_beside_a_blend_in_pixels(monkeypatch):
    monkeypatch.setattr(vae, "COUNT", 2000)
    labels = torch.arange(100) % 2
    grays = torch.tensor([0, 0.2, 1])
    train = common.Split(grays.view(3, 1, 1, 1).expand(3, 1, 28, 28), torch.zeros(3).long())
    images = labels.view(-1, 1, 1, 1).expand(100, 1, 28, 28).float()  # lines from 0 to 1, or back
    data = common.Data(train, None, common.Split(images, labels))
    found = vae.measure_lines(Square(), data)
    assert found["nearest_reconstruction"] == pytest.approx(0, abs=1e-6)
    assert found["nearest_midpoint"] == pytest.approx((0.25 - 0.2) ** 2, rel=1e-3)
    assert found["nearest_blend"] == pytest.approx((0.5 - 0.2) ** 2, rel=1e-3)
    gain = found["nearest_midpoint"] - found["nearest_blend"]
    assert found["midpoint_minus_blend"] == pytest.approx(gain)
    # Steps from i^2 / 64 to (i + 1)^2 / 64: the last, 15 / 64, is the largest, their mean 1 / 8.
    assert found["step_ratio"] == pytest.approx(15 / 8)
    samples = torch.randn(100_000, 1).clamp(0, 1).square()
    nearest = (samples - grays).square().amin(1).mean().item()
    assert found["nearest_sample"] == pytest.approx(nearest, rel=0.2)
    figure = vae.plot_distances(Square(), data, {"test": found}, {"nearest_test_image": 0.02})
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()}
    plt.close(figure)
    assert lines["blended in pixels"][4] == pytest.approx(found["nearest_blend"])
    assert lines["blended in the latent space, then decoded"][4] == pytest.approx(0.05**2, rel=1e-3)
    assert set(lines["samples of the prior"]) == {found["nearest_sample"]}
    assert set(lines["test images"]) == {0.02}


def test_the_vaes_summary_sets_it_beside_the_baselines(studies, data):
    (row,) = metrics(studies.out / "vae")["summary"]
    pairs = data.test.images[:, None] - data.train.images
    nearest = pairs.square().mean((2, 3, 4)).amin(1).mean().item()
    assert row["nearest_test_image"] == pytest.approx(nearest, rel=1e-3)
    assert row["n"] == 2 and row.items() >= common.baselines(data, [8])[8].items()


def test_the_figure_of_losses_starts_at_the_first_validation_and_says_what_it_leaves_out(studies):
    path = studies.out / "vae" / "seed0" / "losses.csv"
    rows = [line.split(",") for line in path.read_text().split()[1:]]
    (axes,) = common.plot_losses(path, best_epoch=3).axes
    train, val, kept = ([list(values) for values in line.get_data()] for line in axes.lines)
    assert train == [[2, 3], [float(row[1]) for row in rows[1:]]]
    assert val == [[2, 3], [float(row[2]) for row in rows[1:]]]
    assert kept == [[3], [float(rows[2][2])]]
    assert "before 2" in axes.get_xlabel() and f"{float(rows[0][1]):.3g}" in axes.get_xlabel()


def test_the_vae_learns(studies):
    for seed in (0, 1):
        losses = (studies.out / "vae" / f"seed{seed}" / "losses.csv").read_text().split()
        assert float(losses[3].split(",")[1]) < 0.8 * float(losses[1].split(",")[1])


@pytest.mark.parametrize("latent", [1, 2, 16])
def test_a_vae_of_any_latent_size_ends_with_all_figures(latent, here, tmp_path):
    vae.main([*here, "--epochs", "1", "--latent", str(latent)])
    study = tmp_path / "out" / "vae"
    assert {path.name for path in study.glob("*.png")} == FIGURES[vae]
    assert plt.get_fignums() == []  # closed: a long study must not fill the memory
    assert (study / "explorer.html").exists()
    assert vae.load(study / "seed0").mu.out_features == latent


class SmoothVAE(vae.VAE):
    def __init__(self, config):
        super().__init__(config)
        self.decoder[1] = nn.Softplus()


class BrightVAE(vae.VAE):
    def decode(self, z):
        return self.decoder(z).sqrt()


def test_a_layer_that_the_explorer_page_lacks_gives_no_page_and_says_so(
    flags, tmp_path, capsys, monkeypatch, no_figures
):
    page = tmp_path / "out" / "vae" / "explorer.html"
    for other in (SmoothVAE, BrightVAE):
        monkeypatch.setattr(vae, "VAE", other)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("of the decoder before")
        vae.main(flags)
        assert "no explorer.html: " in capsys.readouterr().out and not page.exists()
        assert (tmp_path / "out" / "vae" / "README.md").exists()


BEFORE = "<script>var errors = []; console.error = onerror = text => errors.push(text);</script>"
AFTER = """<script>
const $q = selector => document.querySelector(selector), stages = {};
const stage = name => { stages[name] = {picture: $q("canvas#image").toDataURL(),
  map: $q("canvas#map").toDataURL(), text: $q("#errors").textContent, list: $q("#list").textContent,
  sliders: Array.from({length: 8}, (_, i) => $q(`#z${i}`).valueAsNumber)}; };
const input = (selector, value) => {
  $q(selector).value = value;
  $q(selector).dispatchEvent(new Event("input"));
};
const pointer = (type, x, y, pointerId = 1) => {
  const box = $q("#map").getBoundingClientRect();
  const [clientX, clientY] = [box.left + x * box.width, box.top + y * box.height];
  $q("#map").dispatchEvent(new PointerEvent(type, {clientX, clientY, pointerId}));
};
stage("opened");
input("#z3", $q("#z3").max);
stage("slid");
$q("#classes button:last-child").click();
setTimeout(() => {
  stage("clicked");
  pointer("pointermove", 0.9, 0.9);  // not down: nothing moves
  stage("hovered");
  pointer("pointerdown", 0.5, 0.5);
  pointer("pointermove", 0.55, 0.4);
  stage("held");
  for (const type of ["pointerdown", "pointermove", "pointerup"]) pointer(type, 0.2, 0.2, 2);
  stage("second finger");
  pointer("pointermove", 3, -9);  // out of the map, and back
  stage("edge");
  pointer("pointermove", 0.55, 0.4);
  pointer("pointercancel", 0.55, 0.4);
  pointer("pointermove", 0.9, 0.9);
  stage("dragged");
  input("#scrub", 0);
  stage("scrubbed");
  $q("#map").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowUp"}));
  stage("keyed");
  for (const key of [...Array(99).fill("ArrowUp"), ...Array(99).fill("ArrowDown")])
    $q("#map").dispatchEvent(new KeyboardEvent("keydown", {key}));
  stage("up and down");
  pointer("pointerdown", 0.5, 0.5);
  stage("pressed");
  const [x, y] = toPixels(project(data.means[3])).map(value => value / map.width);
  pointer("pointermove", x, y);
  pointer("pointerup", x, y);
  stage("released on a mean");
  input("#scrub", 0);
  stage("scrubbed back");
  const order = Array.from(document.querySelectorAll(".slider input"), slider => slider.id);
  const report = {stages, decoded: POINTS.map(decode), errors, order};
  document.body.textContent = JSON.stringify(report);
}, 1500);
</script>"""


def test_the_explorer_page_moves_and_decodes_like_the_model_in_a_browser(data, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("there is no Chromium here")
    model, path = random_vae(), tmp_path / "page.html"
    model.decoder[1], model.decoder[3] = nn.ReLU(), nn.LeakyReLU(0.3)
    with torch.no_grad():
        mu, logvar = model.encode(data.test.images)
        train = model.encode(data.train.images)[0], data.train.labels
        means, plane = common.class_means(*train), common.discriminant_plane(*train)
        vae.save_explorer(path, model, data, means, plane)
        points = torch.cat([means, torch.randn(10, 8)])
        expected = model.decode(points).flatten(1)
        image, decoded = data.test.images[9], model.decode(mu[9:10])[0]
    kl = model.kl(mu, logvar)
    page = path.read_text(encoding="utf-8").replace("<title>", f"{BEFORE}<title>")
    page += AFTER.replace("POINTS", json.dumps(points.tolist()))
    path.write_text(page, encoding="utf-8")
    own = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000"]
    own += ["--force-prefers-reduced-motion", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *own, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    if "A VAE's latent space" not in done.stdout:
        pytest.skip("Chromium could not open the page")
    report = json.loads(re.search("<body>(.*?)</body>", done.stdout, re.DOTALL)[1])
    assert report["errors"] == []
    assert (torch.tensor(report["decoded"]) - expected).abs().max() < 1e-5
    order = kl.mean(0).argsort(descending=True).tolist()
    assert report["order"] == [f"z{i}" for i in order]

    stages = report["stages"]
    z = {name: torch.tensor(stage["sliders"]) for name, stage in stages.items()}
    assert torch.allclose(z["opened"], mu[9], atol=1e-4)  # the last class's first image
    l1 = (decoded - image).abs().mean().item()
    shown = re.findall(r"\d+\.\d+", stages["opened"]["text"])
    assert [float(number) for number in shown] == pytest.approx([l1, kl[9].sum().item()], abs=0.06)
    assert float(shown[0]) == pytest.approx(l1, abs=1e-3)
    nearest = common.CLASSES[(means - z["slid"]).norm(dim=1).argmin()]
    assert z["slid"][3] > z["opened"][3] + 1 and nearest in stages["slid"]["text"]
    assert torch.allclose(z["clicked"], means[-1], atol=1e-4)
    assert stages["hovered"] == stages["clicked"] and stages["second finger"] == stages["held"]
    assert torch.allclose(z["dragged"], z["held"], atol=1e-5)
    assert (z["edge"] - z["held"]).norm() > 0.1
    assert torch.allclose(z["released on a mean"], means[3], atol=1e-4)
    assert torch.allclose(z["scrubbed back"], z["up and down"], atol=1e-4)
    for start, end in (("clicked", "dragged"), ("scrubbed", "keyed")):
        moved = z[end] - z[start]
        assert moved.norm() > 0.01  # along the plane, and nowhere else
        assert torch.allclose(moved @ plane.T @ plane, moved, atol=1e-4)
    assert torch.allclose(z["scrubbed"], z["clicked"], atol=1e-4)
    distinct = [stages[name] for name in ("opened", "slid", "clicked", "dragged", "keyed")]
    for part in ("picture", "map", "list"):
        assert len({stage[part] for stage in distinct}) == len(distinct)
    for name, stage in stages.items():
        assert torch.allclose(torch.tensor(json.loads(stage["list"])), z[name], atol=1e-3)


def test_the_explorer_page_holds_each_class_and_the_ranges_of_the_test_images(studies, data):
    text = (studies.out / "vae" / "explorer.html").read_text(encoding="utf-8")
    page = json.loads(re.search(r"const data = (\{.*\});", text)[1])
    assert page["names"] == list(common.CLASSES) and page["colors"] == list(common.COLORS)
    model = vae.load(studies.out / "vae" / "seed0")  # of the first seed
    mu, labels = model.encode(data.train.images)[0], data.train.labels
    test_mu, logvar = model.encode(data.test.images)
    kl = model.kl(test_mu, logvar)
    for label in range(10):
        mean = mu[labels == label].mean(0)
        assert torch.allclose(torch.tensor(page["means"][label]), mean, atol=1e-4)
        assert torch.allclose(torch.tensor(page["imageMu"][label]), test_mu[label], atol=1e-4)
        assert page["imageKl"][label] == pytest.approx(kl[label].sum().item(), rel=1e-3)
        pixels = torch.tensor(page["images"][label]) / 255
        assert torch.allclose(pixels, data.test.images[label].flatten(), atol=0.005)
    assert torch.allclose(torch.tensor(page["points"]), test_mu, atol=1e-3)
    assert page["labels"] == data.test.labels.tolist()
    assert page["kl"] == pytest.approx(kl.mean(0).tolist(), rel=1e-3)
    assert max(page["low"]) <= -4 and min(page["high"]) >= 4


def test_the_plane_of_the_map_is_that_of_fishers_discriminants():
    directions = torch.linalg.qr(torch.randn(5, 5)).Q  # the first two separate the classes
    labels = torch.randperm(2000) % 10
    vectors = torch.randn(2000, 5) * torch.tensor([1.0, 1, 9, 9, 9])
    vectors[:, :2] += 6 * torch.randn(10, 2)[labels]
    plane = common.discriminant_plane(vectors @ directions.T, labels)
    assert torch.allclose(plane @ plane.T, torch.eye(2), atol=1e-5)
    assert torch.allclose(plane.T @ plane, directions[:, :2] @ directions[:, :2].T, atol=0.1)
    spread = torch.tensor([1.0, 1, 2, 2, 2])  # the means of the last three are apart the most
    vectors = spread * (torch.randn(2000, 5) + torch.randn(10, 5)[labels])
    means = torch.stack([vectors[labels == label].mean(0) for label in range(10)])
    within = torch.cov((vectors - means[labels]).T)
    values, axes = torch.linalg.eig(torch.linalg.solve(within, torch.cov(means.T)))
    best = torch.linalg.qr(axes.real[:, values.real.argsort(descending=True)[:2]]).Q
    plane = common.discriminant_plane(vectors, labels)
    assert torch.allclose(plane.T @ plane, best @ best.T, atol=0.01)
    unused = 1e-3 * (torch.randn(10)[labels] + torch.randn(2000) / 9)  # a latent dimension's mu
    plane = common.discriminant_plane(torch.column_stack([vectors, unused]), labels)
    assert plane[:, 5].abs().max() < 0.01
    one = common.discriminant_plane(torch.randn(100, 1), torch.arange(100) % 10)
    assert one.abs().tolist() == [[1.0], [0.0]]


# conv_ae ------------------------------------------------------------------------------------------


def test_pca_is_that_of_a_direct_svd_and_the_summary_sets_it_beside_each_size():
    data = clusters(train=200, test=50)
    train, test = data.train.images.flatten(1).double(), data.test.images.flatten(1).double()
    mean = train.mean(0)
    basis = torch.linalg.svd(train - mean, full_matrices=False).Vh[:5]
    centred = test - mean
    errors = centred - centred @ basis.T @ basis
    expected = errors.square().mean().item()
    index, queries = (train - mean) @ basis.T, centred @ basis.T
    neighbours = vote(index, data.train.labels, queries, data.test.labels)
    runs = []
    for size, mse in ((5, 0.1), (1024, 0.4), (5, 0.3)):
        test_metrics = {"mse": mse, "l1": 2 * mse, "latent_knn_accuracy": mse}
        runs.append(fake_run(test_metrics, latent=size))
    five, large = conv_ae.summarize(runs, data)
    assert five["pca_mse"] == pytest.approx(expected)
    assert five["pca_l1"] == pytest.approx(errors.abs().mean().item())
    assert five["ratio"] == pytest.approx(0.2 / expected)
    assert five["pca_knn_accuracy"] == pytest.approx(neighbours)
    assert (five["n"], five["mse_mean"], five["l1_mean"]) == (
        2,
        pytest.approx(0.2),
        pytest.approx(0.4),
    )
    assert large["pca_mse"] == pytest.approx(0, abs=1e-12) and large["ratio"] is None
    pixels = vote(train, data.train.labels, test, data.test.labels)
    assert five["pixel_knn_accuracy"] == large["pixel_knn_accuracy"] == pytest.approx(pixels)


def test_the_autoencoder_has_one_encoder_for_any_latent_size():
    images = torch.rand(3, 1, 28, 28)
    for latent in (1, 32):
        model = conv_ae.Autoencoder(latent)
        assert model.encoder(images).shape == (3, latent)
        assert model(images).shape == images.shape
        assert model(images).min() >= 0 and model(images).max() <= 1
        losses = model.eval().loss(images, None)
        difference = model(images) - images
        assert torch.allclose(losses["mse"], difference.square().mean())
        assert torch.allclose(losses["l1"], difference.abs().mean())
        assert torch.equal(losses["loss"], losses["mse"])
    assert (
        conv_ae.to_device(model, CPU)
        .encoder.features[4]
        .weight.is_contiguous(memory_format=torch.channels_last)
    )
    sizes = []
    maps = images
    for layer in model.encoder.features:
        maps = layer(maps)
        sizes += [maps.shape[-1]] if isinstance(layer, nn.MaxPool2d) else []
    assert sizes == [14, 7]
    features = model.encoder.features(images)
    assert torch.equal(features, maps.permute(0, 2, 3, 1).reshape(3, 3200))


def test_the_autoencoders_evaluation_is_that_of_the_test_set_with_training_images_as_index():
    data, model = clusters(), conv_ae.Autoencoder(4)
    model(data.train.images)  # statistics of batch norm that differ from the initial ones
    test = conv_ae.evaluate(model.train(), data)["test"]
    with torch.no_grad():
        assert not model.training
        index, queries = model.encoder(data.train.images), model.encoder(data.test.images)
        mse = (model(data.test.images) - data.test.images).square().mean().item()
    expected = vote(index, data.train.labels, queries, data.test.labels)
    assert test["latent_knn_accuracy"] == expected == 0.5
    assert expected != pytest.approx(vote(queries, data.test.labels, queries, data.test.labels))
    assert test["mse"] == pytest.approx(mse, rel=1e-5)


def test_where_pca_is_exact_the_study_shows_no_ratio(here, tmp_path, rendered):
    conv_ae.main([*here, "--epochs", "1", "--latents", "784", "4", "--seeds", "1"])
    small, large = metrics(tmp_path / "out" / "conv_ae")["summary"]
    assert large["latent"] == 784 and large["ratio"] is None and small["ratio"] > 0
    assert (tmp_path / "out" / "conv_ae" / "latent_vs_error.png").exists()


def test_running_statistics_of_a_short_run_are_those_of_its_images(
    here, tmp_path, data, no_figures
):
    argv = [*here, "--epochs", "2", "--batch-size", "20", *SCRATCH]
    classifier.main(argv)
    model = classifier.load(tmp_path / "out/classifier/scratch-labels200-seed0")
    own, batch = model(data.val.images), model.train().encoder(data.val.images)
    batch = model.head.eval()(batch)
    distance = (own.softmax(1) - batch.softmax(1)).abs().sum(1).mean() / 2  # in total variation
    assert distance < 0.2
    norms = [layer for layer in model.encoder if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 3 and all(0.1 < layer.momentum < 1 for layer in norms)  # 1: of one batch


# classifier ---------------------------------------------------------------------------------------


def a_classifier(**changes):
    own = {"strategy": "scratch", "labels": 50_000, "epochs": 30, **changes}
    return classifier.Classifier(replace(classifier.Config(), **own))


def test_label_subsets_are_balanced_nested_and_of_their_seed():
    labels = torch.arange(500) % 10
    subsets = [classifier.label_subset(labels, count, seed=3).tolist() for count in (20, 105, 300)]
    for subset, count in zip(subsets, (20, 105, 300)):
        shares = torch.bincount(labels[subset], minlength=10)
        assert len(set(subset)) == count and shares.max() - shares.min() <= 1
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    assert set(subsets[0]) != set(classifier.label_subset(labels, 20, seed=4).tolist())


def test_runs_train_on_the_labels_of_their_seed_and_validate_on_all_images(
    here, data, studies, started
):
    own = ["--labels", "20", "50", "200", "--epoch-images", "1"]
    classifier.main([*here, *own, "--encoder", str(studies.encoder)])
    chosen = {}
    for name, run in started.items():
        images = {
            bytes(image.tolist()) for image in (run.data.train.images * 255).byte().flatten(1)
        }
        strategy, count, seed = re.fullmatch(r"(\w+)-labels(\d+)-seed(\d)", name).groups()
        assert len(images) == int(count)
        pairs = zip(run.data.train.images, run.data.train.labels)
        for image, label in itertools.islice(pairs, 5):
            (place,) = (data.train.images == image).flatten(1).all(1).nonzero()[0]
            assert data.train.labels[place] == label
        assert images == chosen.setdefault((int(count), seed), images)  # for all strategies
        for part, whole in ((run.data.val, data.val), (run.data.test, data.test)):
            assert torch.equal(part.images, whole.images) and torch.equal(part.labels, whole.labels)
        assert (run.config.strategy, run.config.labels) == (strategy, int(count))
    assert chosen[20, "0"] < chosen[50, "0"] < chosen[200, "0"]
    assert chosen[20, "0"] != chosen[20, "1"]


def test_finetune_and_frozen_start_at_the_encoder_of_their_seed(again, studies, started):
    classifier.main([*again[classifier], "--labels", "20"])
    encoders = {}
    for seed in (0, 1):
        model = conv_ae.load(studies.out / "conv_ae" / f"latent032-seed{seed}")
        encoders[seed] = model.encoder.features.state_dict()
    hashes = set()
    for run in started.values():
        start, seed = run.model.encoder.state_dict(), run.config.seed
        assert same(start, encoders[seed]) == (run.config.strategy != "scratch")
        assert not same(start, encoders[1 - seed])
        assert (run.config.encoder_hash is None) == (run.config.strategy == "scratch")
        hashes.add((seed, run.config.encoder_hash))
    assert len(hashes) == 4 and len({text for _, text in hashes}) == 3
    heads = [run.model.head.state_dict() for run in started.values() if run.config.seed == 0]
    assert same(heads[0], heads[1])  # all strategies start at the same head
    first, second = (started[f"scratch-labels20-seed{seed}"].model.state_dict() for seed in (0, 1))
    assert not same(first, second)


def test_another_encoder_is_another_config(again, studies, tmp_path):
    argv = [*again[classifier], "--labels", "20", "--resume"]
    other = studies.out / "conv_ae" / "latent032-seed1" / "model.pt"
    message = failure(classifier.main, [*argv, "--seeds", "1", "--encoder", str(other)])
    assert "finetune-labels20-seed0 was made with encoder_hash " in message
    shutil.copy(studies.encoder, tmp_path / "moved.pt")  # the same weights at another place
    moved = ["--encoder", str(tmp_path / "moved.pt"), "--strategies", "frozen", "--seeds", "1"]
    classifier.main([*argv, *moved])


def test_a_frozen_encoder_stays_bit_by_bit_and_a_finetuned_one_moves(studies):
    for seed in (0, 1):
        path = studies.out / "conv_ae" / f"latent032-seed{seed}"
        start = conv_ae.load(path).encoder.features.state_dict()
        ends = {}
        for strategy in STRATEGIES:
            path = studies.out / "classifier" / f"{strategy}-labels200-seed{seed}"
            ends[strategy] = classifier.load(path).encoder.state_dict()
        assert same(ends["frozen"], start)  # buffers of batch norm included
        assert not same(ends["finetune"], start) and not same(ends["scratch"], ends["finetune"])


def test_frozen_trains_the_head_alone_on_augmented_images_as_the_others_do():
    images, labels = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    for strategy in STRATEGIES:
        model = a_classifier(strategy=strategy, dropout=0.0).train()
        torch.manual_seed(0)
        first = model.loss(images, labels)["loss"]
        assert model.loss(images, labels)["loss"] != first  # other flips and shifts
        first.backward()
        moves = [parameter.grad is not None for parameter in model.encoder.parameters()]
        assert all(moves) if strategy != "frozen" else not any(moves)
        assert all(parameter.grad is not None for parameter in model.head.parameters())
        assert model.head.training and model.encoder[2].training == (strategy != "frozen")
        modes = {module.training for module in model.eval().modules()}
        assert modes == {False} and model.loss(images, labels) == model.loss(images, labels)


def test_label_smoothing_and_dropout_act_in_training_alone():
    images, labels = torch.rand(20, 1, 28, 28), torch.arange(20) % 10
    model = a_classifier(label_smoothing=0.2, dropout=0.0)
    model.augment = lambda images: images
    with torch.no_grad():
        model.head[-1].weight.mul_(20)  # smoothing matters where the model is sure
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        model.train(training)
        with torch.no_grad():
            losses = model.loss(images, labels)
            logits = common.forward(model, images)
        log_p = logits - logits.exp().sum(1, keepdim=True).log()
        right = log_p.gather(1, labels[:, None]).squeeze(1)
        expected = -((1 - smoothing) * right + smoothing * log_p.mean(1)).mean()
        assert losses["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
        share = (logits.argmax(1) == labels).double().mean().item()
        assert losses["accuracy"].item() == pytest.approx(share)
    assert logits.shape == (20, 10)
    model = a_classifier(dropout=0.4)
    (dropout,) = (layer for layer in model.modules() if isinstance(layer, nn.Dropout))
    x = torch.ones(10_000)
    assert dropout(x).eq(0).double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.equal(model.eval().head[2](x), x)


def test_augmentation_flips_half_of_the_images_and_shifts_half_of_the_batches_by_a_pixel():
    images = torch.zeros(50, 1, 28, 28)
    images[:, :, 14, 5] = 2  # a flip takes column 5 to 22; erased are values below 1
    model, places, moved = a_classifier(), [], 0
    for _ in range(400):
        found = (model.augment(images) == 2).nonzero()
        batch = {(row, min(column, 27 - column)) for _, _, row, column in found.tolist()}
        moved += batch != {(14, 5)}
        places.append(found)
    places = torch.cat(places)
    assert moved / 400 == pytest.approx(8 / 9 / 2, abs=0.1)  # a ninth of the shifts is by nothing
    assert places[:, 2].unique().tolist() == [13, 14, 15]
    assert places[:, 3].unique().tolist() == [4, 5, 6, 21, 22, 23]
    assert places[:, 3].gt(14).double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_augmentation_erases_one_rectangle_of_up_to_half_the_sides_in_half_of_the_images():
    model = a_classifier()
    batches = [model.augment(torch.full((100, 1, 28, 28), 2.0)) for _ in range(150)]
    # A shift leaves an edge of zeros in every image of a batch.
    images = torch.cat([batch for batch in batches if batch.amax(0).eq(2).all()]).squeeze(1)
    changed = images != 2
    hit = changed.any(2).any(1)
    assert len(images) > 4000 and hit.double().mean().item() == pytest.approx(0.5, abs=0.03)
    sides = [changed[hit].any(axis).sum(1) for axis in (1, 2)]  # columns, then rows
    for side in sides:
        assert side.max() == 14 and side.double().mean().item() == pytest.approx(7.5, abs=0.4)
    assert (sides[0] != sides[1]).double().mean() > 0.8  # rows and columns are drawn apart
    assert torch.equal(sides[0] * sides[1], changed[hit].sum((1, 2)))  # all of the box
    for axis in (1, 2):  # in one piece, and up to the edges
        inside = changed[hit].any(axis).int()
        assert (inside.diff(dim=1) == 1).sum(1).max() <= 1
        assert inside[:, 0].any() and inside[:, 27].any()
    noise = images[changed]
    assert noise.min() >= 0 and noise.max() <= 1 and abs(noise.mean() - 0.5) < 0.01


def test_few_labelled_images_are_repeated_until_an_epoch_has_enough():
    split = common.Split(torch.rand(60, 1, 28, 28), torch.arange(60) % 10)
    config = classifier.Config(labels=20, epoch_images=50, seed=3)
    chosen = classifier.label_subset(split.labels, 20, seed=3)
    few = classifier.labelled(split, config)
    assert torch.equal(few.images, split.images[chosen.repeat(3)])
    assert torch.equal(few.labels, split.labels[chosen.repeat(3)])
    for count, images in ((50, 50), (49, 98), (60, 60)):
        few = classifier.labelled(split, replace(config, labels=count))
        assert len(few.labels) == len(few.images) == images
    assert classifier.Config().epoch_images == 5000


# Evaluation, summary and figures of the classifier.


def six_views(model, images):
    """The logits of multi-crop evaluation, with weights 1/4 and 1/8 as they are published."""
    up, down = torch.zeros_like(images), torch.zeros_like(images)
    up[:, :, :-1, :-1] = images[:, :, 1:, 1:]
    down[:, :, 1:, 1:] = images[:, :, :-1, :-1]
    moved = model(up) + model(down) + model(up.flip(3)) + model(down.flip(3))
    return (model(images) + model(images.flip(3))) / 4 + moved / 8


def test_the_test_metrics_and_the_confusion_matrix_are_those_of_six_views(studies, data):
    path = studies.out / "classifier" / "scratch-labels20-seed0"
    model, run = classifier.load(path), metrics(path)
    logits = six_views(model, data.test.images)
    torch.testing.assert_close(classifier.classify(model, data.test.images), logits)
    counts = [[0] * 10 for _ in range(10)]
    for true, guess in zip(data.test.labels.tolist(), logits.argmax(1).tolist()):
        counts[true][guess] += 1
    assert run["confusion"] == counts
    right = sum(counts[label][label] for label in range(10)) / TEST
    log_probs = logits.double().log_softmax(1)
    loss = -log_probs[range(TEST), data.test.labels].mean().item()
    one_view = (model(data.test.images).argmax(1) == data.test.labels).double().mean().item()
    assert run["test"] == pytest.approx(
        {"loss": loss, "accuracy": right, "one_view_accuracy": one_view}
    )
    noise, model = clusters(), a_classifier()
    result = classifier.evaluate(model.train(), noise)  # in evaluation mode all the same
    share = (six_views(model.eval(), noise.test.images).argmax(1) == noise.test.labels).double()
    assert result["test"]["accuracy"] == pytest.approx(share.mean().item())
    assert sum(map(sum, result["confusion"])) == len(noise.test.labels)


def classifier_run(strategy, seed, test, checks, best=2, labels=10):
    config = {"labels": labels, "strategy": strategy, "seed": seed}
    return {
        "folder": f"{strategy}-{labels}-{seed}",
        "config": config,
        "parameters": 9,
        "best_epoch": best,
        "validation": [{"epoch": epoch, "accuracy": value} for epoch, value in checks.items()],
        "test": {"accuracy": test, "one_view_accuracy": test / 2, "loss": 1.0},
        "confusion": [[seed + 1] * 10] * 10,
    }


CLASSIFIER_RUNS = [
    classifier_run("scratch", 0, 0.1, {1: 0.2, 2: 0.6, 3: 0.9}),
    classifier_run("scratch", 1, 0.5, {1: 0.4, 2: 0.8}),
    classifier_run("finetune", 0, 0.2, {2: 0.1}),
    classifier_run("finetune", 1, 0.8, {2: 0.3}),
    classifier_run("frozen", 0, 0.3, {2: 1.0}, labels=5),
]


def test_differences_between_strategies_are_paired_by_seed():
    frozen, finetune, scratch = classifier.summarize(CLASSIFIER_RUNS)
    difference = [finetune[f"accuracy_minus_scratch_{name}"] for name in ("mean", "std", "ci")]
    # Of 0.1 and 0.3. With n = 2 Student's quantile is 12.706, and the root of n cancels.
    assert difference == pytest.approx([0.2, math.sqrt(0.02), 12.706 * 0.1])
    assert finetune["one_view_accuracy_minus_scratch_mean"] == pytest.approx(0.1)
    assert finetune["first_val_accuracy_minus_scratch_mean"] == pytest.approx(-0.1)
    for row in (scratch, frozen):  # no scratch run has as few labels as the frozen one
        names = [name for name in row if "_minus_" in name]
        assert len(names) == 15 and all(row[name] is None for name in names)
    assert finetune["accuracy_minus_frozen_mean"] is None
    assert [row["n"] for row in (frozen, finetune, scratch)] == [1, 2, 2]
    assert (scratch["labels"], scratch["strategy"]) == (10, "scratch")
    # Validation accuracies are those of the kept epoch, and of the first that was validated.
    assert scratch["val_accuracy_mean"] == pytest.approx(0.7)
    assert scratch["first_val_accuracy_mean"] == pytest.approx(0.3)
    assert finetune["val_accuracy_mean"] == finetune["first_val_accuracy_mean"]
    more = [classifier_run("frozen", seed, 0.1 + seed, {2: 0.5}) for seed in (0, 1)]
    _, finetune, other, scratch = classifier.summarize([*CLASSIFIER_RUNS, *more])
    assert finetune["accuracy_minus_frozen_mean"] == pytest.approx(-0.1)  # of 0.1 and -0.3
    assert other["accuracy_minus_scratch_mean"] == pytest.approx(0.3)


def test_the_confusion_matrix_is_that_of_the_strategy_that_is_best_in_validation():
    summary = classifier.summarize(CLASSIFIER_RUNS)
    axes, _ = classifier.plot_confusion(CLASSIFIER_RUNS, summary).axes
    # Scratch is worse in the test, and frozen, better in both, has fewer labels.
    assert axes.get_title() == "scratch, 10 labels, seed 0"
    assert [text.get_text() for text in axes.texts] == ["1"] * 100
    assert axes.get_xlabel() == "predicted class" and axes.get_ylabel() == "true class"


def test_the_figure_of_differences_shows_each_seed_and_the_interval():
    runs = [*CLASSIFIER_RUNS[:4], classifier_run("frozen", 0, 0.3, {2: 1.0})]
    few = [{**run, "config": {**run["config"], "labels": 5}} for run in runs]
    axes, frozen = classifier.plot_differences([*runs, *few]).axes
    assert axes.get_title() == "finetune minus scratch"
    assert frozen.get_title() == "frozen minus scratch"
    assert axes.get_xlim() == frozen.get_xlim() == (-0.5, 1.5)
    points = [list(line.get_ydata()) for line in axes.lines]
    for expected in ([0, 0], [0.1, 0.3], [0.2]):  # zero, the seeds, the mean
        assert pytest.approx(expected) in points
    (ends,) = axes.containers[0].lines[2][0].get_segments()
    assert ends[:, 1].tolist() == pytest.approx([0.2 - 1.2706, 0.2 + 1.2706])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["5", "10"]


def test_learning_curves_are_means_over_all_runs_up_to_the_end_of_the_shortest():
    few, many = classifier.plot_learning_curves(CLASSIFIER_RUNS).axes
    assert few.get_title() == "5 labels" and many.get_title() == "10 labels"
    curves = {line.get_label(): line for line in many.lines}
    assert list(curves["scratch"].get_xdata()) == [1, 2]
    assert list(curves["scratch"].get_ydata()) == pytest.approx([0.3, 0.7])
    assert list(curves["finetune"].get_ydata()) == pytest.approx([0.2])


def test_an_encoder_that_is_missing_damaged_or_of_another_size_is_named(
    flags, studies, tmp_path, no_figures
):
    argv = [*flags, "--labels", "20", "--seed", "4", "--seeds", "1", "--latent", "5"]
    message = failure(classifier.main, argv)
    assert str(tmp_path / "out" / "conv_ae" / "latent005-seed4" / "model.pt") in message
    assert "of seed 4: run conv_ae.py --latents 5 --seed 4 --seeds 1 --out" in message
    assert str(studies.encoder) in failure(
        classifier.main, [*argv, "--encoder", str(studies.encoder)]
    )
    other = failure(classifier.main, [*argv, "--encoder", str(tmp_path / "none.pt")])
    assert str(tmp_path / "none.pt") in other
    (tmp_path / "none.pt").write_bytes(b"damaged")
    damaged = failure(classifier.main, [*argv, "--encoder", str(tmp_path / "none.pt")])
    assert str(tmp_path / "none.pt") in damaged
    (tmp_path / "none.pth").write_bytes(b"damaged")
    damaged = failure(classifier.main, [*argv, "--encoder", str(tmp_path / "none.pth")])
    assert f"{tmp_path / 'none.pth'} can't be used" in damaged
    classifier.main([*flags, *SCRATCH, "--epochs", "1"])  # it needs none


# README -------------------------------------------------------------------------------------------


def test_the_readmes_example_study_and_its_use_of_weights_run(
    studies, dataset, flags, tmp_path, monkeypatch, capsys
):
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    example, use = re.findall("```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.setattr(sys, "argv", ["beta_vae.py", *flags, "--epochs", "1", "--seeds", "2"])
    exec(example, {})
    summary = metrics(tmp_path / "out" / "beta_vae")["summary"]
    assert [(row["alpha"], row["n"]) for row in summary] == [(1e-4, 2), (1e-3, 2), (1e-2, 2)]
    shutil.copytree(studies.out, tmp_path / "results")
    shutil.copytree(dataset, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(use.replace("labels50000", "labels200"), names)
    assert names["samples"].shape == (10, 1, 28, 28)
    assert names["vectors"].numpy().shape == (10, 32)
    predicted = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
    assert len(predicted) == 10 and set(predicted) <= set(common.CLASSES)


def test_each_number_in_the_readme_is_in_a_report_that_its_section_links_to():
    root = Path(__file__).parent
    sections = (root / "README.md").read_text(encoding="utf-8").split("\n## ")
    linked = [re.findall(r"\]\((results/\S+/README\.md)\)", section) for section in sections]
    linked[0] = [path for paths in linked for path in paths]  # the first screen quotes them all
    # The one comparison between two studies: 16 epochs after pre-training, and 25 from scratch.
    pair = [metrics(root / "results" / name)["runs"] for name in ("classifier", "equal/classifier")]
    own = [run for run in pair[0] if (run["labels"], run["strategy"]) == (50_000, "finetune")]
    assert [run["seed"] for run in own] == [run["seed"] for run in pair[1]] == [0, 1, 2, 3, 4]
    between_studies = []
    for name in ("accuracy", "one_view_accuracy"):
        values = [a["test"][name] - b["test"][name] for a, b in zip(own, pair[1])]
        cell = common.format_cell(common.mean_std_ci("a_minus_b", values), "a_minus_b_mean")
        between_studies += re.findall(r"-?\d+\.\d+", cell)
    checked = 0
    for section, paths in zip(sections[:4], linked):
        known = set(between_studies) if "results/equal/classifier/README.md" in paths else set()
        for path in paths:
            known |= set(re.findall(r"-?\d+\.\d+", (root / path).read_text(encoding="utf-8")))
        prose = re.sub(r"`[^`]*`|\]\([^)]*\)", "", section)  # without code and links' targets
        for number in re.findall(r"-?\d+\.\d{3,}", prose):
            if number not in NOT_IN_A_REPORT:
                assert number in known, number
                checked += 1
    assert checked > 50


# The reference result, alpha, what seed 0's metrics.json has ("loss_std").
NOT_IN_A_REPORT = {"0.08380", "0.001", "0.00003", "0.00024"}
