import csv
import math
import shutil
import socket
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import result, run as run_script, same, show
from PIL import Image
from torch import nn

import gan

TINY = ["--width", "4", "--latent-dim", "5", "--batch-size", "64", "--lr", "0.02"]  # a rate that shows within ten steps
run = partial(run_script, gan)


def train(data_dir, out_dir, *flags):
    """A run of a second on the tiny MNIST: its folder."""
    assert run("--dataset", "mnist", "--data-dir", data_dir, "--out-dir", out_dir, *TINY, *flags) == 0
    return out_dir


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The folder of a run of three epochs, not to be changed."""
    return train(data_dir, tmp_path_factory.mktemp("finished") / "run", "--epochs", "3")


def averaged_generator(out_dir):
    """What --sample draws with."""
    generator = gan.Generator(5, 4)
    generator.load_state_dict(gan.load_checkpoint(out_dir / "checkpoint.pt")["averaged"])
    return generator


# networks


def test_networks_are_the_described():
    generator, discriminator = gan.Generator(7, 4), gan.Discriminator(4)
    images = generator(torch.randn(3, 7))
    assert images.shape == (3, 784) and images.abs().max() < 1 and discriminator(images).shape == (3,)
    names = [type(module).__name__ for module in generator]
    assert names == ["Linear", "BatchNorm1d", "LeakyReLU"] * 3 + ["Linear", "Tanh"]
    names = [type(module).__name__ for module in discriminator]
    assert names == ["Linear", "LeakyReLU", "Dropout"] * 3 + ["Linear", "Flatten"]
    values = [(type(m).__name__, name, getattr(m, name)) for net in (generator, discriminator) for m in net for name in ("negative_slope", "p", "eps") if hasattr(m, name)]
    assert set(values) == {("LeakyReLU", "negative_slope", 0.2), ("Dropout", "p", 0.3), ("BatchNorm1d", "eps", 1e-5)}
    sizes = [[m.weight.shape[::-1] for m in net if isinstance(m, nn.Linear)] for net in (generator, discriminator)]
    assert sizes == [[(7, 4), (4, 8), (8, 16), (16, 784)], [(784, 16), (16, 8), (8, 4), (4, 1)]]
    assert gan.Discriminator(4, pixels=2)(gan.Generator(7, 4, pixels=2)(torch.randn(3, 7))).shape == (3,)


def test_dropout_is_alive_in_training_and_absent_in_samples(data_dir, tmp_path, monkeypatch):
    """In the loop D gives one batch two answers; the same z gives the same picture, whatever noise was drawn before."""
    differ = []

    class Discriminator(gan.Discriminator):
        def forward(self, x):
            rng = torch.get_rng_state()
            differ.append((super().forward(x) != super().forward(x)).all().item())
            torch.set_rng_state(rng)
            return super().forward(x)

    monkeypatch.setattr(gan, "Discriminator", Discriminator)
    out = train(data_dir, tmp_path / "run", "--epochs", "2", "--width", "32")
    assert len(differ) == 2 * 4 * 3 and all(differ)
    for folder in ("generated", "generated-2"):
        torch.rand(7)
        assert run("--sample", out / "checkpoint.pt", "--num-samples", "3") == 0
    first, second = (sorted((out / folder).iterdir()) for folder in ("generated", "generated-2"))
    assert len(first) == 3 and [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_dropout_is_torchs():
    """A share p becomes 0, the rest is scaled to keep the mean; what became 0 gets no gradient; nothing in eval mode."""
    torch.manual_seed(0)
    x, dropout = torch.full((500, 500), 3.0, requires_grad=True), gan.Dropout(0.3)
    y = dropout(x)
    y.sum().backward()
    assert abs((y == 0).float().mean() - 0.3) < 0.005
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 3 / 0.7))
    torch.testing.assert_close(x.grad, y.detach() / 3)
    assert dropout(x.bfloat16()).dtype == torch.bfloat16 and torch.equal(dropout.eval()(x), x)


# losses


def probability(logits):
    return 1 / (1 + torch.exp(-logits))


def test_losses_are_the_value_function_and_its_non_saturating_form():
    real, fake = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-3.0, 0.5, 1.0])
    expected = -torch.log(probability(real)).mean() - torch.log(1 - probability(fake)).mean()
    torch.testing.assert_close(gan.discriminator_loss(real, fake), expected)
    torch.testing.assert_close(gan.generator_loss(fake, saturating=False), -torch.log(probability(fake)).mean())
    torch.testing.assert_close(gan.generator_loss(fake, saturating=True), torch.log(1 - probability(fake)).mean())
    assert gan.discriminator_loss(torch.tensor([-200.0]), torch.tensor([200.0])) == 400  # logits, never log(0)
    assert gan.generator_loss(torch.tensor([200.0]), saturating=True) == -200


def test_generator_losses_pull_one_way_with_opposite_strength():
    """Section 3: the same direction at every D(G(z)), so the same fixed point; where D wins, one keeps pulling and the other
    lets go, as 1 - D and D; where G wins, the other way round; at 1/2 they are equal."""
    logits = torch.linspace(-9, 9, 19, requires_grad=True)
    pulls = [torch.autograd.grad(19 * gan.generator_loss(logits, flag), logits)[0] for flag in (False, True)]
    assert all((pull < 0).all() for pull in pulls)
    torch.testing.assert_close(pulls[0], probability(logits.detach()) - 1)
    torch.testing.assert_close(pulls[1], -probability(logits.detach()))
    assert pulls[0][0] < -0.999 and pulls[1][0] > -0.001 and pulls[0][9] == pulls[1][9] == -0.5


def test_at_the_fixed_point_neither_loss_moves_g():
    """Theorem 1's equilibrium, D = 1/2 everywhere: a D that does not look at its input has nothing to teach."""
    for saturating in (False, True):
        fake = torch.randn(8, 784, requires_grad=True)
        discriminator = gan.Discriminator(4)
        nn.init.zeros_(discriminator[-2].weight)
        gan.generator_loss(discriminator(fake), saturating).backward()
        assert fake.grad.abs().max() == 0


def test_optimal_discriminator_is_p_over_p_plus_q():
    """Proposition 1, for p = N(-1, 1) and q = N(1, 1/4), by descending the loss on samples of both."""
    torch.manual_seed(0)
    p, q = torch.distributions.Normal(-1.0, 1.0), torch.distributions.Normal(1.0, 0.5)
    discriminator = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=1500)
    for _ in range(1500):
        loss = gan.discriminator_loss(discriminator(p.sample((512, 1))), discriminator(q.sample((512, 1))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x = torch.linspace(-2.5, 2, 50)[:, None]
    density = [distribution.log_prob(x).exp() for distribution in (p, q)]
    found = probability(discriminator(x)).detach()
    assert (found - density[0] / (density[0] + density[1])).abs().max() < 0.05


# the training loop


def test_defaults_are_the_designs(finished):
    args = gan.parse_args([])
    assert (args.epochs, args.batch_size, args.lr, args.latent_dim, args.width) == (100, 64, 4e-4, 100, 256)
    assert (args.d_steps, args.saturating, args.seed, args.bf16) == (1, False, 0, False)
    for name in ("optimizer_g", "optimizer_d"):
        assert gan.load_checkpoint(finished / "checkpoint.pt")[name]["param_groups"][0]["betas"] == (0.5, 0.999)


@pytest.mark.parametrize("flag", ["--saturating", "--no-saturating"])
def test_first_step_is_the_algorithms(data_dir, tmp_path, flag):
    """One step over all 256 images, computed again from the seed alone; the rate is too small for G to see D's step."""
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--batch-size", "256", "--lr", "1e-12", flag)
    torch.manual_seed(0)
    generator, discriminator = gan.Generator(5, 4), gan.Discriminator(4)
    real = gan.synthetic_digits(256, 0)[torch.randperm(256)].flatten(1).float() / 127.5 - 1
    fake = generator(torch.randn(256, 5)).detach()
    d_real, d_fake, d_anew = (probability(discriminator(x)) for x in (real, fake, fake))  # dropout differs
    loss_d = -(torch.log(d_real) + torch.log(1 - d_fake)).mean()
    loss_g = torch.log(1 - d_anew).mean() if flag == "--saturating" else -torch.log(d_anew).mean()
    (row,) = gan.load_checkpoint(out / "checkpoint.pt")["metrics"]
    expected = [value.item() for value in (loss_d, loss_g, d_real.mean(), d_fake.mean())]
    np.testing.assert_allclose(row[1:5], expected, rtol=1e-5)
    assert row[5] * row[6] == pytest.approx(256)  # images/s times seconds


def test_k_steps_of_d_have_data_and_noise_of_their_own(data_dir, tmp_path, monkeypatch):
    """k = 3, batches of 20: of 256 images four times three steps of D, then one of G on the images that D saw last."""
    events, real, noise = [], [], []

    class Generator(gan.Generator):
        def forward(self, z):
            noise.append(z)
            return super().forward(z)

    class Discriminator(gan.Discriminator):
        def forward(self, x):
            real.append(x.detach().clone())
            return super().forward(x)

    class Adam(torch.optim.Adam):
        def step(self):
            events.append("G" if self.param_groups[0]["params"][-1].numel() == 784 else "D")
            super().step()

        def zero_grad(self):
            events.append("0")
            super().zero_grad()

    for module, replacement in ((gan, Generator), (gan, Discriminator), (torch.optim, Adam)):
        monkeypatch.setattr(module, replacement.__name__, replacement)
    monkeypatch.setattr(gan, "generate", lambda generator, z: torch.zeros(1, 1, 28, 28))
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--d-steps", "3", "--batch-size", "20")
    assert "".join(events) == "0D0D0D0G" * 4
    noise = torch.cat(noise)
    assert len(noise) == 4 * 3 * 20 and len(noise.unique()) == noise.numel()
    assert [len(x) for x in real] == [20] * 4 * 7  # each D step real then fake; G's fake
    assert all(torch.equal(real[n + 5], real[n + 6]) for n in range(0, 28, 7))
    real = torch.cat([x for n, x in enumerate(real) if n % 7 in (0, 2, 4)])
    digits = {tuple(image.tolist()) for image in gan.synthetic_digits(256, 0).flatten(1).float() / 127.5 - 1}
    seen = {tuple(image.tolist()) for image in real}
    assert len(seen) == len(real) == 240 and seen <= digits
    (row,) = gan.load_checkpoint(out / "checkpoint.pt")["metrics"]
    assert row[5] * row[6] == pytest.approx(240)  # images/s counts the real ones


def ring(count):
    """Points of eight Gaussians on a circle, as uint8 (count, 2) like an image of two pixels, and the eight centres."""
    angle = torch.arange(8) * math.pi / 4
    centers = 0.7 * torch.stack([angle.cos(), angle.sin()], 1)
    random = torch.Generator().manual_seed(0)
    points = centers[torch.randint(8, (count,), generator=random)] + 0.05 * torch.randn(count, 2, generator=random)
    return points.add(1).mul(127.5).round().byte(), centers


def test_all_modes_of_a_ring_of_gaussians_are_found(tmp_path, monkeypatch):
    """train() itself, its networks, losses and loop, on images of two pixels."""
    points, centers = ring(20_000)
    monkeypatch.setattr(gan, "load_images", lambda args, device: points)
    monkeypatch.setattr(gan, "Generator", partial(gan.Generator, pixels=2))
    monkeypatch.setattr(gan, "Discriminator", partial(gan.Discriminator, pixels=2))
    monkeypatch.setattr(gan, "generate", lambda generator, z: torch.zeros(1, 1, 28, 28))
    flags = ["--latent-dim", "8", "--width", "64", "--epochs", "10", "--batch-size", "128", "--lr", "5e-4"]
    assert run("--dataset", "synthetic", "--out-dir", tmp_path / "run", *flags) == 0
    generator = gan.Generator(8, 64).eval()
    generator.load_state_dict(gan.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["averaged"])
    fake = generator(torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))).detach()
    distance, mode = torch.cdist(fake, centers).min(1)
    near = torch.bincount(mode[distance < 0.15], minlength=8) / len(fake)
    assert near.min() > 0.05 and near.sum() > 0.6, near


def test_grid_is_of_the_same_noise_every_epoch(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1")
    for epoch in (1, 2):
        assert epoch == 1 or run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
        images = gan.generate(averaged_generator(out), torch.randn(64, 5, generator=torch.Generator().manual_seed(0)))
        grid = np.asarray(Image.open(out / "samples" / f"epoch_000{epoch}.png").convert("L"))
        assert np.abs(show((images + 1) * 127.5) - grid).max() <= 1
        assert grid.std() > 5  # or there is nothing to compare


def test_samples_are_of_the_running_average_of_g(data_dir, tmp_path, monkeypatch):
    """Seen after each step of G: a share of max(0.001, 10 / (10 + n)) of it goes into the average, BatchNorm's buffers too."""
    states = []

    class Adam(torch.optim.Adam):
        def step(self):
            super().step()
            states.append([p.detach().clone() for p in self.param_groups[0]["params"]])

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    out = train(data_dir, tmp_path / "run", "--epochs", "2", "--d-steps", "2")
    torch.manual_seed(0)
    average = [p.detach() for p in gan.Generator(5, 4).parameters()]
    for n, state in enumerate(states[2::3], 1):  # D, D, G
        average = [a + 10 / (10 + n) * (p - a) for a, p in zip(average, state)]
    for saved, expected in zip(averaged_generator(out).parameters(), average):
        torch.testing.assert_close(saved, expected)
    generator, averaged = gan.Generator(5, 4), gan.Generator(5, 4)
    generator(torch.randn(9, 5))
    gan.update_average(averaged, generator, 10**6)
    torch.testing.assert_close(averaged[1].running_mean, 0.001 * generator[1].running_mean)


def test_batches_are_shuffled_anew_each_epoch_and_scaled_to_the_range_of_tanh():
    images = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 784)
    torch.manual_seed(0)
    first, second = (torch.cat(list(gan.batches(images, 100)))[:, 0] for _ in range(2))
    assert len(first) == len(first.unique()) == 200
    assert not torch.equal(first, second) and not torch.equal(first, first.sort().values)
    (batch,) = gan.batches(images, 256)
    torch.testing.assert_close(batch[:, 3].sort().values, torch.linspace(-1, 1, 256))


def grads(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def test_each_step_leaves_the_other_network_alone(data_dir, tmp_path, monkeypatch):
    """Seen at each optimizer step: since the step before, only the stepping network got gradients, and its own alone."""
    nets, order, left, wrong = [], [], {}, []

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, *args, **kwargs):
            super().__init__(nn.ParameterList(parameters), *args, **kwargs)
            nets.append(nn.ParameterList(self.param_groups[0]["params"]))

        def step(self):
            mine = next(i for i, net in enumerate(nets) if net[0] is self.param_groups[0]["params"][0])
            other = 1 - mine
            if order:  # not at the very first step, before which the other has no history
                wrong.extend([] if same(grads(nets[other]), left[other]["grads"]) else ["gradients"])
                wrong.extend([] if same(list(nets[other]), left[other]["weights"]) else ["weights"])
                wrong.extend([] if order[-1] == other else ["order"])
            super().step()
            order.append(mine)
            for i in (0, 1):
                left[i] = {"grads": grads(nets[i]), "weights": [p.detach().clone() for p in nets[i]]}

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    train(data_dir, tmp_path / "run", "--epochs", "2")
    assert wrong == [] and order == [1, 0] * 8  # D then G, four batches of 64 an epoch


def test_a_grid_leaves_the_training_as_it_was():
    torch.manual_seed(0)
    generator = gan.Generator(5, 4)
    generator(torch.randn(8, 5))
    before, rng = {k: v.clone() for k, v in generator.state_dict().items()}, torch.get_rng_state()
    images = gan.generate(generator, torch.randn(4, 5, generator=torch.Generator().manual_seed(1)))
    assert same(before, dict(generator.state_dict())) and torch.equal(rng, torch.get_rng_state())
    assert generator.training and not images.requires_grad
    alone = gan.generate(generator, torch.randn(4, 5, generator=torch.Generator().manual_seed(1))[:1])
    torch.testing.assert_close(alone, images[:1])  # one image does not depend on those beside it


def test_metrics_are_what_was_promised(finished):
    rows = list(csv.DictReader(open(finished / "metrics.csv")))
    assert list(rows[0]) == ["epoch", "loss_d", "loss_g", "d_real", "d_fake", "images_per_second", "seconds"]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert all(0 < float(row[name]) < 1 for row in rows for name in ("d_real", "d_fake"))
    assert 0 < float(rows[0]["seconds"]) < float(rows[1]["seconds"]) < float(rows[2]["seconds"])
    assert sorted(p.name for p in (finished / "samples").iterdir()) == [f"epoch_000{n}.png" for n in (1, 2, 3)]


def test_one_seed_repeats_and_two_differ(data_dir, finished, tmp_path):
    assert same(result(train(data_dir, tmp_path / "again", "--epochs", "3")), result(finished))
    other = result(train(data_dir, tmp_path / "other", "--epochs", "3", "--seed", "1"))
    assert not same(other["checkpoint"]["generator"], result(finished)["checkpoint"]["generator"])


def test_losses_in_bf16_stay_near_float32(data_dir, tmp_path, monkeypatch):
    for name in ("discriminator_loss", "generator_loss"):
        loss = getattr(gan, name)

        def checked(*arguments, loss=loss):
            assert arguments[0].dtype == torch.float32  # only the networks are in bfloat16
            return loss(*arguments)

        monkeypatch.setattr(gan, name, checked)
    runs = [train(data_dir, tmp_path / f"run{flag}", "--epochs", "3", "--lr", "0.001", flag) for flag in ("--bf16", "--no-bf16")]
    bf16, float32 = ([row[1:] for row in result(out)["checkpoint"]["metrics"]] for out in runs)
    assert not same(bf16, float32)
    np.testing.assert_allclose(bf16, float32, atol=0.02)


# interrupted and resumed


def test_resumed_is_uninterrupted_to_the_bit(data_dir, finished, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1")
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    assert run("--resume", out / "checkpoint.pt", "--epochs", "3") == 0
    assert same(result(out), result(finished))
    seconds = [row[-1] for row in gan.load_checkpoint(out / "checkpoint.pt")["metrics"]]
    assert seconds == sorted(seconds)  # summed over the runs, too


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = result(finished)
    assert run("--resume", finished / "checkpoint.pt") == 0
    assert "raise --epochs" in capsys.readouterr().out and same(result(finished), before)




def test_resume_keeps_what_was_not_said_and_takes_what_was(data_dir, tmp_path):
    out = train(data_dir, tmp_path / "run", "--epochs", "1", "--lr", "0.001", "--d-steps", "2", "--saturating")
    assert run("--resume", out / "checkpoint.pt", "--epochs", "2") == 0
    state = gan.load_checkpoint(out / "checkpoint.pt")
    assert (state["args"]["d_steps"], state["args"]["saturating"]) == (2, True) and state["metrics"][1][2] < 0
    assert state["epoch"] == 2 and state["args"]["lr"] == state["optimizer_g"]["param_groups"][0]["lr"] == 0.001
    assert run("--resume", out / "checkpoint.pt", "--epochs", "3", "--lr", "0.5") == 0
    state = gan.load_checkpoint(out / "checkpoint.pt")
    assert state["args"]["lr"] == state["optimizer_g"]["param_groups"][0]["lr"] == state["optimizer_d"]["param_groups"][0]["lr"] == 0.5


# run folders


def test_no_run_overwrites_another(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--dataset", "mnist", "--data-dir", data_dir, *TINY, "--epochs", "1"]
    assert [run(*flags) for _ in range(3)] == [0, 0, 0]
    assert sorted(p.name for p in Path("runs").iterdir()) == ["gan", "gan-2", "gan-3"]
    before = Path("runs/gan/checkpoint.pt").read_bytes()
    assert run(*flags, "--out-dir", "runs/gan") == 2
    assert "runs/gan holds a run" in capsys.readouterr().err
    shutil.copy("runs/gan/checkpoint.pt", "runs/gan/kept.pt")  # going on from a copy would overwrite the run, too
    assert run("--resume", "runs/gan/kept.pt", "--epochs", "2") == 2
    assert Path("runs/gan/checkpoint.pt").read_bytes() == before
    assert run("--resume", "runs/gan/kept.pt", "--epochs", "2", "--out-dir", "runs/fork") == 0
    assert Path("runs/gan/checkpoint.pt").read_bytes() == before
    assert gan.load_checkpoint(Path("runs/fork/checkpoint.pt"))["epoch"] == 2


# sampling


def test_a_run_folder_behind_a_broken_link_is_an_error(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("nowhere/at/all")
    assert run("--dataset", "mnist", "--data-dir", data_dir, *TINY) == 1
    assert "runs" in capsys.readouterr().err


def test_samples_are_single_images_at_28_pixels(data_dir, finished, tmp_path):
    out = tmp_path / "out"
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "70", "--out-dir", out) == 0
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "3", "--seed", "9", "--out-dir", out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["generated", "generated-2", "generated-2.png", "generated.png"]
    shutil.move(out / "generated-2", tmp_path / "moved")
    assert run("--sample", finished / "checkpoint.pt", "--num-samples", "3", "--out-dir", out) == 0
    assert (out / "generated-3").exists()  # and the grid of the second stays
    files = sorted((out / "generated").iterdir())
    assert [file.name for file in files] == [f"{n:05d}.png" for n in range(70)]
    images = [np.asarray(Image.open(file)) for file in files]
    assert all(image.shape == (28, 28) and image.dtype == np.uint8 for image in images)
    z = torch.randn(70, 5, generator=torch.Generator().manual_seed(0))
    expected = (gan.generate(averaged_generator(finished), z)[:, 0].numpy() + 1) * 127.5
    np.testing.assert_allclose(np.stack(images), expected, atol=0.51)
    assert not np.array_equal(images[0], np.asarray(Image.open(tmp_path / "moved" / "00000.png")))


def test_walks_are_spherical(finished, tmp_path):
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(4, 50), dim=1) * 7, F.normalize(torch.randn(4, 50), dim=1) * 7
    path = gan.slerp(a, b, 9)
    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    torch.testing.assert_close(path.norm(dim=2), torch.full((4, 9), 7.0))  # a straight walk would dip to 5 or so
    steps = F.cosine_similarity(path[:, 1:], path[:, :-1], dim=2)
    torch.testing.assert_close(steps, steps[:, :1].expand(4, 8))  # equal angles
    assert gan.slerp(torch.randn(4, 1), torch.randn(4, 1), 9).isfinite().all()  # one dimension: 0 or 180 degrees
    assert run("--sample", finished / "checkpoint.pt", "--interpolate", "3", "--out-dir", tmp_path) == 0
    assert Image.open(tmp_path / "interpolation.png").size == (10 * 30 + 2, 3 * 30 + 2)
    assert len(list((tmp_path / "interpolation").iterdir())) == 30


def test_nothing_said_and_no_network(tmp_path, monkeypatch, capsys):
    def no_network(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    assert run("--epochs", "1", "--width", "2", "--batch-size", "2000") == 0
    out, err = capsys.readouterr()
    assert out.startswith("synthetic: 20,000 images") and len(err.strip().splitlines()) == 1 and "warning" in err
    assert gan.load_checkpoint(Path("runs/gan/checkpoint.pt"))["args"]["dataset"] == "synthetic"
    for name in ("mnist", "fashion-mnist"):  # a set that was named is never replaced
        assert run("--dataset", name, "--out-dir", "x") == 1
        out, err = capsys.readouterr()
        assert name in err and len(err.strip().splitlines()) == 1 and not Path("x").exists()


# bad input: one line, non-zero, nothing written


@pytest.mark.parametrize(
    "flags, word",
    [(f"{flag} {value}", flag) for flag in ("--epochs", "--batch-size", "--width", "--latent-dim", "--num-samples") for value in ("0", "-1", "1e400", "two")]
    + [(f"--lr {value}", "--lr") for value in ("0", "-1", "nan", "inf", "1e400", "fast")]
    + [("--seed -1", "--seed"), ("--seed 1e400", "--seed"), ("--interpolate 3", "--sample"), ("--interpolate 0", "--interpolate")]
    + [("--d-steps 0", "--d-steps"), ("--batch-size 1", "--batch-size"), ("--d-steps 5", "256 images"), ("--dataset cifar10", "--dataset"), ("--batch-size 257", "too few"), ("--width 999999999", "memory")]
    + [("--out-dir file", "file"), ("--out-dir file/below", "file/below"), ("--out-dir /proc/nowhere", "/proc/nowhere")],
)
def test_bad_flags_are_refused_in_one_line(flags, word, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("nothing").mkdir()
    Path("file").write_text("kept")
    given = flags.split()
    base = [] if "--dataset" in given else ["--dataset", "mnist", "--data-dir", str(data_dir)]
    assert run(*base, *given) in (1, 2)
    err = capsys.readouterr().err
    assert word in err and len(err.splitlines()) == 1 and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nothing"] and Path("file").read_text() == "kept"


@pytest.mark.parametrize("flag", ["--width 5", "--latent-dim 6", "--dataset synthetic", "--seed 1"])
def test_resume_refuses_another_network(flag, finished, capsys):
    before = result(finished)
    for use in ("--resume", "--sample")[: 1 if "seed" in flag else 2]:
        assert run(use, finished / "checkpoint.pt", *flag.split()) == 2
        assert flag.split()[0] in capsys.readouterr().err
    assert same(result(finished), before)


def test_a_loss_that_is_not_finite_stops_the_run(data_dir, finished, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    before = result(out)
    assert run("--resume", out / "checkpoint.pt", "--epochs", "5", "--lr", "1e18") == 1
    err = capsys.readouterr().err
    assert "epoch 4" in err and len(err.splitlines()) == 1
    assert same(result(out), before)
