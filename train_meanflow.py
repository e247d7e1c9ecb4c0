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
    python train_meanflow.py --eta 0 --init runs/meanflow --out runs/mft --steps 10000 --ema 0.9995    # MFT

The same command, repeated, goes on from the newest state in --out.
Defaults are those of MF-RAE for ImageNet at 256 px.
"""
import copy
import math
import sys
import time

import torch
from torch import nn

from encode_latents import TrainingData
from model import (
    ArgumentParser, InputError, Log, add_guidance_flags, add_run_flags, begin_run, check_fit, command,
    digest_of, distribute, fraction, generators, jvp_by_parts, launch, load_guidance, load_network,
    load_stats, location, micro_batches_of, normalize, not_negative, number, positive, save_state, say,
    states_of, stop_signals, time_shift, whole)


def meanflow_loss(h, v, z_0, eps, t, y, s, eta=1.0, derivative="jvp", delta_t=0.005, loss_form="published",
                  loss_power=1.0, loss_eps=1e-3, jumps=slice(None), h_fixed=None, jvp=torch.func.jvp):
    """The MeanFlow objective with the proxy velocity w of eta (MF-RAE, eq. 9 to 11).

    h: (z, t, y, s) -> mean velocity; v: (z, t, y) -> the teacher's velocity (not called for eta = 0).
    z_0, eps: (B, ...) data and noise; t, s: (B,), 0 <= s <= t <= 1; y: (B,) int labels, dropped already.
    derivative, delta_t, jvp: see transport_derivative.
    jumps: which rows may have s < t, a slice; in the others s = t, and no derivative is taken.
    h_fixed: h for the derivative, of the same weights (theta^-): under DDP, the network inside. Default: h.
    loss_form, loss_power, loss_eps: a sample's loss is q / stopgrad(q + loss_eps)^loss_power, with q its
    mean squared error ("mean") or the square of its summed squared error ("published"). Power 0: q itself.
    Published, the loss is about 1 whatever happens: look at mse.
    Returns (loss, numbers for the log): mse, the mean squared error per element; mse_jump and mse_flow, that
    of `jumps` and of the others; ms_w, ms_correction, mean squares of w and, of `jumps`, of (t - s) dh/dt."""
    z_t = per_row(1 - t, eps) * z_0 + per_row(t, eps) * eps
    h_t = h(z_t, t, y, s)
    with torch.no_grad():
        w = (1 - eta) * (eps - z_0)
        if eta > 0:
            w = w + eta * v(z_t, t, y)
        # u = w - (t - s) dh/dt; where s = t, u = w. h is evaluated again: without gradient, for few rows.
        at_jumps = [x[jumps].contiguous() for x in (z_t, t, y, s, w)]
        dh_dt = transport_derivative(h_fixed or h, *at_jumps, derivative, delta_t, h_t[jumps], jvp)
        u = w.clone()
        u[jumps] -= per_row(t - s, u)[jumps] * dh_dt
    error = (h_t - u).square()
    each = tuple(range(1, error.ndim))
    mse = error.mean(each)
    q = error.sum(each).square() if loss_form == "published" else mse
    loss = (q / (q.detach() + loss_eps) ** loss_power).mean()

    mse, flow = mse.detach(), torch.ones_like(mse)
    flow[jumps] = 0
    return loss, {"mse": mse.mean(), "mse_flow": (flow * mse).sum() / flow.sum().clamp(min=1),
                  "mse_jump": mse[jumps].mean(), "ms_w": w.square().mean(),
                  "ms_correction": (u - w)[jumps].square().mean()}


def transport_derivative(h, z, t, y, s, w, derivative="jvp", delta_t=0.005, h_t=None, jvp=torch.func.jvp):
    """dh/dt along the flow dz/dt = w, with s fixed: (dh/dz) w + dh/dt|_z. Without gradient.

    h: (z, t, y, s) -> mean velocity; z, w: (B, ...); t, s: (B,), 0 <= s <= t <= 1; y: (B,) int.
    derivative: "jvp", exact; "fd", finite differences of step delta_t that stay within [s, 1], second order
    everywhere; "fd-central", the published stencil, which leaves it (MF-RAE, eq. 12).
    h_t: h(z, t, y, s), if it is known. jvp: torch.func.jvp, or for a DiTDH, which may be compiled,
    model.jvp_by_parts. Returns (B, ...)."""
    if derivative == "jvp":
        # torch's fused attention has no forward-mode derivative.
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return jvp(lambda z, t: h(z, t, y, s), (z, t), (w, torch.ones_like(t)))[1]
    # A finite difference in reduced precision is noise / delta_t: true float32, whatever is set outside.
    precision = torch.get_float32_matmul_precision()
    if precision != "highest" or torch.is_autocast_enabled(z.device.type):
        h_t = None                                # it was computed in less: again
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


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    data, method, training = add_run_flags(parser)
    data("--latents", type=location, default="data/latents", help="folder written by encode_latents.py")
    data("--data-path", type=location, metavar="IMAGES",
        help="images to encode on the fly, with random flips as --latents describes, in place of its shards: "
             "a folder of class folders, or a .zip")
    data("--workers", type=whole(0), default=2, help="threads per device that read ahead; 0: read in place")
    data("--stats", type=location, metavar="FILE",
        help="latent statistics in place of the student's: a latent_stats.safetensors or a published stat.pt")
    data("--teacher", type=location, default="runs/teacher",
        help="a run, a published .pt or .safetensors, or a Hub path; not read where eta is 0")
    data("--init", type=location, default="runs/cmt",
        help="the student to start from, likewise; or a teacher, whose embedding of t - s is new then")
    data("--out", type=location, default="runs/meanflow", help="folder for states and log")

    method("--eta", type=fraction, nargs="+", default=[1.0],
        help="1: MFD, 0: MFT, between: a mixture; two numbers: from the first to the second over the run "
             "(MF-RAE: 1)")
    method("--derivative", choices=("jvp", "fd", "fd-central"), default="jvp",
        help="of h along the flow: exact, by finite differences within [s, 1], or by the published central "
             "ones")
    method("--delta-t", type=number(float, 0, 0.5, above=True), default=0.005,
        help="step of the finite differences, in t (MF-RAE)")
    method("--loss-form", choices=("mean", "published"), default="published",
        help="a sample's weight is made of its mean squared error, or of the square of its summed one "
             "(MF-RAE: XL, 180,000 steps; for smaller networks or shorter runs take mean with "
             "--loss-power 0.5 --loss-eps 0.1, docs/METHOD.md)")
    method("--loss-power", type=not_negative, default=1.0, help="p of the weight (q + c)^-p; 0: 1 (MF-RAE)")
    method("--loss-eps", type=positive, default=1e-3, help="c of the weight (MF-RAE)")
    method("--label-dropout", type=fraction, default=0.1, help="probability of 'no label' (MF-RAE)")
    method("--time-shift", type=positive, help="a of shift(u) = a u / (1 + (a - 1) u) (default: student's)")
    add_guidance_flags(method)

    training("--steps", type=whole(), default=180_000, help="of the optimizer (MF-RAE)")
    training("--batch-size", type=whole(4), default=256, help="rows over all devices (MF-RAE; 128 at 512 px)")
    training("--lr", type=not_negative, default=1e-4,
        help="of AdamW, betas (0.9, 0.95), no weight decay (MF-RAE)")
    training("--lr-final", type=not_negative,
        help="at the last step, reached linearly (default: --lr; MF-RAE)")
    training("--decay-from", type=fraction, default=0.0, help="part of the run where the decay begins")
    training("--ema", type=fraction, default=0.9999,
        help="decay of the weights' average per step (MF-RAE; 0.9995 at 512 px)")

    args = parser.parse_args(argv)
    if len(args.eta) > 2:
        parser.error("--eta takes a number, or two: of the first and of the last step")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch()
    micro_batches = micro_batches_of(args, rank, world)
    torch.manual_seed(args.seed)

    # Data; the student: from CMT, or of the state from which the run goes on; the teacher that it distills
    data = TrainingData(args.latents, args.data_path)
    student, of_student = load_network(args.out if states_of(args.out) else args.init, "student")
    check_fit("the student", student, f"--latents {args.latents}", data.shape, len(data.classes))
    stats = load_stats(args.stats, data.shape) if args.stats else of_student["stats"] or data.stats
    args.time_shift = args.time_shift or of_student["time_shift"]
    args.lr_final = args.lr if args.lr_final is None else args.lr_final
    v, of_teacher, weak = None, {"sha256": None}, None
    if any(args.eta):
        teacher, of_teacher = load_network(args.teacher, "teacher")
        check_fit("the teacher", teacher, f"--latents {args.latents}", data.shape, len(data.classes))
        teacher.to(device).requires_grad_(False)
        v, weak = load_guidance(args, teacher, of_teacher)
    for name, of in (("student", of_student), ("teacher", of_teacher)):
        theirs, classes = of.get("stats") or data.stats, of.get("classes") or data.classes
        same = all(torch.allclose(theirs[key], data.stats[key], rtol=1e-6) for key in theirs)
        if classes != data.classes or not (same or args.stats):
            raise InputError(f"the {name} was trained with other classes or latent statistics than "
                             f"{args.latents} has: encode with the same encoder and data, or give --stats")

    # The moving average (EMA) of its weights, which is what is sampled from, and the optimizer
    student.to(device).checkpoint_activations = args.checkpoint_activations
    average = copy.deepcopy(student).requires_grad_(False)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    weights, averages = ([net.get_parameter(name) for name in trained] for net in (student, average))
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # The run: new, or gone on with
    about = {"kind": "student", "time_shift": args.time_shift, "classes": data.classes, "latents": data.about,
             "head_depth": student.depth[1], "stats": stats,
             "settings": {**vars(args), "sha256 of latents": data.sha256, "sha256 of stats": digest_of(stats),
                          "sha256 of teacher": of_teacher["sha256"], "sha256 of weak teacher": weak}}
    first_step, seconds = begin_run(about, student, average, optimizer)

    # Compiled, and over all processes
    if args.compile:
        student.compile(dynamic=False)            # teacher and student share code, not batches
        if any(args.eta):
            teacher.compile(dynamic=False)
    h = distribute(student, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    batches = data.batches(args, micro_batches, first_step, device)
    stats = {name: x.to(device) for name, x in stats.items()}          # here once, not in every step
    begin_decay, log = args.decay_from * args.steps, Log(args, first_step, seconds)

    with stop_signals() as stopped:
        for step in range(first_step, args.steps):
            eta = args.eta[0] + (args.eta[-1] - args.eta[0]) * step / max(1, args.steps - 1)
            for rows in micro_batches:
                # Draw; in every fourth row s < t, in the others s = t
                z_0, y = next(batches)
                times, eps, p = draw(args.seed, step, rows, data.shape, device)
                s, t = time_shift(times, args.time_shift).sort(dim=1).values.unbind(1)
                s = torch.where(torch.arange(len(t), device=device) % 4 == 0, s, t)
                # Labels are dropped once, for all evaluations of a row.
                y = torch.where(p < args.label_dropout, student.num_classes, y)

                # Loss and gradient, which DDP reduces over the processes with the last micro-batch alone. The
                # derivative needs no gradient: it takes the network inside DDP, and one that may be compiled.
                h.require_backward_grad_sync = rows == micro_batches[-1]
                with autocast:
                    loss, numbers = meanflow_loss(
                        h, v, normalize(z_0, stats), eps, t, y, s, eta, args.derivative, args.delta_t,
                        args.loss_form, args.loss_power, args.loss_eps, jumps=slice(None, None, 4),
                        h_fixed=student, jvp=jvp_by_parts)
                (loss / len(micro_batches)).backward()
                log.add(loss, numbers)

            # Clip, step, average
            log.end_step(nn.utils.clip_grad_norm_(weights, args.clip or math.inf))
            decay = max(0.0, (step - begin_decay) / max(1.0, args.steps - 1 - begin_decay))
            lr = optimizer.param_groups[0]["lr"] = args.lr + decay * (args.lr_final - args.lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=world == 1)                # DDP's gradients are views of buckets
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1 - args.ema)

            # Log, save, stop
            done, stop = step + 1, stopped()
            saves = stop or done == args.steps or args.save_every and done % args.save_every == 0
            if saves or done == 1 or done % args.log_every == 0:
                log.write(done, lr)
            if saves and args.save_every:
                save_state(about, done, log.seconds, student, average, optimizer)
                log.since = time.perf_counter()                        # saving is not training time
            if stop:
                say(f"stopped after step {done}" + ": the same command goes on" * (args.save_every > 0))
                sys.exit(128 + stop)


if __name__ == "__main__":
    command(main)
