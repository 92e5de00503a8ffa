"""How does the size of the latent space of a convolutional autoencoder (Hinton & Salakhutdinov,
2006) trade against its error?

    python conv_ae.py --seeds 5    # 32 dimensions: 0.435 of PCA's error (n=5)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import common


@dataclass(frozen=True)
class Config(common.Config):
    epochs: int = 6
    batch_size: int = 64
    lr: float = 8e-3
    val_every: int = 3
    latent: int = None  # one of --latents


# model and loss -----------------------------------------------------------------------------------


class Features(nn.Sequential):
    """Images (B, 1, 28, 28) to features (B, 3200)."""

    def __init__(self):
        # Pooling first leaves a quarter of the work. With the default momentum of 0.1 the
        # statistics of a classifier's short run would lag.
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.MaxPool2d(2),  # to 14x14
            nn.BatchNorm2d(32, momentum=0.5),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.MaxPool2d(2),  # to 7x7
            nn.BatchNorm2d(64, momentum=0.5),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3),  # to 5x5
            nn.BatchNorm2d(128, momentum=0.5),
            nn.ReLU(),
        )

    def forward(self, x):
        return super().forward(x).permute(0, 2, 3, 1).flatten(1)  # NHWC: no copy if channels_last


class Encoder(nn.Module):
    """Images (B, 1, 28, 28) to the latent vector (B, latent)."""

    def __init__(self, latent):
        super().__init__()
        self.features = Features()
        self.project = nn.Linear(128 * 5 * 5, latent)

    def forward(self, x):
        return self.project(self.features(x))


class Decoder(nn.Module):
    """Latent vectors (B, latent) to images (B, 1, 28, 28) in [0, 1]. Two paths lead to the 7x7
    maps: with the hidden layer a small latent space does better, with the linear one a large one
    learns faster."""

    def __init__(self, latent):
        super().__init__()
        self.linear = nn.Linear(latent, 64 * 7 * 7)
        self.hidden = nn.Sequential(nn.Linear(latent, 128), nn.ReLU(), nn.Linear(128, 64 * 7 * 7))
        self.stages = nn.Sequential(
            nn.ReLU(),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # to 14x14
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # to 28x28
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.stages(self.linear(z) + self.hidden(z))


class Autoencoder(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to latent vectors (B, latent), and back to images."""

    bf16 = True  # see common.forward

    def __init__(self, latent):
        super().__init__()
        self.encoder = Encoder(latent)
        self.decoder = Decoder(latent)

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def loss(self, images, labels):
        """Mean over pixels and images of the squared error, and of the absolute error."""
        reconstruction = common.forward(self, images)
        mse = F.mse_loss(reconstruction, images)
        return {"loss": mse, "mse": mse, "l1": F.l1_loss(reconstruction, images)}


def to_device(model, device):
    """`model` on `device`, in the memory format that convolutions are fast in. Not on MPS, where
    before torch 2.14 batch norm's gradients are wrong in it (pytorch issue 175189)."""
    if device.type == "mps":
        return model.to(device)
    return model.to(device, memory_format=torch.channels_last)


@torch.no_grad()
def predict(model, images):
    """model(images) in evaluation, by chunks that fit into the cache."""
    model.eval()
    return torch.cat([model(chunk) for chunk in images.split(250)])


def load(folder):
    """The trained autoencoder in a run's folder, in evaluation mode, without gradients."""
    path = Path(folder) / "model.pt"
    model = Autoencoder(common.read(path)["config"]["latent"])
    common.read(path, model=model)
    return model.eval().requires_grad_(False)


# evaluation ---------------------------------------------------------------------------------------


def evaluate(model, data):
    """The test losses, and what the latent space keeps of the classes."""
    index = predict(model.encoder, data.train.images)
    queries = predict(model.encoder, data.test.images)
    predicted = common.knn(index, data.train.labels, queries)
    accuracy = common.accuracy(predicted, data.test.labels)
    return {"test": {**common.test_loop(model, data.test), "latent_knn_accuracy": accuracy}}


def summarize(runs, data):
    """A row per latent size: the test metrics over the seeds, beside what needs no autoencoder."""
    summary = common.summarize(runs, ["latent"])
    baselines = common.baselines(data, [row["latent"] for row in summary])
    for row in summary:
        row |= baselines[row["latent"]]
        # With 784 dimensions PCA is exact and no ratio means anything.
        row["ratio"] = row["mse_mean"] / row["pca_mse"] if row["latent"] < 784 else None
    return summary


# figures ------------------------------------------------------------------------------------------


def plot_errors(summary, epochs):
    """Test error and PCA's, and what the latent space keeps of the classes, over latent size."""
    figure, (errors, classes) = plt.subplots(1, 2, figsize=(11, 4.8))
    errors.set(yscale="log", ylabel="test MSE (pixels in [0, 1])")
    sizes = [row["latent"] for row in summary]
    label = f"autoencoder, {epochs} epochs\n(mean and std, n={summary[0]['n']})"
    for axes, name in ((errors, "mse"), (classes, "latent_knn_accuracy")):
        means = [row[f"{name}_mean"] for row in summary]
        stds = [row[f"{name}_std"] or 0 for row in summary]
        axes.errorbar(sizes, means, stds, fmt="o-", capsize=3, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, sizes)
        axes.set_xlabel("latent dimensions")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    gray = common.COLORS[8]

    compared = [row for row in summary if row["ratio"] is not None]
    pca = [row["pca_mse"] for row in compared]
    errors.plot([row["latent"] for row in compared], pca, "s--", color=gray, label="PCA")
    pca_knn = [row["pca_knn_accuracy"] for row in summary]
    classes.plot(sizes, pca_knn, "s--", color=gray, label="PCA's components")
    for row in compared:
        below = {"xytext": (-4, -14), "textcoords": "offset points", "ha": "right"}
        errors.annotate(f"×{row['ratio']:.2f}", (row["latent"], row["mse_mean"]), **below)
    errors.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    errors.yaxis.set_major_formatter("{x:g}")
    errors.margins(x=0.2, y=0.12)
    errors.legend(title="×: error relative to PCA's", alignment="left")

    pixels = summary[0]["pixel_knn_accuracy"]
    classes.axhline(pixels, linestyle=":", color="black", label="the 784 pixels")
    classes.set_ylabel("10-NN test accuracy")
    classes.legend(loc="lower right", frameon=True, edgecolor="none")  # over the pixels' line
    return figure


@torch.no_grad()
def plot_reconstructions(folders, data):
    """The originals, then a row for each of the runs' `folders`."""
    images, names = common.one_of_each_class(data.test)
    rows, labels = [images], ["original"]
    for folder in folders:
        model = load(folder).to(images.device)
        rows.append(model(images))
        labels.append(f"{model.encoder.project.out_features} dimensions")
    return common.image_grid(torch.stack(rows), labels, names)


def main(argv=None):
    parser = common.make_parser(__doc__, Config)
    parser.set_defaults(seeds=3)
    kind, default = common.number(int, 1, 4096), [2, 8, 32, 128]
    text = "latent dimensions, runs of each (default: %(default)s)"
    parser.add_argument("--latents", type=kind, nargs="+", default=default, metavar="N", help=text)
    args = common.parse_args(parser, Config, argv)
    data = common.load_data(args.data, args.device)
    study = args.out / "conv_ae"
    runs = {}
    for latent in sorted(args.latents, reverse=True):  # the longest first
        for seed in args.seeds:
            config = replace(args.config, latent=latent, seed=seed)
            runs[study / f"latent{latent:03d}-seed{seed}"] = config
    for folder, config in common.share_out(runs, args):
        torch.manual_seed(config.seed)
        model = to_device(Autoencoder(config.latent), args.device)
        common.run(model, data, config, args, folder, evaluate)

    metrics = common.read_runs(runs, args)
    if metrics is None:
        return
    summary = summarize(metrics, data)
    folders = [study / same[0]["folder"] for same in common.group(metrics, ["latent"]).values()]
    figures = {
        "latent_vs_error": plot_errors(summary, args.epochs),
        "reconstructions": plot_reconstructions(folders, data),
    }
    common.save_study(study, summary, metrics, figures, args)


if __name__ == "__main__":
    common.cli(main)
