"""vae.py: its losses, its training step and rate, its bound on log p(x), its pictures."""

import math
import os
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load, result, run as run_script, same
from PIL import Image
from torch import nn
from torch.distributions import Bernoulli, Normal
from torch.optim.optimizer import register_optimizer_step_pre_hook

import vae

run = partial(run_script, vae)
digits = vae.synthetic_digits


def train(data_dir, out_dir, *flags):
    """A run on 256 digits, four steps an epoch unless told otherwise: its folder."""
    tiny = ["--width", 16, "--latent-dim", 3, "--batch-size", 64]
    data = ["--dataset", "mnist", "--data-dir", data_dir]
    assert run(*data, "--out-dir", out_dir, *tiny, *flags) == 0
    return out_dir


def trained(out_dir):
    """The network that a run left."""
    checkpoint = load(out_dir)
    args = checkpoint["args"]
    model = vae.VAE(args["latent_dim"], args["width"], args["autoencoder"])
    model.load_state_dict(checkpoint["model"])
    return model.eval().requires_grad_(False)


def untrained(latent_dim=3):
    torch.manual_seed(0)
    return vae.VAE(latent_dim, 16, False).requires_grad_(False)


def held_out():
    """The test images of `data_dir`, floats (64, 1, 28, 28) in [0, 1]."""
    return digits(64, 1).unsqueeze(1) / 255


def seeded_noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(path):
    """The images of a grid, (rows, columns, 28, 28), gray values from 0 to 255."""
    grid = np.asarray(Image.open(path).convert("L"))[2:, 2:]
    height, width = grid.shape
    cells = grid.reshape(height // 30, 30, width // 30, 30)
    return cells.swapaxes(1, 2)[:, :, :28, :28].astype(float)


def assert_shows(seen, model, z):
    """Whether gray values (..., 28, 28) are what the decoder makes of z."""
    expected = 255 * torch.sigmoid(model.decoder(z)).view(-1, 28, 28)
    np.testing.assert_allclose(seen.reshape(-1, 28, 28), expected, atol=0.6)


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of three epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", 3)


@pytest.fixture(scope="module")
def twin(data_dir, tmp_path_factory):
    """The same of an autoencoder."""
    out = tmp_path_factory.mktemp("twin") / "run"
    return train(data_dir, out, "--epochs", 3, "--autoencoder")


# the objective


def test_losses_are_sums_over_pixels_and_dimensions():
    torch.manual_seed(0)
    x, p = torch.rand(2, 4, 1, 28, 28).double()
    log_likelihood = x * torch.log(p) + (1 - x) * torch.log(1 - p)
    loss = vae.reconstruction_loss(torch.logit(p), x)
    torch.testing.assert_close(loss, -log_likelihood.sum((1, 2, 3)))

    mean, logvar = torch.randn(2, 3, 5).double()
    q, p = Normal(mean, torch.exp(logvar / 2)), Normal(0, 1)
    z = q.sample((100_000,))
    estimate = (q.log_prob(z) - p.log_prob(z)).sum(2).mean(0)
    torch.testing.assert_close(vae.kl_divergence(mean, logvar), estimate, atol=0.03, rtol=0)


def test_gradients_pass_through_the_sampling():
    """Of the mean and the standard deviation: dz/dmean = 1, and dz/dlogvar = (z - mean) / 2."""
    mean, logvar, epsilon = torch.randn(3, 4, 5).double()
    z = vae.reparameterize(mean.requires_grad_(), logvar.requires_grad_(), epsilon)
    torch.testing.assert_close(z, mean + (logvar / 2).exp() * epsilon)
    z.sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(4, 5).double())
    torch.testing.assert_close(logvar.grad, (z - mean) / 2)


def log_likelihood(model, x, z):
    """log p(x|z) by PyTorch's own distribution, which would refuse gray values."""
    pixels = Bernoulli(logits=model.decoder(z), validate_args=False)
    return pixels.log_prob(x).sum((-3, -2, -1))


def test_test_loss_is_of_z_sampled_by_the_seed():
    """In chunks of a thousand images, of which the last is smaller."""
    x, model = held_out().repeat(20, 1, 1, 1), untrained()
    metrics = vae.evaluate(model, x, vae.parse_args(["--latent-dim", "3", "--seed", "4"])[0])
    mean, logvar = model.encode(x)
    kl = vae.kl_divergence(mean, logvar).mean().item()
    torch.manual_seed(4)
    z = mean + torch.exp(logvar / 2) * torch.cat([torch.randn(n, 3) for n in (1000, 280)])
    reconstruction = -log_likelihood(model, x, z).mean().item()
    expected = [reconstruction + kl, reconstruction, kl]
    assert [*metrics.values()] == pytest.approx(expected, rel=1e-5)


# the training loop


@pytest.mark.parametrize("flags", [["--beta", 8], ["--autoencoder"]])
def test_training_is_computed_again_from_the_seed_alone(flags, data_dir, tmp_path):
    """Two epochs of two steps, 56 of 256 images left out; the metric is the ELBO for any beta."""
    words = ["--epochs", 2, "--batch-size", 100, "--seed", 5, "--constant-lr", *flags]
    out = train(data_dir, tmp_path / "run", *words)
    rows = load(out)["metrics"]

    torch.manual_seed(5)
    torch.randn(64, 3)  # the noise of samples/
    model = vae.VAE(3, 16, "--autoencoder" in flags)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    images = digits(256, 0).unsqueeze(1) / 255

    for epoch in (1, 2):
        torch.manual_seed(hash((5, epoch, 0)))
        order, losses = torch.randperm(256), []
        for first in (0, 100):
            x = images[order[first : first + 100]]
            logits, kl = model(x, torch.randn(100, 3))
            reconstruction = vae.reconstruction_loss(logits, x).sum() / 100
            kl = kl.sum() / 100
            optimizer.zero_grad()
            (reconstruction + 8 * kl).backward()
            optimizer.step()
            losses.append((reconstruction + kl).item())
        assert rows[epoch - 1]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)

    for p, expected in zip(trained(out).parameters(), model.parameters()):
        torch.testing.assert_close(p, expected)


@pytest.fixture
def rates():
    """The learning rate at each optimizer step of the test."""
    seen = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(optimizer.param_groups[0]["lr"])
    )
    yield seen
    hook.remove()


def test_rate_is_pytorchs_cycle_that_resuming_stretches(rates, data_dir, tmp_path):
    """Whose peak is five times --lr; or constant, and new in a resumed run."""
    out = train(data_dir, tmp_path / "run", "--epochs", 4, "--lr", 4e-3)
    assert run("--resume", out, "--epochs", 10) == 0
    found = rates.copy()

    optimizer = torch.optim.Adam([torch.zeros(1)])
    for steps, part in ((16, found[:16]), (40, found[16:])):
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.02, total_steps=steps, cycle_momentum=False
        )
        expected = []
        for _ in range(steps):
            expected += cycle.get_last_lr()
            optimizer.step()
            cycle.step() if len(expected) < steps else None
        assert part == pytest.approx(expected[-len(part) :], rel=0, abs=1e-12)

    rates.clear()
    out = train(data_dir, tmp_path / "constant", "--epochs", 1, "--constant-lr")
    assert run("--resume", out, "--epochs", 2, "--lr", 0.01) == 0
    assert rates == [1e-3] * 4 + [0.01] * 4


def test_the_loss_the_test_loss_and_the_bound_have_one_likelihood(data_dir, tmp_path, monkeypatch):
    """With every image a thousand nats less likely, these are off by a thousand, the KL by 0."""
    likelihood, found = vae.reconstruction_loss, []
    for penalty in (0, 1000):
        monkeypatch.setattr(vae, "reconstruction_loss", lambda *a: likelihood(*a) + penalty)
        row = load(train(data_dir, tmp_path / str(penalty), "--epochs", 1))["metrics"][0]
        losses = [row[name] for name in ("train_loss", "test_loss", "test_reconstruction")]
        bound = bounds(untrained(), held_out(), 2).mean()
        found.append([*losses, -bound.item(), row["test_kl"]])
    assert np.subtract(found[1], found[0]) == pytest.approx([1000] * 4 + [0], abs=0.1)


# the bound on log p(x)


def bounds(model, x, count):
    torch.manual_seed(1)
    return vae.log_likelihood_bound(model, x, count)


def test_bound_of_one_sample_is_the_elbo():
    """Draw by draw it is log p(x|z) + log p(z) - log q(z|x), and in the mean minus the loss."""
    model, x = untrained(), held_out()[:1].expand(4000, 1, 28, 28)
    mean, logvar = model.encode(x)
    q, p = Normal(mean, torch.exp(logvar / 2)), Normal(0, 1)
    z = mean + q.scale * seeded_noise(1, 4000, 3)
    log_px_z = log_likelihood(model, x, z)
    log_pz_qz = p.log_prob(z) - q.log_prob(z)
    bound = bounds(model, x, 1)
    torch.testing.assert_close(bound, log_px_z + log_pz_qz.sum(1))

    logits, kl = model(x, torch.randn(4000, 3))
    loss = vae.reconstruction_loss(logits, x) + kl
    assert abs(bound.mean() + loss.mean()) < 0.4 < bound.std()


def test_bound_rises_with_the_samples_towards_the_integral():
    """With one latent dimension log p(x) is an integral, which a fine sum over z gives."""
    model, x = untrained(latent_dim=1), held_out()[:4]
    z = torch.linspace(-8, 8, 4001)[:, None, None]  # in steps of 0.004
    log_px_z = torch.stack([log_likelihood(model, image, z[:, 0]) for image in x], 1)
    log_pz = Normal(0, 1).log_prob(z)[:, 0]
    integral = torch.logsumexp(log_px_z + log_pz, 0) + math.log(0.004)
    assert (integral < -200).all()  # of which exp() is 0 in float32

    many = x.repeat(200, 1, 1, 1)
    means = [bounds(model, many, count).mean() for count in (1, 10, 50)]
    assert means == sorted(means) and means[0] < means[1] - 0.1
    assert means[-1] < integral.mean() + 0.02
    torch.testing.assert_close(bounds(model, x, 20_000), integral, atol=0.05, rtol=0)


def test_eval_prints_the_bound_and_writes_nothing(finished, capsys):
    before = result(finished)
    assert run("--eval", finished, "--importance-samples", 200) == 0
    line = capsys.readouterr().out
    model, parts = trained(finished), held_out().split(25)  # 5000 z at a time
    torch.manual_seed(0)
    bound = torch.cat([vae.log_likelihood_bound(model, x, 200) for x in parts])
    mean = f"mnist: log p(x) >= {bound.mean():.2f} nats, mean of 64 held-out images "
    assert line == f"{mean}(standard error {bound.std() / 8:.2f}), 200 importance samples\n"
    assert same(result(finished), before)


# the autoencoder


def test_autoencoder_decodes_the_mean_and_has_no_kl(twin):
    model, x = trained(twin), held_out()
    logits, kl = model(x, torch.randn(64, 3))
    assert torch.equal(logits, model.decoder(model.encode(x)[0])) and not kl.any()
    expected = vae.reconstruction_loss(logits, x).mean().item()
    row = load(twin)["metrics"][-1]
    assert row["test_loss"] == row["test_reconstruction"] == pytest.approx(expected, rel=1e-5)
    assert row["test_kl"] == 0


def test_autoencoder_has_no_samples_and_no_manifold(data_dir, tmp_path):
    words = ["--epochs", 1, "--autoencoder", "--latent-dim", 2]
    out = train(data_dir, tmp_path / "run", *words)
    names = ["args.json", "checkpoint.pt", "metrics.csv", "reconstructions", "samples"]
    assert sorted(os.listdir(out)) == names and os.listdir(out / "samples") == ["real.png"]


# pictures, with a network as the reader's next one may be: an image could depend on its neighbours


class Normed(vae.VAE):
    def __init__(self, latent_dim, width, autoencoder):
        super().__init__(latent_dim, width, autoencoder)
        self.encoder.insert(2, nn.BatchNorm1d(width))
        self.decoder.insert(1, nn.BatchNorm1d(width))


@pytest.fixture
def normed(monkeypatch):
    monkeypatch.setattr(vae, "VAE", Normed)


@pytest.mark.parametrize("count", [1, 3, 10, 64])
def test_held_out_images_above_their_reconstructions(count, normed, tmp_path, monkeypatch):
    parts = [digits(256, 0), digits(64, 1)[:count]]
    monkeypatch.setattr(vae, "synthetic_digits", lambda _, seed: parts[seed])
    out = train(tmp_path, tmp_path / "run", "--dataset", "synthetic", "--epochs", 2)
    folder = out / "reconstructions"
    assert sorted(os.listdir(folder)) == ["epoch_0001.png", "epoch_0002.png"]

    model, x = trained(out), held_out()[:count][:16]
    above, below = pictures(folder / "epoch_0002.png")
    assert np.array_equal(above, 255 * x.view(-1, 28, 28))
    assert_shows(below, model, model.encode(x)[0])
    for norm in (model.encoder[2], model.decoder[1]):
        assert norm.num_batches_tracked == 8  # those of training, and no other


def test_manifold_has_z_1_to_the_right_and_z_2_upwards(normed, data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", 3, "--latent-dim", 2)
    seen = pictures(out / "manifold.png")
    assert seen.shape == (20, 20, 28, 28)
    for row, column in ((0, 0), (0, 19), (19, 0), (7, 12)):
        shares = torch.tensor([[column + 0.5, 19.5 - row]]) / 20
        z = Normal(0, 1).icdf(shares)
        assert_shows(seen[row, column], trained(out), z)


@pytest.mark.parametrize("flags", [[], ["--autoencoder"]])
def test_walks_go_straight_from_encoding_to_encoding(flags, normed, data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", 3, *flags)
    assert run("--sample", out / "checkpoint.pt", "--interpolate", 3) == 0
    assert len(os.listdir(out / "interpolation")) == 24

    model = trained(out)
    means = model.encode(held_out()[:6])[0]
    grid = pictures(out / "interpolation.png")
    assert grid.shape[:2] == (3, 8)
    for walk in range(3):  # from one of the first three images to one of the next
        a, b = means[walk], means[walk + 3]
        t = torch.arange(8)[:, None] / 7
        assert_shows(grid[walk], model, (1 - t) * a + t * b)


# what does not go together


@pytest.mark.parametrize("flag", ["--eval", "--sample"])
def test_autoencoder_has_no_prior(flag, twin, capsys):
    before = result(twin)
    assert run(flag, twin / "checkpoint.pt") == 2
    assert "an autoencoder has no" in capsys.readouterr().err
    assert same(result(twin), before)
