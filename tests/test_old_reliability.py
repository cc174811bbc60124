"""One drill for the four scripts, driven by their commands: killed, stopped, without room, in a race, misled, fed with rubbish."""

import importlib
import io
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import result, run, same, write_pairs
from PIL import Image

import dcgan
import gan
import pix2pix
import vae

SCRIPTS = {"vae": vae, "gan": gan, "dcgan": dcgan, "pix2pix": pix2pix}
# A server that has imported torch once and forks a process for each command: 0.1 s each instead of 2.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", *SCRIPTS])


def execute(name, argv, cwd, output, before_save=None):
    """What `python NAME.py ARGV` does in the folder `cwd`, stdout and stderr to files."""
    for stream, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(cwd)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for DataLoader, as where the command is typed on Linux
    sys.argv = [f"{name}.py", *argv]
    script = importlib.import_module(name)
    if before_save:
        before_save(script)
    script.main()


class Command:
    """A running command."""

    count = 0

    def __init__(self, name, *argv, cwd, before_save=None):
        Command.count += 1
        self.output = Path(cwd).parent / f"{Path(cwd).name}.{Command.count}"
        arguments = (name, [*map(str, argv)], str(cwd), str(self.output), before_save)
        self.process = PROCESSES.Process(target=execute, args=arguments)
        self.process.start()

    def wait(self, timeout=60):
        """Exit status, as subprocess has it, and what came on stderr."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it hangs"
        err = Path(f"{self.output}.err")  # which is not there yet where a kill came first
        return self.process.exitcode, err.read_text() if err.exists() else ""

    def wait_for(self, path, timeout=60):
        end = time.monotonic() + timeout
        while not path.exists():
            assert self.process.is_alive() and time.monotonic() < end, Path(f"{self.output}.err").read_text()
            time.sleep(0.002)


@pytest.fixture(scope="module")
def flags(data_dir, tmp_path_factory):
    """The flags of a run of each script whose epochs take hundredths of a second."""
    pairs = tmp_path_factory.mktemp("pairs")
    write_pairs(pairs / "train", 3, 0)
    write_pairs(pairs / "val", 1, 1)
    digits = ["--dataset", "mnist", "--data-dir", str(data_dir), "--batch-size", "128"]
    return {
        "vae": [*digits, "--hidden-dim", "8", "--latent-dim", "2"],
        "gan": [*digits, "--width", "2"],
        "dcgan": [*digits, "--width", "2", "--image-size", "28"],
        "pix2pix": "--dataset folder --image-size 32 --width 2 --lr 0.001 --data-dir".split() + [str(pairs)],
    }


@pytest.fixture(scope="module", params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def whole(name, flags, tmp_path_factory):
    """A run of 200 epochs: its folder, and its open files and kilobytes of memory at epochs 60 and 160."""
    folder, seen = tmp_path_factory.mktemp(name), []
    running = Command(name, "--epochs", 200, "--out-dir", folder / "run", *flags[name], cwd=folder)
    for epoch in (60, 160):
        running.wait_for(folder / "run" / "samples" / f"epoch_{epoch:04d}.png")
        process = Path(f"/proc/{running.process.pid}")
        if process.exists():  # on Linux
            memory = re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text())
            seen.append((len(os.listdir(process / "fd")), int(memory[1])))
    assert running.wait() == (0, "")
    return folder / "run", seen


def test_every_flag_of_a_run_is_in_its_checkpoint(name, whole):
    not_of_a_run = {"cuda", "out_dir", "resume", "sample", "num_samples", "interpolate", "input", "deterministic"}
    not_of_a_run |= {"eval", "importance_samples", "checkpoint", "training"}
    saved = torch.load(whole[0] / "checkpoint.pt", weights_only=True)["args"]
    assert saved.keys() == vars(SCRIPTS[name].parse_args([])).keys() - not_of_a_run


def test_a_mistake_in_a_changed_script_keeps_its_traceback(name, flags, tmp_path, monkeypatch):
    """Whoever copies a script and changes its loss sees where it fails."""

    def mistaken(*args):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(SCRIPTS[name], "reconstruction_loss" if name == "vae" else "generator_loss", mistaken)
    with pytest.raises(ValueError, match="shapes"):
        run(SCRIPTS[name], "--epochs", "1", "--out-dir", tmp_path / "run", *flags[name])


@pytest.mark.parametrize("kind", [torch.distributed.DistNetworkError, RuntimeError])
def test_a_lost_process_is_one_line_with_its_cause(kind, name, flags, tmp_path, monkeypatch, capsys):
    def lost(args):
        raise kind("[../gloo/pair.cc:525] Connection closed by peer\nmore")

    monkeypatch.setattr(SCRIPTS[name], "train", lost)
    assert run(SCRIPTS[name], "--out-dir", tmp_path / "run", *flags[name]) == 1
    err = capsys.readouterr().err
    assert "Connection closed by peer (did another process end?" in err and len(err.splitlines()) == 1


def pictures(out_dir):
    return {str(path.relative_to(out_dir)): path.read_bytes() for path in sorted(out_dir.rglob("*.png"))}


def test_killed_at_twenty_moments_the_end_is_the_same_to_the_bit(name, flags, tmp_path):
    """At seeded epochs, and a while after: in a step, a grid, a checkpoint, or in the start where the last kill came late."""
    out, whole, moments = tmp_path / "run", tmp_path / "whole", random.Random(name)
    assert Command(name, "--epochs", 60, "--out-dir", whole, *flags[name], cwd=tmp_path).wait() == (0, "")
    for epoch in sorted(moments.sample(range(1, 40), 20)):
        argv = ["--resume", out / "checkpoint.pt"] if (out / "checkpoint.pt").exists() else ["--epochs", 60, "--out-dir", out, *flags[name]]
        running = Command(name, *argv, cwd=tmp_path)
        running.wait_for(out / "samples" / f"epoch_{epoch:04d}.png")
        running.process.join(moments.uniform(0, 0.05))
        running.process.kill()
        assert running.wait()[0] == -signal.SIGKILL
    assert Command(name, "--resume", out / "checkpoint.pt", cwd=tmp_path).wait() == (0, "")
    (out / "checkpoint.part").unlink(missing_ok=True)  # what a kill left is overwritten by the next, and never read
    assert same(result(out), result(whole))
    assert pictures(out) == pictures(whole)


def test_memory_and_open_files_do_not_grow(whole):
    if not whole[1]:
        pytest.skip("no /proc here")
    (files, memory), (files_later, memory_later) = whole[1]
    assert abs(files_later - files) <= 3 and memory_later < 1.05 * memory  # a file of the epoch may be open just then


def tear_second_save(script):
    saves, fsync = [], os.fsync

    def torn(fd):
        saves.append(fd)
        if len(saves) == 2:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(fd)

    script.os.fsync = torn


def test_killed_with_half_a_checkpoint_on_the_disk(name, flags, tmp_path):
    out = tmp_path / "run"
    running = Command(name, "--epochs", 3, "--out-dir", out, *flags[name], cwd=tmp_path, before_save=tear_second_save)
    assert running.wait()[0] == -signal.SIGKILL
    assert SCRIPTS[name].load_checkpoint(out / "checkpoint.pt")["epoch"] == 1
    assert Command(name, "--resume", out / "checkpoint.pt", cwd=tmp_path).wait() == (0, "")
    assert Command(name, "--epochs", 3, "--out-dir", tmp_path / "other", *flags[name], cwd=tmp_path).wait() == (0, "")
    assert same(result(out), result(tmp_path / "other"))


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_says_how_to_go_on(name, number, status, flags, tmp_path):
    moments = random.Random(name)
    for n in range(3):
        out = tmp_path / str(n)
        running = Command(name, "--epochs", 100_000, "--out-dir", out, *flags[name], cwd=tmp_path)
        running.wait_for(out / "checkpoint.pt")
        time.sleep(moments.uniform(0, 0.1))
        os.kill(running.process.pid, number)
        assert running.wait(10) == (status, f"\nstopped; go on with --resume {out}/checkpoint.pt\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a disk that is always full")
@pytest.mark.parametrize("file", ["checkpoint.part", "metrics.csv", "samples/epoch_0002.png"])
def test_a_full_disk_keeps_the_last_checkpoint(name, file, flags, tmp_path):
    out = tmp_path / "run"
    assert Command(name, "--epochs", 1, "--out-dir", out, *flags[name], cwd=tmp_path).wait() == (0, "")
    before = (out / "checkpoint.pt").read_bytes()
    (out / file).unlink(missing_ok=True)
    (out / file).symlink_to("/dev/full")
    status, err = Command(name, "--resume", out / "checkpoint.pt", "--epochs", 2, cwd=tmp_path).wait()
    assert status == 1 and len(err.splitlines()) == 1 and "No space left" in err
    assert (out / "checkpoint.pt").read_bytes() == before
    (out / file).unlink(missing_ok=True)
    assert Command(name, "--resume", out / "checkpoint.pt", "--epochs", 2, cwd=tmp_path).wait() == (0, "")


def test_two_runs_at_once_have_two_folders(name, flags, tmp_path):
    running = [Command(name, "--epochs", 2, *flags[name], cwd=tmp_path) for _ in range(2)]
    assert [command.wait() for command in running] == [(0, "")] * 2
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == [name, f"{name}-2"]
    assert same(*map(result, folders))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_bad_checkpoints_are_refused(name, whole, tmp_path, monkeypatch, capsys):
    good, script = (whole[0] / "checkpoint.pt").read_bytes(), SCRIPTS[name]
    monkeypatch.chdir(tmp_path)
    for tenth in range(10):
        Path(f"torn{tenth}.pt").write_bytes(good[: len(good) * tenth // 10])
    for seed in range(3):
        data = bytearray(good)
        data[random.Random(seed).randrange(len(good))] ^= 16
        Path(f"flipped{seed}.pt").write_bytes(data)
    checkpoint, number = torch.load(io.BytesIO(good), weights_only=True), int(script.FORMAT.split()[1])
    others = [f"{other} {number}" for other in (*SCRIPTS, "") if other != name]
    for n, format in enumerate([*others, f"{name} {number + 1}"]):
        torch.save({**checkpoint, "format": format}, f"format{n}.pt")
    Path("text.pt").write_text("no checkpoint")
    torch.save([1, 2], "list.pt")
    torch.save({**checkpoint, "evil": Evil()}, "evil.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Evil()))
    Path("link.pt").symlink_to("link.pt")
    names = sorted(path.name for path in Path().iterdir())
    for bad in [*names, "missing.pt", "."]:
        for flag in ("--resume", "--sample", "--eval")[: 3 if script is vae else 2]:
            assert run(script, flag, bad) == 2, bad
            out, err = capsys.readouterr()
            assert out == "" and len(err.splitlines()) == 1 and bad in err
    assert sorted(path.name for path in Path().iterdir()) == names  # no "evil": the code in it did not run


def test_every_flag_with_values_that_no_one_wants(name, whole, flags, tmp_path, monkeypatch, capsys):
    """What is refused is refused in one line, and nothing is written. Some mean something, as --seed 0 does, and run."""

    def no_network(*args):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    script, refused = SCRIPTS[name], 0
    shutil.copytree(whole[0], tmp_path / "run")
    assert run(script, "--help") == 0
    known = re.findall(r"^  (--[a-z0-9-]+)(?: ([A-Z]+))?", capsys.readouterr().out, re.M)
    numbers = [flag for flag, value in known if value in ("N", "X", "K")]
    paths = [flag for flag, value in known if value in ("DIR", "CKPT")]
    assert len(numbers) >= 7 and len(paths) >= 4
    cases = [(flag, value) for flag in numbers for value in ("-1", "0", "nan", "inf", "-inf", "1e400", "two", "", "9" * 30)]
    cases += [(flag, value) for flag in paths for value in ("missing", "file", "file/below", "loop", "locked/below", "folder", "", "x" * 5000)]
    for n, (flag, value) in enumerate(cases):
        for base in ([*flags[name], "--epochs", "1"], ["--sample", tmp_path / "run" / "checkpoint.pt"]):
            case = tmp_path / f"{n}-{len(base)}"
            (case / "folder").mkdir(parents=True)
            (case / "locked").mkdir(mode=0)  # which root may enter
            (case / "file").write_text("kept")
            (case / "loop").symlink_to("loop")
            monkeypatch.chdir(case)
            status = run(script, *base, flag, value)
            err = capsys.readouterr().err
            if status:  # empty folders may stay: torchvision's of a failed download, those of a run whose --lr is 1e30
                refused += 1
                lines = [line for line in err.strip().splitlines() if not line.startswith("skipped ")]
                assert status in (1, 2) and len(lines) == 1 and "error: " in lines[0], (base, flag, value, err)
                assert {path.name for path in case.rglob("*") if not path.is_dir()} == {"file", "loop"}, (base, flag, value)
            assert (case / "file").read_text() == "kept"
    assert refused > len(cases)


# 2 to 8 of EXIF's orientations: how a camera stored what is upright
STORED = dict(zip(range(2, 9), (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                                Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE,
                                Image.Transpose.ROTATE_270)))  # fmt: skip


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A thousand files of mixed trouble: the folder, what the good ones show at the top left and elsewhere, the bad ones."""
    folder, good, bad = tmp_path_factory.mktemp("album"), {}, set()
    for n in range(1000):
        color, kind = (n % 251, n // 251 * 50, 255 - n % 251), n % 20
        image = Image.new("RGB", (40, 40), "white")
        image.paste(color, (0, 0, 20, 20))
        data, corner, rest, suffix = io.BytesIO(), color, (255, 255, 255), "png"
        if kind < 8:  # a JPEG for each orientation
            exif, suffix = Image.Exif(), "jpg"
            exif[0x0112] = kind + 1
            image = image.transpose(STORED[kind + 1]) if kind else image
            image.save(data, "jpeg", quality=95, subsampling=0, exif=exif)
        elif kind == 8:
            image.convert("L").save(data, "png")
            corner = (image.convert("L").getpixel((0, 0)),) * 3
        elif kind == 9:  # 16 bits a pixel
            gray = np.asarray(image.convert("L")).astype(np.uint16) * 257
            Image.fromarray(gray).save(data, "png")
            corner = (int(gray[0, 0]) // 257,) * 3
        elif kind == 10:  # a palette, of which the white is transparent, and shown on white
            image.convert("P", palette=Image.Palette.ADAPTIVE, colors=2).save(data, "png")
        elif kind == 11:
            layer = image.convert("RGBA")
            layer.putalpha(Image.new("L", (40, 40), 0))
            layer.save(data, "png")  # nothing of it is to be seen
            corner = rest
        elif kind == 12:
            image.convert("CMYK").save(data, "jpeg", quality=95, subsampling=0)
            suffix = "jpg"
        elif kind == 13:  # animated: the first frame counts
            image.save(data, "gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "black")])
            suffix = "gif"
        elif kind in (14, 15):
            Image.new("RGB", ((1, 1), (20000, 1))[kind - 14], color).save(data, "png")
            rest = color
        elif kind == 16:
            image.save(data, "jpeg")
            data, suffix = io.BytesIO(data.getvalue()[: len(data.getvalue()) // 2]), "jpg"
        elif kind == 17:
            image.save(data, "png")
            data = io.BytesIO(data.getvalue()[:-30])
        elif kind == 18:
            data = io.BytesIO(b"no image")
        path = folder / f"{n:04d}.{suffix}"
        path.write_bytes(data.getvalue())
        if kind < 16:
            good[path] = corner, rest
        else:
            bad.add(path)
    return folder, good, bad


def shows(image, corner, rest):
    """Whether uint8 (3, 32, 32) is of these two colours, as far as JPEG keeps them."""
    wanted = torch.tensor([corner, rest, rest, rest]).T
    return (image[:, [8, 8, 24, 24], [8, 24, 8, 24]].int() - wanted).abs().max() <= 6


def skipped(err):
    return sorted(Path(line.removeprefix("skipped ").split(": ")[0]) for line in err.strip().splitlines())


def test_dcgan_trains_on_what_is_good_in_a_thousand_images(album, tmp_path, capfd):
    folder, good, bad = album
    argv = ["--dataset", "folder", "--data-dir", folder, "--image-size", "32", "--width", "2", "--epochs", "1"]
    assert run(dcgan, *argv, "--out-dir", tmp_path / "run") == 0
    out, err = capfd.readouterr()
    assert f"{len(good)} images" in out and skipped(err) == sorted(bad)
    for (path, colors), image in zip(sorted(good.items()), dcgan.load_folder(folder, 32, 3, torch.device("cpu"))):
        assert shows(image, *colors), path


def test_pix2pix_translates_what_is_good_in_a_thousand_images(album, flags, tmp_path, capfd):
    folder, good, bad = album
    assert run(pix2pix, *flags["pix2pix"], "--epochs", "1", "--out-dir", tmp_path / "run") == 0
    capfd.readouterr()
    assert run(pix2pix, "--sample", tmp_path / "run" / "checkpoint.pt", "--input", folder) == 0
    assert skipped(capfd.readouterr().err) == sorted(bad)
    written = sorted((tmp_path / "run" / "generated").iterdir())
    assert [path.name.removesuffix(".png").removesuffix(path.suffix) for path in written] == sorted(path.stem if path.suffix != ".gif" else path.name for path in good)
    for path, colors in good.items():
        assert shows(pix2pix.to_network_size(pix2pix.open_image(path), 32), *colors), path
