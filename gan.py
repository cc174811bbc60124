"""The original GAN: Goodfellow et al., "Generative Adversarial Nets" (2014, arXiv:1406.2661).

    python gan.py --cuda                                             MNIST, downloaded to data/
    python gan.py --saturating --d-steps 2                           the minimax value function, k = 2
    torchrun --nproc-per-node 8 gan.py --cuda                        eight GPUs, --batch-size is that of each
    python gan.py --resume runs/gan/checkpoint.pt --epochs 120       go on
    python gan.py --sample runs/gan/checkpoint.pt --num-samples 10000
    python gan.py --sample runs/gan/checkpoint.pt --interpolate 8

Writes to runs/gan: checkpoint.pt, metrics.csv, and samples/epoch_0001.png, ..., the same noise after every epoch.

Measured on MNIST (torch 2.15, AMD EPYC with AVX-512 bf16), Fréchet distance of 10,000 samples to the test set in the
features of tests/benchmark.py's digit classifier: after 25 epochs 21.4, 22.1 and 22.3 (seeds 0 to 2), after 100 with
--bf16 13.6 (seed 0; two halves of the test set: 3.2); every digit between 7.4 and 12.4 % of the samples. On two cores
1,850 images/s, with --bf16 2,890, against 1,430 of a plain loop in the same process (tests/benchmark.py). Not yet run
on a GPU.

Differences from the paper, with the distance after ten epochs of seed 0 where it was measured:
1. G is 100-256-512-1024-784 with BatchNorm, LeakyReLU and tanh, not ReLU and sigmoid; D is 784-1024-512-256-1 with
   LeakyReLU and dropout 0.3, not maxout. G without BatchNorm: 605 (231 with it; batches of 128, Adam at 2e-4).
2. Adam at 4e-4 with beta1 0.5, not momentum, and batches of 64, not 100: 153. At 2e-4 167, in batches of 128 177, both
   231.
3. Images are drawn by a running average of G's weights, as G itself oscillates: 77 instead of 153.
4. G descends -log D(G(z)), which the paper recommends, and not algorithm 1's log(1 - D(G(z))): --saturating.
5. G steps on the images that D saw last, not on new ones, which saves a forward.
6. z is normal, not uniform: the sphere on which slerp() walks is where its mass lies.
"""

import argparse
import contextlib
import copy
import io
import itertools
import math
import os
import shutil
import signal
import socket
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common import save_grid, select_device

FORMAT = "gan 1"  # marks a checkpoint: one of another script, or of another version, is refused
NETWORK = ("dataset", "latent_dim", "width")  # what a checkpoint fixes
METRICS = ("loss_d", "loss_g", "d_real", "d_fake")  # of D's last of k steps; the last two are mean D(x) and D(G(z))
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun says, else one
TERMINAL = sys.stdout is not None and sys.stdout.isatty()  # else no progress is shown within an epoch


def above(low, kind=int, high=2**33):
    def number(text):
        if not low < kind(text) < high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser("gan.py", argparse.SUPPRESS)  # no usage, which would go before every error
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=above(0), default=100, metavar="N", help="passes over the training set (%(default)s)")
    add("--batch-size", type=above(1), default=64, metavar="N", help="images per step and process, >= 2 (%(default)s)")
    add("--lr", type=above(0, float, math.inf), default=4e-4, metavar="X", help="learning rate of Adam (%(default)s)")
    add("--d-steps", type=above(0), default=1, metavar="K", help="steps of D for each of G (%(default)s)")
    add("--saturating", action=argparse.BooleanOptionalAction, default=False, help="G descends log(1 - D(G(z)))")
    add("--seed", type=above(-1), default=0, metavar="N", help="one seed repeats a CPU run to the bit (%(default)s)")
    add("--cuda", action="store_true", help="train on the GPU; under torchrun, each process on its own")
    add("--bf16", action=argparse.BooleanOptionalAction, default=False, help="autocast to bfloat16")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the networks")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=("mnist", "fashion-mnist", "synthetic"), help="default: mnist, or synthetic if offline")
    add("--data-dir", default="data", metavar="DIR", help="where the data sets are")
    add = parser.add_argument_group("networks").add_argument
    add("--latent-dim", type=above(0), default=100, metavar="N", help="size of z (%(default)s)")
    add("--width", type=above(0), default=256, metavar="N", help="units of the narrowest layer (%(default)s)")
    add = parser.add_argument_group("files").add_argument
    add("--out-dir", type=Path, metavar="DIR", help="where to write; default: the first free of runs/gan, -2, ...")
    add("--resume", type=Path, metavar="CKPT", help="continue from that checkpoint, in its folder")
    add("--sample", type=Path, metavar="CKPT", help="no training: write images from that checkpoint, to its folder")
    add("--num-samples", type=above(0), default=64, metavar="N", help="how many images --sample writes (%(default)s)")
    add("--interpolate", type=above(0), metavar="N", help="with --sample: N walks between two z instead")

    args, checkpoint = parser.parse_args(argv), None
    path = args.resume or args.sample
    try:
        if args.resume and args.sample or args.interpolate and not args.sample:
            raise ValueError("--interpolate needs --sample, and --sample excludes --resume")
        if path:  # its arguments become the defaults, so that no other flag is needed
            checkpoint = load_checkpoint(path)
            parser.set_defaults(out_dir=path.parent, **checkpoint["args"])
            args = parser.parse_args(argv)
            for name in (*NETWORK, "seed") if args.resume else NETWORK:
                if getattr(args, name) != checkpoint["args"][name]:
                    raise ValueError(f"--{name.replace('_', '-')} is fixed by {path}: leave it out")
        args.checkpoint, args.data_dir = checkpoint, os.path.abspath(args.data_dir)  # to resume from another folder
        args.training = not args.sample
        written = args.out_dir and args.out_dir / "checkpoint.pt"
        if args.training and written and written.exists() and not (args.resume and args.resume.samefile(written)):
            raise ValueError(f"{args.out_dir} holds a run: --resume {written}, or choose another --out-dir")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def load_images(args, device):
    """The training set: uint8 (N, 784) on the device.

    Where no set was named and MNIST cannot be had, warns and sets args.dataset to synthetic. Raises OSError if a
    named set is neither there nor downloadable."""
    if args.dataset != "synthetic":
        name = args.dataset or "mnist"
        kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[name]
        socket.setdefaulttimeout(10)  # seconds; torchvision sets none, and a dead network would hang
        try:
            images, args.dataset = kind(args.data_dir, download=True).data, name
        except Exception as error:  # no network, no room, a truncated file: torchvision raises many kinds
            why = " ".join(str(error).split())
            reason = f"{name} is not in {args.data_dir}, or not whole, and its download failed ({why})"
            if args.dataset or RANKS > 1:  # or some of the processes could train on another set
                raise OSError(f"{reason}: put it there, or choose another --data-dir or --dataset") from error
            print(f"warning: {reason}, training on synthetic digits", file=sys.stderr)
            args.dataset = "synthetic"
    if args.dataset == "synthetic":
        images = synthetic_digits(20_000, seed=0)
    return images.flatten(1).to(device)


def synthetic_digits(count, seed):
    """`count` digits in Pillow's own font, randomly turned, scaled, slanted and moved: uint8 (count, 28, 28)."""
    glyphs = []
    for digit in "0123456789":
        glyphs.append(Image.new("L", (28, 28)))
        ImageDraw.Draw(glyphs[-1]).text((14, 14), digit, 255, ImageFont.load_default(26), anchor="mm")
    random = torch.Generator().manual_seed(seed)
    glyphs = torch.stack([pil_to_tensor(glyph).float() for glyph in glyphs])
    glyphs = glyphs[torch.randint(10, (count,), generator=random)]
    turn, slant, wide, tall, right, down = torch.empty(6, count).uniform_(-1, 1, generator=random)
    wide, tall, sin, cos = 1.1 + 0.2 * wide, 1.1 + 0.15 * tall, torch.sin(turn / 4), torch.cos(turn / 4)
    warp = torch.stack([wide * cos, wide * (slant / 3 - sin), right / 6, tall * sin, tall * cos, down / 6], 1)
    grid = F.affine_grid(warp.view(count, 2, 3), [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(glyphs, grid, align_corners=False).round().byte().squeeze(1)


def batches(images, batch_size):
    """One epoch in random order, dealt out to the processes, the last partial batch dropped:
    floats (batch_size, 784) in [-1, 1]."""
    order = torch.randperm(len(images)).to(images.device)
    if RANKS > 1:
        dist.broadcast(order, 0)
    steps = len(images) // (batch_size * RANKS)
    order = order[: steps * RANKS * batch_size].view(steps, RANKS, batch_size)[:, RANK]
    for index in order:
        yield images.index_select(0, index).float().div_(127.5).sub_(1)


class Generator(nn.Sequential):
    """z (B, latent_dim) to images (B, pixels) in (-1, 1)."""

    def __init__(self, latent_dim, width, pixels=784):
        layers = []
        for before, after in ((latent_dim, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.LeakyReLU(0.2, inplace=True)]  # (B, after)
        super().__init__(*layers, nn.Linear(4 * width, pixels), nn.Tanh())


class Dropout(nn.Dropout):
    """The same with a mask from rand(), which on a CPU takes less than half the time of PyTorch's own."""

    def forward(self, x):
        if x.is_cuda or not self.training:
            return super().forward(x)
        mask = torch.rand_like(x, dtype=torch.float32).ge_(self.p).div_(1 - self.p)
        return x * mask.to(x.dtype)


class Discriminator(nn.Sequential):
    """Images (B, pixels) in [-1, 1] to logits (B,); D(x) is their sigmoid."""

    def __init__(self, width, pixels=784):
        layers = []
        for before, after in ((pixels, 4 * width), (4 * width, 2 * width), (2 * width, width)):
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2, inplace=True), Dropout(0.3)]  # (B, after)
        super().__init__(*layers, nn.Linear(width, 1), nn.Flatten(0))


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: eq. 1, which D maximizes, with its sign changed."""
    real = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    return real + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits, saturating):
    """-E[log D(G(z))], section 3, whose gradient stays strong where D wins; or E[log(1 - D(G(z)))], what eq. 1 says."""
    if saturating:
        return -F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


@torch.no_grad()
def update_average(averaged, generator, step):
    """Moves `averaged` towards G: a mean over the last tenth of the steps, from step 10,000 over the last 1000 or so.

    Yazici et al. 2019 (arXiv:1806.04498), who take 0.001 from the start, and so keep the random first G long."""
    weight = max(0.001, 10 / (10 + step))
    for mean, value in zip(averaged.state_dict().values(), generator.state_dict().values()):
        if mean.is_floating_point():  # all but BatchNorm's count of batches
            mean.lerp_(value, weight)


def parallel(module):
    """`module`, its gradients averaged over torchrun's processes if there are several."""
    if RANKS > 1:
        module = DistributedDataParallel(module)
        module.broadcast_buffers = False  # or a second forward would change BatchNorm's before the backward
    return module


def train(args):
    device = select_device(args.cuda)
    if RANKS > 1:  # torchrun ends all when one fails; the timeout is for a lost machine, and must outlast the decoding
        gpu = device if device.type == "cuda" else None
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=2), device_id=gpu)
    if RANK:
        dist.barrier()  # the first process downloads, the others find the files
    images = load_images(args, device)
    if RANKS > 1 and RANK == 0:
        dist.barrier()
    steps = len(images) // (args.batch_size * RANKS * args.d_steps)  # of G, an epoch
    if steps == 0:
        reason = f"--batch-size, --d-steps: {args.dataset} has {len(images):,} images, too few for a step"
        raise argparse.ArgumentError(None, reason)

    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width).to(device)
    discriminator = Discriminator(args.width).to(device)
    averaged = copy.deepcopy(generator)  # what grids and samples are drawn with
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr, betas=(0.5, 0.999), fused=True)
    fixed_noise = torch.randn(64, args.latent_dim, generator=torch.Generator().manual_seed(args.seed)).to(device)
    for network in (generator, discriminator) if args.compile else ():  # the same random numbers as without it
        network.compile(options={"fallback_random": True, "triton.cudagraphs": device.type == "cuda"})
    ddp_g, ddp_d = parallel(generator), parallel(discriminator)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16)

    parts = dict(generator=generator, discriminator=discriminator, averaged=averaged)
    parts |= dict(optimizer_g=optimizer_g, optimizer_d=optimizer_d)
    start, seconds, rows = 0, 0.0, []
    if args.checkpoint:
        start, seconds, rows = (args.checkpoint[name] for name in ("epoch", "seconds", "metrics"))
        for name, part in parts.items():
            part.load_state_dict(args.checkpoint[name])
        optimizer_g.param_groups[0]["lr"] = optimizer_d.param_groups[0]["lr"] = args.lr
        torch.set_rng_state(args.checkpoint["rng"])
        if device.type == "cuda" and args.checkpoint["cuda_rng"] is not None:
            torch.cuda.set_rng_state(args.checkpoint["cuda_rng"], device)
    if RANK == 0:
        args.out_dir = args.out_dir or first_free(Path("runs/gan"))
        (args.out_dir / "samples").mkdir(parents=True, exist_ok=True)
    print(f"{args.dataset}: {len(images):,} images of 1x28x28, on {device.type}, to {args.out_dir}", flush=True)
    if start >= args.epochs:
        print(f"epoch {start} is done: raise --epochs to go on")

    for epoch in range(start + 1, args.epochs + 1):
        if RANK:  # noise of its own, and the same when resumed; the checkpoint holds the first process's state
            torch.manual_seed(hash((args.seed, epoch, RANK)))
        totals = torch.zeros(len(METRICS), device=device)
        began = shown = time.perf_counter()
        data = batches(images, args.batch_size)
        for step in range(1, steps + 1):
            if args.compile:  # the last step's CUDA graphs may be overwritten
                torch.compiler.cudagraph_mark_step_begin()
            # Algorithm 1. k steps of D: descend -log D(x) - log(1 - D(G(z))), each on data and noise of its own
            for x in itertools.islice(data, args.d_steps):
                with autocast:
                    fake = ddp_g(torch.randn(args.batch_size, args.latent_dim, device=device))
                    real_logits, fake_logits = ddp_d(x).float(), ddp_d(fake.detach()).float()
                loss_d = discriminator_loss(real_logits, fake_logits)
                optimizer_d.zero_grad()
                loss_d.backward()
                optimizer_d.step()

            # G: descend -log D(G(z)), or log(1 - D(G(z))), through the new D; D's own gradients are not computed
            with autocast:
                logits = discriminator(fake).float()
            loss_g = generator_loss(logits, args.saturating)
            optimizer_g.zero_grad()
            loss_g.backward(inputs=list(generator.parameters()))
            optimizer_g.step()
            update_average(averaged, generator, (epoch - 1) * steps + step)

            with torch.no_grad():
                totals += torch.stack([loss_d, loss_g, real_logits.sigmoid().mean(), fake_logits.sigmoid().mean()])
            if RANKS > 1 and step == steps:
                dist.all_reduce(totals.div_(RANKS))
            if step == steps or TERMINAL and time.perf_counter() - shown > 0.5:
                means = (totals / step).tolist()  # only here does the CPU wait for the GPU
                shown = time.perf_counter()
                rate = step * args.batch_size * RANKS * args.d_steps / (shown - began)
                left = timedelta(seconds=round((shown - began) / step * ((args.epochs - epoch + 1) * steps - step)))
                losses = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(METRICS, means))
                line = f"epoch {epoch}/{args.epochs}  {step}/{steps}  {losses}  {rate:,.0f} images/s  {left} left"
                if TERMINAL:
                    width = shutil.get_terminal_size().columns - 1
                    print(f"\r{line[:width]:{width}}", end="", flush=True)
        weights = sum(p.detach().sum() for p in (*generator.parameters(), *discriminator.parameters()))
        if not all(map(math.isfinite, [*means, weights.item()])):
            raise FloatingPointError(f"losses or weights not finite in epoch {epoch}, which is not saved: lower --lr")
        if RANK:
            continue
        seconds += shown - began
        rows.append([epoch, *means, rate, seconds])
        # The checkpoint comes last: a run killed before it does the whole epoch again, and these files with it.
        save_grid(generate(averaged, fixed_noise), args.out_dir / "samples" / f"epoch_{epoch:04d}.png")
        lines = [("epoch", *METRICS, "images_per_second", "seconds"), *rows]
        (args.out_dir / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        checkpoint = {name: part.state_dict() for name, part in parts.items()}
        checkpoint |= dict(format=FORMAT, epoch=epoch, seconds=seconds, metrics=rows, rng=torch.get_rng_state())
        checkpoint["cuda_rng"] = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kept = (*NETWORK, "epochs", "batch_size", "lr", "d_steps", "saturating", "seed", "bf16", "compile", "data_dir")
        checkpoint["args"] = {name: getattr(args, name) for name in kept}
        save_checkpoint(checkpoint, args.out_dir / "checkpoint.pt")
        print(f"\r{line}" if TERMINAL else line, flush=True)
    if RANKS > 1:
        dist.destroy_process_group()


@torch.no_grad()
def generate(generator, z):
    """G(z), images (B, 1, 28, 28), with BatchNorm's running averages, which it leaves as they are."""
    generator.eval()
    images = generator.forward(z).view(-1, 1, 28, 28)  # uncompiled, also with --compile
    generator.train()
    return images


def slerp(a, b, steps):
    """Walks between points a and b, (N, latent_dim): (N, steps, latent_dim), a first and b last.

    Along the great circle (Shoemake 1985): a straight line would pass nearer to 0 than almost any z ever lies."""
    angle = torch.acos(F.cosine_similarity(a, b).clamp(-0.9999, 0.9999))[:, None, None]  # never quite 0 or 180 degrees
    t = torch.linspace(0, 1, steps)[:, None]
    return (torch.sin((1 - t) * angle) * a[:, None] + torch.sin(t * angle) * b[:, None]) / torch.sin(angle)


def sample(args):
    device = select_device(args.cuda)
    generator = Generator(args.latent_dim, args.width)
    generator.load_state_dict(args.checkpoint["averaged"])
    generator.to(device)
    random = torch.Generator().manual_seed(args.seed)
    if args.interpolate:
        a, b = torch.randn(2, args.interpolate, args.latent_dim, generator=random)
        z, columns, folder = slerp(a, b, 10).flatten(0, 1), 10, first_free(args.out_dir / "interpolation")
    else:
        z = torch.randn(args.num_samples, args.latent_dim, generator=random)
        columns, folder = 8, first_free(args.out_dir / "generated")
    grid = []
    for first in range(0, len(z), 500):
        images = generate(generator, z[first : first + 500].to(device)).cpu()
        for n, image in enumerate(images, first):
            to_pil_image(image.add(1).mul(127.5).round().byte()).save(folder / f"{n:05d}.png")
        grid.extend(images if args.interpolate else images[: max(0, 64 - first)])
    save_grid(grid, folder.with_suffix(".png"), columns)
    print(f"{len(z):,} images in {folder}, a grid in {folder}.png")


def load_checkpoint(path):
    """The dict that train() saved to `path`. ValueError if it is damaged or of another script; runs no code in it."""
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch.load does not compare checksums
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or checkpoint["format"] != FORMAT:
            raise ValueError
        return checkpoint
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        raise error if isinstance(error, OSError) else ValueError(f"{path} is damaged, or no checkpoint of this script")


def save_checkpoint(checkpoint, path):
    """Replaces the file at `path` in one step: after a kill or on a full disk it is the old one or the new one."""
    buffer = io.BytesIO()  # not straight to the file, where a full disk is a RuntimeError without a reason
    torch.save(checkpoint, buffer)
    with open(path.with_suffix(".part"), "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def first_free(path):
    """Makes the first folder of `path`, `path`-2, `path`-3, ... that is not there yet, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for n in itertools.count(1):
        free = path.with_name(f"{path.name}-{n}") if n > 1 else path
        with contextlib.suppress(FileExistsError):  # also where another run was faster
            if not free.with_suffix(".png").exists():  # an earlier --sample's grid
                free.mkdir()
                return free


def main():
    def stop(number, frame):
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    args = parse_args()
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks and writes for all
        if not args.training:
            return
    try:
        sample(args) if args.sample else train(args)
    except KeyboardInterrupt as interrupt:
        path = args.out_dir and args.out_dir / "checkpoint.pt"
        more = args.training and path and path.exists()
        if RANK == 0:
            print("\nstopped" + f"; go on with --resume {path}" * bool(more), file=sys.stderr)
        sys.exit(128 + interrupt.args[0])
    except (OSError, FloatingPointError, argparse.ArgumentError) as error:  # what train() and sample() raise themselves
        sys.exit(f"gan.py: error: {error}")
    except RuntimeError as error:
        if args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException):
            sys.exit(f"gan.py: error: --compile does not work here: {str(error).splitlines()[0]}")
        if any(word in str(error) for word in ("out of memory", "allocate", "ALLOC_FAILED", "overflowed")):
            sys.exit("gan.py: error: out of memory: lower --batch-size, --width or --latent-dim")
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            sys.exit(f"gan.py: error: {str(error).splitlines()[0]} (did another process end? --resume goes on)")
        raise


if __name__ == "__main__":
    main()
