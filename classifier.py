"""Does a classifier gain from starting at the autoencoder's encoder: frozen, fine-tuned, or from
scratch?

    python conv_ae.py --latents 32 --seeds 5    # the encoders, pre-trained without labels
    python classifier.py --seeds 5              # 50,000 labels, fine-tuned: accuracy 0.939 (n=5)
"""

import hashlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from torch import nn
from torch.nn import functional as F

import common
import conv_ae

STYLE = {  # of the curves, by strategy
    "scratch": ("o-", common.COLORS[0]),
    "finetune": ("^-", common.COLORS[2]),
    "frozen": ("s--", common.COLORS[1]),
}
# The differences in the summary: of which accuracy, to which strategy.
COMPARED = [
    ("accuracy", "scratch"),
    ("one_view_accuracy", "scratch"),
    ("val_accuracy", "scratch"),
    ("first_val_accuracy", "scratch"),
    ("accuracy", "frozen"),
]


@dataclass(frozen=True)
class Config(common.Config):
    epochs: int = 16
    batch_size: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = common.option(0.05, "label smoothing in training", low=0, high=1)
    dropout: float = common.option(0.3, "dropout before the last layer", low=0, high=1)
    epoch_images: int = common.option(5000, "least images in an epoch: fewer are repeated", low=1)
    latent: int = common.option(32, "latent dimensions of the autoencoder", low=1, high=4096)
    strategy: str = None  # one of --strategies
    labels: int = None  # one of --labels
    encoder_hash: str = None  # of the weights that `frozen` and `finetune` start from


# model and loss -----------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to logits (B, 10). The head takes the encoder's features, not
    the latent vector made of them: with that, a frozen encoder validated worse."""

    bf16 = True  # see common.forward

    def __init__(self, config):
        super().__init__()
        self.encoder = conv_ae.Features()
        self.head = nn.Sequential(
            nn.Linear(128 * 5 * 5, 128),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(128, 10),
        )
        self.frozen = config.strategy == "frozen"
        self.encoder.requires_grad_(not self.frozen)
        self.label_smoothing = config.label_smoothing

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
            images = self.augment(images)
            smoothing = self.label_smoothing
        logits = common.forward(self, images)
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def augment(self, images):
        """Each with probability 1/2: flips an image; fills a rectangle of it, of up to half the
        sides, with noise (random erasing, Zhong et al., 2020, arXiv:1708.04896); shifts the whole
        batch by up to a pixel each way."""
        count, device = len(images), images.device
        flip = torch.rand(count, 1, 1, 1, device=device) < 0.5
        images = torch.where(flip, images.flip(3), images)
        if torch.rand(()) < 0.5:
            down, right = torch.randint(3, (2,)).tolist()
            images = F.pad(images, (1, 1, 1, 1))[:, :, down : down + 28, right : right + 28]
        size = torch.randint(1, 15, (count, 2, 1), device=device)
        start = (torch.rand(count, 2, 1, device=device) * (29 - size)).long()
        pixel = torch.arange(28, device=device)
        inside = (start <= pixel) & (pixel < start + size)  # (B, 2, 28): rows and columns
        box = inside[:, 0, None, :, None] & inside[:, 1, None, None, :]
        box &= torch.rand(count, 1, 1, 1, device=device) < 0.5
        return torch.where(box, torch.rand_like(images), images)


def load(folder):
    """The trained classifier in a run's folder, in evaluation mode, without gradients."""
    path = Path(folder) / "model.pt"
    model = Classifier(Config(**common.read(path)["config"]))
    common.read(path, model=model)
    return model.eval().requires_grad_(False)


# data ---------------------------------------------------------------------------------------------


def label_subset(labels, count, seed):
    """Indices of `count` images, the same number of each class until one runs out. The indices of
    a smaller count are the first of a larger one's."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    # The rank of each image within its own class: 1 for the first of every class, then 2, ...
    rank = F.one_hot(shuffled).cumsum(0).gather(1, shuffled[:, None]).squeeze(1)
    return order[rank.argsort(stable=True)][:count].to(labels.device)


def labelled(split, config):
    """The training split cut to `config.labels` images. These are repeated until an epoch has at
    least `epoch_images`: few images alone would make few steps."""
    chosen = label_subset(split.labels, config.labels, config.seed)
    chosen = chosen.repeat(math.ceil(config.epoch_images / config.labels))
    return common.Split(split.images[chosen], split.labels[chosen])


def load_encoders(args):
    """The autoencoders' encoders {seed: encoder}, and hashes {seed: text} of the weights that a
    classifier takes from them."""
    encoders, hashes = {}, {}
    for seed in args.seeds:
        path = args.encoder or args.out / "conv_ae"
        if path.suffix != ".pt" and not path.is_file():
            path = path / f"latent{args.latent:03d}-seed{seed}" / "model.pt"
        if not path.exists():
            flags = f"--latents {args.latent} --seed {args.seed} --seeds {len(args.seeds)}"
            advice = f"run conv_ae.py {flags} --out DIR, then give --encoder DIR/conv_ae"
            sys.exit(f"there is no autoencoder {path} of seed {seed}: {advice}")
        autoencoder = conv_ae.Autoencoder(args.latent)
        common.read(path, model=autoencoder)
        encoders[seed] = autoencoder.encoder.features
        weights = encoders[seed].state_dict().values()
        text = b"".join(tensor.numpy().tobytes() for tensor in weights)
        hashes[seed] = hashlib.sha256(text).hexdigest()[:16]
    return encoders, hashes


# evaluation ---------------------------------------------------------------------------------------


def classify(model, images):
    """Logits (B, 10) of images (B, 1, 28, 28): the mean over six views of each, in place, a pixel
    up and left, a pixel down and right, and these mirrored. The two in place weigh twice as much,
    after the multi-crop evaluation of Jordan (2024, arXiv:2404.00498)."""
    padded = F.pad(images, (1, 1, 1, 1))
    logits = 0
    for start, weight in ((0, 1 / 8), (1, 1 / 4), (2, 1 / 8)):
        view = padded[:, :, start : start + 28, start : start + 28]
        both = conv_ae.predict(model, view) + conv_ae.predict(model, view.flip(3))
        logits += weight * both
    return logits


def evaluate(model, data):
    """The test metrics and the confusions by `classify`; the accuracy by one view of each image,
    as in validation, stands beside them."""
    logits, labels = classify(model, data.test.images), data.test.labels
    predicted = logits.argmax(1)
    test = {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": common.accuracy(predicted, labels),
        "one_view_accuracy": common.test_loop(model, data.test)["accuracy"],
    }
    return {"test": test, "confusion": common.confusion(predicted, labels)}


def accuracy_of(run, name):
    """A run's "accuracy" or "one_view_accuracy" in test, its "val_accuracy" in validation with the
    weights that are kept, or its "first_val_accuracy" in the first validation."""
    if name in run["test"]:
        return run["test"][name]
    val = {row["epoch"]: row["accuracy"] for row in run["validation"]}
    epochs = {"val_accuracy": run["best_epoch"], "first_val_accuracy": min(val)}
    return val[epochs[name]]


def differences(groups, labels, strategy, base, name):
    """`accuracy_of` runs of `strategy` minus that of `base`, one a seed. [] without such runs."""
    if strategy == base:
        return []
    pairs = zip(groups.get((labels, strategy), []), groups.get((labels, base), []))  # by seed
    return [accuracy_of(own, name) - accuracy_of(other, name) for own, other in pairs]


def summarize(runs):
    """A row per label count and strategy: the metrics over the seeds, and the differences to the
    other strategies, paired by seed."""
    summary = common.summarize(runs, ["labels", "strategy"])
    groups = common.group(runs, ["labels", "strategy"])
    for row in summary:
        setting = row["labels"], row["strategy"]
        for name in ("val_accuracy", "first_val_accuracy"):
            values = [accuracy_of(run, name) for run in groups[setting]]
            row |= common.mean_std_ci(name, values)
        for name, base in COMPARED:
            values = differences(groups, *setting, base, name)
            row |= common.mean_std_ci(f"{name}_minus_{base}", values)
    return summary


# figures ------------------------------------------------------------------------------------------


def plot_learning_curves(runs):
    """Validation accuracy by epoch, a panel per label count: mean and one std over seeds."""
    groups = common.group(runs, ["labels", "strategy"])
    counts = sorted({labels for labels, _ in groups})
    width = max(6, 3.6 * len(counts))
    figure, panels = plt.subplots(1, len(counts), figsize=(width, 4), squeeze=False)
    for labels, axes in zip(counts, panels[0]):
        for strategy in [name for name in STYLE if (labels, name) in groups]:
            line, color = STYLE[strategy]
            curves = [run["validation"] for run in groups[labels, strategy]]
            end = min(map(len, curves))  # with early stopping some are shorter
            accuracy = torch.tensor([[row["accuracy"] for row in curve[:end]] for curve in curves])
            mean = accuracy.mean(0)
            std = accuracy.std(0) if len(curves) > 1 else torch.zeros_like(mean)
            epochs = [row["epoch"] for row in curves[0][:end]]
            axes.plot(epochs, mean, line, color=color, markersize=4, label=strategy)
            axes.fill_between(epochs, mean - std, mean + std, color=color, alpha=0.15)
        axes.set(xlabel="epoch", title=f"{labels:,} labels")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("validation accuracy")
    panels[0][0].legend(loc="lower right", title="mean and std over seeds")
    return figure


def plot_differences(runs):
    """Test accuracy minus that of `scratch`: a dot a seed, beside the mean and its 95% interval."""
    groups = common.group(runs, ["labels", "strategy"])
    counts = sorted({labels for labels, _ in groups})
    strategies = sorted({strategy for _, strategy in groups} - {"scratch"})
    size = (4.5 * len(strategies), 4)
    figure, panels = plt.subplots(1, len(strategies), figsize=size, squeeze=False)
    for strategy, axes in zip(strategies, panels[0]):
        axes.axhline(0, color="black", linewidth=1)
        color = STYLE[strategy][1]
        for x, labels in enumerate(counts):
            values = differences(groups, labels, strategy, "scratch", "accuracy")
            bar = common.mean_std_ci("y", values)
            axes.errorbar(x, bar["y_mean"], bar["y_ci"], fmt="s", color=color, capsize=4)
            axes.plot([x - 0.15] * len(values), values, ".", color=color)
        axes.set_xticks(range(len(counts)), [f"{count:,}" for count in counts])
        axes.set(xlabel="labelled images", title=f"{strategy} minus scratch")
        axes.set_xlim(-0.5, len(counts) - 0.5)
    panels[0][0].set_ylabel("difference in test accuracy\n(dots: seeds; bars: mean, 95% interval)")
    return figure


def plot_confusion(runs, summary):
    """Test confusions in the first run of the strategy that validates best with the most labels."""
    best = max(summary, key=lambda row: (row["labels"], row["val_accuracy_mean"]))
    run = common.group(runs, ["labels", "strategy"])[best["labels"], best["strategy"]][0]
    figure, axes = plt.subplots(figsize=(9, 7.2))
    counts = torch.tensor(run["confusion"])
    # The colours follow the root of the count, so that rare confusions show.
    image = axes.imshow(counts.numpy(), cmap="Blues", norm=PowerNorm(0.5, vmin=0))
    figure.colorbar(image, label="test images", shrink=0.8)
    for row in range(10):
        for column in range(10):
            count = counts[row, column].item()
            color = "white" if count > counts.max() / 3 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set_xticks(range(10), common.CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), common.CLASSES)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    config = run["config"]
    title = f"{config['strategy']}, {config['labels']:,} labels, seed {config['seed']}"
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    return figure


def main(argv=None):
    parser = common.make_parser(__doc__, Config)
    parser.set_defaults(seeds=3)
    add = parser.add_argument
    text = "what to do with the encoder's initial weights (default: all three)"
    add("--strategies", nargs="+", choices=list(STYLE), default=list(STYLE), help=text)
    kind, default = common.number(int, 10, 50_000), [50_000, 10_000, 1000, 100]
    text = "labelled training images, runs of each count (default: %(default)s)"
    add("--labels", type=kind, nargs="+", default=default, metavar="N", help=text)
    text = "an autoencoder's model.pt, or a folder with one for each seed (default: OUT/conv_ae)"
    add("--encoder", type=Path, metavar="PATH", help=text)
    args = common.parse_args(parser, Config, argv)

    encoders, hashes = {}, {}
    if args.strategies != ["scratch"] and not args.eval:
        encoders, hashes = load_encoders(args)

    data = common.load_data(args.data, args.device)
    study = args.out / "classifier"
    runs = {}
    # The longest runs first and the seeds last: torchrun's processes get about equal shares.
    for labels in sorted(args.labels, reverse=True):
        for strategy in sorted(args.strategies, key=list(STYLE).index):
            for seed in args.seeds:
                encoder_hash = None if strategy == "scratch" else hashes.get(seed)
                own = {"labels": labels, "strategy": strategy, "encoder_hash": encoder_hash}
                config = replace(args.config, seed=seed, **own)
                runs[study / f"{strategy}-labels{labels}-seed{seed}"] = config
    for folder, config in common.share_out(runs, args):
        torch.manual_seed(config.seed)
        model = Classifier(config)
        if args.eval:  # the autoencoder may be gone
            saved = common.read(folder / "metrics.json")["config"]
            config = replace(config, encoder_hash=saved.get("encoder_hash"))
        elif config.strategy != "scratch":
            model.encoder.load_state_dict(encoders[config.seed].state_dict())
        model = conv_ae.to_device(model, args.device)
        subset = data._replace(train=labelled(data.train, config))
        common.run(model, subset, config, args, folder, evaluate)

    metrics = common.read_runs(runs, args)
    if metrics is None:
        return
    summary = summarize(metrics)
    figures = {
        "learning_curves": plot_learning_curves(metrics),
        "confusion_matrix": plot_confusion(metrics, summary),
    }
    if "scratch" in args.strategies and len(args.strategies) > 1:
        figures["differences"] = plot_differences(metrics)
    common.save_study(study, summary, metrics, figures, args)


if __name__ == "__main__":
    common.cli(main)
