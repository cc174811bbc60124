"""What vae.py, gan.py and dcgan.py draw: every epoch, with --sample, and with --interpolate."""

import math

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, run, show
from PIL import Image
from torchvision.transforms.functional import center_crop

import dcgan
import gan
import vae


@pytest.fixture(scope="module", params=["vae", "gan", "dcgan"])
def finished(request, flags, tmp_path_factory):
    """A script, and the folder of a run of two epochs, not to be changed."""
    out = tmp_path_factory.mktemp(request.param) / "run"
    words = ["--epochs", 2, "--keep-every", 1, "--lr", 0.02, "--out-dir", out]
    assert run(SCRIPTS[request.param], *flags[request.param], *words) == 0
    return SCRIPTS[request.param], out


@torch.no_grad()
def draw(checkpoint, seed, count):
    """The images (N, 1, H, W), from 0 to 255, that a checkpoint's network makes of the z that the
    seed draws."""
    state = torch.load(checkpoint, weights_only=True)
    torch.manual_seed(seed)
    return decode(state, torch.randn(count, state["args"]["latent_dim"]))


@torch.no_grad()
def decode(state, z):
    latent_dim, width = (state["args"][name] for name in ("latent_dim", "width"))
    if state["script"] == "vae":
        network = vae.VAE(latent_dim, width, False)
        network.load_state_dict(state["model"])
        return 255 * network.decoder(z).sigmoid()
    if state["script"] == "gan":
        network = gan.Generator(latent_dim, width)
        network.load_state_dict(state["averaged"])
    else:
        network = dcgan.Generator(32, 1, latent_dim, width)
        network.load_state_dict(state["generator"])
    return (network.eval()(z) + 1) * 127.5


def check_grid(path, images):
    grid = np.asarray(Image.open(path).convert("L"))
    assert grid.std() > 5  # or there is nothing to compare
    np.testing.assert_allclose(show(images), grid, atol=1)


def check_files(folder, images):
    """Each is a gray file of 28 by 28 pixels, and the grid has the first 64."""
    images = center_crop(images, 28)
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{n:05d}.png" for n in range(len(images))]
    found = np.stack([Image.open(file) for file in files])
    np.testing.assert_allclose(found, images[:, 0], atol=0.51)
    check_grid(f"{folder}.png", images[:64])


def test_grid_is_of_the_same_noise_every_epoch(finished):
    for epoch in (1, 2):
        images = draw(finished[1] / f"checkpoint_000{epoch}.pt", 0, 64)
        check_grid(finished[1] / "samples" / f"epoch_000{epoch}.png", images)


def test_samples_are_drawn_from_the_seed(finished, tmp_path):
    """One by one, so with BatchNorm in eval mode."""
    script, out = finished
    words = ["--sample", out, "--num-samples", 70, "--seed", 9, "--out-dir", tmp_path]
    assert run(script, *words) == 0
    check_files(tmp_path / "generated", draw(out / "checkpoint.pt", 9, 70))


def test_interpolations_are_on_an_arc(finished, tmp_path):
    """Eight points from a to b; as cos^2 + sin^2 = 1, each is from N(0, I)."""
    script, out = finished
    if script is vae:
        pytest.skip("interpolates between held-out images: test_vae.py")
    assert run(script, "--sample", out, "--interpolate", 9, "--out-dir", tmp_path) == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.manual_seed(0)
    torch.randn(64, 100)  # what --num-samples would show
    a, b = torch.randn(2, 9, 1, 100)
    angle = torch.arange(8).unsqueeze(1) * math.pi / 14
    z = torch.cos(angle) * a + torch.sin(angle) * b
    check_files(tmp_path / "interpolation", decode(state, z.flatten(0, 1)))
