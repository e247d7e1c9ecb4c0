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

The same command, repeated, goes on from the newest state in --out.
Defaults are those of MF-RAE (arXiv 2511.13019) for ImageNet at 256 px.
"""
import copy
import math
import sys
import time

import torch
from torch import nn

from model import (
    ArgumentParser, InputError, Log, add_guidance_flags, add_run_flags, begin_run, check_fit, command,
    digest_of, distribute, fraction, generator, generators, launch, load_guidance, load_network, load_stats,
    location, micro_batches_of, not_negative, ode_times, positive, save_state, say, solve_ode, states_of,
    stop_signals, whole)


def consistency_loss(h, z_t, z_s, t, y, s):
    """Regress the jump between two points of one trajectory of the teacher (CMT; MF-RAE, section 3.2).

    h: (z, t, y, s) -> mean velocity; z_t, z_s: (B, ...), the trajectory at t and at s; t, s: (B,), s < t;
    y: (B,) the labels the teacher saw. Returns (the mean squared error per element, numbers for the log: the
    same as mse)."""
    target = (z_t - z_s) / (t - s).reshape(-1, *[1] * (z_t.ndim - 1))
    loss = (h(z_t, t, y, s) - target).square().mean()
    return loss, {"mse": loss.detach()}


class TrajectoryPool:
    """The teacher's trajectories for the next `pairs` steps, solved together in large batches.

    Every `pairs` rows of the batch form a group with `pairs` trajectories of its own, and draw their pairs of
    points from these: a trajectory serves `pairs` pairs on average, a batch holds few of any one. Group and
    number alone decide a trajectory, so splitting the batch or going on gives the same."""

    def __init__(self, begin, solve, times, groups, pairs, seed, device, batch):
        """begin: generator -> noise z_1 (C, H, W), label y (); solve: (z_1, y) -> list of the points at
        `times`, for `batch` trajectories at a time; groups: of this process, a range."""
        self.begin, self.solve, self.groups, self.pairs, self.batch = begin, solve, groups, pairs, batch
        self.seed, self.device, self.era, self.points = seed, device, None, None
        self.times = torch.tensor(times, device=device)
        # All pairs t_i > t_j
        self.i, self.j = torch.triu_indices(len(times), len(times), offset=1, device=device)

    @torch.no_grad()
    def renew(self, era):
        """Solve trajectories era * pairs ... of every group. points: (groups * pairs, times, C, H, W)"""
        serials = range(era * self.pairs, (era + 1) * self.pairs)
        keys = [(self.seed, "trajectory", group, serial) for group in self.groups for serial in serials]
        z, y = zip(*(self.begin(generator(self.device, *key)) for key in keys), strict=True)
        z, self.y, self.era = torch.stack(z), torch.stack(y), era
        if self.points is None:
            self.points = z.new_empty(len(z), len(self.times), *z.shape[1:])
        for k in range(0, len(z), self.batch):
            rows = slice(k, k + self.batch)
            self.points[rows] = torch.stack(self.solve(z[rows], self.y[rows]), dim=1)

    def draw(self, step, rows):
        """Pairs for rows [start, stop) of a step: z_t, z_s, t, y, s, one of each a row."""
        if step // self.pairs != self.era:
            self.renew(step // self.pairs)
        draws = [[torch.randint(n, (4,), generator=g, device=self.device) for n in (self.pairs, len(self.i))]
                 for g in generators(self.device, rows, self.seed, "pairs", step)]
        k, pair = (torch.cat(parts) for parts in zip(*draws, strict=True))
        # The groups of this process lie one after another.
        k += (torch.arange(*rows, device=self.device) // self.pairs - self.groups[0]) * self.pairs
        i, j = self.i[pair], self.j[pair]
        return self.points[k, i], self.points[k, j], self.times[i], self.y[k], self.times[j]


def parse_args(argv=None):
    parser = ArgumentParser(__doc__.split("\n\n")[0])
    data, method, training = add_run_flags(parser)
    data("--teacher", type=location, default="runs/teacher",
        help="a run, a published .pt or .safetensors, or a Hub path")
    data("--init", type=location, help="a student to start from, in place of the teacher's weights")
    data("--stats", type=location, metavar="FILE",
        help="latent statistics, for a teacher that brings none: a latent_stats.safetensors or a published "
             "stat.pt")
    data("--out", type=location, default="runs/cmt", help="folder for states and log")

    method("--teacher-steps", type=whole(), default=16, help="steps of the solver (MF-RAE)")
    method("--solver", choices=("euler", "heun"), default="euler", help="of the PF-ODE (MF-RAE)")
    method("--pairs", type=whole(4), default=64,
        help="pairs drawn from a trajectory on average, and steps that it lives, a multiple of 4 (MF-RAE): "
             "--batch-size trajectories are solved at once")
    method("--label-dropout", type=fraction, default=0.1,
        help="probability of 'no label', for teacher and student alike (MF-RAE)")
    method("--time-shift", type=positive,
        help="a of the solver's grid t_i = shift(1 - i / N) (default: the teacher's)")
    add_guidance_flags(method)

    training("--steps", type=whole(), default=27_000, help="of the optimizer (MF-RAE)")
    training("--batch-size", type=whole(4), default=512,
        help="pairs over all devices (MF-RAE: 8 trajectories of 64 pairs)")
    training("--lr", type=not_negative, default=1e-4,
        help="of AdamW, betas (0.9, 0.95), no weight decay (MF-RAE)")
    training("--lr-final", type=not_negative,
        help="at the last step, reached linearly (default: --lr; MF-RAE)")
    training("--decay-from", type=fraction, default=0.0, help="part of the run where the decay begins")
    training("--ema", type=fraction, default=0.999, help="decay of the weights' average per step (MF-RAE)")

    args = parser.parse_args(argv)
    if args.pairs % 4:
        parser.error("--pairs must be a multiple of 4")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch()
    micro_batches = micro_batches_of(args, rank, world)
    if args.batch_size % (args.pairs * world):
        raise InputError(f"--batch-size {args.batch_size} must be a multiple of --pairs {args.pairs} times "
                         f"{world} processes")
    torch.manual_seed(args.seed)

    # The teacher, whose trajectories are the data; the student: of its weights, of --init, or of the state
    # from which the run goes on
    teacher, of_teacher = load_network(args.teacher, "teacher")
    student, _ = load_network(args.out if states_of(args.out) else args.init or args.teacher, "student")
    check_fit("the student", student, "the teacher", teacher.shape, teacher.num_classes)
    stats = load_stats(args.stats, teacher.shape) if args.stats else of_teacher["stats"]
    if stats is None:
        raise InputError(f"{args.teacher} brings no latent statistics: give them with --stats")
    args.time_shift = args.time_shift or of_teacher["time_shift"]
    args.lr_final = args.lr if args.lr_final is None else args.lr_final
    teacher.to(device).requires_grad_(False)
    v, weak = load_guidance(args, teacher, of_teacher)

    # The moving average (EMA) of its weights, which is what is sampled from, and the optimizer
    student.to(device).checkpoint_activations = args.checkpoint_activations
    average = copy.deepcopy(student).requires_grad_(False)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    weights, averages = ([net.get_parameter(name) for name in trained] for net in (student, average))
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # The run: new, or gone on with
    about = {"kind": "student", "time_shift": args.time_shift, "classes": of_teacher["classes"],
             "latents": of_teacher.get("latents"), "head_depth": student.depth[1], "stats": stats,
             "settings": {**vars(args), "sha256 of teacher": of_teacher["sha256"],
                          "sha256 of weak teacher": weak, "sha256 of stats": digest_of(stats)}}
    first_step, seconds = begin_run(about, student, average, optimizer)

    # Compiled, and over all processes
    if args.compile:
        student.compile(dynamic=False)            # teacher and student share code, not batches
        teacher.compile(dynamic=False)
    h = distribute(student, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    times = ode_times(args.teacher_steps, args.time_shift)

    def begin(g):
        """Noise and label of a trajectory; labels are dropped for teacher and student alike."""
        z_1 = torch.randn(teacher.shape, generator=g, device=device)
        y = torch.randint(teacher.num_classes, (), generator=g, device=device)
        dropped = torch.rand((), generator=g, device=device) < args.label_dropout
        return z_1, torch.where(dropped, teacher.num_classes, y)

    def solve(z_1, y):
        with autocast:
            return solve_ode(v, z_1, y, times, args.solver)

    groups = range(micro_batches[0][0] // args.pairs, micro_batches[-1][1] // args.pairs)
    batch = micro_batches[0][1] - micro_batches[0][0]
    pool = TrajectoryPool(begin, solve, times, groups, args.pairs, args.seed, device, batch)
    begin_decay, log = args.decay_from * args.steps, Log(args, first_step, seconds)

    with stop_signals() as stopped:
        for step in range(first_step, args.steps):
            for rows in micro_batches:
                # Draw
                z_t, z_s, t, y, s = pool.draw(step, rows)

                # Loss and gradient, which DDP reduces over the processes with the last micro-batch alone
                h.require_backward_grad_sync = rows == micro_batches[-1]
                with autocast:
                    loss, numbers = consistency_loss(h, z_t, z_s, t, y, s)
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
