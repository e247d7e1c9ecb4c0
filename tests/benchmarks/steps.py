"""What steps, sampling and the encoder cost: on a GPU in at most seven minutes (tests/gpu.sh), on a CPU in hours.

    python tests/benchmarks/steps.py --preset DiTDH-S --rows 32 --precision fp32 --backend none --repeats 2       # on a CPU
    python tests/benchmarks/steps.py --tiny --backend none

At 256 px, random weights and data. One JSON line for each number, as it comes, in OUT/steps.jsonl. On a GPU it
ends when the budget is spent.

F is one compiled forward pass of the student, without gradient, for as many rows, of the same run. A step is loss and backward of
a stage's own loss. Calls follow one another without waiting for the device: `ms` is the median from the end of one to the end of
the next. `first_s`: the first call, which compiles; `peak_gb`: all that is allocated on a GPU at the peak.
Utilization counts the products that the step needs (COST.md, "The floor"), whatever it computes, and is of 989 TFLOP/s (dense bf16
of H100 and H200), on a CPU of a product of 2048 x 2048 matrices.
"""
import argparse
import copy
import functools
import gc
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import model  # noqa: E402
from baselines import meanflow_as_published  # noqa: E402
from model import DECODER_PRESETS, DIT_PRESETS, DiTDH, ViTDecoder, denormalize, ode_times, solve_ode  # noqa: E402
from sample import generate, to_uint8  # noqa: E402
from train_cmt import consistency_loss  # noqa: E402
from train_meanflow import meanflow_loss  # noqa: E402
from train_teacher import flow_matching_loss  # noqa: E402

parser = argparse.ArgumentParser()
add = parser.add_argument
add("--tiny", action="store_true")
add("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="(default %(default)s)")
add("--rows", type=int, default=64, help="of a step (default %(default)s)")
add("--precision", choices=("bf16", "fp32"), default="bf16", help="(default %(default)s)")
add("--repeats", type=int, default=6, help="calls that count (default %(default)s)")
add("--backend", default="inductor", help="of torch.compile, or none (default %(default)s)")
add("--out", type=Path, default=os.environ.get("OUT", "."), help="folder (default: $OUT, or here)")
add("--budget", type=float, default=400, help="seconds, on a GPU (default %(default)g)")
args, BEGUN, F = parser.parse_args(), time.time(), {}
CUDA, TINY = torch.cuda.is_available(), args.tiny
DEVICE = torch.device("cuda" if CUDA else "cpu")
GRID, CHANNELS, ROWS, REPEATS = 16, 768, args.rows, args.repeats
if TINY:
    torch.set_num_threads(1)
    GRID, CHANNELS, ROWS, REPEATS = 2, 8, 8, 1
    args.preset = "DiTDH-mini"
    DIT_PRESETS[args.preset] = dict(hidden_size=(16, 32), depth=(2, 2), num_heads=(2, 2))
SIZES = dict(input_size=GRID, in_channels=CHANNELS, num_classes=1000, **DIT_PRESETS[args.preset])
FLOOR = {"F": 1, "flow matching": 3, "CMT, student": 3, "MFD, exact": 4.5, "MFD, finite differences": 4.5,
         "MFT, exact": 3.5, "MFT, finite differences": 3.5, "MFD, as published": 10}


# ---- Parts, the budget, numbers ----
def write(**line):
    text = json.dumps({**line, "at_s": round(time.time() - BEGUN, 1)})
    with open(args.out / "steps.jsonl", "a") as file:
        file.write(text + "\n")
    print(text, flush=True)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def spent(number, frame):
    write(skipped="the budget is spent")
    os._exit(0)


def run_parts():
    if CUDA:
        signal.signal(signal.SIGALRM, spent)
        signal.alarm(int(args.budget))
    for name, function in PARTS.items():
        try:
            for line in function():
                write(part=name, **line)
        except Exception as error:
            write(part=name, error=f"{type(error).__name__}: {str(error)[:1000]}")
        gc.collect()
        torch.cuda.empty_cache()


def timed(function, repeats=None):
    start, marks = time.perf_counter(), []

    def mark():
        if CUDA:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(1e3 * time.perf_counter())
    function()
    synchronize()
    first = time.perf_counter() - start
    function()
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    mark()
    for _ in range(repeats or REPEATS):
        function()
        mark()
    synchronize()
    ms = [a.elapsed_time(b) if CUDA else b - a for a, b in zip(marks[:-1], marks[1:], strict=True)]
    line = {"ms": statistics.median(ms), "ms_from": min(ms), "ms_to": max(ms), "first_s": first}
    if CUDA:
        line["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return {name: round(x, 3) for name, x in line.items()}


def measure(function, step, form, rows=ROWS, repeats=None):
    line = {"step": step, "form": form, "rows": rows, **timed(function, repeats)}
    if step in FLOOR:
        line["utilization"] = round(FLOOR[step] * rows * pass_flops() / (1e-3 * line["ms"]) / peak_flops(), 4)
    if (step, form) == ("F", "compiled"):
        F[rows] = line["ms"]
    return line | ({"F": round(line["ms"] / F[rows], 3)} if rows in F else {})


# ---- Networks and data ----
def flops_of(net, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops()


@functools.cache
def peak_flops():
    if CUDA:
        return 989e12
    a, b = torch.randn(2, 2048, 2048)
    return 2 * 2048 ** 3 / (1e-3 * timed(lambda: a @ b, 5)["ms_from"])


@functools.cache
def pass_flops():
    """FLOP of the student for one row."""
    with torch.device("meta"):
        net, z = DiTDH(**SIZES, time_difference=True).to("meta"), torch.zeros(1, CHANNELS, GRID, GRID)
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    return flops_of(net, z, t, y, t)


def lively(net):
    """Nothing is zero, so that nothing is left out."""
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net.to(DEVICE)


@functools.cache
def network(kind):
    """Eager; its compiled twin shares its weights."""
    torch.manual_seed(0)
    with DEVICE:
        net = lively(DiTDH(**SIZES, time_difference=kind == "student"))
    return net.requires_grad_(kind != "teacher")


@functools.cache
def compiled(kind):
    net = copy.copy(network(kind))
    if args.backend != "none":
        net.compile(dynamic=False, backend=args.backend)
    return net


@functools.cache
def data(rows):
    on = dict(device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    z_0, eps = (torch.randn(rows, CHANNELS, GRID, GRID, **on) for _ in range(2))
    y = torch.randint(1000, (rows,), **on)
    s, t = model.time_shift(torch.rand(rows, 2, **on), 6.93).sort(dim=1).values.unbind(1)
    return z_0, eps, t.contiguous(), y, torch.where(torch.arange(rows, device=DEVICE) % 4 == 0, s, t)


def autocast(precision=args.precision):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def forward(net):
    z_0, _, t, y, s = data(ROWS)

    @torch.no_grad()
    def run():
        with autocast():
            net(z_0, t, y, s)
    return run


def step(loss, net, micro=ROWS, precision=args.precision):
    """Loss and backward, loss(z_0, eps, t, y, s) -> tensor or (tensor, numbers)."""
    batches = list(zip(*(x.split(micro) for x in data(ROWS)), strict=True))

    def run(keep=False):
        for batch in batches:
            with autocast(precision):
                value = loss(*batch)
            (value[0] if isinstance(value, tuple) else value).backward()
        if not keep:
            net.zero_grad()
    return run


def meanflow(h, v, eta=1.0, derivative="jvp"):
    more = dict(eta=eta, derivative=derivative, jumps=slice(None, None, 4), jvp=model.jvp_by_parts)
    return step(lambda *x: meanflow_loss(h, v, *x, **more), h)


# ---- The parts ----
def about():
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    yield {"device": name, "torch": torch.__version__, "rows": ROWS, "tflop_a_row": pass_flops() / 1e12}


def main_steps(form, get):
    def part():
        h, v, u = (get(kind) for kind in ("student", "teacher", "teacher, trained"))
        yield measure(forward(h), "F", form)
        yield measure(step(lambda *x: flow_matching_loss(u, *x[:4]), u), "flow matching", form)
        yield measure(meanflow(h, v), "MFD, exact", form)
    return part


def whole_step():
    h, v = compiled("student"), compiled("teacher")
    weights = [p for p in h.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-9, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    loss_and_backward = meanflow(h, v)

    def whole():
        loss_and_backward(keep=True)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1e-4)
    yield measure(whole, "MFD, exact, with clip, AdamW, average", "compiled")


def published():
    """Eager: in bf16, where its finite differences are noise, and in its own float32 with TF32. In two micro-batches."""
    h, v = network("student"), network("teacher")
    for precision in ("bf16", "fp32") if CUDA or TINY else (args.precision,):
        torch.set_float32_matmul_precision("high" if precision == "fp32" else "highest")
        run = step(lambda *x: meanflow_as_published(h, v, *x), h, ROWS // 2, precision)
        yield measure(run, "MFD, as published", f"eager, {precision}", repeats=REPEATS // 2 or 1)
    torch.set_float32_matmul_precision("highest")


def others():
    h, v = compiled("student"), compiled("teacher")
    yield measure(meanflow(h, v, eta=0.0), "MFT, exact", "compiled")
    cmt = step(lambda z_0, eps, t, y, s: consistency_loss(h, eps, z_0, t, y, t / 2), h)
    yield measure(cmt, "CMT, student", "compiled")
    _, z, _, y, _ = data(ROWS)

    @torch.no_grad()
    def trajectories():
        with autocast():
            solve_ode(v, z, y, ode_times(16, 6.93))
    line = measure(trajectories, f"CMT, {ROWS} trajectories of 16 steps", "compiled", repeats=2)
    yield line | {"share_of_a_step_ms": line["ms"] / 64}      # a trajectory serves 64 pairs
    for eta, name in ((1.0, "MFD"), (0.0, "MFT")):
        yield measure(meanflow(h, v, eta, "fd"), f"{name}, finite differences", "compiled", repeats=3)


def sampling():
    with DEVICE:
        decode = lively(ViTDecoder(GRID, CHANNELS, **DECODER_PRESETS["ViT-mini" if TINY else "ViT-XL"])).eval()
    flops = flops_of(decode, torch.zeros(1, CHANNELS, GRID, GRID, device=DEVICE))
    stats = {name: torch.ones(CHANNELS, GRID, GRID, device=DEVICE) for name in ("mean", "var")}
    rows = 128 if CUDA and not TINY else 2

    def line_of(form, nfe):
        net = (compiled if form == "compiled" else network)("student")
        _, z, _, y, _ = data(rows)

        @torch.inference_mode()
        def run():
            with autocast():
                images = decode(denormalize(generate(net, z, y, nfe), stats))
            return to_uint8(images).cpu()
        line = measure(run, f"sampling, {nfe} step", form, rows, REPEATS // 2 or 1)
        rate = 1e3 * rows / line["ms"]
        return line | {"images_per_second": round(rate, 1), "utilization": round(rate * (nfe * pass_flops() + flops) / peak_flops(), 4)}
    for nfe in (1, 2):
        yield line_of("eager", nfe)
    for layer in decode.decoder_layers if args.backend != "none" else ():
        layer.compile(dynamic=False, backend=args.backend)
    yield line_of("compiled", 1)


def encoder():
    """DINOv2-base with registers at 224 px, random weights, uint8 images of 256 px on the device."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from encode_latents import Encoder
    width, depth, heads, px = (12, 1, 2, 32) if TINY else (768, 12, 12, 256)
    config = Dinov2WithRegistersConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, patch_size=14,
                                       image_size=28 if TINY else 518, num_register_tokens=4)
    with tempfile.TemporaryDirectory() as folder:
        Dinov2WithRegistersModel(config).save_pretrained(folder)
        for precision in ("fp32", "bf16"):
            encode = Encoder(folder, px, None, precision).to(DEVICE)
            rows = 256 if CUDA and not TINY else 4
            images = torch.randint(256, (rows, 3, px, px), dtype=torch.uint8, device=DEVICE)
            flops = flops_of(encode, images) / rows
            line = measure(torch.no_grad()(lambda encode=encode, images=images: encode(images)), "encoder",
                           f"eager, {precision}", rows)
            rate = 1e3 * rows / line["ms"]
            yield line | {"images_per_second": round(rate, 1), "utilization": round(rate * flops / peak_flops(), 4)}


PARTS = {"about": about, "1 compiled": main_steps("compiled", compiled), "1 whole step": whole_step, "2 published": published,
         "3 eager": main_steps("eager", network), "4 others": others, "5 sampling": sampling, "6 encoder": encoder}

if __name__ == "__main__":
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "steps.jsonl").write_text("")
    run_parts()
