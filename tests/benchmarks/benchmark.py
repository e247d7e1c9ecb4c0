"""What a step costs, on the machine at hand.

    python tests/benchmarks/benchmark.py              # steps, sampling, the reader: minutes on a GPU, hours on two CPU cores
    python tests/benchmarks/benchmark.py --preset DiTDH-XL --precision bf16 --compile --micro-batch 32 --json xl.json
    python tests/benchmarks/benchmark.py --table      # parameters and multiply-adds of every preset, on the meta device
    python tests/benchmarks/benchmark.py --fit        # the largest micro-batch for cards, presets and stages, computed
    python tests/benchmarks/benchmark.py --metrics    # eval_fid.py's metrics of 50,000 x 2048 features (minutes on a CPU)

F is one forward pass of the student for the same batch, without gradient. Steps are forward and backward of the
stages' own losses, random data and weights; optimizer and average are timed apart. A busy machine disturbs a
step and its neighbours alike: every call stands between two forward passes and is divided by their mean; then
medians. On a CPU, set the two variables of docs/COST.md, or glibc's taking and giving back of memory is
measured too. CMT's drawing of pairs, a gather, is left out. GMAC: billions of multiply-adds of one image (half
of the floating-point operations), once with the attention's two products of scores and values, once, as the
paper counts, without.
"""
import argparse
import ctypes
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from baselines import meanflow_all_rows, meanflow_as_published  # noqa: E402
from model import (  # noqa: E402
    DECODER_PRESETS,
    DIT_PRESETS,
    DiTDH,
    ViTDecoder,
    default_time_shift,
    denormalize,
    long_jumps,
    ode_times,
    jvp_by_parts,
    provenance,
    solve_ode,
    time_shift,
    write_json,
)
from sample import to_uint8  # noqa: E402
from train_cmt import consistency_loss  # noqa: E402
from train_meanflow import meanflow_loss  # noqa: E402
from train_teacher import flow_matching_loss  # noqa: E402

# GMAC, arXiv 2511.13019; in one step: DiTDH-XL once, with the ViT-XL decoder
PAPER = {("DiTDH-XL", 256): 157, ("ViT-XL", 256): 106, ("SD-VAE decoder", 256): 310}
PAPER_ONE_STEP = {256: 263, 512: 1051}
PEAK = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
        "B200": 2250e12}                          # dense bf16
FLOOR = {"flow matching": 3, "MFD, finite differences": 4.5, "MFD, exact": 4.5, "MFT, finite differences": 3.5,
         "MFT, exact": 3.5}


def count(net, *inputs):
    """(parameters, GMAC with attention scores, GMAC of the linear and convolutional layers alone) of one image,
    on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.to("meta")(*(x.to("meta") for x in inputs))
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in flops.items() if "bmm" in op or "attention" in op)
    total = sum(flops.values())
    return sum(p.numel() for p in net.parameters()), total / 2e9, (total - attention) / 2e9


def backbone(name, px, time_difference=True):
    with torch.device("meta"):
        net = DiTDH(px // 16, 768, num_classes=1000, time_difference=time_difference, **DIT_PRESETS[name])
    t, y = torch.ones(1), torch.zeros(1, dtype=torch.long)
    return count(net, torch.zeros(1, *net.shape), t, y, *([t] if time_difference else []))


def decoder(name, px):
    with torch.device("meta"):
        net = ViTDecoder(px // 16, 768, **DECODER_PRESETS[name])
    return count(net, torch.zeros(1, *net.shape))


def sd_vae_decoder(px):
    """The decoder that RAE replaces: Stable Diffusion's, 4 x px/8 x px/8 latents. Architecture from diffusers,
    weights not needed."""
    from diffusers import AutoencoderKL
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    return count(torch.nn.Sequential(vae.post_quant_conv, vae.decoder), torch.zeros(1, 4, px // 8, px // 8))


def table():
    """Markdown: every preset, and one image of a DiTDH-XL student with its decoder."""
    print("| network | px | parameters | GMAC with attention scores | GMAC without (paper's) | paper |\n"
          "|---|---|---|---|---|---|")
    sums = {}
    for px in (256, 512):
        rows = [(name, backbone(name, px)) for name in DIT_PRESETS if "mini" not in name]
        rows += [(name, decoder(name, px)) for name in DECODER_PRESETS if "mini" not in name]
        rows += [("SD-VAE decoder", sd_vae_decoder(px))]
        for name, (parameters, full, linear) in rows:
            sums[name, px] = (full, linear)
            print(f"| {name} | {px} | {parameters:,} | {full:.2f} | {linear:.2f} | {PAPER.get((name, px), '')} |")
    for px in (256, 512):
        for steps in (1, 2):
            both = zip(sums["DiTDH-XL", px], sums["ViT-XL", px], strict=True)
            full, linear = (steps * a + b for a, b in both)
            share = sums["ViT-XL", px][1] / linear
            print(f"| one image, {steps} step{'s' * (steps > 1)}, XL (decoder {share:.0%}) | {px} | | {full:.1f} "
                  f"| {linear:.1f} | {PAPER_ONE_STEP[px] if steps == 1 else ''} |")


def activations(preset, px, precision, checkpointed):
    """Bytes that one row keeps for the backward pass: tensors saved by autograd, in fake tensors, which need no
    memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def saved(rows):
        sizes = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            sizes[id(storage)] = (storage.nbytes(), storage)  # itself, so that its id is not used again
            return tensor
        z, t = torch.randn(rows, *net.shape), torch.rand(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = net(z, t, torch.zeros(rows, dtype=torch.long), t).float().square().mean()
        return sum(n for n, _ in sizes.values()), loss
    with FakeTensorMode():
        net = DiTDH(px // 16, 768, num_classes=1000, time_difference=True, **DIT_PRESETS[preset])
        net.checkpoint_activations = checkpointed
        few, many = (saved(rows)[0] for rows in (4, 8))
    return (many - few) / 4


def fit():
    """Markdown: the largest micro-batch, a multiple of 4, that should fit; 8% of a card and 1.5 GB are left for
    everything else.

    A trained parameter takes 22 bytes (weight, gradient, average, two moments, autocast's bf16 copy), the
    teacher's 4."""
    cards = (24, 48, 80, 141)
    print("| px | preset | stage | activations checkpointed | GB without rows | GB a row | "
          + " | ".join(f"{c} GB" for c in cards) + " |\n|" + "---|" * (6 + len(cards)))
    for px in (256, 512):
        for preset in ("DiTDH-S", "DiTDH-B", "DiTDH-XL"):
            teacher, student = (backbone(preset, px, difference)[0] for difference in (False, True))
            kept, inputs = (activations(preset, px, "bf16", checkpointed) for checkpointed in (False, True))
            own = kept / sum(DIT_PRESETS[preset]["depth"])    # a block's
            for checkpointed, row in ((False, kept), (True, inputs + own)):
                latent = 4 * 768 * (px // 16) ** 2
                pool = 64 * 17 * latent           # one group of trajectories: 512 pairs on 8 GPUs
                for stage, base, each in (
                        ("teacher", 22 * teacher, row),
                        ("CMT", 22 * student + 4 * teacher + pool, row + 4 * latent),
                        ("MFD", 22 * student + 4 * teacher, row + 8 * latent)):
                    room = [int((0.92 * c - 1.5) * 1e9 - base) // int(4 * each) * 4 for c in cards]
                    print(f"| {px} | {preset} | {stage} | {'yes' if checkpointed else 'no'} | {base / 1e9:.1f} "
                          f"| {each / 1e9:.3f} | " + " | ".join(str(n) if n > 0 else "-" for n in room) + " |",
                          flush=True)


def metrics(count=50_000, reference=10_000, width=2048):
    """Seconds of Frechet distance, and of precision and recall, once the features are there; random features."""
    from eval_fid import Moments, frechet_distance, precision_recall
    g = torch.Generator().manual_seed(0)
    fake, real = (torch.randn(n, width, generator=g) for n in (count, reference))

    def distance():
        moments = Moments(), Moments()
        for m, x in zip(moments, (fake, real), strict=True):
            for part in x.split(64):
                m.update(part)
        return frechet_distance(*(y for m in moments for y in (m.mean, m.covariance)))
    for name, measure in (("Frechet distance", distance),
                          ("precision and recall", lambda: precision_recall(real, fake))):
        start = time.perf_counter()
        measure()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f"{name}: {time.perf_counter() - start:.1f} s, peak memory of the process so far {peak:.2f} GiB",
              flush=True)


# ------------------------------------------------------------------------------------------------------------
# Time and memory of the steps
# ------------------------------------------------------------------------------------------------------------
def seconds_of(function, device):
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeated(functions, repeats, device, unit, first=seconds_of):
    """{name: function} -> {name: [seconds]}, {name: [seconds over the mean of the calls of `unit` before and
    after]} and what `first` measured of each function's first call, which does not count. One function after
    another, and between them the C library gives its free memory back: left in pieces by steps of other sizes,
    it would not serve the next one, and 24 GB would not be enough."""
    seconds, ratios, warm = {}, {}, {}
    give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
    for name, function in functions.items():
        warm[name] = first(function, device)
        units = [seconds_of(unit, device)]
        seconds[name], ratios[name] = [], []
        for _ in range(repeats):
            seconds[name].append(seconds_of(function, device))
            units.append(seconds_of(unit, device))
            ratios[name].append(seconds[name][-1] / statistics.mean(units[-2:]))
            print(f"{name}: {seconds[name][-1]:.3g} s, {ratios[name][-1]:.3g} units", file=sys.stderr,
                  flush=True)
        give_back(0)
    return seconds, ratios, warm


def peak_memory(function, device):
    """Bytes that a call allocates at its peak, over what was there before."""
    if device.type == "cuda":
        function()                                # compiles and fills caches
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def device_peak(device, precision):
    """(FLOP/s that a perfect program would reach, where the number comes from)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        for key, peak in PEAK.items():
            if key in name:
                return peak, f"dense bf16 of {key}"
    n = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    least = min(seconds_of(lambda: a @ b, device) for _ in range(6))
    return 2 * n ** 3 / least, f"measured product of {n} x {n} matrices, {dtype}"


def steps(args, device):
    """Rows of a table: each stage's forward and backward, the baselines, optimizer and average."""
    torch.manual_seed(0)
    sizes = dict(input_size=args.px // 16, in_channels=768, num_classes=1000, **DIT_PRESETS[args.preset])
    v, h = DiTDH(**sizes).to(device), DiTDH(**sizes, time_difference=True).to(device)
    v_flops, h_flops = (2e9 * backbone(args.preset, args.px, student)[1] * args.batch_size
                        for student in (False, True))
    teacher_to_train = DiTDH(**sizes).to(device)
    for net in (v, h, teacher_to_train):
        net.checkpoint_activations = args.checkpoint_activations
        if args.compile:
            net.compile(dynamic=False)
    if args.compile:                              # three networks, many numbers of rows: more graphs than a stage
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    v.requires_grad_(False)
    shift, b = default_time_shift(h.shape), args.batch_size
    micro = args.micro_batch or b
    z, eps = torch.randn(2, b, *h.shape, device=device)
    y = torch.randint(1000, (b,), device=device)
    s, t = time_shift(torch.rand(b, 2, device=device), shift).sort(dim=1).values.unbind(1)
    s = torch.where(torch.arange(b, device=device) % 4 == 0, s, t)
    parts = [slice(i, i + micro) for i in range(0, b, micro)]

    def autocast():
        return torch.autocast(device.type, torch.bfloat16) if args.precision == "bf16" else nullcontext()

    def step(net, loss, parts=parts):
        def run():
            for rows in parts:
                with autocast():
                    value = loss(z[rows], eps[rows], t[rows], y[rows], s[rows])
                (value[0] if isinstance(value, tuple) else value).backward()
            net.zero_grad()
        return run

    def meanflow(eta, derivative):                # the plain squared error, as of the baselines
        return step(h, lambda *x: meanflow_loss(h, v, *x, eta, derivative, loss_form="mean", loss_power=0.0,
                                                rows=slice(None, None, 4), jvp=jvp_by_parts))

    @torch.no_grad()
    def forward():
        for rows in parts:
            with autocast():
                h(z[rows], t[rows], y[rows], s[rows])

    # Each serves 64 pairs, so 64 / batch steps; solved in a batch of their own.
    count_of_trajectories = max(1, b // 4)

    @torch.no_grad()
    def trajectories():
        n = count_of_trajectories
        with autocast():
            solve_ode(v, z[:n], y[:n], ode_times(16, shift))

    weights = [p for p in h.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-9, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average = [p.detach().clone() for p in weights]
    gradients = [torch.zeros_like(p) for p in weights]

    def optimize():
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    functions = {
        "forward (F)": forward,
        "flow matching": step(
            teacher_to_train, lambda z, eps, t, y, s: flow_matching_loss(teacher_to_train, z, eps, t, y)),
        "CMT, student": step(h, lambda z, eps, t, y, s: consistency_loss(h, eps, z, t, y, t / 2)),
        "CMT, trajectories": trajectories,
        # a quarter of the rows at a time, three evaluations of each in a batch: as many rows as the other steps
        # have, or it would not fit
        "MFD (i), as published": step(
            h, lambda *x: meanflow_as_published(h, v, *x),
            [slice(i, i + max(1, micro // 4)) for i in range(0, b, max(1, micro // 4))]),
        "MFD, finite differences": meanflow(1, "fd"), "MFD, exact": meanflow(1, "jvp"),
        "MFD (ii), derivative of all rows": step(h, lambda *x: meanflow_all_rows(h, v, *x)),
        "MFT, finite differences": meanflow(0, "fd"), "MFT, exact": meanflow(0, "jvp"),
        "clip, AdamW": optimize, "average": lambda: torch._foreach_lerp_(average, weights, 1e-4)}
    seconds, in_f, memory = repeated(functions, args.repeats, device, forward, first=peak_memory)
    share = b / 64 / count_of_trajectories        # of `trajectories` for a step: 64 pairs from each
    for part in (seconds, in_f):
        both = zip(part["CMT, student"], part["CMT, trajectories"], strict=True)
        part["CMT, with its share of trajectories"] = [a + share * c for a, c in both]
    peak, source = device_peak(device, args.precision)
    base = 4 * sum(p.numel() * 4 for p in weights)            # weights, average, two moments: float32
    rows = []
    for name, x in seconds.items():
        row = {"step": name, "seconds": statistics.median(x), "from": min(x), "to": max(x),
               "F": statistics.median(in_f[name])}
        if name.startswith("MFD,") or name.startswith("MFD ("):
            for other, key in (("MFD (i), as published", "times (i)"),
                               ("MFD (ii), derivative of all rows", "times (ii)")):
                row[key] = statistics.median(c / a for a, c in zip(in_f[name], in_f[other], strict=True))
        if name in FLOOR:
            row["flops"] = FLOOR[name] * (v_flops if name == "flow matching" else h_flops) / row["seconds"]
            row["utilization"] = row["flops"] / peak
        # (i) has a quarter of the rows at a time.
        if name in functions and name not in ("clip, AdamW", "average", "forward (F)", "MFD (i), as published"):
            row["memory"] = memory[name]
            row["with weights, average, moments"] = row["memory"] + base
        row["samples per second"] = b / row["seconds"]
        if name in ("clip, AdamW", "average", "CMT, trajectories"):
            row["samples per second"] = None
        rows.append(row)
    for row in rows:
        if row["step"].startswith("MF") and "memory" in row:
            row["memory, of flow matching's"] = row["memory"] / memory["flow matching"]
    return {"rows": rows, "peak_flops": peak, "peak_source": source,
            "parameters": sum(p.numel() for p in h.parameters())}


def targets(rows):
    """Markdown: what this project wants of float32 on two CPU cores (DiTDH-S, 256 px, batch 32), and what was
    measured."""
    rows = {row["step"]: row for row in rows}
    wanted = [(name, "F", "at most", limit) for name, limit in (
        ("flow matching", 3.2), ("CMT, with its share of trajectories", 3.6), ("MFD, finite differences", 5.0),
        ("MFD, exact", 5.6), ("MFT, finite differences", 4.0), ("MFT, exact", 4.6))]
    for name in ("MFD, finite differences", "MFD, exact"):
        wanted += [(name, "times (i)", "at least", 1.8), (name, "times (ii)", "at least", 1.15),
                   (name, "memory, of flow matching's", "at most", 1.15)]
    print("| step | | wanted | measured | holds |\n|---|---|---|---|---|")
    for name, key, bound, limit in wanted:
        x = rows[name][key]
        holds = (x <= limit) == (bound == "at most")
        print(f"| {name} | {key} | {bound} {limit} | {x:.2f} | {'yes' if holds else 'NO'} |")
    print(flush=True)


def sampling(args, device):
    """Images per second at 1 and 2 steps of a student and 50 of a teacher, from noise to bytes on the host."""
    torch.manual_seed(0)
    sizes = dict(input_size=args.px // 16, in_channels=768, num_classes=1000, **DIT_PRESETS[args.preset])
    v, h = DiTDH(**sizes).to(device).eval(), DiTDH(**sizes, time_difference=True).to(device).eval()
    decoder = ViTDecoder(args.px // 16, 768, **DECODER_PRESETS[args.decoder]).to(device).eval()
    if args.compile:
        for net in (v, h, decoder):
            net.compile(dynamic=False)
    n = args.sampling_batch
    z, y = torch.randn(n, *h.shape, device=device), torch.randint(1000, (n,), device=device)
    stats = {"mean": torch.zeros(h.shape, device=device).double(), "var": torch.ones(h.shape, device=device).double()}

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def run(nfe):
        with torch.inference_mode(), autocast:
            if nfe == 50:
                z_0 = solve_ode(v, z, y, ode_times(50, default_time_shift(v.shape)))[-1]
            else:
                z_0 = long_jumps(h, z, y, [1 - i / nfe for i in range(nfe + 1)])
            to_uint8(decoder(denormalize(z_0, stats))).cpu()

    functions = {f"{nfe} step{'s' * (nfe > 1)}": lambda nfe=nfe: run(nfe) for nfe in (1, 2, 50)}
    seconds, in_one, _ = repeated(functions, args.repeats, device, functions["1 step"])
    return [{"sampling": name, "images per second": n / statistics.median(x), "from": n / max(x),
             "to": n / min(x), "times 1 step": statistics.median(in_one[name])} for name, x in seconds.items()]


def reader(args):
    """Samples per second of the latents' reader, random order, one process, from the page cache; and of plainly
    reading the same bytes."""
    from encode_latents import Latents, batches_of, read_ahead
    from sanity.synthetic import write_latents
    shape, count, each = (768, args.px // 16, args.px // 16), 2048, 512
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_latents(folder, shape, 1000, count, args.px, each)
        files = sorted(folder.glob("shard_*"))
        latents = Latents(folder)
        buffer = bytearray(8 << 20)

        def plain():
            for file in files:
                with open(file, "rb", buffering=0) as stream:
                    while stream.readinto(buffer):
                        pass

        def ours():
            order = batches_of(len(latents), 0, 256, [(0, 256)], 0, count // 256)
            for _ in read_ahead(latents.read, order, 0):
                pass
        functions = {"plain sequential read": plain, "reader, random order": ours}
        seconds, in_plain, _ = repeated(functions, args.repeats, torch.device("cpu"), plain)
    return [{"reading": name, "samples per second": count / statistics.median(x),
             "of the plain read": 1 / statistics.median(in_plain[name])} for name, x in seconds.items()]


def markdown(rows):
    """A table of the union of the rows' columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(key, x):
        if x is None or isinstance(x, str):
            return x or ""
        return {"utilization": f"{x:.1%}", "flops": f"{x / 1e12:.3g} T"}.get(key) or (
            f"{x / 1e9:.2f} GB" if x > 1e7 else f"{x:.3g}")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(cell(key, row.get(key)) for key in columns) + " |")
    print(flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--table", action="store_true", help="parameters and multiply-adds of every preset, nothing else")
    add("--fit", action="store_true", help="what should fit into the memory of cards, nothing else")
    add("--metrics", action="store_true", help="seconds and memory of the metrics, nothing else")
    parts = ["steps", "sampling", "reader"]
    add("--parts", nargs="+", choices=parts, default=parts, help="(default: all)")
    add("--preset", choices=DIT_PRESETS, default="DiTDH-S", help="(default %(default)s)")
    add("--decoder", choices=DECODER_PRESETS, default="ViT-XL", help="for sampling (default %(default)s)")
    add("--px", type=int, choices=(256, 512), default=256, help="image size (default %(default)s)")
    add("--batch-size", type=int, default=32, help="rows of a step (default %(default)s)")
    add("--micro-batch", type=int, help="rows of a backward pass (default: all)")
    add("--sampling-batch", type=int, default=8, help="images at a time (default %(default)s)")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
        help="tf32: the published one (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile networks and derivative")
    add("--checkpoint-activations", action="store_true", help="as in the stages")
    add("--repeats", type=int, default=5, help="calls that count (default %(default)s)")
    add("--json", help="also write everything to this file")
    args = parser.parse_args(argv)
    for chosen, function in ((args.table, table), (args.fit, fit), (args.metrics, metrics)):
        if chosen:
            return function()
    if args.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"settings": vars(args), **provenance(), "threads": torch.get_num_threads(), "load_average": os.getloadavg()}
    print(json.dumps(about), flush=True)
    results = {}
    if "steps" in args.parts:
        results["steps"] = steps(args, device)
        markdown(results["steps"]["rows"])
        if device.type == "cpu":
            targets(results["steps"]["rows"])
        peak, source = (results["steps"][key] for key in ("peak_flops", "peak_source"))
        print(f"utilization: of {peak / 1e12:.3g} TFLOP/s, {source}\n")
    if "sampling" in args.parts:
        results["sampling"] = sampling(args, device)
        markdown(results["sampling"])
    if "reader" in args.parts:
        results["reader"] = reader(args)
        markdown(results["reader"])
    if args.json:
        write_json(args.json, {**about, **results})


if __name__ == "__main__":
    main()
