"""What does the 8-dimensional latent space of a fully connected VAE (Kingma & Welling, 2014,
arXiv:1312.6114) look like, and how well does it reconstruct?

    python vae.py --seeds 5        # test loss 0.0745 (n=5)
"""

import base64
import json
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import common

PAIRS = [(0, 9), (1, 3), (2, 4), (5, 7), (6, 8), (9, 5)]  # classes to interpolate between
COUNT = 2000  # pairs of test images, and samples, whose distances are measured


@dataclass(frozen=True)
class Config(common.Config):
    epochs: int = 200
    batch_size: int = 128
    lr: float = 6e-3
    # Without decay the weights of pixels that are nearly always black grow, and the KL with them.
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    val_every: int = 5
    patience: int = 25
    alpha: float = common.option(1e-3, "weight of the KL", low=0, high=1000)
    latent: int = common.option(8, "latent dimensions", low=1, high=4096)


# model and loss -----------------------------------------------------------------------------------


class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to a Gaussian in the latent space, and back to images."""

    def __init__(self, config):
        super().__init__()
        self.alpha = config.alpha
        self.bounded = True  # `evaluate` also measures the loss without the bounds of `encode`
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.LeakyReLU(), nn.Linear(128, 64), nn.LeakyReLU()
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
        # With PyTorch's smaller default initialisation more latent dimensions collapse.
        linears = [layer for layer in self.modules() if isinstance(layer, nn.Linear)]
        for layer in linears:
            nn.init.kaiming_normal_(layer.weight, a=0.01)
            nn.init.zeros_(layer.bias)
        # The loss falls faster from a first bias that centres the images (their mean pixel is
        # 0.286) and from the same output for every z: each pixel sigmoid(-2) = 0.12.
        first, last = linears[0], linears[-1]
        first.bias.data = -0.286 * first.weight.data.sum(1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, -2)

    def encode(self, images):
        """mu and logvar, each (B, latent), clamped to [-10, 10] and [-20, 1].

        The bounds cap the KL at 59.5 nats a dimension. Ordinary images stay inside. Without the
        bounds, mu or exp(logvar) of a single unusual image can dwarf the loss of all others.
        """
        h = self.encoder(images)
        mu, logvar = self.mu(h), self.logvar(h)
        if self.bounded:
            mu, logvar = mu.clamp(-10, 10), logvar.clamp(-20, 1)
        return mu, logvar

    def reparameterize(self, mu, logvar):
        """A sample of N(mu, sigma^2) that gradients pass through (section 2.4 of the paper)."""
        noise = torch.randn(mu.shape).to(mu.device)  # drawn by the CPU: the same on every device
        return mu + torch.exp(0.5 * logvar) * noise

    def decode(self, z):
        """Latent vectors (B, latent) to images (B, 1, 28, 28)."""
        return self.decoder(z)

    def kl(self, mu, logvar):
        """KL(N(mu, sigma^2) || N(0, 1)) in nats of each dimension, (B, latent). Appendix B."""
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)

    def forward(self, images):
        mu, logvar = self.encode(images)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

    def loss(self, images, labels):
        """recon + alpha * kl. The L1 loss is averaged over pixels and images; the KL is summed
        over the dimensions and averaged over images."""
        reconstruction, mu, logvar = self(images)
        recon = F.l1_loss(reconstruction, images)
        kl = self.kl(mu, logvar).sum(1).mean()
        return {"loss": recon + self.alpha * kl, "recon": recon, "kl": kl}


def load(folder):
    """The trained VAE in a run's folder, in evaluation mode, without gradients."""
    path = Path(folder) / "model.pt"
    model = VAE(Config(**common.read(path)["config"]))
    common.read(path, model=model)
    return model.eval().requires_grad_(False)


# evaluation ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data):
    """What is measured on the test set: the losses, with and without the bounds of `encode`, what
    the latent space keeps of the classes, and what lies between two images."""
    images, labels = data.test
    test = common.test_loop(model, data.test)
    mu, logvar = model.encode(images)
    kl = model.kl(mu, logvar)  # (N, latent)
    test["kl_max"] = kl.sum(1).max().item()
    # "Active units" (Burda et al., 2016, arXiv:1509.00519), by the variance of mu over images.
    test["active_dimensions"] = (mu.var(0) > 0.01).sum().item()
    model.bounded = False
    test["loss_unbounded"] = common.test_loop(model, data.test)["loss"]
    free_mu, free_logvar = model.encode(images)
    model.bounded = True
    at_bound = (free_mu != mu) | (free_logvar != logvar)
    test["images_at_bound"] = at_bound.any(1).sum().item()
    train_mu, _ = model.encode(data.train.images)
    predicted = common.knn(train_mu, data.train.labels, mu)
    test["latent_knn_accuracy"] = common.accuracy(predicted, labels)
    return {
        "test": {**test, **measure_lines(model, data)},
        "loss_std": common.loss_std(model, data.test),
        "kl_dimensions": kl.mean(0).tolist(),
        "latent_knn_confusion": common.confusion(predicted, labels),
    }


def decode_lines(model, data):
    """Nine equally spaced points, decoded, on the lines between the mu of COUNT pairs of test
    images of different classes, (9, COUNT, 1, 28, 28). The pairs are the same for every model."""
    mu, _ = model.encode(data.test.images)
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(mu), (3 * COUNT // 2, 2), generator=generator)
    labels = data.test.labels[pairs].cpu()
    different = labels[:, 0] != labels[:, 1]  # a tenth are of one class
    pairs = pairs[different][:COUNT]
    start, end = mu[pairs.T]
    images = [model.decode(start.lerp(end, i / 8)) for i in range(9)]
    return torch.stack(images)


def measure_lines(model, data):
    """How far from a training image (`nearest_mse`) are the midpoints of `decode_lines`, beside
    the ends, blends of the two ends in pixels, and samples of the prior? `step_ratio` is the
    largest of the 8 steps over the mean step, as root mean squared changes of the pixels."""
    line, train = decode_lines(model, data), data.train.images
    midpoint = common.nearest_mse(line[4], train)
    blend = common.nearest_mse((line[0] + line[8]) / 2, train)
    steps = line.diff(dim=0).square().mean((2, 3, 4)).sqrt()  # (8, pairs)
    return {
        "nearest_reconstruction": common.nearest_mse(line[0], train),
        "nearest_midpoint": midpoint,
        "nearest_blend": blend,
        "midpoint_minus_blend": midpoint - blend,
        "nearest_sample": common.nearest_mse(sample(model, COUNT), train),
        "step_ratio": (steps.amax(0) / steps.mean(0)).mean().item(),
    }


def sample(model, count):
    """Decoded samples of the prior (count, 1, 28, 28), the same latent vectors every time."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(count, model.mu.out_features, generator=generator)
    return model.decode(z.to(model.mu.weight.device))


# figures ------------------------------------------------------------------------------------------


def plot_kl(kl):
    """The mean KL of each latent dimension, the largest first."""
    values, order = torch.tensor(kl).sort(descending=True)
    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.bar(range(len(kl)), values.tolist())
    axes.set_xticks(range(len(kl)), (order + 1).tolist())
    axes.set(xlabel="latent dimension", ylabel="mean KL of the\ntest images (nats)")
    return figure


def plot_distances(model, data, run, row):
    """The distance to the nearest training image on 500 of the `decode_lines`, beside that of the
    `run`'s samples and of the test images in the summary's `row`."""
    line, train = decode_lines(model, data)[:, :500], data.train.images
    positions = [i / 8 for i in range(9)]
    latent = [common.nearest_mse(images, train) for images in line]
    pixels = [common.nearest_mse(line[0].lerp(line[8], t), train) for t in positions]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(positions, pixels, "s--", color=common.COLORS[8], label="blended in pixels")
    axes.axhline(row["nearest_test_image"], color="black", linestyle="-.", label="test images")
    samples = run["test"]["nearest_sample"]
    axes.axhline(samples, color="black", linestyle=":", label="samples of the prior")
    axes.plot(positions, latent, "o-", label="blended in the latent space, then decoded")
    axes.set(xlabel="position between two reconstructions (500 pairs)", ylim=(0, None))
    axes.set_ylabel("MSE to the nearest training image")
    axes.legend()
    return figure


def plot_latent_pairs(model, data, kl, means):
    """The mu of the first 3,000 test images in all pairs of the dimensions with the largest KL, at
    most 8, coloured by class. A circle is the mean of a class."""
    dimensions = torch.tensor(kl).argsort(descending=True)[:8].tolist()
    size = max(1, len(dimensions) - 1)
    figure, grid = plt.subplots(size, size, figsize=(10, 10), squeeze=False)
    points = model.encode(data.test.images[:3000])[0].cpu()
    colors = [common.COLORS[label] for label in data.test.labels[:3000].tolist()]
    end = points.abs().quantile(0.999).item()
    for row, y in enumerate(dimensions[1:] or dimensions):
        for column, x in enumerate(dimensions[:size]):
            axes = grid[row, column]
            if column > row:
                axes.remove()
                continue
            axes.scatter(points[:, x], points[:, y], s=1, c=colors, rasterized=True)
            axes.scatter(means[:, x], means[:, y], s=45, c=common.COLORS, edgecolors="black")
            axes.axis([-end, end, -end, end])
            axes.set(xlabel=f"mu {x + 1}", ylabel=f"mu {y + 1}")
            axes.label_outer()
    dots = [plt.Line2D([], [], marker="o", linestyle="", color=color) for color in common.COLORS]
    place = "upper right" if size > 4 else "outside right upper"
    shown = f"{len(dimensions)} of {len(kl)} dimensions"
    title = f"{len(points):,} test images,\n{shown},\ncircles: class means"
    figure.legend(dots, common.CLASSES, loc=place, title=title)
    return figure


def plot_interpolations(model, means):
    """Decoded steps on the line between the means of two classes."""
    steps = torch.linspace(0, 1, 9, device=means.device)[:, None]
    rows, names = [], []
    for a, b in PAIRS:
        rows.append(model.decode(torch.lerp(means[a], means[b], steps)))
        names.append(f"{common.CLASSES[a]} to\n{common.CLASSES[b]}")
    return common.image_grid(torch.stack(rows), names)


def save_explorer(path, model, data, means, plane):
    """Writes explorer.html with its data filled in: the decoder, the latent vectors of test images,
    the classes' means and the map's plane. Says so where the page can't compute the decoder."""
    layers, weights = [], []
    for layer in model.decoder:
        layers.append({"name": type(layer).__name__, "slope": getattr(layer, "negative_slope", 0)})
        if isinstance(layer, nn.Linear):
            layers[-1]["outputs"] = layer.out_features
            weights += [layer.weight.flatten(), layer.bias]
    known = {"Linear", "LeakyReLU", "ReLU", "Sigmoid", "Unflatten"}
    own_decode = not torch.equal(model.decode(means), model.decoder(means))  # of a subclass
    if own_decode or not {layer["name"] for layer in layers} <= known:
        print("no explorer.html: the page can't compute this decoder", flush=True)
        path.unlink(missing_ok=True)  # that of another decoder
        return
    mu, logvar = model.encode(data.test.images)
    images, _ = common.one_of_each_class(data.test)
    image_mu, image_logvar = model.encode(images)
    content = {
        "layers": layers,
        "weights": base64.b64encode(torch.cat(weights).cpu().numpy()).decode(),
        "kl": model.kl(mu, logvar).mean(0).tolist(),
        "low": mu.cpu().quantile(0.001, 0).clamp(max=-4).tolist(),  # covers the prior
        "high": mu.cpu().quantile(0.999, 0).clamp(min=4).tolist(),
        "points": [[round(x, 3) for x in point] for point in mu[:2000].tolist()],
        "labels": data.test.labels[:2000].tolist(),
        "plane": plane.tolist(),
        "names": common.CLASSES,
        "colors": common.COLORS,
        "means": means.tolist(),
        "images": (255 * images).byte().flatten(1).tolist(),
        "imageMu": image_mu.tolist(),
        "imageKl": model.kl(image_mu, image_logvar).sum(1).tolist(),
    }
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    common.save(path, template.replace("= DATA", f"= {json.dumps(content)}"))


@torch.no_grad()
def plot(model, data, run, row, study):
    """The figures {name: figure} of a run and the summary's row, and explorer.html in `study`."""
    # Prototypes of the classes are the means of their mu (as in Snell et al., 2017).
    train_mu, _ = model.encode(data.train.images)
    means = common.class_means(train_mu, data.train.labels)
    plane = common.discriminant_plane(train_mu, data.train.labels)
    save_explorer(study / "explorer.html", model, data, means, plane)
    images, names = common.one_of_each_class(data.test)
    mu, _ = model.encode(images)
    rows = torch.stack([images, model.decode(mu), model.decode(means)])
    return {
        "losses": common.plot_losses(study / run["folder"] / "losses.csv", run["best_epoch"]),
        "reconstructions": common.image_grid(rows, ["original", "decoded mu", "class mean"], names),
        "interpolations": plot_interpolations(model, means),
        "interpolation_distances": plot_distances(model, data, run, row),
        "samples": common.image_grid(sample(model, 50).unflatten(0, (5, 10))),
        "kl_dimensions": plot_kl(run["kl_dimensions"]),
        "latent_pairs": plot_latent_pairs(model, data, run["kl_dimensions"], means.cpu()),
    }


def main(argv=None):
    parser = common.make_parser(__doc__, Config)
    args = common.parse_args(parser, Config, argv)
    data = common.load_data(args.data, args.device)
    study = args.out / "vae"
    runs = {study / f"seed{seed}": replace(args.config, seed=seed) for seed in args.seeds}
    for folder, config in common.share_out(runs, args):
        torch.manual_seed(config.seed)
        model = VAE(config).to(args.device)
        common.run(model, data, config, args, folder, evaluate)

    metrics = common.read_runs(runs, args)
    if metrics is None:
        return
    (row,) = common.summarize(metrics, [])
    row |= common.baselines(data, [args.latent])[args.latent]  # what needs no VAE
    row["nearest_test_image"] = common.nearest_mse(data.test.images[:COUNT], data.train.images)
    model = load(study / metrics[0]["folder"]).to(args.device)
    figures = plot(model, data, metrics[0], row, study)
    common.save_study(study, [row], metrics, figures, args)


if __name__ == "__main__":
    common.cli(main)
