"""Stage 1: the flow-matching teacher v(z_t, t, y), a DiT-DH on normalized latents.

Learns the velocity of the probability-flow ODE by regressing the one-point velocity along straight paths z_t = (1 - t) z_0 + t eps:

    E || v(z_t, t, y) - (eps - z_0) ||^2,    t = shift(u), u ~ U(0, 1),  labels dropped with probability 0.1

    python train_teacher.py                                    # one GPU (or CPU): reads data/latents, writes runs/teacher
    torchrun --nproc_per_node=8 train_teacher.py               # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train_teacher.py     # on each of four nodes
    python train_teacher.py --synthetic --steps 20             # does XL fit, how fast is it? (random data, no files)

Defaults are those of RAE (arXiv 2510.11690) for ImageNet at 256 px.
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

from model import (DIT_PRESETS, DiTDH, InputError, command, default_time_shift, generators, load_network, load_stats, normalize,
                   processes, provenance, read_json, read_tensors, save_network, time_shift, write_atomically, write_json, write_tensors)


def flow_matching_loss(v, z_0, eps, t, y):
    """Flow matching (arXiv 2210.02747) on straight paths.

    v: (z, t, y) -> velocity; z_0, eps: (B, C, H, W) data and noise; t: (B,) in [0, 1]; y: (B,) int labels, already dropped where
    they are to be. Returns (the mean squared error per element, {"loss", "mse"}: both the same here)."""
    t_ = t[:, None, None, None]
    z_t = (1 - t_) * z_0 + t_ * eps
    loss = (v(z_t, t, y) - (eps - z_0)).square().mean()
    return loss, {"loss": loss.detach(), "mse": loss.detach()}


def draw(seed, step, rows, shape, device):
    """What is random in rows [start, stop) of a step: u ~ U(0, 1) (B,), eps ~ N(0, I) (B, C, H, W), dropout's uniforms (B,)."""
    blocks = [(torch.rand(4, generator=g, device=device), torch.randn(4, *shape, generator=g, device=device),
               torch.rand(4, generator=g, device=device)) for g in generators(device, rows, seed, "teacher", step)]
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
    add("--data-path", help="images (folder of class folders, or .zip), encoded on the fly with random flips as --latents describes, "
        "whose statistics are used too; its shards are not needed (default: none, read the shards)")
    add("--stats", help="latent statistics in place of those of --latents: a latent_stats.safetensors or a published stat.pt")
    add("--init", help="a teacher to start from, in place of random weights of --preset: folder, published .pt or .safetensors file, "
        "or Hub path")
    add("--new-classes", action="store_true", help="with --init: a new label table, for other classes than it was trained on")
    add("--out", default="runs/teacher", help="folder for the network, states and log (default %(default)s)")
    add("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="size of the network (default %(default)s: paper)")
    add("--steps", type=int, default=1_000_800, help="of the optimizer (default %(default)s: 800 epochs of ImageNet, RAE)")
    add("--batch-size", type=int, default=1024, help="over all devices (default %(default)s: RAE)")
    add("--lr", type=float, default=2e-4, help="learning rate of AdamW, betas (0.9, 0.95), no weight decay (default %(default)s: RAE)")
    add("--lr-final", type=float, default=2e-5, help="learning rate at the last step, reached linearly (default %(default)s: RAE)")
    add("--decay-from", type=float, default=0.05, help="part of the run where the decay begins (default %(default)s: epoch 40 of 800)")
    add("--ema", type=float, default=0.9995, help="decay of the weights' average per step (default %(default)s: RAE)")
    add("--label-dropout", type=float, default=0.1, help="probability of 'no label' (default %(default)s: RAE)")
    add("--time-shift", type=float, help="a of shift(u) = a u / (1 + (a - 1) u) (default: sqrt(C H W / 4096), at least 1; RAE)")
    add("--time-draw", choices=("uniform", "logit-normal"), default="uniform", help="law of u, before the shift (default %(default)s: RAE; "
        "logit-normal(0, 1): a later release of it)")
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
    from encode_latents import TrainingData  # the only other file this stage needs
    data = TrainingData(args.latents, args.data_path, args.synthetic)
    stats = load_stats(args.stats, data.shape) if args.stats else data.stats
    stats = [x.to(run.device) for x in stats]                                     # here once, not in every step
    shift = args.time_shift or default_time_shift(data.shape)
    if args.init:
        new = dict(new="y_embedder.", num_classes=len(data.classes)) if args.new_classes else {}
        net, loaded, _ = load_network(args.init, "teacher", **new)
        if net.shape != data.shape or net.num_classes != len(data.classes):
            raise InputError(f"--init {args.init} is for latents {net.shape} of {net.num_classes} classes, --latents {args.latents} "
                             f"holds {data.shape} of {len(data.classes)}"
                             + ": --new-classes starts a new label table" * (net.shape == data.shape))
        network = loaded["network"]
    else:
        network = dict(input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes), **DIT_PRESETS[args.preset])
        net = DiTDH(**network)
    config = {"kind": "teacher", "network": network, "time_shift": shift, "classes": data.classes, "latents": data.about}
    v = run.adopt(net, config, stats)
    batches = data.batches(args.seed, args.batch_size, run.rows, run.step, args.steps, run.device, args.workers)

    while run.step < args.steps:
        losses = []
        for rows in run.rows:
            z_0, y = next(batches)
            u, eps, p = draw(args.seed, run.step, rows, data.shape, run.device)
            if args.time_draw == "logit-normal":
                u = torch.special.ndtri(u).sigmoid()                              # the uniform's normal quantile, then sigmoid
            t = time_shift(u, shift)
            y = torch.where(p < args.label_dropout, network["num_classes"], y)
            v.require_backward_grad_sync = rows == run.rows[-1]                   # DDP: all-reduced with the last alone
            with run.autocast:
                loss, numbers = flow_matching_loss(v, normalize(z_0, stats), eps, t, y)
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
