"""The networks and the mathematics of MF-RAE; below the ruler: processes, flags, files, runs.

    DiTDH        the backbone: a flow-matching teacher v(z, t, y), or a few-step student h(z, t, y, s)
    ViTDecoder   latents -> images
    time_shift, ode_times, solve_ode, long_jumps, guided     time, the PF-ODE, the student's jumps

Time t runs from 0 (data) to 1 (noise): z_t = (1 - t) z_0 + t eps.
A teacher predicts the velocity v = E[eps - z_0 | z_t].
A student predicts the mean velocity h over [s, t], s <= t.
Sources: MeanFlow (arXiv 2505.13447), MF-RAE (2511.13019); backbone and decoder: RAE (2510.11690).

Parameters have the names of the published checkpoints. Three of them mislead:
`s_embedder` and `s_projector` belong to the encoder tower, not to the time s;
`r_embedder` embeds the time DIFFERENCE t - s (the published code calls our s "r").
"""
import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
# Before there is a process group, which this module's default arguments would keep alive to the very end.
import torch.distributed.nn.functional  # noqa: F401
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- Presets: pairs (encoder tower, head); -mini: the sanity run's
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
    """A 1x1 convolution, (B, C, G, G) -> (B, N, d), as a product: cuDNN's convolutions would use TF32."""

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
    """Torch's fused operator; under torch.compile the formula, which is then fused as well.

    torch.compile cannot trace the operator's forward-mode derivative on a GPU (torch 2.11)."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        inverse = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * inverse * self.weight


def modulation(width, parts):
    """condition -> `parts` shifts, scales and gates, at first 0: a block is the identity (AdaLN-Zero)."""
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
class Dual(NamedTuple):
    """A value and its derivative along a direction, its tangent."""

    value: torch.Tensor
    tangent: torch.Tensor


def apply_part(part, *inputs):
    """part(*inputs). Where inputs are Duals, so is the output: forward-mode differentiation."""
    duals = [x for x in inputs if isinstance(x, Dual)]
    if not duals:
        return part(*inputs)

    def of_values(*values):
        values = list(values)
        return part(*[values.pop(0) if isinstance(x, Dual) else x for x in inputs])
    values, tangents = zip(*duals, strict=True)
    return Dual(*torch.func.jvp(of_values, values, tangents))


def jvp_by_parts(function, values, tangents):
    """torch.func.jvp of a function that hands its arguments to a DiTDH and returns its answer.

    Part by part, so that torch.compile serves all blocks of a tower with one graph."""
    def plain(x):
        # A compiled part wants a value and its tangent to lie alike in memory: no views.
        return x.clone(memory_format=torch.contiguous_format)
    return function(*(Dual(plain(x), plain(dx)) for x, dx in zip(values, tangents, strict=True)))


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
        self.checkpoint_activations, self.apply_module = False, apply_part
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
            nn.init.xavier_uniform_(embedder.proj.weight.flatten(1))
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

        Returns (B, C, G, G): the velocity (teacher) or the mean velocity over [s, t] (student);
        a Dual if z and t are Duals, as jvp_by_parts makes them.
        ValueError: a student without s, a teacher with it, arguments in another order."""
        wrong_s = (s is None) != (self.r_embedder is None)
        if wrong_s or y.is_floating_point() or not (s is None or s.is_floating_point()):
            raise ValueError("a teacher takes (z, t, y), a student (z, t, y, s): "
                             "times are floating, labels integers")
        attention = plain_attention if isinstance(z, Dual) else F.scaled_dot_product_attention
        # Without `run`, which applies each part to values or to Duals, compiled or checkpointed:
        #   e = embed_times(t, s); x = blocks(s_embedder(z) + pos_embed, silu(e + y_embedder(y)))
        #   q = s_projector(silu(e + x)); return final_layer(head_blocks(x_embedder(z), q), q)
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
        """Apply a part of the network, to values or to Duals; only modules are worth compiling."""
        apply = self.apply_module if isinstance(part, nn.Module) else apply_part
        if self.checkpoint_activations and torch.is_grad_enabled() and isinstance(part, Block):
            return checkpoint(apply, part, *inputs, use_reentrant=False)
        return apply(part, *inputs)

    def compile(self, **options):
        """Compile blocks and last layer: a tower's blocks share a graph, one for values, one for Duals."""
        # A graph for each number of rows, with gradient and without; beyond the limit is an error.
        torch._dynamo.config.recompile_limit = 64
        self.apply_module = torch.compile(apply_part, fullgraph=True, **options)


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
    """(B, C, G, G) de-normalized latents -> (B, 3, G * patch, G * patch) images, about in [0, 1].

    image_norm: the mean and std by which the encoder normalizes pixels; undone here."""

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, mlp_size, patch_size=16,
                 image_norm=(IMAGE_MEAN, IMAGE_STD)):
        super().__init__()
        self.patch_size, self.shape = patch_size, (in_channels, input_size, input_size)
        self.image_norm = image_norm
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
        mean, std = map(x.new_tensor, self.image_norm)
        return x * std[:, None, None] + mean[:, None, None]


# ---- Time, the PF-ODE and its long jumps ---------------------
def default_time_shift(shape):
    """a = max(1, sqrt(C H W / 4096)) for a latent of shape (C, H, W) (RAE): 6.93 at 768x16x16."""
    return max(1.0, math.sqrt(math.prod(shape) / 4096))


def time_shift(u, a):
    """shift(u) = a u / (1 + (a - 1) u): [0, 1] -> [0, 1], towards 1 (noise) for a > 1."""
    return a * u / (1 + (a - 1) * u)


def ode_times(steps, a):
    """The PF-ODE grid t_i = shift(1 - i / steps), i = 0 .. steps: floats, from exactly 1 to exactly 0."""
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


def guided(teacher, scale, interval=(0.0, 1.0), weak=None):
    """A function (z, t, y): v_weak + scale (v - v_weak) for t in `interval`, v elsewhere.

    v_weak: of the weaker teacher `weak` (autoguidance, arXiv 2406.02507), or of the teacher without label
    (CFG, 2207.12598), which leaves rows without label as they are.
    Intervals: arXiv 2404.07724. Costs two evaluations."""
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


# ---- Latent statistics: {"mean", "var"}, (C, H, W), float64 --
def normalize(z, stats):
    """Raw latents (B, C, H, W) -> the backbone's: (z - mean) / sqrt(var + 1e-5), float32."""
    mean, std = mean_and_std(stats, z.device)
    return (z.float() - mean) / std


def denormalize(z, stats):
    """The inverse of `normalize`: what the decoder takes."""
    mean, std = mean_and_std(stats, z.device)
    return z.float() * std + mean


def mean_and_std(stats, device):
    return stats["mean"].to(device).float(), (stats["var"] + 1e-5).sqrt().to(device).float()


# ==============================================================
# The method ends here. Below: processes, flags, files and runs.
# ==============================================================
class InputError(Exception):
    """A mistake of the user's: one line that says what is wrong and what to do."""


# ---- Randomness that follows from a key ----------------------
def generator(device, *key):
    """A torch.Generator on `device`, seeded by a hash of `key` (numbers, strings)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def generators(device, rows, *key):
    """One for each block of four rows of the global batch, from rows[0] to before rows[1].

    So random numbers do not depend on how the batch is split into processes and micro-batches."""
    return [generator(device, *key, block) for block in range(rows[0] // 4, rows[1] // 4)]


# ---- Processes -----------------------------------------------
def command(main):
    """Run a script's `main`. An error that is no bug is one line on stderr and status 2; Ctrl-C is 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")         # a file's name may be no valid text
    try:
        main()
    except KeyboardInterrupt:
        leave(130, "interrupted: the same command goes on, or starts over")
    except (InputError, OSError, MemoryError, RuntimeError) as error:
        text, hint = " ".join(str(error).split()), ""
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
            hint = ": out of memory: smaller --micro-batch or --batch-size, or --checkpoint-activations"
        elif isinstance(error, dist.DistError) or "gloo" in text:
            hint = ": another process is lost: see what it said, then repeat the command"
        elif not isinstance(error, (InputError, OSError)):
            raise
        leave(2, f"error: {text}{hint}")
    if dist.is_initialized():
        # Not left to Python's exit, where a thread of Gloo's may abort.
        dist.destroy_process_group()


def leave(status, text):
    """End at once: sys.exit waits for processes that may never come."""
    with suppress(OSError, ValueError):
        print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr, flush=True)
    os._exit(status)


def say(text):
    """Print a line, in the first process. A terminal that is gone ends no run."""
    if is_first():
        with suppress(OSError, ValueError), tqdm.external_write_mode():
            print(text, flush=True)


def progress(items, total, unit):
    """The items, with a progress bar; where there is no terminal, it is printed every half minute."""
    wait = 0.1 if sys.stderr.isatty() else 30
    return tqdm(items, total=total, unit=f" {unit}", disable=not is_first(), delay=wait, mininterval=wait,
                miniters=1)


def launch(hours=0.5):
    """Join the processes of torchrun, if any. Returns (device, rank, number of processes).

    hours: how long one waits for another. InputError: tasks of srun, or fewer GPUs than processes."""
    by_torchrun = os.environ if "RANK" in os.environ else {}
    if not by_torchrun and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        raise InputError("srun started several tasks, all with the same work: let each node run torchrun "
                         "--nnodes=N --nproc_per_node=GPUS ... (the script's first lines show it)")
    rank, local = (int(by_torchrun.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world = int(by_torchrun.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(f"no GPU for process {local}: --nproc_per_node={torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=hours))
    return device, rank, world


def is_first():
    """Whether this process writes, prints and checks for all (rank 0)."""
    return not dist.is_initialized() or dist.get_rank() == 0


def gather(content):
    """-> [each process's `content`], in every process."""
    found = [content]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, content)
    return found


def barrier():
    gather(None)


@contextmanager
def stop_signals():
    """Within it, SIGTERM, SIGINT, SIGHUP and SIGUSR1 only ask the run to end (Ctrl-\\ ends it at once).

    Yields a function that all processes call after each step: the signal that one of them got, or 0."""
    got, before = [0], {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:        # nohup's SIGHUP stays ignored
            before[number] = signal.signal(number, lambda number, frame: got.append(number))
    try:
        yield lambda: max(gather(got[-1]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def distribute(net, device):
    """`net`, in DistributedDataParallel if there are several processes."""
    if not dist.is_initialized():
        return net
    devices = [device] if device.type == "cuda" else None
    # The buffers are tables that never change: no broadcast.
    return nn.parallel.DistributedDataParallel(
        net, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False)


def micro_batches_of(args, rank, world):
    """This process's rows of the global batch: (start, stop) of each micro-batch."""
    share = args.batch_size // world
    sizes = [n for n in range(4, min(share, 64) + 1, 4) if share % n == 0]
    micro = args.micro_batch or max(sizes, default=share)
    if share * world != args.batch_size or not share or micro % 4 or share % micro:
        raise InputError(f"--batch-size {args.batch_size} over {world} processes in micro-batches of {micro} "
                         "rows: it must divide evenly, and a micro-batch must be a multiple of 4")
    return [(row, row + micro) for row in range(rank * share, (rank + 1) * share, micro)]


# ---- Flags ---------------------------------------------------
class ArgumentParser(argparse.ArgumentParser):
    """argparse: defaults in the help, no abbreviations, a mistake in one line (exit status 2)."""

    class Help(argparse.ArgumentDefaultsHelpFormatter):
        def _get_help_string(self, action):       # not "(default: None)"
            return action.help if action.default in (None, False) else super()._get_help_string(action)

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=self.Help)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a finite int or float from `low` (above: beyond it) to `high`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low < value <= high if above else low <= value <= high
        if not inside or math.isinf(value):
            words = f"{'above' if above else 'at least'} {low}" + f" and at most {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number {words}")
        return value
    return parse


def whole(least=1):
    return number(int, least)


positive = number(float, 0, above=True)
fraction = number(float, 0, 1)
not_negative = number(float, 0)


def location(text):
    """An argparse type: a path, or a name of the Hub. An empty one is an unset variable's."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return os.path.expanduser(text)


def add_run_flags(parser):
    """Add the flags that all stages share. Returns functions that add to data, method, training."""
    data, method, training, machine, files = (
        parser.add_argument_group(title).add_argument
        for title in ("data", "method", "training", "machine", "files"))
    training("--clip", type=not_negative, default=1.0, help="largest norm of the gradient (paper); 0: any")
    training("--seed", type=whole(0), default=0, help="of everything random")
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    machine("--precision", choices=("fp32", "bf16"), default="bf16" if bf16 else "fp32",
        help="bf16: autocast, weights stay float32; the default where a GPU has it")
    machine("--micro-batch", type=whole(4), metavar="ROWS",
        help="rows per device and backward pass, a multiple of 4; gradients accumulate "
        "(default: equal parts of at most 64, which XL needs on 80 GB)")
    machine("--compile", action="store_true", help="torch.compile the networks")
    machine("--checkpoint-activations", action="store_true",
        help="recompute blocks in the backward pass: less memory, one more forward pass")
    files("--log-every", type=whole(), default=50, metavar="STEPS", help="steps between lines of log.jsonl")
    files("--save-every", type=whole(0), default=5000, metavar="STEPS", help="steps between states; 0: none")
    files("--keep", type=whole(), default=2, metavar="STATES", help="newest states kept")
    files("--keep-every", type=whole(), metavar="STEPS",
        help="keep the states at multiples of this for good, a multiple of --save-every (default: none)")
    return data, method, training


def add_guidance_flags(add):
    add("--guidance", type=not_negative, default=1.0, metavar="W",
        help="of a teacher: v_weak + W (v - v_weak), v_weak without label or of --weak-teacher (paper: none)")
    add("--weak-teacher", type=location, help="for autoguidance (default: the teacher without label, CFG)")


def load_guidance(args, teacher, about, interval=(0.0, 1.0)):
    """-> the teacher's velocity with guidance by these flags; the weak teacher's sha256, or None."""
    if args.guidance == 1:
        return teacher, None
    if args.weak_teacher:
        weak, about_weak = load_network(args.weak_teacher, "teacher")
        check_fit("the weak teacher", weak, "the teacher", teacher.shape, teacher.num_classes)
        weak.to(teacher.pos_embed.device).requires_grad_(False)
        if args.compile:
            weak.compile(dynamic=False)
        return guided(teacher, args.guidance, interval, weak), about_weak["sha256"]
    if about.get("settings", {}).get("label_dropout") == 0:
        say("warning: guidance needs the teacher without label, and it was trained with --label-dropout 0")
    return guided(teacher, args.guidance, interval), None


# Flags that may change when a run goes on; and paths of inputs, which are known by their contents.
FREE = set("steps lr lr_final clip precision micro_batch compile checkpoint_activations workers log_every "
           "save_every keep keep_every out latents data_path teacher weak_teacher init stats".split())


def refuse_other(where, before, now, free=()):
    """InputError if settings, but for `free` ones, are others now than `before`, which `where` holds."""
    other = [f"{name}: {before.get(name)} there, {now.get(name)} now" for name in {**now, **before}
             if name not in free and before.get(name) != now.get(name)]
    if other:
        other = "; ".join(other[:4])
        raise InputError(f"{where} holds other work ({other}): give another --out, or remove it")


# ---- Files: whole or absent, damage is found -----------------
def write_atomically(path, write):
    """`write(file)`, to the disk, rename: `path` holds the old contents or the new, never half.

    A writer that is killed leaves its half under a hidden name, which the next one overwrites."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise InputError(f"cannot write {path} ({error}): make space, or mend it, and repeat") from error


LOCKS = []                                        # open files: a lock ends when its file is closed


def lock(path):
    """Lock the hidden file `path`, and so what it stands for, until this process ends."""
    import fcntl
    path.parent.mkdir(parents=True, exist_ok=True)
    LOCKS.append(file := open(path, "a+"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise InputError(f"{path.parent} is written by another process ({file.read()}): wait for it, or "
                         "end it, or give another --out") from error
    except OSError as error:
        say(f"warning: no locks on this disk ({error}): write {path.parent} by one command at a time")
    with suppress(OSError):                       # of a full disk
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()


def start_folder(out, record, content, key, free=()):
    """Lock the folder `out`, and write `content` to its file `record`, which says whose work it holds.

    If `record` exists, what it says under `key` must be the same, settings named in `free` aside.
    InputError: other work or something else is there, or another process writes there."""
    path = Path(out, record)
    if path.exists():
        refuse_other(out, read_json(path).get(key, {}), content[key], free)
    elif path.parent.is_file() or any(path.parent.glob("[!.]*")):
        raise InputError(f"{out} holds something else: give an --out that is empty or new")
    lock(path.with_name(".lock"))
    if not path.exists():
        write_json(path, content)


def write_json(path, content):
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=1).encode() + b"\n"))


def read_json(path):
    """A dict. InputError: missing, cut short, or something else."""
    try:
        return {**json.loads(Path(path).read_text())}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read {path} ({error}): restore it") from error


def bytes_of(tensor):
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest_of(tensors):
    """sha256 of names, types, shapes and contents of {name: tensor}."""
    def describe(name):
        x = tensors[name]
        return name, str(x.dtype), [*x.shape], hashlib.sha256(bytes_of(x)).hexdigest()
    # Hashing releases Python's lock.
    with ThreadPoolExecutor() as threads:
        return hashlib.sha256(json.dumps([*threads.map(describe, sorted(tensors))]).encode()).hexdigest()


TYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.float16: "F16",
         torch.bfloat16: "BF16", torch.uint8: "U8"}


def write_tensors(path, parts, about=()):
    """Write {part: {name: tensor}} as safetensors, named PART/NAME (of part "": NAME).

    The header holds `about` (JSON) and the sha256 of each part, {part: sha256}, which is returned.
    Not by the library, whose writer, when killed, leaves gigabytes under a random name."""
    digests = {part: digest_of(tensors) for part, tensors in parts.items()}
    named = [(f"{part}/{name}".lstrip("/"), x) for part in parts for name, x in parts[part].items()]
    named.sort(key=lambda item: -item[1].itemsize)            # so that each lies aligned
    metadata = {"format": "pt", "about": json.dumps(dict(about)), "sha256": json.dumps(digests)}
    header, end = {"__metadata__": metadata}, 0
    for name, x in named:
        offsets = [end, end := end + x.nbytes]
        header[name] = {"dtype": TYPES[x.dtype], "shape": [*x.shape], "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(file):
        file.write(len(text).to_bytes(8, "little") + text)
        for _, x in named:
            file.write(bytes_of(x))
    write_atomically(path, write)
    return digests


def read_tensors(path, only=None, check=True):
    """-> {part: {name: tensor}}, mapped from the file; about; {part: sha256}, empty for files of others.

    only: these parts alone. check: compare them with their digests, in the first process.
    InputError: missing, cut short, or damaged."""
    from safetensors import SafetensorError, safe_open
    parts = {}
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            about, digests = (dict(json.loads(header.get(key, "{}"))) for key in ("about", "sha256"))
            for name in file.keys():
                part, _, rest = name.rpartition("/")
                if only is None or part in only:
                    parts.setdefault(part, {})[rest] = file.get_tensor(name)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}): missing, cut short or no safetensors") from error
    for part in parts if check and is_first() else ():
        if part in digests and digest_of(parts[part]) != digests[part]:
            raise InputError(f"{path} is damaged: it does not hold what was written; restore or remake it")
    return parts, about, digests


# ---- Networks in files ---------------------------------------
def find(source):
    """The file of a network: itself; a folder's newest state, or model.safetensors; or from the Hub.

    There, or in its cache: ORGANIZATION/REPOSITORY/FILE."""
    path, parts = Path(source), str(source).split("/")
    if path.is_dir():
        return next(iter(states_of(path).values()), path / "model.safetensors")
    if path.exists():
        return path
    if len(parts) < 3 or Path(parts[0]).exists():
        made = str(source) in ("runs/teacher", "runs/cmt", "runs/meanflow")
        raise InputError(f"{source} does not exist" + f": python train_{parts[-1]}.py makes it" * made)
    from huggingface_hub import hf_hub_download
    say(f"{source} is not here: asking the Hugging Face Hub")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except Exception as error:                    # offline, absent, forbidden, ...: a dozen kinds
        raise InputError(f"{source} is neither here nor to be had from the Hub ({error})") from error


def read_state(source):
    """-> {name: tensor} of a file of ours or a published one; what else it says, "stats", "sha256".

    Of a training state, the average. Prefixes that all names share (DDP's, torch.compile's) are taken off."""
    path = find(source)
    if path.suffix == ".safetensors":
        parts, about, digests = read_tensors(path, ("ema", "stats", ""))
    else:
        try:
            content = dict(torch.load(path, map_location="cpu", weights_only=True))
            content = dict(content.get("ema", content.get("model", content)))
        except Exception as error:                # half a dozen kinds
            raise InputError(f"cannot read {path} ({type(error).__name__}): cut short, no .pt file, or with "
                             "objects in it that could run code: save its tensors alone") from error
        tensors = {str(name): x for name, x in content.items() if isinstance(x, torch.Tensor)}
        tensors.pop("step", None)
        parts, about, digests = {"": tensors}, {}, {}
    part = "ema" if "ema" in parts else ""
    state = parts.get(part, {})
    while len({name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        state = {name.partition(".")[2]: x for name, x in state.items()}
    return state, {**about, "stats": parts.get("stats"), "sha256": digests.get(part) or digest_of(state)}


@contextmanager
def fits(source, kind):
    """An error within it becomes an InputError: `source` is no `kind`."""
    try:
        yield
    except Exception as error:                    # from names, shapes and types that are others
        reason = "it has no " * isinstance(error, KeyError) + " ".join(str(error).split())[:1000]
        raise InputError(f"{source} is no {kind}: {reason}") from error


def load_network(source, kind=None, num_classes=None):
    """A teacher or a student: a run's folder or state, a published .pt or .safetensors, or a path on the Hub.

    kind: "teacher"; "student", for which a teacher's weights will do: its embedding of t - s is then new; or
    None, what it is. num_classes: the size of a new label table.
    Returns (net on the CPU, about): "kind", "time_shift", "classes" (names, or None), "stats" ({"mean",
    "var"}, or None), "sha256" (of its tensors), and what else the file says."""
    state, about = read_state(source)
    found = "student" if "r_embedder.W" in state else "teacher"
    kind = kind or found
    if (found, kind) == ("student", "teacher"):
        raise InputError(f"{source} is a student, a teacher is needed here")
    with fits(source, "DiT-DH"):
        width, channels = state["s_embedder.proj.weight"].shape[:2]
        head_width = len(state["x_embedder.proj.weight"])
        widths = [len(x) for name, x in state.items() if name.endswith(".norm1.weight")]
        # Of towers of one width, shapes do not tell which blocks are the head's.
        head = about.get("head_depth", 2) if width == head_width else widths.count(head_width)
        classes = len(state["y_embedder.embedding_table.weight"]) - 1
        net = DiTDH(
            input_size=math.isqrt(state["pos_embed"].shape[1]),
            in_channels=channels,
            hidden_size=(width, head_width),
            depth=(len(widths) - head, head),
            num_heads=(width // state["enc_feat_rope.freqs_cos"].shape[1],
                       head_width // state["dec_feat_rope.freqs_cos"].shape[1]),
            num_classes=num_classes or classes,
            time_difference=kind == "student")
        new = ("r_embedder.",) * (found == "teacher") + ("y_embedder.",) * bool(num_classes)
        fresh = {name: x for name, x in net.state_dict().items() if name.startswith(new)}
        if fresh:
            say(f"new, not from {source}: {', '.join(fresh)}")
        net.load_state_dict({**state, **fresh})
    return net, {"time_shift": default_time_shift(net.shape), "classes": None, **about, "kind": kind}


def load_decoder(source):
    """A ViTDecoder, likewise. Returns (decoder on the CPU, about): "stats", "sha256", ..."""
    state, about = read_state(source)
    with fits(source, "decoder of a size in DECODER_PRESETS"):
        width, channels = state["decoder_embed.weight"].shape
        heads = {preset["hidden_size"]: preset["num_heads"] for preset in DECODER_PRESETS.values()}
        decoder = ViTDecoder(
            input_size=math.isqrt(state["decoder_pos_embed"].shape[1] - 1),
            in_channels=channels,
            hidden_size=width,
            num_heads=about.get("num_heads") or heads[width],
            depth=sum(name.endswith(".layernorm_before.weight") for name in state),
            mlp_size=len(state["decoder_layers.0.intermediate.dense.bias"]),
            patch_size=math.isqrt(len(state["decoder_pred.bias"]) // 3),
            image_norm=about.get("image_norm", (IMAGE_MEAN, IMAGE_STD)))
        decoder.load_state_dict(state)
    return decoder, about


def check_fit(name, net, other, shape, num_classes):
    if (net.shape, net.num_classes) != (tuple(shape), num_classes):
        raise InputError(f"{name} is for latents {net.shape} of {net.num_classes} classes, {other} for "
                         f"{tuple(shape)} of {num_classes}")


def load_stats(source, shape=None):
    """{"mean", "var"}, float64, each (C, H, W), which is `shape` where given.

    source: a folder of latents, a run, a latent_stats.safetensors, or a published stat.pt.
    A mean of None stands for 0: the published networks were trained so."""
    path = Path(source, "latent_stats.safetensors")
    state, about = read_state(path if path.exists() else source)
    found = about["stats"] or state
    if "var" not in found:
        raise InputError(f"{source} holds no latent statistics (mean, var)")
    var = found["var"].double()
    mean = found.get("mean", torch.zeros_like(var)).double()
    shape = tuple(shape or var.shape)
    if not mean.shape == var.shape == shape:
        raise InputError(f"{source} holds statistics {tuple(var.shape)}, needed are {shape}: of another "
                         "encoder or size of images?")
    return {"mean": mean, "var": var}


# ---- Runs: a folder with states of one network in training ---
def states_of(out):
    """{step: path} of the states in a run's folder, newest first."""
    paths = Path(out).glob(f"state_{'[0-9]' * 8}.safetensors")
    return {int(path.stem.removeprefix("state_")): path for path in sorted(paths, reverse=True)}


def contents(net, average, optimizer):
    """{part: {name: tensor}} of all that is trained: the tensors themselves, which can be copied into."""
    parts = {"ema": average.state_dict(), "net": net.state_dict()}
    for moment in ("exp_avg", "exp_avg_sq"):
        parts[f"optimizer/{moment}"] = {
            name: optimizer.state[p][moment] for name, p in net.named_parameters() if p in optimizer.state}
    return parts


def save_state(about, step, seconds, net, average, optimizer):
    """Write a state: what the same command goes on from, and a network (the average) for other scripts.

    about: see begin_run. InputError: weights are not finite."""
    norms = torch._foreach_norm([*net.parameters(), *average.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise InputError(f"weights are not finite at step {step}; not saved: try a lower --lr or --clip, or "
                         "--precision fp32")
    if is_first():
        about = {**about, "step": step, "seconds": seconds}
        parts = {**contents(net, average, optimizer), "stats": about.pop("stats")}
        write_tensors(Path(about["settings"]["out"], f"state_{step:08d}.safetensors"), parts, about)
        prune(about["settings"])
    # All wait: torchrun ends every process when one ends.
    barrier()


def load_state(path, step, net, average, optimizer):
    """Copy what save_state wrote back into network, average and optimizer."""
    for p in net.parameters():
        if p.requires_grad:
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device),
                                  "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for part, tensors in contents(net, average, optimizer).items():
        # Part by part, as memory may not hold them all.
        saved = read_tensors(path, only=(part,))[0][part]
        for name, x in tensors.items():
            x.copy_(saved[name])


def prune(settings):
    """Remove all states but the newest --keep and those at multiples of --keep-every."""
    for step, path in list(states_of(settings["out"]).items())[settings["keep"]:]:
        if not settings["keep_every"] or step % settings["keep_every"]:
            path.unlink()


def begin_run(about, net, average, optimizer):
    """Make --out this run's folder; where it has states, go on from the newest, in place.

    about: what states say beside their tensors, as load_network returns it; its "settings" are the flags and
    a sha256 of each input. Returns (step, seconds of training so far).
    InputError: another process writes there; it holds other work, or anything else; its newest state cannot
    be read. Nothing has changed then."""
    settings = about["settings"]
    out, step, seconds = Path(settings["out"]), 0, 0.0
    keep, save = settings["keep_every"], settings["save_every"]
    if keep and save and keep % save:
        raise InputError(f"--keep-every {keep} must be a multiple of --save-every {save}")
    if is_first() and states_of(out):
        lock(out / ".lock")
    elif is_first():
        start_folder(out, "run.json", {"settings": settings}, "settings", FREE)
    if states := states_of(out):
        path = next(iter(states.values()))
        saved = read_tensors(path, only=())[1]
        before = saved.get("settings", {})
        refuse_other(path, before, settings, FREE)
        step, seconds = saved["step"], saved["seconds"]
        load_state(path, step, net, average, optimizer)
        if before.get("init") != settings.get("init"):
            say(f"--init is not read any more: the run began from {before.get('init')}")
            settings["init"] = before.get("init")
        if before["steps"] != settings["steps"]:
            say(f"--steps was {before['steps']:,}: what changes over a run (--lr-final, --eta) now ends with "
                "the new one")
    work = step, {name: x for name, x in settings.items() if name not in FREE}
    if any(other != work for other in gather(work)):
        raise InputError(f"{out}: not all processes have the same state, flags and inputs: give all "
                         "the same, on a disk that they share")
    if is_first():
        write_json(out / "run.json", {"settings": settings, **provenance()})
        for half in out.glob(".state_*.tmp"):     # of a writer that was killed
            half.unlink()
        prune(settings)
    size, steps = sum(p.numel() for p in net.parameters()) / 1e6, settings["steps"]
    say(f"{out}: {size:,.1f} M parameters, step {step:,} of {steps:,}, {settings['batch_size']:,} rows each")
    if about["kind"] in ("teacher", "student") and settings["ema"] ** steps > 0.5:
        say(f"warning: with --ema {settings['ema']} the average of {steps:,} steps is mostly the first "
            f"weights: take {max(0.0, 1 - 5 / steps):.4g} or so")
    return step, seconds


def provenance():
    """What is needed to reproduce a result."""
    commit = ""
    with suppress(OSError):                       # no git here
        git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"command": shlex.join(sys.argv), "python": platform.python_version(), "torch": torch.__version__,
            "commit": commit, "host": platform.node(), "device": device,
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}


class Log:
    """log.jsonl: means over micro-batches, processes and steps since the line before; a bar in a terminal."""

    def __init__(self, args, step, seconds):
        self.args, self.seconds, self.numbers, self.since = args, seconds, {}, time.perf_counter()
        self.bar = tqdm(total=args.steps, initial=step, unit="step", disable=None if is_first() else True)

    def add(self, loss, numbers):
        """Of a micro-batch: scalar tensors. A mean square ms_NAME is logged as rms_NAME, its mean's root."""
        for name, x in {"loss": loss.detach(), **numbers}.items():
            self.numbers.setdefault(name, []).append(x)

    def end_step(self, grad_norm):
        self.numbers.setdefault("grad_norm", []).append(grad_norm)
        self.bar.update()

    def write(self, step, lr, **more):
        """Append a line. InputError, before anything is saved, where loss or gradient is not finite."""
        now, norms = time.perf_counter(), torch.stack(self.numbers["grad_norm"])
        everyone = gather({name: torch.stack(x).float().mean().item() for name, x in self.numbers.items()})
        line = {}
        for name in self.numbers:
            mean = sum(means[name] for means in everyone) / len(everyone)
            line |= {f"r{name}": math.sqrt(mean)} if name.startswith("ms_") else {name: mean}
        rate = len(norms) / (now - self.since)
        self.seconds += now - self.since
        line |= {"grad_norm_max": norms.nan_to_num(0, 0).max().item(), "lr": lr,
                 "samples_per_second": self.args.batch_size * rate, "seconds": self.seconds, **more}
        if norms.is_cuda:
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if is_first():
            rounded = {name: float(f"{x:.6g}") if math.isfinite(x) else None for name, x in line.items()}
            text = json.dumps({"step": step, **rounded})
            with open(Path(self.args.out, "log.jsonl"), "a") as file:
                file.write(text + "\n")
            self.bar.set_postfix(loss=line["loss"])
            if self.bar.disable:
                say(f"{text} {timedelta(seconds=round((self.args.steps - step) / rate))} left")
        if not math.isfinite(line["loss"] + line["grad_norm"]):
            raise InputError(f"loss or gradient is not finite at step {step}; not saved. Try a lower --lr or "
                             "--clip, or --precision fp32: the same command goes on from the last state")
        self.since, self.numbers = now, {}


def read_log(out):
    """The lines of a run's log.jsonl, in order of steps; of a step that was made again, the last."""
    lines, path = {}, Path(out, "log.jsonl")
    for text in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):                # a line that was cut; the next one follows on it
            line = json.loads(text[text.rindex('{"step"'):])
            lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]
