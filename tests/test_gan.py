"""gan.py: its networks, losses and algorithm."""

import copy
import math
from functools import partial

import conftest
import numpy as np
import pytest
import torch
from conftest import load
from torch import nn
from torch.optim import Adam

import gan

run = partial(conftest.run, gan)


def train(data_dir, out_dir, *flags):
    """Trains on 256 digits at a rate that shows within ten steps. Returns the run's folder."""
    data = ["--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir]
    small = ["--width", 4, "--latent-dim", 5, "--lr", 0.02]
    assert run(*data, *small, *flags) == 0
    return out_dir


# networks


def test_networks_are_those_of_the_docstring():
    args = gan.parse_args([])[0]
    generator = gan.Generator(args.latent_dim, args.width)
    discriminator = gan.Discriminator(args.width)
    images = generator(torch.randn(3, 100))
    assert images.shape == (3, 1, 28, 28)
    assert images.abs().max() < 1
    assert discriminator(images).shape == (3,)

    layers = [*generator, *discriminator]
    names = [type(layer).__name__ for layer in layers]
    up = 3 * ["Linear", "BatchNorm1d", "LeakyReLU"]
    down = 3 * ["Linear", "LeakyReLU", "Dropout"]
    assert names[:12] == [*up, "Linear", "Tanh", "Unflatten"]
    assert names[12:] == ["Flatten", *down, "Linear", "Flatten"]
    units = [layer.out_features for layer in layers if isinstance(layer, nn.Linear)]
    assert units == [256, 512, 1024, 784, 1024, 512, 256, 1]
    for layer in layers:
        assert getattr(layer, "negative_slope", 0.2) == 0.2
        assert getattr(layer, "p", 0.3) == 0.3


# losses


def test_losses_and_gradients_are_those_of_the_formulas():
    """Section 3: both of G's losses raise D(G(z)), one by 1 - D, the other by D, 0 if D wins."""
    real = torch.linspace(-6, 9, 19)
    fake = torch.linspace(-9, 9, 19, requires_grad=True)
    d_real = real.sigmoid()
    d_fake = fake.sigmoid()
    value = (d_real.log() + (1 - d_fake).log()).mean()
    torch.testing.assert_close(gan.discriminator_loss(real, fake), -value)

    strong = gan.generator_loss(fake, False)
    saturating = gan.generator_loss(fake, True)
    torch.testing.assert_close(strong, -d_fake.log().mean())
    torch.testing.assert_close(saturating, (1 - d_fake).log().mean())
    gradients = [torch.autograd.grad(19 * loss, fake)[0] for loss in (strong, saturating)]
    torch.testing.assert_close(gradients, [d_fake - 1, -d_fake])


def test_losses_are_finite_if_d_is_certain():
    far = torch.tensor([200.0])
    assert gan.discriminator_loss(-far, far) == 400
    assert gan.generator_loss(far, True) == -200


def test_the_optimal_discriminator_is_p_over_p_plus_q():
    """Proposition 1, for distributions over three values: the gradient there is 0."""
    real = torch.tensor([0, 0, 0, 1, 1, 2])
    fake = torch.tensor([0, 1, 1, 1, 2, 2])
    p = real.bincount() / 6
    q = fake.bincount() / 6
    logits = torch.logit(p / (p + q)).requires_grad_()
    gan.discriminator_loss(logits[real], logits[fake]).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(3))


# training


def minimize(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize(
    "flags, most",
    [("--batch-size 1", 256), ("--batch-size 257", 256), ("--d-steps 5", 51)],
)
def test_batches_that_do_not_work_are_refused(flags, most, data_dir, tmp_path, capsys):
    """BatchNorm needs two images, and a step of G needs --d-steps batches."""
    words = ["--dataset", "mnist", "--data-dir", data_dir, "--out-dir", tmp_path / "run"]
    assert run(*words, *flags.split()) == 1
    line = f"error: --batch-size must be 2 to {most}, the images per process / --d-steps\n"
    assert capsys.readouterr().err == line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("d_steps, saturating", [(1, False), (3, True)])
def test_a_run_is_algorithm_1(d_steps, saturating, data_dir, tmp_path):
    """k steps of D, each on new data and noise, then one of G; computed again from the seed."""
    flags = ["--epochs", 2, "--batch-size", 20, "--d-steps", d_steps]
    flags += ["--saturating"] * saturating
    found = load(train(data_dir, tmp_path / "run", *flags))
    images = gan.synthetic_digits(256, 0).unsqueeze(1) / 127.5 - 1

    torch.manual_seed(0)
    torch.randn(64, 5)  # the noise of the grids
    generator = gan.Generator(5, 4)
    discriminator = gan.Discriminator(4)
    averaged = copy.deepcopy(generator.state_dict())
    adam_g = Adam(generator.parameters(), 0.02, betas=(0.5, 0.999))
    adam_d = Adam(discriminator.parameters(), 0.02, betas=(0.5, 0.999))
    step = 0
    for epoch, row in enumerate(found["metrics"], 1):
        torch.manual_seed(hash((0, epoch, 0)))
        metrics = []
        for index in torch.randperm(256).split(20 * d_steps)[:-1]:
            for real in images[index].split(20):
                fake = generator(torch.randn(20, 5))
                both = torch.cat([real, fake.detach()])
                d_real, d_fake = discriminator(both).sigmoid().chunk(2)
                loss_d = -(d_real.log() + (1 - d_fake).log()).mean()
                minimize(loss_d, adam_d)
            d_anew = discriminator(fake).sigmoid()
            loss_g = (1 - d_anew).log().mean() if saturating else -d_anew.log().mean()
            minimize(loss_g, adam_g)

            step += 1
            for name, value in generator.state_dict().items():
                averaged[name] = torch.lerp(averaged[name] * 1.0, value * 1.0, 10 / (10 + step))
            metrics.append(torch.stack([loss_d, loss_g, d_real.mean(), d_fake.mean()]).tolist())
        names = ["loss_d", "loss_g", "d_real", "d_fake"]
        np.testing.assert_allclose([row[name] for name in names], np.mean(metrics, 0), rtol=1e-3)

    def check(part, state):
        # Not the biases before BatchNorm, which takes them out: their gradients are rounding.
        for name, value in state.items():
            if name.endswith(("weight", "var")):
                torch.testing.assert_close(found[part][name], value, rtol=1e-3, atol=1e-4)

    check("generator", generator.state_dict())
    check("discriminator", discriminator.state_dict())
    check("averaged", averaged)


def test_all_modes_of_a_ring_of_gaussians_are_found(tmp_path, monkeypatch):
    """By the whole of train(), on images of two pixels."""
    torch.manual_seed(0)
    angle = torch.arange(8) * math.pi / 4
    centers = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    points = centers.repeat(2500, 1) + 0.05 * torch.randn(20_000, 2)
    linear = nn.Linear

    def two_pixels(*sizes):
        return linear(*(2 if size == 784 else size for size in sizes))

    monkeypatch.setattr(gan, "load_images", lambda args: points)
    monkeypatch.setattr(nn, "Linear", two_pixels)
    monkeypatch.setattr(nn, "Unflatten", nn.Identity)
    flags = ["--latent-dim", 8, "--width", 64, "--epochs", 5, "--batch-size", 128, "--lr", 1e-3]
    assert run("--dataset", "synthetic", "--out-dir", tmp_path, *flags) == 0

    generator = gan.Generator(8, 64).eval()
    generator.load_state_dict(load(tmp_path)["averaged"])
    distance, mode = torch.cdist(generator(torch.randn(4000, 8)), centers).min(1)
    share = torch.bincount(mode[distance < 0.15], minlength=8) / 4000
    assert share.min() > 0.03 and share.sum() > 0.5, share


def test_losses_in_bf16_are_float32s(data_dir, tmp_path):
    """Only the networks are in bfloat16: a loss of one step has more digits than that."""
    out_dir = tmp_path / "run"
    train(data_dir, out_dir, "--epochs", 1, "--batch-size", 256, "--bf16")
    row = load(out_dir)["metrics"][0]
    losses = torch.tensor([row["loss_d"], row["loss_g"]])
    assert (losses != losses.bfloat16()).all()
