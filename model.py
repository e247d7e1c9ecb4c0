"""The networks and the mathematics of MF-RAE; below the ruler: processes, flags, files.

    DiTDH        the backbone: a flow-matching teacher v(z, t, y), or a few-step student h(z, t, y, s)
    ViTDecoder   latents -> images
    time_shift, ode_times, solve_ode, long_jumps, guided     time, the PF-ODE, the student's jumps

Time t runs from 0 (data) to 1 (noise): z_t = (1 - t) z_0 + t eps.
A teacher predicts the velocity v = E[eps - z_0 | z_t].
A student predicts the mean velocity h over [s, t], s <= t.
Sources: MeanFlow (arXiv 2505.13447), MF-RAE (arXiv 2511.13019).
The backbone and the decoder are those of RAE (arXiv 2510.11690).

Parameters have the names of the published checkpoints. Three of them mislead:
`s_embedder` and `s_projector` belong to the encoder tower, not to the time s;
`r_embedder` embeds the time DIFFERENCE t - s (the published code calls our s "r").
"""
import argparse
import errno
import fnmatch
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
# Now, not by DDP: later, its defaults would hold the group for ever.
import torch.distributed.nn.functional  # noqa: F401
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- Presets: (encoder tower, head); -mini: the sanity run's -
DIT_PRESETS = {
    "DiTDH-XL": dict(hidden_size=(1152, 2048), depth=(28, 2), num_heads=(16, 16)),
    "DiTDH-B": dict(hidden_size=(768, 2048), depth=(12, 2), num_heads=(12, 16)),
    "DiTDH-S": dict(hidden_size=(384, 2048), depth=(12, 2), num_heads=(6, 16)),
    "DiTDH-mini": dict(hidden_size=(96, 160), depth=(4, 1), num_heads=(3, 5)),
}
DECODER_PRESETS = {
    "ViT-XL": dict(hidden_size=1152, depth=28, num_heads=16, mlp_size=4096),
    "ViT-L": dict(hidden_size=1024, depth=24, num_heads=16, mlp_size=4096),
    "ViT-B": dict(hidden_size=768, depth=12, num_heads=12, mlp_size=3072),
    "ViT-mini": dict(hidden_size=192, depth=2, num_heads=4, mlp_size=768),
}
# ImageNet's, as DINOv2 takes them
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- Fixed tables: positions ---------------------------------
class Rotary(nn.Module):
    """2-D rotary embedding.

    The first half of a head's channels turns by the token's ROW, the second by its COLUMN,
    in interleaved pairs (x0, x1) -> x cos + (-x1, x0) sin, frequencies 10000^(-2k / half)."""

    def __init__(self, head_width, grid):
        super().__init__()
        half = head_width // 2
        w = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
        p = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None]
        line = (p * w).repeat_interleave(2, dim=1)
        row, column = line.repeat_interleave(grid, 0), line.repeat(grid, 1)
        angle = torch.cat([row, column], dim=1)
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):
        """x: (B, heads, N, head_width), queries or keys."""
        x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-x1, x0], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).type_as(x)


def sincos_positions(width, grid):
    """(grid * grid, width), row-major over the grid.

    The first half of the channels encodes the COLUMN, the second the ROW.
    Each half is [sin(p w), cos(p w)], w_k = 10000^(-k / (width / 4)), p = 0 .. grid - 1."""
    w = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    p = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * w
    line = torch.cat([p.sin(), p.cos()], dim=1)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    return torch.cat([column, row], dim=1).float()


# ---- DiT-DH --------------------------------------------------
class FourierEmbedding(nn.Module):
    """(B,) -> (B, d): [sin(2 pi W x), cos(2 pi W x)] with frozen W ~ N(0, 1), then a two-layer MLP."""

    def __init__(self, width, frequencies=256):
        super().__init__()
        self.W = nn.Parameter(torch.randn(frequencies), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x):
        angle = 2 * math.pi * x[:, None] * self.W
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=-1))


class LabelEmbedding(nn.Module):
    def __init__(self, num_classes, width):
        super().__init__()
        # The last row is "no label".
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class TokenEmbedding(nn.Module):
    """A 1x1 convolution, (B, C, G, G) -> (B, N, d).

    As a matrix product: cuDNN's convolutions would use TF32."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, z):
        return F.linear(z.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)


def plain_attention(q, k, v):
    """Attention written out: the fused kernels have no forward-mode derivative."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).type_as(v) @ v


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rotary, attention):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        # each (B, heads, N, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = attention(rotary(q), rotary(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class RMSNorm(nn.RMSNorm):
    """Fused, except under torch.compile, which fuses the formula as well.

    It cannot trace the fused operator's forward-mode derivative on a GPU (torch 2.11)."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        inverse = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * inverse * self.weight


def modulation(width, parts):
    """condition -> `parts` shifts, scales and gates.

    Zero at the start, so that a block is the identity (AdaLN-Zero, DiT)."""
    layer = nn.Linear(width, parts * width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = RMSNorm(width, eps=1e-6)
        self.norm2 = RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, condition, rotary, attention=F.scaled_dot_product_attention):
        """x: (B, N, d); condition: (B, 1, d), or (B, N, d) when each token has its own."""
        parts = self.adaLN_modulation(condition).chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rotary, attention)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.norm_final = RMSNorm(width, eps=1e-6)
        self.adaLN_modulation = modulation(width, 2)
        self.linear = nn.Linear(width, channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x, condition):
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


# ---- The exact derivative along a direction, part by part ----
class Pair(NamedTuple):
    """A value and its derivative along a direction."""

    value: torch.Tensor
    tangent: torch.Tensor


def apply_part(part, *inputs):
    """part(*inputs). Where inputs are pairs, so is the output: forward-mode differentiation."""
    places = [i for i, x in enumerate(inputs) if isinstance(x, Pair)]
    if not places:
        return part(*inputs)

    def of_values(*values):
        given = list(inputs)
        for i, value in zip(places, values, strict=True):
            given[i] = value
        return part(*given)
    values, tangents = zip(*(inputs[i] for i in places), strict=True)
    return Pair(*torch.func.jvp(of_values, values, tangents))


def pairwise_jvp(function, values, tangents):
    """torch.func.jvp of a function that hands its arguments to a DiTDH and returns its answer.

    Part by part, so that torch.compile serves all blocks of a tower with one graph."""
    def plain(x):
        # A compiled part wants a value and its tangent to lie alike in memory: no views.
        return x.clone(memory_format=torch.contiguous_format)
    return function(*(Pair(plain(x), plain(dx)) for x, dx in zip(values, tangents, strict=True)))


class DiTDH(nn.Module):
    """DiT with a wide diffusion head over G x G latent tokens (RAE, section 5; DDT, arXiv 2504.05741).

    The encoder tower sees time and label and makes one condition per token.
    The shallow, wide head sees the noisy latent again, conditioned by these.
    hidden_size, depth, num_heads: pairs (encoder tower, head).
    time_difference: False, a teacher v(z, t, y); True, a student h(z, t, y, s),
    which starts as exactly the teacher whose weights it is given."""

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 time_difference=False):
        super().__init__()
        width, head_width = hidden_size
        self.depth = tuple(depth)
        self.num_classes, self.shape = num_classes, (in_channels, input_size, input_size)
        self.checkpoint_activations, self.apply_part = False, apply_part
        self.pos_embed = nn.Parameter(sincos_positions(width, input_size)[None], requires_grad=False)
        self.s_embedder = TokenEmbedding(in_channels, width)
        self.x_embedder = TokenEmbedding(in_channels, head_width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = FourierEmbedding(width)
        self.r_embedder = FourierEmbedding(width) if time_difference else None
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.enc_feat_rope = Rotary(width // num_heads[0], input_size)
        self.dec_feat_rope = Rotary(head_width // num_heads[1], input_size)
        towers = [(width, num_heads[0])] * depth[0] + [(head_width, num_heads[1])] * depth[1]
        self.blocks = nn.ModuleList([Block(*tower) for tower in towers])
        self.final_layer = FinalLayer(head_width, in_channels)
        for embedder in (self.s_embedder, self.x_embedder):
            weight = embedder.proj.weight
            nn.init.xavier_uniform_(weight.view(len(weight), -1))
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if time_difference:
            # At first h(z, t, y, s) = v(z, t, y) of the teacher, for every s.
            nn.init.zeros_(self.r_embedder.mlp[2].weight)
            nn.init.zeros_(self.r_embedder.mlp[2].bias)

    def forward(self, z, t, y, s=None):
        """z: (B, C, G, G) normalized latents; t, s: (B,) in [0, 1], s <= t;
        y: (B,) int, num_classes: "no label".

        Returns (B, C, G, G): the velocity (teacher) or the mean velocity over [s, t] (student).
        Given pairs z and t, as by pairwise_jvp, a pair: `run` applies each part to values or to pairs.
        ValueError: a student without s, a teacher with it, arguments in another order."""
        wrong_s = (s is None) != (self.r_embedder is None)
        if wrong_s or y.is_floating_point() or not (s is None or s.is_floating_point()):
            raise ValueError("a teacher takes (z, t, y), a student (z, t, y, s): "
                             "times are floating, labels integers")
        attention = plain_attention if isinstance(z, Pair) else F.scaled_dot_product_attention
        e_t = self.run(self.embed_times, t, s)
        c = self.run(lambda e_t, y: F.silu(e_t + self.y_embedder(y))[:, None], e_t, y)
        x = self.run(lambda z: self.s_embedder(z) + self.pos_embed, z)
        for block in self.blocks[:self.depth[0]]:
            x = self.run(block, x, c, self.enc_feat_rope, attention)
        q = self.run(lambda e_t, x: self.s_projector(F.silu(e_t[:, None] + x)), e_t, x)
        # Under autocast too, the residual stream stays in float32.
        x = self.run(lambda z: self.x_embedder(z).to(self.pos_embed.dtype), z)
        for block in self.blocks[self.depth[0]:]:
            x = self.run(block, x, q, self.dec_feat_rope, attention)
        x = self.run(self.final_layer, x, q)
        return self.run(lambda x: x.transpose(1, 2).unflatten(2, self.shape[1:]), x)

    def embed_times(self, t, s):
        return self.t_embedder(t) if s is None else self.t_embedder(t) + self.r_embedder(t - s)

    def run(self, part, *inputs):
        """Apply a part of the network, to values or to pairs; only modules are worth compiling."""
        apply = self.apply_part if isinstance(part, nn.Module) else apply_part
        if self.checkpoint_activations and torch.is_grad_enabled() and isinstance(part, Block):
            return checkpoint(apply, part, *inputs, use_reentrant=False)
        return apply(part, *inputs)

    def compile(self, **options):
        """Compile blocks and last layer: a tower's blocks share a graph, one for values, one for pairs."""
        # A graph for each number of rows, with gradient and without; beyond the limit is an error.
        torch._dynamo.config.recompile_limit = 64
        self.apply_part = torch.compile(apply_part, fullgraph=True, **options)


# ---- ViT decoder (MAE style): latents -> images --------------
class DecoderLayer(nn.Module):
    """A pre-norm ViT block; names as in the published files (Hugging Face ViTMAE)."""

    def __init__(self, width, heads, mlp_size):
        super().__init__()
        self.heads = heads
        projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict(projections),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_size, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        u = self.layernorm_before(x)
        q, k, v = (layer(u).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in self.attention["attention"].values())
        u = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](u)
        u = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](u)


class ViTDecoder(nn.Module):
    """(B, C, G, G) de-normalized latents -> (B, 3, G * patch, G * patch) images.

    Images are nominally in [0, 1], not clipped."""

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, mlp_size, patch_size=16):
        super().__init__()
        self.patch_size, self.shape = patch_size, (in_channels, input_size, input_size)
        self.decoder_embed = nn.Linear(in_channels, hidden_size)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        cls = torch.zeros(1, hidden_size, device="cpu")
        positions = torch.cat([cls, sincos_positions(hidden_size, input_size)])
        self.decoder_pos_embed = nn.Parameter(positions[None], requires_grad=False)
        layers = [DecoderLayer(hidden_size, num_heads, mlp_size) for _ in range(depth)]
        self.decoder_layers = nn.ModuleList(layers)
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden_size, 3 * patch_size ** 2)

    def forward(self, z):
        x = self.decoder_embed(z.flatten(2).transpose(1, 2))
        cls = self.trainable_cls_token.expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        p, grid = self.patch_size, self.shape[1]
        # (B, row, column, p, p, colour)
        x = x.unflatten(2, (p, p, 3)).unflatten(1, (grid, grid))
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()
        mean, std = x.new_tensor(IMAGE_MEAN), x.new_tensor(IMAGE_STD)
        return x * std[:, None, None] + mean[:, None, None]


# ---- Time, the PF-ODE and its long jumps ---------------------
def default_time_shift(shape):
    """a = max(1, sqrt(C H W / 4096)) for a latent of shape (C, H, W) (RAE).

    6.93 at 768x16x16, 13.86 at 768x32x32."""
    return max(1.0, math.sqrt(math.prod(shape) / 4096))


def time_shift(u, a):
    """shift(u) = a u / (1 + (a - 1) u): [0, 1] -> [0, 1], a number or a tensor.

    Towards 1 (noise) for a > 1."""
    return a * u / (1 + (a - 1) * u)


def ode_times(steps, a):
    """The PF-ODE grid t_i = shift(1 - i / steps), i = 0 .. steps.

    Floats, from exactly 1 down to exactly 0."""
    return [time_shift(1 - i / steps, a) for i in range(steps)] + [0.0]


def solve_ode(v, z, y, times, solver="euler"):
    """Follow dz/dt = v(z, t, y) from `z` at times[0]; returns the len(times) points, `z` first.

    v: (B, ...), (B,), (B,) -> (B, ...); times: floats.
    solver: "euler", one evaluation of v a step, or "heun", two."""
    points = [z]
    for t, s in zip(times[:-1], times[1:], strict=True):
        v_t = v(z, z.new_full((len(z),), t), y).to(z)
        z_s = z - (t - s) * v_t
        if solver == "heun":
            v_s = v(z_s, z.new_full((len(z),), s), y).to(z)
            z_s = z - (t - s) / 2 * (v_t + v_s)
        z = z_s
        points.append(z)
    return points


def long_jumps(h, z, y, times):
    """Few-step sampling: z_s = z_t - (t - s) h(z_t, t, y, s) along `times` (MeanFlow, eq. 12).

    h: (B, ...), (B,), (B,), (B,) -> (B, ...).
    Published few-step times are NOT shifted: [1, 0] or [1, 0.5, 0]."""
    for t, s in zip(times[:-1], times[1:], strict=True):
        velocity = h(z, z.new_full((len(z),), t), y, z.new_full((len(z),), s))
        z = z - (t - s) * velocity.to(z)
    return z


def guided(teacher, scale=1.0, interval=(0.0, 1.0), weak=None):
    """A function (z, t, y): v_weak + scale (v - v_weak) for t in `interval`, v elsewhere.

    v_weak: the weaker teacher `weak` (autoguidance, arXiv 2406.02507),
    or the teacher without label (CFG, 2207.12598). Intervals: arXiv 2404.07724.
    CFG does not change a row that has no label.
    Costs two evaluations; scale 1 returns the teacher.
    InputError: an empty interval, a weak teacher of other latents or classes."""
    if scale == 1:
        if weak:
            raise InputError("a weak teacher does nothing without --guidance W, W other than 1")
        return teacher
    if interval[0] > interval[1]:
        raise InputError(f"--guidance-interval {interval[0]} {interval[1]}: the lower time comes first")
    if weak and (weak.shape != teacher.shape or weak.num_classes != teacher.num_classes):
        raise InputError(
            f"the weak teacher has latents {weak.shape} and {weak.num_classes} classes, the teacher "
            f"{teacher.shape} and {teacher.num_classes}")

    if not weak and getattr(teacher, "label_dropout", None) == 0:
        say("warning: the teacher was trained with --label-dropout 0: its answer without a label, which "
            "--guidance needs, was never trained")

    def velocity(z, t, y):
        if weak:
            v, v_weak = teacher(z, t, y), weak(z, t, y)
        else:
            unlabelled = torch.full_like(y, teacher.num_classes)
            both = teacher(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, unlabelled]))
            v, v_weak = both.chunk(2)
        w = torch.where((interval[0] <= t) & (t <= interval[1]), scale, 1.0)
        return v_weak + w.reshape(-1, *[1] * (z.ndim - 1)) * (v - v_weak)
    return velocity


# ---- Latent statistics: (mean, var), (C, H, W), float64 ------
def normalize(z, stats):
    """Raw latents (B, C, H, W) -> the backbone's: (z - mean) / sqrt(var + 1e-5), float32."""
    mean, var = (x.to(z.device) for x in stats)
    return (z.float() - mean.float()) / (var + 1e-5).sqrt().float()


def denormalize(z, stats):
    """The inverse of `normalize`: what the decoder takes."""
    mean, var = (x.to(z.device) for x in stats)
    return z.float() * (var + 1e-5).sqrt().float() + mean.float()


# ==============================================================
# The method ends here. Below: processes, flags and files.
# ==============================================================
class InputError(Exception):
    """What the user gave is wrong. One line says what is wrong, and what to do."""


# ---- Randomness that follows from a key ----------------------
def generator(device, *key):
    """A torch.Generator on `device` that follows from `key` (numbers, strings) alone.

    Related keys, such as neighbouring steps, give unrelated streams."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def generators(device, rows, *key):
    """One for each block of four rows of a global batch, from rows[0] to rows[1].

    The numbers do not depend on the split into processes and micro-batches,
    if these hold multiples of four rows."""
    return [generator(device, *key, block) for block in range(rows[0] // 4, rows[1] // 4)]


# ---- Processes -----------------------------------------------
def command(main):
    """Run a script's `main`; what the user can mend: one line on stderr, exit status 2."""
    status = 0
    script = Path(sys.argv[0]).name
    try:
        main()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        say(f"{script}: interrupted: the same command goes on, or starts over, from what is whole",
            sys.stderr)
        os._exit(130)
    except (InputError, RuntimeError) as error:
        text = str(error).partition("\n")[0]
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{text} Smaller --micro-batch or --batch-size, or --checkpoint-activations"
        elif text.startswith("DataLoader worker"):
            error = f"{text}, perhaps for want of memory: go on with fewer --workers"
        elif not isinstance(error, InputError):
            raise
        say(f"{script}: error: {error}", sys.stderr)
        # Not sys.exit: it waits for processes that may never come.
        os._exit(2)
    if dist.is_initialized():
        # Here no frame holds the network. Later, a Gloo thread may abort.
        dist.destroy_process_group()
    sys.exit(status)


def say(text, stream=None):
    """Print a line at once. A pipe or terminal that is gone ends no run."""
    name = "stderr" if stream is not None and stream is sys.stderr else "stdout"
    try:
        # A file's name may hold what the terminal cannot show.
        encoding = getattr(sys, name).encoding or "utf-8"
        text = str(text).encode(encoding, "backslashreplace").decode(encoding)
        print(text, file=getattr(sys, name), flush=True)
    except (OSError, ValueError, AttributeError):
        setattr(sys, name, open(os.devnull, "w"))


def launch(precision="fp32", hours=0.5):
    """Join torchrun's processes, if any. Returns (device, rank, number of processes).

    hours: how long a process waits for another one.
    InputError: no GPU for this process, one without bf16, tasks of srun unknown to one another."""
    variables = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    rank, local, world = (int(os.environ.get(name, default)) for name, default in variables)
    if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise InputError(
            "srun started several tasks that would all do the same work: "
            "srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc_per_node=GPUS "
            f"--rdzv_backend=c10d --rdzv_endpoint=HOST:29500 {Path(sys.argv[0]).name} ...")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU of its own: "
                             f"torchrun --nproc_per_node={torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise InputError("this GPU has no bf16: --precision fp32")
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=hours))
    return device, rank, world


def is_first():
    """Whether this process writes, prints and checks for all (rank 0)."""
    return int(os.environ.get("RANK", 0)) == 0


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """Over all processes, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def barrier():
    """Wait until every process is here."""
    all_reduce(torch.zeros(()))


def stop_signal():
    """Catch what asks a run to end: SIGTERM, SIGINT, SIGHUP, SIGUSR1.

    A second one, from 3 seconds on, ends it at once.
    Returns a function that all processes call after each step: the signal any has got, or 0."""
    got = []

    def on_signal(number, frame):
        if not got:
            got.extend((number, time.monotonic()))
            if is_first():
                say("will save and stop after this step (once more, from 3 seconds on: stop at once)",
                    sys.stderr)
        # torchrun and a scheduler may both send the first
        elif time.monotonic() > got[1] + 3:
            os._exit(128 + number)

    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name)
        # nohup stays nohup
        if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
    return lambda: int(all_reduce(torch.tensor(got[0] if got else 0), dist.ReduceOp.MAX))


def distribute(net, device):
    """`net`, under DistributedDataParallel where there are several processes."""
    if not dist.is_initialized():
        return net
    devices = [device] if device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(
        net, device_ids=devices, gradient_as_bucket_view=True)
    # tables that never change
    parallel.broadcast_buffers = False
    return parallel


def provenance():
    """What it takes to make a result again: command, versions, commit if any, host, device, date."""
    import platform
    import shlex
    import subprocess
    from datetime import datetime, timezone
    try:
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:                               # no git here
        commit = ""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else platform.machine() + " CPU"
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or None,
        "host": platform.node(),
        "device": device,
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


# ---- Flags ---------------------------------------------------
class ArgumentParser(argparse.ArgumentParser):
    """argparse: defaults in the help, no abbreviations, a mistake in one line (exit status 2)."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):
            hidden = action.default in (None, False)
            return action.help if hidden else super()._get_help_string(action)

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=self.Formatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")

    def settle(self, args, *rows):
        """Fill in defaults, refuse what would do nothing. rows: (flag, is it used, default, "why not")."""
        for flag, used, default, why in rows:
            name = flag.lstrip("-").replace("-", "_")
            value = getattr(args, name)
            if value is None or value is False:
                setattr(args, name, default)
            elif not used:
                self.error(f"{flag} does nothing {why}: leave it out")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float from `low` (above: beyond it) to `high`."""
    words = f"{'above' if above else 'at least'} {low}"
    if high < math.inf:
        words += f" and at most {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        in_range = (low < value if above else low <= value) and value <= high
        if not in_range or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number {words}")
        return value
    return parse


def whole(least=1):
    return number(int, least, 2 ** 63 - 1)


positive = number(float, 0, above=True)
fraction = number(float, 0, 1)
not_negative = number(float, 0)

# What --resume may change.
FREE = {"steps", "lr", "lr_final", "clip", "precision", "micro_batch", "compile",
        "checkpoint_activations", "workers", "log_every", "save_every", "keep", "keep_every", "resume"}
# Paths: a run is known by what lies there, not by where it lies.
PATHS = {"out", "latents", "data_path", "teacher", "weak_teacher", "init", "stats"}


def add_run_flags(parser):
    """Add the flags that all three stages share. Returns the help's groups, by title."""
    titles = ("data", "method", "optimization", "machine", "files")
    groups = {name: parser.add_argument_group(name) for name in titles}
    add = groups["optimization"].add_argument
    add("--clip", type=not_negative, default=1.0, help="largest norm of the gradient; 0: no clipping (paper)")
    add("--seed", type=whole(0), default=0, help="of everything random")
    add = groups["machine"].add_argument
    default = "bf16" if torch.cuda.is_available() else "fp32"
    add("--precision", choices=("fp32", "bf16"), default=default,
        help="bf16: autocast, weights stay float32; bf16 on a GPU, fp32 on a CPU")
    add("--micro-batch", type=whole(4), metavar="ROWS",
        help="rows per device and backward pass, a multiple of 4; gradients accumulate "
        "(default: a device's share in equal parts of at most 64, which XL needs on 80 GB)")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--checkpoint-activations", action="store_true",
        help="recompute blocks in the backward pass: less memory, one more forward pass")
    add("--synthetic", type=int, nargs="?", const=256, choices=(256, 512), metavar="PX",
        help="random data and networks at the real shapes for 256 (or 512) px: "
        "does it fit, how fast is it? Reads and writes no files")
    add = groups["files"].add_argument
    add("--log-every", type=whole(), default=50, metavar="STEPS", help="steps between lines of log.jsonl")
    add("--save-every", type=whole(), default=5000, metavar="STEPS", help="steps between states")
    add("--keep", type=whole(), default=2, metavar="STATES", help="newest states kept")
    add("--keep-every", type=whole(), metavar="STEPS",
        help="keep the states at multiples of this for good, a multiple of --save-every (default: none)")
    add("--resume", action="store_true", help="go on from the newest whole state in --out, if there is one")
    return groups


def unused_run_flags(args):
    """Rows for ArgumentParser.settle: flags of add_run_flags, and of inputs, that would do nothing."""
    files = "with --synthetic, which reads and writes no files"
    rows = [(flag, not args.synthetic, None, files) for flag in ("--resume", "--stats", "--data-path")
            if hasattr(args, flag[2:].replace("-", "_"))]
    return [("--keep-every", (args.keep_every or 0) >= args.save_every, None, "below --save-every"), *rows]


# ---- Whole files: whole or absent, damage is found -----------
def write_atomically(path, write):
    """`write(temporary path)`, fsync, rename: `path` holds the old contents or the new, never half."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.umask(mask := os.umask(0))
        # safetensors' own mode shuts other users out.
        os.chmod(beside, 0o666 & ~mask)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        # the rename itself
        os.fsync(folder)
        os.close(folder)
    except Exception as error:
        try:
            beside.unlink(missing_ok=True)
        except OSError:                           # a read-only disk, or a file in the folder's place
            pass
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            hint = "look at the folder and its free space"
            if full or "No space left" in str(error):
                hint = "make space, then go on as after an interruption"
            raise InputError(f"cannot write {path} ({error}): {hint}") from error
        raise


def hold(path, *names):
    """Lock `path`, a hidden file beside what is written, until the process ends.

    Then remove what a killed process left half-written of the files `names` (patterns).
    InputError: another process holds it."""
    import fcntl
    import platform
    path = Path(path)
    what = path.parent if path.name == ".lock" else path.with_name(path.name[1:].removesuffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b", buffering=0)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent} ({error}): give another --out") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise InputError(f"{what} is being written by another process ({file.read().decode().strip()}): "
                             "wait for it or end it, or give another --out") from error
        say(f"warning: no locks on this disk ({error}): start nothing twice for {what}", sys.stderr)
    else:
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        except OSError:                           # a full disk: locked all the same
            pass
    # Closing it, or any other open file of this name in this process, gives the lock away.
    HELD.append(file)
    for left in path.parent.glob(".*.tmp"):
        name = re.fullmatch(r"\.(.+)\.\d+\.tmp", left.name)
        if name and any(fnmatch.fnmatchcase(name[1], pattern) for pattern in names):
            try:
                left.unlink(missing_ok=True)
            except OSError as error:
                say(f"warning: {left} cannot be removed ({error.strerror})", sys.stderr)


HELD = []


def refuse_other(where, before, settings):
    """InputError, naming what differs, unless `before`, the settings of `where`, are these."""
    other = [f"{name}: {before.get(name)} there, {value} now" for name, value in settings.items()
             if before.get(name) != value]
    if other:
        raise InputError(f"{where} holds other work ({'; '.join(other)}): give another --out, or remove it")


def write_json(path, content, digest=True):
    """A dict as JSON, atomically; digest: with the digest of its text as the last entry.

    Without, for what people or other programs write."""
    if digest:
        text = json.dumps(content, indent=1)
        content = {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path, digest=True):
    """The dict of `write_json`, or of another's file.

    InputError: missing, no dict, or (digest) not what was written."""
    try:
        content = json.loads(Path(path).read_text())
        found = content.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"cannot read {path} ({error}): it is missing, cut short or no JSON object") from error
    if digest and found:
        text = json.dumps(content, indent=1)
        if found != hashlib.sha256(text.encode()).hexdigest():
            raise InputError(f"{path} has changed since it was written: restore it, "
                             "or remove its entry sha256 if that is meant")
    return content


def digest_of(tensors, metadata=None):
    """sha256 over names, types, shapes, contents and the header's other entries."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() if metadata else b"")
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_text(*parts):
    """sha256 of what JSON can hold, whatever the order of its dicts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_tensors(path, tensors, metadata=None):
    """Write a safetensors file, atomically, its digest in the header; returns the digest."""
    from safetensors.torch import save_file
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    digest = digest_of(tensors, metadata)
    header = {**(metadata or {}), "sha256": digest}
    write_atomically(path, lambda beside: save_file(tensors, beside, header))
    return digest


def read_tensors(path, check=True):
    """-> (tensors on the CPU, the header's entries).

    InputError: missing, cut, or not what its own digest says. Files of others have no digest.
    check=False: without reading the contents; the tensors are maps of the file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot read {path} ({error}): it is missing, cut short or no safetensors file") from error
    others = {name: value for name, value in header.items() if name != "sha256"}
    if check and "sha256" in header and digest_of(tensors, others) != header["sha256"]:
        raise InputError(
            f"{path} is damaged: its contents are not those that were written; restore or remake it")
    return tensors, header


# ---- Networks in files ---------------------------------------
def save_network(folder, state, config, stats):
    """A folder to sample from: latent_stats.safetensors, config.json, model.safetensors (last).

    config: {"kind": "teacher" | "student" | "decoder", "network": the constructor's arguments, ...},
    which may be edited by hand; stats: (mean, var)."""
    folder = Path(folder)
    write_tensors(folder / "latent_stats.safetensors", {"mean": stats[0], "var": stats[1]})
    write_json(folder / "config.json", config, digest=False)
    write_tensors(folder / "model.safetensors", state)


def find(source):
    """A local path, or `organization/repository[/path/inside]` on the Hugging Face Hub or in its cache."""
    path, parts = Path(source), str(source).split("/")
    if path.exists():
        return path
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts) or parts[0] == "runs":
        made = str(source) in ("runs/teacher", "runs/cmt", "runs/meanflow")
        how = f": python train_{parts[1]}.py makes it" if made else ""
        raise InputError(f"{source} does not exist{how}")
    from huggingface_hub import HfApi, hf_hub_download, logging, snapshot_download
    logging.set_verbosity_error()                 # the one line below says it all
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])

    def fetch(**how):
        if path.suffix in (".pt", ".safetensors"):
            return Path(hf_hub_download(repository, inside, **how))
        patterns = [f"{inside}/*"] if inside else ["*.json", "*.safetensors"]
        return Path(snapshot_download(repository, allow_patterns=patterns, **how)) / inside
    try:
        cached = fetch(local_files_only=True)
        if any(cached.glob("*.safetensors")) or cached.is_file():
            return cached
    except Exception:                             # not in the cache, or not whole there
        pass
    say(f"{source} is not here: asking the Hugging Face Hub")
    try:
        HfApi().repo_info(repository, timeout=30)
        return fetch()
    except Exception as error:                    # offline, absent, forbidden, ...: a dozen kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{source} is neither here nor could it be had from the Hub ({reason})") from error


def read_plain(path):
    """-> (what a .safetensors or .pt file holds, its digest or None). Never unpickles objects."""
    if path.suffix == ".safetensors":
        # once for all processes
        tensors, header = read_tensors(path, check=is_first())
        return tensors, header.get("sha256")
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except Exception as error:                    # cut files and refused pickles raise half a dozen types
        hint = "it is cut short, or no .pt file"
        if "weights_only" in str(error):
            hint = ("it holds objects that could run code. Where you trust it, save its tensors alone: "
                    f"torch.save(torch.load({path.name!r}, weights_only=False)['ema'], 'weights.pt')")
        raise InputError(f"cannot read {path} ({type(error).__name__}): {hint}") from error


# What DDP, torch.compile and other trainers put before every name.
PREFIXES = ("module.", "_orig_mod.", "decoder.", "model.", "net.")


def read_state(path):
    """-> (state dict, its digest) of a .safetensors file, or of a .pt, bare or under "ema" or "model".

    A prefix that all names share is taken off."""
    state, digest = read_plain(path)
    if isinstance(state, dict):
        state = state.get("ema", state.get("model", state))
    state = dict(state) if isinstance(state, dict) else {}
    state.pop("step", None)
    if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no state dict (name -> tensor), "
                         "neither bare nor under 'ema' or 'model'")
    taken = ""
    while shared := [prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in state)]:
        state = {name.removeprefix(shared[0]): tensor for name, tensor in state.items()}
        taken += shared[0]
    if taken:
        say(f"{path}: the prefix {taken} of all names is taken off")
    return state, digest or (digest_of(state) if is_first() else "")


def load_strictly(net, state, new=""):
    """Copy every tensor of `state` into `net`.

    InputError lists what is missing, unexpected or misshapen.
    new: prefix of tensors that may be absent or of another shape and stay as initialized (printed)."""
    own = net.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    fresh = [name for name in own if new and name.startswith(new) and shapes.get(name) != wanted[name]]
    known = shapes | dict.fromkeys(fresh)
    wrong = [f"{name} is missing {shape}" for name, shape in wanted.items() if name not in known]
    wrong += [f"{name} is unexpected {shape}" for name, shape in shapes.items() if name not in own]
    wrong += [f"{name} is {shape}, wanted {wanted[name]}" for name, shape in shapes.items()
              if name in own and name not in fresh and shape != wanted[name]]
    if wrong:
        more = "; ..." if wrong[12:] else ""
        raise InputError(f"the weights do not fit, {len(wrong)} tensors: " + "; ".join(wrong[:12]) + more)
    for name in own:
        # A later RAE release trains its position tables: they come from the file too.
        table = name.endswith(("pos_embed", "freqs_cos", "freqs_sin"))
        if table and (state[name].float() - own[name]).abs().max() > 1e-4:
            say(f"note: {name} differs from the computed table; the file's is used")
    if fresh:
        say(f"starts anew, as the file has none: {', '.join(fresh)}")
    net.load_state_dict({name: own[name] if name in fresh else state[name] for name in own})


def settings_in(path):
    """The settings that a .json of ours records; {} where there is none."""
    settings = read_json(path).get("settings") if path.exists() else None
    return settings if isinstance(settings, dict) else {}


def network_of(config):
    """The constructor's arguments in a config.json; {} if there are none. InputError: they are no dict."""
    arguments = config.get("network", {})
    if not isinstance(arguments, dict):
        raise InputError(f"config.json has network {arguments!r}, where it needs names and sizes: restore it")
    return arguments


def build(network, arguments, found):
    """network(**arguments) of a config.json.

    InputError: these are no arguments, or not the sizes `found` in the tensors;
    a wrong number allocates nothing."""
    try:
        for name, value in found.items():
            given = arguments[name]
            if (tuple(given) if isinstance(value, tuple) else given) != value:
                raise ValueError(f"{name} {given}, its weights say {value}")
        return network(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise InputError(
            f"config.json describes no {network.__name__} of these weights ({error}): restore it") from error


def dit_arguments(state, depth=None):
    """The arguments of DiTDH, read off its tensors' shapes.

    depth: of each tower; read only where both have one width (default: two in the head)."""
    try:
        width, channels = state["s_embedder.proj.weight"].shape[:2]
        head_width = state["x_embedder.proj.weight"].shape[0]
        norms = [name for name in state if name.startswith("blocks.") and name.endswith(".norm1.weight")]
        widths = [state[name].shape[0] for name in norms]
        head_depth = widths.count(head_width) if width != head_width else depth[1] if depth else 2
        towers = (width, "enc"), (head_width, "dec")
        return dict(
            input_size=math.isqrt(state["pos_embed"].shape[1]),
            in_channels=channels,
            hidden_size=(width, head_width),
            depth=(len(widths) - head_depth, head_depth),
            num_heads=tuple(w // state[f"{tower}_feat_rope.freqs_cos"].shape[1] for w, tower in towers),
            num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"not a DiT-DH: {error} is missing or misshapen; the first names are "
                         f"{', '.join(list(state)[:3])}") from error


def load_network(source, kind=None, new="", num_classes=None, weights=True):
    """A teacher or student from a folder of ours, a published .pt or .safetensors, or the Hub.

    kind: "teacher", "student", or None for either.
    new: see `load_strictly`. "r_embedder." lets a teacher's weights start a student,
    "y_embedder." together with num_classes an own label table.
    weights=False: a run's network as it is made, of the sizes in its newest state.
    Returns (net on the CPU, config, stats or None); net.digest: of what it is, wherever it lies."""
    path, config, stats, state, digest = find(source), {}, None, {}, ""
    if path.is_dir():
        config = read_json(path / "config.json", digest=False)
        stats = load_stats(path / "latent_stats.safetensors")
        path = path / "model.safetensors"
    if weights:
        state, digest = read_state(path)
    else:
        state = network_in_state(path.parent)
    found = config.get("kind") or ("student" if "r_embedder.W" in state else "teacher")
    kind = kind or found
    if found not in ("teacher", "student"):
        raise InputError(f"{source} is a {found}, a teacher or a student is needed here")
    if found != kind and not (found == "teacher" and new == "r_embedder."):
        maker = ": python train_cmt.py makes one from it" if found == "teacher" else ""
        raise InputError(f"{source} is a {found}, a {kind} is needed here{maker}")
    arguments = network_of(config)
    sizes = dit_arguments(state, arguments.get("depth"))
    arguments = {**(arguments or sizes), "time_difference": kind == "student"}
    if num_classes:
        arguments["num_classes"] = sizes["num_classes"] = num_classes
        kept = [name for name in state if not name.startswith("y_embedder.")]
        state = {name: state[name] for name in kept}
    net = build(DiTDH, arguments, sizes)
    if weights:
        load_strictly(net, state, new)
    config = {"time_shift": default_time_shift(net.shape), **config, "kind": kind, "network": arguments}
    shift = config["time_shift"]
    if not isinstance(shift, (int, float)) or not 0 < shift < 1e6:
        raise InputError(f"{source}: time_shift in config.json is {shift}, it must be a number above 0")
    net.digest = digest_of_text(digest, kind, arguments, shift)
    try:
        net.label_dropout = settings_in(path.parent / "run.json").get("label_dropout")
    except InputError:                            # the network does not need it
        net.label_dropout = None
    return net, config, stats


def load_decoder(source):
    """A ViTDecoder from a folder of ours, a published .pt, diffusers' `AutoencoderRAE`, or the Hub.

    Returns (decoder on the CPU, stats or None); decoder.digest: of what it is, wherever it lies."""
    path, config, stats = find(source), {}, None
    if path.is_dir():
        config = read_json(path / "config.json", digest=False)
        if config.get("_class_name") == "AutoencoderRAE":
            return decoder_from_diffusers(*read_state(path / "diffusion_pytorch_model.safetensors"), config)
        if config.get("kind") != "decoder":
            raise InputError(f"{source} is a {config.get('kind')}, not a decoder")
        stats = load_stats(path / "latent_stats.safetensors")
        path = path / "model.safetensors"
    state, digest = read_state(path)
    found = decoder_arguments(state, network_of(config).get("num_heads"))
    decoder = build(ViTDecoder, network_of(config) or found, found)
    load_strictly(decoder, state)
    decoder.digest = digest_of_text(digest, found)
    return decoder, stats


def decoder_arguments(state, num_heads=None):
    """The arguments of ViTDecoder, read off its tensors.

    Its heads, which these do not tell: `num_heads`, or the preset's of this width."""
    try:
        width, channels = state["decoder_embed.weight"].shape
        presets = {sizes["hidden_size"]: sizes["num_heads"] for sizes in DECODER_PRESETS.values()}
        return dict(
            input_size=math.isqrt(state["decoder_pos_embed"].shape[1] - 1),
            in_channels=channels,
            hidden_size=width,
            num_heads=num_heads or presets[width],
            depth=sum(name.endswith(".layernorm_before.weight") for name in state),
            mlp_size=len(state["decoder_layers.0.intermediate.dense.bias"]),
            patch_size=math.isqrt(len(state["decoder_pred.bias"]) // 3))
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"not a decoder of a size in DECODER_PRESETS: {error} is missing or misshapen; "
                         f"the first names are {', '.join(list(state)[:3])}") from error


DIFFUSERS_NAMES = (
    ("attention.attention.query", "attention.to_q"),
    ("attention.attention.key", "attention.to_k"),
    ("attention.attention.value", "attention.to_v"),
    ("attention.output.dense", "attention.to_out.0"))


def decoder_from_diffusers(tensors, digest, config):
    """(decoder, stats or None) of an `AutoencoderRAE` folder, which stores sqrt(var + 1e-5)."""
    prefix = "decoder."
    state = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    for ours, theirs in DIFFUSERS_NAMES:
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    try:
        width = config["decoder_hidden_size"]
        arguments = dict(
            depth=config["decoder_num_hidden_layers"],
            input_size=config["encoder_input_size"] // config["encoder_patch_size"],
            in_channels=config["encoder_hidden_size"],
            hidden_size=width,
            num_heads=config["decoder_num_attention_heads"],
            mlp_size=config["decoder_intermediate_size"],
            patch_size=config["patch_size"])
        if not all(isinstance(size, int) and 0 < size < 1e5 for size in arguments.values()):
            raise KeyError("sizes of a decoder")
        # The table is not always stored.
        tokens = arguments["input_size"] ** 2 + 1
        state = {"decoder_pos_embed": torch.empty(1, tokens, width, device="meta")} | state
        decoder = build(ViTDecoder, arguments, decoder_arguments(state, arguments["num_heads"]))
        if state["decoder_pos_embed"].is_meta:
            state["decoder_pos_embed"] = decoder.decoder_pos_embed.detach()
        mean, std = (tensors[name].double() for name in ("_latents_mean", "_latents_std"))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"this AutoencoderRAE folder lacks {error}") from error
    load_strictly(decoder, state)
    decoder.digest = digest_of_text(digest, arguments)
    stats = None
    if std.numel() != 1:
        stats = mean.expand(decoder.shape).clone(), std.square() - 1e-5
    return decoder, stats


def load_stats(source, shape=None):
    """(mean, var), float64, each (C, H, W), which is `shape` where given.

    source: a latent_stats.safetensors, a folder that holds one, or a published stat.pt.
    A mean of None stands for 0: the published networks were trained so."""
    path = find(source)
    path = path / "latent_stats.safetensors" if path.is_dir() else path
    tensors, _ = read_plain(path)
    if not isinstance(tensors, dict) or not isinstance(tensors.get("var"), torch.Tensor):
        raise InputError(f"{path} holds no latent statistics (mean, var)")
    var = tensors["var"].double()
    mean = tensors.get("mean")
    mean = torch.zeros_like(var) if mean is None else mean.double()
    shape = tuple(shape or var.shape)
    for part in (mean, var):
        if tuple(part.shape) != shape:
            raise InputError(f"{path} holds statistics {tuple(part.shape)}, needed are {shape}: "
                             "of another encoder or size of images?")
    if not (mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()):
        raise InputError(
            f"{path} holds statistics that are not finite, or a variance below 0: restore or remake it")
    return mean, var


# ---- Runs: a folder with one network in training -------------
def begin_run(out, args, defaults, stats, **inputs):
    """Make `out` this run's folder, or see that it is: lock, compare, write run.json.

    defaults: the flags when not given. stats, inputs: what the run reads, with a `digest`, or None.
    Returns the run's identity: of settings and inputs, not of paths.
    out None: no files (--synthetic)."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE | PATHS}
    contents = {"stats": digest_of(dict(zip(("mean", "var"), stats, strict=True)))}
    contents |= {name: getattr(thing, "digest", None) for name, thing in inputs.items()}
    contents = {f"sha256 of {name}": digest for name, digest in contents.items()}
    run = digest_of_text(settings, contents)
    if out is None or not is_first():
        return run
    hold(out / ".lock", "run.json", "log.jsonl", "config.json", "*.safetensors")
    if (out / "config.json").exists() or states_of(out):
        before = read_json(out / "run.json") if (out / "run.json").exists() else {"settings": {}}
        if not isinstance(before.get("settings"), dict):
            raise InputError(f"{out / 'run.json'} has no settings: restore it, or give another --out")
        # What an older version did not record counts as its default, or as these inputs.
        refuse_other(out, vars(defaults) | contents | before["settings"], settings | contents)
        if not args.resume:
            raise InputError(f"{out} holds this very run: --resume goes on with it; or give another --out")
        run = before.get("run", run)
    write_json(out / "run.json", {"settings": vars(args) | contents, "run": run, **provenance()})
    return run


def append_line(path, text):
    """Append a line to a log. A full disk costs the line, not the run. path None: no file."""
    if path is None:
        return
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a") as file:
            file.write(text + "\n")
    except OSError as error:
        say(f"warning: a line of {path} is lost ({error})", sys.stderr)
        try:
            os.truncate(path, size)
        except OSError:
            pass


MOMENTS = ("exp_avg", "exp_avg_sq")               # of AdamW


def states_of(out):
    """{step: path} of the states in a run's folder, newest first."""
    paths = Path(out).glob("state_*")
    found = ((re.fullmatch(r"state_(\d{8,18})\.safetensors", path.name), path) for path in paths)
    states = ((int(name[1]), path) for name, path in found if name)
    return dict(sorted(states, reverse=True))


def resumes(args):
    """Whether --resume finds a network and a state in --out: then --init is not needed any more."""
    return args.resume and is_described(Path(args.out)) and bool(states_of(args.out))


def is_described(folder):
    return (folder / "config.json").exists() and (folder / "latent_stats.safetensors").exists()


def network_in_state(folder):
    """{name: tensor} of the network in a folder's newest readable state, as maps of the file."""
    for path in states_of(folder).values():
        try:
            tensors, _ = read_tensors(path, check=False)
        except InputError:
            continue
        return {name[4:]: tensors[name] for name in tensors if name.startswith("net/")}
    return {}


def contents(net, average, optimizer):
    """{name: tensor} of all that a state holds: the tensors themselves, which can be copied into."""
    tensors = {f"net/{name}": tensor for name, tensor in net.state_dict().items()}
    for (name, p), mean in zip(net.named_parameters(), average.parameters(), strict=True):
        if p.requires_grad:
            tensors[f"average/{name}"] = mean
            tensors |= {f"{moment}/{name}": optimizer.state[p][moment] for moment in MOMENTS}
    return tensors


def save_state(out, run, step, seconds, net, average, optimizer, config, stats, keep, keep_every):
    """What --resume goes on from (network, average, optimizer, step), then the folder to sample from.

    The folder's weights are the average. InputError: weights are not finite."""
    norms = torch._foreach_norm([*net.parameters(), *average.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise InputError(f"weights are not finite at step {step}; not saved: "
                         "try a lower --lr or --clip, or --precision fp32")
    if is_first():
        whole = average.state_dict()
        header = {"step": str(step), "seconds": str(seconds), "run": run, "model": digest_of(whole)}
        write_tensors(out / f"state_{step:08d}.safetensors", contents(net, average, optimizer), header)
        save_network(out, whole, config, stats)
        prune(out, keep, keep_every)
    # torchrun ends all processes when one ends: this one has saved.
    barrier()


def prune(out, keep, keep_every):
    """Remove all states but the newest `keep` and those at multiples of `keep_every`."""
    for old, path in list(states_of(out).items())[keep:]:
        if not keep_every or old % keep_every:
            try:
                path.unlink()
            except OSError as error:
                say(f"warning: {path} cannot be removed ({error.strerror})", sys.stderr)


def load_newest_state(out, run, net, average, optimizer, config, stats, keep, keep_every):
    """Go on from the newest whole state of `out`, if any: networks and optimizer, in place.

    Then see that the folder is as save_state leaves it at that step, and that the log ends there.
    Returns (step, seconds of training so far). InputError: no state is whole, or one of another run."""
    step, states = 0, states_of(out) if out else {}
    for step, path in states.items() if is_first() else ():
        try:
            tensors, header = read_tensors(path)
        except InputError as error:
            say(f"{error}; set aside, trying the state before it", sys.stderr)
            path.rename(f"{path}.damaged")
            continue
        if header.get("run", run) != run or header.get("step") != str(step):
            raise InputError(f"{path} is not a state of this run: move it away")
        break
    else:
        if states and is_first():
            raise InputError(f"no state in {out} is whole: remove the folder and start again")
    step = int(all_reduce(torch.tensor(step if is_first() else 0), dist.ReduceOp.MAX))
    if out and is_first() and (out / "log.jsonl").exists():
        log = (out / "log.jsonl").read_text(errors="replace")
        lines = re.findall(r'^({"step": (\d{1,18})\b.*}\n)', log, re.M)
        kept = "".join(line for line, at in lines if int(at) <= step)
        write_atomically(out / "log.jsonl", lambda beside: beside.write_text(kept))
    if not step:
        return 0, 0.0
    if not is_first():
        if step not in states:
            raise InputError(
                f"{out} has no state of step {step} for this process: it must lie on a disk all nodes share")
        tensors, header = read_tensors(states[step], check=False)
    for p in net.parameters():
        if p.requires_grad:
            moments = {moment: torch.zeros_like(p) for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **moments}
    wanted = contents(net, average, optimizer)
    try:
        seconds = float(header["seconds"])
        if {name: x.shape for name, x in tensors.items()} != {name: x.shape for name, x in wanted.items()}:
            raise ValueError("its tensors are not this network's")
    except (KeyError, ValueError) as error:
        raise InputError(f"{states[step]} is no state of this run ({error}): move it away") from error
    net.load_state_dict({name[4:]: tensors[name] for name in wanted if name.startswith("net/")})
    average.load_state_dict(net.state_dict())     # what is not trained has no average
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    if is_first():
        whole = average.state_dict()
        try:
            written = read_tensors(out / "model.safetensors", check=False)[1].get("sha256")
        except InputError:                        # missing, or cut short
            written = None
        if written != header.get("model", digest_of(whole)) or not is_described(out):
            # Killed between the state and the network.
            save_network(out, whole, config, stats)
        prune(out, keep, keep_every)
    return step, seconds
