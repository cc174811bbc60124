"""Measures what the README reports: a command, not a test. Prints a table in Markdown.

    python tests/benchmark.py speed [vae gan dcgan pix2pix]
        images/s of a script's training loop and of a plain one, in turn
    python tests/benchmark.py gpu [vae gan ...]
        images/s and peak memory of each command on a CUDA GPU, and the share of the GPU's matmul
        rate that its networks reach: plain, with --bf16, with --compile, and with both
    python tests/benchmark.py torchrun [vae gan ...]
        images/s of one process, and of one process for each core
    python tests/benchmark.py quality FOLDER [FOLDER ...]
        generated digits, compared with the test set of MNIST
    python tests/benchmark.py facades FOLDER [FOLDER ...]
        translations of the held-out facades: the FCN score of the paper

The folders are those that --sample wrote. MNIST and facades are read from --data-dir (data).
"""

import argparse
import os
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim import Adam, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, Pad, ToTensor, v2
from torchvision.transforms.functional import pil_to_tensor
from torchvision.tv_tensors import Mask

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dcgan  # noqa: E402
import gan  # noqa: E402
import pix2pix  # noqa: E402
import vae  # noqa: E402

tell = partial(print, file=sys.stderr)


def row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def table(*columns):
    row(*columns)
    row(*["---"] * len(columns))


class Measured(Exception):
    """Ends a loop, with its steps per second."""


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def timed(batches, args):
    """Yields args.steps batches, after a third as many to warm up. Then raises Measured."""
    batches = iter(batches)
    yield from islice(batches, args.steps // 3)
    began = now()
    yield from islice(batches, args.steps)
    raise Measured(args.steps / (now() - began))


# The plain loops of `speed` are those of public code: float32, a DataLoader that transforms image
# by image, unfused Adam, gradients of D in G's step, too, and losses that are read in each step.
# The networks, --batch-size and --lr are those of the script.
def minimize(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def mnist_batches(args, *steps):
    """Yields noise and images."""
    data = MNIST(args.data_dir, transform=Compose(steps))
    for x, _ in DataLoader(data, args.batch_size, shuffle=True):
        yield torch.randn(len(x), args.latent_dim), x


def plain_vae(args):
    """The VAE of pytorch/examples."""
    model = vae.VAE(args.latent_dim, args.width, args.autoencoder)
    optimizer = Adam(model.parameters())
    for epsilon, x in timed(mnist_batches(args, ToTensor()), args):
        logits, kl = model(x, epsilon)
        minimize((vae.reconstruction_loss(logits, x) + kl).sum(), optimizer)


def plain_gan(args):
    """The DCGAN of pytorch/examples, and the same for gan.py."""
    script = gan
    sizes = []
    pad = []
    if hasattr(args, "image_size"):
        script = dcgan
        sizes = [args.image_size, 1]
        pad = [Pad((args.image_size - 28) // 2)]
    batches = mnist_batches(args, *pad, ToTensor(), Normalize(0.5, 0.5))
    generator = script.Generator(*sizes, args.latent_dim, args.width)
    adversarial(generator, script.Discriminator(*sizes, args.width), batches, args)


def plain_pix2pix(args):
    """pytorch-CycleGAN-and-pix2pix, by the authors."""

    def read(path):
        pair = jitter(256)(pix2pix.read_pair([path], 286)[0])
        source, target = pix2pix.source_and_target(pair.unsqueeze(0), args)
        return source, source, target

    paths = [*Path(args.data_dir, "facades", "train").glob("*.jpg")]
    batches = DataLoader(paths, batch_size=None, shuffle=True, collate_fn=read)
    generator = pix2pix.Generator(256, args.width)
    adversarial(generator, pix2pix.Discriminator(args.width), batches, args)


def jitter(size):
    """Crops and mirrors all that it is given alike."""
    return v2.Compose([v2.RandomCrop(size), v2.RandomHorizontalFlip()])


def adversarial(generator, discriminator, batches, args):
    """A batch has the input of G, the condition of D, if it has one, and real images."""
    adam = partial(Adam, lr=args.lr, betas=(0.5, 0.999))
    optimizer_g = adam(generator.parameters())
    optimizer_d = adam(discriminator.parameters())
    for z, *condition, real in timed(batches, args):
        fake = generator(z)
        fake_logits = discriminator(*condition, fake.detach())
        loss_d = dcgan.discriminator_loss(discriminator(*condition, real), fake_logits)
        minimize(loss_d, optimizer_d)
        loss_g = dcgan.generator_loss(discriminator(*condition, fake))
        if condition:
            loss_g += args.l1_weight * F.l1_loss(fake, real)
        minimize(loss_g, optimizer_g)


def own(script, args, counter=None):
    """The loop of the script. The counter counts the operations of a step."""

    def progress(batches, *_):
        batches = cycle(batches)
        if counter:
            with counter:
                yield next(batches)
        yield from timed(batches, args)

    script.progress = progress
    with TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        args.out_dir = Path(folder)
        script.train(args, None)


def rate(loop, args):
    """Returns the loop's images per second."""
    try:
        loop(args)
    except Measured as measured:
        return measured.args[0] * args.batch_size


LOOPS = [  # and the steps of a round
    (vae, plain_vae, "vae.py", 300),
    (gan, plain_gan, "gan.py", 200),
    (dcgan, plain_gan, "dcgan.py --image-size 32", 24),
    (dcgan, plain_gan, "dcgan.py --image-size 64", 6),
    (pix2pix, plain_pix2pix, "pix2pix.py", 10),
]


def speed(args):
    table("images/s of the loop", "plain", "the script's", "ratio")
    for script, plain, line, steps in LOOPS:
        if script.NAME not in args.what:
            continue
        line += " --bf16" * args.bf16
        settings = script.parse_args([*line.split()[1:], "--data-dir", args.data_dir])[0]
        settings.steps = steps
        rounds = []
        for _ in range(3):  # in turn, so that both meet the same other load
            slow = rate(plain, settings)
            fast = rate(partial(own, script), settings)
            rounds.append((fast / slow, slow, fast))
            tell("ratio, plain, the script's:", *rounds[-1])
        ratio, slow, fast = sorted(rounds)[1]  # the round of the median ratio
        row(f"`{line}`", f"{slow:,.2f}", f"{fast:,.2f}", f"{ratio:,.2f}")


def commands(args, flags, ways):
    """Prints a row for each script: the images/s of its last epoch and the seconds of all, for each
    way to start it."""
    table("images/s, seconds of the loop", *ways)
    for name in args.what:
        command = f"{name}.py {flags[name]}"
        cells = [f"`{command}`"]
        for way in ways.values():
            words = ["env", *way.format(sys.executable, command).split()]
            tell(*words)
            with TemporaryDirectory() as folder:
                words += ["--data-dir", args.data_dir, "--out-dir", folder]
                subprocess.run(words, cwd=ROOT, stdout=sys.stderr, check=True)
                metrics = Path(folder, "metrics.csv").read_text()
            speed, seconds = map(float, metrics.split(",")[-2:])
            cells.append(f"{speed:,.1f}, {seconds:,.1f} s")
        row(*cells)


def matmul_rate(dtype):
    """Returns the operations per second of a product of large matrices."""
    torch.set_float32_matmul_precision("high")
    x = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    for _ in range(2):  # the first is for warming up
        began = now()
        for _ in range(20):
            x @ x
        rate = 20 * 2 * 8192**3 / (now() - began)
    return rate


def gpu(args):
    assert torch.cuda.is_available(), "this table is of a CUDA GPU, and there is none"
    tell(torch.cuda.get_device_name(), torch.__version__)
    table("command", "images/s", "peak memory, GiB", "of the matmul rate")
    operations = {}  # of a step
    for way in ("--cuda", "--cuda --bf16", "--cuda --compile", "--cuda --bf16 --compile"):
        peak = matmul_rate(torch.bfloat16 if "bf16" in way else torch.float32)
        for name in args.what:
            script = globals()[name]
            settings = script.parse_args([*way.split(), "--data-dir", args.data_dir])[0]
            settings.steps = 300
            counter = None if settings.compile else FlopCounterMode(display=False)
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            images = rate(partial(own, script, counter=counter), settings)
            if counter:
                operations[name] = counter.get_total_flops()
            memory = torch.cuda.max_memory_allocated() / 2**30
            share = operations[name] * images / settings.batch_size / peak
            row(f"`{name}.py {way}`", f"{images:,.0f}", f"{memory:.2f}", f"{share:.1%}")


FLAGS = {
    "vae": "--dataset mnist --epochs 4",
    "gan": "--dataset mnist --epochs 2",
    "dcgan": "--dataset mnist --width 32 --epochs 1",
    "pix2pix": "--dataset facades --image-size 64 --width 32 --epochs 2",
}


def torchrun(args):
    cores = torch.get_num_threads()
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {cores}"
    ways = {
        "1 process, 1 core": "OMP_NUM_THREADS=1 {} {}",
        f"1 process, {cores} cores": f"OMP_NUM_THREADS={cores} {{}} {{}}",
        f"{cores} processes, 1 core each": f"OMP_NUM_THREADS=1 {{}} {launch} {{}}",
    }
    commands(args, FLAGS, ways)


def trained(model, name, load, augment, epochs, batch, lr, decay):
    """Trains a judge of images on real ones, or reads it from runs/benchmark/."""
    path = f"runs/benchmark/{name}.pt"
    if not os.path.exists(path):
        images, classes = load()
        steps = len(images) // batch
        optimizer = AdamW(model.parameters(), weight_decay=decay)
        schedule = OneCycleLR(optimizer, lr, steps * epochs)
        for epoch in range(epochs):
            for index in torch.randperm(len(images)).split(batch)[:steps]:
                x, y = augment(images[index], classes[index])
                loss = minimize(F.cross_entropy(model(x), y), optimizer)
                schedule.step()
            tell(name, epoch, loss)
        os.makedirs("runs/benchmark", exist_ok=True)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model.eval()


def conv(before, after, bias):
    return [nn.Conv2d(before, after, 3, padding=1, bias=bias), nn.BatchNorm2d(after), nn.ReLU()]


def read_folder(folder, mode):
    """Returns its images in order, (N, C, H, W) in [-1, 1]."""
    paths = sorted(Path(folder).glob("*.png"))
    assert paths, f"no PNG files in {folder}"
    images = [pil_to_tensor(Image.open(path).convert(mode)) for path in paths]
    return torch.stack(images) / 127.5 - 1


def classifier():
    """Maps digits (B, 1, 28, 28) in [-1, 1] to 128 features, and these to logits (B, 10)."""
    features = nn.Sequential(
        *conv(1, 32, True),
        nn.MaxPool2d(2),  # (B, 32, 14, 14)
        *conv(32, 64, True),
        nn.MaxPool2d(2),  # (B, 64, 7, 7)
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 128),
        nn.ReLU(),
        nn.Dropout(0.5),
    )
    return nn.Sequential(features, nn.Linear(128, 10))


def mnist(args, train):
    data = MNIST(args.data_dir, train)
    return data.data.unsqueeze(1) / 127.5 - 1, data.targets


@torch.no_grad()
def look(model, images):
    """Returns the features (N, 128), in double precision, and class probabilities (N, 10)."""
    features = torch.cat([model[0](part) for part in images.split(1000)])
    return features.double(), model[1](features).softmax(1)


def judge(name, p, a, b):
    """Prints a row, with the Fréchet distance of features (N, D) each: Heusel et al. 2017,
    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    root = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.clamp(min=0).sqrt()
    distance = ((a.mean(0) - b.mean(0)).square() + a.var(0) + b.var(0) - 2 * root).sum()
    shares = p.argmax(1).bincount(minlength=10) / len(p) * 100
    digits = " ".join(f"{share:.1f}" for share in shares)
    confident = (p.amax(1) > 0.9).double().mean()
    row(name, f"{distance:.1f}", digits, f"{confident:.1%}")


def quality(args):
    model = trained(
        classifier(),
        "digits",
        partial(mnist, args, True),
        lambda *images_and_classes: images_and_classes,
        epochs=3,
        batch=128,
        lr=3e-3,
        decay=0,
    )
    images, classes = mnist(args, False)
    real, p = look(model, images)
    tell("classifier:", (p.argmax(1) == classes).double().mean().item())
    table("images", "Fréchet distance", "digits 0 to 9, %", "confident (p > 0.9)")
    torch.manual_seed(0)
    shuffled = real[torch.randperm(len(real))]
    judge("test set (one half to the other)", p, *shuffled.chunk(2))
    for folder in args.what:
        features, p = look(model, read_folder(folder, "L"))
        judge(f"{folder} ({len(p):,})", p, features, real)


def block(before, after):
    return nn.Sequential(*conv(before, after, False), *conv(after, after, False))


class UNet(nn.Module):
    """Maps (B, before, H, W) to (B, after, H, W), by smaller U-Nets inside down to 128 channels."""

    def __init__(self, before, channels, after):
        super().__init__()
        self.down = block(before, channels)
        wider = 2 * channels
        self.inside = UNet(channels, wider, channels) if wider <= 128 else block(128, 128)
        self.up = block(wider, after)

    def forward(self, x):
        skip = self.down(x)
        x = self.inside(F.max_pool2d(skip, 2))
        return self.up(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))


def segmenter():
    """Maps photos (B, 3, H, W) in [-1, 1] to logits (B, 12, H, W) of CMP's classes."""
    return nn.Sequential(UNet(3, 32, 32), nn.Dropout2d(0.2), nn.Conv2d(32, 12, 1))


# The colours of CMP's classes.
CMP = "0000de 0030ff 0080ff 00cfff 20ffe0 70ff8e c0ff3f fff000 ff9f00 ff5000 ff0000 ae0000"


def real_facades(args, train, size):
    """Returns photos (N, 3, size, size) in [-1, 1] and the classes of their pixels (N, size, size),
    those of the nearest colours."""
    args.dataset = "facades"
    args.jitter = False
    args.image_size = 256
    labels = pix2pix.load_pairs(args, train)[0][:, 1]
    labels = F.interpolate(labels, (size, size), mode="nearest-exact")
    palette = torch.tensor([*bytes.fromhex(CMP)]).view(12, 3).float()
    classes = [torch.cdist(x.permute(1, 2, 0).float(), palette).argmin(2) for x in labels]
    args.image_size = size
    return pix2pix.load_pairs(args, train)[0][:, 0] / 127.5 - 1, torch.stack(classes)


@torch.no_grad()
def fcn_score(model, photos, classes):
    """Returns the share of pixels whose class is recognized, and the mean over the classes of the
    intersection over union."""
    found = torch.cat([model(part).argmax(1) for part in photos.split(20)])
    right = classes[classes == found].bincount(minlength=12)
    union = torch.cat([classes, found]).flatten().bincount(minlength=12) - right
    return right.sum() / found.numel(), (right / union).mean()


def facades(args):
    folders = {folder: read_folder(folder, "RGB") for folder in args.what}
    size = folders[args.what[0]].shape[-1]
    model = trained(
        segmenter(),
        f"facades_{size}",
        partial(real_facades, args, True, size * 9 // 8),
        lambda photos, classes: jitter(size)(photos, Mask(classes)),
        epochs=40,
        batch=16,
        lr=4e-3,
        decay=0.05,
    )
    photos, classes = real_facades(args, False, size)
    table("photos", "pixel accuracy", "mean IoU")
    for name, images in {"real": photos, **folders}.items():
        row(name, *(f"{score:.3f}" for score in fcn_score(model, images, classes)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", choices=("speed", "gpu", "torchrun", "quality", "facades"))
    add("what", nargs="*", default=[*FLAGS], help="folders of images, or scripts (all four)")
    add("--data-dir", type=os.path.abspath, default="data")
    add("--bf16", action="store_true", help="speed: the script's loop in bfloat16")
    args = parser.parse_intermixed_args()
    torch.manual_seed(0)
    globals()[args.table](args)


if __name__ == "__main__":
    main()
