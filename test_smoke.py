"""Fast, offline tests through the scripts' own `main`, on a small dataset that they write themselves."""
import argparse
import gzip
import hashlib
import itertools
import json
import math
import re
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import classifier
import common
import conv_ae
import vae

TRAIN, TEST = 240, 60  # images; 5/6 of TRAIN are trained on
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def fixed():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A dataset in Fashion-MNIST's format, each class a bright block of its own height; its hashes take the genuine ones' place."""
    folder = tmp_path / "data"
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files = {}
    for prefix, count in (("train", TRAIN), ("t10k", TEST)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 40, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels):
            image[4:6 + 2 * label, 6:22] = 255
        files[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4i", 2051, count, 28, 28) + bytes(images.flatten().tolist())
        files[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, count) + bytes(labels.tolist())
    for name, content in files.items():
        (raw / name).write_bytes(content)
    monkeypatch.setattr(common, "FILES", {name: (len(c), hashlib.sha256(c).hexdigest()) for name, c in files.items()})
    monkeypatch.setattr(common, "DEBIAN", tmp_path / "nowhere")
    return folder


@pytest.fixture
def flags(data, tmp_path):
    """Flags of a short run on the CPU."""
    return ["--data", str(data), "--out", str(tmp_path / "out"), "--device", "cpu", "--epochs", "3", "--batch-size", "50"]


@pytest.fixture
def no_figures(monkeypatch):
    """For tests that are about something else: the 28 scatter plots take most of a short run's time."""
    monkeypatch.setattr(vae, "draw", lambda model, history, data: {"samples.png": PNG})


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def fails(main, flags, capsys, code):
    """The one line that a run which ends with that exit code prints."""
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    text = isinstance(stopped.value.code, str)  # what Python prints before it ends with exit code 1
    assert (1 if text else stopped.value.code) == code
    message = stopped.value.code if text else capsys.readouterr().err.splitlines()[-1]
    assert len(message.splitlines()) == 1 and "Traceback" not in message
    return message


# ------------------------------------------------------------------------------------------------------------------ data


def test_split_is_disjoint_complete_and_fixed(data):
    torch.manual_seed(1)
    first = common.load_data(data, torch.device("cpu"))
    torch.manual_seed(2)
    second = common.load_data(data, torch.device("cpu"))
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.val.labels, second.val.labels)
    assert (len(first.train.images), len(first.val.images), len(first.test.images)) == (TRAIN * 5 // 6, TRAIN // 6, TEST)
    content = (data / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[16:]
    given = sorted(content[i:i + 784] for i in range(0, len(content), 784))
    split = torch.cat([first.train.images, first.val.images])
    assert sorted(bytes(image.mul(255).round().byte().flatten().tolist()) for image in split) == given
    assert len(set(given)) == TRAIN  # so that equal lists mean disjoint parts
    assert 0 <= split.min() and split.max() == 1


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half_gzip(path):
    whole = gzip.compress(path.read_bytes())
    path.with_name(f"{path.name}.gz").write_bytes(whole[:len(whole) // 2])
    path.unlink()


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "bit flipped": flip_bit,
    "empty": lambda path: path.write_bytes(b""),
    "labels for images": lambda path: path.write_bytes(path.with_name("train-labels-idx1-ubyte").read_bytes()),
    "half a .gz": half_gzip,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_data_is_refused_by_name(damage, data, flags, capsys):
    damage(data / "FashionMNIST" / "raw" / "train-images-idx3-ubyte")
    assert "train-images-idx3-ubyte" in fails(vae.main, flags, capsys, 1)


def test_missing_data_names_the_file_and_three_ways(data, flags, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise RuntimeError("Error downloading")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST.__init__", no_network)
    (data / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    message = fails(vae.main, flags, capsys, 1)
    for part in ("t10k-labels-idx1-ubyte", "FashionMNIST/raw", "dataset-fashion-mnist", "download"):
        assert part in message


def test_gzipped_data_is_read(data, flags, tmp_path):
    for path in list((data / "FashionMNIST" / "raw").iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert len(common.load_data(data, torch.device("cpu")).test.labels) == TEST


# -------------------------------------------------------------------------------------------------------------- training


class Weights(torch.nn.Linear):
    def __init__(self, value):
        super().__init__(1, 1)
        torch.nn.init.constant_(self.weight, value)


@pytest.mark.parametrize("losses, stops_at, best", [
    ([1.0, 0.5, 0.5, 0.5, 0.5, 0.4], 5, 2),  # epochs 3, 4, 5 bring nothing
    ([1.0, 0.5, 0.495, 0.49, 0.485, 0.4], 5, 5),  # falls, but by less than min_delta; the weights kept are the lowest's
    ([1.0, 0.5, 0.5, 0.5, 0.4, 0.4, 0.4, 0.4], 8, 5),  # the last check in time restarts the count
    ([1.0, 0.9, 0.8, 0.7, 0.6], None, 5),
])
def test_early_stopping_stops_in_time_and_keeps_the_best(losses, stops_at, best):
    stopping = common.EarlyStopping(patience=3, min_delta=0.05)
    stopped = next((epoch for epoch, loss in enumerate(losses, 1) if stopping.step(epoch, loss, Weights(epoch))), None)
    assert stopped == stops_at
    assert stopping.best_epoch == best and stopping.best_weights["weight"].item() == best


def test_patience_zero_never_stops():
    stopping = common.EarlyStopping(patience=0, min_delta=0.0)
    assert not any(stopping.step(epoch, 1.0, Weights(0)) for epoch in range(1, 1000))


def test_early_stopping_through_main(flags, tmp_path, no_figures):
    vae.main(flags + ["--epochs", "60", "--patience", "10", "--min-delta", "1000"])  # nothing counts after the first check
    result = metrics(tmp_path / "out" / "vae")
    assert result["epochs_run"] == 15
    checks = {row["epoch"]: row["loss"] for row in result["validation"]}
    assert list(checks) == [5, 10, 15] and result["best_epoch"] == min(checks, key=checks.get)


def test_hard_images_are_drawn_three_times_as_often_in_the_first_epochs(tmp_path):
    drawn = []

    def loss_fn(model, images, labels):
        if not model.training:
            return {"loss": torch.tensor(1.0)}
        drawn.append(labels)
        return {"loss": model.weight.sum(), "difficulty": (labels < 1000).float()}

    split = common.Split(torch.zeros(2000, 1), torch.arange(2000))
    args = argparse.Namespace(lr=1e-3, epochs=17, batch_size=500, patience=0, min_delta=0, val_every=17, resume=False)
    common.train_loop(torch.nn.Linear(1, 1), loss_fn, common.Data(split, split, split), args, tmp_path / "checkpoint.pt")
    epochs = torch.cat(drawn).view(17, 2000)
    for epoch in (0, 15, 16):  # each image once
        assert torch.equal(epochs[epoch].sort().values, torch.arange(2000))
    assert (epochs[1:15] < 1000).double().mean().item() == pytest.approx(1.5 / 2, abs=0.01)


# ------------------------------------------------------------------------------------------------------------------- VAE


def test_kl_is_that_of_torch_distributions():
    mu, logvar = torch.randn(7, 8, dtype=torch.float64), torch.randn(7, 8, dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mu, (0.5 * logvar).exp()), normal(0.0, 1.0)).sum(1)
    assert torch.allclose(vae.kl_divergence(mu, logvar), expected)


def test_vae_loss_is_the_recipe(monkeypatch):
    model, images = vae.VAE(), torch.rand(5, 1, 28, 28)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # z = mu
    entries = vae.loss_function(model, images, alpha=0.25)
    mu, logvar = model.encode(images)
    recon = (model.decode(mu) - images).abs().sum() / (5 * 784)
    kl = -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum() / 5
    assert torch.allclose(entries["recon"], recon) and torch.allclose(entries["kl"], kl)
    assert torch.allclose(entries["loss"], recon + 0.25 * kl)


def test_guards_act_only_on_the_unusual():
    model = vae.VAE()
    images = torch.rand(100, 1, 28, 28) / 2
    h = model.encoder(images)
    assert all(map(torch.equal, model.encode(images), (model.mu(h), model.logvar(h))))
    with torch.no_grad():
        model.logvar.bias += torch.tensor([1e6, -1e6]).repeat(4)
        model.mu.bias += torch.tensor([1e6, -1e6]).repeat(4)
    assert vae.kl_divergence(*model.encode(images)).max() < 3700


def test_sampled_latents_have_the_moments_of_the_posterior():
    torch.manual_seed(0)
    mu, logvar = torch.full((200000, 1), 3.0), torch.full((200000, 1), math.log(0.25))
    z = vae.VAE().reparameterize(mu, logvar)
    assert abs(z.mean() - 3.0) < 0.01 and abs(z.std() - 0.5) < 0.01


def test_knn_accuracy_by_hand():
    index, labels = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]]), torch.tensor([1, 1, 2, 3, 3])
    queries, truth = torch.tensor([[0.05], [5.05], [0.3]]), torch.tensor([1, 3, 2])
    assert vae.knn_accuracy(index, labels, queries, truth, k=3) == pytest.approx(1 / 3 * 1 + 1 / 3)


def test_vae_end_to_end(data, flags, tmp_path, capsys):
    vae.main(flags)
    folder = tmp_path / "out" / "vae"
    figures = {"losses.png", "reconstructions.png", "samples.png", "latent_pairs.png", "interpolations.png"}
    assert {path.name for path in folder.iterdir()} == figures | {"losses.csv", "metrics.json", "model.pt"}
    assert all((folder / name).read_bytes().startswith(PNG) for name in figures)
    result = metrics(folder)
    assert {"config", "environment", "parameters", "epochs_run", "best_epoch", "train_seconds", "test",
            "latent_knn_accuracy", "kl_max"} <= result.keys()
    assert {"python", "torch", "torchvision", "device", "threads"} <= result["environment"].keys()
    assert result["config"]["alpha"] == 1e-3 and result["parameters"] == 219808
    assert result["test"]["loss"] == pytest.approx(result["test"]["recon"] + 1e-3 * result["test"]["kl"], rel=1e-5)
    lines = (folder / "losses.csv").read_text().splitlines()
    assert lines[0] == "epoch,train_loss,val_loss" and [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3"]
    assert lines[1].endswith(",") and not lines[3].endswith(",")  # validated every 5 epochs and in the last
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["config"] == result["config"]
    model = vae.VAE()
    model.load_state_dict(saved["model"])
    split = common.load_data(data, torch.device("cpu")).test
    assert common.test_loop(model, lambda model, images, labels: vae.loss_function(model, images, 1e-3), split) == pytest.approx(result["test"])
    assert f"{result['test']['loss']:.5f}" in capsys.readouterr().out.splitlines()[-2]
    vae.main(flags + ["--eval"])
    tampered = {**result, "test": {**result["test"], "loss": result["test"]["loss"] * 1.001}}
    (folder / "metrics.json").write_text(json.dumps(tampered))
    assert f"{tampered['test']['loss']:.6g}"[:6] in fails(vae.main, flags + ["--eval"], capsys, 1)


def test_same_seed_same_bytes_other_seed_other_bytes(flags, tmp_path, no_figures):
    written = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        vae.main(flags + ["--out", str(tmp_path / name), "--seed", str(seed)])
        folder = tmp_path / name / "vae"
        written.append(((folder / "losses.csv").read_bytes(), torch.load(folder / "model.pt", weights_only=True)["model"]))
    (losses_a, a), (losses_b, b), (losses_c, c) = written
    assert losses_a == losses_b and all(torch.equal(a[name], b[name]) for name in a)
    assert losses_a != losses_c and not torch.equal(a["mu.weight"], c["mu.weight"])


# ----------------------------------------------------------------------------------------------------------- autoencoder


@pytest.mark.parametrize("latent", [1, 2, 32, 128])
def test_autoencoder_shapes(latent):
    images = torch.rand(3, 1, 28, 28)
    model = conv_ae.Autoencoder(latent)
    assert model.encoder(images).shape == (3, latent) and model(images).shape == images.shape


def test_pca_is_that_of_a_direct_svd():
    train, test = torch.rand(200, 1, 28, 28), torch.rand(50, 1, 28, 28)
    flat, mean = train.flatten(1).double(), train.flatten(1).double().mean(0)
    basis = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:5]
    centred = test.flatten(1).double() - mean
    expected = (centred - centred @ basis.T @ basis).square().mean().item()
    assert conv_ae.pca_errors(train, test, [5])[5] == pytest.approx(expected)


def test_conv_ae_study_end_to_end_and_continued(flags, tmp_path, capsys):
    study = tmp_path / "out" / "conv_ae"
    conv_ae.main(flags + ["--latents", "3", "32", "--seeds", "2"])
    names = {"metrics.json", "latent_vs_error.png", "reconstructions.png"}
    runs = {f"latent{latent:03d}-seed{seed}" for latent in (3, 32) for seed in (0, 1)}
    assert {path.name for path in study.iterdir()} == names | runs
    assert all({path.name for path in (study / run).iterdir()} == {"losses.csv", "metrics.json", "model.pt"} for run in runs)
    assert metrics(study / "latent003-seed1")["test"].keys() == {"mse", "l1"}
    before, stamp = metrics(study), (study / "latent003-seed1" / "model.pt").stat().st_mtime_ns
    assert [(row["latent"], row["n"]) for row in before["summary"]] == [(3, 2), (32, 2)]
    conv_ae.main(flags + ["--latents", "3", "32", "--seeds", "2", "--resume"])
    assert metrics(study)["summary"] == before["summary"]
    conv_ae.main(flags + ["--latents", "5", "--resume"])  # one more size costs one run
    assert [row["latent"] for row in metrics(study)["summary"]] == [3, 5, 32]
    assert (study / "latent003-seed1" / "model.pt").stat().st_mtime_ns == stamp
    conv_ae.main(flags + ["--eval"])
    assert capsys.readouterr().out.count("confirmed") == 5
    encoder = conv_ae.Encoder(32)
    weights = torch.load(study / "latent032-seed0" / "model.pt", weights_only=True)["model"]
    encoder.load_state_dict({name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")})
    assert "--epochs" in fails(conv_ae.main, flags + ["--latents", "3", "--epochs", "4", "--resume"], capsys, 1)


# ------------------------------------------------------------------------------------------------------------ classifier


@pytest.fixture
def encoder(flags, tmp_path):
    conv_ae.main(flags + ["--latents", "32"])
    return tmp_path / "out" / "conv_ae" / "latent032-seed0" / "model.pt"


def test_label_subsets_are_balanced_and_nested():
    labels = torch.arange(500) % 10
    subsets = [classifier.label_subset(labels, count, seed=3).tolist() for count in (20, 105, 300)]
    for subset, count in zip(subsets, (20, 105, 300)):
        shares = torch.bincount(labels[subset], minlength=10)
        assert len(set(subset)) == count and shares.max() - shares.min() <= 1
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2])
    assert subsets[0] != classifier.label_subset(labels, 20, seed=4).tolist()


def test_augmentation_flips_half_of_the_images_and_shifts_by_a_pixel_at_most():
    images = torch.rand(100, 1, 28, 28)
    versions = {}  # (flipped, down, right): what the images look like then, but for the border, where zeros come in
    for flipped, down, right in itertools.product((False, True), (-1, 0, 1), (-1, 0, 1)):
        moved = (images.flip(3) if flipped else images).roll((down, right), (2, 3))
        versions[flipped, down, right] = moved[:, :, 1:-1, 1:-1]
    seen = []
    for _ in range(20):
        augmented = classifier.augment(images, shifted=1.0, erased=0.0)[:, :, 1:-1, 1:-1]
        matches = [[key for key, version in versions.items() if torch.equal(version[i], augmented[i])] for i in range(100)]
        assert all(len(match) == 1 for match in matches)
        seen += [match[0] for match in matches]
    assert len({key[1:] for key in seen}) > 5
    assert 850 < sum(flipped for flipped, _, _ in seen) < 1150
    assert all(torch.equal(after, before) or torch.equal(after, before.flip(2))
               for after, before in zip(classifier.augment(images, shifted=0.0, erased=0.0), images))


def test_augmentation_erases_one_rectangle_of_up_to_half_the_sides():
    images = torch.ones(4000, 1, 28, 28)
    for share in (0.25, 1.0):
        changed = (classifier.augment(images, shifted=0.0, erased=share) != 1).squeeze(1)
        hit = changed.any(2).any(1)
        assert hit.double().mean().item() == pytest.approx(share, abs=0.03)
        sides = [changed[hit].any(axis).sum(1) for axis in (1, 2)]  # columns, then rows
        assert all(side.max() == 14 and side.double().mean().item() == pytest.approx(7.5, abs=0.4) for side in sides)
        assert torch.equal(sides[0] * sides[1], changed[hit].sum((1, 2)))  # all of the box and nothing else
        for axis in (1, 2):  # in one piece, and up to the edges
            inside = changed[hit].any(axis).int()
            assert (inside.diff(dim=1) == 1).sum(1).max() <= 1 and inside[:, 0].any() and inside[:, 27].any()


def test_classifier_study_end_to_end(encoder, flags, tmp_path, capsys):
    classifier.main(flags + ["--labels", "50", "200", "--seeds", "1", "--epochs", "6"])
    study = tmp_path / "out" / "classifier"
    figures = {"learning_curves.png", "label_efficiency.png", "confusion_matrix.png"}
    runs = {f"{strategy}-labels{labels}-seed0" for strategy in ("scratch", "frozen", "finetune") for labels in (50, 200)}
    assert {path.name for path in study.iterdir()} == figures | runs | {"metrics.json"}
    assert all({path.name for path in (study / run).iterdir()} == {"losses.csv", "metrics.json", "model.pt"} for run in runs)
    result = metrics(study)
    assert result["summary"][-1].keys() >= {"strategy", "labels", "n", "test_accuracy_mean", "test_accuracy_std",
                                            "val_accuracy_first_epoch_mean", "epochs_to_088_mean"}
    assert metrics(study / "scratch-labels200-seed0")["test"]["accuracy"] > 0.95  # the blocks are easy to tell apart

    start = torch.load(encoder, weights_only=True)["model"]
    frozen, finetuned = (torch.load(study / f"{strategy}-labels200-seed0" / "model.pt", weights_only=True)["model"]
                         for strategy in ("frozen", "finetune"))
    pairs = {name: name.replace("encoder.", "encoder.features.") for name in frozen if name.startswith("encoder.")}
    assert all(torch.equal(frozen[own], start[name]) for own, name in pairs.items())  # batch norm's buffers included
    assert not all(torch.equal(finetuned[own], start[name]) for own, name in pairs.items())
    classifier.main(flags + ["--eval"])
    assert capsys.readouterr().out.count("confirmed") == 6


def test_strategies_start_where_they_should(encoder):
    weights, _ = classifier.load_encoder(encoder, 32, "out")
    torch.manual_seed(0)
    models = {strategy: classifier.make_classifier(strategy, 32, weights) for strategy in ("scratch", "frozen", "finetune")}
    for strategy, model in models.items():
        loaded = all(torch.equal(tensor, weights[f"features.{name}"]) for name, tensor in model.encoder.state_dict().items())
        assert loaded == (strategy != "scratch")
        assert all(p.requires_grad == (strategy != "frozen") for p in model.encoder.parameters())
        assert all(p.requires_grad for p in model.head.parameters())


def test_no_encoder_and_one_of_another_size(flags, encoder, tmp_path, capsys):
    missing = fails(classifier.main, flags + ["--labels", "50", "--encoder", str(tmp_path / "none.pt")], capsys, 1)
    other = fails(classifier.main, flags + ["--labels", "50", "--latent", "8", "--encoder", str(encoder)], capsys, 1)
    assert "python conv_ae.py --latents 32" in missing and "python conv_ae.py --latents 8" in other


# ---------------------------------------------------------------------------------------------------------------- studies


def test_ranks_share_the_runs_out_and_leave_together(monkeypatch):
    store, done, seen = torch.distributed.HashStore(), ([], []), []

    def rank(number):
        for job in common.shared_out(range(20)):
            done[number].append(job)
            time.sleep(0.001 * (1 + number))  # one is slower
        seen.append(len(done[0]) + len(done[1]))

    assert list(common.shared_out(range(3))) == [0, 1, 2]  # alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda url: iter([(store, 0, 2)]))
    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done[0] + done[1]) == list(range(20)) and len(done[0]) > len(done[1]) > 0
    assert seen == [20, 20]  # neither left before the other's runs were complete


# ----------------------------------------------------------------------------------------------------------------- README

HERE = Path(__file__).parent


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, (dict, list)):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if isinstance(value, (int, float)) else []


def test_every_decimal_number_in_the_readme_stands_in_a_results_file():
    """To the digits given, as it is or in percent; for the VAE also mean and std over the seeds, which no file holds."""
    files = [json.loads(path.read_text()) for path in (HERE / "results").rglob("metrics.json")]
    known, vaes = numbers(files), {}
    for file in files:
        if "kl_max" in file:
            vaes.setdefault(file["config"]["patience"], []).append(
                {**file["test"], "knn": file["latent_knn_accuracy"], "seconds": file["train_seconds"]})
    for runs in vaes.values():
        known += [statistic for name in runs[0] for statistic in common.mean_std(run[name] for run in runs) if statistic]
    known += [100 * number for number in known] + [0.0838]  # the given result
    text = re.sub(r"```.*?```", "", (HERE / "README.md").read_text(), flags=re.DOTALL)
    for token in re.findall(r"(?<![\d.:])\d+\.\d+(?![\d.:])", text):
        digits = len(token.split(".")[1])
        assert any(f"{number:.{digits}f}" == token for number in known), f"README.md has {token}, no results file does"


# ----------------------------------------------------------------------------------------------------------- reliability

BAD_NUMBERS = ("0", "-1", "1.5", "x", "nan", "inf", "", "1" * 30)
BAD_REALS = ("-1", "x", "nan", "inf", "", "1e30")
BAD_FLAGS = [  # (script, flags): refused with exit code 2 before any data is read
    *[(script, [flag, value]) for script in (vae, conv_ae, classifier)
      for flag, values in {"--epochs": BAD_NUMBERS, "--batch-size": BAD_NUMBERS, "--val-every": BAD_NUMBERS,
                           "--seed": BAD_NUMBERS[1:], "--patience": BAD_NUMBERS[1:], "--min-delta": BAD_REALS,
                           "--lr": ("0", *BAD_REALS), "--data": ("",), "--out": ("",), "--device": ("gpu", "")}.items()
      for value in values],
    *[(vae, ["--alpha", value]) for value in BAD_REALS],
    *[(script, [flag, value]) for script, flag in ((conv_ae, "--latents"), (conv_ae, "--seeds"), (classifier, "--seeds"),
                                                   (classifier, "--latent"), (classifier, "--labels")) for value in BAD_NUMBERS],
    (conv_ae, ["--latents", "8", "8"]), (classifier, ["--labels", "1000000"]), (classifier, ["--labels", "100", "100"]),
    (classifier, ["--strategies", "scratch", "scratch"]), (classifier, ["--strategies", "distill"]),
    (classifier, ["--encoder", ""]), (vae, ["--eval", "--resume"]), (vae, ["--latents", "8"]), (vae, ["--epoch", "3"]),
]
if not torch.cuda.is_available():
    BAD_FLAGS.append((vae, ["--device", "cuda"]))


def test_bad_flags_are_refused_before_anything_happens(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "load_data", lambda *args: pytest.fail("data was read"))
    monkeypatch.chdir(tmp_path)
    for script, flags in BAD_FLAGS:
        message = fails(script.main, flags, capsys, 2)
        assert "error: " in message and flags[0].lstrip("-")[:5] in message, (script.__name__, flags, message)
    assert not list(tmp_path.iterdir())


def no_metrics(out):
    (out / "vae" / "metrics.json").unlink()


def pickle_with_code(out):
    class Payload:
        def __reduce__(self):
            return (out.joinpath("executed").mkdir, ())

    torch.save({"model": Payload()}, out / "vae" / "model.pt")


def other_shapes(out):
    saved = torch.load(out / "vae" / "model.pt", weights_only=True)
    saved["model"]["mu.weight"] = torch.zeros(9, 64)
    torch.save(saved, out / "vae" / "model.pt")


def half_a_file(out):
    path = out / "vae" / "model.pt"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("damage, part", [
    (no_metrics, "metrics.json"), (pickle_with_code, "model.pt is not a file of weights"), (other_shapes, "mu.weight"),
    (half_a_file, "model.pt is not a file of weights"), (lambda out: (out / "vae" / "model.pt").unlink(), "model.pt"),
])
def test_eval_refuses_what_it_cannot_confirm(damage, part, flags, tmp_path, capsys, no_figures):
    out = tmp_path / "out"
    vae.main(flags + ["--epochs", "1"])
    damage(out)
    assert part in fails(vae.main, flags + ["--eval"], capsys, 1)
    assert not (out / "executed").exists()


def test_out_that_is_a_file(flags, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert "out" in fails(vae.main, flags, capsys, 1)
    assert (tmp_path / "out").read_text() == "mine"


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checkpoint.pt"}


def test_full_disk_leaves_earlier_results_intact(flags, tmp_path, capsys, no_figures):
    vae.main(flags)
    before = everything(tmp_path / "out" / "vae")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a write past that fails as on a full disk
    try:
        fails(vae.main, flags + ["--seed", "1"], capsys, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert everything(tmp_path / "out" / "vae") == before


def test_divergence_stops_with_epoch_and_rate(flags, tmp_path, capsys, monkeypatch, no_figures):
    vae.main(flags)
    before = everything(tmp_path / "out" / "vae")
    genuine = vae.loss_function
    monkeypatch.setattr(vae, "loss_function", lambda *args: {k: v * math.nan for k, v in genuine(*args).items()})
    message = fails(vae.main, flags, capsys, 1)
    assert "epoch 1" in message and "--lr" in message
    assert everything(tmp_path / "out" / "vae") == before


def test_second_run_into_one_folder_is_refused(flags, tmp_path, capsys):
    with common.locked(tmp_path / "out" / "vae"):
        assert "another process" in fails(vae.main, flags, capsys, 1)
        conv_ae.main(flags + ["--latents", "2", "--epochs", "1"])  # another folder


@pytest.mark.parametrize("script, loss_name, own, number, code", [
    (vae, "loss_function", [], signal.SIGINT, 130),
    (classifier, "loss_fn", ["--strategies", "scratch", "--labels", "200", "--seeds", "1"], signal.SIGTERM, 143)])
def test_signals_stop_the_run_and_resume_ends_with_the_same_bytes(
        script, loss_name, own, number, code, flags, tmp_path, capsys, monkeypatch, no_figures):
    monkeypatch.setattr(classifier, "labelled", lambda data, count, seed: data)  # each image once an epoch, for speed
    flags = flags + ["--epochs", "12", *own]
    script.main(flags + ["--out", str(tmp_path / "whole")])
    genuine, calls = getattr(script, loss_name), itertools.count()

    def loss_function(*args, **options):
        if next(calls) == 33:  # in the VAE's ninth epoch, the classifier's seventh
            signal.raise_signal(number)
        return genuine(*args, **options)

    monkeypatch.setattr(script, loss_name, loss_function)
    assert "--resume" in fails(script.main, flags, capsys, code)
    assert "--lr" in fails(script.main, flags + ["--resume", "--lr", "0.001"], capsys, 1)
    script.main(flags + ["--resume"])
    whole, resumed = (next((tmp_path / name).glob("**/model.pt")).parent for name in ("whole", "out"))
    assert same_weights(whole, resumed)
    assert everything(whole)["losses.csv"] == everything(resumed)["losses.csv"]
    assert not (resumed / "checkpoint.pt").exists()


def same_weights(*folders):
    first, second = (torch.load(folder / "model.pt", weights_only=True)["model"] for folder in folders)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_killed_twice_and_resumed_ends_with_the_same_bytes(flags, tmp_path):
    """SIGKILL in a process of its own, at lines of its output; the tiny dataset's hashes travel as an argument."""
    program = ("import json, sys, common, torch; torch.set_num_threads(1); common.FILES = {k: tuple(v) for k, v in "
               "json.loads(sys.argv[1]).items()}; import vae; vae.main(sys.argv[2:])")
    command = [sys.executable, "-c", program, json.dumps(common.FILES), *flags, "--epochs", "12"]
    vae.main(flags + ["--epochs", "12", "--out", str(tmp_path / "whole")])
    for line in ("epoch   3", "epoch   8"):
        with subprocess.Popen(command + ["--resume"], stdout=subprocess.PIPE, text=True) as process:
            assert any(text.startswith(line) for text in process.stdout)
            process.kill()
    subprocess.run(command + ["--resume"], check=True, stdout=subprocess.DEVNULL)
    whole, resumed = everything(tmp_path / "whole" / "vae"), everything(tmp_path / "out" / "vae")
    assert whole["losses.csv"] == resumed["losses.csv"]
    assert same_weights(tmp_path / "whole" / "vae", tmp_path / "out" / "vae")
