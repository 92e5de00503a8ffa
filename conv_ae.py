"""How does the size of the latent space of a convolutional autoencoder (Hinton & Salakhutdinov,
2006) trade against its error?

    python conv_ae.py --seeds 5
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

import common
from common import GRAY, option

FEATURES = 128 * 5 * 5  # of an image, from the encoder
LEAK = 0.1  # slope of LeakyReLU: with 0 much of what a large latent space could hold is lost
PRINTS = [142, 263, 121, 280, 35, 7, 1, 222, 100, 308]  # test images with something printed on


@dataclass(frozen=True)
class Config:
    epochs: int = option(5, "epochs at most", low=1)
    batch_size: int = option(32, "images in a training step", low=1)
    lr: float = option(8e-3, "highest learning rate")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    beta2: float = option(0.99, "beta2 of AdamW")
    ema_decay: float = option(0.995, "decay of the moving average of the weights")
    val_every: int = option(5, "epochs from one validation to the next", low=1)
    patience: int = option(0, "stop after so many epochs without progress; 0: never")
    min_delta: float = option(5e-5, "progress: validation loss lower by at least this much")
    seed: int = option(0, "seed of initial weights and batches")
    latent: int = 32  # one of --latents


# model and loss -----------------------------------------------------------------------------------


class Encoder(nn.Sequential):
    """Images (B, 1, 28, 28) to features (B, FEATURES)."""

    def __init__(self):
        # Pooling first leaves a quarter of the work. With the default momentum of 0.1 the
        # statistics of a classifier's short run would lag.
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.MaxPool2d(2),  # to 14x14
            nn.BatchNorm2d(16, momentum=0.5),
            nn.LeakyReLU(LEAK),
            nn.Conv2d(16, 64, 3, padding=1),
            nn.MaxPool2d(2),  # to 7x7
            nn.BatchNorm2d(64, momentum=0.5),
            nn.LeakyReLU(LEAK),
            nn.Conv2d(64, 128, 3),  # to 5x5
            nn.BatchNorm2d(128, momentum=0.5),
            nn.LeakyReLU(LEAK),
        )

    def forward(self, images):
        # The channel comes last, as in memory: flattening copies nothing.
        return super().forward(images).permute(0, 2, 3, 1).flatten(1)


class Decoder(nn.Module):
    """Latent vectors (B, latent) to images (B, 1, 28, 28) in [0, 1]. Two paths lead to the 7x7
    maps: with the hidden layer a small latent space does better, with the linear one a large one
    learns faster."""

    def __init__(self, latent):
        super().__init__()
        self.linear = nn.Linear(latent, 64 * 7 * 7)
        self.hidden = nn.Sequential(
            nn.Linear(latent, 128),
            nn.BatchNorm1d(128),
            nn.LeakyReLU(LEAK),
            nn.Linear(128, 64 * 7 * 7),
        )
        self.stages = nn.Sequential(
            nn.LeakyReLU(LEAK),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),  # to 14x14
            nn.BatchNorm2d(32),
            nn.LeakyReLU(LEAK),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),  # to 28x28
            nn.Sigmoid(),
        )

    def forward(self, z):
        return self.stages(self.linear(z) + self.hidden(z))


class Autoencoder(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to latent vectors (B, latent), and back to images."""

    def __init__(self, config):
        super().__init__()
        self.encoder = Encoder()
        self.latent = nn.Linear(FEATURES, config.latent)
        self.decoder = Decoder(config.latent)

    def encode(self, images):
        return self.latent(self.encoder(images))

    def forward(self, images):
        return self.decoder(self.encode(images))

    def loss(self, images, labels):
        """Mean over pixels and images of the squared error, and of the absolute error."""
        reconstruction = self(images)
        mse = F.mse_loss(reconstruction, images)
        return {"loss": mse, "l1": F.l1_loss(reconstruction, images)}


def load(folder):
    """The trained autoencoder in a run's folder, ready to use."""
    return common.load(folder, Autoencoder, Config)


# evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data):
    """The test errors, and what the latent space keeps of the classes."""
    losses = common.test_loop(model, data.test)
    accuracy = common.knn_accuracy(data, model.encode)
    return {"test": {"mse": losses["loss"], "l1": losses["l1"], "knn_accuracy": accuracy}}


# figures: the docstrings are their captions in the report ----------------------------------------


def plot_sizes(summary):
    """How fast does the error fall with each doubling, beside PCA's? From which size on are the
    classes no easier to tell apart?"""
    sizes = [row["latent"] for row in summary]
    figure, (errors, accuracies) = common.new_figure(9, 3.8, columns=2)
    for axes, metric in ((errors, "mse"), (accuracies, "knn_accuracy")):
        means = [row[f"{metric}_mean"] for row in summary]
        stds = [row[f"{metric}_std"] or 0 for row in summary]
        pca = [row[f"pca_{metric}"] for row in summary]
        axes.errorbar(sizes, means, stds, fmt="o-", capsize=3, label="autoencoder")
        axes.plot(sizes, pca, "s--", color=GRAY, label="PCA")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, sizes)
        axes.set_xlabel("latent dimensions")
    errors.set(yscale="log", ylabel="test MSE (pixels in [0, 1])")
    errors.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    errors.yaxis.set_major_formatter("{x:g}")
    errors.minorticks_off()
    errors.legend(frameon=False)
    pixels = summary[0]["pixel_knn_accuracy"]
    accuracies.axhline(pixels, linestyle=":", color="black", label="10-NN on the 784 pixels")
    accuracies.set_ylabel("10-NN test accuracy")
    accuracies.legend(frameon=False)
    return figure


def plot_reconstructions(folders, data):
    """Read a column downwards: what is there with 2 dimensions, what comes with 8, and what becomes
    of a print, of checks, of stripes?"""
    images = data.test.images[PRINTS]
    rows, names = [images], ["test image"]
    for folder in folders:
        model = load(folder).to(images.device)
        rows.append(model(images))
        names.append(f"{model.latent.out_features} dimensions")
    return common.image_grid(torch.stack(rows), names)


COLUMNS = ["latent", "mse", "pca_mse", "mse_to_pca", "l1", "knn_accuracy", "pca_knn_accuracy"]
ABOUT = """
Convolutional autoencoders with several numbers of latent dimensions, trained on the squared error
(MSE) of 50,000 images; `l1` is their absolute error. PCA is the best linear autoencoder with as
many dimensions; `mse to pca` is the ratio of the two squared errors. `knn`, the vote of the ten
nearest neighbours, is how well the latent vectors tell the classes apart.
"""


def main(argv=None):
    parser = common.make_parser(__doc__, Config)
    parser.add_argument(
        "--latents",
        type=common.at_least(1, int),
        nargs="+",
        default=[2, 4, 8, 16, 32, 64, 128],
        metavar="N",
        help="numbers of latent dimensions, --seeds runs of each",
    )
    args = common.parse_args(parser, Config, argv)
    data = common.load_data(args.data, args.device)
    study = args.out / "conv_ae"
    runs = {}
    for latent in args.latents:
        for seed in args.seeds:
            config = replace(args.config, latent=latent, seed=seed)
            runs[study / f"latent{latent:03d}-seed{seed}"] = config
    if args.eval:
        return common.confirm(runs, load, evaluate, data)
    for folder, config in common.share_out(runs):
        torch.manual_seed(config.seed)
        # In this memory format convolutions are a third faster.
        model = Autoencoder(config).to(args.device, memory_format=torch.channels_last)
        common.run(model, data, config, args, folder, evaluate)

    metrics = common.read_runs(runs)
    if metrics is None:
        return
    summary = common.summarize(metrics, ["latent"])
    pixel_knn_accuracy = common.knn_accuracy(data, lambda images: images.flatten(1))
    for row in summary:
        row |= common.pca_baseline(data, row["latent"])
        row["pixel_knn_accuracy"] = pixel_knn_accuracy
        row["mse_to_pca"] = row["mse_mean"] / row["pca_mse"]
    first_runs = [study / same[0]["folder"] for same in common.group(metrics, ["latent"]).values()]
    figures = {
        "latent_vs_error.png": (plot_sizes, summary),
        "reconstructions.png": (plot_reconstructions, first_runs, data),
    }
    common.save_study(study, ABOUT, metrics, summary, COLUMNS, figures, args)


if __name__ == "__main__":
    main()
