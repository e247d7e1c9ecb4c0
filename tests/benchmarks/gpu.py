"""What steps, sampling and the encoder cost on a GPU, in at most seven minutes (see tests/gpu.sh).

DiTDH-XL at 256 px, random weights and data, bf16. One JSON line for each number, as it comes, in
OUT/gpu.jsonl, so that a run that is cut keeps what it has; profiles lie beside it. Each part has a limit in
seconds and is skipped, and marked so, when the budget is spent. Without a GPU, or with --tiny: tiny sizes.

F is one compiled forward pass of the student, without gradient, for as many rows, of the same run. A step is
loss and backward of a stage's own loss. Calls follow one another without waiting for the device, as in
training: `ms` is the median time from the end of one to the end of the next. `first_s`: seconds of the first
call, which compiles; `python_ms`: until all of a call is issued, with the device idle before it; `peak_gb`:
all that is allocated at the peak. Utilization is of 989 TFLOP/s (dense bf16 of H100 and H200), and of the
products that the step needs (COST.md, "The floor"), whatever it computes.
"""
import argparse
import contextlib
import copy
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from functools import cache
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
parser.add_argument("--tiny", action="store_true", help="tiny sizes")
parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "."), help="folder (default: $OUT, or here)")
parser.add_argument("--budget", type=float, default=400, help="seconds for all (default %(default)g)")
parser.add_argument("--parts", nargs="+", default=[""], help="those alone whose names begin so")
parser.add_argument("--backend", default="inductor", help="of torch.compile, or none (default %(default)s)")
parser.add_argument("--compiled", choices=("modules", "all", "as it is"), default="as it is",
                    help="blocks and last layer, or all parts (default: what DiTDH.compile does)")
parser.add_argument("--begun", type=float, default=time.time(), help=argparse.SUPPRESS)
parser.add_argument("--done", nargs="*", default=[], help=argparse.SUPPRESS)
args = parser.parse_args()
CUDA = torch.cuda.is_available()
TINY = args.tiny or not CUDA
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROWS, REPEATS, PEAK = (8, 1, 1e12) if TINY else (64, 6, 989e12)
PRESET, DECODER = ("DiTDH-mini", "ViT-mini") if TINY else ("DiTDH-XL", "ViT-XL")
GRID, CHANNELS = (2, 8) if TINY else (16, 768)
if TINY:
    torch.set_num_threads(1)
    DIT_PRESETS[PRESET] = dict(hidden_size=(16, 32), depth=(2, 2), num_heads=(2, 2))
FLOOR = {"F": 1, "flow matching": 3, "CMT, student": 3, "MFD, exact": 4.5, "MFD, finite differences": 4.5,
         "MFT, exact": 3.5, "MFT, finite differences": 3.5, "MFD, as published": 10}
EVERY_FOURTH = slice(None, None, 4)


# ---- Parts, limits, numbers ------------------------------------------------
def write(**line):
    line["at_s"] = round(time.time() - args.begun, 1)
    text = json.dumps(line)
    with open(args.out / "gpu.jsonl", "a") as file:
        file.write(text + "\n")
    print(text, flush=True)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


class Late(Exception):
    pass


late = []                                         # torch may raise another error in its place


def alarm(number, frame):
    late.append(number)
    raise Late("the part's limit")


def run_parts(parts):
    """Each within its limit and what is left of the budget. After an error of the device, or a part that was
    cut short, this process may be spoilt: a new one goes on with the next part."""
    signal.signal(signal.SIGALRM, alarm)
    for i, (name, limit, function) in enumerate(parts):
        left = args.budget - (time.time() - args.begun)
        if name in args.done or not any(name.startswith(p) for p in args.parts):
            continue
        if left < min(limit, 15):
            write(part=name, skipped=f"{left:.0f} s are left")
            continue
        # Again and again: a callback may swallow one.
        signal.setitimer(signal.ITIMER_REAL, max(1, min(limit, left)), 3)
        try:
            for line in function():
                write(part=name, **line)
            signal.setitimer(signal.ITIMER_REAL, 0)
            lost = None
        except Exception as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            write(part=name, error=f"{type(error).__name__}: {str(error)[:1000]}")
            lost = late and error
        try:
            synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            lost = error
        if lost and i + 1 < len(parts):
            write(part=name, goes_on=f"in a new process after: {str(lost)[:200]}")
            done = [*args.done, *(name for name, *_ in parts[:i + 1])]
            os.execv(sys.executable, [sys.executable, *sys.argv, "--begun", str(args.begun), "--done", *done])


def timed(function, repeats=None):
    """Numbers of a function's calls."""
    start = time.perf_counter()
    function()
    synchronize()
    first = time.perf_counter() - start
    function()
    synchronize()
    marks, python = [], 0

    def mark():
        if CUDA:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(1e3 * time.perf_counter())
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    mark()
    for _ in range(repeats or REPEATS):
        start = time.perf_counter()
        function()
        python = python or time.perf_counter() - start
        mark()
    synchronize()
    pairs = zip(marks[:-1], marks[1:], strict=True)
    ms = [a.elapsed_time(b) if CUDA else b - a for a, b in pairs]
    line = {"ms": statistics.median(ms), "ms_from": min(ms), "ms_to": max(ms), "python_ms": 1e3 * python}
    line = {name: round(x, 3) for name, x in line.items()} | {"first_s": round(first, 2)}
    if CUDA:
        line["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return line


def measure(function, step, form, rows, repeats=None, **more):
    """A line of numbers, in units of F and of the device's peak too."""
    line = {"step": step, "form": form, "rows": rows, **more, **timed(function, repeats)}
    if step in FLOOR:
        flops = FLOOR[step] * rows * pass_flops()
        line["utilization"] = round(flops / (1e-3 * line["ms"]) / PEAK, 4)
    f = f_ms(rows) or (line["ms"] if step == "F" else None)
    if f:
        line["F"] = round(line["ms"] / f, 3)
    return line


def f_ms(rows):
    """F in milliseconds, from the file, since another process may have measured it."""
    path = args.out / "gpu.jsonl"
    for text in path.read_text().splitlines() if path.exists() else ():
        line = json.loads(text)
        if line.get("step") == "F" and line["form"] == "compiled" and line["rows"] == rows:
            return line["ms"]


# ---- Networks and data -----------------------------------------------------
SIZES = dict(input_size=GRID, in_channels=CHANNELS, num_classes=1000, **DIT_PRESETS[PRESET])


@cache
def pass_flops():
    """FLOP of the student for one row."""
    with torch.device("meta"):
        net, z = DiTDH(**SIZES, time_difference=True).to("meta"), torch.zeros(1, CHANNELS, GRID, GRID)
        t, y = torch.zeros(1), torch.zeros(1, dtype=torch.long)
    return flops_of(net, z, t, y, t)


def flops_of(net, *inputs):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops()


def lively(net):
    """Nothing is zero, so that nothing is left out."""
    for p in net.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net


@cache
def network(kind):
    """Eager; its compiled twins share its weights."""
    torch.manual_seed(0)
    with DEVICE:
        net = lively(DiTDH(**SIZES, time_difference=kind == "student").to(DEVICE))
    return net.requires_grad_(False) if kind == "teacher" else net


@cache
def compiled(kind, tuned=False, **options):
    net = copy.copy(network(kind))
    if args.backend == "none":
        return net
    if tuned:
        options["options"] = {"coordinate_descent_tuning": True}
    net.compile(dynamic=False, **({"backend": args.backend} | options))
    if args.compiled != "as it is":
        apply = torch.compile(model.apply_part, fullgraph=True, dynamic=False,
                              **({"backend": args.backend} | options))
        only = torch.nn.Module if args.compiled == "modules" else object
        net.apply_part = lambda part, *x: (apply if isinstance(part, only) else model.apply_part)(part, *x)
    return net


def graphs():
    from torch._dynamo.utils import counters
    breaks = sum(counters["graph_break"].values())
    return {"graphs": counters["stats"].get("unique_graphs", 0), "breaks": breaks}


@cache
def data(rows):
    g = torch.Generator(DEVICE).manual_seed(0)
    on = dict(device=DEVICE, generator=g)
    z_0, eps = (torch.randn(rows, CHANNELS, GRID, GRID, **on) for _ in range(2))
    y = torch.randint(1000, (rows,), **on)
    s, t = model.time_shift(torch.rand(rows, 2, **on), 6.93).sort(dim=1).values.unbind(1)
    jumps = torch.arange(rows, device=DEVICE) % 4 == 0
    return z_0, eps, t.contiguous(), y, torch.where(jumps, s, t)


def autocast(precision="bf16"):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")


def forward(net, rows):
    z_0, eps, t, y, s = data(rows)

    @torch.no_grad()
    def run():
        with autocast():
            net(z_0, t, y, s)
    return run


def step(loss, net, rows, micro=None, precision="bf16", keep=False):
    """Loss and backward, loss(z_0, eps, t, y, s) -> tensor or (tensor, numbers)."""
    batches = [[x[i:i + (micro or rows)] for x in data(rows)] for i in range(0, rows, micro or rows)]

    def run():
        for batch in batches:
            with autocast(precision):
                value = loss(*batch)
            (value[0] if isinstance(value, tuple) else value).backward()
        if not keep:
            net.zero_grad()
    return run


def flow_matching(net, rows, **more):
    return step(lambda z_0, eps, t, y, s: flow_matching_loss(net, z_0, eps, t, y), net, rows, **more)


def meanflow(h, v, rows, eta=1.0, derivative="jvp", jvp=model.jvp_by_parts, **more):
    def loss(z_0, eps, t, y, s):
        return meanflow_loss(h, v, z_0, eps, t, y, s, eta, derivative, rows=EVERY_FOURTH, h_fixed=h, jvp=jvp)
    return step(loss, h, rows, **more)


# ---- The parts -------------------------------------------------------------
def about():
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    total = torch.cuda.get_device_properties(0).total_memory / 1e9 if CUDA else 0
    yield {"device": name, "memory_gb": round(total, 1), "torch": torch.__version__, "rows": ROWS,
           "tflop_a_row": pass_flops() / 1e12, "compiled": args.compiled, "load": os.getloadavg()[0]}
    n = 64 if TINY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    yield {"what": f"product of {n} x {n} matrices", "tflops": round(2e-9 * n ** 3 / timed(lambda: a @ b)["ms"])}


def main_steps(rows, form="compiled", get=compiled, **options):
    """F, flow matching, MFD."""
    def part():
        h, v, u = (get(kind, **options) for kind in ("student", "teacher", "teacher, trained"))
        for name, run in (("F", forward(h, rows)), ("flow matching", flow_matching(u, rows)),
                          ("MFD, exact", meanflow(h, v, rows))):
            yield measure(run, name, form, rows, **options) | (graphs() if get is compiled else {})
    return part


def profiles():
    """Where the time is: kernels by kind in milliseconds, and tables beside the numbers."""
    from torch.profiler import ProfilerActivity, profile
    h, v, u = compiled("student"), compiled("teacher"), compiled("teacher, trained")
    kinds_of = {"attention": ("fmha", "flash", "sdpa"), "product": ("gemm", "nvjet", "cutlass", "xmma", "cublas"),
                "triton": ("triton",)}
    for name, run in (("F", forward(h, ROWS)), ("FM", flow_matching(u, ROWS)), ("MFD", meanflow(h, v, ROWS))):
        run()
        synchronize()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * CUDA) as prof:
            run()
            synchronize()
        key = "self_cuda_time_total" if CUDA else "self_cpu_time_total"
        table = prof.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=110)
        (args.out / f"profile_{name}.txt").write_text(table)
        spent, count = {}, 0
        for e in prof.events():
            if e.device_type == torch.autograd.DeviceType.CUDA:
                found = [kind for kind, words in kinds_of.items() if any(w in e.name.lower() for w in words)]
                kind = (found or ["other"])[0]
                spent[kind] = spent.get(kind, 0) + e.device_time_total / 1e3
                count += 1
        yield {"profile": name, "kernels": count, "kernel_ms": {k: round(x, 2) for k, x in spent.items()}}


def between():
    """Clip, AdamW and average, alone and after the step."""
    h, v = compiled("student"), compiled("teacher")
    weights = [p for p in h.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-9, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def clip():
        torch.nn.utils.clip_grad_norm_(weights, 1.0)

    @torch.no_grad()
    def lerp():
        torch._foreach_lerp_(average, weights, 1e-4)
    run = meanflow(h, v, ROWS, keep=True)

    def whole():
        run()
        clip()
        optimizer.step()
        optimizer.zero_grad()
        lerp()
    yield measure(whole, "MFD, exact, with clip, AdamW, average", "compiled", ROWS)
    run()
    for name, f in (("clip", clip), ("AdamW", optimizer.step), ("average", lerp)):
        yield measure(f, name, "alone", ROWS)
    optimizer.zero_grad()


def published():
    """All of MeanFlow's evaluations of all rows in one batch under autograd, eager: in bf16, where its finite
    differences are noise, and in its own float32 with TF32. In micro-batches of what fits: three times the
    rows are in memory at once."""
    h, v = network("student"), network("teacher")
    micro = ROWS // 2
    for precision in ("bf16", "fp32"):
        torch.set_float32_matmul_precision("high" if precision == "fp32" else "highest")
        form = f"eager, {'TF32' if precision == 'fp32' else precision}"
        try:
            while True:
                run = step(lambda *x: meanflow_as_published(h, v, *x), h, ROWS, micro, precision)
                try:
                    line = measure(run, "MFD, as published", form, ROWS, 1 if TINY else 3, micro=micro)
                    break
                except torch.OutOfMemoryError:
                    h.zero_grad()
                    micro //= 2
            yield line
        finally:
            torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def padded_swiglu():
    """The head's 5,461 channels, an odd number, padded to a multiple of 8: eager products alone need it."""
    plain = model.SwiGLU.forward

    def forward(self, x):
        hidden = self.w3.in_features
        gap = -hidden % 8
        w12 = torch.nn.functional.pad(self.w12.weight.unflatten(0, (2, hidden)), (0, 0, 0, gap)).flatten(0, 1)
        bias = torch.nn.functional.pad(self.w12.bias.unflatten(0, (2, hidden)), (0, gap)).flatten()
        gate, value = torch.nn.functional.linear(x, w12, bias).chunk(2, dim=-1)
        w3 = torch.nn.functional.pad(self.w3.weight, (0, gap))
        return torch.nn.functional.linear(torch.nn.functional.silu(gate) * value, w3, self.w3.bias)
    model.SwiGLU.forward = forward
    try:
        yield
    finally:
        model.SwiGLU.forward = plain


def eager():
    yield from main_steps(ROWS, "eager", network)()
    with padded_swiglu():
        yield from main_steps(ROWS, "eager, SwiGLU padded", network)()


def others():
    """MFT, CMT and finite differences, compiled."""
    h, v = compiled("student"), compiled("teacher")
    yield measure(meanflow(h, v, ROWS, eta=0.0), "MFT, exact", "compiled", ROWS)

    def cmt(z_0, eps, t, y, s):
        return consistency_loss(h, eps, z_0, t, y, t / 2)
    yield measure(step(cmt, h, ROWS), "CMT, student", "compiled", ROWS)
    z, y = data(ROWS)[1], data(ROWS)[3]

    @torch.no_grad()
    def trajectories():
        with autocast():
            solve_ode(v, z, y, ode_times(16, 6.93))
    # A trajectory serves 64 pairs.
    line = measure(trajectories, f"CMT, {ROWS} trajectories of 16 steps", "compiled", ROWS, 2)
    yield line | {"share_of_a_step_ms": line["ms"] / 64}
    for eta, name in ((1.0, "MFD"), (0.0, "MFT")):
        yield measure(meanflow(h, v, ROWS, eta, "fd"), f"{name}, finite differences", "compiled", ROWS, 3)


@cache
def decoder():
    with DEVICE:
        return lively(ViTDecoder(GRID, CHANNELS, **DECODER_PRESETS[DECODER]).to(DEVICE)).eval()


def sampling():
    """From noise on the device to bytes on the host, images per second."""
    decode = decoder()
    with torch.device("meta"):
        meta = ViTDecoder(GRID, CHANNELS, **DECODER_PRESETS[DECODER]).to("meta")
        flops = flops_of(meta, torch.zeros(1, CHANNELS, GRID, GRID))
    stats = {"mean": torch.zeros(CHANNELS, GRID, GRID, device=DEVICE), "var": torch.ones(CHANNELS, GRID, GRID, device=DEVICE)}

    def run_of(net, rows, nfe):
        z, y = torch.randn(rows, CHANNELS, GRID, GRID, device=DEVICE), torch.randint(1000, (rows,), device=DEVICE)

        @torch.inference_mode()
        def run():
            with autocast():
                images = decode(denormalize(generate(net, z, y, nfe), stats))
            if not images.isfinite().all():
                raise ValueError("not finite")
            return to_uint8(images).cpu()
        return run
    def line_of(form, rows, nfe):
        net = (compiled if form == "compiled" else network)("student")
        with padded_swiglu() if "padded" in form else contextlib.nullcontext():
            line = measure(run_of(net, rows, nfe), f"sampling, {nfe} step", form, rows, 1 if TINY else 3)
        rate = 1e3 * rows / line["ms"]
        return line | {"images_per_second": round(rate, 1),
                       "utilization": round(rate * (nfe * pass_flops() + flops) / PEAK, 4)}
    lines = []
    for rows in (4,) if TINY else (64, 128, 256):
        lines.append(line_of("eager", rows, 1))
        yield lines[-1]
    rows = max(lines, key=lambda line: line["images_per_second"])["rows"]
    yield line_of("eager", rows, 2)
    yield line_of("eager, SwiGLU padded", rows, 1)
    for layer in decode.decoder_layers:
        if args.backend != "none":
            layer.compile(dynamic=False, backend=args.backend)
    for nfe in (1, 2):
        yield line_of("compiled", rows, nfe)


def encoder():
    """DINOv2-base with registers at 224 px, random weights, uint8 images of 256 px on the device."""
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    from encode_latents import Encoder
    shape = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, patch_size=14, image_size=28) if TINY else dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, patch_size=14, image_size=518)
    with tempfile.TemporaryDirectory() as folder:
        Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**shape, num_register_tokens=4)).save_pretrained(folder)
        for precision in ("fp32", "bf16"):
            encode = Encoder(folder, 32 if TINY else 256, None, precision).to(DEVICE)
            for rows in (4,) if TINY else (64, 256):
                images = torch.randint(256, (rows, 3, *[32 if TINY else 256] * 2), dtype=torch.uint8, device=DEVICE)
                flops = flops_of(encode, images) / rows
                run = torch.no_grad()(lambda encode=encode, images=images: encode(images))
                line = measure(run, "encoder", f"eager, {precision}", rows, 1 if TINY else 5)
                rate = 1e3 * rows / line["ms"]
                yield line | {"images_per_second": round(rate, 1), "utilization": round(rate * flops / PEAK, 4)}


def tests():
    """tests/test_gpu.py"""
    start = time.time()
    left = args.budget - (start - args.begun)
    if TINY:
        yield {"skipped": "these are tiny sizes"}
        return
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=8", "tests/test_gpu.py"],
        cwd=ROOT, capture_output=True, text=True, timeout=max(5, min(110, left - 2)))
    yield {"status": run.returncode, "seconds": round(time.time() - start, 1), "says": run.stdout[-1500:]}


# ---- What may be faster ----------------------------------------------------
def replayed():
    """A micro-batch of MFD, or its derivative alone, as one CUDA graph: what launching costs."""
    h, v = compiled("student"), compiled("teacher")
    recorded = {}

    def jvp(function, values, tangents):
        if not CUDA:
            return model.jvp_by_parts(function, values, tangents)
        if not recorded:
            recorded["inputs"] = [x.clone() for x in (*values, *tangents)]
            n = len(values)
            given = function, recorded["inputs"][:n], recorded["inputs"][n:]
            recorded["function"], graph = function, torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                recorded["out"] = model.jvp_by_parts(*given)
            recorded["graph"] = graph
        for x, new in zip(recorded["inputs"], (*values, *tangents), strict=True):
            x.copy_(new)
        recorded["graph"].replay()
        return recorded["out"]
    for rows in (ROWS, ROWS // 2):
        recorded.clear()
        yield measure(meanflow(h, v, rows, jvp=jvp), "MFD, exact", "compiled, derivative a CUDA graph", rows)
    recorded.clear()
    run, graph = meanflow(h, v, ROWS, keep=True), None
    run()
    h.zero_grad()
    if CUDA:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()
    yield measure(graph.replay if graph else run, "MFD, exact", "compiled, all one CUDA graph", ROWS)
    h.zero_grad()


def tuned():
    """Triton's tile sizes searched for: F and flow matching."""
    torch._dynamo.reset()
    options = {"tuned": True} if args.backend == "inductor" else {}
    yield measure(forward(compiled("student", **options), ROWS), "F", "compiled, tuned", ROWS)
    yield measure(flow_matching(compiled("teacher, trained", **options), ROWS), "flow matching", "compiled, tuned", ROWS)


def reduced_overhead():
    """CUDA graphs of every compiled part (mode="reduce-overhead")."""
    torch._dynamo.reset()
    options = {"mode": "reduce-overhead"} if args.backend == "inductor" else {}
    h, v, u = (compiled(kind, **options) for kind in ("student", "teacher", "teacher, trained"))
    rows = ROWS // 2
    for name, run in (("F", forward(h, rows)), ("flow matching", flow_matching(u, rows)),
                      ("MFD, exact", meanflow(h, v, rows))):
        def begun(run=run):
            torch.compiler.cudagraph_mark_step_begin()
            run()
        yield measure(begun, name, "compiled, reduce-overhead", rows)


PARTS = (
    ("about", 15, about),
    ("1 compiled", 150, main_steps(ROWS)),
    ("1 profiles", 20, profiles),
    ("1 whole step", 20, between),
    ("2 published", 45, published),
    ("3 eager", 40, eager),
    ("4 others", 50, others),
    ("5 sampling", 70, sampling),
    ("6 encoder", 25, encoder),
    ("7 half the rows", 60, main_steps(ROWS // 2)),
    ("variant: replayed", 25, replayed),
    ("8 tests", 110, tests),
    ("variant: tuned", 80, tuned),
    ("variant: reduce-overhead", 90, reduced_overhead))

if __name__ == "__main__":
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.done:
        (args.out / "gpu.jsonl").write_text("")
    run_parts(PARTS)
