"""Stage 1: the flow-matching teacher v(z_t, t, y), a DiT-DH on normalized latents.

Learns the velocity of the probability-flow ODE by regressing the one-point velocity along straight paths
z_t = (1 - t) z_0 + t eps:

    E || v(z_t, t, y) - (eps - z_0) ||^2,    t = shift(u), u ~ U(0, 1),  labels dropped with probability 0.1

    python train_teacher.py                           # one GPU (or CPU): data/latents -> runs/teacher
    torchrun --nproc_per_node=8 train_teacher.py      # eight GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train_teacher.py                              # on each of four nodes

The same command, repeated, goes on from the newest state in --out.
Defaults are those of RAE (arXiv 2510.11690) for ImageNet at 256 px.
"""
import copy
import math
import sys
import time

import torch
from torch import nn

from encode_latents import TrainingData
from model import (
    DIT_PRESETS, ArgumentParser, DiTDH, Log, add_run_flags, begin_run, check_fit, command,
    default_time_shift, digest_of, distribute, fraction, generators, launch, load_network, load_stats,
    location, micro_batches_of, normalize, not_negative, positive, save_state, say, states_of, stop_signals,
    time_shift, whole)


def flow_matching_loss(v, z_0, eps, t, y):
    """Flow matching (arXiv 2210.02747) on straight paths.

    v: (z, t, y) -> velocity; z_0, eps: (B, ...) data and noise; t: (B,) in [0, 1]; y: (B,) int labels,
    dropped already. Returns (the mean squared error per element, numbers for the log: the same as mse)."""
    t_ = t.reshape(-1, *[1] * (eps.ndim - 1))
    z_t = (1 - t_) * z_0 + t_ * eps
    loss = (v(z_t, t, y) - (eps - z_0)).square().mean()
    return loss, {"mse": loss.detach()}


def draw(seed, step, rows, shape, device):
    """What is random in rows [start, stop) of a step: u ~ U(0, 1) (B,), eps ~ N(0, I) (B, C, H, W), and the
    uniforms of label dropout (B,)."""
    blocks = []
    for g in generators(device, rows, seed, "teacher", step):
        on = dict(generator=g, device=device)
        blocks.append((torch.rand(4, **on), torch.randn(4, *shape, **on), torch.rand(4, **on)))
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
        help="latent statistics in place of those of --latents: a latent_stats.safetensors or a published "
             "stat.pt")
    data("--init", type=location,
        help="a teacher to start from, in place of random weights: a run, a published file or a Hub path; "
             "it gives the sizes, too")
    data("--new-classes", action="store_true",
        help="a new label table, for other classes than --init was trained on")
    data("--out", type=location, default="runs/teacher", help="folder for states and log")

    method("--preset", choices=DIT_PRESETS, default="DiTDH-XL", help="size of the network (paper)")
    method("--label-dropout", type=fraction, default=0.1, help="probability of 'no label' (RAE)")
    method("--time-shift", type=positive,
        help="a of shift(u) = a u / (1 + (a - 1) u) (default: sqrt(C H W / 4096), at least 1; RAE)")

    training("--steps", type=whole(), default=1_000_800, help="of the optimizer (800 epochs; RAE)")
    training("--batch-size", type=whole(4), default=1024, help="rows over all devices (RAE)")
    training("--lr", type=not_negative, default=2e-4,
        help="of AdamW, betas (0.9, 0.95), no weight decay (RAE)")
    training("--lr-final", type=not_negative, default=2e-5, help="at the last step, reached linearly (RAE)")
    training("--decay-from", type=fraction, default=0.05,
        help="part of the run where the decay begins (epoch 40 of 800; RAE)")
    training("--ema", type=fraction, default=0.9995, help="decay of the weights' average per step (RAE)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device, rank, world = launch()
    micro_batches = micro_batches_of(args, rank, world)
    torch.manual_seed(args.seed)

    # Data, and the network: of random weights, of --init, or of the state from which the run goes on
    data = TrainingData(args.latents, args.data_path)
    stats = load_stats(args.stats, data.shape) if args.stats else data.stats
    args.time_shift = args.time_shift or default_time_shift(data.shape)
    classes = len(data.classes)
    if states_of(args.out):
        net, _ = load_network(args.out, "teacher")
    elif args.init:
        net, _ = load_network(args.init, "teacher", classes if args.new_classes else None)
        check_fit(f"--init {args.init}", net, f"--latents {args.latents}", data.shape, classes)
    else:
        net = DiTDH(data.shape[1], data.shape[0], **DIT_PRESETS[args.preset], num_classes=classes)

    # The moving average (EMA) of its weights, which is what is sampled from, and the optimizer
    net.to(device).checkpoint_activations = args.checkpoint_activations
    average = copy.deepcopy(net).requires_grad_(False)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    weights, averages = ([x.get_parameter(name) for name in trained] for x in (net, average))
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    # The run: new, or gone on with
    about = {"kind": "teacher", "time_shift": args.time_shift, "classes": data.classes, "latents": data.about,
             "head_depth": net.depth[1], "stats": stats,
             "settings": {**vars(args), "sha256 of latents": data.sha256,
                          "sha256 of stats": digest_of(stats)}}
    first_step, seconds = begin_run(about, net, average, optimizer)

    # Compiled, and over all processes
    if args.compile:
        net.compile(dynamic=False)
    v = distribute(net, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")
    batches = data.batches(args, micro_batches, first_step, device)
    stats = {name: x.to(device) for name, x in stats.items()}          # here once, not in every step
    begin_decay, log = args.decay_from * args.steps, Log(args, first_step, seconds)

    with stop_signals() as stopped:
        for step in range(first_step, args.steps):
            for rows in micro_batches:
                # Draw
                z_0, y = next(batches)
                u, eps, p = draw(args.seed, step, rows, data.shape, device)
                t = time_shift(u, args.time_shift)
                y = torch.where(p < args.label_dropout, net.num_classes, y)

                # Loss and gradient, which DDP reduces over the processes with the last micro-batch alone
                v.require_backward_grad_sync = rows == micro_batches[-1]
                with autocast:
                    loss, numbers = flow_matching_loss(v, normalize(z_0, stats), eps, t, y)
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
                save_state(about, done, log.seconds, net, average, optimizer)
                log.since = time.perf_counter()                        # saving is not training time
            if stop:
                say(f"stopped after step {done}" + ": the same command goes on" * (args.save_every > 0))
                sys.exit(128 + stop)


if __name__ == "__main__":
    command(main)
