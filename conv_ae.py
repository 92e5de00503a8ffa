"""How does the size of the latent space trade against reconstruction in a convolutional autoencoder?

    python conv_ae.py --epochs 16 --seeds 3 --out results/long    # 32 dimensions: 0.408 of PCA's error (n=3)
    python conv_ae.py                                             # short runs, drawn beside the long ones
    python conv_ae.py --latents 24 --resume                       # one more size, in the same table and figures

The autoencoder of Hinton & Salakhutdinov (2006) with convolutions, trained on the mean squared error.
"""
import torch
from torch import nn
from torch.nn import functional as F

import common

# ---------------------------------------------------------------------------------------------------------------- model

class Flatten(nn.Module):
    """(B, C, H, W) to (B, H * W * C): the order in which channels_last memory holds them, so nothing is copied."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(1)

class Encoder(nn.Module):
    """Images (B, 1, 28, 28) to features (B, 3200), and those to the latent vector (B, latent)."""

    def __init__(self, latent):
        super().__init__()
        # Pooling first leaves a quarter of the work. With momentum 0.1 the statistics of a short run would lag.
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(32, momentum=0.5), nn.ReLU(),  # to 14x14
            nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(64, momentum=0.5), nn.ReLU(),  # to 7x7
            nn.Conv2d(64, 128, 3), nn.BatchNorm2d(128, momentum=0.5), nn.ReLU(), Flatten())  # to 5x5, without padding
        self.project = nn.Linear(128 * 5 * 5, latent)

    def forward(self, x):
        return self.project(self.features(x))

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

def to_device(model, device):
    """`model` on `device`, in the memory format that convolutions are fast in; not on MPS, where before torch 2.14 the
    gradients of a batch norm are wrong in it (github.com/pytorch/pytorch/issues/175189)."""
    return model.to(device, memory_format=torch.contiguous_format if device.type == "mps" else torch.channels_last)

def loss_fn(model, images, labels):
    """Mean over pixels and images of the squared error, which is the loss, and of the absolute error."""
    reconstruction = common.forward(model, images)
    mse = F.mse_loss(reconstruction, images)
    return {"loss": mse, "mse": mse, "l1": F.l1_loss(reconstruction, images)}

# ----------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def predict(model, images, dtype=torch.float32):
    """model(images) in evaluation, by chunks that fit into the cache."""
    model.eval()
    return torch.cat([model(chunk).to(dtype) for chunk in images.split(250)])

def evaluate(model, data):
    """The test metrics, and what the latent space keeps of the classes."""
    index, queries = (predict(model.encoder, split.images) for split in (data.train, data.test))
    return {"test": common.test_loop(model, loss_fn, data.test),
            "latent_knn_accuracy": common.knn_accuracy(index, data.train.labels, queries, data.test.labels)}

def pca_errors(train, test, sizes):
    """{size: test MSE of PCA, the best linear autoencoder (Baldi & Hornik, 1989), as it is and clamped to [0, 1]}, from
    pixels (N, 784), by the leading eigenvectors of the training set's covariance in float64."""
    train, test = train.cpu().double(), test.cpu().double()
    mean = train.mean(0)
    train -= mean  # in place: float64 images take 300 MB
    _, vectors = torch.linalg.eigh(train.T @ train / len(train))  # ascending eigenvalues
    errors = {}
    for size in sizes:
        basis = vectors[:, -min(size, vectors.shape[1]):]
        projected = (test - mean) @ basis @ basis.T + mean
        errors[size] = {"pca_mse": F.mse_loss(projected, test).item(),
                        "pca_clamped_mse": F.mse_loss(projected.clamp(0, 1), test).item()}
    return errors

# -------------------------------------------------------------------------------------------------------------- figures

def plot_errors(studies):
    """Test error and PCA's, and what the latent space keeps of the classes. `studies` is {epochs: summary}."""
    figure = common.new_figure(11, 4.8)
    errors, classes = figure.subplots(1, 2)
    errors.set(yscale="log", ylabel="test MSE (pixels in [0, 1])")
    errors.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    errors.yaxis.set_major_formatter("{x:g}")
    classes.set_ylabel("10-NN test accuracy on the latent vector")
    rows = {row["latent"]: row for summary in studies.values() for row in summary}  # PCA is the same in all
    sizes = sorted(rows)
    for axes in (errors, classes):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, sizes)
        axes.set_xlabel("latent dimensions")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for (epochs, summary), color, offset in zip(sorted(studies.items()), common.COLORS, (8, -18)[-len(studies):]):
        n = "-".join(map(str, sorted({row["n"] for row in summary})))
        for axes, name in ((errors, "mse"), (classes, "latent_knn_accuracy")):
            axes.errorbar([row["latent"] for row in summary], [row[f"{name}_mean"] for row in summary],
                          [row[f"{name}_std"] or 0 for row in summary],
                          fmt="o-", capsize=3, color=color, label=f"{epochs} epochs (mean and std, n={n})")
        for row in summary:
            errors.annotate(f"×{row['ratio']:.2f}", (row["latent"], row["mse_mean"]), (0, offset), color=color,
                            textcoords="offset points", ha="center")
    errors.plot(sizes, [rows[size]["pca_mse"] for size in sizes], "s--", color=common.COLORS[8], label="PCA")
    errors.margins(y=0.12)
    errors.legend(title="×: error relative to PCA's", alignment="left")
    pixels = rows[sizes[0]]["pixel_knn_accuracy"]
    classes.axhline(pixels, linestyle="--", color=common.COLORS[8], label="on the 784 pixels")
    classes.legend(loc="lower right")
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
    """One row per latent size, over seeds (std null for one), with PCA's error and the 10-NN accuracy on pixels."""
    sizes = sorted({run["config"]["latent"] for run in runs})
    train, test = data.train.images.flatten(1), data.test.images.flatten(1)
    pca = pca_errors(train, test, sizes)
    pixel_knn_accuracy = common.knn_accuracy(train, data.train.labels, test, data.test.labels)
    summary = []
    for size in sizes:
        same = [run for run in runs if run["config"]["latent"] == size]
        row = {"latent": size, "n": len(same), "parameters": same[0]["parameters"], **pca[size],
               "pixel_knn_accuracy": pixel_knn_accuracy}
        for name in ("mse", "l1", "latent_knn_accuracy"):
            values = [{**run, **run["test"]}[name] for run in same]
            row[f"{name}_mean"], row[f"{name}_std"] = common.mean_std(values)
        summary.append({**row, "ratio": row["mse_mean"] / row["pca_mse"]})
    return summary

@common.cli()
def main(argv=None):
    parser = common.make_parser(__doc__, epochs=6, batch_size=64, lr=8e-3, patience=0, val_every=3)
    parser.add_argument("--latents", type=common.number(int, 1, 4096), nargs="+", default=[2, 4, 8, 16, 32, 64, 128],
                        metavar="SIZE", help="latent dimensions (default: %(default)s)")
    parser.add_argument("--seeds", type=common.number(int, 1, 1000), default=1, metavar="N",
                        help="runs of each size, with seeds from --seed on (default: %(default)s)")
    args = common.parse_args(parser, argv, "conv_ae")
    data = common.load_data(args.data, args.device)
    runs = {f"latent{latent:03d}-seed{seed}": {"latent": latent, "seed": seed}
            for seed in range(args.seed, args.seed + args.seeds) for latent in args.latents}
    del args.latents, args.seeds  # what is left is the same for all runs

    def train(args, model):
        common.run(args, model, loss_fn, data, evaluate=lambda model: evaluate(model, data))

    def plot(runs):
        summary = summarize(runs, data)
        studies, longer = {args.epochs: summary}, args.out / "long" / "conv_ae" / "metrics.json"
        if longer.exists():  # what the same command with more --epochs wrote, for comparison
            other = common.load(longer)
            studies = {other["config"]["epochs"]: other["summary"], **studies}
        figures = {"latent_vs_error.png": plot_errors(studies)}
        folders = {run["config"]["latent"]: args.folder / run["folder"] for run in reversed(runs)}  # the first seed's
        if missing := [folder.name for folder in folders.values() if not (folder / "model.pt").exists()]:
            print(f"reconstructions.png is left as it was: no model.pt in {', '.join(missing)}")
        else:
            figures["reconstructions.png"] = plot_reconstructions(folders, data)
        return summary, figures

    common.study(args, runs, lambda args: to_device(Autoencoder(args.latent), args.device), train, plot)

if __name__ == "__main__":
    main()
