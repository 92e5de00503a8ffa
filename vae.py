"""What does the 8-dimensional latent space of a fully connected VAE (Kingma & Welling, 2014,
arXiv:1312.6114) look like, and how well does it reconstruct?

    python vae.py --seeds 5        # test loss 0.0745 (mean over the seeds)
"""

import base64
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import stdev

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

import common

PAIRS = [(0, 9), (1, 3), (2, 4), (5, 7), (6, 8), (9, 5)]  # classes to interpolate between


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
        # With PyTorch's smaller default initialisation some latent dimensions collapse.
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.01)
                nn.init.zeros_(layer.bias)

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


def load(path):
    """The trained VAE of a model.pt, in evaluation mode."""
    model = VAE(Config(**common.read(path)["config"]))
    common.read(path, model=model)
    return model.eval()


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
    model.bounded = False
    test["loss_unbounded"] = common.test_loop(model, data.test)["loss"]
    free_mu, free_logvar = model.encode(images)
    model.bounded = True
    at_bound = ((free_mu != mu) | (free_logvar != logvar)).any(1)
    test["images_at_bound"] = at_bound.sum().item()

    train_mu, _ = model.encode(data.train.images)
    predicted = common.knn(train_mu, data.train.labels, mu)
    test["latent_knn_accuracy"] = common.accuracy(predicted, labels)
    test |= interpolate(model, data, mu)

    # How far the test loss depends on the noise, and on which images are in the test set.
    draws = [common.test_loop(model, data.test, seed=seed)["loss"] for seed in range(20)]
    parts = [common.Split(images[i::20], labels[i::20]) for i in range(20)]
    losses = [common.test_loop(model, part)["loss"] for part in parts]
    return {
        "test": test,
        "loss_std": {"noise": stdev(draws), "images": stdev(losses) / len(parts) ** 0.5},
        "kl_dimensions": kl.mean(0).tolist(),
        "latent_knn_confusion": common.confusion(predicted, labels),
    }


def nearest_mse(images, train):
    """Mean squared error, a pixel, between `images` and the nearest of the images `train`."""
    train = train.flatten(1)
    chunks = images.flatten(1).split(1000)
    nearest = [torch.cdist(chunk, train).amin(1) for chunk in chunks]
    return torch.cat(nearest).square().mean().item() / train.shape[1]


def interpolate(model, data, mu):
    """Lines between the `mu` of 2,000 pairs of test images of different classes, the same pairs for
    every model. How far from a training image (`nearest_mse`) are the decoded midpoints, beside
    the decoded ends, blends of the decoded ends in pixels, and samples of the prior? `step_ratio`
    is the largest of 8 steps over the mean step, as root mean squared changes of the pixels."""
    labels = data.test.labels.cpu()
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(len(labels), (3000, 2), generator=generator)
    pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]][:2000].to(mu.device)
    start, end = mu[pairs[:, 0]], mu[pairs[:, 1]]
    line = torch.stack([model.decode(torch.lerp(start, end, i / 8)) for i in range(9)])
    steps = line.diff(dim=0).square().mean((2, 3, 4)).sqrt()  # (8, pairs)
    noise = torch.randn(2000, mu.shape[1], generator=generator).to(mu.device)
    train = data.train.images
    return {
        "nearest_reconstruction": nearest_mse(line[0], train),
        "nearest_midpoint": nearest_mse(line[4], train),
        "nearest_blend": nearest_mse((line[0] + line[8]) / 2, train),
        "nearest_sample": nearest_mse(model.decode(noise), train),
        "step_ratio": (steps.amax(0) / steps.mean(0)).mean().item(),
    }


def summarize(runs, data):
    """One row: the test metrics over the seeds, beside what needs no VAE."""
    (row,) = common.summarize(runs, [])
    latent = runs[0]["config"]["latent"]
    row |= common.baselines(data, [latent])[latent]
    tests = [run["test"] for run in runs]
    gains = [test["latent_knn_accuracy"] - row["pca_knn_accuracy"] for test in tests]
    row |= common.mean_std_ci("knn_minus_pca", gains)
    gains = [test["latent_knn_accuracy"] - row["pixel_knn_accuracy"] for test in tests]
    row |= common.mean_std_ci("knn_minus_pixel", gains)
    gains = [test["nearest_midpoint"] - test["nearest_blend"] for test in tests]
    row |= common.mean_std_ci("midpoint_minus_blend", gains)
    return [row]


# figures ------------------------------------------------------------------------------------------


def plot_losses(path, best_epoch):
    """The losses in a losses.csv, with the epoch marked whose weights are kept."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    train = {int(row["epoch"]): float(row["train_loss"]) for row in rows}
    val = {int(row["epoch"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(train.keys(), train.values(), ".-", label="training (latest weights)")
    label, red = "validation (EMA weights)", common.COLORS[2]
    axes.plot(val.keys(), val.values(), "o-", markersize=3, color=red, label=label)
    label = f"kept: {val[best_epoch]:.4f}, epoch {best_epoch}"
    axes.plot(best_epoch, val[best_epoch], "*", markersize=14, color="black", label=label)
    axes.set(xlabel="epoch", ylabel="loss", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    return figure


def plot_latent_pairs(mu, labels, dimensions, prototypes):
    """3,000 of the test set's mu (N, latent) in all pairs of `dimensions`, those of the
    largest KL, coloured by class. A circled number is the prototype of a class."""
    size = max(1, len(dimensions) - 1)
    inches = max(5, 1.45 * size)
    figure, grid = plt.subplots(size, size, figsize=(inches, inches), squeeze=False)
    # Shuffled, so that no class hides another.
    chosen = torch.randperm(len(mu), generator=torch.Generator().manual_seed(0))[:3000]
    points = mu[chosen].numpy()
    colors = [common.COLORS[label] for label in labels[chosen].tolist()]
    limit = mu.abs().quantile(0.999).item()
    style = {"fontsize": 7, "ha": "center", "va": "center"}
    for row, y in enumerate(dimensions[1:] or dimensions):
        for column, x in enumerate(dimensions[:size]):
            axes = grid[row, column]
            if column > row:
                axes.remove()
                continue
            axes.scatter(points[:, x], points[:, y], s=1, c=colors, rasterized=True)
            for label, point in enumerate(prototypes.tolist()):
                box = {"boxstyle": "circle,pad=0.15", "fc": "white", "ec": common.COLORS[label]}
                axes.text(point[x], point[y], label, bbox=box, **style)
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
            axes.label_outer()
            if row == size - 1:
                axes.set_xlabel(f"$\\mu_{{{x + 1}}}$")
            if column == 0:
                axes.set_ylabel(f"$\\mu_{{{y + 1}}}$")
    names = [f"{label}  {name}" for label, name in enumerate(common.CLASSES)]
    dots = [plt.Line2D([], [], marker="o", linestyle="", color=color) for color in common.COLORS]
    place = "upper right" if size > 4 else "outside right upper"
    title = f"{len(dimensions)} of {mu.shape[1]} dimensions,\nclasses and prototypes"
    figure.legend(dots, names, loc=place, title=title)
    return figure


def plot_interpolations(model, prototypes):
    """Decoded steps on the line between the prototypes of two classes."""
    steps = torch.linspace(0, 1, 9, device=prototypes.device)[:, None]
    rows, names = [], []
    for a, b in PAIRS:
        rows.append(model.decode(torch.lerp(prototypes[a], prototypes[b], steps)))
        names.append(f"{common.CLASSES[a]} to\n{common.CLASSES[b]}")
    return common.image_grid(torch.stack(rows), names)


def explorer(model, mu, prototypes, examples):
    """explorer.html with its data filled in: the decoder, the ranges of mu, and the prototype and
    an example image of each class. None where the page can't compute the decoder."""
    layers, weights = [], []
    for layer in model.decoder:
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            weights += [layer.weight.flatten(), layer.bias]
            layers.append({"name": "Linear", "outputs": layer.out_features})
        elif isinstance(layer, nn.LeakyReLU | nn.ReLU):
            layers.append({"name": "LeakyReLU", "slope": getattr(layer, "negative_slope", 0)})
        elif isinstance(layer, nn.Sigmoid):
            layers.append({"name": "Sigmoid"})
        elif not isinstance(layer, nn.Unflatten):
            layers.append(None)
    if None in layers or not torch.equal(model.decode(prototypes), model.decoder(prototypes)):
        print("no explorer.html: the page can't compute this decoder", flush=True)
        return None
    low = mu.quantile(0.001, 0).clamp(max=-4).tolist()  # covers the prior
    high = mu.quantile(0.999, 0).clamp(min=4).tolist()
    ranges = zip(mu.T, low, high)
    histograms = [torch.histc(column, 40, start, end).tolist() for column, start, end in ranges]
    classes = {}
    for name, prototype, image in zip(common.CLASSES, prototypes, examples):
        classes[name] = {
            "prototype": prototype.tolist(),
            "mu": model.encode(image)[0].flatten().tolist(),
            "pixels": base64.b64encode((255 * image).byte().cpu().numpy()).decode(),
        }
    data = {
        "layers": layers,
        "weights": base64.b64encode(torch.cat(weights).cpu().numpy()).decode(),
        "low": low,
        "high": high,
        "histograms": histograms,
        "classes": classes,
    }
    template = Path(__file__).with_name("explorer.html").read_text(encoding="utf-8")
    return template.replace("= DATA", f"= {json.dumps(data)}")


@torch.no_grad()
def plot(model, data, run, study):
    """The figures {name: figure} of a run and, in the folder `study`, explorer.html."""
    mu, logvar = model.encode(data.test.images)
    dimensions = model.kl(mu, logvar).mean(0).argsort(descending=True)[:8].sort().values.tolist()
    train_mu, _ = model.encode(data.train.images)
    # A prototype is the mean of mu over the training images of a class (as in Snell et al., 2017).
    prototypes = torch.stack([train_mu[data.train.labels == label].mean(0) for label in range(10)])
    originals, names = common.one_of_each_class(data.test)
    decoded = model.decode(model.encode(originals)[0])
    rows = torch.stack([originals, decoded, model.decode(prototypes)])
    noise = torch.randn(50, mu.shape[1], generator=torch.Generator().manual_seed(0)).to(mu.device)

    mu, labels = mu.cpu(), data.test.labels.cpu()
    (study / "explorer.html").unlink(missing_ok=True)  # that of another decoder
    page = explorer(model, mu, prototypes, originals)
    if page is not None:
        common.save(study / "explorer.html", page)
    return {
        "losses": plot_losses(study / run["folder"] / "losses.csv", run["best_epoch"]),
        "reconstructions": common.image_grid(rows, ["original", "decoded mu", "prototype"], names),
        "latent_pairs": plot_latent_pairs(mu, labels, dimensions, prototypes.cpu()),
        "interpolations": plot_interpolations(model, prototypes),
        "samples": common.image_grid(model.decode(noise).view(5, 10, 1, 28, 28)),
    }


def main(argv=None):
    args = common.parse_args(common.make_parser(__doc__, Config), Config, argv)
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
    model = load(study / metrics[0]["folder"] / "model.pt").to(args.device)
    figures = plot(model, data, metrics[0], study)
    common.save_study(study, summarize(metrics, data), metrics, figures, args)


if __name__ == "__main__":
    common.cli(main)
