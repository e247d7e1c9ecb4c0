"""Stage 1: the flow-matching teacher v(z_t, t, y), a DiT-DH on normalized latents.

Learns the velocity of the probability-flow ODE by regressing the one-point velocity along straight paths
z_t = (1 - t) z_0 + t eps:

    E || v(z_t, t, y) - (eps - z_0) ||^2,    t = shift(u), u ~ U(0, 1),  labels dropped with probability 0.1

    python train_teacher.py                           # one GPU (or CPU): data/latents -> runs/teacher
    torchrun --nproc_per_node=8 train_teacher.py      # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_teacher.py                              # on each of four nodes
    python train_teacher.py --synthetic --steps 20    # does XL fit, how fast is it? (random data, no files)

Defaults are those of RAE (arXiv 2510.11690) for ImageNet at 256 px.
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
    command, default_time_shift, distribute, fraction, generators, is_first, launch, load_network,
    load_newest_state, load_stats, normalize, not_negative, positive, resumes, save_state, say, stop_signal,
    time_shift, unused_run_flags, whole)


def flow_matching_loss(v, z_0, eps, t, y):
    """Flow matching (arXiv 2210.02747) on straight paths.

    v: (z, t, y) -> velocity; z_0, eps: (B, ...) data and noise; t: (B,) in [0, 1]; y: (B,) int labels,
    dropped already. Returns (the mean squared error per element, numbers for the log: it, twice)."""
    t_ = t.reshape(-1, *[1] * (eps.ndim - 1))
    z_t = (1 - t_) * z_0 + t_ * eps
    loss = (v(z_t, t, y) - (eps - z_0)).square().mean()
    return loss, {"loss": loss.detach(), "mse": loss.detach()}


def draw(seed, step, rows, shape, device):
    """What is random in rows [start, stop) of a step: u ~ U(0, 1) (B,), eps ~ N(0, I) (B, C, H, W), and the
    uniforms of label dropout (B,)."""
    blocks = []
    for g in generators(device, rows, seed, "teacher", step):
        on = dict(generator=g, device=device)
        blocks.append((torch.rand(4, **on), torch.randn(4, *shape, **on), torch.rand(4, **on)))
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
        help="latent statistics in place of those of --latents: a latent_stats.safetensors or a published "
             "stat.pt")
    add("--init",
        help="a teacher to start from, in place of random weights: folder, published .pt or .safetensors "
             "file, or Hub path")
    add("--new-classes", action="store_true",
        help="a new label table, for other classes than --init was trained on")
    add("--out", default="runs/teacher", help="folder for the network, states and log")

    add = groups["method"].add_argument
    add("--preset", choices=DIT_PRESETS, help="size of the network (default: DiTDH-XL; paper)")
    add("--label-dropout", type=fraction, default=0.1, help="probability of 'no label' (RAE)")
    add("--time-shift", type=positive,
        help="a of shift(u) = a u / (1 + (a - 1) u) (default: sqrt(C H W / 4096), at least 1; RAE)")
    add("--time-draw", choices=("uniform", "logit-normal"), default="uniform",
        help="law of u, before the shift (RAE; logit-normal(0, 1): a later release of it)")

    add = groups["optimization"].add_argument
    add("--steps", type=whole(), default=1_000_800, help="of the optimizer (800 epochs of ImageNet; RAE)")
    add("--batch-size", type=whole(4), default=1024, help="rows over all devices (RAE)")
    add("--lr", type=not_negative, default=2e-4, help="of AdamW, betas (0.9, 0.95), no weight decay (RAE)")
    add("--lr-final", type=not_negative, default=2e-5, help="at the last step, reached linearly (RAE)")
    add("--decay-from", type=fraction, default=0.05,
        help="part of the run where the decay begins (epoch 40 of 800; RAE)")
    add("--ema", type=fraction, default=0.9995, help="decay of the weights' average per step (RAE)")

    args = parser.parse_args(argv)
    parser.settle(
        args,
        *unused_run_flags(args),
        ("--preset", not args.init, "DiTDH-XL", "with --init: the network has the size of its file"),
        ("--new-classes", args.init, False, "without --init"))
    return args


def load_inputs(args, data):
    """-> the network, trained from random weights or from --init, and its config. InputError where it does
    not fit."""
    shift = args.time_shift or default_time_shift(data.shape)
    config = {"kind": "teacher", "time_shift": shift, "classes": data.classes, "latents": data.about}
    if not args.init:
        sizes = dict(input_size=data.shape[1], in_channels=data.shape[0], num_classes=len(data.classes))
        network = {**sizes, **DIT_PRESETS[args.preset]}
        return DiTDH(**network), {**config, "network": network}
    if resumes(args):
        net, loaded, _ = load_network(args.out, "teacher", weights=False)
    elif args.new_classes:
        net, loaded, _ = load_network(args.init, "teacher", new="y_embedder.", num_classes=len(data.classes))
    else:
        net, loaded, _ = load_network(args.init, "teacher")
    if net.shape != data.shape or net.num_classes != len(data.classes):
        hint = ": --new-classes starts a new label table" if net.shape == data.shape else ""
        raise InputError(f"--init {args.init} is for latents {net.shape} of {net.num_classes} classes, "
                         f"--latents {args.latents} holds {data.shape} of {len(data.classes)}{hint}")
    return net, {**config, "network": loaded["network"]}


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch(args.precision)
    micro_batches = rows_of_process(args, rank, world)
    out = None if args.synthetic else Path(args.out)
    stopped = stop_signal()
    torch.manual_seed(args.seed)

    # Data, its statistics, the network
    data = TrainingData(args.latents, args.data_path, args.synthetic)
    stats = load_stats(args.stats, data.shape) if args.stats else data.stats
    net, config = load_inputs(args, data)
    run = begin_run(out, args, parse_args([]), stats, latents=data)
    stats = [x.to(device) for x in stats]         # here once, not in every step

    # The average of the weights, which is what is saved to sample from, and the optimizer
    net.to(device).checkpoint_activations = args.checkpoint_activations
    average = copy.deepcopy(net).requires_grad_(False)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    weights, averages = ([x.get_parameter(name) for name in trained] for x in (net, average))
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    whole_run = (net, average, optimizer, config, stats, args.keep, args.keep_every)
    first_step, seconds = load_newest_state(out, run, *whole_run)
    announce(net, args.data_path or args.latents, device, world, args, first_step)

    # Compiled, and over all processes
    if args.compile:
        net.compile(dynamic=False)
    v = distribute(net, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    batches = data.batches(args.seed, args.batch_size, micro_batches, first_step, args.steps, device,
                           args.workers)

    numbers, clock = [], {"step": first_step, "since": time.perf_counter(), "seconds": seconds}
    for step in range(first_step, args.steps):
        for rows in micro_batches:
            # Draw
            z_0, y = next(batches)
            u, eps, p = draw(args.seed, step, rows, data.shape, device)
            if args.time_draw == "logit-normal":
                u = torch.special.ndtri(u).sigmoid()          # the uniform's normal quantile, then sigmoid
            t = time_shift(u, config["time_shift"])
            y = torch.where(p < args.label_dropout, net.num_classes, y)

            # Loss and gradient, which DDP reduces over the processes with the last micro-batch alone
            v.require_backward_grad_sync = rows == micro_batches[-1]
            with autocast:
                loss, of_loss = flow_matching_loss(v, normalize(z_0, stats), eps, t, y)
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
