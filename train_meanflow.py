"""Stage 3: MeanFlow in the latent space, by distillation (MFD) or training (MFT), a student h(z_t, t, s, y) for one or two jumps.

From the MeanFlow identity h = v - (t - s) dh/dt (arXiv 2505.13447), with the transport derivative dh/dt = (dh/dz) v + dh/dt|_z:

    || h(z_t, t, s, y) - stopgrad(u) ||^2,    u = w - (t - s) dh/dt,    w = (1 - eta) (eps - z_0) + eta v(z_t, t, y)

eta = 1 is MFD: the teacher's velocity v in place of the one-point velocity, low variance, the teacher's bias; eta = 0 is MFT: no
bias, high variance, a short run after MFD (MF-RAE, arXiv 2511.13019, section 3). For three rows in four s = t, where the loss is
flow matching (or its distillation) and no derivative is needed.

    python train_meanflow.py                                   # one GPU (or CPU): data/latents, runs/teacher, runs/cmt -> runs/meanflow
    torchrun --nproc_per_node=8 train_meanflow.py              # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_meanflow.py   # on each of four nodes
    python train_meanflow.py --eta 0 --init runs/meanflow --out runs/mft --steps 10000       # MFT after MFD
    python train_meanflow.py --synthetic --steps 20            # does XL fit, how fast is it? (random data and networks, no files)

Defaults are those of MF-RAE for ImageNet at 256 px.
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

from model import (DIT_PRESETS, DiTDH, InputError, command, default_time_shift, generators, guided, load_network, load_stats, normalize,
                   processes, provenance, read_json, read_tensors, save_network, time_shift, write_atomically, write_json, write_tensors)


def meanflow_loss(h, v, z_0, eps, t, s, y, eta=1.0, derivative="jvp", delta_t=0.005, form="mean", power=0.0, loss_eps=1e-3,
                  rows=slice(None), h_fixed=None, jvp=torch.func.jvp):
    """The MeanFlow objective with the proxy velocity w of eta (MF-RAE, eq. 9 to 11).

    h: (z, t, s, y) -> mean velocity; v: (z, t, y) -> the teacher's velocity (not called for eta = 0); z_0, eps: (B, C, H, W) data and
    noise; t, s: (B,), 0 <= s <= t <= 1; y: (B,) int labels, already dropped where they are to be.
    derivative: "jvp", exact; "fd", finite differences of step delta_t that stay within [s, 1], second order everywhere; "fd-central",
    the published stencil, which leaves it. rows: those where s < t may hold; elsewhere s = t, and no derivative is taken.
    h_fixed: h for the derivative, which needs no gradient: under DDP, the network inside it. Default: h. jvp: or a compiled one.
    form, power, loss_eps: the weight of a sample, q / stopgrad(q + loss_eps)^power, with q its mean squared error ("mean") or the square
    of its summed squared error ("published", power 1: what the script's flags default to; here, the plain squared error).
    Returns (loss, {"loss", "mse": the mean squared error per element})."""
    h_fixed = h_fixed or h
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    h_t = h(z_t, t, s, y)
    with torch.no_grad():
        w = (1 - eta) * (eps - z_0)
        if eta > 0:
            w = w + eta * v(z_t, t, y)
        z, t, s, y, tangent = (x[rows].contiguous() for x in (z_t, t, s, y, w))
        if derivative == "jvp":                   # the fused attention kernels have no forward-mode derivative: math attention here
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                dh_dt = jvp(lambda z, t: h_fixed(z, t, s, y), (z, t), (tangent, torch.ones_like(t)))[1]
        else:                                     # a finite difference in reduced precision is noise / delta_t: true float32, whatever
            precision = torch.get_float32_matmul_precision()                      # is set outside
            reduced = torch.is_autocast_enabled(z.device.type) or precision != "highest"
            torch.set_float32_matmul_precision("highest")
            with torch.autocast(z.device.type, enabled=False):
                d = torch.full_like(t, delta_t)
                central = ((t + d <= 1) & (t - d >= s)) | (derivative == "fd-central")
                forward = ~central & (t + 2 * d <= 1)
                d = torch.where(central | forward, d, torch.minimum(d, (t - s) / 2).clamp(min=1e-6))      # backward, never below s
                side = torch.where(forward, 1.0, -1.0)                            # one-sided: (2 h_a - h_b / 2 - 3 h_t / 2) / (side d)
                a, b = torch.where(central, 1.0, side), torch.where(central, -1.0, 2 * side)                        # offsets / d
                c_a, c_b, c_t = (torch.where(central, c, k * side) for c, k in ((0.5, 2), (-0.5, -0.5), (0.0, -1.5)))  # coefficients
                z_ab = torch.cat([z + (x * d)[:, None, None, None] * tangent for x in (a, b)])
                h_a, h_b = h_fixed(z_ab, torch.cat([t + a * d, t + b * d]), s.repeat(2), y.repeat(2)).chunk(2)
                center = h_fixed(z, t, s, y) if reduced else h_t[rows]
                dh_dt = sum((c / d)[:, None, None, None] * x for c, x in ((c_a, h_a), (c_b, h_b), (c_t, center)))
            torch.set_float32_matmul_precision(precision)
        u = w.clone()
        u[rows] -= (t_ - s_)[rows] * dh_dt
    error = (h_t - u).square()
    mse = error.mean((1, 2, 3))
    q = error.sum((1, 2, 3)).square() if form == "published" else mse
    loss = (q / (q.detach() + loss_eps) ** power).mean()
    return loss, {"loss": loss.detach(), "mse": mse.detach().mean()}


def draw(seed, step, rows, shape, device):
    """What is random in rows [start, stop) of a step: u ~ U(0, 1) (B, 2), eps ~ N(0, I) (B, C, H, W), dropout's uniforms (B,)."""
    blocks = [(torch.rand(4, 2, generator=g, device=device), torch.randn(4, *shape, generator=g, device=device),
               torch.rand(4, generator=g, device=device)) for g in generators(device, rows, seed, "meanflow", step)]
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)]


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
    add("--latents", default="data/latents", help="folder written by encode_latents.py (default %(default)s)")
    add("--data-path", help="images (folder of class folders, or .zip), encoded on the fly with random flips as --latents describes; its "
        "shards are not needed then (default: none, read the shards)")
    add("--stats", help="latent statistics in place of those of the student: a latent_stats.safetensors or a published stat.pt")
    add("--teacher", default="runs/teacher", help="folder, published .pt or .safetensors file, or Hub path; unused with --eta 0 "
        "(default %(default)s)")
    add("--init", default="runs/cmt", help="the student to start from, likewise; a teacher's weights are taken too, with a new embedding "
        "of t - s (default %(default)s)")
    add("--out", default="runs/meanflow", help="folder for the network, states and log (default %(default)s)")
    add("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="size of the network, with --synthetic alone (default %(default)s)")
    add("--steps", type=int, default=180_000, help="of the optimizer (default %(default)s: MF-RAE)")
    add("--batch-size", type=int, default=256, help="over all devices (default %(default)s: MF-RAE; 128 at 512 px)")
    add("--eta", type=float, nargs="+", default=[1.0], help="1: MFD, 0: MFT, between: a mixture; two numbers: from the first to the second "
        "over the run (default 1: MF-RAE)")
    add("--derivative", choices=("jvp", "fd", "fd-central"), default="jvp", help="of h along the flow: exact, by finite differences within "
        "[s, 1], or by the published central ones (default %(default)s)")
    add("--delta-t", type=float, default=0.005, help="step of the finite differences, in t (default %(default)s: MF-RAE)")
    add("--loss-form", choices=("mean", "published"), default="published", help="the weight of a sample is made of its mean squared "
        "error per element, or of the square of its summed one (default %(default)s: MF-RAE at XL; small networks: mean, docs/METHOD.md)")
    add("--loss-power", type=float, default=1.0, help="p of the weight (q + c)^-p (default %(default)s: MF-RAE; 0: plain squared error)")
    add("--loss-eps", type=float, default=1e-3, help="c of the weight (default %(default)s: MF-RAE)")
    add("--guidance", type=float, default=1.0, metavar="W", help="a guided teacher, v_weak + W (v - v_weak), v_weak without label or of "
        "--weak-teacher (default %(default)s: none, MF-RAE)")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("LOW", "HIGH"), help="times t with guidance "
        "(default: all)")
    add("--weak-teacher", help="a weaker teacher for --guidance: autoguidance (default: the teacher without label, CFG)")
    add("--lr", type=float, default=1e-4, help="learning rate of AdamW, betas (0.9, 0.95), no weight decay (default %(default)s: MF-RAE)")
    add("--lr-final", type=float, help="learning rate at the last step, reached linearly (default: --lr; MF-RAE)")
    add("--decay-from", type=float, default=0.0, help="part of the run where the decay begins (default %(default)s)")
    add("--ema", type=float, default=0.9999, help="decay of the weights' average per step (default %(default)s: MF-RAE; 0.9995 at 512 px)")
    add("--label-dropout", type=float, default=0.1, help="probability of 'no label' (default %(default)s: MF-RAE)")
    add("--time-shift", type=float, help="a of shift(u) = a u / (1 + (a - 1) u) (default: the student's)")
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
    add("--workers", type=int, default=0, help="processes per device that read ahead (default %(default)s: read in place)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run = Run(args)
    if len(args.eta) > 2 or not all(0 <= eta <= 1 for eta in args.eta) or args.delta_t <= 0:
        raise InputError("--eta takes a number from 0 to 1, or two: of the first and of the last step; --delta-t is above 0")
    needs_teacher = any(args.eta)
    if not needs_teacher and (args.guidance != 1 or args.weak_teacher):
        raise InputError("--guidance and --weak-teacher guide the teacher, and --eta 0 has none")
    from encode_latents import TrainingData  # the only other file this stage needs
    data = TrainingData(args.latents, args.data_path, args.synthetic)
    if args.synthetic:
        sizes = dict(input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes), **DIT_PRESETS[args.preset])
        teacher, student, stats = DiTDH(**sizes) if needs_teacher else None, DiTDH(**sizes, time_difference=True), data.stats
        config = {"time_shift": default_time_shift(data.shape)}
    else:
        student, config, stats = load_network(args.init, "student", new="r_embedder.")
        teacher = load_network(args.teacher, "teacher")[0] if needs_teacher else None
        stats = load_stats(args.stats, data.shape) if args.stats else stats if stats is not None else data.stats
        for name, net in (("--init", student), ("--teacher", teacher)):
            if net and (net.shape != data.shape or net.num_classes != len(data.classes)):
                raise InputError(f"{name} is for latents {net.shape} of {net.num_classes} classes, --latents {args.latents} holds "
                                 f"{data.shape} of {len(data.classes)}")
        if not args.stats and not all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(stats, data.stats, strict=True)):
            raise InputError(f"the student was trained with other latent statistics than those in {args.latents}: encode with the same "
                             "encoder and data, or choose with --stats")
    shift = config["time_shift"] = args.time_shift or config["time_shift"]
    stats, v = [x.to(run.device) for x in stats], None                            # here once, not in every step
    if needs_teacher:
        teacher.to(run.device).requires_grad_(False)
        weak = load_network(args.weak_teacher, "teacher")[0].to(run.device).requires_grad_(False) if args.weak_teacher else None
        v = guided(teacher, args.guidance, args.guidance_interval, weak)
        if args.compile:
            teacher.compile(dynamic=False)
    h = run.adopt(student, config, stats)
    fixed = student.forward if args.derivative == "jvp" else student             # the one inside jvp's graph, the other with its own
    jvp = torch.compile(lambda *x: torch.func.jvp(*x), dynamic=False) if args.compile else torch.func.jvp     # itself would stay eager
    batches = data.batches(args.seed, args.batch_size, run.rows, run.step, args.steps, run.device, args.workers)

    while run.step < args.steps:
        eta = args.eta[0] + (args.eta[-1] - args.eta[0]) * run.step / max(1, args.steps - 1)
        losses = []
        for rows in run.rows:
            z_0, y = next(batches)
            u, eps, p = draw(args.seed, run.step, rows, data.shape, run.device)
            s, t = time_shift(u, shift).sort(dim=1).values.unbind(1)
            s[1::4], s[2::4], s[3::4] = t[1::4], t[2::4], t[3::4]                 # three rows in four: s = t
            y = torch.where(p < args.label_dropout, student.num_classes, y)       # once, for all evaluations of the row
            h.require_backward_grad_sync = rows == run.rows[-1]                   # DDP: all-reduced with the last alone
            with run.autocast:
                loss, numbers = meanflow_loss(
                    lambda z, t, s, y: h(z, t, y, s), v, normalize(z_0, stats), eps, t, s, y, eta, args.derivative, args.delta_t,
                    args.loss_form, args.loss_power, args.loss_eps, rows=slice(None, None, 4),
                    h_fixed=lambda z, t, s, y: fixed(z, t, y, s), jvp=jvp)
            (loss / len(run.rows)).backward()
            losses.append(numbers)
        grad_norm = nn.utils.clip_grad_norm_(run.weights, args.clip)
        run.optimizer.param_groups[0]["lr"] = run.lr()
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=run.world == 1)                       # DDP's gradients are views of its buckets: kept
        with torch.no_grad():
            torch._foreach_lerp_(run.average, run.weights, 1 - args.ema)
        run.end_step(losses, grad_norm)


if __name__ == "__main__":
    command(main)
