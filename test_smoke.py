"""Fast, offline tests through the scripts' own `main`, on a small dataset that they write themselves."""
import gzip
import hashlib
import itertools
import json
import math
import re
import signal
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import classifier
import common
import conv_ae
import vae

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
        pixels = bytes(images.flatten().tolist())
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
    assert vae.kl_divergence(*model.encode(images)).max() < 480

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
    assert files.keys() == figures | {"losses.csv", "metrics.json", "model.pt"}
    assert all(files[name].startswith(b"\x89PNG\r\n\x1a\n") for name in figures)
    assert {"config", "environment", "parameters", "epochs_run", "best_epoch", "train_seconds", "test",
            "latent_knn_accuracy", "kl_max"} <= result.keys()
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

def test_running_statistics_are_a_models_own_after_a_few_steps(flags, data, tmp_path):
    classifier.main(flags + ["--strategies", "scratch", "--labels", "50", "--seeds", "1", "--epochs", "1"])  # ten steps
    model = classifier.Classifier(conv_ae.Encoder(32), dropout=0.0)
    model.load_state_dict(weights(tmp_path / "out" / "classifier" / "scratch-labels50-seed0"))
    images = common.load_data(data, CPU).val.images
    own, batch = model.eval()(images).softmax(1), model.train()(images).softmax(1)
    distance = (own - batch).abs().sum(1).mean() / 2  # in total variation
    assert distance < 0.2

def test_classifier_study_end_to_end(encoder, data, flags, tmp_path, capsys):
    classifier.main(flags + ["--labels", "50", "200", "--seeds", "1", "--epochs", "6"])
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

def test_a_run_starts_and_ends_the_same_alone_and_after_others(encoder, flags, tmp_path):
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

def test_runs_that_differ_in_more_than_what_varies_share_no_row(encoder, flags, tmp_path, capsys):
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

def test_every_decimal_number_in_the_readme_stands_in_a_results_file():
    here, known, vaes = Path(__file__).parent, [0.0838], {}  # the reference result
    for path in (here / "results").rglob("metrics.json"):
        file = json.loads(path.read_text(), parse_float=lambda number: known.append(float(number)) or float(number))
        if "kl_max" in file:
            vaes.setdefault(file["config"]["patience"], []).append(
                {**file["test"], "knn": file["latent_knn_accuracy"], "seconds": file["train_seconds"]})
    for runs in vaes.values():
        for name in runs[0]:
            known += [statistic for statistic in common.mean_std([run[name] for run in runs]) if statistic]
    known += [100 * number for number in known]
    text = re.sub(r"```.*?```", "", (here / "README.md").read_text(), flags=re.DOTALL)
    for token in re.findall(r"(?<![\d.:])\d+\.\d+(?![\d.:])", text):
        digits = len(token.split(".")[1])
        assert any(f"{number:.{digits}f}" == token for number in known), f"README.md has {token}, no results file does"

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
        script, own, number, code, flags, tmp_path, capsys, monkeypatch, no_figures):
    monkeypatch.setattr(classifier, "passes", lambda count: 1)  # each image once an epoch, for speed
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
