"""Fast tests through the scripts' own `main`, on a small dataset that they write."""

import copy
import csv
import gzip
import hashlib
import itertools
import json
import re
import shutil
import statistics
import struct
import subprocess
import sys
from dataclasses import fields, make_dataclass, replace
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import classifier
import common
import conv_ae
import vae

NAME = common.DATASET.__name__
SCRIPTS = (vae, conv_ae, classifier)
TRAIN, VAL, TEST = 200, 40, 60  # images of the small dataset
SHORT = ["--epochs", "2", "--batch-size", "50", "--seeds", "2"]
STUDIES = {
    vae: [*SHORT, "--val-every", "2", "--latent", "4"],
    conv_ae: [*SHORT, "--latents", "3", "32"],
    classifier: [*SHORT, "--val-every", "1", "--labels", "200", "--epoch-images", "40"],
}


def write_dataset(folder):
    """A small dataset of the genuine format: each class is a bright block of its own height."""
    raw = folder / NAME / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, count in (("train", TRAIN + VAL), ("t10k", TEST)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 40, (count, 28, 28), generator=generator)
        for image, label in zip(images, labels):
            image[4 : 6 + 2 * label, 6:22] = 255
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + values.dim()}i", 2048 + values.dim(), *values.shape)
            content = header + bytes(values.flatten().tolist())
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(content)


@pytest.fixture(scope="session", autouse=True)
def dataset(tmp_path_factory):
    """A folder that the scripts take for the genuine data."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    checksum = hashlib.sha256()
    for train in (True, False):
        part = common.DATASET(folder, train)
        checksum.update(part.data.numpy().tobytes() + part.targets.numpy().tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "SHA256", checksum.hexdigest())
        patch.setattr(common, "DEBIAN", folder / "nowhere")
        patch.setattr(conv_ae, "PRINTS", list(range(10)))
        patch.setattr(vae.animate_walk, "__defaults__", (1,))
        for name, default in (("dpi", 20), ("bbox_inches", None)):
            patch.setitem(common.PNG, name, default)  # figures take most of the time
        torch.set_num_threads(1)
        yield folder


@pytest.fixture(scope="session")
def studies(dataset, tmp_path_factory):
    """The folder with a small study of each script."""
    out = tmp_path_factory.mktemp("studies")
    for script, flags in STUDIES.items():
        script.main(["--data", str(dataset), "--out", str(out), "--device", "cpu", *flags])
    return out


@pytest.fixture
def here(dataset, tmp_path):
    return ["--data", str(dataset), "--out", str(tmp_path / "out"), "--device", "cpu"]


@pytest.fixture
def again(studies, here, tmp_path):
    """The flags that lead to a copy of the small studies."""
    shutil.copytree(studies, tmp_path / "out")
    return here


@pytest.fixture
def data(dataset):
    return common.load_data(dataset)


@pytest.fixture
def no_report(monkeypatch):
    """Without figures and reports, which take most of the time of a small study."""
    for script in SCRIPTS:
        for name in vars(script):
            if name.startswith(("plot_", "animate_")):
                monkeypatch.setattr(script, name, lambda *args: None)
    monkeypatch.setattr(common, "save_study", lambda *args: None)


def read_json(path):
    return json.loads(path.read_text())


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)["model"]


def same(first, second):
    """Whether two state_dicts are the same, bit by bit."""
    return all(torch.equal(first[name], second[name]) for name in {**first, **second})


def snapshot(folder):
    """{path: content} of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(main, *args, **kwargs):
    """The one line that a run ends with, besides exit code 1."""
    with pytest.raises(SystemExit) as end:
        main(*args, **kwargs)
    message = end.value.code  # Python prints a text and exits with code 1
    assert isinstance(message, str) and len(message.splitlines()) == 1
    return message


# flags and data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flags", ["--epochs 0", "--lr nan", "--lr x", "--seeds 0", "--device tpu", "--eval --resume"]
)
def test_a_bad_flag_ends_with_exit_code_2_before_anything_is_written(script, flags, tmp_path):
    with pytest.raises(SystemExit) as end:
        script.main([*flags.split(), "--data", "none", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_hyperparameter_is_a_flag_and_reaches_the_config(script):
    parser = common.make_parser("", script.Config)
    for item in fields(script.Config):
        if item.name in ("strategy", "labels") or (script is conv_ae and item.name == "latent"):
            continue  # one of --strategies, of --labels, of --latents
        flags = ["--" + item.name.replace("_", "-"), "3"]
        config = common.parse_args(parser, script.Config, flags).config
        assert config == replace(script.Config(), **{item.name: item.type(3)})


def test_the_split_is_disjoint_complete_and_the_same_every_time(dataset, data):
    assert [len(split.labels) for split in data] == [TRAIN, VAL, TEST]
    genuine = common.DATASET(dataset).data.flatten(1)
    images = torch.cat([data.train.images, data.val.images]).flatten(1) * 255
    assert torch.equal(images.unique(dim=0).byte(), genuine.unique(dim=0))
    torch.manual_seed(5)
    assert torch.equal(common.load_data(dataset).val.images, data.val.images)


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: content[::-1]])
def test_damaged_data_is_refused_in_one_line(damage, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "data")
    path = tmp_path / "data" / NAME / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:8] + damage(path.read_bytes()[8:]))
    assert str(path.parent) in failure(common.load_data, tmp_path / "data")


def test_a_folder_with_another_dataset_is_refused_and_left_alone(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DEBIAN", dataset / NAME / "raw")
    shutil.copytree(dataset / NAME, tmp_path / "Another")
    before = snapshot(tmp_path)
    message = failure(common.load_data, tmp_path)
    assert f"Another, not {NAME}" in message
    assert snapshot(tmp_path) == before


def test_data_of_the_debian_package_is_unpacked(dataset, data, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "DEBIAN", tmp_path / "package")
    common.DEBIAN.mkdir()
    for path in (dataset / NAME / "raw").iterdir():
        (common.DEBIAN / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
    unpacked = common.load_data(tmp_path / "data")
    assert torch.equal(unpacked.train.images, data.train.images)


def test_a_failed_download_ends_in_one_line(tmp_path, monkeypatch):
    def download(self):
        raise RuntimeError("Error downloading:\nno network")

    monkeypatch.setattr(common.DATASET, "download", download)
    assert "dataset-fashion-mnist" in failure(common.load_data, tmp_path)


# training -----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """Learns the mean pixel, and keeps what it was shown in training."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.tied = self.mean  # a second name of one tensor
        self.register_buffer("steps", torch.tensor(0))
        self.seen = []

    def loss(self, images, labels):
        if self.training:
            self.steps += 1
            self.seen.append((images.flatten(1)[:, 0], labels))
        return {"loss": (images.mean() - self.mean).square()}


def train(folder, data, model=None, resume=False, **changes):
    changes = {"epochs": 4, "batch_size": 3, "val_every": 1, "ema_decay": 0.0, **changes}
    config = replace(vae.Config(), **changes)
    return common.train_loop(model or Tiny(), data, config, folder, resume)


@pytest.fixture
def numbered():
    """Ten images with their number in each pixel and as label."""
    labels = torch.arange(10)
    split = common.Split(labels.float().view(10, 1, 1, 1).expand(10, 1, 28, 28), labels)
    return common.Data(split, split, split)


def test_an_epoch_takes_each_image_once_with_its_label_in_a_new_order(numbered, tmp_path):
    model = Tiny()
    train(tmp_path, numbered, model, epochs=2)
    sizes = [len(labels) for _, labels in model.seen]
    assert sorted(sizes) == [2, 2, 2, 2, 3, 3, 3, 3]
    orders = [torch.cat([labels for _, labels in model.seen[i : i + 4]]) for i in (0, 4)]
    assert all(torch.equal(order.sort().values, torch.arange(10)) for order in orders)
    assert not torch.equal(*orders)
    assert all(torch.equal(pixels, labels.float()) for pixels, labels in model.seen)
    other = Tiny()
    train(tmp_path, numbered, other, epochs=1, seed=1)
    assert not torch.equal(torch.cat([labels for _, labels in other.seen]), orders[0])


def test_the_training_loss_is_the_mean_over_images(numbered, tmp_path):
    model = Tiny()
    (row,) = train(tmp_path, numbered, model, epochs=1, lr=0.0)
    squares = [len(pixels) * pixels.mean().item() ** 2 for pixels, _ in model.seen]
    assert row["train_loss"] == pytest.approx(sum(squares) / 10)


def test_training_is_adamw_at_the_rates_of_the_schedule_and_its_average_is_kept(data, tmp_path):
    torch.manual_seed(0)
    model = conv_ae.Autoencoder(conv_ae.Config())
    by_hand = copy.deepcopy(model).train()
    changes = {
        "epochs": 2,
        "lr": 0.01,
        "weight_decay": 0.5,
        "patience": 0,
        "ema_decay": 0.2,
        "beta2": 0.5,
    }
    few = common.Split(data.train.images[:40], data.train.labels[:40])
    train(tmp_path, data._replace(train=few), model, batch_size=20, **changes)

    average = {name: value.clone() for name, value in by_hand.state_dict().items()}
    optimizer = torch.optim.AdamW(
        by_hand.parameters(), betas=(0.9, 0.5), weight_decay=0.5, fused=True
    )
    rise, step = 4 / 20, 0  # of 4 steps
    for epoch in (1, 2):
        torch.manual_seed(epoch)
        for batch in torch.randperm(40).split(20):
            step += 1
            optimizer.param_groups[0]["lr"] = 0.01 * min(step / rise, 1, (5 - step) / (4 - rise))
            optimizer.zero_grad()
            by_hand.loss(few.images[batch], None)["loss"].backward()
            optimizer.step()
            decay = min(0.2, (1 + step) / (10 + step))
            for name, value in by_hand.state_dict().items():
                if value.is_floating_point():
                    average[name] = average[name] + (1 - decay) * (value - average[name])
                else:
                    average[name] = value
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name])


def test_the_average_takes_a_tied_tensor_once_and_copies_a_counter():
    model, ema = Tiny(), Tiny()
    model.mean.data.fill_(1)
    model.steps.fill_(7)
    common.update_ema(ema, model, decay=0.9, step=1000)
    assert ema.mean.item() == pytest.approx(0.1)
    assert ema.steps == 7


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 1000])
def test_the_rate_rises_in_a_twentieth_of_the_steps_and_falls_to_nearly_zero(steps):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = common.make_schedule(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert all(0 < rate <= 2 for rate in rates)
    assert max(rates) == pytest.approx(2, rel=0.06)
    top = rates.index(max(rates))
    assert rates == sorted(rates[:top]) + sorted(rates[top:], reverse=True)
    if steps == 1000:
        assert top == 49
        assert rates[24] == pytest.approx(1) and rates[524] == pytest.approx(1, rel=0.01)
        assert rates[-1] < 0.01


def history_of(losses):
    rows = enumerate(losses, 1)
    return [{"epoch": epoch, "val": {"loss": loss} if loss else {}} for epoch, loss in rows]


@pytest.mark.parametrize(
    "losses, stops",
    [
        ([5, 4, 3, 2], False),
        ([5, 4, 4, 4], True),
        ([5, 4, 3.95, 3.92], True),  # less than min_delta is no progress
        ([5, 4, 3.95, 3.8], False),
        ([5, None, 5, None], False),  # judged only where it validated
        ([5, None, 5], True),
        ([], False),
    ],
)
def test_training_stops_after_patience_epochs_without_progress(losses, stops):
    config = vae.Config(patience=2, min_delta=0.1)
    assert common.stops_early(history_of(losses), config) == stops
    assert not common.stops_early(history_of(losses), replace(config, patience=0))


@pytest.mark.parametrize("patience, kept", [(2, 1), (0, 4)])
def test_the_best_weights_are_kept_and_without_early_stopping_the_last(
    patience, kept, numbered, tmp_path, monkeypatch
):
    losses, states = iter([1.0, 2.0, 1.5, 3.0]), []

    def validate(model, split):
        states.append(model.mean.item())
        return {"loss": next(losses)}

    monkeypatch.setattr(common, "test_loop", validate)
    model = Tiny()
    history = train(tmp_path, numbered, model, patience=patience)
    assert len(history) == (3 if patience else 4)
    assert model.mean.item() == states[kept - 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_stops_early(script, again, tmp_path, no_report):
    flags = ["--seeds", "1", "--epochs", "9", "--val-every", "1", "--patience", "2"]
    flags += {vae: [], conv_ae: ["--latents", "3"], classifier: ["--strategies", "scratch"]}[script]
    script.main([*again, *STUDIES[script], *flags, "--min-delta", "9999"])
    epochs = [read_json(path)["epochs_run"] for path in tmp_path.rglob("*seed0/metrics.json")]
    assert 3 in epochs


def test_the_test_loop_is_the_mean_over_images_with_the_same_noise(data):
    model = random_vae()
    whole = common.test_loop(model, data.test, batch_size=100)
    parts = common.test_loop(model, data.test, batch_size=7)
    assert parts["kl"] == pytest.approx(whole["kl"], rel=1e-5)
    assert parts == common.test_loop(model, data.test, batch_size=7)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_loss_that_is_not_finite_ends_in_one_line_and_leaves_earlier_results(
    script, again, tmp_path, monkeypatch
):
    before = snapshot(tmp_path / "out")
    model_class = {vae: vae.VAE, conv_ae: conv_ae.Autoencoder, classifier: classifier.Classifier}
    genuine = model_class[script].loss
    monkeypatch.setattr(
        model_class[script],
        "loss",
        lambda *args: {name: value * torch.nan for name, value in genuine(*args).items()},
    )
    message = failure(script.main, [*again, *STUDIES[script]])
    assert "--lr" in message
    assert snapshot(tmp_path / "out") == before


# runs on disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_writes_what_the_readme_says(script, studies):
    folder = next((studies / script.__name__).glob("*seed1"))
    metrics = read_json(folder / "metrics.json")
    names = {
        vae: {"loss", "recon", "kl", "active_dimensions", "knn_accuracy"},
        conv_ae: {"mse", "l1", "knn_accuracy"},
        classifier: {"loss", "accuracy"},
    }
    assert set(metrics["test"]) == names[script]
    assert set(metrics["environment"]) == {"torch", "device", "threads"}
    assert metrics["config"]["seed"] == 1
    assert metrics["epochs_run"] == metrics["best_epoch"] == 2
    with open(folder / "losses.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[1]["val_loss"]) == pytest.approx(metrics["validation"][-1]["loss"], abs=1e-6)
    assert (rows[0]["val_loss"] != "") == (script is classifier)  # the others validate less often
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert saved["config"] == metrics["config"]
    assert same(saved["model"], script.load(folder).state_dict())
    assert not (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_metrics_are_those_of_the_saved_weights_on_their_split(script, studies, data):
    for folder in (studies / script.__name__).glob("*seed*"):
        model, metrics = script.load(folder), read_json(folder / "metrics.json")
        names = {"mse": "loss"} if script is conv_ae else {}
        for split, recorded in (
            (data.test, metrics["test"]),
            (data.val, metrics["validation"][-1]),
        ):
            torch.manual_seed(0)
            losses = model.loss(*split)
            for name in set(recorded) - {"epoch", "knn_accuracy", "active_dimensions"}:
                expected = losses[names.get(name, name)].item()
                assert recorded[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_study_writes_a_summary_a_report_and_all_its_figures(script, studies):
    folder = studies / script.__name__
    metrics = read_json(folder / "metrics.json")
    report = (folder / "README.md").read_text()
    for row in metrics["summary"]:
        own = [name for name in ("latent", "strategy") if name in row]
        runs = [run for run in metrics["runs"] if all(run[name] == row[name] for name in own)]
        for name in runs[0]["test"]:
            values = [run["test"][name] for run in runs]
            assert row["n"] == len(values) == 2
            assert row[f"{name}_mean"] == pytest.approx(statistics.mean(values))
            assert row[f"{name}_std"] == pytest.approx(statistics.stdev(values))
    assert metrics["config"]["epochs"] == 2 and "seed" not in metrics["config"]
    assert " ± " in report and "--epochs 2" in report
    assert len(list(folder.glob("*.png"))) == report.count(".png)")
    for path in [*folder.glob("*.png"), *folder.glob("*.gif")]:
        assert f"({path.name})" in report
        with Image.open(path) as picture:
            picture.verify()


def test_a_study_says_that_it_replaces_another(again, capsys, no_report):
    vae.main([*again, *STUDIES[vae], "--seeds", "1"])
    assert "git checkout" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    script, again, studies, tmp_path, monkeypatch, no_report
):
    """Ctrl-C in the second epoch of the second run."""
    shutil.rmtree(tmp_path / "out" / script.__name__)
    few = {vae: [], conv_ae: ["--latents", "32"], classifier: ["--strategies", "finetune"]}
    command = [*again, *STUDIES[script], *few[script]]
    calls = itertools.count(1)

    def print_epoch(name, history, config):
        if next(calls) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(common, "print_epoch", print_epoch)
        with pytest.raises(KeyboardInterrupt):
            script.main(command)
    assert len(list(tmp_path.glob(f"out/{script.__name__}/*/checkpoint.pt"))) == 1
    script.main([*command, "--resume"])
    resumed = list((tmp_path / "out" / script.__name__).glob("*seed*"))
    assert len(resumed) == 2
    for folder, name in itertools.product(resumed, ("losses.csv", "model.pt")):
        uninterrupted = studies / script.__name__ / folder.name / name
        assert (folder / name).read_bytes() == uninterrupted.read_bytes()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_complete_run_is_kept_and_one_of_another_config_refused_by_name(
    script, again, tmp_path, no_report
):
    before = snapshot(tmp_path / "out")
    script.main([*again, *STUDIES[script], "--resume"])
    for mode in ("--resume", "--eval"):
        message = failure(script.main, [*again, *STUDIES[script], mode, "--lr", "0.5"])
        assert "lr" in message and "0.5" in message
    assert snapshot(tmp_path / "out") == before


def test_a_checkpoint_of_another_config_is_refused_by_name(numbered, tmp_path):
    train(tmp_path, numbered)
    message = failure(train, tmp_path, numbered, resume=True, weight_decay=9.0)
    assert "weight_decay" in message and "9.0" in message


def test_a_new_hyperparameter_leaves_earlier_runs_usable(again, monkeypatch, capsys, no_report):
    own = [("momentum", float, common.option(0.5, "a new one"))]
    longer = make_dataclass("Config", own, bases=(vae.Config,), frozen=True)
    monkeypatch.setattr(vae, "Config", longer)
    vae.main([*again, *STUDIES[vae], "--eval"])
    assert "confirmed" in capsys.readouterr().out
    vae.main([*again, *STUDIES[vae], "--resume"])
    assert "all runs are complete" in capsys.readouterr().out  # the summary
    assert "momentum" in failure(vae.main, [*again, *STUDIES[vae], "--eval", "--momentum", "0.7"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_confirms_the_saved_weights_and_writes_nothing(script, again, tmp_path, capsys):
    before = snapshot(tmp_path / "out")
    script.main([*again, *STUDIES[script], "--eval"])
    folders = list((tmp_path / "out" / script.__name__).glob("*seed*"))
    assert capsys.readouterr().out.count("confirmed") == len(folders)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_refuses_other_metrics_and_other_damaged_or_no_weights(script, again, tmp_path):
    folders = sorted((tmp_path / "out" / script.__name__).glob("*seed*"))
    command = [*again, *STUDIES[script], "--eval"]
    path = folders[0] / "metrics.json"
    metrics = read_json(path)
    others = {name: value * 1.01 + 0.001 for name, value in metrics["test"].items()}
    for name, other in [*others.items(), (next(iter(others)), float("nan"))]:
        changed = {**metrics["test"], name: other}
        path.write_text(json.dumps({**metrics, "test": changed}))
        assert name in failure(script.main, command)
    path.write_text(json.dumps(metrics))

    weights_path = folders[0] / "model.pt"
    saved = torch.load(weights_path, weights_only=True)
    saved["model"].popitem()
    torch.save(saved, weights_path)
    assert str(weights_path) in failure(script.main, command)
    weights_path.write_bytes(weights_path.read_bytes()[:1000])
    assert str(weights_path) in failure(script.main, command)
    shutil.rmtree(tmp_path / "out" / script.__name__)
    assert "--out" in failure(script.main, command)


def test_eval_confirms_a_metric_that_was_not_a_number(again, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "out/vae/seed0"
    metrics = read_json(folder / "metrics.json")
    (folder / "metrics.json").write_text(json.dumps({**metrics, "test": {"loss": float("nan")}}))
    monkeypatch.setattr(vae, "evaluate", lambda model, data: {"test": {"loss": float("nan")}})
    vae.main([*again, *STUDIES[vae], "--seeds", "1", "--eval"])
    assert "confirmed" in capsys.readouterr().out


def test_the_seed_alone_decides_a_run(again, here, studies, tmp_path, no_report):
    alone = ["--out", str(tmp_path / "alone"), "--seeds", "1", "--seed", "1"]
    vae.main([*here, *STUDIES[vae], *alone])
    trained = weights(tmp_path / "alone/vae/seed1")
    assert same(trained, weights(studies / "vae/seed1"))
    assert not same(trained, weights(studies / "vae/seed0"))


def test_processes_share_a_study_and_the_last_one_sums_up(here, studies, monkeypatch, no_report):
    summaries = []
    monkeypatch.setattr(common, "WORLD_SIZE", 2)
    monkeypatch.setattr(common, "save_study", lambda *args: summaries.append(args[3]))
    for rank in (0, 1):
        assert not summaries
        monkeypatch.setattr(common, "RANK", rank)
        vae.main([*here, *STUDIES[vae]])
    (row,), (single,) = summaries[0], read_json(studies / "vae/metrics.json")["summary"]
    assert row == single


def test_a_run_of_another_config_is_no_part_of_a_summary(studies):
    folder = studies / "vae" / "seed0"
    config = vae.Config(**read_json(folder / "metrics.json")["config"])
    assert len(common.read_runs({folder: config})) == 1
    assert common.read_runs({folder: replace(config, lr=0.5)}) is None


def test_a_file_is_complete_or_absent(tmp_path, monkeypatch):
    common.save(tmp_path / "file.json", {"first": 1})
    monkeypatch.setattr(common.os, "replace", lambda *paths: 1 / 0)  # the machine stops here
    with pytest.raises(ZeroDivisionError):
        common.save(tmp_path / "file.json", {"second": 2})
    assert read_json(tmp_path / "file.json") == {"first": 1}


def test_an_out_that_cannot_be_written_ends_in_one_line(here, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert str(tmp_path / "out") in failure(vae.main, [*here, *STUDIES[vae]])


def test_a_notebook_keeps_its_settings_of_matplotlib(studies):
    assert "matplotlib.pyplot" not in sys.modules  # which would choose a backend
    assert dict(matplotlib.rcParams.copy()) == dict(matplotlib.rcParamsDefault.copy())


@pytest.mark.parametrize(
    "mean, std, text",
    [
        (0.074483, 0.000071, "0.07448 ± 0.00007"),
        (12.9634, 0.291, "12.96 ± 0.29"),
        (-0.00051, 0.0006, "-0.00051 ± 0.00060"),
        (float("nan"), float("nan"), "nan ± nan"),
        (0.0461, None, "0.04610"),
        (7, None, "7"),
        ("4 of 5", None, "4 of 5"),
    ],
)
def test_a_table_shows_a_number_and_its_deviation_to_the_same_place(mean, std, text):
    rows = [{"seed": 3, "x_mean": mean, "x_std": std}] * 2
    table = common.format_table(rows, ["seed", "x"]).splitlines()
    assert [cell.strip() for cell in table[0].split("|")] == ["", "seed", "x", ""]
    assert table[3].split("|")[2].strip() == text


# baselines ----------------------------------------------------------------------------------------


def test_pca_is_that_of_a_singular_value_decomposition(data):
    train, test = (split.images.flatten(1).double() for split in (data.train, data.test))
    mean = train.mean(0)
    basis = torch.linalg.svd(train - mean, full_matrices=False).Vh[:5]
    reconstruction = (test - mean) @ basis.T @ basis + mean
    metrics = common.pca_baseline(data, 5)
    assert metrics["pca_mse"] == pytest.approx((reconstruction - test).square().mean().item())
    assert metrics["pca_l1"] == pytest.approx((reconstruction - test).abs().mean().item())


def test_nearest_neighbours_vote(data):
    def encode(images):
        return images.flatten(1)[:, 100:110]

    correct = 0
    for vector, label in zip(encode(data.test.images), data.test.labels.tolist()):
        nearest = (encode(data.train.images) - vector).square().sum(1).argsort()[:10]
        votes = data.train.labels[nearest].bincount(minlength=10)
        correct += votes.argmax().item() == label
    assert 0 < correct < TEST
    assert common.knn_accuracy(data, encode) == correct / TEST


# vae ----------------------------------------------------------------------------------------------


def random_vae(**changes):
    """A VAE whose output depends on z from the start."""
    model = vae.VAE(vae.Config(**changes))
    nn.init.normal_(model.decoder[-3].weight, std=0.1)
    return model


def test_the_vae_is_the_given_network():
    model = vae.VAE(vae.Config())
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    encoder = [(128, 784), (64, 128), (8, 64), (8, 64)]
    assert sorted(shapes) == sorted([*encoder, (64, 8), (128, 64), (784, 128)])
    images = model(torch.rand(3, 1, 28, 28))[0]
    assert images.shape == (3, 1, 28, 28)
    torch.testing.assert_close(images, torch.full_like(images, 0.1192), atol=1e-4, rtol=0)  # grey


def test_the_loss_is_l1_plus_alpha_times_the_kl_summed_over_dimensions(data):
    model = random_vae(alpha=0.5).eval()
    torch.manual_seed(1)
    losses = model.loss(*data.val)
    torch.manual_seed(1)
    decoded, mu, logvar = model(data.val.images)
    posterior = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0))
    recon = (decoded - data.val.images).abs().sum() / (VAL * 784)
    torch.testing.assert_close(losses["kl"], kl.sum() / VAL)
    torch.testing.assert_close(losses["recon"], recon)
    torch.testing.assert_close(losses["loss"], recon + 0.5 * kl.sum() / VAL)


def test_the_weight_of_the_kl_rises_in_training_alone(data):
    model = random_vae(alpha=0.5, kl_warmup=4)
    shares = []
    for _ in range(6):
        losses = model.train().loss(*data.val)
        shares.append(((losses["loss"] - losses["recon"]) / losses["kl"] / 0.5).item())
        losses = model.eval().loss(*data.val)
        torch.testing.assert_close(losses["loss"], losses["recon"] + 0.5 * losses["kl"])
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1], abs=1e-3)
    losses = random_vae(alpha=0.5, kl_warmup=0).loss(*data.val)
    torch.testing.assert_close(losses["loss"], losses["recon"] + 0.5 * losses["kl"])


def test_latent_samples_have_the_moments_of_the_posterior_and_pass_gradients():
    mu = torch.tensor([1.0, -2.0]).requires_grad_()
    logvar = torch.tensor([0.0, -3.0]).requires_grad_()
    torch.manual_seed(0)
    z = vae.VAE(vae.Config()).reparameterize(mu.expand(20_000, 2), logvar.expand(20_000, 2))
    torch.testing.assert_close(z.mean(0), mu, atol=0.03, rtol=0)
    torch.testing.assert_close(z.var(0), logvar.exp(), atol=0.03, rtol=0)
    z.sum().backward()
    assert mu.grad.abs().min() > 0 and logvar.grad.abs().max() > 0


def test_dimensions_in_use_and_neighbours_are_those_of_mu(data):
    model = random_vae(latent=3)
    model.mu.weight.data[1] = 0  # a dimension that tells nothing
    model.logvar.bias.data.fill_(9)  # samples tell nothing, either
    test = vae.evaluate(model, data)["test"]
    assert test["active_dimensions"] == 2
    with torch.no_grad():
        train_mu, mu = model.encode(data.train.images)[0], model.encode(data.test.images)[0]
    nearest = torch.cdist(mu, train_mu).argsort(dim=1)[:, :10]
    predicted = [data.train.labels[row].bincount().argmax() for row in nearest]
    accuracy = (torch.stack(predicted) == data.test.labels).float().mean().item()
    assert test["knn_accuracy"] == pytest.approx(accuracy)


def test_a_vae_with_one_latent_dimension_ends_with_its_figures(here, tmp_path):
    vae.main([*here, "--epochs", "1", "--latent", "1"])
    assert (tmp_path / "out/vae/README.md").exists()


def test_the_explorer_page_decodes_like_the_model_in_a_browser(studies, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    z = torch.linspace(-1, 1, 4)
    probe = f"""<script>
      document.title = JSON.stringify({{
        pixels: decode({z.tolist()}),
        sliders: [...document.querySelectorAll("input[type=range]")].map((slider) => slider.id),
        canvases: ["image", "map"].map((id) => document.querySelector(`canvas#${{id}}`).width),
      }});
    </script></body>"""
    page = (studies / "vae/explorer.html").read_text().replace("</body>", probe)
    (tmp_path / "page.html").write_text(page)
    command = [chromium, "--headless", "--no-sandbox", "--dump-dom", tmp_path / "page.html"]
    html = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    found = json.loads(html.partition("<title>")[2].partition("</title>")[0])
    decoded = vae.load(studies / "vae/seed0").decode(z[None]).flatten()
    torch.testing.assert_close(torch.tensor(found["pixels"]), decoded, atol=1e-3, rtol=0)
    assert sorted(found["sliders"]) == [f"z{i}" for i in range(4)]
    assert found["canvases"][0] == 28 and found["canvases"][1] > 28


def test_a_decoder_that_the_page_cannot_compute_gives_no_page(
    again, tmp_path, monkeypatch, capsys, no_report
):
    class Other(vae.VAE):
        def __init__(self, config):
            super().__init__(config)
            self.decoder[1] = nn.GELU()

    monkeypatch.setattr(vae, "VAE", Other)
    vae.main([*again, *STUDIES[vae], "--seeds", "1"])
    path = tmp_path / "out/vae/explorer.html"
    assert f"no {path}" in capsys.readouterr().out and not path.exists()


# conv_ae ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent", [1, 7, 128])
def test_the_autoencoder_takes_any_latent_size_and_shares_its_encoder(latent):
    model = conv_ae.Autoencoder(conv_ae.Config(latent=latent))
    images = torch.rand(4, 1, 28, 28)
    assert model.encode(images).shape == (4, latent)
    assert model(images).shape == images.shape
    encoder = classifier.Classifier(classifier.Config()).encoder
    assert type(encoder) is type(model.encoder) is conv_ae.Encoder


def test_the_autoencoders_losses_are_means_over_pixels_and_images(data):
    model = conv_ae.Autoencoder(conv_ae.Config()).eval()
    difference = (model(data.val.images) - data.val.images).flatten()
    losses = model.loss(*data.val)
    torch.testing.assert_close(losses["loss"], difference.dot(difference) / (VAL * 784))
    torch.testing.assert_close(losses["l1"], difference.abs().sum() / (VAL * 784))


# classifier ---------------------------------------------------------------------------------------


def test_label_subsets_are_balanced_nested_and_of_their_seed(data):
    labels = data.train.labels
    small, large = (classifier.label_subset(labels, count, seed=0) for count in (20, 150))
    assert labels[small].bincount().tolist() == [2] * 10
    assert large[:20].tolist() == small.tolist()
    whole = classifier.label_subset(labels, TRAIN, seed=0)
    assert whole.sort().values.tolist() == list(range(TRAIN))
    assert classifier.label_subset(labels, 20, seed=1).tolist() != small.tolist()


def test_few_labelled_images_are_repeated_until_an_epoch_has_enough(data):
    config = classifier.Config(labels=20, epoch_images=50)
    split = classifier.labelled(data.train, config)
    assert len(split.labels) == 60
    images = split.images.flatten(1).unique(dim=0)
    assert len(images) == 20
    others = classifier.labelled(data.train, replace(config, seed=1)).images.flatten(1)
    assert not torch.equal(others.unique(dim=0), images)


def test_finetune_and_frozen_start_at_the_encoder_of_their_seed_and_frozen_stays(
    again, studies, monkeypatch
):
    started = {}

    def run(model, data, config, args, folder, evaluate):
        state = model.encoder.state_dict()
        started[config.strategy, config.seed] = {name: state[name].clone() for name in state}

    monkeypatch.setattr(common, "run", run)
    monkeypatch.setattr(common, "read_runs", lambda runs: None)
    classifier.main([*again, "--labels", "20", "--seeds", "2"])
    for seed in (0, 1):
        trained = conv_ae.load(studies / f"conv_ae/latent032-seed{seed}").encoder.state_dict()
        assert same(started["finetune", seed], trained)
        assert same(started["frozen", seed], trained)
        assert not same(started["scratch", seed], trained)
        for strategy in ("finetune", "frozen"):
            model = classifier.load(studies / f"classifier/{strategy}-labels200-seed{seed}")
            assert same(model.encoder.state_dict(), trained) == (strategy == "frozen")

    folder = str(studies / "conv_ae/latent003-seed1")  # a single autoencoder
    classifier.main([*again, "--labels", "20", "--encoder", folder])
    assert same(started["frozen", 0], conv_ae.load(folder).encoder.state_dict())


def test_a_missing_encoder_is_named_before_anything_is_trained(here, tmp_path):
    message = failure(classifier.main, here)
    assert "latent032-seed0" in message and "conv_ae.py" in message and "--encoder" in message
    assert not (tmp_path / "out").exists()


def test_foreign_weights_are_refused_in_one_line(again, studies, tmp_path):
    message = failure(classifier.main, [*again, "--encoder", str(studies / "vae/seed0")])
    assert "vae/seed0" in message
    torch.save({"weight": torch.zeros(1)}, tmp_path / "model.pt")
    assert "model.pt" in failure(classifier.main, [*again, "--encoder", str(tmp_path)])


def test_label_smoothing_dropout_and_augmentation_act_in_training_alone(data):
    model = classifier.Classifier(classifier.Config(label_smoothing=0.2, dropout=0.5))
    losses = model.eval().loss(*data.val)
    logits = model(data.val.images)
    torch.testing.assert_close(losses["loss"], F.cross_entropy(logits, data.val.labels))
    accuracy = (logits.argmax(1) == data.val.labels).sum() / VAL
    torch.testing.assert_close(losses["accuracy"], accuracy)
    torch.manual_seed(3)
    loss = model.train().loss(*data.val)["loss"]
    torch.manual_seed(3)
    log_probabilities = model(classifier.augment(data.val.images)).log_softmax(1)
    target = 0.8 * F.one_hot(data.val.labels, 10) + 0.02
    torch.testing.assert_close(loss, -(target * log_probabilities).sum(1).mean())


def test_augmentation_flips_erases_and_shifts_half_of_the_time():
    torch.manual_seed(0)
    image = torch.arange(784.0).view(1, 1, 28, 28) / 1000 + 1  # erased pixels are below 1
    count, shifted, flipped, erased = 400, 0, 0, 0
    for _ in range(20):
        batch = classifier.augment(image.expand(count, 1, 28, 28))
        noise = (batch < 1) & (batch > 0)
        rows, columns = noise.any(3).squeeze(1), noise.any(2).squeeze(1)
        assert rows.sum(1).max() <= 14 and columns.sum(1).max() <= 14
        sizes = rows.sum(1) * columns.sum(1)
        assert torch.equal(noise.sum((1, 2, 3)), sizes)  # a rectangle
        erased += (sizes > 0).sum().item()
        flipped += (batch[:, 0, 14, 20] < batch[:, 0, 14, 7])[sizes == 0].float().mean().item()
        kept = batch[sizes == 0]
        plain = [torch.equal(i, image[0]) or torch.equal(i, image[0].flip(2)) for i in kept[:5]]
        shifted += not all(plain)
    assert erased / (20 * count) == pytest.approx(0.5, abs=0.03)
    assert flipped / 20 == pytest.approx(0.5, abs=0.03)
    assert 4 <= shifted <= 16  # half, but for the shift by nothing


def test_confusions_are_those_of_the_test_set(studies):
    for folder in (studies / "classifier").glob("*seed*"):
        metrics = read_json(folder / "metrics.json")
        confusion = torch.tensor(metrics["confusion"])
        assert confusion.sum(1).tolist() == [TEST // 10] * 10
        assert confusion.trace().item() / TEST == pytest.approx(metrics["test"]["accuracy"])


def test_differences_to_scratch_are_paired_by_seed_with_their_wins():
    accuracies = {
        "scratch": [0.5, 0.6, 0.7],
        "finetune": [0.6, 0.7, 0.6],
        "frozen": [0.1, 0.2, 0.3],
    }
    runs = []
    for (strategy, values), seed in itertools.product(accuracies.items(), range(3)):
        config = {"labels": 100, "strategy": strategy, "seed": seed}
        test = {"accuracy": values[seed]}
        validation = [{"epoch": 1, "accuracy": values[seed] / 2}, {"epoch": 2, "accuracy": 0.9}]
        runs.append({"config": config, "test": test, "validation": validation})
    scratch, finetune, frozen = classifier.summarize(runs)
    assert finetune["gain_mean"] == pytest.approx(0.1 / 3)
    assert finetune["gain_std"] == pytest.approx(statistics.stdev([0.1, 0.1, -0.1]))
    assert finetune["early_gain_mean"] == pytest.approx(0.1 / 6)
    assert (finetune["wins"], frozen["wins"]) == ("2 of 3", "0 of 3")
    assert scratch["gain_mean"] is None


# the README's exercises ---------------------------------------------------------------------------


def readme_code(part):
    """The README's block of Python that has `part` in it."""
    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall("```python\n(.*?)```", text, re.S) if part in block]
    return code


def test_the_exercise_with_an_mlp_trains_one(here, monkeypatch, no_report, tmp_path):
    monkeypatch.setattr(conv_ae, "Encoder", conv_ae.Encoder)  # brings it back
    exec(readme_code("class Encoder"), vars(conv_ae))
    classifier.main([*here, *STUDIES[classifier], "--strategies", "scratch"])
    names = weights(tmp_path / "out/classifier/scratch-labels200-seed0")
    assert names["encoder.1.weight"].shape == (conv_ae.FEATURES, 784)


def test_the_exercise_with_a_study_of_alpha_prints_its_table(here, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alphas.py", *here, *STUDIES[vae]])
    exec(readme_code("alphas"), {})
    *_, none, some, much = capsys.readouterr().out.splitlines()
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in (none, some, much)]
    assert [alpha for alpha, *_ in rows] == [0, 0.001, 0.01]
    assert rows[0][2] > rows[2][2]  # kl
