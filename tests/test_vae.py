"""vae.py: its losses, its training step and rate, its bound on log p(x), its pictures."""

import math
import os
import re
import shutil
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
    model = vae.VAE(args["width"], args["latent_dim"], args["autoencoder"])
    model.load_state_dict(checkpoint["model"])
    return model.eval().requires_grad_(False)


def untrained(latent_dim=3):
    torch.manual_seed(0)
    return vae.VAE(16, latent_dim).requires_grad_(False)


def held_out():
    """The test images of `data_dir`, floats (64, 784) in [0, 1]."""
    return digits(64, 1).flatten(1) / 255


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
    expected = 255 * torch.sigmoid(model.decoder(z))
    np.testing.assert_allclose(seen.reshape(-1, 784), expected, atol=0.6)


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
    x, p = torch.rand(2, 4, 784).double()
    log_likelihood = x * torch.log(p) + (1 - x) * torch.log(1 - p)
    loss = vae.reconstruction_loss(torch.logit(p), x)
    torch.testing.assert_close(loss, -log_likelihood.sum(1))

    mean, logvar = torch.randn(2, 3, 5).double()
    q, p = Normal(mean, torch.exp(logvar / 2)), Normal(0, 1)
    z = q.sample((100_000,))
    estimate = (q.log_prob(z) - p.log_prob(z)).sum(2).mean(0)
    torch.testing.assert_close(vae.kl_divergence(mean, logvar), estimate, atol=0.03, rtol=0)


def test_gradients_pass_through_the_sampling(monkeypatch):
    """Against finite differences at a fixed epsilon, for the small weights of both networks."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # or no double precision
    torch.manual_seed(0)
    model = vae.VAE(3, 2).double()
    x = torch.rand(2, 784).double()
    epsilon = torch.randn(2, 2).double()
    small = {name: p for name, p in model.named_parameters() if p.numel() < 50}
    assert {name.split(".")[0] for name in small} == {"encoder", "decoder"}

    def loss(*weights):
        given = dict(zip(small, weights))
        logits, mean, logvar = torch.func.functional_call(model, given, (x, epsilon))
        return vae.reconstruction_loss(logits, x) + vae.kl_divergence(mean, logvar)

    assert torch.autograd.gradcheck(loss, tuple(small.values()))


def log_likelihood(model, x, z):
    """log p(x|z) by PyTorch's own distribution, which would refuse gray values."""
    pixels = Bernoulli(logits=model.decoder(z), validate_args=False)
    return pixels.log_prob(x).sum(-1)


def test_test_loss_is_of_z_sampled_by_the_seed():
    x, model = held_out(), untrained()
    metrics = vae.evaluate(model, x, vae.parse_args(["--latent-dim", "3", "--seed", "4"])[0])
    reconstruction, kl = metrics["test_reconstruction"], metrics["test_kl"]
    assert metrics["test_loss"] == reconstruction + kl

    mean, logvar = model.encode(x)
    expected = vae.kl_divergence(mean, logvar).mean()
    assert kl == pytest.approx(expected.item(), rel=1e-5)
    z = mean + torch.exp(logvar / 2) * seeded_noise(4, 64, 3)
    expected = -log_likelihood(model, x, z).mean()
    assert reconstruction == pytest.approx(expected.item(), rel=1e-5)


# the training loop


@pytest.mark.parametrize("flags", [["--beta", 8], ["--autoencoder"]])
def test_training_is_computed_again_from_the_seed_alone(flags, data_dir, tmp_path):
    """Two epochs of two steps, 56 of 256 images left out; the metric is the ELBO for any beta."""
    words = ["--epochs", 2, "--batch-size", 100, "--seed", 5, "--constant-lr", *flags]
    out = train(data_dir, tmp_path / "run", *words)
    rows = load(out)["metrics"]

    torch.manual_seed(5)
    torch.randn(64, 3)  # the noise of samples/
    model = vae.VAE(16, 3, "--autoencoder" in flags)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    images = digits(256, 0).flatten(1) / 255

    for epoch in (1, 2):
        torch.manual_seed(hash((5, epoch, 0)))
        order, losses = torch.randperm(256), []
        for first in (0, 100):
            x = images[order[first : first + 100]]
            logits, mean, logvar = model(x, torch.randn(100, 3))
            reconstruction = vae.reconstruction_loss(logits, x).sum() / 100
            kl = vae.kl_divergence(mean, logvar).sum() / 100
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


def test_rate_makes_one_cycle_that_resuming_stretches(rates, data_dir, tmp_path):
    train(data_dir, tmp_path / "whole", "--epochs", 10)
    whole = rates.copy()
    rise, fall = whole[:12], whole[11:]
    assert len(whole) == 40 and whole[0] == pytest.approx(0.04 * 5e-3)
    assert rise == sorted(rise) and rise[-1] == pytest.approx(5e-3)
    assert fall == sorted(fall, reverse=True)
    assert 0 <= fall[-1] < 1e-5

    rates.clear()
    out = train(data_dir, tmp_path / "part", "--epochs", 4)
    assert rates[-1] < 1e-5 < whole[15]
    rates.clear()
    assert run("--resume", out / "checkpoint.pt", "--epochs", 10) == 0
    assert rates == pytest.approx(whole[16:])


def test_rate_is_what_lr_says_at_its_peak_or_all_the_time(rates, data_dir, tmp_path):
    train(data_dir, tmp_path / "cycle", "--epochs", 5, "--lr", 0.02)
    assert max(rates) == pytest.approx(0.02)

    rates.clear()
    out = train(data_dir, tmp_path / "constant", "--epochs", 1, "--constant-lr")
    assert run("--resume", out / "checkpoint.pt", "--epochs", 2) == 0
    assert rates == [1e-3] * 8


def test_the_loss_the_test_loss_and_the_bound_have_one_likelihood(
    data_dir, finished, tmp_path, monkeypatch, capsys
):
    """With every image a thousand nats less likely, these are off by a thousand, the KL by 0."""
    likelihood = vae.reconstruction_loss
    bounds = []
    for penalty in (0, 1000):
        monkeypatch.setattr(vae, "reconstruction_loss", lambda *a: likelihood(*a) + penalty)
        assert run("--eval", finished / "checkpoint.pt") == 0
        bounds.append(float(capsys.readouterr().out.split()[4]))
    assert bounds[0] - bounds[1] == pytest.approx(1000, abs=0.02)

    changed = train(data_dir, tmp_path / "run", "--epochs", 3)
    for row, expected in zip(load(changed)["metrics"], load(finished)["metrics"]):
        for name in ("train_loss", "test_loss", "test_reconstruction"):
            assert row[name] - expected[name] == pytest.approx(1000, abs=0.1)
        assert row["test_kl"] == pytest.approx(expected["test_kl"], rel=1e-3)


# the bound on log p(x)


def bounds(model, x, count):
    torch.manual_seed(1)
    return vae.log_likelihood_bound(model, x, count)


def test_bound_of_one_sample_is_the_elbo():
    """Draw by draw it is log p(x|z) + log p(z) - log q(z|x), and in the mean minus the loss."""
    model, x = untrained(), held_out()[:1].expand(4000, 784)
    mean, logvar = model.encode(x)
    q, p = Normal(mean, torch.exp(logvar / 2)), Normal(0, 1)
    z = mean + q.scale * seeded_noise(1, 4000, 3)
    log_px_z = log_likelihood(model, x, z)
    log_pz_qz = p.log_prob(z) - q.log_prob(z)
    bound = bounds(model, x, 1)
    torch.testing.assert_close(bound, log_px_z + log_pz_qz.sum(1))

    logits = model(x, torch.randn(4000, 3))[0]
    loss = vae.reconstruction_loss(logits, x) + vae.kl_divergence(mean, logvar)
    assert abs(bound.mean() + loss.mean()) < 0.4 < bound.std()


def test_bound_rises_with_the_samples_towards_the_integral():
    """With one latent dimension log p(x) is an integral, which a fine sum over z gives."""
    model, x = untrained(latent_dim=1), held_out()[:4]
    z = torch.linspace(-8, 8, 4001)[:, None, None]  # in steps of 0.004
    log_px_z = log_likelihood(model, x, z)
    log_pz = Normal(0, 1).log_prob(z)[:, 0]
    integral = torch.logsumexp(log_px_z + log_pz, 0) + math.log(0.004)
    assert (integral < -200).all()  # of which exp() is 0 in float32

    many = x.repeat(200, 1)
    means = [bounds(model, many, count).mean() for count in (1, 10, 50)]
    assert means == sorted(means) and means[0] < means[1] - 0.1
    assert means[-1] < integral.mean() + 0.02
    torch.testing.assert_close(bounds(model, x, 20_000), integral, atol=0.05, rtol=0)


def test_eval_prints_the_bound_and_writes_nothing(finished, capsys):
    before = result(finished)
    words = ["--eval", finished / "checkpoint.pt", "--importance-samples", 200]
    assert run(*words) == run(*words) == 0
    line, again = capsys.readouterr().out.splitlines()
    model, parts = trained(finished), held_out().split(25)  # 5000 z at a time
    torch.manual_seed(0)
    bound = torch.cat([vae.log_likelihood_bound(model, x, 200) for x in parts])
    error = bound.std() / 8
    numbers = [f"{bound.mean():.2f}", "64", f"{error:.2f}", "200"]
    assert sorted(re.findall(r"[-\d.]*\d", line)) == sorted(numbers)
    assert line == again and line.startswith("mnist: log p(x) >= ")
    assert same(result(finished), before)


# the autoencoder


def test_autoencoder_decodes_the_mean_and_has_no_kl(twin):
    model, x = trained(twin), held_out()
    logits = model(x, torch.randn(64, 3))[0]
    assert torch.equal(logits, model.decoder(model.encode(x)[0]))
    expected = vae.reconstruction_loss(logits, x).mean().item()
    row = load(twin)["metrics"][-1]
    assert row["test_loss"] == row["test_reconstruction"] == pytest.approx(expected, rel=1e-5)
    assert row["test_kl"] == 0

    # The half of the encoder that gives logvar stays where it started.
    torch.manual_seed(0)
    torch.randn(64, 3)
    moved = model.encoder[2].weight != vae.VAE(16, 3).encoder[2].weight
    assert moved[:3].any(1).all()
    assert not moved[3:].any()


def test_autoencoder_has_no_samples_and_no_manifold(data_dir, tmp_path):
    words = ["--epochs", 1, "--autoencoder", "--latent-dim", 2]
    out = train(data_dir, tmp_path / "run", *words)
    names = ["checkpoint.pt", "metrics.csv", "reconstructions", "samples"]
    assert sorted(os.listdir(out)) == names and os.listdir(out / "samples") == ["real.png"]


# pictures, with a network as the reader's next one may be: an image could depend on its neighbours


class Normed(vae.VAE):
    def __init__(self, width, *args):
        super().__init__(width, *args)
        self.encoder.insert(1, nn.BatchNorm1d(width))
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
    for network in (model.encoder, model.decoder):
        assert network[1].num_batches_tracked == 8  # those of training, and no other


def test_samples_are_of_the_same_noise_every_epoch(normed, data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", 1, "--seed", 5)
    noise = seeded_noise(5, 64, 3)
    assert_shows(pictures(out / "samples" / "epoch_0001.png"), trained(out), noise)

    assert run("--resume", out / "checkpoint.pt", "--epochs", 3) == 0
    assert_shows(pictures(out / "samples" / "epoch_0003.png"), trained(out), noise)


def test_manifold_has_z_1_to_the_right_and_z_2_upwards(normed, data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", 3, "--latent-dim", 2)
    seen = pictures(out / "manifold.png")
    assert seen.shape == (20, 20, 28, 28)
    for row, column in ((0, 0), (0, 19), (19, 0), (7, 12)):
        shares = torch.tensor([[column + 0.5, 19.5 - row]]) / 20
        z = Normal(0, 1).icdf(shares)
        assert_shows(seen[row, column], trained(out), z)


def test_samples_are_files_of_28_pixels(normed, data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", 3)
    words = ["--sample", out / "checkpoint.pt", "--num-samples", 70, "--seed", 9]
    assert run(*words) == 0 and not (out / "manifold.png").exists()
    names = sorted(os.listdir(out / "generated"))
    assert names == [f"{n:05d}.png" for n in range(70)]
    images = [Image.open(out / "generated" / name) for name in names]
    assert {(image.size, image.mode) for image in images} == {((28, 28), "L")}

    z = seeded_noise(9, 70, 3)
    assert_shows(np.stack(images), trained(out), z)
    grid = pictures(out / "generated.png")
    assert grid.shape[:2] == (8, 8)
    assert_shows(grid, trained(out), z[:64])


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
    assert "an autoencoder has " in capsys.readouterr().err
    assert same(result(twin), before)


def test_walks_need_two_images_each(finished, tmp_path, capsys):
    words = ["--sample", finished / "checkpoint.pt", "--out-dir", tmp_path / "new"]
    assert run(*words, "--interpolate", 33) == 1
    err = capsys.readouterr().err
    assert "64 held-out images are too few" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists()
    assert run(*words, "--interpolate", 32) == 0


@pytest.mark.parametrize("words", ["--lr 0.1", "--constant-lr", "--latent-dim 2", "--autoencoder"])
def test_what_a_checkpoint_fixes(words, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    assert run("--resume", out / "checkpoint.pt", "--epochs", 4, *words.split()) == 2
    assert f"{words.split()[0]} is fixed" in capsys.readouterr().err
    assert same(result(out), result(finished))
