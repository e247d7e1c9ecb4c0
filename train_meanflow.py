"""Stage 3: MeanFlow in the latent space, by distillation (MFD) or training (MFT): a student h(z_t, t, y, s)
for one or two jumps.

From data (t = 0) to noise (t = 1): z_t = (1 - t) z_0 + t eps. h is the mean velocity over [s, t], s <= t:
one jump is z_s = z_t - (t - s) h.
The MeanFlow identity h = v - (t - s) dh/dt (arXiv 2505.13447) makes it a loss:

    w = (1 - eta) (eps - z_0) + eta v(z_t, t, y)            the velocity
    u = w - (t - s) dh/dt,    dh/dt = (dh/dz) w + dh/dt|_z  the target
    || h(z_t, t, y, s) - stopgrad(u) ||^2

eta = 1 is MFD: the teacher's velocity v in place of the one-point velocity; low variance, the teacher's bias.
eta = 0 is MFT: no bias, high variance; a short run after MFD (MF-RAE, arXiv 2511.13019, section 3).
For three rows in four s = t: the loss is flow matching (or its distillation) and needs no derivative.

    python train_meanflow.py                          # one GPU (or CPU): runs/cmt -> runs/meanflow
    torchrun --nproc_per_node=8 train_meanflow.py     # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_meanflow.py                             # on each of four nodes
    python train_meanflow.py --eta 0 --init runs/meanflow --out runs/mft --steps 10000       # MFT after MFD
    python train_meanflow.py --synthetic --steps 20   # does XL fit, how fast is it? (random data, no files)

Defaults are those of MF-RAE for ImageNet at 256 px.
"""
import copy
import json
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from encode_latents import TrainingData
from model import (
    DIT_PRESETS, ArgumentParser, DiTDH, InputError, add_run_flags, all_reduce, append_line, begin_run,
    command, default_time_shift, distribute, fraction, generators, guided, is_first, launch, load_network,
    load_newest_state, load_stats, normalize, not_negative, number, pairwise_jvp, positive, resumes,
    save_state, say, stop_signal, time_shift, unused_run_flags, whole)


def meanflow_loss(h, v, z_0, eps, t, y, s, eta=1.0, derivative="jvp", delta_t=0.005, loss_form="published",
                  loss_power=1.0, loss_eps=1e-3, rows=slice(None), h_fixed=None, jvp=torch.func.jvp):
    """The MeanFlow objective with the proxy velocity w of eta (MF-RAE, eq. 9 to 11).

    h: (z, t, y, s) -> mean velocity; v: (z, t, y) -> the teacher's velocity (not called for eta = 0).
    z_0, eps: (B, ...) data and noise; t, s: (B,), 0 <= s <= t <= 1; y: (B,) int labels, dropped already.
    derivative, delta_t, jvp: see transport_derivative.
    rows: those where s < t may hold; elsewhere s = t, and no derivative is taken.
    h_fixed: theta^- of the paper, h for the derivative: under DDP, the network inside it. Default: h.
    loss_form, loss_power, loss_eps: a sample's loss is q / stopgrad(q + loss_eps)^loss_power, with q its
    mean squared error ("mean") or the square of its summed squared error ("published"). Power 0: q itself.
    Published, the loss is about 1 whatever happens: look at mse.
    Returns (loss, numbers for the log): mse, the mean squared error per element; mse_flow and mse_jump,
    that of the rows with s = t and with s < t, as (sum, count); root mean squares of w and (t - s) dh/dt."""
    z_t = per_row(1 - t, eps) * z_0 + per_row(t, eps) * eps
    h_t = h(z_t, t, y, s)
    with torch.no_grad():
        w = (1 - eta) * (eps - z_0)
        if eta > 0:
            w = w + eta * v(z_t, t, y)
        # u = w - (t - s) dh/dt; where s = t, u = w. h is evaluated again: without gradient, for few rows.
        at_rows = [x[rows].contiguous() for x in (z_t, t, y, s, w)]
        dh_dt = transport_derivative(h_fixed or h, *at_rows, derivative, delta_t, h_t[rows], jvp)
        u = w.clone()
        u[rows] -= per_row(t - s, u)[rows] * dh_dt
    error = (h_t - u).square()
    each = tuple(range(1, error.ndim))
    mse = error.mean(each)
    q = error.sum(each).square() if loss_form == "published" else mse
    loss = (q / (q.detach() + loss_eps) ** loss_power).mean()

    mse, jump = mse.detach(), (s < t).float()
    numbers = {"loss": loss.detach(), "mse": mse.mean(), "rms_w": w.square().mean().sqrt(),
               "rms_correction": (u - w)[rows].square().mean().sqrt()}
    for name, kind in (("mse_flow", 1 - jump), ("mse_jump", jump)):
        numbers[name] = torch.stack([(kind * mse).sum(), kind.sum()])
    return loss, numbers


def transport_derivative(h, z, t, y, s, w, derivative="jvp", delta_t=0.005, h_t=None, jvp=torch.func.jvp):
    """dh/dt along the flow dz/dt = w, with s fixed: (dh/dz) w + dh/dt|_z. Without gradient.

    h: (z, t, y, s) -> mean velocity; z, w: (B, ...); t, s: (B,), 0 <= s <= t <= 1; y: (B,) int.
    derivative: "jvp", exact; "fd", finite differences of step delta_t that stay within [s, 1], second order
    everywhere; "fd-central", the published stencil, which leaves it (MF-RAE, eq. 12).
    h_t: h(z, t, y, s), if it is known. jvp: torch.func.jvp, or for a DiTDH, which may be compiled,
    model.pairwise_jvp. Returns (B, ...)."""
    if derivative == "jvp":
        # torch's fused attention has no forward-mode derivative.
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return jvp(lambda z, t: h(z, t, y, s), (z, t), (w, torch.ones_like(t)))[1]
    # A finite difference in reduced precision is noise / delta_t: true float32, whatever is set outside.
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" or torch.is_autocast_enabled(z.device.type):
        h_t = None
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return finite_difference(h, z, t, y, s, w, delta_t, derivative == "fd-central", h_t)
    finally:
        torch.set_float32_matmul_precision(precision)


def finite_difference(h, z, t, y, s, w, delta_t, all_central, h_t):
    """(c_a h(t + a d) + c_b h(t + b d) + c_t h(t)) / d along the flow, by the stencil that fits each row."""
    d = torch.full_like(t, delta_t)
    central = ((t + d <= 1) & (t - d >= s)) | all_central
    forward = ~central & (t + 2 * d <= 1)
    # A backward one ends at s, but for rounding where s = t.
    d = torch.where(central | forward, d, torch.minimum(d, (t - s) / 2).clamp(min=1e-6))
    # Offsets a, b and coefficients c_a, c_b, c_t
    if_central = (1.0, -1.0, 0.5, -0.5, 0.0)
    if_forward = (1.0, 2.0, 2.0, -0.5, -1.5)
    if_backward = (-1.0, -2.0, -2.0, 0.5, 1.5)
    a, b, c_a, c_b, c_t = (torch.where(central, x, torch.where(forward, x_forward, x_backward)) for
                           x, x_forward, x_backward in zip(if_central, if_forward, if_backward, strict=True))
    z_ab = torch.cat([z + per_row(x * d, z) * w for x in (a, b)])
    h_a, h_b = h(z_ab, torch.cat([t + a * d, t + b * d]), y.repeat(2), s.repeat(2)).chunk(2)
    h_t = h(z, t, y, s) if h_t is None else h_t
    return sum(per_row(c / d, z) * x for c, x in ((c_a, h_a), (c_b, h_b), (c_t, h_t)))


def per_row(x, like):
    """(B,) -> (B, 1, ...), to be multiplied with `like`."""
    return x.reshape(-1, *[1] * (like.ndim - 1))


def draw(seed, step, rows, shape, device):
    """What is random in rows [start, stop) of a step: times ~ U(0, 1) (B, 2), eps ~ N(0, I) (B, C, H, W),
    and the uniforms of label dropout (B,)."""
    blocks = []
    for g in generators(device, rows, seed, "meanflow", step):
        on = dict(generator=g, device=device)
        blocks.append((torch.rand(4, 2, **on), torch.randn(4, *shape, **on), torch.rand(4, **on)))
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


# ======== The same text in train_teacher.py, train_cmt.py and train_meanflow.py ============================
def rows_of_process(args, rank, world):
    """This process's rows of the global batch, as (start, stop) of each micro-batch."""
    share = args.batch_size // world
    sizes = [n for n in range(4, min(share, 64) + 1, 4) if share % n == 0]
    micro = args.micro_batch or max(sizes, default=share)
    if share * world != args.batch_size or not share or micro % 4 or share % micro:
        raise InputError(f"--batch-size {args.batch_size} over {world} processes in micro-batches of {micro} "
                         "rows: it must divide evenly, and a micro-batch be a multiple of 4")
    return [(row, row + micro) for row in range(rank * share, (rank + 1) * share, micro)]


def learning_rate(args, step):
    """Constant, then linear to --lr-final at the last step."""
    begin = args.decay_from * args.steps
    part = max(0.0, (step - begin) / max(1.0, args.steps - 1 - begin))
    final = args.lr if args.lr_final is None else args.lr_final
    return args.lr + part * (final - args.lr)


def announce(net, data, device, world, args, step):
    """Say what this run is."""
    if is_first():
        size = sum(p.numel() for p in net.parameters()) / 1e6
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        resumes = f", resumes at step {step:,}" if step else ""
        data = "random data" if args.synthetic else data
        say(f"{size:,.1f} M parameters; {data}; {world} x {name}, {args.precision}; "
            f"{args.steps:,} steps of {args.batch_size:,} rows{resumes}")
        if step >= args.steps:
            say(f"{args.out} is at step {step:,} already: nothing to do (--steps goes further)")


def log(out, args, step, numbers, lr, clock):
    """One line of log.jsonl: means since the last one over all micro-batches and processes; `grad_norm_max`
    is the largest finite one. InputError, before anything is saved, where loss or gradient are not finite.

    numbers: a dict for each micro-batch; a value is a mean, or a pair (sum, count) where rows differ in
    kind. clock: {"step", "since", "seconds"}: step and time of the last line, and all training time, saving
    left out."""
    def pair(x):
        return (x if x.ndim else torch.stack([x, torch.ones_like(x)])).float()

    table = torch.stack([torch.stack([pair(x) for x in row.values()]) for row in numbers])
    sums = all_reduce(table.sum(0))
    means = dict(zip(numbers[0], (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
    now, steps = time.perf_counter(), step - clock["step"]
    rate = steps / (now - clock["since"])
    clock.update(step=step, since=now, seconds=clock["seconds"] + now - clock["since"])
    line = {"step": step, **means, "grad_norm_max": table[:, -1, 0].nan_to_num(0, 0).max().item(), "lr": lr,
            "samples_per_second": args.batch_size * rate, "seconds": clock["seconds"]}
    if table.is_cuda:
        line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if is_first():
        rounded = {name: float(f"{x:.6g}") if math.isfinite(x) else None for name, x in line.items()}
        text = json.dumps({**rounded, "step": step})
        append_line(out and out / "log.jsonl", text)
        say(f"{text} {timedelta(seconds=round((args.steps - step) / rate))} left")
    if not math.isfinite(means["loss"] + means["grad_norm"]):
        raise InputError(
            f"loss or gradient is not finite at step {step}; it was not saved. Try a lower --lr or --clip or "
            "--precision fp32, and encode_latents.py --verify; --resume goes back to the last state")
    numbers.clear()


# ======== end of the same text ==============================================================================


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    groups = add_run_flags(parser)

    add = groups["data"].add_argument
    add("--latents", default="data/latents", help="folder written by encode_latents.py")
    add("--data-path", metavar="IMAGES",
        help="images to encode on the fly, with random flips as --latents describes, in place of its "
             "shards: a folder of class folders, or a .zip")
    add("--workers", type=whole(0), default=0, help="processes per device that read ahead; 0: read in place")
    add("--stats", metavar="FILE",
        help="latent statistics in place of the student's: a latent_stats.safetensors or a published stat.pt")
    add("--teacher", default="runs/teacher", help="folder, published .pt or .safetensors file, or Hub path")
    add("--init", default="runs/cmt",
        help="the student to start from, likewise; a teacher's weights are taken too, with a new embedding "
             "of t - s")
    add("--out", default="runs/meanflow", help="folder for the network, states and log")

    add = groups["method"].add_argument
    add("--eta", type=fraction, nargs="+", default=[1.0],
        help="1: MFD, 0: MFT, between: a mixture; two numbers: from the first to the second over the run "
             "(MF-RAE: 1)")
    add("--derivative", choices=("jvp", "fd", "fd-central"), default="jvp",
        help="of h along the flow: exact, by finite differences within [s, 1], or by the published central "
             "ones")
    add("--delta-t", type=number(float, 0, 0.5, above=True),
        help="step of the finite differences, in t (default: 0.005; MF-RAE)")
    add("--loss-form", choices=("mean", "published"), default="published",
        help="a sample's weight is made of its mean squared error, or of the square of its summed one "
             "(MF-RAE: XL, 180,000 steps; for smaller networks or shorter runs take mean with "
             "--loss-power 0.5 --loss-eps 0.1, docs/METHOD.md)")
    add("--loss-power", type=not_negative, default=1.0, help="p of the weight (q + c)^-p; 0: plain (MF-RAE)")
    add("--loss-eps", type=positive, help="c of the weight (default: 0.001; MF-RAE)")
    add("--label-dropout", type=fraction, default=0.1, help="probability of 'no label' (MF-RAE)")
    add("--time-shift", type=positive, help="a of shift(u) = a u / (1 + (a - 1) u) (default: the student's)")
    add("--guidance", type=not_negative, default=1.0, metavar="W",
        help="a guided teacher, v_weak + W (v - v_weak), v_weak without label or of --weak-teacher (MF-RAE: "
             "none)")
    add("--guidance-interval", type=fraction, nargs=2, metavar=("LOW", "HIGH"),
        help="times t with guidance (default: all)")
    add("--weak-teacher",
        help="a weaker teacher for --guidance: autoguidance (default: the teacher without label)")
    add("--preset", choices=DIT_PRESETS, help="size of the networks of --synthetic (default: DiTDH-XL)")

    add = groups["optimization"].add_argument
    add("--steps", type=whole(), default=180_000, help="of the optimizer (MF-RAE)")
    add("--batch-size", type=whole(4), default=256, help="rows over all devices (MF-RAE; 128 at 512 px)")
    add("--lr", type=not_negative, default=1e-4, help="of AdamW, betas (0.9, 0.95), no weight decay (MF-RAE)")
    add("--lr-final", type=not_negative, help="at the last step, reached linearly (default: --lr; MF-RAE)")
    add("--decay-from", type=fraction, help="part of the run where the decay begins (default: 0)")
    add("--ema", type=fraction, default=0.9999,
        help="decay of the weights' average per step (MF-RAE; 0.9995 at 512 px)")

    args = parser.parse_args(argv)
    if len(args.eta) > 2:
        parser.error("--eta takes a number, or two: of the first and of the last step")
    guides, differences = args.guidance != 1, args.derivative != "jvp"
    if guides and not any(args.eta):
        parser.error("--guidance guides the teacher, and --eta 0 has none")
    parser.settle(
        args,
        *unused_run_flags(args),
        ("--delta-t", differences, 0.005, "with --derivative jvp"),
        ("--loss-eps", args.loss_power > 0, 1e-3, "with --loss-power 0"),
        ("--guidance-interval", guides, [0.0, 1.0], "without --guidance W, W other than 1"),
        ("--weak-teacher", guides, None, "without --guidance W, W other than 1"),
        ("--decay-from", args.lr_final is not None, 0.0, "without --lr-final"),
        ("--preset", args.synthetic, "DiTDH-XL", "without --synthetic: the files give the sizes"))
    return args


def load_inputs(args, data):
    """-> student, its config, statistics, teacher, weak teacher (or None). InputError where they do not
    fit."""
    if args.synthetic:
        sizes = dict(input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes))
        teacher = DiTDH(**sizes, **DIT_PRESETS[args.preset]) if any(args.eta) else None
        student = DiTDH(**sizes, **DIT_PRESETS[args.preset], time_difference=True)
        return student, {"time_shift": default_time_shift(data.shape)}, data.stats, teacher, None
    if resumes(args):
        student, config, stats = load_network(args.out, "student", weights=False)
    else:
        student, config, stats = load_network(args.init, "student", new="r_embedder.")
    teacher = load_network(args.teacher, "teacher")[0] if any(args.eta) else None
    weak = load_network(args.weak_teacher, "teacher")[0] if args.weak_teacher else None
    if args.stats:
        stats = load_stats(args.stats, data.shape)
    stats = stats if stats is not None else data.stats
    for name, net in (("--out" if resumes(args) else "--init", student), ("--teacher", teacher)):
        if net and (net.shape != data.shape or net.num_classes != len(data.classes)):
            raise InputError(f"{name} is for latents {net.shape} of {net.num_classes} classes, --latents "
                             f"{args.latents} holds {data.shape} of {len(data.classes)}")
    same = all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(stats, data.stats, strict=True))
    if not same and not args.stats:
        raise InputError(f"the student was trained with other latent statistics than {args.latents} has: "
                         "encode with the same encoder and data, or choose with --stats")
    return student, config, stats, teacher, weak


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(args.precision)
    micro_batches = rows_of_process(args, rank, world)
    out = None if args.synthetic else Path(args.out)
    stopped = stop_signal()
    torch.manual_seed(args.seed)

    # Data, and the networks: the student from CMT, the teacher that it distills
    data = TrainingData(args.latents, args.data_path, args.synthetic)
    student, config, stats, teacher, weak = load_inputs(args, data)
    config["time_shift"] = args.time_shift or config["time_shift"]
    v = None
    if teacher:
        teacher.to(device).requires_grad_(False)
        weak = weak and weak.to(device).requires_grad_(False)
        v = guided(teacher, args.guidance, args.guidance_interval, weak)
    elif not args.synthetic and is_first():
        say(f"--eta 0: the teacher {args.teacher} is not used")
    run = begin_run(out, args, parse_args([]), stats, latents=data, teacher=teacher, weak_teacher=weak)
    # Here once, not in every step.
    stats = [x.to(device) for x in stats]

    # The student, the average of its weights, which is what is saved to sample from, and the optimizer
    student.to(device).checkpoint_activations = args.checkpoint_activations
    average = copy.deepcopy(student).requires_grad_(False)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    weights, averages = ([net.get_parameter(name) for name in trained] for net in (student, average))
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    whole_run = (student, average, optimizer, config, stats, args.keep, args.keep_every)
    first_step, seconds = load_newest_state(out, run, *whole_run)
    announce(student, args.data_path or args.latents, device, world, args, first_step)

    # Compiled, and over all processes
    if args.compile:
        student.compile(dynamic=False)            # teacher and student share code, not batches
        if teacher:
            teacher.compile(dynamic=False)
    h = distribute(student, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    batches = data.batches(args.seed, args.batch_size, micro_batches, first_step, args.steps, device,
                           args.workers)

    numbers, clock = [], {"step": first_step, "since": time.perf_counter(), "seconds": seconds}
    for step in range(first_step, args.steps):
        eta = args.eta[0] + (args.eta[-1] - args.eta[0]) * step / max(1, args.steps - 1)
        for rows in micro_batches:
            # Draw
            z_0, y = next(batches)
            times, eps, p = draw(args.seed, step, rows, data.shape, device)
            s, t = time_shift(times, config["time_shift"]).sort(dim=1).values.unbind(1)
            s[1::4], s[2::4], s[3::4] = t[1::4], t[2::4], t[3::4]       # three rows in four: s = t
            # Labels are dropped once, for all evaluations of a row.
            y = torch.where(p < args.label_dropout, student.num_classes, y)

            # Loss and gradient, which DDP reduces over the processes with the last micro-batch alone
            h.require_backward_grad_sync = rows == micro_batches[-1]
            with autocast:
                loss, of_loss = meanflow_loss(
                    h, v, normalize(z_0, stats), eps, t, y, s, eta, args.derivative, args.delta_t,
                    args.loss_form, args.loss_power, args.loss_eps, rows=slice(None, None, 4),
                    h_fixed=student, jvp=pairwise_jvp)
            (loss / len(micro_batches)).backward()
            numbers.append(of_loss)

        # Clip, step, average
        grad_norm = nn.utils.clip_grad_norm_(weights, args.clip or math.inf)
        for of_loss in numbers[-len(micro_batches):]:
            of_loss["grad_norm"] = grad_norm                  # the last of its numbers
        lr = optimizer.param_groups[0]["lr"] = learning_rate(args, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=world == 1)           # DDP's gradients are views of its buckets
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - args.ema)

        # End of the step: log, save, stop
        done, stop = step + 1, stopped()
        saves = done == args.steps or stop or done % args.save_every == 0
        if saves or done % args.log_every == 0:
            log(out, args, done, numbers, lr, clock)
        if saves and out:
            begin = time.perf_counter()
            save_state(out, run, done, clock["seconds"], *whole_run)
            clock["since"] += time.perf_counter() - begin     # saving is not training time
        if stop:
            if rank == 0:
                say(f"stopped after step {done}: the same command with --resume goes on")
            sys.exit(128 + stop)


if __name__ == "__main__":
    command(main)
