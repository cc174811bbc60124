"""gan.py: the networks, losses and algorithm of the paper, and what is drawn with them."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import load, run as run_script, same, show
from PIL import Image
from torch import nn

import gan

run = partial(run_script, gan)


def train(data_dir, out_dir, *flags):
    """A run on 256 digits at a rate that shows within ten steps: its folder."""
    data = ["--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir]
    small = ["--width", 4, "--latent-dim", 5, "--lr", 0.02]
    assert run(*data, *small, *flags) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of two epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", 2)


def averaged_generator(out_dir):
    """What --sample draws with."""
    generator = gan.Generator(5, 4).eval().requires_grad_(False)
    generator.load_state_dict(load(out_dir)["averaged"])
    return generator


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# networks


def test_networks_are_the_described():
    generator, discriminator = gan.Generator(7, 4), gan.Discriminator(4)
    images = generator(torch.randn(3, 7))
    assert images.shape == (3, 1, 28, 28)
    assert images.abs().max() < 1
    assert discriminator(images).shape == (3,)

    leaky, dropout = nn.LeakyReLU(0.2), nn.Dropout(0.3)
    expected = [nn.Linear(7, 4), nn.BatchNorm1d(4), leaky]
    expected += [nn.Linear(4, 8), nn.BatchNorm1d(8), leaky]
    expected += [nn.Linear(8, 16), nn.BatchNorm1d(16), leaky]
    expected += [nn.Linear(16, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))]
    assert list(map(str, generator)) == list(map(str, expected))

    expected = [nn.Flatten(), nn.Linear(784, 16), leaky, dropout]
    expected += [nn.Linear(16, 8), leaky, dropout]
    expected += [nn.Linear(8, 4), leaky, dropout]
    expected += [nn.Linear(4, 1), nn.Flatten(0)]
    assert list(map(str, discriminator)) == list(map(str, expected))


def test_dropout_is_alive_in_training_and_absent_in_samples(data_dir, tmp_path, monkeypatch):
    """In the loop D gives one batch two answers; one z gives one picture whatever came before."""
    differ = []

    class Discriminator(gan.Discriminator):
        def forward(self, x):
            first, second = super().forward(x), super().forward(x)
            differ.append((first != second).any().item())
            return second

    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    out = train(data_dir, tmp_path / "run", "--epochs", 2, "--width", 32)
    assert differ and all(differ)

    for _ in range(2):
        torch.rand(7)
        assert run("--sample", out / "checkpoint.pt", "--num-samples", 1) == 0
    pictures = [out / folder / "00000.png" for folder in ("generated", "generated-2")]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


# losses


def probability(logits):
    return 1 / (1 + torch.exp(-logits))


def test_losses_are_the_value_function_and_its_non_saturating_form():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.0])
    d_real, d_fake = probability(real), probability(fake)
    value = d_real.log().mean() + (1 - d_fake).log().mean()
    torch.testing.assert_close(gan.discriminator_loss(real, fake), -value)
    torch.testing.assert_close(gan.generator_loss(fake, False), -d_fake.log().mean())
    torch.testing.assert_close(gan.generator_loss(fake, True), (1 - d_fake).log().mean())

    # Of logits, so never log(0).
    far = torch.tensor([200.0])
    assert gan.discriminator_loss(-far, far) == 400
    assert gan.generator_loss(far, True) == -200


def test_generator_losses_pull_one_way_with_opposite_strength():
    """Section 3: both raise every D(G(z)), one by 1 - D, the other by D, 0 where D wins."""
    logits = torch.linspace(-9, 9, 19, requires_grad=True)
    strong, saturating = (
        torch.autograd.grad(19 * gan.generator_loss(logits, flag), logits)[0]
        for flag in (False, True)
    )
    torch.testing.assert_close(strong, probability(logits.detach()) - 1)
    torch.testing.assert_close(saturating, -probability(logits.detach()))


@pytest.mark.parametrize("saturating", [False, True])
def test_at_the_fixed_point_neither_loss_moves_g(saturating):
    """Theorem 1's equilibrium, D = 1/2 everywhere: a D that does not look at its input."""
    fake = torch.randn(8, 784, requires_grad=True)
    discriminator = gan.Discriminator(4)
    nn.init.zeros_(discriminator[-2].weight)
    gan.generator_loss(discriminator(fake), saturating).backward()
    assert fake.grad.abs().max() == 0


def test_optimal_discriminator_is_p_over_p_plus_q():
    """Proposition 1, for p = N(-1, 1) and q = N(1, 1/4), by descending the loss on samples."""
    torch.manual_seed(0)
    p, q = torch.distributions.Normal(-1.0, 1.0), torch.distributions.Normal(1.0, 0.5)
    layers = [nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)]
    discriminator = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=800)
    for _ in range(800):
        real_logits, fake_logits = (
            discriminator(p.sample((256, 1))),
            discriminator(q.sample((256, 1))),
        )
        optimizer.zero_grad()
        gan.discriminator_loss(real_logits, fake_logits).backward()
        optimizer.step()
        schedule.step()

    x = torch.linspace(-2.5, 2, 50)[:, None]
    density_p, density_q = p.log_prob(x).exp(), q.log_prob(x).exp()
    found = probability(discriminator(x)).detach()
    assert (found - density_p / (density_p + density_q)).abs().max() < 0.05


# the training loop


def test_defaults_are_the_designs():
    args, checkpoint = gan.parse_args([])
    assert (args.epochs, args.batch_size, args.lr) == (100, 64, 4e-4)
    assert (args.latent_dim, args.width, args.seed) == (100, 256, 0)
    assert (args.d_steps, args.saturating, args.bf16, args.dataset) == (1, False, False, None)
    assert checkpoint is None


def algorithm_1(images, epochs, d_steps, saturating):
    """What train() does, once more: G, D, the average of G, the metrics of the last epoch."""
    torch.manual_seed(0)
    torch.randn(64, 5)  # the grids' noise
    generator, discriminator = gan.Generator(5, 4), gan.Discriminator(4)
    average = copy.deepcopy(generator.state_dict())
    optimizer_g = torch.optim.Adam(generator.parameters(), 0.02, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), 0.02, betas=(0.5, 0.999))
    step = 0
    for epoch in range(1, epochs + 1):
        torch.manual_seed(hash((0, epoch, 0)))
        batches = iter((images.float() / 127.5 - 1)[torch.randperm(len(images))].split(20))
        metrics = []
        for _ in range(len(images) // (20 * d_steps)):
            for _ in range(d_steps):
                real, fake = next(batches), generator(torch.randn(20, 5))
                d_real, d_fake = discriminator(torch.cat([real, fake.detach()])).sigmoid().chunk(2)
                loss_d = -(d_real.log() + (1 - d_fake).log()).mean()
                optimizer_d.zero_grad()
                loss_d.backward()
                optimizer_d.step()
            d_anew = discriminator(fake).sigmoid()
            loss_g = (1 - d_anew).log().mean() if saturating else -d_anew.log().mean()
            optimizer_g.zero_grad()
            loss_g.backward()
            optimizer_g.step()

            step += 1
            for name, value in generator.state_dict().items():
                if name in average and "batches" not in name:
                    average[name] += 10 / (10 + step) * (value - average[name])
            metrics.append(
                [loss_d.item(), loss_g.item(), d_real.mean().item(), d_fake.mean().item()]
            )
    return generator.state_dict(), discriminator.state_dict(), average, np.mean(metrics, 0)


@pytest.mark.parametrize("d_steps, saturating", [(1, False), (3, True)])
def test_a_run_is_algorithm_1(d_steps, saturating, data_dir, tmp_path):
    """k steps of D, each on data and noise of its own, then one of G; from the seed alone."""
    flags = ["--epochs", 2, "--batch-size", 20, "--d-steps", d_steps]
    out = train(
        data_dir, tmp_path / "run", *flags, "--saturating" if saturating else "--no-saturating"
    )
    images = gan.synthetic_digits(256, 0).unsqueeze(1)
    *networks, metrics = algorithm_1(images, 2, d_steps, saturating)
    found = load(out)
    for part, expected in zip(("generator", "discriminator", "averaged"), networks):
        for name, value in expected.items():
            # BatchNorm takes out the mean: what it takes out has no gradient but rounding's.
            if (
                part == "discriminator"
                or name not in ("0.bias", "3.bias", "6.bias")
                and "mean" not in name
            ):
                torch.testing.assert_close(found[part][name], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(list(found["metrics"][1].values())[1:5], metrics, rtol=1e-3)


def ring(count):
    """Points of eight Gaussians on a circle, (count, 2), and the eight centres."""
    angle = torch.arange(8) * math.pi / 4
    centers = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    noise = 0.05 * torch.randn(count, 2, generator=seeded(0))
    return centers[torch.arange(count) % 8] + noise, centers


def of_points(network, *sizes):
    """The network with two pixels in place of 784."""
    layers = network(*sizes)
    for n, layer in enumerate(layers):
        if isinstance(layer, nn.Linear) and layer.in_features == 784:
            layers[n] = nn.Linear(2, layer.out_features)
        if isinstance(layer, nn.Linear) and layer.out_features == 784:
            layers[n] = nn.Linear(layer.in_features, 2)
        if isinstance(layer, nn.Unflatten):
            layers[n] = nn.Identity()
    return layers


def test_all_modes_of_a_ring_of_gaussians_are_found(tmp_path, monkeypatch):
    """train() itself, its networks, losses and loop, on images of two pixels."""
    points, centers = ring(20_000)
    monkeypatch.setattr(gan, "load_images", lambda args: points)
    monkeypatch.setattr(gan, "save_grid", lambda images, path: None)
    for network in (gan.Generator, gan.Discriminator):
        monkeypatch.setattr(gan, network.__name__, partial(of_points, network))
    flags = ["--latent-dim", 8, "--width", 64, "--epochs", 5, "--batch-size", 128, "--lr", 1e-3]
    assert run("--dataset", "synthetic", "--out-dir", tmp_path, *flags) == 0

    generator = gan.Generator(8, 64).eval()
    generator.load_state_dict(load(tmp_path)["averaged"])
    fake = generator(torch.randn(4000, 8, generator=seeded(0))).detach()
    distance, mode = torch.cdist(fake, centers).min(1)
    share = torch.bincount(mode[distance < 0.15], minlength=8) / len(fake)
    assert share.min() > 0.03 and share.sum() > 0.5, share


def test_losses_in_bf16_are_float32s(data_dir, tmp_path):
    """Only the networks are in bfloat16: a loss of one step has more digits than that."""
    out = train(data_dir, tmp_path / "run", "--epochs", 1, "--batch-size", 256, "--bf16")
    losses = torch.tensor(list(load(out)["metrics"][0].values())[1:5])
    assert (losses != losses.bfloat16().float()).all()


# pictures


def test_grid_is_of_the_average_and_the_same_noise_every_epoch(data_dir, finished, tmp_path):
    torch.manual_seed(0)
    z = torch.randn(64, 5)
    first = train(data_dir, tmp_path / "run", "--epochs", 1)
    for out, epoch in ((first, 1), (finished, 2)):
        images = averaged_generator(out)(z)
        grid = np.asarray(Image.open(out / "samples" / f"epoch_000{epoch}.png").convert("L"))
        assert np.abs(show((images + 1) * 127.5) - grid).max() <= 1
        assert grid.std() > 5  # or there is nothing to compare


def test_samples_are_single_gray_images_of_28_pixels(finished, tmp_path):
    checkpoint = finished / "checkpoint.pt"
    assert run("--sample", checkpoint, "--num-samples", 70, "--out-dir", tmp_path) == 0
    assert run("--sample", checkpoint, "--num-samples", 1, "--seed", 9, "--out-dir", tmp_path) == 0
    assert Image.open(tmp_path / "generated.png").size == (8 * 30 + 2, 8 * 30 + 2)  # of 64
    files = sorted((tmp_path / "generated").iterdir())
    assert [file.name for file in files] == [f"{n:05d}.png" for n in range(70)]
    images = [np.asarray(Image.open(file)) for file in files]
    assert all(image.shape == (28, 28) and image.dtype == np.uint8 for image in images)

    z = torch.randn(70, 5, generator=seeded(0))
    expected = (averaged_generator(finished)(z)[:, 0].numpy() + 1) * 127.5
    np.testing.assert_allclose(np.stack(images), expected, atol=0.51)
    assert not np.array_equal(
        images[0], np.asarray(Image.open(tmp_path / "generated-2" / "00000.png"))
    )


def test_interpolations_go_from_one_draw_to_another(finished, tmp_path, monkeypatch):
    """In eight equal steps, each of which is distributed as N(0, I)."""
    drawn = []

    class Generator(gan.Generator):
        def forward(self, z):
            drawn.append(z)
            return super().forward(z)

    monkeypatch.setattr(gan, "Generator", Generator)
    words = ["--sample", finished / "checkpoint.pt", "--interpolate", 500, "--out-dir", tmp_path]
    assert run(*words) == 0
    assert len(list((tmp_path / "interpolation").iterdir())) == 4000
    z = torch.cat(drawn[:4000]).view(500, 8, 5)
    angle = torch.arange(8) * math.pi / 14
    covariance = torch.einsum("nid,njd->ij", z, z) / 2500
    torch.testing.assert_close(covariance, torch.cos(angle[:, None] - angle), rtol=0, atol=0.1)

    a, b = z[:, :1], z[:, 7:]
    t = angle[:, None]
    torch.testing.assert_close(z, t.cos() * a + t.sin() * b)
    grid = np.asarray(Image.open(tmp_path / "interpolation.png").convert("L"))
    images = averaged_generator(finished)(z.flatten(0, 1)[:64])
    assert np.abs(show((images + 1) * 127.5) - grid).max() <= 1
