"""Does a classifier gain from starting at the autoencoder's encoder: frozen, fine-tuned, or from
scratch?

    python conv_ae.py --seeds 5       # the encoders, pre-trained without labels
    python classifier.py --seeds 5
"""

import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common
import conv_ae
from common import CLASSES, COLORS, option

STRATEGIES = {"scratch": COLORS[0], "finetune": COLORS[2], "frozen": COLORS[1]}


@dataclass(frozen=True)
class Config:
    epochs: int = option(10, "epochs at most", low=1)
    batch_size: int = option(128, "images in a training step", low=1)
    lr: float = option(4e-3, "highest learning rate")
    weight_decay: float = option(0.05, "weight decay of AdamW")
    beta2: float = option(0.99, "beta2 of AdamW")
    ema_decay: float = option(0.998, "decay of the moving average of the weights")
    val_every: int = option(2, "epochs from one validation to the next", low=1)
    patience: int = option(0, "stop after so many epochs without progress; 0: never")
    min_delta: float = option(1e-3, "progress: validation loss lower by at least this much")
    seed: int = option(0, "seed of weights, labelled images and batches")
    latent: int = option(32, "latent dimensions of the autoencoder to start from", low=1)
    label_smoothing: float = option(0.05, "label smoothing in training")
    dropout: float = option(0.3, "dropout before the last layer")
    epoch_images: int = option(5000, "images in an epoch at least: fewer are repeated", low=1)
    strategy: str = "scratch"  # one of --strategies
    labels: int = 50_000  # one of --labels


# model and loss -----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to logits (B, 10). The head takes the encoder's features, not
    the latent vector made of them: with that, a frozen encoder validated worse."""

    def __init__(self, config):
        super().__init__()
        self.label_smoothing = config.label_smoothing
        self.frozen = config.strategy == "frozen"
        self.encoder = conv_ae.Encoder().requires_grad_(not self.frozen)
        self.head = nn.Sequential(
            nn.Linear(conv_ae.FEATURES, 128),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(128, 10),
        )

    def train(self, mode=True):
        """A frozen encoder stays in evaluation mode: its batch norms keep their statistics."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, images):
        return self.head(self.encoder(images))

    def loss(self, images, labels):
        """Cross-entropy in nats, in training with augmentation and label smoothing (Szegedy et
        al., 2016), and accuracy."""
        smoothing = 0.0
        if self.training:
            images = augment(images)
            smoothing = self.label_smoothing
        logits = self(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        correct = logits.argmax(1) == labels
        return {"loss": loss, "accuracy": correct.float().mean()}


def augment(images):
    """Each with probability 1/2: flips an image; fills a rectangle of it, of up to half the sides,
    with noise (random erasing, Zhong et al., 2020, arXiv:1708.04896); shifts the whole batch by up
    to a pixel each way."""
    count, device = len(images), images.device
    flip = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(flip, images.flip(3), images)

    if torch.rand(()) < 0.5:
        down, right = torch.randint(3, (2,)).tolist()
        padded = F.pad(images, (1, 1, 1, 1))
        images = padded[:, :, down : down + 28, right : right + 28]

    # The height and width of the rectangles, and where they start.
    size = torch.randint(1, 15, (count, 2, 1), device=device)
    start = (torch.rand(count, 2, 1, device=device) * (29 - size)).long()
    pixel = torch.arange(28, device=device)
    inside = (start <= pixel) & (pixel < start + size)  # (B, 2, 28)
    rows, columns = inside[:, 0], inside[:, 1]
    erase = rows[:, None, :, None] & columns[:, None, None, :]
    erase &= torch.rand(count, 1, 1, 1, device=device) < 0.5
    return torch.where(erase, torch.rand_like(images), images)


def load(folder):
    """The trained classifier in a run's folder, ready to use."""
    return common.load(folder, Classifier, Config)


def load_encoder(args, seed):
    """The weights of the encoder of the autoencoder with this seed."""
    folder = args.encoder or args.out / "conv_ae"
    if not (folder / "model.pt").exists():  # not a run, so a study of runs
        folder = folder / f"latent{args.latent:03d}-seed{seed}"
    if not (folder / "model.pt").exists():
        advice = "train it with conv_ae.py, or give --encoder (results/conv_ae has one of seed 0)"
        sys.exit(f"there is no autoencoder in {folder}: {advice}")
    return conv_ae.load(folder).encoder.state_dict()


# data ---------------------------------------------------------------------------------------------


def label_subset(labels, count, seed):
    """Indices (count,) of images: one of each class in turn."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    shuffled = labels.cpu()[order]
    classes = [order[shuffled == label].tolist() for label in range(10)]
    chosen = []
    for one_of_each in itertools.zip_longest(*classes):
        chosen += [index for index in one_of_each if index is not None]
    return torch.tensor(chosen[:count], device=labels.device)


def labelled(split, config):
    """The training split cut to `config.labels` images. These are repeated until an epoch has at
    least `epoch_images`: few images alone would make few steps."""
    chosen = label_subset(split.labels, config.labels, config.seed)
    chosen = chosen.repeat(math.ceil(config.epoch_images / config.labels))
    return common.Split(split.images[chosen], split.labels[chosen])


# evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data):
    """Test loss and accuracy, and the confusions: a row for each true class."""
    test = common.test_loop(model, data.test)
    logits = [model(images) for images in data.test.images.split(250)]
    predicted = torch.cat(logits).argmax(1)
    counts = torch.bincount(10 * data.test.labels + predicted, minlength=100)
    return {"test": test, "confusion": counts.view(10, 10).tolist()}


def test_accuracy(run):
    return run["test"]["accuracy"]


def early_accuracy(run):
    """The first validation accuracy, that after --val-every epochs."""
    return run["validation"][0]["accuracy"]


def kept_val_accuracy(run):
    """The validation accuracy of the weights that are kept."""
    return {row["epoch"]: row["accuracy"] for row in run["validation"]}[run["best_epoch"]]


def differences(groups, labels, strategy, measure):
    """`measure` of the runs of a strategy minus that of scratch, one for each seed."""
    if strategy == "scratch":
        return []
    pairs = zip(groups[labels, strategy], groups[labels, "scratch"])  # both by seed
    return [measure(run) - measure(scratch) for run, scratch in pairs]


def summarize(runs):
    """A row for each label count and strategy: the metrics, and what they gain over scratch."""
    summary = common.summarize(runs, ["labels", "strategy"])
    groups = common.group(runs, ["labels", "strategy"])
    measures = {"": test_accuracy, "early_": early_accuracy}
    for row in summary:
        labels, strategy = row["labels"], row["strategy"]
        values = [early_accuracy(run) for run in groups[labels, strategy]]
        row |= common.mean_std("early_accuracy", values)
        for prefix, measure in measures.items():
            gains = differences(groups, labels, strategy, measure)
            row |= common.mean_std(f"{prefix}gain", gains)
            wins = sum(gain > 0 for gain in gains)
            row[f"{prefix}wins"] = f"{wins} of {len(gains)}" if gains else None
    return summary


# figures: the docstrings are their captions in the report ----------------------------------------


def plot_learning_curves(runs, counts):
    """A line for each run. The left end shows who learns faster, the right end who ends better."""
    figure, panels = common.new_figure(9, 6.5, rows=2, columns=math.ceil(len(counts) / 2))
    groups = common.group(runs, ["labels", "strategy"])
    for axes, labels in zip(panels.flat, counts):
        for strategy, color in STRATEGIES.items():
            label = strategy  # of the first line alone
            for run in groups[labels, strategy]:
                epochs = [row["epoch"] for row in run["validation"]]
                accuracy = [row["accuracy"] for row in run["validation"]]
                axes.plot(epochs, accuracy, ".-", color=color, linewidth=1, label=label)
                label = None
        axes.set(xlabel="epoch", ylabel="validation accuracy", title=f"{labels:,} labels")
    for axes in panels.flat[len(counts) :]:
        axes.remove()
    lines = panels.flat[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=3, frameon=False)
    return figure


def plot_differences(runs, counts, strategies):
    """What starting at the autoencoder's encoder gains or costs in the end. Dots are seeds, squares
    their mean, bars one standard deviation."""
    groups = common.group(runs, ["labels", "strategy"])
    figure, axes = common.new_figure(7, 4)
    axes.axhline(0, color="black", linewidth=1)
    for i, strategy in enumerate(strategies):
        color = STRATEGIES[strategy]
        axes.plot([], [], "s", color=color, label=f"{strategy} minus scratch")
        for j, labels in enumerate(counts):
            gains = differences(groups, labels, strategy, test_accuracy)
            bar = common.mean_std("gain", gains)
            x = j + 0.3 * (i - (len(strategies) - 1) / 2)
            axes.plot([x - 0.08] * len(gains), gains, ".", color=color)
            axes.errorbar(x, bar["gain_mean"], bar["gain_std"], fmt="s", color=color, capsize=3)
    axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
    axes.set(xlabel="labelled images", ylabel="difference in test accuracy")
    axes.legend(frameon=False)
    return figure


def plot_confusion(runs):
    """Test images, by the run with the most labels that validates best. Which classes are confused,
    and would you tell them apart at 28x28 pixels?"""
    most = max(run["config"]["labels"] for run in runs)
    candidates = [run for run in runs if run["config"]["labels"] == most]
    best = max(candidates, key=kept_val_accuracy)
    counts = torch.tensor(best["confusion"])
    figure, axes = common.new_figure(7, 6.4)
    # The root of the counts, so that rare confusions show.
    axes.imshow(counts.sqrt().numpy(), cmap="Blues")
    for row in range(10):
        for column in range(10):
            count = counts[row, column].item()
            color = "white" if count > counts.max() / 3 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set_xticks(range(10), CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), CLASSES)
    axes.set(xlabel="predicted class", ylabel="true class", title=best["folder"])
    return figure


COLUMNS = ["labels", "strategy", "early_accuracy", "early_gain", "early_wins"]
COLUMNS += ["accuracy", "gain", "wins"]
ABOUT = """
One convolutional classifier, trained in three ways: from scratch; from the encoder of an
autoencoder, which saw no label (finetune); and on top of that encoder, kept as it is (frozen).
`early accuracy` is that of the first validation, `accuracy` that of the test images at the end.
`gain` is the difference to scratch with the same seed: both see the same labelled images in the
same order. `wins` counts the seeds that gain.
"""


def main(argv=None):
    parser = common.make_parser(__doc__, Config)
    names = list(STRATEGIES)
    parser.add_argument(
        "--strategies",
        nargs="+",
        choices=names,
        default=names,
        help="what to do with the encoder's initial weights",
    )
    parser.add_argument(
        "--labels",
        type=common.at_least(10, int),
        nargs="+",
        default=[100, 1000, 10_000, 50_000],
        metavar="N",
        help="labelled training images, runs of each",
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="folder of an autoencoder or of a study of them (default: OUT/conv_ae)",
    )
    args = common.parse_args(parser, Config, argv)
    encoders = {}
    if set(args.strategies) != {"scratch"} and not args.eval:
        encoders = {seed: load_encoder(args, seed) for seed in args.seeds}

    data = common.load_data(args.data, args.device)
    count = len(data.train.labels)
    if max(args.labels) > count:
        sys.exit(f"--labels: there are {count:,} training images, no more")
    study = args.out / "classifier"
    runs = {}
    settings = itertools.product(args.labels, args.strategies, args.seeds)
    for labels, strategy, seed in settings:
        own = {"labels": labels, "strategy": strategy, "seed": seed}
        folder = study / f"{strategy}-labels{labels}-seed{seed}"
        runs[folder] = replace(args.config, **own)
    if args.eval:
        return common.confirm(runs, load, evaluate, data)
    for folder, config in common.share_out(runs):
        torch.manual_seed(config.seed)
        model = Classifier(config)
        if config.strategy != "scratch":
            model.encoder.load_state_dict(encoders[config.seed])
        model = model.to(args.device, memory_format=torch.channels_last)
        subset = data._replace(train=labelled(data.train, config))
        common.run(model, subset, config, args, folder, evaluate)

    metrics = common.read_runs(runs)
    if metrics is None:
        return
    figures = {
        "learning_curves.png": (plot_learning_curves, metrics, args.labels),
        "confusion_matrix.png": (plot_confusion, metrics),
    }
    pretrained = [strategy for strategy in args.strategies if strategy != "scratch"]
    if pretrained and "scratch" in args.strategies:
        figures["differences.png"] = (plot_differences, metrics, args.labels, pretrained)
    common.save_study(study, ABOUT, metrics, summarize(metrics), COLUMNS, figures, args)


if __name__ == "__main__":
    main()
