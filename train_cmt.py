"""Stage 2: consistency mid-training (CMT, arXiv 2509.24526), the start of every few-step student here.

Learns long jumps along the teacher's own trajectories. From noise z_1 the teacher's PF-ODE is solved on
the shifted grid 1 = t_0 > t_1 > ... > t_N = 0. Between any two of its points, at t = t_i and s = t_j < t,
the student regresses the mean velocity:

    || h(z_t, t, y, s) - (z_t - z_s) / (t - s) ||^2

No images are needed: only noise, labels and the teacher, whose weights the student starts from (the
embedding of t - s is new and starts at zero). The times are the true ones of the solver's grid.

    python train_cmt.py                               # one GPU (or CPU): reads runs/teacher, writes runs/cmt
    torchrun --nproc_per_node=8 train_cmt.py          # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_cmt.py --pairs 16                       # on each of four nodes
    python train_cmt.py --synthetic --steps 20        # does XL fit, how fast is it? (no files)

Defaults are those of MF-RAE (arXiv 2511.13019) for ImageNet at 256 px.
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

from model import (
    DIT_PRESETS, ArgumentParser, DiTDH, InputError, add_run_flags, all_reduce, append_line, begin_run,
    command, default_time_shift, distribute, fraction, generator, generators, guided, is_first, launch,
    load_network, load_newest_state, load_stats, not_negative, ode_times, positive, resumes, save_state, say,
    solve_ode, stop_signal, unused_run_flags, whole)


def consistency_loss(h, z_t, z_s, t, y, s):
    """Regress the jump between two points of one trajectory of the teacher (CMT; MF-RAE, section 3.2).

    h: (z, t, y, s) -> mean velocity; z_t, z_s: (B, ...), the trajectory at t and at s; t, s: (B,), s < t;
    y: (B,) the labels the teacher saw. Returns (the mean squared error per element, numbers for the log:
    it, twice)."""
    target = (z_t - z_s) / (t - s).reshape(-1, *[1] * (z_t.ndim - 1))
    loss = (h(z_t, t, y, s) - target).square().mean()
    return loss, {"loss": loss.detach(), "mse": loss.detach()}


class TrajectoryPool:
    """The teacher's trajectories, made in large batches, a quarter of them at a time, each kept for `age`
    steps.

    Every `pairs` rows of the batch form a group with `age` trajectories of its own and draw their pairs
    from these: a trajectory serves `pairs` pairs in its life, a batch holds few pairs of any one, and no
    pair is older than `age` steps. Group and serial number alone decide a trajectory, so splitting the
    batch or resuming gives the same."""

    def __init__(self, solve, shape, times, groups, pairs, age, seed, num_classes, label_dropout, device,
                 batch=64):
        """solve: (z_1, y) -> list of the points at `times`; groups: of this process, a range; batch: of
        `solve`."""
        self.solve, self.groups, self.group_rows = solve, groups, pairs
        self.age, self.quarter = age, age // 4
        self.seed, self.num_classes, self.label_dropout = seed, num_classes, label_dropout
        self.device, self.batch, self.newest = device, batch, -1
        self.times = torch.tensor(times, device=device)
        self.points = torch.empty(len(groups), age, len(times), *shape, device=device)
        self.y = torch.empty(len(groups), age, dtype=torch.long, device=device)
        self.born = torch.zeros(len(groups), age, device=device)
        # All pairs t_i > t_j
        self.i, self.j = torch.triu_indices(len(times), len(times), offset=1, device=device)

    @torch.no_grad()
    def renew(self, chunk):
        """Solve trajectories chunk * quarter ... of every group, over the oldest ones."""
        serials = range(chunk * self.quarter, (chunk + 1) * self.quarter)
        z, y = [], []
        for group in self.groups:
            for serial in serials:
                g = generator(self.device, self.seed, "trajectory", group, serial)
                z.append(torch.randn(self.points.shape[3:], generator=g, device=self.device))
                label = torch.randint(self.num_classes, (), generator=g, device=self.device)
                dropped = torch.rand((), generator=g, device=self.device) < self.label_dropout
                y.append(torch.where(dropped, self.num_classes, label))
        z, y, begin = torch.stack(z), torch.stack(y), serials[0] % self.age
        for rows in torch.arange(len(y), device=self.device).split(self.batch):
            group, slot = rows // self.quarter, begin + rows % self.quarter
            self.points[group, slot] = torch.stack(self.solve(z[rows], y[rows]), dim=1)
            self.y[group, slot] = y[rows]
        self.born[:, begin:begin + self.quarter] = max(0, chunk - 3) * self.quarter
        self.newest = chunk

    def draw(self, step, rows):
        """Pairs for rows [start, stop) of a step: z_t, z_s, t, y, s, and their age in steps, one of each a
        row."""
        now = step // self.quarter
        for chunk in range(max(now, self.newest + 1), now + 4):
            self.renew(chunk)
        draws = [[torch.randint(n, (4,), generator=g, device=self.device) for n in (self.age, len(self.i))]
                 for g in generators(self.device, rows, self.seed, "pairs", step)]
        slot, pair = (torch.cat(parts) for parts in zip(*draws, strict=True))
        group = torch.arange(*rows, device=self.device) // self.group_rows - self.groups[0]
        i, j = self.i[pair], self.j[pair]
        z_t, z_s = (self.points[group, slot, k] for k in (i, j))
        return z_t, z_s, self.times[i], self.y[group, slot], self.times[j], step - self.born[group, slot]


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
    add("--teacher", default="runs/teacher", help="folder, published .pt or .safetensors file, or Hub path")
    add("--init", help="a student to start from, in place of the teacher's weights")
    add("--stats", metavar="FILE",
        help="latent statistics, for a teacher that brings none: a latent_stats.safetensors or a published "
             "stat.pt")
    add("--out", default="runs/cmt", help="folder for the network, states and log")

    add = groups["method"].add_argument
    add("--teacher-steps", type=whole(), default=16, help="steps of the solver (MF-RAE)")
    add("--solver", choices=("euler", "heun"), default="euler", help="of the PF-ODE (MF-RAE)")
    add("--pairs", type=whole(4), default=64,
        help="pairs drawn from a trajectory in its life, a multiple of 4 (MF-RAE)")
    add("--pool-age", type=whole(4), default=64, metavar="STEPS",
        help="steps that a trajectory is kept, a multiple of 4; the teacher's batches grow with it, and the "
             "pool's memory: age * batch-size / pairs trajectories")
    add("--label-dropout", type=fraction, default=0.1,
        help="probability of 'no label', for teacher and student alike (MF-RAE)")
    add("--time-shift", type=positive,
        help="a of the solver's grid t_i = shift(1 - i / N) (default: the teacher's)")
    add("--guidance", type=not_negative, default=1.0, metavar="W",
        help="a guided teacher, v_weak + W (v - v_weak), v_weak without label or of --weak-teacher (MF-RAE: "
             "none)")
    add("--guidance-interval", type=fraction, nargs=2, metavar=("LOW", "HIGH"),
        help="times t with guidance (default: all)")
    add("--weak-teacher",
        help="a weaker teacher for --guidance: autoguidance (default: the teacher without label)")
    add("--preset", choices=DIT_PRESETS, help="size of the networks of --synthetic (default: DiTDH-XL)")

    add = groups["optimization"].add_argument
    add("--steps", type=whole(), default=27_000, help="of the optimizer (MF-RAE)")
    add("--batch-size", type=whole(4), default=512,
        help="pairs over all devices (MF-RAE: 8 trajectories of 64 pairs)")
    add("--lr", type=not_negative, default=1e-4, help="of AdamW, betas (0.9, 0.95), no weight decay (MF-RAE)")
    add("--lr-final", type=not_negative, help="at the last step, reached linearly (default: --lr; MF-RAE)")
    add("--decay-from", type=fraction, help="part of the run where the decay begins (default: 0)")
    add("--ema", type=fraction, default=0.999, help="decay of the weights' average per step (MF-RAE)")

    args = parser.parse_args(argv)
    if args.pairs % 4 or args.pool_age % 4:
        parser.error("--pairs and --pool-age must be multiples of 4")
    guides = args.guidance != 1
    parser.settle(
        args,
        *unused_run_flags(args),
        ("--guidance-interval", guides, [0.0, 1.0], "without --guidance W, W other than 1"),
        ("--weak-teacher", guides, None, "without --guidance W, W other than 1"),
        ("--decay-from", args.lr_final is not None, 0.0, "without --lr-final"),
        ("--preset", args.synthetic, "DiTDH-XL", "without --synthetic: the files give the sizes"))
    return args


def load_inputs(args):
    """-> student, its config, statistics, teacher, weak teacher (or None). InputError where they do not
    fit."""
    if args.synthetic:
        grid, preset = args.synthetic // 16, DIT_PRESETS[args.preset]
        sizes = dict(input_size=grid, in_channels=768, num_classes=1000, **preset)
        teacher, student = DiTDH(**sizes), DiTDH(**sizes, time_difference=True)
        zeros = torch.zeros(teacher.shape)
        return student, {"time_shift": default_time_shift(teacher.shape)}, (zeros, zeros + 1), teacher, None
    teacher, config, stats = load_network(args.teacher, "teacher")
    if resumes(args):
        student, student_config, _ = load_network(args.out, "student", weights=False)
    else:
        student, student_config, _ = load_network(args.init or args.teacher, "student", new="r_embedder.")
    weak = load_network(args.weak_teacher, "teacher")[0] if args.weak_teacher else None
    if student.shape != teacher.shape or student.num_classes != teacher.num_classes:
        raise InputError(f"--init {args.init} has latents {student.shape} and {student.num_classes} classes, "
                         f"the teacher {teacher.shape} and {teacher.num_classes}")
    stats = load_stats(args.stats, teacher.shape) if args.stats else stats
    if stats is None:
        raise InputError(f"{args.teacher} brings no latent statistics: give them with --stats")
    return student, {**config, "kind": "student", "network": student_config["network"]}, stats, teacher, weak


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(args.precision)
    micro_batches = rows_of_process(args, rank, world)
    if args.batch_size % (args.pairs * world):
        raise InputError(f"--batch-size {args.batch_size} must be a multiple of --pairs {args.pairs} times "
                         f"{world} processes")
    out = None if args.synthetic else Path(args.out)
    stopped = stop_signal()
    torch.manual_seed(args.seed)

    # The teacher, whose trajectories are the data, and the student
    student, config, stats, teacher, weak = load_inputs(args)
    config["time_shift"] = args.time_shift or config["time_shift"]
    teacher.to(device).requires_grad_(False)
    weak = weak and weak.to(device).requires_grad_(False)
    v = guided(teacher, args.guidance, args.guidance_interval, weak)
    run = begin_run(out, args, parse_args([]), stats, teacher=teacher, weak_teacher=weak)

    # The student, the average of its weights, which is what is saved to sample from, and the optimizer
    student.to(device).checkpoint_activations = args.checkpoint_activations
    average = copy.deepcopy(student).requires_grad_(False)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    weights, averages = ([net.get_parameter(name) for name in trained] for net in (student, average))
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    whole_run = (student, average, optimizer, config, stats, args.keep, args.keep_every)
    first_step, seconds = load_newest_state(out, run, *whole_run)
    announce(student, f"trajectories of {args.teacher}", device, world, args, first_step)

    # Compiled, and over all processes
    if args.compile:
        student.compile(dynamic=False)            # teacher and student share code, not batches
        teacher.compile(dynamic=False)
    h = distribute(student, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    times = ode_times(args.teacher_steps, config["time_shift"])

    def solve(z_1, y):
        with autocast:
            return solve_ode(v, z_1, y, times, args.solver)

    groups = range(micro_batches[0][0] // args.pairs, micro_batches[-1][1] // args.pairs)
    pool = TrajectoryPool(
        solve, teacher.shape, times, groups, args.pairs, args.pool_age, args.seed, teacher.num_classes,
        args.label_dropout, device, batch=micro_batches[0][1] - micro_batches[0][0])

    numbers, clock = [], {"step": first_step, "since": time.perf_counter(), "seconds": seconds}
    for step in range(first_step, args.steps):
        for rows in micro_batches:
            # Draw
            z_t, z_s, t, y, s, age = pool.draw(step, rows)

            # Loss and gradient, which DDP reduces over the processes with the last micro-batch alone
            h.require_backward_grad_sync = rows == micro_batches[-1]
            with autocast:
                loss, of_loss = consistency_loss(h, z_t, z_s, t, y, s)
            (loss / len(micro_batches)).backward()
            numbers.append({**of_loss, "pair_age": age.mean()})

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
