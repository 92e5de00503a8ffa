"""What does the 8-dimensional latent space of a fully connected VAE look like, and how well does it reconstruct?

    python vae.py --epochs 200        # test loss 0.0745 (mean of n=5 seeds)

The variational autoencoder of Kingma & Welling (2014, arXiv:1312.6114), with an L1 reconstruction loss.
"""
import binascii
import functools
import json
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import common

LATENT = 8
PAIRS = [(0, 9), (1, 3), (2, 4), (5, 7), (6, 8), (9, 5)]  # classes to interpolate between: (T-shirt, Ankle boot), ...

# ---------------------------------------------------------------------------------------------------------------- model

class VAE(nn.Module):
    """Images (B, 1, 28, 28) in [0, 1] to a Gaussian in LATENT dimensions, and from there back to images."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 128), nn.LeakyReLU(), nn.Linear(128, 64), nn.LeakyReLU())
        self.mu = nn.Linear(64, LATENT)
        self.logvar = nn.Linear(64, LATENT)
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 64), nn.LeakyReLU(), nn.Linear(64, 128), nn.LeakyReLU(),
            nn.Linear(128, 784), nn.Sigmoid(), nn.Unflatten(1, (1, 28, 28)))
        for layer in self.modules():  # with PyTorch's smaller default some latent dimensions stay unused
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.01)
                nn.init.zeros_(layer.bias)

    def encode(self, x):
        """mu and logvar, each (B, LATENT), clamped to [-10, 10] and [-20, 1].

        The bounds cap the KL of an image at 59.5 nats a dimension, 476 in all. Ordinary images (|mu| below 8, and
        logvar below 1, since a posterior wider than the prior costs KL and buys nothing) stay inside. Without the
        bounds, exp(logvar) or mu of a single unusual image can dwarf the loss of all others.
        """
        h = self.encoder(x)
        return self.mu(h).clamp(-10, 10), self.logvar(h).clamp(-20, 1)

    def reparameterize(self, mu, logvar):
        """A sample of N(mu, sigma^2) that gradients pass through (section 2.4 of the paper)."""
        noise = torch.randn(mu.shape).to(mu.device)  # drawn by the CPU: the same on every device
        return mu + torch.exp(0.5 * logvar) * noise

    def decode(self, z):
        """Latent vectors (B, LATENT) to images (B, 1, 28, 28)."""
        return self.decoder(z)

    def forward(self, x):
        mu, logvar = self.encode(x)
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar

# ----------------------------------------------------------------------------------------------------------------- loss

def kl_divergence(mu, logvar):
    """KL(N(mu, sigma^2) || N(0, 1)) in nats, summed over the latent dimensions: (B,). Appendix B of the paper."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)

def loss_fn(model, images, labels, alpha):
    """L = recon + alpha * kl: L1 averaged over pixels and images, and the KL averaged over images."""
    reconstruction, mu, logvar = model(images)
    recon = F.l1_loss(reconstruction, images)
    kl = kl_divergence(mu, logvar).mean()
    return {"loss": recon + alpha * kl, "recon": recon, "kl": kl}

# ----------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model, loss_fn, data):
    """The test metrics, the largest KL of an image in nats, and what the latent space keeps of the classes."""
    mu, logvar = model.encode(data.test.images)
    return {"test": common.test_loop(model, loss_fn, data.test),
            "kl_max": kl_divergence(mu, logvar).max().item(),
            "kl_max_val": kl_divergence(*model.encode(data.val.images)).max().item(),
            "latent_knn_accuracy": common.knn_accuracy(
                model.encode(data.train.images)[0], data.train.labels, mu, data.test.labels)}

# -------------------------------------------------------------------------------------------------------------- figures

def plot_losses(history):
    """Training loss every epoch, validation loss where it was evaluated, the best epoch marked."""
    figure = common.new_figure(7, 4)
    axes = figure.subplots()
    checks, best = {row["epoch"]: row["val"]["loss"] for row in history if "val" in row}, common.best_epoch(history)
    axes.plot([row["epoch"] for row in history], [row["train_loss"] for row in history],
              label="training (latest weights)")
    axes.plot(*zip(*checks.items()), "o-", markersize=3, color=common.COLORS[2], label="validation (EMA weights)")
    axes.plot(best, checks[best], "*", markersize=14, color="black", label=f"best: {checks[best]:.4f}, epoch {best}")
    losses = [row["train_loss"] for row in history] + list(checks.values())
    start = sorted(losses)[-1 - len(losses) // 20]  # the first epochs' fall would flatten all that follows
    axes.set(xlabel="epoch", ylabel="loss", ylim=(min(losses) - 0.05 * (start - min(losses)), start))
    axes.legend()
    return figure

def plot_latent_pairs(mu, labels, prototypes, pictures):
    """The test set's mu (N, LATENT), all pairs of dimensions, coloured by class. A circled number is the prototype of a
    class; its decoded image is in the corner."""
    figure = common.new_figure(10, 10)
    grid = figure.subplots(LATENT - 1, LATENT - 1, sharex="col", sharey="row")
    shuffled = torch.randperm(len(mu), generator=torch.Generator().manual_seed(0))[:3000]  # no class hides another
    points, colors = mu[shuffled].numpy(), [common.COLORS[label] for label in labels[shuffled].tolist()]
    limit = mu.abs().quantile(0.999).item()
    for row in range(LATENT - 1):
        for column in range(LATENT - 1):
            axes = grid[row, column]
            if column > row:
                axes.remove()
                continue
            axes.scatter(points[:, column], points[:, row + 1], s=1, c=colors, rasterized=True)
            for label, point in prototypes.items():
                axes.text(point[column], point[row + 1], label, fontsize=7, ha="center", va="center", bbox={
                    "boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": common.COLORS[label]})
            axes.set(xlim=(-limit, limit), ylim=(-limit, limit))
            if row == LATENT - 2:
                axes.set_xlabel(f"$\\mu_{column + 1}$")
            if column == 0:
                axes.set_ylabel(f"$\\mu_{row + 2}$")
    for place, (label, picture) in enumerate(zip(prototypes, pictures)):
        axes = figure.add_axes((0.36 + 0.13 * (place % 5), 0.87 - 0.14 * (place // 5), 0.1, 0.1))
        axes.imshow(picture.squeeze(0).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axes.set_title(f"{label} {common.CLASSES[label]}", fontsize=11)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=common.COLORS[label], linewidth=3)
    return figure

def plot_interpolations(model, prototypes):
    """Decoded steps on the line between the prototypes of two classes."""
    pairs = [(a, b) for a, b in PAIRS if a in prototypes and b in prototypes]
    steps = torch.linspace(0, 1, 9)[:, None].to(model.mu.weight.device)
    rows = [model.decode(torch.lerp(prototypes[a], prototypes[b], steps)) for a, b in pairs]
    names = [f"{common.CLASSES[a]} to\n{common.CLASSES[b]}" for a, b in pairs]
    return common.image_grid(torch.stack(rows), names)

def explorer(model, mu, prototypes, examples):
    """explorer.html filled in: the decoder's weights, the latent vectors of the classes, an example image of each."""
    base64 = lambda tensor: binascii.b2a_base64(bytes(tensor.cpu().view(torch.uint8).tolist()), newline=False).decode()
    linears = [layer for layer in model.decoder if isinstance(layer, nn.Linear)]
    weights = torch.cat([tensor.flatten() for layer in linears for tensor in (layer.weight, layer.bias)])
    low = mu.quantile(0.001, 0).clamp(max=-4).tolist()  # at least what the prior draws
    high = mu.quantile(0.999, 0).clamp(min=4).tolist()
    histograms = [torch.histc(mu[:, i], 40, low[i], high[i]).tolist() for i in range(LATENT)]
    classes = {common.CLASSES[label]: {"prototype": prototype.tolist(), "mu": model.encode(image)[0].flatten().tolist(),
                                       "pixels": base64((255 * image).byte().flatten())}
               for (label, prototype), image in zip(prototypes.items(), examples)}
    data = {"sizes": [LATENT, *(layer.out_features for layer in linears)], "weights": base64(weights),
            "low": low, "high": high, "histograms": histograms, "classes": classes}
    return Path(__file__).with_name("explorer.html").read_text().replace("= DATA", f"= {json.dumps(data)}")

@torch.no_grad()
def plot(model, history, data):
    """The five figures and the explorer page, {file name: content}. A prototype is the mean of mu over the training
    images of a class (as in Snell et al., 2017, arXiv:1703.05175)."""
    originals, names = common.one_of_each_class(data.test)
    mu, train_mu = (model.encode(split.images)[0] for split in (data.test, data.train))
    prototypes = {label: train_mu[data.train.labels == label].mean(0) for label in data.test.labels.unique().tolist()}
    pictures = model.decode(torch.stack(list(prototypes.values()))).cpu()
    noise = torch.randn(50, LATENT, generator=torch.Generator().manual_seed(0)).to(mu.device)
    return {
        "losses.png": plot_losses(history),
        "reconstructions.png": common.image_grid(
            torch.stack([originals, model.decode(model.encode(originals)[0])]), ["original", "reconstruction"], names),
        "latent_pairs.png": plot_latent_pairs(
            mu.cpu(), data.test.labels.cpu(), {label: point.tolist() for label, point in prototypes.items()}, pictures),
        "interpolations.png": plot_interpolations(model, prototypes),
        "samples.png": common.image_grid(model.decode(noise).view(5, 10, 1, 28, 28)),
        "explorer.html": explorer(model, mu.cpu(), prototypes, originals),
    }

# ----------------------------------------------------------------------------------------------------------------- main

@common.cli()
def main(argv=None):
    # Why weight decay: pixels that are nearly always black train their weights rarely, in steps that Adam makes large.
    # Without decay these weights grow, and with them the KL of images that are bright there.
    parser = common.make_parser(__doc__, epochs=200, batch_size=128, lr=6e-3, patience=25, val_every=5,
                                weight_decay=0.01, ema_decay=0.999)
    parser.add_argument("--alpha", type=common.number(float, 0, 1000), default=1e-3,
                        help="weight of the KL (default: %(default)s)")
    args = common.parse_args(parser, argv, "vae")
    # At the full rate from the start, some latent dimensions collapse. Runs below 40 epochs warm up in fewer steps.
    args.warmup_steps = min(1000, 25 * args.epochs)
    data = common.load_data(args.data, args.device)
    torch.manual_seed(args.seed)
    model = VAE().to(args.device)
    loss = functools.partial(loss_fn, alpha=args.alpha)
    common.run(args, model, loss, data, evaluate=lambda model: evaluate(model, loss, data),
               plot=lambda model, history: plot(model, history, data))

if __name__ == "__main__":
    main()
