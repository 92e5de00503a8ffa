"""Does a classifier gain from starting at the autoencoder's encoder: frozen, fine-tuned, or from scratch?

    python conv_ae.py --latents 32     # the encoder, pre-trained on the 50,000 images without their labels
    python classifier.py               # three strategies x 100 to 50,000 labels x three seeds

An epoch of a run with fewer labels goes over them sqrt(50,000 / labels) times, so that 100 labels get more than a step
an epoch and still cost little.
"""
import hashlib

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

import common
from conv_ae import Autoencoder, Encoder

TARGET = 0.88  # the validation accuracy whose epoch says how fast a strategy learns

# ----------------------------------------------------------------------------------------------------------------- model


class Classifier(nn.Module):
    """Images (B, 1, 28, 28), or the encoder's features of them (B, 1152), to logits (B, 10).

    The head sits on the convolutional features, not on the latent vector behind them: see README.md for the figures.
    """

    def __init__(self, encoder, hidden=256):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(1152, hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 10))

    def forward(self, x):
        return self.head(x if x.dim() == 2 else self.encoder.features(x))


def make_classifier(strategy, latent, encoder_weights):
    """`scratch`: random encoder. `frozen`: the autoencoder's, never updated. `finetune`: the autoencoder's, trained on."""
    encoder = Encoder(latent)
    model = Classifier(encoder)
    if strategy != "scratch":
        encoder.load_state_dict(encoder_weights)
    encoder.requires_grad_(strategy != "frozen")
    return model


# ------------------------------------------------------------------------------------------------------------------ loss


def augment(images):
    """Each image flipped left to right with probability 1/2, and shifted by up to two pixels either way."""
    count, device = len(images), images.device
    flip = torch.rand(count, 1, 1, 1, device=device) < 0.5
    images = torch.where(flip, images.flip(3), images)
    padded = F.pad(images, (2, 2, 2, 2)).squeeze(1)
    shift = torch.randint(0, 5, (2, count, 1, 1), device=device)
    pixel = torch.arange(28, device=device)
    rows, columns = shift[0] + pixel[:, None], shift[1] + pixel
    return padded[torch.arange(count, device=device)[:, None, None], rows, columns].unsqueeze(1)


def loss_fn(model, inputs, labels):
    """Cross-entropy in nats (in training with label smoothing 0.05, Szegedy et al., 2016) and accuracy."""
    if model.training and inputs.dim() == 4:
        inputs = augment(inputs)
    logits = model(inputs).float()
    return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.05 if model.training else 0.0),
            "accuracy": (logits.argmax(1) == labels).float().mean()}


