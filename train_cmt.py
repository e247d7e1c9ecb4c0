"""Stage 2: consistency mid-training (CMT, arXiv 2509.24526), the start of every few-step student here.

Learns long jumps along the teacher's own trajectories. From noise z_1 the teacher's PF-ODE is solved on the shifted grid
1 = t_0 > t_1 > ... > t_N = 0; between any two of its points, at t = t_i and s = t_j < t, the student regresses the mean velocity,

    || h(z_t, t, s, y) - (z_t - z_s) / (t - s) ||^2.

No images are needed: only noise, labels and the teacher, whose weights the student starts from (the embedding of t - s is new and
starts at zero). The times are the true ones of the solver's grid.

    python train_cmt.py                                        # one GPU (or CPU): reads runs/teacher, writes runs/cmt
    torchrun --nproc_per_node=8 train_cmt.py                   # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_cmt.py --pairs 16    # on each of four nodes
    python train_cmt.py --synthetic --steps 20                 # does XL fit, how fast is it? (random networks, no files)

Defaults are those of MF-RAE (arXiv 2511.13019) for ImageNet at 256 px.
"""
import argparse
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from model import (DIT_PRESETS, DiTDH, InputError, command, default_time_shift, generator, generators, guided, load_network, load_stats,
                   ode_times, processes, provenance, read_json, read_tensors, save_network, solve_ode, write_atomically, write_json,
                   write_tensors)


def consistency_loss(h, z_t, z_s, t, s, y):
    """Regress the jump between two points of one trajectory of the teacher (CMT; MF-RAE, section 3.2).

    h: (z, t, s, y) -> mean velocity; z_t, z_s: (B, C, H, W), the trajectory at t and at s; t, s: (B,), s < t; y: (B,) the labels
    the teacher saw. Returns (the mean squared error per element, {"loss", "mse"}: both the same here)."""
    target = (z_t - z_s) / (t - s)[:, None, None, None]
    loss = (h(z_t, t, s, y) - target).square().mean()
    return loss, {"loss": loss.detach(), "mse": loss.detach()}


class TrajectoryPool:
    """The teacher's trajectories, made in large batches, a quarter of them at a time, each kept for `age` steps.

    Every `pairs` rows of the batch form a group with `age` trajectories of its own and draw their pairs from these, so that a
    trajectory serves `pairs` pairs in its life, a batch holds few pairs of any one, and no pair is older than `age` steps. Group and
    serial number alone decide a trajectory: splitting the batch over processes, or resuming, gives the same ones."""

    def __init__(self, solve, shape, times, groups, age, seed, num_classes, label_dropout, step, device, batch=64):
        """solve: (z_1, y) -> list of the points at `times`; groups: of this process, a range; step: to begin with; batch: of `solve`."""
        self.solve, self.groups, self.age, self.quarter, self.batch = solve, groups, age, age // 4, batch
        self.seed, self.device = seed, device
        self.num_classes, self.label_dropout, self.times = num_classes, label_dropout, torch.tensor(times, device=device)
        self.points = torch.empty(len(groups), age, len(times), *shape, device=device)
        self.y = torch.empty(len(groups), age, dtype=torch.long, device=device)
        self.born = torch.zeros(len(groups), age, device=device)
        self.i, self.j = torch.triu_indices(len(times), len(times), offset=1, device=device)      # t_i > t_j: all pairs
        for chunk in range(step // self.quarter, step // self.quarter + 4):
            self.renew(chunk)

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

    def pairs(self, step, rows, group_rows):
        """Pairs for rows [start, stop) of a step: z_t, z_s, t, s, y, and their age in steps, one of each a row."""
        draws = [[torch.randint(n, (4,), generator=g, device=self.device) for n in (self.age, len(self.i))]
                 for g in generators(self.device, rows, self.seed, "pairs", step)]
        slot, pair = (torch.cat(parts) for parts in zip(*draws, strict=True))
        group = torch.arange(*rows, device=self.device) // group_rows - self.groups[0]
        i, j = self.i[pair], self.j[pair]
        return (self.points[group, slot, i], self.points[group, slot, j], self.times[i], self.times[j], self.y[group, slot],
                step - self.born[group, slot])


# ======== The same text in train_teacher.py, train_cmt.py and train_meanflow.py: what a stage does that is not its method ========
FREE = {"steps", "lr", "lr_final", "clip", "precision", "micro_batch", "compile", "checkpoint_activations", "workers", "log_every",
        "save_every", "keep", "keep_every", "resume"}                             # what --resume may change


class Run:
    """Processes, device, this process's rows of the global batch; the average, optimizer, states, log and signals of a run."""

    def __init__(self, args):
        self.args, self.out, self.step, self.seconds, self.signal, self.numbers = args, Path(args.out), 0, 0.0, 0, []
        self.world, self.rank, self.device = processes(args.precision)
        if min(args.steps, args.log_every, args.save_every, args.keep) < 1 or (args.time_shift is not None and args.time_shift <= 0):
            raise InputError("--steps, --log-every, --save-every and --keep must be at least 1, --time-shift above 0")
        share = args.batch_size // self.world
        micro = args.micro_batch or max((n for n in range(4, min(share, 64) + 1, 4) if share % n == 0), default=share)
        if share * self.world != args.batch_size or micro < 4 or micro % 4 or share % micro:
            raise InputError(f"--batch-size {args.batch_size} over {self.world} processes in micro-batches of {micro} rows: it must "
                             "divide evenly, and a micro-batch be a multiple of 4")
        self.rows = [(row, row + micro) for row in range(self.rank * share, (self.rank + 1) * share, micro)]
        if not args.synthetic and ((self.out / "config.json").exists() or any(self.out.glob("state_*.safetensors"))):
            before = read_json(self.out / "run.json")["settings"] if (self.out / "run.json").exists() else {}
            other = [f"{k} {before.get(k)}, now {v}" for k, v in vars(args).items() if k not in FREE and before.get(k) != v]
            if other or not args.resume:
                hint = f" (there {'; '.join(other)})" if other else ", or --resume to go on with it"
                raise InputError(f"{self.out} holds another run: give another --out{hint}")
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.precision == "bf16")
        torch.manual_seed(args.seed)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if not self.signal:
            self.signal, self.signalled = number, time.monotonic()
            print("will save and stop after this step (once more, from 3 seconds on: stop at once)", file=sys.stderr, flush=True)
        elif time.monotonic() > self.signalled + 3:                               # torchrun and a scheduler may both send the first
            os._exit(128 + number)

    def adopt(self, net, config, stats):
        """Network to the device, with average and optimizer, at the newest whole state; returns it as the loop should call it."""
        args, self.net, self.config, self.stats = self.args, net.to(self.device), config, stats
        net.checkpoint_activations = args.checkpoint_activations
        self.names, self.weights = zip(*((name, p) for name, p in net.named_parameters() if p.requires_grad), strict=True)
        self.average = [p.detach().clone() for p in self.weights]
        self.optimizer = torch.optim.AdamW(self.weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        states = [] if args.synthetic else sorted(self.out.glob("state_*.safetensors"), reverse=True)
        for path in states:
            try:
                tensors, about = read_tensors(path, self.device)
            except InputError as error:
                print(f"{error}; trying the state before it", file=sys.stderr)
                continue
            self.step, self.seconds = int(about["step"]), float(about["seconds"])
            net.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("net/")})
            torch._foreach_copy_(self.average, [tensors[f"average/{name}"] for name in self.names])
            for name, p in zip(self.names, self.weights, strict=True):
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=self.device),
                                           **{k: tensors[f"{k}/{name}"] for k in ("exp_avg", "exp_avg_sq")}}
            break
        else:
            if states:
                raise InputError(f"no state in {self.out} is whole: remove the folder and start again")
        if self.world > 1:
            steps = torch.tensor([self.step, -self.step])
            dist.all_reduce(steps, dist.ReduceOp.MAX)
            if steps[0] != -steps[1]:
                raise InputError(f"the processes found other states in {self.out}: it must lie on a disk that all nodes share")
        if self.rank == 0 and not args.synthetic:
            for path in self.out.glob(".*tmp*"):                                  # of a process that was killed while it wrote
                path.unlink()
            write_json(self.out / "run.json", {"settings": vars(args), **provenance()})
            log = (self.out / "log.jsonl").read_text(errors="replace") if (self.out / "log.jsonl").exists() else ""
            log = [f"{line}\n" for line, step in re.findall(r'^({"step": (\d+).*})$', log, re.M) if int(step) <= self.step]     # none twice
            write_atomically(self.out / "log.jsonl", lambda path: path.write_text("".join(log)))
        self.bar = tqdm(total=args.steps, initial=self.step, disable=self.rank > 0 or not sys.stderr.isatty())
        self.since, self.logged = time.perf_counter(), self.step
        if args.compile:
            net.compile(dynamic=False)                                            # teacher and student share code, not batches
        if self.world == 1:
            return net
        parallel = nn.parallel.DistributedDataParallel(net, device_ids=[self.device] if self.device.type == "cuda" else None,
                                                       gradient_as_bucket_view=True)
        parallel.broadcast_buffers = False                                        # tables that never change
        return parallel

    def lr(self):
        """Constant, then linear to --lr-final at the last step."""
        args, begin = self.args, self.args.decay_from * self.args.steps
        part = max(0.0, (self.step - begin) / max(1.0, args.steps - 1 - begin))
        return args.lr + part * ((args.lr if args.lr_final is None else args.lr_final) - args.lr)

    def end_step(self, losses, grad_norm):
        """Count the step; log, save and stop when due. Nothing waits for the device except where the log or a state asks.

        losses: for each micro-batch a dict of numbers, tensors on the device."""
        args, self.step = self.args, self.step + 1
        self.numbers += [{**numbers, "grad_norm": grad_norm} for numbers in losses]
        self.bar.update()
        stop = torch.tensor(self.signal)                                          # read once: a signal may come at any moment
        if self.world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)                              # all stop at the same step
        last = self.step == args.steps or stop
        if last or self.step % args.log_every == 0:
            self.log()
        if not args.synthetic and (last or self.step % args.save_every == 0):
            self.save()
        if last and self.world > 1:
            dist.all_reduce(stop, dist.ReduceOp.MAX)                              # torchrun ends all when one ends: rank 0 has saved
        if stop:
            if self.rank == 0:
                print(f"stopped after step {self.step}: the same command with --resume goes on", flush=True)
            sys.exit(128 + int(stop))

    def log(self):
        """One line of log.jsonl: means since the last one, over all rows; `grad_norm_max` is the largest finite. Non-finite: stop."""
        table = torch.stack([torch.stack([x.float() for x in numbers.values()]) for numbers in self.numbers])
        mean = table.mean(0)
        if self.world > 1:
            dist.all_reduce(mean)
            mean /= self.world
        line = {"step": self.step, **dict(zip(self.numbers[0], mean.tolist(), strict=True)),
                "grad_norm_max": table[:, -1].nan_to_num(0, 0).max().item()}
        now = time.perf_counter()
        rate = self.args.batch_size * (self.step - self.logged) / (now - self.since)
        self.seconds, self.since, self.logged, self.numbers = self.seconds + now - self.since, now, self.step, []
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "samples_per_second": rate, "seconds": self.seconds}
        if self.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        if self.rank == 0:
            text = json.dumps({k: v if k == "step" else float(f"{v:.6g}") if math.isfinite(v) else None for k, v in line.items()})
            if not self.args.synthetic:
                with open(self.out / "log.jsonl", "a") as file:
                    file.write(text + "\n")
            tqdm.write(text)
        if not torch.isfinite(mean).all():
            raise InputError(f"loss or gradient is not finite at step {self.step}; it was not saved. Try a lower --lr or --clip or "
                             "--precision fp32, and encode_latents.py --verify; --resume goes back to the last state")

    def save(self):
        """Rank 0: the state that --resume reads, then the folder to sample from, whose weights are the average."""
        begin = time.perf_counter()
        if not torch.stack(torch._foreach_norm([*self.weights, *self.average])).isfinite().all():
            raise InputError(f"weights are not finite at step {self.step}; not saved: try a lower --lr or --clip, or --precision fp32")
        if self.rank == 0:
            state = {f"net/{k}": v for k, v in self.net.state_dict().items()}
            for name, p, average in zip(self.names, self.weights, self.average, strict=True):
                state[f"average/{name}"] = average
                state |= {f"{k}/{name}": self.optimizer.state[p][k] for k in ("exp_avg", "exp_avg_sq")}
            write_tensors(self.out / f"state_{self.step:08d}.safetensors", state, {"step": str(self.step), "seconds": str(self.seconds)})
            save_network(self.out, self.net.state_dict() | dict(zip(self.names, self.average, strict=True)), self.config, self.stats)
            for path in sorted(self.out.glob("state_*.safetensors"))[:-self.args.keep]:
                if not self.args.keep_every or int(path.stem[6:]) % self.args.keep_every:
                    path.unlink()
        self.since += time.perf_counter() - begin                                 # saving is not training time


# ======== end of the shared text ==================================================================================================


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--teacher", default="runs/teacher", help="folder, published .pt or .safetensors file, or Hub path (default %(default)s)")
    add("--init", help="a student to start from in place of the teacher's weights")
    add("--stats", help="latent statistics, for a teacher that brings none: a latent_stats.safetensors or a published stat.pt")
    add("--out", default="runs/cmt", help="folder for the network, states and log (default %(default)s)")
    add("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="size of the network, with --synthetic alone (default %(default)s)")
    add("--steps", type=int, default=27_000, help="of the optimizer (default %(default)s: MF-RAE)")
    add("--batch-size", type=int, default=512, help="pairs over all devices (default %(default)s: MF-RAE, 8 trajectories of 64 pairs)")
    add("--pairs", type=int, default=64, help="pairs drawn from a trajectory in its life (default %(default)s: MF-RAE)")
    add("--pool-age", type=int, default=64, metavar="STEPS", help="steps that a trajectory is kept, a multiple of 4 (default "
        "%(default)s; the teacher's batches grow with it, and the pool's memory: age * batch-size / pairs trajectories)")
    add("--teacher-steps", type=int, default=16, help="steps of the solver (default %(default)s: MF-RAE)")
    add("--solver", choices=("euler", "heun"), default="euler", help="of the PF-ODE (default %(default)s: MF-RAE)")
    add("--guidance", type=float, default=1.0, metavar="W", help="a guided teacher, v_weak + W (v - v_weak), v_weak without label or of "
        "--weak-teacher (default %(default)s: none, MF-RAE)")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times t with guidance "
        "(default: all)")
    add("--weak-teacher", help="a weaker teacher for --guidance: autoguidance (default: the teacher without label, CFG)")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW, betas (0.9, 0.95), no weight decay (default %(default)s: MF-RAE)")
    add("--lr-final", type=float, help="learning rate at the last step, reached linearly (default: --lr; MF-RAE)")
    add("--decay-from", type=float, default=0.0, help="part of the run where the decay begins (default %(default)s)")
    add("--ema", type=float, default=0.999, help="decay of the weights' average per step (default %(default)s: MF-RAE)")
    add("--label-dropout", type=float, default=0.1, help="probability of 'no label', for teacher and student alike "
        "(default %(default)s: MF-RAE)")
    add("--time-shift", type=float, help="a of the solver's grid t_i = shift(1 - i / N) (default: the teacher's)")
    add("--micro-batch", type=int, help="rows per device and backward pass; gradients accumulate (default: a device's share "
        "in equal parts of at most 64, which XL at 256 px needs on a card of 80 GB)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default %(default)s: paper)")
    add("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    add("--precision", choices=("fp32", "bf16"), default="bf16" if torch.cuda.is_available() else "fp32",
        help="bf16: autocast, weights stay float32 (default: bf16 on a GPU, fp32 on a CPU)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: less memory, one more forward pass")
    add("--log-every", type=int, default=50, metavar="STEPS", help="steps between lines of log.jsonl (default %(default)s)")
    add("--save-every", type=int, default=5000, metavar="STEPS", help="steps between states (default %(default)s)")
    add("--keep", type=int, default=2, help="newest states kept (default %(default)s)")
    add("--keep-every", type=int, default=0, metavar="STEPS", help="keep the states at multiples of this for good (default: none)")
    add("--resume", action="store_true", help="go on from the newest whole state in --out, if there is one")
    add("--synthetic", type=int, nargs="?", const=256, choices=(256, 512), metavar="PX", help="random latents, labels and networks at the "
        "real shapes for 256 (default) or 512 px: does it fit, how fast is it? Reads and writes no files")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args)
    if min(args.pairs, args.pool_age) < 4 or args.pairs % 4 or args.pool_age % 4 or args.teacher_steps < 1 or \
            args.batch_size % (args.pairs * run.world):
        raise InputError(f"--batch-size {args.batch_size} must be a multiple of --pairs {args.pairs} times {run.world} processes, "
                         "--pairs and --pool-age multiples of 4, and --teacher-steps at least 1")
    if args.synthetic:
        grid = args.synthetic // 16
        teacher = DiTDH(grid, 768, num_classes=1000, **DIT_PRESETS[args.preset])
        student = DiTDH(grid, 768, num_classes=1000, time_difference=True, **DIT_PRESETS[args.preset])
        config, stats = {"time_shift": default_time_shift(teacher.shape)}, None
    else:
        teacher, config, stats = load_network(args.teacher, "teacher")
        student, student_config, _ = load_network(args.init or args.teacher, "student", new="r_embedder.")
        if student.shape != teacher.shape or student.num_classes != teacher.num_classes:
            raise InputError(f"--init {args.init} has latents {student.shape} and {student.num_classes} classes, the teacher "
                             f"{teacher.shape} and {teacher.num_classes}")
        stats = load_stats(args.stats, teacher.shape) if args.stats else stats
        if stats is None:
            raise InputError(f"{args.teacher} brings no latent statistics: give them with --stats")
        config = {**config, "kind": "student", "network": student_config["network"]}
    config["time_shift"] = args.time_shift or config["time_shift"]
    teacher.to(run.device).requires_grad_(False)
    weak = load_network(args.weak_teacher, "teacher")[0].to(run.device).requires_grad_(False) if args.weak_teacher else None
    v = guided(teacher, args.guidance, args.guidance_interval, weak)
    if args.compile:
        teacher.compile(dynamic=False)
    h = run.adopt(student, config, stats)
    times = ode_times(args.teacher_steps, config["time_shift"])

    def solve(z_1, y):
        with run.autocast:
            return solve_ode(lambda z, t: v(z, t, y).float(), z_1, times, args.solver)

    groups = range(run.rows[0][0] // args.pairs, run.rows[-1][1] // args.pairs)
    pool = TrajectoryPool(solve, teacher.shape, times, groups, args.pool_age, args.seed, teacher.num_classes, args.label_dropout,
                          run.step, run.device, run.rows[0][1] - run.rows[0][0])
    while run.step < args.steps:
        if run.step % pool.quarter == 0 and run.step > 0:
            pool.renew(run.step // pool.quarter + 3)
        losses = []
        for rows in run.rows:
            z_t, z_s, t, s, y, age = pool.pairs(run.step, rows, args.pairs)
            h.require_backward_grad_sync = rows == run.rows[-1]                   # DDP: all-reduced with the last alone
            with run.autocast:
                loss, numbers = consistency_loss(lambda z, t, s, y: h(z, t, y, s), z_t, z_s, t, s, y)
            (loss / len(run.rows)).backward()
            losses.append({**numbers, "pair_age": age.mean()})
        grad_norm = nn.utils.clip_grad_norm_(run.weights, args.clip)
        run.optimizer.param_groups[0]["lr"] = run.lr()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=run.world == 1)                       # DDP's gradients are views of its buckets: kept
        with torch.no_grad():
            torch._foreach_lerp_(run.average, run.weights, 1 - args.ema)
        run.end_step(losses, grad_norm)


if __name__ == "__main__":
    command(main)
