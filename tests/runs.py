"""Short runs of the training stages, and what tests look at."""
import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy
import torch
from PIL import Image

import encode_latents
import model
import train_cmt
import train_meanflow
import train_teacher
from sanity import random_encoder

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"teacher": train_teacher, "cmt": train_cmt, "meanflow": train_meanflow}
TINY = dict(hidden_size=(32, 48), depth=(2, 1), num_heads=(2, 2))
model.DIT_PRESETS["tiny"] = TINY


# ---- Making things ----
def random_images(folder, classes=3, each=12):
    pixels = numpy.random.default_rng(0).integers(0, 256, (classes, each, 16, 16, 3), dtype=numpy.uint8)
    for k in range(classes):
        (folder / f"class{k}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(pixels[k, i]).save(folder / f"class{k}" / f"{i:03d}.png")


def encode(home, *more):
    """Latents of the images in a folder, by a random encoder."""
    random_encoder.main([f"--out={home}/encoder", *"--width 12 --depth 1 --heads 2 --patch 4".split()])
    encode_latents.main(["--data-path", f"{home}/images", "--out", f"{home}/latents",
                         "--encoder", f"{home}/encoder",
                         *"--image-size 16 --encoder-size 16 --workers 0".split(), *more])
    let_go()


def arguments(home, stage, out, *more):
    """A short run of a stage: 6 steps of 16 rows, with a save at step 3. more: flags, in one text or many."""
    more = " ".join(map(str, more)).split()
    preset = [] if "--init" in more else ["--preset", "tiny"]
    inputs = {"teacher": ["--latents", f"{home}/latents", *preset, "--time-shift", "3"],
              "cmt": ["--teacher", f"{home}/teacher", "--teacher-steps", "4", "--pairs", "8"],
              "meanflow": ["--latents", f"{home}/latents", "--teacher", f"{home}/teacher",
                           "--init", f"{home}/cmt", "--loss-form", "mean", "--eta", "1", "0.5"]}[stage]
    return [*inputs, "--out", str(out), *"--steps 6 --batch-size 16 --lr 1e-3 --save-every 3".split(),
            *"--log-every 1 --keep 9 --precision fp32".split(), *more]


def train(home, stage, out, *more):
    try:
        STAGES[stage].main(arguments(home, stage, out, *more))
    finally:
        let_go()


def let_go():
    """Give the locks of this process back, as its end would."""
    while model.LOCKS:
        model.LOCKS.pop().close()


def save_network(folder, net, about, stats):
    """A network to sample from, as sanity/export.py writes it."""
    stats = {"stats": stats} if stats else {}
    model.write_tensors(Path(folder) / "model.safetensors", {"": net.state_dict(), **stats}, about)


def lively(seed=0):
    """A teacher of random weights, none of them zero, so that times and labels matter."""
    torch.manual_seed(seed)
    net = model.DiTDH(4, 12, **TINY, num_classes=3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return net


def save_decoder(home, out):
    net = model.ViTDecoder(4, 12, hidden_size=32, depth=1, num_heads=2, mlp_size=64, patch_size=4)
    save_network(out, net, {"kind": "decoder", "num_heads": 2}, model.load_stats(home / "latents"))


# ---- Looking at them ----
def state(folder, step=None):
    """{part: {name: tensor}} of a run's state, the newest one by default."""
    states = model.states_of(folder)
    return model.read_tensors(states[step] if step else next(iter(states.values())))[0]


def log(folder):
    """Line by line: model.read_log leaves one for each step."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def watch(monkeypatch, module, name):
    """The arguments that a script gives to a function that it uses, call by call."""
    function, calls = getattr(module, name), []

    def watching(*args, **more):
        calls.append([*args, more])
        return function(*args, **more)
    monkeypatch.setattr(module, name, watching)
    return calls


# ---- Processes ----
def process(rank, world, port, argv, main):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(argv)
    torch.distributed.destroy_process_group()


def run_on(world, main, argv):
    """`main(argv)` in `world` processes, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (world, port, argv, main), nprocs=world)


# ---- Mistakes ----
def complain(script, *argv):
    """The one line of a script that ends with status 2."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, argv)], capture_output=True, text=True)
    said = done.stderr.strip()
    assert done.returncode == 2 and "\n" not in said and said.startswith(f"{script}: error: "), done.stderr
    return said


def refused(script, argv, capsys):
    """What a script's main says to these arguments before it ends, here and not in another process."""
    try:
        importlib.import_module(Path(script).stem).main([str(x) for x in argv])
    except model.InputError as error:
        return str(error)
    except SystemExit as end:
        assert end.code == 2
        return capsys.readouterr().err
    finally:
        let_go()
    raise AssertionError(f"{script} {argv} was taken")
