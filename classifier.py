"""Does a classifier gain from starting at the autoencoder's encoder: frozen, fine-tuned, or from scratch?

    python conv_ae.py --latents 32     # the encoder, pre-trained on the 50,000 images without their labels
    python classifier.py               # accuracy up to 0.939 (n=3 seeds), 0.943 with --epochs 100
"""
import functools
import hashlib

import torch
from torch import nn
from torch.nn import functional as F

import common
from conv_ae import Autoencoder, Encoder

WEIGHT_DECAY = 0.05
TARGET = 0.88  # the validation accuracy whose epoch says how fast a strategy learns

# ----------------------------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """Images (B, 1, 28, 28), or the encoder's feature maps of them (B, 128, 5, 5), to logits (B, 10).

    The head sits on the feature maps, not on the latent vector behind them, where a frozen encoder validated worse.
    """

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder.features
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Flatten(), nn.Linear(128 * 5 * 5, 64), nn.ReLU(),
                                  nn.Dropout(0.2), nn.Linear(64, 10))

    def forward(self, x):
        return self.head(self.encoder(x) if x.shape[1] == 1 else x)


def make_classifier(strategy, latent, encoder_weights):
    """`scratch`: random encoder. `frozen`: the autoencoder's, never updated. `finetune`: the autoencoder's, trained on."""
    encoder = Encoder(latent)
    if strategy != "scratch" and encoder_weights is not None:  # None: the classifier's own weights are loaded next
        encoder.load_state_dict(encoder_weights)
    model = Classifier(encoder)
    model.encoder.requires_grad_(strategy != "frozen")
    return model


# ------------------------------------------------------------------------------------------------------------------ loss


def augment(images, shifted, erased):
    """Each image flipped left to right with probability 1/2; with probability `shifted` the batch moved by up to a pixel
    each way; with probability `erased` a rectangle of the image, its sides up to half the image's, filled with noise
    (random erasing, Zhong et al., 2020, arXiv:1708.04896)."""
    count, device = len(images), images.device
    images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, images.flip(3), images)
    if torch.rand(()) < shifted:
        down, right = torch.randint(3, (2,)).tolist()
        images = F.pad(images, (1, 1, 1, 1))[:, :, down:down + 28, right:right + 28]
    if erased > 0:
        size = torch.randint(1, 15, (count, 2, 1), device=device)
        start = (torch.rand(count, 2, 1, device=device) * (29 - size)).long()
        pixel = torch.arange(28, device=device)
        inside = (start <= pixel) & (pixel < start + size)  # (B, 2, 28): of the rows and of the columns
        box = inside[:, 0, None, :, None] & inside[:, 1, None, None, :]
        box &= torch.rand(count, 1, 1, 1, device=device) < erased
        images = torch.where(box, torch.rand_like(images), images)
    return images


def loss_fn(model, inputs, labels, shifted=1.0, erased=0.0):
    """Cross-entropy in nats and accuracy. In training, on images as `augment` makes them, with label smoothing 0.05
    (Szegedy et al., 2016), and in accuracy's place each image's difficulty, (B,): the probability of the wrong classes."""
    if not model.training:
        logits = model(inputs).float()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}
    logits = model(augment(inputs, shifted, erased) if inputs.shape[1] == 1 else inputs).float()
    right = logits.detach().softmax(1).gather(1, labels[:, None]).squeeze(1)
    return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.05), "difficulty": 1 - right}


# ------------------------------------------------------------------------------------------------------------------ data


def label_subset(labels, count, seed):
    """Indices of `count` labelled images, classes in equal shares (to one), nested: a larger count holds a smaller one's."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    rank = torch.empty_like(labels)  # of each image among its own class, in this order
    for label in labels.unique():
        own = order[labels[order] == label]
        rank[own] = torch.arange(len(own), device=labels.device)
    return order[rank[order].argsort(stable=True)][:count]


def passes(count):
    """How often an epoch goes over `count` labels: so that 100 get more than a step an epoch, and still cost little."""
    return max(1, round((5_000 / count) ** 0.5))


def labelled(data, count, seed):
    """`data` with its training split cut to `count` labels, repeated so that an epoch is worth its time."""
    if count == len(data.train.labels) and passes(count) == 1:
        return data  # not a copy: it would be the largest thing in memory
    chosen = label_subset(data.train.labels, count, seed).repeat(passes(count))
    return data._replace(train=common.Split(data.train.images[chosen], data.train.labels[chosen]))


@torch.no_grad()
def cached_features(model, data):
    """`data` with the frozen encoder's feature maps in the images' place: without augmentation they never change."""
    model.eval()
    device = data.train.images.device
    bf16 = common.has_bf16(device)

    def features(images):
        cache = torch.empty(len(images), 128, 5, 5, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for part, place in zip(images.split(250), cache.split(250)):
                place.copy_(model.encoder(part))
        return cache

    return common.Data(*(common.Split(features(split.images), split.labels) for split in data))


def load_encoder(path, latent, out):
    """The encoder's weights out of an autoencoder's model.pt, and the file's SHA-256."""
    command = f"python conv_ae.py --latents {latent} --out {out}"
    if not path.is_file():
        raise common.RunError(f"no encoder at {path}: make it with `{command}`, or give --encoder PATH")
    autoencoder = Autoencoder(latent)
    try:
        common.load_weights(path, autoencoder)
    except common.RunError as error:
        raise common.RunError(f"{error}; `{command}` makes one of --latent {latent}") from None
    return autoencoder.encoder.state_dict(), hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------ evaluation


@torch.no_grad()
def evaluate(model, test):
    """Accuracy and loss on the test set, and the confusion matrix: rows the true class, columns the predicted one."""
    predicted = []  # kept in passing by the same pass over the test set that gives the accuracy
    hook = model.register_forward_hook(lambda module, inputs, logits: predicted.append(logits.argmax(1)))
    metrics = common.test_loop(model, loss_fn, test)
    hook.remove()
    return {"test": metrics,
            "confusion": torch.bincount(10 * test.labels + torch.cat(predicted), minlength=100).view(10, 10).tolist()}


def runs_of(runs, strategy, labels):
    return [run for run in runs if (run["config"]["strategy"], run["config"]["labels"]) == (strategy, labels)]


def summarize(runs):
    """One row per strategy and label count, over seeds: what it ends at, and how fast it gets there."""
    summary = []
    for labels, strategy in sorted({(run["config"]["labels"], run["config"]["strategy"]) for run in runs}):
        same = runs_of(runs, strategy, labels)
        row = {"strategy": strategy, "labels": labels, "n": len(same), "parameters": same[0]["parameters"]}
        row["test_accuracy_mean"], row["test_accuracy_std"] = common.mean_std(run["test"]["accuracy"] for run in same)
        row["test_loss_mean"], row["test_loss_std"] = common.mean_std(run["test"]["loss"] for run in same)
        best = [next(check["accuracy"] for check in run["validation"] if check["epoch"] == run["best_epoch"])
                for run in same]
        row["val_accuracy_mean"], row["val_accuracy_std"] = common.mean_std(best)
        first = [run["validation"][0]["accuracy"] for run in same]
        row["val_accuracy_first_epoch_mean"], row["val_accuracy_first_epoch_std"] = common.mean_std(first)
        reached = [next((check["epoch"] for check in run["validation"] if check["accuracy"] >= TARGET), None)
                   for run in same]
        row["epochs_to_088_mean"] = None if None in reached else sum(reached) / len(reached)
        summary.append(row)
    return summary


# --------------------------------------------------------------------------------------------------------------- figures

STYLE = {"scratch": ("o-", common.COLORS[0]), "frozen": ("s--", common.COLORS[1]), "finetune": ("^-", common.COLORS[2])}


def plot_learning_curves(runs):
    """Validation accuracy by epoch at the largest label count: mean and spread (one std) over seeds."""
    figure = common.new_figure(7.5, 4.5)
    axes = figure.subplots()
    labels = max(run["config"]["labels"] for run in runs)
    for strategy, (line, color) in STYLE.items():
        same = runs_of(runs, strategy, labels)
        if not same:
            continue
        epochs = [check["epoch"] for check in same[0]["validation"]]
        spread = [common.mean_std(run["validation"][i]["accuracy"] for run in same) for i in range(len(epochs))]
        means = [mean for mean, _ in spread]
        axes.plot(epochs, means, line, color=color, markersize=4, label=f"{strategy} (n={len(same)})")
        axes.fill_between(epochs, [mean - (std or 0) for mean, std in spread], [mean + (std or 0) for mean, std in spread],
                          color=color, alpha=0.25)
    axes.set(xlabel="epoch", ylabel="validation accuracy", title=f"{labels:,} labels")
    axes.legend()
    axes.grid(alpha=0.3)
    return common.png(figure)


def plot_label_efficiency(summary):
    """Test accuracy over the number of labels: mean and one std over seeds."""
    figure = common.new_figure(7.5, 4.5)
    axes = figure.subplots()
    for strategy, (line, color) in STYLE.items():
        rows = [row for row in summary if row["strategy"] == strategy]
        if rows:
            axes.errorbar([row["labels"] for row in rows], [row["test_accuracy_mean"] for row in rows],
                          [row["test_accuracy_std"] or 0 for row in rows], fmt=line, color=color, capsize=4,
                          label=f"{strategy} (n={min(row['n'] for row in rows)})")
    sizes = sorted({row["labels"] for row in summary})
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set(xlabel="labelled training images", ylabel="test accuracy")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return common.png(figure)


def plot_confusion(run):
    figure = common.new_figure(8, 7.2)
    axes = figure.subplots()
    counts = torch.tensor(run["confusion"])
    axes.imshow(counts.sqrt().numpy(), cmap="Blues")  # the root, so that the rare confusions show beside the diagonal
    for row in range(10):
        for column in range(10):
            dark = counts[row, column] > counts.max() / 3
            axes.text(column, row, counts[row, column].item(), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(10), common.CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), common.CLASSES)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="true", title=f"test images: {run['folder']}")
    return common.png(figure)


def draw(runs):
    """Summary and figures; the confusion matrix is that of the strategy with the best validation accuracy."""
    summary = summarize(runs)
    best = max((row for row in summary if row["labels"] == summary[-1]["labels"]), key=lambda row: row["val_accuracy_mean"])
    return summary, {"learning_curves.png": plot_learning_curves(runs),
                     "label_efficiency.png": plot_label_efficiency(summary),
                     "confusion_matrix.png": plot_confusion(runs_of(runs, best["strategy"], best["labels"])[0])}


# ------------------------------------------------------------------------------------------------------------------ main


@common.entry
def main(argv=None):
    parser = common.make_parser(__doc__, epochs=16, batch_size=128, lr=4e-3, patience=0, val_every=1)
    add = parser.add_argument
    add("--strategies", nargs="+", choices=tuple(STYLE), default=list(STYLE), action=common.Distinct, help="(default: all)")
    add("--latent", type=common.number(int, 1, 4096), default=32, metavar="SIZE",
        help="the encoder's (default: %(default)s)")
    # The longest runs first: where processes share them out, none is left alone with a long one at the end.
    add("--labels", type=common.number(int, 10, 50_000), nargs="+", default=[50_000, 10_000, 1000, 100], metavar="COUNT",
        action=common.Distinct, help="labelled training images (default: %(default)s)")
    add("--seeds", type=common.number(int, 1, 1000), default=3, metavar="N",
        help="runs of each, with seeds from --seed on (default: %(default)s)")
    add("--encoder", type=common.path, metavar="PATH",
        help="the autoencoder's model.pt (default: OUT/conv_ae/latent032-seed0/model.pt, or of --latent's size)")
    args = common.parse_args(parser, argv)
    args.encoder = args.encoder or args.out / "conv_ae" / f"latent{args.latent:03d}-seed0" / "model.pt"
    device = common.get_device(args.device)
    weights = sha256 = None
    if not args.eval and set(args.strategies) != {"scratch"}:
        weights, sha256 = load_encoder(args.encoder, args.latent, args.out)
    data = common.load_data(args.data, device)
    if not args.eval and max(args.labels) > len(data.train.labels):
        raise common.RunError(f"--labels {max(args.labels)}: the training split has {len(data.train.labels)} images")

    @functools.cache
    def features():
        return cached_features(make_classifier("frozen", args.latent, weights).to(device), data)

    def train(run_args, folder):
        model = make_classifier(run_args.strategy, run_args.latent, weights).to(device, memory_format=torch.channels_last)
        inputs = data
        if not args.eval:
            inputs = labelled(features() if run_args.strategy == "frozen" else data, run_args.labels, run_args.seed)
        # An image seen more often can do with more augmentation: few labels and long runs get all the shifts. Long runs
        # erase as well; with few labels, that gained nothing.
        loss = functools.partial(loss_fn, shifted=min(1.0, run_args.epochs * passes(run_args.labels) / 30),
                                 erased=min(1.0, max(0.0, run_args.epochs / 30 - 1)))
        common.run(run_args, folder, model, loss, inputs, evaluate=lambda model: evaluate(model, data.test),
                   weight_decay=WEIGHT_DECAY, bf16=common.has_bf16(device))

    jobs = {f"{strategy}-labels{labels}-seed{seed}": {"strategy": strategy, "labels": labels, "seed": seed,
                                                      "encoder_sha256": None if strategy == "scratch" else sha256}
            for seed in range(args.seed, args.seed + args.seeds) for labels in args.labels for strategy in args.strategies}
    common.study(args, args.out / "classifier", jobs, train, draw)


if __name__ == "__main__":
    main()
