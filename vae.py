"""What does the 8-dimensional latent space of a fully connected VAE (Kingma & Welling, 2014,
arXiv:1312.6114) look like, and how well does it reconstruct?

    python vae.py --seeds 5
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common
from common import CLASSES, COLORS, option

PAIRS = [(0, 9), (1, 3), (5, 7), (6, 8)]  # classes to interpolate between
TOUR = [5, 7, 9, 8, 6, 4, 2, 0, 3, 1]  # an order of the classes with small steps


@dataclass(frozen=True)
class Config:
    epochs: int = option(200, "epochs at most", low=1)
    batch_size: int = option(128, "images in a training step", low=1)
    lr: float = option(6e-3, "highest learning rate")
    # With less, weights of pixels that are nearly always black wander, and single KLs explode.
    weight_decay: float = option(0.03, "weight decay of AdamW")
    beta2: float = option(0.999, "beta2 of AdamW")
    ema_decay: float = option(0.999, "decay of the moving average of the weights")
    val_every: int = option(5, "epochs from one validation to the next", low=1)
    patience: int = option(25, "stop after so many epochs without progress; 0: never")
    min_delta: float = option(1e-3, "progress: validation loss lower by at least this much")
    seed: int = option(0, "seed of initial weights, batches and noise")
    latent: int = option(8, "latent dimensions", low=1)
    alpha: float = option(1e-3, "weight of the KL")
    kl_warmup: int = option(2000, "steps in which the weight of the KL rises to alpha; 0: none")


# model and loss -----------------------------------------------------------------------------------


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to a Gaussian in the latent space, and back to images."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.register_buffer("steps", torch.tensor(0))  # for the warm-up; saved with the weights
        self.encoder = nn.Sequential(
            nn.Flatten(),
            nn.Linear(784, 128),
            nn.LeakyReLU(),
            nn.Linear(128, 64),
            nn.LeakyReLU(),
        )
        self.mu = nn.Linear(64, config.latent)
        self.logvar = nn.Linear(64, config.latent)
        self.decoder = nn.Sequential(
            nn.Linear(config.latent, 64),
            nn.LeakyReLU(),
            nn.Linear(64, 128),
            nn.LeakyReLU(),
            nn.Linear(128, 784),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, 28, 28)),
        )
        # With PyTorch's smaller default initialisation more latent dimensions stay unused.
        linears = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        for layer in linears:
            nn.init.kaiming_normal_(layer.weight, a=0.01)
            nn.init.zeros_(layer.bias)
        # The loss falls faster where each pixel starts at sigmoid(-2) = 0.12, whatever z is.
        nn.init.zeros_(linears[-1].weight)
        nn.init.constant_(linears[-1].bias, -2)

    def encode(self, images):
        """mu and logvar, each (B, latent). The log of a variance may be any number."""
        h = self.encoder(images)
        return self.mu(h), self.logvar(h)

    def reparameterize(self, mu, logvar):
        """A sample of N(mu, sigma^2) that gradients pass through (Kingma & Welling, 2.4)."""
        noise = torch.randn(mu.shape).to(mu.device)  # drawn by the CPU: the same on every device
        return mu + torch.exp(0.5 * logvar) * noise

    def decode(self, z):
        """Latent vectors (B, latent) to images (B, 1, 28, 28)."""
        return self.decoder(z)

    def kl(self, mu, logvar):
        """KL(N(mu, sigma^2) || N(0, 1)) of each dimension in nats, (B, latent) (appendix B)."""
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)

    def forward(self, images):
        mu, logvar = self.encode(images)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    def loss(self, images, labels):
        """recon + alpha * kl: the L1 loss, a mean over pixels and images, and the KL, a sum over
        dimensions and a mean over images. In training alpha rises from zero. Labels are unused."""
        reconstruction, mu, logvar = self(images)
        recon = F.l1_loss(reconstruction, images)
        kl = self.kl(mu, logvar).sum(1).mean()
        alpha = self.config.alpha
        if self.training:
            # With the whole KL from the start some dimensions stay unused (Bowman et al., 2016).
            self.steps += 1
            alpha = alpha * (self.steps / max(1, self.config.kl_warmup)).clamp(max=1)
        return {"loss": recon + alpha * kl, "recon": recon, "kl": kl}


def load(folder):
    """The trained VAE in a run's folder, ready to use."""
    return common.load(folder, VAE, Config)


# evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data):
    """The test losses, and what the latent space keeps of the classes."""
    test = common.test_loop(model, data.test)
    mu, _ = model.encode(data.test.images)
    # "Active units" (Burda et al., 2016, arXiv:1509.00519), by the variance of mu over images.
    test["active_dimensions"] = (mu.var(0) > 0.01).sum().item()
    test["knn_accuracy"] = common.knn_accuracy(data, lambda images: model.encode(images)[0])
    return {"test": test}


def class_means(model, split):
    """The mean of mu of each class, (10, latent): prototypes as in Snell et al., 2017."""
    mu, _ = model.encode(split.images)
    means = [mu[split.labels == label].mean(0) for label in range(10)]
    return torch.stack(means)


def mean_kl(model, images):
    """The mean KL of each latent dimension in nats, (latent,)."""
    mu, logvar = model.encode(images)
    return model.kl(mu, logvar).mean(0).cpu()


# figures: the docstrings are their captions in the report ----------------------------------------


def plot_reconstructions(model, data):
    """A test image of each class, what the decoder makes of its mu, and of the mean of its class.
    Which details survive, which are lost?"""
    images = common.one_of_each_class(data.test)
    mu, _ = model.encode(images)
    rows = torch.stack([images, model.decode(mu), model.decode(class_means(model, data.train))])
    names = [name.replace(" ", "\n").replace("/", "/\n") for name in CLASSES]
    return common.image_grid(rows, ["test image", "decoded mu", "class mean"], names)


def line(start, end, steps=9):
    """Equally spaced points from one tensor to another, (steps, ...)."""
    return torch.stack([start.lerp(end, i / (steps - 1)) for i in range(steps)])


def plot_interpolations(model, data):
    """The decoded line between two class means, and between two test images, above a blend of the
    pixels of these. Which pictures could be pieces of clothing, which are two at once?"""
    means = class_means(model, data.train)
    images = common.one_of_each_class(data.test)
    mu, _ = model.encode(images)
    rows, names = [], []
    for a, b in PAIRS:
        rows.append(model.decode(line(means[a], means[b])))
        rows.append(model.decode(line(mu[a], mu[b])))
        rows.append(line(images[a], images[b]))
        names += [f"{CLASSES[a]} to {CLASSES[b]}:\nclass means", "two test images", "their pixels"]
    figure = common.image_grid(torch.stack(rows), names)
    for pair in range(1, len(PAIRS)):
        figure.axes[0].axhline(3 * 30 * pair + 0.5, color=common.GRAY, linewidth=0.8)
    return figure


def plot_manifold(model, data):
    """Decoded points of the two dimensions with the most KL, in standard deviations of the prior;
    the others are 0. Where does one piece of clothing become another?"""
    top = mean_kl(model, data.test.images).argsort(descending=True)[:2].tolist()
    values = torch.arange(-2, 2.1, 0.4)
    z = torch.zeros(len(values), len(values), model.mu.out_features)
    z[:, :, top[0]] = values  # to the right
    z[:, :, top[-1]] = values.flip(0)[:, None]  # upwards
    images = model.decode(z.flatten(0, 1).to(model.mu.weight.device))
    names = [f"{value:.1f}" for value in values.tolist()]
    figure = common.image_grid(images.unflatten(0, z.shape[:2]), names[::-1], names)
    figure.axes[0].set(xlabel=f"z{top[0]}", ylabel=f"z{top[-1]}")
    return figure


def plot_samples(model):
    """Decoded samples of the prior. Which would pass for clothing?"""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, model.mu.out_features, generator=generator)
    images = model.decode(z.to(model.mu.weight.device))
    return common.image_grid(images.unflatten(0, (5, 10)))


def plot_latent_pairs(model, data):
    """mu of 2,000 test images. The name above a column is its x axis, that right of a row its y
    axis, with the mean KL. Which classes lie apart, which among each other?"""
    kl = mean_kl(model, data.test.images)
    top = kl.argsort(descending=True)[:8].tolist()
    mu = model.encode(data.test.images[:2000])[0].cpu()
    colors = [COLORS[label] for label in data.test.labels[:2000].tolist()]
    figure = common.Figure(figsize=(9, 9), layout="constrained")
    grid = figure.subplots(len(top), len(top), sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, y in enumerate(top):
        grid[row, row].text(0, 0, f"z{y}\n{kl[y]:.2f} nats", ha="center", va="center")
        for column, x in enumerate(top[:row]):
            axes = grid[row, column]
            axes.axis("on")
            axes.scatter(mu[:, x], mu[:, y], s=2, c=colors, linewidths=0)
    end = mu.abs().quantile(0.999).item()
    grid[0, 0].set(xlim=(-end, end), ylim=(-end, end), xticks=[], yticks=[])
    for name, color in zip(CLASSES, COLORS):
        grid[0, 0].scatter([], [], s=60, color=color, label=name)
    figure.legend(loc="upper right", frameon=False, fontsize=12)
    return figure


def animate_walk(model, data, frames=12):
    """A walk in the latent space, on straight lines from the mean of one class to that of the next:
    the square shows where. Every picture in the middle is decoded from one point."""
    means = class_means(model, data.train)[TOUR]
    z, angles = [], []
    for stop in range(10):
        for frame in range(frames):
            # The cosine slows the walk down at each class.
            share = (1 - math.cos(math.pi * frame / frames)) / 2
            z.append(means[stop].lerp(means[(stop + 1) % 10], share))
            angles.append(2 * math.pi * (stop + share) / 10)
    images = model.decode(torch.stack(z)).cpu()
    film = torch.ones(len(images), 480, 480)

    def paste(where, ink, angle, radius):
        """Pastes ink (..., N, N) with its centre on a circle around the middle."""
        size = ink.shape[-1]
        top = round(240 - radius * math.cos(angle) - size / 2)
        left = round(240 + radius * math.sin(angle) - size / 2)
        where[..., top : top + size, left : left + size] = 1 - ink

    paste(film, F.interpolate(images, scale_factor=8).squeeze(1), angle=0, radius=0)
    for i in range(0, len(images), frames):
        paste(film, F.interpolate(images[i : i + 1], scale_factor=2)[0, 0], angles[i], radius=206)
    for i in range(len(images)):
        paste(film[i], torch.ones(9, 9), angles[i], radius=160)
    return film


# explorer.html ------------------------------------------------------------------------------------


def save_explorer(path, model, data):
    """Fills explorer.html in with the decoder, test images and class means; says so where the page
    can't compute the decoder."""
    layers = []
    for layer in model.decoder.children():
        if not isinstance(layer, (nn.Linear, nn.LeakyReLU, nn.ReLU, nn.Sigmoid, nn.Unflatten)):
            print(f"no {path}: it can't compute {layer}", flush=True)
            return path.unlink(missing_ok=True)  # that of another decoder
        weights = {name: rounded(value, 5) for name, value in layer.named_parameters()}
        slope = getattr(layer, "negative_slope", 0)
        layers.append({"name": type(layer).__name__, "slope": slope, **weights})
    images = common.one_of_each_class(data.test)
    points, _ = model.encode(data.test.images[:2000])
    content = {
        "layers": layers,
        "kl": rounded(mean_kl(model, data.test.images), 3),
        "limit": points.abs().quantile(0.99).ceil().item(),
        "points": rounded(points, 2),
        "labels": data.test.labels[:2000].tolist(),
        "names": CLASSES,
        "colors": COLORS,
        "means": rounded(class_means(model, data.train), 3),
        "images": rounded(images.flatten(1), 3),
        "imageMu": rounded(model.encode(images)[0], 3),
    }
    template = Path(__file__).resolve().with_name("explorer.html").read_text(encoding="utf-8")
    common.save(path, template.replace("= DATA", f"= {json.dumps(content)}"))


def rounded(tensor, decimals):
    """A tensor as short lists for JSON."""
    return tensor.double().round(decimals=decimals).tolist()


COLUMNS = ["loss", "recon", "pca_l1", "kl", "active_dimensions"]
COLUMNS += ["knn_accuracy", "pca_knn_accuracy", "pixel_knn_accuracy"]
ABOUT = """
A fully connected VAE, trained on 50,000 images. `loss` is `recon`, the mean L1 error of a pixel,
plus alpha times `kl`, in nats. PCA is the best linear autoencoder in squared error. In an active
dimension mu varies with the image. `knn`, the vote of the ten nearest neighbours, is how well
latent vectors or pixels tell classes apart. [explorer.html](explorer.html) decodes any vector.
"""


def main(argv=None):
    parser = common.make_parser(__doc__, Config)
    args = common.parse_args(parser, Config, argv)
    data = common.load_data(args.data, args.device)
    study = args.out / "vae"
    runs = {study / f"seed{seed}": replace(args.config, seed=seed) for seed in args.seeds}
    if args.eval:
        return common.confirm(runs, load, evaluate, data)
    for folder, config in common.share_out(runs):
        torch.manual_seed(config.seed)
        model = VAE(config).to(args.device)
        common.run(model, data, config, args, folder, evaluate)

    metrics = common.read_runs(runs)
    if metrics is None:
        return
    summary = common.summarize(metrics, [])
    summary[0] |= common.pca_baseline(data, args.latent)
    summary[0]["pixel_knn_accuracy"] = common.knn_accuracy(data, lambda images: images.flatten(1))
    first = study / metrics[0]["folder"]
    model = load(first).to(args.device)
    figures = {
        "interpolation.gif": (animate_walk, model, data),
        "reconstructions.png": (plot_reconstructions, model, data),
        "manifold.png": (plot_manifold, model, data),
        "interpolations.png": (plot_interpolations, model, data),
        "latent_pairs.png": (plot_latent_pairs, model, data),
        "samples.png": (plot_samples, model),
        "losses.png": (common.plot_losses, first / "losses.csv", metrics[0]["best_epoch"]),
    }
    save_explorer(study / "explorer.html", model, data)
    common.save_study(study, ABOUT, metrics, summary, COLUMNS, figures, args)


if __name__ == "__main__":
    main()
