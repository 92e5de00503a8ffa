"""Does a classifier gain from starting at the autoencoder's encoder: frozen, fine-tuned, or from scratch?

    python conv_ae.py --latents 32     # the encoder, pre-trained on the 50,000 images without their labels
    python classifier.py --seeds 5     # test accuracy 0.9396 with all 50,000 labels (finetune, n=5)
"""
import functools
import hashlib
from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

import common
from conv_ae import Autoencoder, Encoder, predict, to_device

# ---------------------------------------------------------------------------------------------------------------- model

class Classifier(nn.Module):
    """Images (B, 1, 28, 28) to logits (B, 10). The head sits on the encoder's features, not on the latent vector
    behind them, where a frozen encoder validated worse."""

    def __init__(self, encoder, dropout):
        super().__init__()
        self.encoder = encoder.features
        self.head = nn.Sequential(
            nn.Linear(encoder.project.in_features, 128), nn.ReLU(), nn.Dropout(dropout), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.encoder(x))

# ----------------------------------------------------------------------------------------------------------------- loss

def augment(images, args):
    """Each image is flipped left to right with probability 1/2. The batch is shifted by up to a pixel each way: always
    if a run sees an image `shift_epochs` times, less often if it sees it fewer times. Runs longer than `erase_epochs`
    also fill a rectangle with noise, its sides up to half the image's: in few images of a slightly longer run, in all
    of one that is twice as long (random erasing, Zhong et al., 2020, arXiv:1708.04896)."""
    count, device = len(images), images.device
    images = torch.where(torch.rand(count, 1, 1, 1, device=device) < 0.5, images.flip(3), images)
    if torch.rand(()) < args.epochs * passes(args.labels) / args.shift_epochs:
        down, right = torch.randint(3, (2,)).tolist()
        images = F.pad(images, (1, 1, 1, 1))[:, :, down:down + 28, right:right + 28]
    erase = args.epochs / args.erase_epochs - 1
    if erase > 0:
        size = torch.randint(1, 15, (count, 2, 1), device=device)
        start = (torch.rand(count, 2, 1, device=device) * (29 - size)).long()
        pixel = torch.arange(28, device=device)
        inside = (start <= pixel) & (pixel < start + size)  # (B, 2, 28): of the rows and of the columns
        box = inside[:, 0, None, :, None] & inside[:, 1, None, None, :]
        box &= torch.rand(count, 1, 1, 1, device=device) < erase
        images = torch.where(box, torch.rand_like(images), images)
    return images

def scores(logits, labels, label_smoothing=0.0):
    """Mean cross-entropy in nats, with label smoothing (Szegedy et al., 2016), and accuracy."""
    return {"loss": F.cross_entropy(logits, labels, label_smoothing=label_smoothing),
            "accuracy": (logits.argmax(1) == labels).float().mean()}

def loss_fn(model, inputs, labels, args):
    """The scores of a batch of images, or of the features of a frozen encoder, which can't be augmented."""
    if model.training and args.strategy != "frozen":
        inputs = augment(inputs, args)
    return scores(common.forward(model, inputs.float()), labels, args.label_smoothing if model.training else 0.0)

# ----------------------------------------------------------------------------------------------------------------- data

def label_subset(labels, count, seed):
    """Indices of `count` images, classes in equal shares (to one), nested: a larger count holds a smaller one's."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu()[order]
    rank = F.one_hot(shuffled).cumsum(0).gather(1, shuffled[:, None]).squeeze(1)  # of each image among its own class
    return order[rank.argsort(stable=True)][:count].to(labels.device)

def passes(count):
    """How often an epoch goes over `count` labels: so that 100 get more than a step an epoch, and still cost little."""
    return max(1, round((5_000 / count) ** 0.5))

def labelled(split, count, seed):
    """The training split cut to `count` labels, repeated so that an epoch is worth its time."""
    if count == len(split.labels) and passes(count) == 1:
        return split  # not a copy: it would be the largest thing in memory
    chosen = label_subset(split.labels, count, seed).repeat(passes(count))
    return common.Split(split.images[chosen], split.labels[chosen])

def frozen_features(encoder, data):
    """The training and validation splits with the encoder's features (N, 3200) in the images' place: computed once, as
    without augmentation they never change; in half precision, as they are the largest thing in memory."""
    features = encoder.features.to(data.train.images.device)
    train, val = (common.Split(predict(features, split.images, torch.float16), split.labels)
                  for split in (data.train, data.val))
    return SimpleNamespace(train=train, val=val)

def load_encoder(args):
    """The encoder of the autoencoder at --encoder, and a hash of its weights."""
    autoencoder = Autoencoder(args.latent)
    try:
        common.load(args.encoder, model=autoencoder)
    except common.RunError as error:
        command = f"python conv_ae.py --latents {args.latent} --seed {args.seed} --out {args.out}"
        raise common.RunError(f"no encoder of --latent {args.latent} ({error}): `{command}` makes one, then leave "
                              "--encoder out") from None
    weights = b"".join(tensor.numpy().tobytes() for tensor in autoencoder.encoder.state_dict().values())
    print(f"encoder: {args.encoder}", flush=True)
    return autoencoder.encoder, hashlib.sha256(weights).hexdigest()[:16]

# ----------------------------------------------------------------------------------------------------------- evaluation

def evaluate(model, test):
    """The scores of the test set, and the confusion matrix: rows the true class, columns the predicted one."""
    logits = predict(model, test.images)
    return {"test": {name: round(value.item(), 7) for name, value in scores(logits, test.labels).items()},
            "confusion": torch.bincount(10 * test.labels + logits.argmax(1), minlength=100).view(10, 10).tolist()}

def by_cell(runs):
    """{(labels, strategy): its runs}, sorted."""
    cells = defaultdict(list)
    for run in runs:
        cells[run["config"]["labels"], run["config"]["strategy"]].append(run)
    return dict(sorted(cells.items()))

def summarize(runs):
    """One row per label count and strategy, over seeds: what it ends at, how far it is after the first epoch, and its
    test accuracy minus that of `scratch`, paired by seed, with the standard error of that mean."""
    summary, cells = [], by_cell(runs)
    for (labels, strategy), same in cells.items():
        checks = [{check["epoch"]: check["accuracy"] for check in run["validation"]} for run in same]
        columns = {"test_accuracy": [run["test"]["accuracy"] for run in same],
                   "test_loss": [run["test"]["loss"] for run in same],
                   "val_accuracy": [check[run["best_epoch"]] for check, run in zip(checks, same)],
                   "val_accuracy_first_epoch": [check.get(1) for check in checks]}  # None: not validated
        row = {"strategy": strategy, "labels": labels, "n": len(same), "parameters": same[0]["parameters"]}
        for name, values in columns.items():
            row[f"{name}_mean"], row[f"{name}_std"] = (None, None) if None in values else common.mean_std(values)
        scratch = {run["config"]["seed"]: run["test"]["accuracy"] for run in cells.get((labels, "scratch"), [])}
        gains = [run["test"]["accuracy"] - scratch[run["config"]["seed"]] for run in same
                 if run["config"]["seed"] in scratch]
        mean, std = common.mean_std(gains) if gains else (None, None)
        summary.append({**row, "minus_scratch_mean": mean, "minus_scratch_se": std and std / len(gains) ** 0.5})
    return summary

# -------------------------------------------------------------------------------------------------------------- figures

STYLE = {"scratch": ("o-", common.COLORS[0]), "frozen": ("s--", common.COLORS[1]), "finetune": ("^-", common.COLORS[2])}

def plot_learning_curves(runs):
    """Validation accuracy by epoch, a panel per label count: mean and spread (one std) over seeds."""
    cells = by_cell(runs)
    counts = sorted({labels for labels, _ in cells})
    figure = common.new_figure(max(6, 3.6 * len(counts)), 4)
    for labels, axes in zip(counts, figure.subplots(1, len(counts), squeeze=False)[0]):
        for strategy, (line, color) in STYLE.items():
            accuracies = defaultdict(list)  # by epoch; a run that stopped early is in the mean up to its end
            for run in cells.get((labels, strategy), []):
                for check in run["validation"]:
                    accuracies[check["epoch"]].append(check["accuracy"])
            means, stds = zip(*map(common.mean_std, accuracies.values())) if accuracies else ((), ())
            axes.plot(list(accuracies), means, line, color=color, markersize=4, label=strategy)
            axes.fill_between(list(accuracies), [m - (s or 0) for m, s in zip(means, stds)],
                              [m + (s or 0) for m, s in zip(means, stds)], color=color, alpha=0.25)
        axes.set(xlabel="epoch", title=f"{labels:,} labels")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation accuracy")
    figure.axes[0].legend(loc="lower right", title="mean and std over seeds")
    return figure

def plot_label_efficiency(summary):
    """Test accuracy over the number of labels: mean and one std over seeds."""
    figure = common.new_figure(7.5, 4.5)
    axes = figure.subplots()
    for strategy, (line, color) in STYLE.items():
        rows = [row for row in summary if row["strategy"] == strategy]
        if rows:
            axes.errorbar([row["labels"] for row in rows], [row["test_accuracy_mean"] for row in rows],
                          [row["test_accuracy_std"] or 0 for row in rows], fmt=line, color=color, capsize=4,
                          label=f"{strategy} (n={'-'.join(map(str, sorted({row['n'] for row in rows})))})")
    axes.set_xscale("log")
    axes.set_xticks(*zip(*{row["labels"]: f"{row['labels']:,}" for row in summary}.items()))
    axes.minorticks_off()
    axes.set(xlabel="labelled training images", ylabel="test accuracy")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    return figure

def plot_confusion(run):
    figure = common.new_figure(8, 7.2)
    axes = figure.subplots()
    counts = torch.tensor(run["confusion"])
    axes.imshow(counts.sqrt().numpy(), cmap="Blues")  # the root, so that the rare confusions show next to the diagonal
    for row in range(10):
        for column in range(10):
            color = "white" if counts[row, column] > counts.max() / 3 else "black"
            axes.text(column, row, counts[row, column].item(), ha="center", va="center", color=color)
    axes.set_xticks(range(10), common.CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), common.CLASSES)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted", ylabel="true", title=f"test images: {run['folder']}")
    return figure

def plot(runs):
    """Summary and figures; the confusion matrix is that of the strategy with the best validation accuracy."""
    summary = summarize(runs)
    best = max(summary, key=lambda row: (row["labels"], row["val_accuracy_mean"]))
    first = by_cell(runs)[best["labels"], best["strategy"]][0]
    return summary, {"learning_curves.png": plot_learning_curves(runs), "confusion_matrix.png": plot_confusion(first),
                     "label_efficiency.png": plot_label_efficiency(summary)}

# ----------------------------------------------------------------------------------------------------------------- main

def make_model(args, encoder, encoder_hash):
    """`scratch`: a random encoder. `frozen`: the autoencoder's, never updated. `finetune`: the same, trained on. What a
    run starts from is in its config. With --eval there is no `encoder`: the run's own weights are loaded next."""
    model = Classifier(Encoder(args.latent), args.dropout)
    args.encoder_hash = None if args.strategy == "scratch" else encoder_hash
    if args.encoder_hash:
        model.encoder.load_state_dict(encoder.features.state_dict())
    return to_device(model, args.device)

@common.cli()
def main(argv=None):
    parser = common.make_parser(__doc__, epochs=16, batch_size=128, lr=4e-3, patience=0, val_every=1, weight_decay=0.05,
                                label_smoothing=0.05, dropout=0.3, shift_epochs=30, erase_epochs=30)
    add = parser.add_argument
    add("--strategies", nargs="+", choices=tuple(STYLE), default=list(STYLE), help="(default: all)")
    add("--latent", type=common.number(int, 1, 4096), default=32, metavar="SIZE",
        help="the encoder's latent dimensions (default: %(default)s)")
    # The longest runs first: where processes share them out, none is left alone with a long one at the end.
    add("--labels", type=common.number(int, 10, 50_000), nargs="+", default=[50_000, 10_000, 1000, 100],
        metavar="COUNT", help="labelled training images (default: %(default)s)")
    add("--seeds", type=common.number(int, 1, 1000), default=3, metavar="N",
        help="runs of each, with seeds from --seed on (default: %(default)s)")
    add("--encoder", type=common.path, metavar="PATH",
        help="the autoencoder's model.pt (default: that of --latent and seed 0 below OUT/conv_ae, else of --seed)")
    args = common.parse_args(parser, argv, "classifier")
    encoders = [args.out / "conv_ae" / f"latent{args.latent:03d}-seed{seed}" / "model.pt" for seed in (0, args.seed)]
    args.encoder = args.encoder or next((path for path in encoders if path.exists()), encoders[-1])
    # For `scratch` alone too, where there is one: the summary compares the other runs' encoders with it.
    wanted = not args.eval and (set(args.strategies) != {"scratch"} or args.encoder.exists())
    encoder, encoder_hash = load_encoder(args) if wanted else (None, None)
    data = common.load_data(args.data, args.device)
    if not args.eval and max(args.labels) > len(data.train.labels):
        raise common.RunError(f"--labels {max(args.labels)}: the training split has {len(data.train.labels)} images")
    seeds = range(args.seed, args.seed + args.seeds)
    runs = {f"{strategy}-labels{labels}-seed{seed}": {"strategy": strategy, "labels": labels, "seed": seed}
            for seed, labels, strategy in product(seeds, args.labels, args.strategies)}
    del args.strategies, args.labels, args.seeds  # what is left is the same for all runs
    features = functools.cache(lambda: frozen_features(encoder, data))

    def train(args, model):
        frozen = args.strategy == "frozen" and not args.eval
        inputs, trained = (features(), model.head) if frozen else (data, model)
        inputs = SimpleNamespace(train=labelled(inputs.train, args.labels, args.seed), val=inputs.val)
        common.run(args, model, functools.partial(loss_fn, args=args), inputs,
                   evaluate=functools.partial(evaluate, test=data.test), trained=trained)

    make = functools.partial(make_model, encoder=encoder, encoder_hash=encoder_hash)
    common.study(args, runs, make, train, plot, cost=lambda run: run["labels"] * passes(run["labels"]))

if __name__ == "__main__":
    main()
