import csv
import math
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import result, run as run_script, same, show
from PIL import Image

import vae

TINY = ["--hidden-dim", "16", "--latent-dim", "3", "--batch-size", "64"]
run = partial(run_script, vae)


def train(data_dir, out_dir, *flags):
    """A run of a second on the tiny MNIST: its folder."""
    assert run("--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir, *TINY, *flags) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of three epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", "3")


@pytest.fixture(scope="module")
def twin(data_dir, tmp_path_factory):
    """The same of an autoencoder."""
    return train(data_dir, tmp_path_factory.mktemp("twin") / "run", "--epochs", "3", "--autoencoder")


# the objective


def test_kl_is_the_monte_carlo_mean_of_the_log_ratio():
    torch.manual_seed(0)
    mean, logvar = torch.randn(3, 5, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)
    q, p = torch.distributions.Normal(mean, torch.exp(logvar / 2)), torch.distributions.Normal(0, 1)
    z = q.sample((400_000,))
    estimate = (q.log_prob(z) - p.log_prob(z)).sum(2).mean()
    torch.testing.assert_close(vae.kl_divergence(mean, logvar), estimate, atol=0.01, rtol=0)


def test_loss_is_the_sum_over_pixels_and_dimensions_one_by_one():
    torch.manual_seed(0)
    x, logits, mean, logvar = torch.rand(4, 784), torch.randn(4, 784) * 3, torch.randn(4, 20), torch.randn(4, 20)
    reconstruction = kl = 0.0
    for i in range(4):
        for j in range(784):
            p = 1 / (1 + math.exp(-logits[i, j].item()))
            reconstruction -= (x[i, j] * math.log(p) + (1 - x[i, j]) * math.log(1 - p)).item() / 4
        for j in range(20):
            m, v = mean[i, j].item(), math.exp(logvar[i, j].item())
            kl += 0.5 * (m * m + v - 1 - math.log(v)) / 4
    assert vae.reconstruction_loss(logits, x).item() == pytest.approx(reconstruction, rel=1e-5)
    assert vae.kl_divergence(mean, logvar).item() == pytest.approx(kl, rel=1e-5)
    for copies in (1, 3):  # a mean over images: a batch of copies has the value of one
        again = [part[:1].repeat(copies, 1) for part in (logits, x, mean, logvar)]
        torch.testing.assert_close(vae.reconstruction_loss(*again[:2]), vae.reconstruction_loss(logits[:1], x[:1]))
        torch.testing.assert_close(vae.kl_divergence(*again[2:]), vae.kl_divergence(mean[:1], logvar[:1]))


def test_gradients_pass_through_the_sampling(monkeypatch):
    """Against finite differences, at fixed epsilon, for every weight of a small model and both terms."""
    torch.manual_seed(0)
    model = vae.VAE(3, 2).double()
    x, epsilon = torch.rand(2, 784, dtype=torch.double), torch.randn(2, 2, dtype=torch.double)

    def loss(*weights):
        logits, mean, logvar = torch.func.functional_call(model, dict(zip(names, weights)), (x, epsilon))
        return vae.reconstruction_loss(logits, x) + vae.kl_divergence(mean, logvar)

    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # float() in the model would end the double precision
    names, weights = zip(*[(name, p) for name, p in model.named_parameters() if p.numel() < 50])
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}
    assert torch.autograd.gradcheck(loss, weights)


def test_z_has_the_mean_and_variance_of_q():
    torch.manual_seed(0)
    mean, logvar = torch.tensor([1.5, -2.0]), torch.tensor([-1.0, 2.0])
    z = vae.reparameterize(mean, logvar, torch.randn(1_000_000, 2))
    torch.testing.assert_close(z.mean(0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(z.var(0), logvar.exp(), atol=0.05, rtol=0)


def test_the_encoders_variance_counts_at_test_time():
    torch.manual_seed(0)
    model, images = vae.VAE(16, 3), torch.randint(0, 256, (50, 784), dtype=torch.uint8)
    _, reconstruction, _ = vae.evaluate(model, images, seed=0)
    with torch.no_grad():
        model.encoder[2].bias[3:] += 4  # the log-variances; the means stay
    assert abs(vae.evaluate(model, images, seed=0)[1] - reconstruction) > 1
    assert vae.evaluate(model, images, seed=0) == vae.evaluate(model, images, seed=0) != vae.evaluate(model, images, seed=1)


def test_evaluation_is_the_mean_over_all_images_whatever_the_chunks():
    torch.manual_seed(0)
    model, images = vae.VAE(16, 3), torch.randint(0, 256, (1007, 784), dtype=torch.uint8)
    x = images.float() / 255
    with torch.no_grad():
        mean, logvar = model.encode(x)
        assert vae.evaluate(model, images, 0)[2] == pytest.approx(vae.kl_divergence(mean, logvar).item(), rel=1e-5)
    twin = vae.VAE(16, 3, autoencoder=True)
    with torch.no_grad():
        expected = vae.reconstruction_loss(twin(x, None)[0], x).item()
    assert vae.evaluate(twin, images, 0)[1] == pytest.approx(expected, rel=1e-5)


# the bound on log p(x)


def mean_bound(count, draws):
    torch.manual_seed(0)
    model, x, random = vae.VAE(16, 3), torch.rand(5, 784), torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.decoder[0].weight *= 5  # let z matter
    return torch.stack([vae.log_likelihood_bound(model, x, count, random) for _ in range(draws // count)]).mean().item()


def test_bound_of_one_sample_is_the_elbo():
    """Draw by draw log p(x|z) + log p(z) - log q(z|x); and so its mean is the ELBO, whose KL term is the mean of the last two."""
    torch.manual_seed(0)
    model, x = vae.VAE(16, 3), torch.rand(5, 784)
    with torch.no_grad():
        mean, logvar = model.encode(x)
        bound = vae.log_likelihood_bound(model, x, 1, torch.Generator().manual_seed(1))
        z = vae.reparameterize(mean, logvar, torch.randn(5, 3, generator=torch.Generator().manual_seed(1)))
        q, p = torch.distributions.Normal(mean, torch.exp(logvar / 2)), torch.distributions.Normal(0, 1)
        log_px_z = torch.distributions.Bernoulli(logits=model.decoder(z), validate_args=False).log_prob(x).sum(1)
        torch.testing.assert_close(bound, log_px_z + p.log_prob(z).sum(1) - q.log_prob(z).sum(1))
        elbo = -vae.reconstruction_loss(model.decoder(vae.reparameterize(mean, logvar, torch.randn(4000, 5, 3))), x.expand(4000, 5, -1)) / 5
        elbo = elbo - vae.kl_divergence(mean, logvar)
        random = torch.Generator().manual_seed(2)
        bounds = torch.stack([vae.log_likelihood_bound(model, x, 1, random) for _ in range(4000)]).mean(1)
    assert abs(bounds.mean() - elbo) < 5 * (bounds.std() / math.sqrt(4000)) < 2


def test_bound_rises_with_the_samples_and_towards_the_integral():
    means = [mean_bound(count, 4000) for count in (1, 10, 100, 1000)]
    assert means == sorted(means) and means[0] < means[1] - 0.05
    # one latent dimension, where log p(x) is an integral that a fine sum over z gives
    torch.manual_seed(0)
    model, x = vae.VAE(16, 1), torch.rand(4, 784)
    with torch.no_grad():
        z = torch.linspace(-8, 8, 4001)
        log_px_z = -torch.nn.functional.binary_cross_entropy_with_logits(
            model.decoder(z[:, None])[:, None].expand(-1, 4, -1), x.expand(4001, -1, -1), reduction="none"
        ).sum(2)
        log_p = torch.logsumexp(log_px_z - 0.5 * z[:, None] ** 2 - 0.5 * math.log(2 * math.pi), 0) + math.log(16 / 4000)
    bound = vae.log_likelihood_bound(model, x, 40_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(bound, log_p, atol=0.04, rtol=0)  # its own deviation is below 0.01


def test_bound_is_finite_where_the_weights_themselves_underflow():
    torch.manual_seed(0)
    bound = vae.log_likelihood_bound(vae.VAE(16, 3), torch.rand(3, 784), 70, torch.Generator().manual_seed(0))
    assert (bound < -200).all() and bound.isfinite().all()  # exp(-200) is 0 in float32


def test_eval_prints_the_bound_and_writes_nothing(finished, capsys):
    before = result(finished)
    assert run("--eval", finished / "checkpoint.pt", "--importance-samples", "20") == 0
    first = capsys.readouterr().out
    model = vae.VAE(16, 3)
    model.load_state_dict(vae.load_checkpoint(finished / "checkpoint.pt")["model"])
    x, random = vae.synthetic_digits(64, 1).flatten(1) / 255, torch.Generator().manual_seed(0)
    bound = vae.log_likelihood_bound(model, x, 20, random).mean()
    assert f"log p(x) >= {bound:.2f} nats" in first and "64 held-out" in first and "20 importance samples" in first
    assert run("--eval", finished / "checkpoint.pt", "--importance-samples", "20") == 0
    assert capsys.readouterr().out == first and same(result(finished), before)


# the autoencoder


def test_autoencoder_repeats_z_and_has_no_kl(twin):
    model = vae.VAE(16, 3, autoencoder=True)
    model.load_state_dict(vae.load_checkpoint(twin / "checkpoint.pt")["model"])
    x = torch.rand(4, 784)
    a, b = (model(x, torch.randn(4, 3))[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a, model.decoder(model.encode(x)[0]))
    rows = list(csv.DictReader(open(twin / "metrics.csv")))
    assert list(rows[0]) == ["epoch", "train_reconstruction", "test_reconstruction", "images_per_second", "seconds"]
    # no KL pulls at it: the half of the encoder that gives logvar stays where it started
    torch.manual_seed(0)
    assert torch.equal(vae.VAE(16, 3).encoder[2].weight[3:], model.encoder[2].weight[3:])


def test_autoencoder_has_no_prior_to_sample(twin, tmp_path, capsys):
    for flag in ("--sample", "--eval"):
        assert run(flag, twin / "checkpoint.pt") == 2
        assert "prior" in capsys.readouterr().err
    assert sorted(p.name for p in twin.iterdir()) == ["checkpoint.pt", "metrics.csv", "reconstructions"]
    assert run("--sample", twin / "checkpoint.pt", "--interpolate", "2", "--out-dir", tmp_path) == 0
    assert len(list((tmp_path / "interpolation").iterdir())) == 20
    assert run("--resume", twin / "checkpoint.pt", "--epochs", "4", "--out-dir", tmp_path) == 0


# training


def test_defaults_are_the_papers_and_the_designs():
    args = vae.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.constant_lr, args.beta) == (10, 128, None, False, 1)
    assert (args.hidden_dim, args.latent_dim, args.autoencoder, args.seed, args.bf16) == (400, 20, False, 0, False)


def test_rate_is_one_cycle_unless_constant(data_dir, tmp_path, monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    train(data_dir, tmp_path / "cycle", "--epochs", "25")
    assert len(rates) == 100 and max(rates) == pytest.approx(5e-3, rel=1e-3) and rates.index(max(rates)) == 30
    assert rates[0] == pytest.approx(0.04 * 5e-3) and 0 < rates[-1] < 1e-5 and rates[50] > rates[80]
    rates.clear()
    train(data_dir, tmp_path / "constant", "--epochs", "2", "--constant-lr")
    assert rates == [1e-3] * 8
    rates.clear()
    train(data_dir, tmp_path / "other", "--epochs", "2", "--lr", "0.01")
    assert 0.009 < max(rates) <= 0.01


def test_every_image_and_step_has_noise_of_its_own(data_dir, tmp_path, monkeypatch):
    seen = []

    class VAE(vae.VAE):
        def forward(self, x, epsilon):
            seen.append(epsilon) if self.training and len(x) == 32 else None
            return super().forward(x, epsilon)

    monkeypatch.setattr(vae, "VAE", VAE)
    train(data_dir, tmp_path / "run", "--epochs", "4", "--batch-size", "32")
    noise = torch.stack(seen).flatten()
    assert len(noise) == len(noise.unique()) == 4 * 8 * 32 * 3
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_metrics_are_the_elbo_whatever_beta(data_dir, tmp_path):
    """One step over all 256 images, computed again from the seed alone; and the test loss from the weights it left."""
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--batch-size", "256", "--beta", "8", "--hidden-dim", "16")
    state = vae.load_checkpoint(out / "checkpoint.pt")
    torch.manual_seed(0)
    model = vae.VAE(16, 3)
    x = vae.synthetic_digits(256, 0)[torch.randperm(256)].flatten(1) / 255
    logits, mean, logvar = model(x, torch.randn(256, 3))
    train_loss = (vae.reconstruction_loss(logits, x) + vae.kl_divergence(mean, logvar)).item()
    before = [p.clone() for p in model.parameters()]
    model.load_state_dict(state["model"])
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # a single step moves, too
    tested = vae.evaluate(model, vae.synthetic_digits(64, 1).flatten(1), seed=0)
    assert state["metrics"][0][1:5] == pytest.approx([train_loss, *tested], rel=1e-5)
    assert state["metrics"][0][5] * state["metrics"][0][6] == pytest.approx(256)  # images/s times seconds


def test_losses_in_bf16_stay_near_float32(data_dir, tmp_path):
    runs = [train(data_dir, tmp_path / f"run{flag}", "--epochs", "3", flag) for flag in ("--bf16", "--no-bf16")]
    bf16, float32 = ([row[1:] for row in result(out)["checkpoint"]["metrics"]] for out in runs)
    assert not same(bf16, float32)
    np.testing.assert_allclose(bf16, float32, rtol=0.01, atol=0.05)


def test_training_lowers_the_bound_and_beta_trades_its_terms(data_dir, tmp_path):
    rows = {}
    for beta in ("1", "8"):
        rows[beta] = list(csv.DictReader(open(train(data_dir, tmp_path / beta, "--epochs", "30", "--beta", beta) / "metrics.csv")))
    first, last = rows["1"][0], rows["1"][-1]
    assert list(first) == ["epoch", "train_loss", "test_loss", "test_reconstruction", "test_kl", "images_per_second", "seconds"]
    assert float(last["test_loss"]) < 0.6 * float(first["test_loss"])
    assert float(last["test_loss"]) == pytest.approx(float(last["test_reconstruction"]) + float(last["test_kl"]))
    assert float(rows["8"][-1]["test_kl"]) < 0.8 * float(last["test_kl"])
    assert float(rows["8"][-1]["test_loss"]) == pytest.approx(
        float(rows["8"][-1]["test_reconstruction"]) + float(rows["8"][-1]["test_kl"])
    )  # the ELBO whatever beta


def test_one_seed_repeats_and_two_differ(data_dir, finished, tmp_path):
    assert same(result(train(data_dir, tmp_path / "again", "--epochs", "3")), result(finished))
    other = result(train(data_dir, tmp_path / "other", "--epochs", "3", "--seed", "1"))
    assert not same(other["checkpoint"]["model"], result(finished)["checkpoint"]["model"])


def test_batches_drop_the_tail_and_repeat_nothing():
    images = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 784)
    torch.manual_seed(0)
    parts = list(vae.batches(images, 100))
    assert [part.shape for part in parts] == [(100, 784)] * 2
    values = torch.cat(parts)[:, 0].mul(255).round()
    assert len(values.unique()) == 200 and torch.cat(parts).max() <= 1 and not torch.equal(values, values.sort().values)


# pictures


def test_pictures_of_a_run(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "2", "--latent-dim", "2")
    for name in ("samples", "reconstructions"):
        assert sorted(p.name for p in (out / name).iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    images = np.asarray(Image.open(out / "reconstructions" / "epoch_0002.png").convert("L"))
    held_out = vae.synthetic_digits(64, 1).numpy()  # the tiny MNIST's test set
    model = vae.VAE(16, 2)
    model.load_state_dict(vae.load_checkpoint(out / "checkpoint.pt")["model"])
    expected = vae.decode(model, model.encode(torch.from_numpy(held_out[:32]).flatten(1) / 255)[0])[:, 0].numpy() * 255
    for i in range(32):  # eight inputs in a row, their reconstructions in the next
        row, column = 2 + 60 * (i // 8), 2 + 30 * (i % 8)
        assert np.array_equal(images[row : row + 28, column : column + 28], held_out[i])
        np.testing.assert_allclose(images[row + 30 : row + 58, column : column + 28], expected[i], atol=0.6)
    manifold = np.asarray(Image.open(out / "manifold.png").convert("L"))
    assert manifold.shape == (20 * 30 + 2,) * 2
    q = torch.distributions.Normal(0, 1).icdf(torch.tensor([0.025, 0.975]))
    corners = {(0, 0): (q[0], q[1]), (0, 19): (q[1], q[1]), (19, 0): (q[0], q[0])}  # z_1 to the right, z_2 upwards
    for (row, column), z in corners.items():
        want = vae.decode(model, torch.stack(z)[None])[0, 0].numpy() * 255
        np.testing.assert_allclose(manifold[2 + 30 * row : 30 + 30 * row, 2 + 30 * column : 30 + 30 * column], want, atol=0.6)


def test_prior_grid_is_of_the_same_noise_every_epoch(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1")
    for epoch in (1, 2):
        assert epoch == 1 or run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
        model = vae.VAE(16, 3)
        model.load_state_dict(vae.load_checkpoint(out / "checkpoint.pt")["model"])
        images = vae.decode(model, torch.randn(64, 3, generator=torch.Generator().manual_seed(0)))
        assert np.abs(show(images * 255) - np.asarray(Image.open(out / "samples" / f"epoch_000{epoch}.png").convert("L"))).max() <= 1


def test_samples_and_walks(finished, tmp_path):
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "70", "--out-dir", tmp_path) == 0
    assert run("--sample", finished / "checkpoint.pt", "--interpolate", "2", "--out-dir", tmp_path) == 0
    assert len(list((tmp_path / "generated").iterdir())) == 70
    assert Image.open(tmp_path / "generated.png").size == (8 * 30 + 2, 8 * 30 + 2)
    model = vae.VAE(16, 3)
    model.load_state_dict(vae.load_checkpoint(finished / "checkpoint.pt")["model"])
    means = model.encode(vae.synthetic_digits(64, 1).flatten(1) / 255)[0]
    for walk in (0, 1):  # from the first N images to the next N
        for step in (0, 3, 9):
            z = means[walk] * (1 - step / 9) + means[walk + 2] * step / 9
            seen = np.asarray(Image.open(tmp_path / "interpolation" / f"{10 * walk + step:05d}.png"))
            np.testing.assert_allclose(seen, vae.decode(model, z)[0, 0].numpy() * 255, atol=0.6)


# data, and bad input


def test_nothing_said_and_no_network(tmp_path, monkeypatch, capsys):
    def no_network(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    assert run("--epochs", "1", *TINY, "--cuda" if not torch.cuda.is_available() else "--no-bf16") == 0
    out, err = capsys.readouterr()
    warnings = err.strip().splitlines()
    assert out.startswith("synthetic: 20,000 images") and warnings and all("warning" in line for line in warnings)
    assert sorted(p.name for p in Path("runs/vae").iterdir()) == ["checkpoint.pt", "metrics.csv", "reconstructions", "samples"]
    assert run("--dataset", "fashion-mnist", "--out-dir", "x") == 1
    assert "fashion-mnist" in capsys.readouterr().err and not Path("x").exists()


@pytest.mark.parametrize(
    "flags, word",
    [(f"{flag} {value}", flag) for flag in ("--epochs", "--batch-size", "--hidden-dim", "--latent-dim", "--importance-samples") for value in ("0", "1e400", "two")]
    + [(f"{flag} {value}", flag) for flag in ("--lr", "--beta") for value in ("0", "-1", "nan", "inf")]
    + [("--dataset cifar10", "--dataset"), ("--batch-size 257", "too few"), ("--interpolate 3", "--sample"), ("--hidden-dim 8000000000", "memory")]
    + [("--out-dir file", "file"), ("--sample a --eval b", "exclude")],
)
def test_bad_flags_are_refused_in_one_line(flags, word, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    base = [] if "--dataset" in flags else ["--dataset", "mnist", "--data-dir", str(data_dir)]
    assert run(*base, *flags.split()) in (1, 2)
    err = capsys.readouterr().err
    assert word in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"] and Path("file").read_text() == "kept"


@pytest.mark.parametrize("flag", ["--hidden-dim 4", "--latent-dim 6", "--autoencoder", "--dataset synthetic", "--seed 1"])
def test_resume_refuses_another_network(flag, finished, capsys):
    before = result(finished)
    assert run("--resume", finished / "checkpoint.pt", *flag.split()) == 2
    assert flag.split()[0] in capsys.readouterr().err and same(result(finished), before)


def test_walks_need_held_out_images(finished, tmp_path, capsys):
    assert run("--sample", finished / "checkpoint.pt", "--interpolate", "33", "--out-dir", tmp_path / "x") == 1
    assert "fewer" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = result(out)
    assert run("--resume", out / "checkpoint.pt", "--epochs", "5", "--lr", "1e18", "--constant-lr") == 1
    assert "epoch 4" in capsys.readouterr().err and same(result(out), before)
