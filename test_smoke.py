"""Fast, offline tests through the scripts' own `main`, on a small dataset that they write themselves."""
import argparse
import gzip
import hashlib
import itertools
import json
import math
import re
import shutil
import signal
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import classifier
import common
import conv_ae
import vae

HERE = Path(__file__).parent
TRAIN, TEST = 240, 60  # images; 5/6 of TRAIN are trained on
CPU = torch.device("cpu")

@pytest.fixture(autouse=True)
def fixed():
    torch.set_num_threads(1)
    torch.manual_seed(0)

@pytest.fixture
def data(tmp_path, monkeypatch):
    """A dataset in Fashion-MNIST's format, half of it gzipped, each class a bright block of its own height."""
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    hashes, generator = {}, torch.Generator().manual_seed(0)
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 40, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels):
            image[4:6 + 2 * label, 6:22] = 255
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.dim()}i", 2048 + values.dim(), *values.shape)
            content = header + bytes(values.flatten().tolist())
            hashes[f"{prefix}-{kind}-ubyte"] = len(content), hashlib.sha256(content).hexdigest()
            if prefix == "train":
                (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)
            else:
                (raw / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(common, "FILES", hashes)
    monkeypatch.setattr(common, "DEBIAN", tmp_path / "nowhere")
    return tmp_path / "data"

@pytest.fixture
def flags(data, tmp_path):
    where = ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu"]
    return [*where, "--epochs", "3", "--batch-size", "50"]

@pytest.fixture
def no_figures(monkeypatch):  # they take most of a short run's time
    monkeypatch.setattr(vae, "plot", lambda model, history, data: {})

@pytest.fixture
def one_pass(monkeypatch):  # each image once an epoch, for speed
    monkeypatch.setattr(classifier, "passes", lambda count: 1)

def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())

def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["model"]

def same_weights(*folders):
    first, second = map(weights, folders)
    return all(torch.equal(first[name], second[name]) for name in first)

def contents(folder):
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in files if path.name != "checkpoint.pt"}

def fails(main, flags, capsys, code):  # with one line, which it returns
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    text = isinstance(stopped.value.code, str)  # what Python prints before it ends with exit code 1
    assert (1 if text else stopped.value.code) == code
    message = stopped.value.code if text else capsys.readouterr().err.splitlines()[-1]
    assert len(message.splitlines()) == 1 and "Traceback" not in message
    return message

def test_split_is_disjoint_complete_and_fixed(data):
    first = common.load_data(data, CPU)
    torch.manual_seed(1)
    second = common.load_data(data, CPU)
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.val.labels, second.val.labels)
    assert [len(split.labels) for split in (first.train, first.val, first.test)] == [TRAIN * 5 // 6, TRAIN // 6, TEST]
    content = (data / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    given = sorted(content[i:i + 784] for i in range(0, len(content), 784))
    split = torch.cat([first.train.images, first.val.images])
    assert sorted(bytes(image.mul(255).round().byte().flatten().tolist()) for image in split) == given
    assert len(set(given)) == TRAIN  # so that equal lists mean disjoint parts

@pytest.mark.parametrize("name, damage", [
    ("train-images-idx3-ubyte", lambda path, content: path.write_bytes(content[:-1])),
    ("train-labels-idx1-ubyte", lambda path, content: path.write_bytes(content[:99] + b"\x55" + content[100:])),
    ("train-images-idx3-ubyte", lambda path, content: (path.unlink(), path.mkdir())),
    ("t10k-images-idx3-ubyte.gz", lambda path, content: path.write_bytes(content[:len(content) // 2]))])
def test_damaged_data_is_refused_by_name(name, damage, data, flags, capsys):
    path = data / "FashionMNIST" / "raw" / name
    damage(path, path.read_bytes())
    assert name in fails(vae.main, flags, capsys, 1)

def test_missing_data_names_the_file_and_three_ways(data, flags, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading\nand more")
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__init__", no_network)
    (data / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    message = fails(vae.main, flags, capsys, 1)
    for part in ("t10k-labels-idx1-ubyte", "FashionMNIST/raw", "dataset-fashion-mnist", "download", "and more"):
        assert part in message

@pytest.mark.parametrize("losses, stops_at, best", [
    ([1.0, 0.5, 0.5, 0.5, 0.5, 0.4], 5, 2),  # epochs 3, 4, 5 bring nothing
    ([1.0, 0.5, 0.495, 0.49, 0.485, 0.4], 5, 5),  # falls, but by less than min_delta; the best is still the lowest
    ([1.0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4], 8, 5),  # the last check in time restarts the count
    ([1.0, 0.9, 0.8, 0.7, 0.6], None, 5),
    ([None, None, None, None, 1.0], None, 5),  # never before the first validation
])
def test_early_stopping(losses, stops_at, best):
    history = []
    for epoch, loss in enumerate(losses, 1):
        history.append({"epoch": epoch, **({"val": {"loss": loss}} if loss else {})})
        assert not common.stops_early(history, patience=0, min_delta=1000)
        if common.stops_early(history, patience=3, min_delta=0.05):
            break
    assert len(history) == (stops_at or len(losses)) and common.best_epoch(history) == best
    assert common.stops_early(history, patience=3, min_delta=0.05) == bool(stops_at)

def test_learning_rate_warms_up_holds_and_decays_to_zero():
    args = SimpleNamespace(lr=2.0, warmup_steps=10, constant_steps=30)
    rates = [common.learning_rate(step, 110, args) for step in range(110)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)]) and rates[10:30] == [2.0] * 20
    assert rates[30:] == pytest.approx([2.0 * (110 - step) / 80 for step in range(30, 110)])

def test_ema_is_a_geometric_mean_of_the_past_and_short_at_first():
    ema, latest = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    common.update_ema([(ema, latest)], step=0, decay=0.99)
    assert ema.item() == pytest.approx(0.9)
    ema.zero_()
    for step in range(10_000, 10_050):
        common.update_ema([(ema, latest)], step, decay=0.99)
    assert ema.item() == pytest.approx(1 - 0.99 ** 50)

def test_the_kept_weights_are_the_ema_weights_of_the_best_epoch(flags, tmp_path, monkeypatch, no_figures):
    losses, seen = iter([3.0, 1.0, 2.0, 9.0]), []
    def test_loop(model, loss_fn, split):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"loss": next(losses)}
    monkeypatch.setattr(common, "test_loop", test_loop)
    vae.main(flags + ["--val-every", "1"])  # three validations and the test
    kept = weights(tmp_path / "out" / "vae")
    assert [all(torch.equal(kept[name], past[name]) for name in kept) for past in seen] == [False, True, False, True]

def test_an_epoch_takes_every_image_once_in_a_new_order_at_the_rates_of_the_schedule(flags, monkeypatch, no_figures):
    seen, steps, genuine, rate = [], [], vae.loss_fn, common.learning_rate
    def loss_fn(model, images, labels, alpha):
        seen.extend(images.flatten(1).sum(1).tolist() * model.training)
        return genuine(model, images, labels, alpha)
    monkeypatch.setattr(vae, "loss_fn", loss_fn)
    monkeypatch.setattr(common, "learning_rate", lambda *args: steps.append(args[:2]) or rate(*args))
    vae.main(flags)
    epochs = [seen[i:i + TRAIN * 5 // 6] for i in range(0, len(seen), TRAIN * 5 // 6)]
    assert len(epochs) == 3 and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] and len(set(epochs[0])) > 190
    assert steps == [(step, 12) for step in range(12)]
    vae.main(flags + ["--seed", "1", "--epochs", "1"])
    assert sorted(seen[-len(epochs[0]):]) == sorted(epochs[0]) and seen[-len(epochs[0]):] != epochs[0]

def test_test_loop_weights_by_images_in_float32_and_draws_the_same_noise_again(data):
    split, model = common.load_data(data, CPU).val, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 1))
    def loss_fn(model, images, labels):
        assert not model.training and not torch.is_grad_enabled()
        return {"loss": common.forward(model, images).mean(), "noise": torch.rand(())}
    ragged = common.test_loop(model, loss_fn, split, batch_size=7)
    assert ragged == common.test_loop(model, loss_fn, split, batch_size=7)
    assert ragged["loss"] == pytest.approx(model(split.images).mean().item(), abs=2e-7)

def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(7, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0.0, 1.0)).sum(1)
    assert torch.allclose(vae.kl_divergence(mu, logvar), expected)

def test_vae_loss_is_the_recipe(monkeypatch):
    model, images = vae.VAE(), torch.rand(5, 1, 28, 28)
    monkeypatch.setattr(torch, "randn", torch.zeros)  # z = mu
    losses = vae.loss_fn(model, images, None, alpha=0.25)
    mu, logvar = model.encode(images)
    recon = (model.decode(mu) - images).abs().sum() / (5 * 784)
    kl = -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum() / 5
    assert torch.allclose(losses["recon"], recon) and torch.allclose(losses["kl"], kl)
    assert torch.allclose(losses["loss"], recon + 0.25 * kl)

def test_bounds_act_only_on_the_unusual():
    model, images = vae.VAE(), torch.rand(100, 1, 28, 28) / 2
    h = model.encoder(images)
    assert all(map(torch.equal, model.encode(images), (model.mu(h), model.logvar(h))))
    with torch.no_grad():
        model.logvar.bias += torch.tensor([1e6, -1e6]).repeat(4)
        model.mu.bias += torch.tensor([1e6, -1e6]).repeat(4)
    assert vae.kl_divergence(*model.encode(images)).max() <= 476.01

def test_sampled_latents_have_the_moments_of_the_posterior():
    z = vae.VAE().reparameterize(torch.full((200_000, 1), 3.0), torch.full((200_000, 1), math.log(0.25)))
    assert abs(z.mean() - 3.0) < 0.01 and abs(z.std() - 0.5) < 0.01

def test_knn_accuracy_by_hand():
    index, labels = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]]), torch.tensor([1, 1, 2, 3, 3])
    queries, truth = torch.tensor([[0.05], [5.05], [0.3]]), torch.tensor([1, 3, 2])
    assert common.knn_accuracy(index, labels, queries, truth, k=3) == pytest.approx(2 / 3)

def test_vae_writes_what_it_should(data, flags, tmp_path, capsys):
    vae.main(flags)
    folder = tmp_path / "out" / "vae"
    files, result = contents(folder), metrics(folder)
    figures = {"losses.png", "reconstructions.png", "samples.png", "latent_pairs.png", "interpolations.png"}
    assert files.keys() == figures | {"losses.csv", "metrics.json", "model.pt", "explorer.html"}
    assert all(files[name].startswith(b"\x89PNG\r\n\x1a\n") for name in figures)
    assert {"config", "environment", "parameters", "epochs_run", "best_epoch", "train_seconds", "test",
            "latent_knn_accuracy", "kl_max", "kl_max_val"} <= result.keys()
    assert {"python", "torch", "torchvision", "device", "threads"} <= result["environment"].keys()
    assert result["config"].keys() >= {"alpha", "lr", "weight_decay", "warmup_steps", "constant_steps", "ema_decay"}
    assert not result["config"].keys() & {"data", "out", "resume", "eval", "device"} and result["parameters"] == 219808
    assert result["test"]["loss"] == pytest.approx(result["test"]["recon"] + 1e-3 * result["test"]["kl"], rel=1e-5)
    lines = files["losses.csv"].decode().splitlines()
    assert lines[0] == "epoch,train_loss,val_loss" and [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
    assert lines[1].endswith(",") and not lines[3].endswith(",")  # validated every 5 epochs and in the last
    assert torch.load(folder / "model.pt", weights_only=True)["config"] == result["config"]
    assert f"{result['test']['loss']:.5f}" in capsys.readouterr().out.splitlines()[-2]

def test_eval_confirms_what_is_recorded_and_nothing_else(flags, tmp_path, capsys, no_figures):
    vae.main(flags + ["--alpha", "0.002"])
    folder = tmp_path / "out" / "vae"
    before, result = contents(folder), metrics(folder)
    vae.main(flags + ["--eval"])  # the run as it was, whatever the flags say
    assert contents(folder) == before and "confirmed" in capsys.readouterr().out
    test, knn = result["test"], result["latent_knn_accuracy"]
    for name, changed in (("loss", {"test": {**test, "loss": test["loss"] * 1.001}}), ("kl_max", {"kl_max": 5.0}),
                          ("latent_knn_accuracy", {"latent_knn_accuracy": knn + 0.01})):
        (folder / "metrics.json").write_text(json.dumps({**result, **changed}))
        assert name in fails(vae.main, flags + ["--eval"], capsys, 1)

def test_eval_refuses_another_seed_another_epoch_and_another_test_set(flags, tmp_path, capsys, monkeypatch, no_figures):
    vae.main(flags)
    for name, own in (("seed", ["--seed", "1"]), ("epoch", ["--epochs", "2"])):
        vae.main(flags + own + ["--out", str(tmp_path / name)])
        (tmp_path / name / "vae" / "metrics.json").write_bytes((tmp_path / "out" / "vae" / "metrics.json").read_bytes())
        assert "test.loss is" in fails(vae.main, flags + ["--eval", "--out", str(tmp_path / name)], capsys, 1)
    genuine = common.load_data
    monkeypatch.setattr(common, "load_data", lambda *where: SimpleNamespace(
        **{**vars(genuine(*where)), "test": genuine(*where).val}))
    assert "test.loss is" in fails(vae.main, flags + ["--eval"], capsys, 1)

def test_the_explorer_page_decodes_like_the_model_in_a_browser(data, flags, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("there is no Chromium here")
    vae.main(flags)
    model, train = vae.VAE(), common.load_data(data, CPU).train
    model.load_state_dict(weights(tmp_path / "out" / "vae"))
    mu = model.encode(train.images)[0].detach()
    codes = torch.cat([mu[train.labels == label].mean(0, keepdim=True) for label in range(10)] + [torch.randn(10, 8)])
    page = (tmp_path / "out" / "vae" / "explorer.html").read_text()
    last = """<script>
        const picture = () => document.querySelector("canvas#image").toDataURL(), pictures = [picture()];
        const [slider, ...others] = document.querySelectorAll("input[type=range]");
        slider.value = slider.max;
        slider.dispatchEvent(new Event("input"));
        pictures.push(picture());
        document.querySelector("#classes button:last-child").click();
        const report = () => ({pictures: [...pictures, picture()], decoded: CODES.map(decode), errors, others});
        setTimeout(() => { document.body.textContent = JSON.stringify(report()); }, 2000);
        </script>""".replace("CODES", json.dumps(codes.tolist()))
    first = "<script>var errors = []; console.error = onerror = text => errors.push(text);</script>"
    (tmp_path / "page.html").write_text(page.replace("<title>", f"{first}<title>") + last)
    done = subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=9000",
                           "--force-prefers-reduced-motion",
                           f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    if "A VAE's latent space" not in done.stdout:
        pytest.skip("Chromium could not open the page")
    report = json.loads(re.search("<body>(.*?)</body>", done.stdout, re.DOTALL)[1])
    assert report["errors"] == [] and len(report["others"]) == 7 and len(set(report["pictures"])) == 3
    expected = model.decode(codes).flatten(1)
    assert (torch.tensor(report["decoded"]) - expected).abs().max() < 1e-5

def test_pca_is_that_of_a_direct_svd_and_the_summary_is_per_size():
    train, test = torch.rand(200, 1, 28, 28), torch.rand(50, 1, 28, 28)
    flat, mean = train.flatten(1).double(), train.flatten(1).double().mean(0)
    basis = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:5]
    centred = test.flatten(1).double() - mean
    expected = (centred - centred @ basis.T @ basis).square().mean().item()
    runs = [{"config": {"latent": size}, "parameters": 9, "latent_knn_accuracy": mse,
             "test": {"mse": mse, "l1": 2 * mse}} for size, mse in ((5, 0.1), (3, 0.4), (5, 0.3))]
    splits = SimpleNamespace(train=common.Split(train, torch.arange(200)), test=common.Split(test, torch.arange(50)))
    three, five = conv_ae.summarize(runs, splits)
    assert five["pca_mse"] == pytest.approx(expected) and five["ratio"] == pytest.approx(0.2 / expected)
    assert (five["n"], five["mse_mean"], five["l1_mean"]) == (2, pytest.approx(0.2), pytest.approx(0.4))
    assert (three["n"], three["mse_mean"], three["mse_std"]) == (1, 0.4, None)

def test_conv_ae_study_end_to_end_and_continued(flags, tmp_path, capsys):
    study = tmp_path / "out" / "conv_ae"
    conv_ae.main(flags + ["--latents", "3", "32", "--seeds", "2"])
    assert contents(study).keys() == {"metrics.json", "latent_vs_error.png", "reconstructions.png"}
    runs = {f"latent{latent:03d}-seed{seed}" for latent in (3, 32) for seed in (0, 1)}
    assert {path.name for path in study.iterdir() if path.is_dir()} == runs
    assert all(contents(study / run).keys() == {"losses.csv", "metrics.json", "model.pt"} for run in runs)
    assert metrics(study / "latent003-seed1")["test"].keys() == {"loss", "mse", "l1"}
    stamp = (study / "latent003-seed1" / "model.pt").stat().st_mtime_ns
    assert [(row["latent"], row["n"]) for row in metrics(study)["summary"]] == [(3, 2), (32, 2)]
    conv_ae.main(flags + ["--latents", "5", "--resume"])  # one more size costs one run
    assert [row["latent"] for row in metrics(study)["summary"]] == [3, 5, 32]
    assert (study / "latent003-seed1" / "model.pt").stat().st_mtime_ns == stamp
    conv_ae.main(flags + ["--eval"])
    assert capsys.readouterr().out.count("confirmed") == 5
    other = flags + ["--latents", "3", "--epochs", "4", "--resume"]
    assert "with epochs 3, not 4" in fails(conv_ae.main, other, capsys, 1)
    (study / "latent003-seed0" / "model.pt").unlink()
    conv_ae.main(flags + ["--latents", "5", "--resume"])
    assert "reconstructions.png is left as it was: no model.pt in" in capsys.readouterr().out

@pytest.fixture
def encoder(flags, tmp_path):
    conv_ae.main(flags + ["--latents", "32"])
    return tmp_path / "out" / "conv_ae" / "latent032-seed0" / "model.pt"

class SimulatedMPS(torch.overrides.TorchFunctionMode):
    """A device on the CPU that behaves like a Mac's GPU: its own draws, no float64, no `mode`, no numpy, no mixing."""
    LACKS = ("mode", "numpy", "__array__", "multinomial", "eigh", "svd", "double")
    MIXES = ("copy_", "__get__", "__set__", "_has_compatible_shallow_copy_type", "_fused_adamw_")  # unseen gradients

    def __init__(self):
        super().__init__()
        self.storages, self.rng = {}, torch.Generator().manual_seed(99).get_state()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.__name__, dict(kwargs or {})
        def flat(value):
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            return [value] if isinstance(value, torch.Tensor) else [t for part in inner for t in flat(part)]
        tensors = flat([args, kwargs])
        here = [tensor.untyped_storage().data_ptr() in self.storages for tensor in tensors]
        if func == torch.Tensor.device.__get__ and here[0]:
            return torch.device("mps")
        if name == "_parse_to":
            return func(*args, **kwargs)
        target = [part.type for part in (*args, *kwargs.values()) if isinstance(part, torch.device)]
        args = tuple(CPU if isinstance(part, torch.device) else part for part in args)
        kwargs = {key: CPU if isinstance(part, torch.device) else part for key, part in kwargs.items()}
        leaves = name in ("cpu", "item", "tolist") or target == ["cpu"]
        if any(here) and not leaves:
            assert name not in self.LACKS, f"{name} on MPS"
            alone = all(known or not tensor.dim() for known, tensor in zip(here, tensors))
            assert alone or name in self.MIXES or name == "__getitem__" and here[0], f"{name} of tensors on two devices"
        arrives = not leaves and (target == ["mps"] or any(here))
        if arrives:  # the device draws from a generator of its own
            cpu = torch.get_rng_state()
            torch.set_rng_state(self.rng)
        result = func(*args, **kwargs)
        if arrives:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(cpu)
        if name in ("to", "cpu") and any(here) != arrives:
            result = result.clone(memory_format=torch.preserve_format)  # a copy on the other device
        for tensor in flat(result) if arrives else ():
            assert tensor.dtype != torch.float64, f"float64 from {name}"
            self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return result

@pytest.mark.parametrize("script, own", [
    (vae, []), (conv_ae, ["--latents", "32"]), (classifier, ["--labels", "50", "--seeds", "1"])])
def test_on_a_simulated_mps_all_runs_and_eval_confirms_on_the_cpu(
        script, own, flags, encoder, tmp_path, capsys, monkeypatch, request):
    genuine = common.parse_args
    with monkeypatch.context() as patched, SimulatedMPS():
        patched.setattr(common, "parse_args", lambda *given: argparse.Namespace(
            **{**vars(genuine(*given)), "device": torch.device("mps")}))
        script.main(flags + own)
        model = conv_ae.to_device(conv_ae.Autoencoder(8), torch.device("mps"))
        assert model.encoder.features[4].weight.is_contiguous()  # in channels_last gradients were wrong there
    script.main(flags + ["--eval"])
    assert "confirmed" in capsys.readouterr().out
    if script is vae:  # nothing but batches and noise is drawn, and the CPU draws both
        request.getfixturevalue("no_figures")
        vae.main(flags + ["--out", str(tmp_path / "cpu")])
        assert contents(tmp_path / "cpu" / "vae")["losses.csv"] == contents(tmp_path / "out" / "vae")["losses.csv"]

def test_label_subsets_are_balanced_and_nested():
    labels = torch.arange(500) % 10
    subsets = [classifier.label_subset(labels, count, seed=3).tolist() for count in (20, 105, 300)]
    for subset, count in zip(subsets, (20, 105, 300)):
        shares = torch.bincount(labels[subset], minlength=10)
        assert len(set(subset)) == count and shares.max() - shares.min() <= 1
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    assert subsets[0] != classifier.label_subset(labels, 20, seed=4).tolist()

def augment(images, shift, erase):
    """`images` shifted and erased with these probabilities."""
    run = SimpleNamespace(epochs=30, labels=50_000, shift_epochs=30 / (shift or 1e-9), erase_epochs=30 / (erase + 1))
    return classifier.augment(images, run)

def test_augmentation_flips_half_of_the_images_and_shifts_by_a_pixel_at_most():
    images = torch.zeros(1000, 1, 28, 28)
    images[:, :, 14, 5] = 1  # a flip takes column 5 to 22
    for shift, places in ((0, {14: [5, 22]}), (1, {row: [4, 5, 6, 21, 22, 23] for row in (13, 14, 15)})):
        found = torch.cat([augment(images[:100], shift, erase=0) for _ in range(100)]).nonzero()
        assert len(found) == 10_000 and found[:, 3].gt(14).double().mean().item() == pytest.approx(0.5, abs=0.02)
        assert {row: found[found[:, 2] == row, 3].unique().tolist() for row in found[:, 2].unique().tolist()} == places

def test_augmentation_erases_one_rectangle_of_up_to_half_the_sides():
    images = torch.ones(4000, 1, 28, 28)
    for share in (0.25, 1.0):
        changed = (augment(images, shift=0, erase=share) != 1).squeeze(1)
        hit = changed.any(2).any(1)
        assert hit.double().mean().item() == pytest.approx(share, abs=0.03)
        sides = [changed[hit].any(axis).sum(1) for axis in (1, 2)]  # columns, then rows
        assert all(side.max() == 14 and side.double().mean().item() == pytest.approx(7.5, abs=0.4) for side in sides)
        assert torch.equal(sides[0] * sides[1], changed[hit].sum((1, 2)))  # all of the box and nothing else
        for axis in (1, 2):  # in one piece, and up to the edges
            inside = changed[hit].any(axis).int()
            assert (inside.diff(dim=1) == 1).sum(1).max() <= 1 and inside[:, 0].any() and inside[:, 27].any()

def test_running_statistics_are_a_models_own_after_a_few_steps(flags, data, tmp_path):
    classifier.main(flags + ["--strategies", "scratch", "--labels", "50", "--seeds", "1", "--epochs", "1"])  # ten steps
    model = classifier.Classifier(conv_ae.Encoder(32), dropout=0.0)
    model.load_state_dict(weights(tmp_path / "out" / "classifier" / "scratch-labels50-seed0"))
    images = common.load_data(data, CPU).val.images
    own, batch = model.eval()(images).softmax(1), model.train()(images).softmax(1)
    distance = (own - batch).abs().sum(1).mean() / 2  # in total variation
    assert distance < 0.2

def test_classifier_study_end_to_end(encoder, data, flags, tmp_path, capsys):
    classifier.main(flags + ["--labels", "50", "200", "--seeds", "1", "--epochs", "4"])
    study = tmp_path / "out" / "classifier"
    figures = {"learning_curves.png", "label_efficiency.png", "confusion_matrix.png"}
    assert contents(study).keys() == figures | {"metrics.json"}
    runs = {f"{strategy}-labels{labels}-seed0" for strategy in classifier.STYLE for labels in (50, 200)}
    assert {path.name for path in study.iterdir() if path.is_dir()} == runs
    assert all(contents(study / run).keys() == {"losses.csv", "metrics.json", "model.pt"} for run in runs)
    statistics = {f"{name}_{kind}" for kind in ("mean", "std") for name in (
        "test_accuracy", "test_loss", "val_accuracy", "val_accuracy_first_epoch")}
    statistics |= {"minus_scratch_mean", "minus_scratch_se"}
    assert metrics(study)["summary"][-1].keys() == statistics | {"strategy", "labels", "n", "parameters"}
    assert metrics(study / "scratch-labels200-seed0")["test"]["accuracy"] > 0.95  # the blocks are easy to tell apart
    start = weights(encoder.parent)
    frozen, finetuned = (weights(study / f"{strategy}-labels200-seed0") for strategy in ("frozen", "finetune"))
    pairs = {name: name.replace("encoder.", "encoder.features.") for name in frozen if name.startswith("encoder.")}
    assert all(torch.equal(frozen[own], start[name]) for own, name in pairs.items())  # batch norm's buffers included
    assert not all(torch.equal(finetuned[own], start[name]) for own, name in pairs.items())
    model, test = classifier.Classifier(conv_ae.Encoder(32), dropout=0.0), common.load_data(data, CPU).test
    model.load_state_dict(finetuned)
    predicted, result = model.eval()(test.images).argmax(1), metrics(study / "finetune-labels200-seed0")
    assert result["test"]["accuracy"] == pytest.approx((predicted == test.labels).float().mean().item())
    for true, row in enumerate(result["confusion"]):
        assert row == torch.bincount(predicted[test.labels == true], minlength=10).tolist()
    classifier.main(flags + ["--eval"])
    assert capsys.readouterr().out.count("confirmed") == 6

def test_gain_over_scratch_is_paired_by_seed():
    runs = [{"config": {"labels": 10, "strategy": strategy, "seed": seed}, "parameters": 9, "best_epoch": 1,
             "validation": [{"epoch": 1, "accuracy": 0.5}], "test": {"accuracy": accuracy, "loss": 1.0}}
            for strategy, seed, accuracy in (("scratch", 0, 0.1), ("scratch", 1, 0.5), ("finetune", 1, 0.8),
                                             ("finetune", 0, 0.2), ("finetune", 2, 0.9))]
    finetune, _ = classifier.summarize(runs)
    assert finetune["minus_scratch_mean"] == pytest.approx(0.2)  # of 0.1 and 0.3
    assert finetune["minus_scratch_se"] == pytest.approx(math.sqrt(0.02) / math.sqrt(2))

def test_a_run_starts_and_ends_the_same_alone_and_after_others(encoder, flags, tmp_path, one_pass):
    flags = flags + ["--labels", "50", "--encoder", str(encoder)]
    classifier.main(flags + ["--seeds", "2"])
    for strategy in classifier.STYLE:
        alone, name = tmp_path / strategy, f"{strategy}-labels50-seed1"
        classifier.main(flags + ["--strategies", strategy, "--seed", "1", "--seeds", "1", "--out", str(alone)])
        assert same_weights(tmp_path / "out" / "classifier" / name, alone / "classifier" / name)

def test_runs_of_unequal_lengths_and_without_a_first_validation(flags, tmp_path):
    flags = flags + ["--strategies", "scratch", "--labels", "50", "--seeds", "1", "--epochs", "9"]
    classifier.main(flags + ["--patience", "2", "--val-every", "2", "--min-delta", "1000"])
    (row,) = metrics(tmp_path / "out" / "classifier")["summary"]
    assert row["val_accuracy_first_epoch_mean"] is None and row["val_accuracy_mean"] is not None
    run = {"folder": "short", **metrics(tmp_path / "out" / "classifier" / "scratch-labels50-seed0")}
    assert run["epochs_run"] == 4
    classifier.plot([run, {**run, "validation": [*run["validation"], {"epoch": 6, "accuracy": 0.5}]}])

def test_no_encoder_and_one_of_another_size(flags, encoder, tmp_path, capsys):
    missing = fails(classifier.main, flags + ["--labels", "50", "--encoder", str(tmp_path / "none.pt")], capsys, 1)
    other = fails(classifier.main, flags + ["--labels", "50", "--latent", "8", "--encoder", str(encoder)], capsys, 1)
    assert "python conv_ae.py --latents 32" in missing and "python conv_ae.py --latents 8" in other

def test_ranks_share_the_runs_out_and_leave_together(monkeypatch):
    store = torch.distributed.HashStore()
    def rank(number):
        jobs = list(common.share_out(range(20)))
        return jobs, store.add("ranks done", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # left over from something else: only torchrun's own mark counts
    assert list(common.share_out(range(3))) == [0, 1, 2]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 2)]))
    with ThreadPoolExecutor(2) as pool:
        (first, ended), (second, ended_too) = pool.map(rank, (0, 1))
    assert sorted(first + second) == list(range(20)) and ended == ended_too == 2

def test_runs_that_differ_in_more_than_what_varies_share_no_row(encoder, flags, tmp_path, capsys, one_pass):
    def rows(*own):
        """{strategy: n} of the summary after one more command, and what it printed."""
        classifier.main(flags + ["--labels", "50", "--seeds", "1", "--epochs", "1", "--strategies", *own])
        summary = metrics(tmp_path / "out" / "classifier")["summary"]
        return {row["strategy"]: row["n"] for row in summary}, capsys.readouterr().out
    assert rows("scratch", "finetune")[0] == {"scratch": 1, "finetune": 1}
    conv_ae.main(flags + ["--latents", "8", "--epochs", "1"])
    left, text = rows("finetune", "--latent", "8", "--seed", "1")  # another latent size
    assert left == {"finetune": 1} and "seed0 is left out of the summary: it was made with latent 32, not 8" in text
    moved = tmp_path / "moved.pt"
    moved.write_bytes(encoder.read_bytes())  # the same weights in another file count as the same
    assert rows("finetune", "--encoder", str(moved), "--seed", "2")[0] == {"scratch": 1, "finetune": 2}
    saved = torch.load(encoder, weights_only=True)
    saved["model"]["encoder.features.0.weight"] += 1
    torch.save(saved, moved)
    left, text = rows("finetune", "--encoder", str(moved), "--seed", "3")  # other weights
    assert left == {"scratch": 1, "finetune": 1} and "it was made with encoder_hash" in text
    assert rows("scratch", "--seed", "4", "--epochs", "2")[0] == {"scratch": 1}  # other epochs

def test_runs_of_an_edited_network_share_no_row(flags, tmp_path, capsys, monkeypatch):
    conv_ae.main(flags + ["--latents", "3"])
    monkeypatch.setattr(torch.nn, "Sigmoid", torch.nn.Hardsigmoid)  # as many parameters, another network
    assert "network" in fails(conv_ae.main, flags + ["--latents", "3", "--resume"], capsys, 1)
    conv_ae.main(flags + ["--latents", "3", "--seed", "1"])
    (row,) = metrics(tmp_path / "out" / "conv_ae")["summary"]
    assert row["n"] == 1 and "seed0 is left out of the summary: it was made with network" in capsys.readouterr().out

def committed(*patterns):
    """The JSON files of the last commit that match, sorted by name: a user's runs may lie in the working tree."""
    def git(*command):
        done = subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, encoding="utf-8")
        return done.stdout if done.returncode == 0 else pytest.skip(f"no committed results: {done.stderr.strip()}")
    if not (HERE / ".git").exists() or not shutil.which("git"):
        pytest.skip("no committed results: this is no git clone, or there is no git")
    names = git("ls-tree", "-r", "--name-only", "HEAD", "results").split()
    wanted = [name for pattern in patterns for name in names if Path(name).match(f"results/{pattern}/metrics.json")]
    return [json.loads(git("show", f"HEAD:{name}")) for name in wanted]

def cell(row, name, digits, n=False):
    """Mean ± standard deviation of a summary's row as the README prints them; empty where there are none."""
    mean, std = (row.get(f"{name}_{part}") for part in ("mean", "std"))
    spread = "" if std is None else f" ± {std:.{digits}f}"
    return "" if mean is None else f"{mean:.{digits}f}{spread}" + f" ({row.get('n')})" * n

def vae_table():
    yield "| run | n | test loss | recon | KL | 10-NN accuracy on mu | largest KL of a test image |"
    yield "| the reference result | | 0.08380 | | | | |"
    for name, runs in (("`python vae.py --epochs 200`, stops early", committed("vae", "seed?/vae")),
                       ("`--patience 0`, all 200 epochs", committed("full-seed?/vae"))):
        values = {"knn": [run["latent_knn_accuracy"] for run in runs],
                  **{metric: [run["test"][metric] for run in runs] for metric in ("loss", "recon", "kl")}}
        row = {f"{metric}_{part}": value for metric, column in values.items()
               for part, value in zip(("mean", "std"), common.mean_std(column))}
        largest = [run["kl_max"] for run in runs]
        yield (f"| {name} | {len(runs)} | {cell(row, 'loss', 5)} | {cell(row, 'recon', 5)} | {cell(row, 'kl', 2)} | "
               f"{cell(row, 'knn', 3)} | {min(largest):.0f} to {max(largest):.0f} |")

def conv_ae_table():
    (sizes,), (short,) = committed("long/conv_ae"), committed("conv_ae")
    yield ("| latent dimensions | n | test MSE | test L1 | PCA's MSE | PCA's, clamped to [0, 1] | MSE / PCA's | "
           f"the same, {short['config']['epochs']} epochs (n=1) | 10-NN accuracy |")
    ratios = {row["latent"]: f"{row['ratio']:.3f}" for row in short["summary"] if row["n"] == 1}
    for row in sizes["summary"]:
        yield (f"| {row['latent']} | {row['n']} | {cell(row, 'mse', 6)} | {cell(row, 'l1', 5)} | "
               f"{row['pca_mse']:.5f} | {row['pca_clamped_mse']:.5f} | {row['ratio']:.3f} | {ratios[row['latent']]} | "
               f"{cell(row, 'latent_knn_accuracy', 3)} |")
    yield f"| 784 pixels | | | | | | | | {row['pixel_knn_accuracy']:.3f} |"

def classifier_table():
    yield ("| labels | test (n): `scratch` | `frozen` | `finetune` | `finetune` minus `scratch` | "
           "validation: `scratch` | `finetune` | after epoch 1: `scratch` | `finetune` |")
    for pattern, note in (
            ("classifier", ""), ("long/classifier", ", {epochs} epochs"),
            ("encoder1/classifier", ", encoder of seed 1"), ("encoder2/classifier", ", encoder of seed 2")):
        (study,) = committed(pattern)
        for labels in sorted({row["labels"] for row in study["summary"]}):
            same = {row["strategy"]: row for row in study["summary"] if row["labels"] == labels}
            scratch, frozen, finetune = (same.get(name, {}) for name in ("scratch", "frozen", "finetune"))
            gain, error = finetune["minus_scratch_mean"], finetune["minus_scratch_se"]
            cells = [*(cell(row, "test_accuracy", 4, n=True) for row in (scratch, frozen, finetune)),
                     "" if gain is None else f"{gain:.4f} ± {error:.4f}",
                     *(cell(row, name, 4) for name in ("val_accuracy", "val_accuracy_first_epoch")
                       for row in (scratch, finetune))]
            yield re.sub(" +", " ", f"| {labels:,}{note.format(**study['config'])} | {' | '.join(cells)} |")

def test_readme_quotes_the_committed_results():
    tables = {"vae.py": [*vae_table()], "conv_ae.py": [*conv_ae_table()], "classifier.py": [*classifier_table()]}
    text = re.sub("```.*?```", "", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    decimals = lambda lines: re.findall(r"(?<![\d.])(?<!Python )\d+\.\d+(?![\d.])", "\n".join(lines))
    everything = [row for rows in tables.values() for row in rows]
    for section in text.split("\n## "):  # a table holds its rows, and a sentence quotes cells of its section's table
        script = next((script for script in tables if section.startswith(f"`{script}`")), None)
        rows = tables.get(script, everything)
        lines = section.splitlines()
        assert not script or [line for line in lines if line.startswith("|") and "---" not in line] == rows
        assert not (wrong := set(decimals(set(lines) - set(rows))) - set(decimals(rows))), wrong

def test_readme_snippets_run(data, flags, tmp_path, monkeypatch):
    experiment, loading = re.findall("```python\n(.*?)```", (HERE / "README.md").read_text("utf-8"), re.DOTALL)
    monkeypatch.setattr("sys.argv", ["denoise.py", *flags])
    exec(experiment, {})
    assert metrics(tmp_path / "out" / "denoise")["test"].keys() == {"loss"}
    vae.main(flags + ["--out", str(tmp_path / "results")])
    monkeypatch.chdir(tmp_path)
    names = {"images": common.load_data(data, CPU).test.images}
    exec(loading, names)
    assert names["mu"].shape == (TEST, 8)

BAD_NUMBERS = ("0", "-1", "1.5", "x", "nan", "inf", "", "1" * 30)
BAD_REALS = ("-1", "x", "nan", "inf", "", "1e30")
SHARED = {"--epochs": BAD_NUMBERS, "--batch-size": BAD_NUMBERS, "--val-every": BAD_NUMBERS, "--seed": BAD_NUMBERS[1:],
          "--patience": BAD_NUMBERS[1:], "--min-delta": BAD_REALS, "--lr": ("0", *BAD_REALS), "--data": ("",),
          "--out": ("",), "--device": ("gpu", "") if torch.cuda.is_available() else ("gpu", "", "cuda")}
OWN = {vae: {"--alpha": BAD_REALS}, conv_ae: {"--latents": BAD_NUMBERS, "--seeds": BAD_NUMBERS},
       classifier: {"--latent": BAD_NUMBERS, "--labels": (*BAD_NUMBERS, "1000000"), "--seeds": BAD_NUMBERS,
                    "--strategies": ("distill",), "--encoder": ("",)}}
BAD_FLAGS = [(script, [flag, value]) for script, own in OWN.items()
             for flag, values in {**SHARED, **own}.items() for value in values] + [
    (conv_ae, ["--latents", "8", "8"]), (classifier, ["--labels", "100", "100"]), (vae, ["--eval", "--resume"]),
    (classifier, ["--strategies", "scratch", "scratch"]), (vae, ["--latents", "8"]), (vae, ["--epoch", "3"])]

def test_bad_flags_are_refused_before_anything_happens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_data", lambda *args: pytest.fail("data was read"))
    monkeypatch.chdir(tmp_path)
    for script, flags in BAD_FLAGS:
        message = fails(script.main, flags, capsys, 2)
        assert "error: " in message and flags[0].lstrip("-")[:5] in message, (script.__name__, flags, message)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("name, damage", [
    ("metrics.json", Path.unlink), ("model.pt", Path.unlink),
    ("metrics.json", lambda path: path.write_text("[]")),
    ("model.pt", lambda path: path.write_bytes(path.read_bytes()[:1000])),
    ("model.pt", lambda path: torch.save({"config": {}, "model": {"mu.weight": torch.zeros(9, 64)}}, path)),
    ("model.pt", lambda path: torch.save({"config": {}, "model": path}, path))])  # a pickle with code: pathlib's
def test_eval_refuses_what_it_cannot_confirm(name, damage, flags, tmp_path, capsys, no_figures):
    vae.main(flags + ["--epochs", "1"])
    damage(tmp_path / "out" / "vae" / name)
    assert f"{name} can't be used" in fails(vae.main, flags + ["--eval"], capsys, 1)

def test_out_that_is_a_file(flags, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert "out" in fails(vae.main, flags, capsys, 1) and (tmp_path / "out").read_text() == "mine"

def test_full_disk_leaves_earlier_results_intact(flags, tmp_path, capsys, no_figures):
    resource = pytest.importorskip("resource")
    vae.main(flags)
    before, limits = contents(tmp_path / "out" / "vae"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write past that fails as on a full disk
    try:
        assert "check the space" in fails(vae.main, flags + ["--seed", "1"], capsys, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "out" / "vae") == before

def test_divergence_stops_with_epoch_and_rate(flags, tmp_path, capsys, monkeypatch, no_figures):
    vae.main(flags)
    before, genuine = contents(tmp_path / "out" / "vae"), vae.loss_fn
    monkeypatch.setattr(vae, "loss_fn", lambda *a, **k: {name: v * math.nan for name, v in genuine(*a, **k).items()})
    message = fails(vae.main, flags, capsys, 1)
    assert "epoch 1" in message and "--lr" in message and contents(tmp_path / "out" / "vae") == before

def test_second_run_into_one_folder_is_refused(flags, tmp_path, capsys):
    pytest.importorskip("fcntl")
    with common.locked(tmp_path / "out" / "vae"):
        assert "another process" in fails(vae.main, flags, capsys, 1)

def test_a_failed_evaluation_loses_no_training(flags, tmp_path, capsys, monkeypatch, no_figures):
    vae.main(flags + ["--out", str(tmp_path / "whole")])
    with monkeypatch.context() as broken:
        broken.setattr(vae, "evaluate", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            vae.main(flags)
    capsys.readouterr()
    vae.main(flags + ["--resume"])
    assert "epoch" not in capsys.readouterr().out and same_weights(tmp_path / "whole" / "vae", tmp_path / "out" / "vae")

@pytest.mark.parametrize("script, own, number, code", [
    (vae, [], signal.SIGINT, 130),
    (classifier, ["--strategies", "scratch", "--labels", "200", "--seeds", "1"], signal.SIGTERM, 143)])
def test_signals_stop_the_run_and_resume_ends_with_the_same_bytes(
        script, own, number, code, flags, tmp_path, capsys, monkeypatch, no_figures, one_pass):
    flags = flags + ["--epochs", "12", *own]
    script.main(flags + ["--out", str(tmp_path / "whole")])
    genuine, calls = script.loss_fn, itertools.count()
    def loss_fn(*args, **options):
        if next(calls) == 33:  # in the VAE's ninth epoch, the classifier's seventh
            signal.raise_signal(number)
        return genuine(*args, **options)
    monkeypatch.setattr(script, "loss_fn", loss_fn)
    assert "--resume" in fails(script.main, flags, capsys, code)
    script.main(flags + ["--resume"])
    assert "epoch   2" not in capsys.readouterr().out  # it went on and did not start anew
    whole, resumed = (next((tmp_path / name).glob("**/model.pt")).parent for name in ("whole", "out"))
    assert same_weights(whole, resumed) and not (resumed / "checkpoint.pt").exists()
    assert contents(whole)["losses.csv"] == contents(resumed)["losses.csv"]
