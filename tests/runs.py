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


def random_images(folder, classes=3, each=12):
    g = numpy.random.default_rng(0)
    for k in range(classes):
        (folder / f"class{k}").mkdir(parents=True)
        for i in range(each):
            Image.fromarray(g.integers(0, 256, (16, 16, 3), dtype=numpy.uint8)).save(folder / f"class{k}" / f"{i:03d}.png")


def encode(home, seed=0):
    """Latents of the images in a folder, by a random encoder."""
    encoder = f"{home}/encoder{seed or ''}"
    random_encoder.main(["--out", encoder, *f"--width 12 --depth 1 --heads 2 --patch 4 --seed {seed}".split()])
    encode_latents.main(["--data-path", f"{home}/images", "--out", f"{home}/latents", "--encoder", encoder,
                         *"--image-size 16 --encoder-size 16 --workers 0".split()])
    let_go()


def arguments(home, stage, out, *more):
    """A short run of a stage: 6 steps of 16 rows, with a save at step 3."""
    preset = [] if "--init" in more else ["--preset", "tiny"]
    inputs = {"teacher": ["--latents", f"{home}/latents", *preset, "--time-shift", "3"],
              "cmt": ["--teacher", f"{home}/teacher", "--teacher-steps", "4", "--pairs", "8"],
              "meanflow": ["--latents", f"{home}/latents", "--teacher", f"{home}/teacher", "--init", f"{home}/cmt",
                           "--loss-form", "mean", "--eta", "1", "0.5"]}[stage]
    return [*inputs, "--out", str(out), "--steps", "6", "--batch-size", "16", "--lr", "1e-3", "--save-every", "3", "--log-every", "1",
            "--keep", "9", "--precision", "fp32", *map(str, more)]


def train(home, stage, out, *more):
    try:
        STAGES[stage].main(arguments(home, stage, out, *more))
    finally:
        let_go()


def let_go():
    """Give the locks of this process back, as its end would."""
    while model.LOCKS:
        model.LOCKS.pop().close()


def state(folder, step=None):
    """{part: {name: tensor}} of a run's state, the newest one by default."""
    states = model.states_of(folder)
    return model.read_tensors(states[step] if step else next(iter(states.values())))[0]


def weights(folder, step=None):
    """What is sampled from."""
    return state(folder, step)["ema"]


def about(folder):
    return model.read_tensors(next(iter(model.states_of(folder).values())), only=())[1]


def log(folder):
    """Line by line: model.read_log leaves one for each step."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def save_network(folder, net, about, stats):
    """A network to sample from, as sanity/export.py writes it."""
    stats = {} if stats is None else {"stats": stats}
    model.write_tensors(Path(folder) / "model.safetensors", {"": net.state_dict(), **stats}, about)


def process(rank, world, port, argv, main):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    main(argv)
    torch.distributed.destroy_process_group()
    if Path("/proc").exists():                    # a Gloo thread that is still there at the interpreter's end may abort the process
        threads = [task.read_text() for task in Path("/proc/self/task").glob("*/comm")]
        assert not any("gloo" in name for name in threads), threads


def run_on(world, main, argv):
    """`main(argv)` in `world` processes, as torchrun would start them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(process, (world, port, argv, main), nprocs=world)


def train_on(world, home, stage, out, *more):
    run_on(world, STAGES[stage].main, arguments(home, stage, out, *more))


def close(a, b, tolerance):
    difference = sum(float((a[k].double() - b[k].double()).square().sum()) for k in a) ** 0.5
    return difference <= tolerance * sum(float(v.double().square().sum()) for v in a.values()) ** 0.5


def lively(home, folder, seed=0):
    """The teacher with random numbers added to its weights: after a few steps from zero, labels hardly change what it says."""
    teacher, about = model.load_network(home / "teacher")
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + seed))
    kept = {name: about[name] for name in ("kind", "time_shift", "classes")}
    save_network(folder, teacher, kept, about["stats"])
    return folder


def save_decoder(home, out):
    sizes = dict(input_size=4, in_channels=12, hidden_size=32, depth=1, num_heads=2, mlp_size=64, patch_size=4)
    save_network(out, model.ViTDecoder(**sizes), {"kind": "decoder", "num_heads": 2}, model.load_stats(home / "latents"))


def watch(monkeypatch, module, name):
    """The arguments that a script gives to a function that it uses, call by call."""
    loss, calls = getattr(module, name), []

    def watching(*args, **more):
        calls.append([*args, more])
        return loss(*args, **more)
    monkeypatch.setattr(module, name, watching)
    return calls


def complain(script, *argv, status=2):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, argv)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: "), done.stderr
    return last


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
