"""How does the size of the latent space trade against reconstruction in a convolutional autoencoder?

    python conv_ae.py                          # sizes 2 to 128: 0.41 to 0.59 of PCA's error (n=1, 12 epochs)
    python conv_ae.py --seeds 3 --resume       # two more seeds of each size
    python conv_ae.py --latents 24 --resume    # one more size, in the same table and figures

The autoencoder of Hinton & Salakhutdinov (2006) with convolutions, trained on the mean squared error.
"""
import functools

import torch
from torch import nn
from torch.nn import functional as F

import common

# ---------------------------------------------------------------------------------------------------------------- model

class Encoder(nn.Module):
    """Images (B, 1, 28, 28) to feature maps (B, 128, 5, 5), and those to the latent vector (B, latent)."""

    def __init__(self, latent):
        super().__init__()
        norm = functools.partial(nn.BatchNorm2d, momentum=0.5)  # 0.1 takes 50 steps; the EMA smooths
        self.features = nn.Sequential(  # pooling first leaves a quarter of the work for the normalisation and the ReLU
            nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), norm(32), nn.ReLU(),  # to 14x14
            nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), norm(64), nn.ReLU(),  # to 7x7
            nn.Conv2d(64, 128, 3), norm(128), nn.ReLU())  # to 5x5: half the work of a padded one
        self.project = nn.Linear(128 * 5 * 5, latent)

    def forward(self, x):
        return self.project(self.features(x).flatten(1))

class Decoder(nn.Module):
    """Latent vectors (B, latent) to images (B, 1, 28, 28) in [0, 1].

    Two paths lead to the 7x7 maps: the one with a hidden layer helps a small latent space (8), the linear one makes a
    large latent space (128) learn faster.
    """

    def __init__(self, latent):
        super().__init__()
        self.linear = nn.Linear(latent, 64 * 7 * 7)
        self.hidden = nn.Sequential(nn.Linear(latent, 128), nn.ReLU(), nn.Linear(128, 64 * 7 * 7))
        self.stages = nn.Sequential(
            nn.ReLU(), nn.Unflatten(1, (64, 7, 7)),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),  # to 14x14
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1), nn.Sigmoid())  # to 28x28

    def forward(self, z):
        return self.stages(self.linear(z) + self.hidden(z))

class Autoencoder(nn.Module):
    def __init__(self, latent):
        super().__init__()
        self.encoder = Encoder(latent)
        self.decoder = Decoder(latent)

    def forward(self, x):
        return self.decoder(self.encoder(x))

def loss_fn(model, images, labels):
    """Mean over pixels and images of the squared error, which is the loss, and of the absolute error."""
    reconstruction = common.forward(model, images)
    mse = F.mse_loss(reconstruction, images)
    return {"loss": mse, "mse": mse, "l1": F.l1_loss(reconstruction, images)}

# ------------------------------------------------------------------------------------------------------------- baseline

def pca_errors(train, test, sizes):
    """Test MSE of PCA at each size: the best linear autoencoder (Baldi & Hornik, 1989). Images are (N, 1, 28, 28).

    The leading eigenvectors of the training images' covariance, in float64; a size above 784 keeps all of them.
    """
    train, test = train.flatten(1).cpu().double(), test.flatten(1).cpu().double()
    mean = train.mean(0)
    train -= mean  # in place: float64 images take 300 MB
    _, vectors = torch.linalg.eigh(train.T @ train / len(train))  # ascending eigenvalues
    errors = {}
    for size in sizes:
        basis = vectors[:, -min(size, vectors.shape[1]):]
        projected = (test - mean) @ basis @ basis.T + mean
        errors[size] = F.mse_loss(projected, test).item()
    return errors

# -------------------------------------------------------------------------------------------------------------- figures

def plot_errors(summary, epochs):
    figure = common.new_figure(7.5, 4.8)
    axes = figure.subplots()
    sizes, means = [row["latent"] for row in summary], [row["mse_mean"] for row in summary]
    pca = [row["pca_mse"] for row in summary]
    axes.plot(sizes, pca, "s--", color=common.COLORS[8], label="PCA, the best linear autoencoder")
    seeds = sorted({row["n"] for row in summary})
    axes.errorbar(sizes, means, [row["mse_std"] or 0 for row in summary], fmt="o-", capsize=3, color=common.COLORS[0],
                  label=f"convolutional autoencoder (mean and std, n={'-'.join(map(str, seeds))})")
    for row in summary:
        point = row["latent"], row["mse_mean"]
        axes.annotate(f"×{row['ratio']:.2f}", point, (0, -18), textcoords="offset points", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, sizes)
    low, high = min(means) * 0.7, max(*pca, *means) * 1.2
    ticks = [tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="latent dimensions", ylabel="test MSE (pixels in [0, 1])", ylim=(low, high),
             title=f"{epochs} epochs of training")
    axes.legend(title="×: autoencoder over PCA", alignment="left")
    axes.grid(alpha=0.3)
    return figure

@torch.no_grad()
def plot_reconstructions(folders, data):
    """One row per latent size, the originals on top. `folders` is {latent size: folder with the weights}."""
    images, names = common.one_of_each_class(data.test)
    rows, labels = [images], ["original"]
    for latent, folder in sorted(folders.items()):
        model = Autoencoder(latent).to(images.device).eval()
        common.load(folder / "model.pt", model=model)
        rows.append(model(images))
        labels.append(f"{latent} dimensions")
    return common.image_grid(torch.stack(rows), labels, names)

# ----------------------------------------------------------------------------------------------------------------- main

def summarize(runs, data):
    """One row per latent size: the runs' mean, std (null for one run) and n, and PCA's error beside them."""
    sizes = sorted({run["config"]["latent"] for run in runs})
    pca = pca_errors(data.train.images, data.test.images, sizes)
    summary = []
    for size in sizes:
        same = [run for run in runs if run["config"]["latent"] == size]
        row = {"latent": size, "n": len(same), "parameters": same[0]["parameters"]}
        for metric in ("mse", "l1"):
            row[f"{metric}_mean"], row[f"{metric}_std"] = common.mean_std([run["test"][metric] for run in same])
        summary.append({**row, "pca_mse": pca[size], "ratio": row["mse_mean"] / pca[size]})
    return summary

@common.cli()
def main(argv=None):
    parser = common.make_parser(__doc__, epochs=12, batch_size=64, lr=8e-3, patience=0, val_every=1)
    parser.add_argument("--latents", type=common.number(int, 1, 4096), nargs="+", default=[2, 4, 8, 16, 32, 64, 128],
                        metavar="SIZE", help="latent dimensions (default: %(default)s)")
    parser.add_argument("--seeds", type=common.number(int, 1, 1000), default=1, metavar="N",
                        help="runs of each size, with seeds from --seed on (default: %(default)s)")
    args = common.parse_args(parser, argv, "conv_ae")
    data = common.load_data(args.data, args.device)
    runs = {f"latent{latent:03d}-seed{seed}": {"latent": latent, "seed": seed}
            for seed in range(args.seed, args.seed + args.seeds) for latent in args.latents}
    del args.latents, args.seeds  # what is left is the same for all runs

    def make_model(args):
        return Autoencoder(args.latent).to(args.device, memory_format=torch.channels_last)

    def train(args, model):
        common.run(args, model, loss_fn, data)

    def plot(runs):
        summary = summarize(runs, data)
        figures = {"latent_vs_error.png": plot_errors(summary, args.epochs)}
        folders = {run["config"]["latent"]: args.folder / run["folder"] for run in reversed(runs)}  # the first seed's
        missing = [str(folder) for folder in folders.values() if not (folder / "model.pt").exists()]
        if missing:
            print(f"reconstructions.png is left as it was: no model.pt in {', '.join(missing)}")
        else:
            figures["reconstructions.png"] = plot_reconstructions(folders, data)
        return summary, figures

    common.study(args, runs, make_model, train, plot)

if __name__ == "__main__":
    main()
