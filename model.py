"""The networks of MF-RAE, the time they live in, and the files they are kept in.

    DiTDH        the backbone: a flow-matching teacher v(z, t, y), or a few-step student h(z, t, s, y)
    ViTDecoder   latents -> images
    time_shift, ode_times, solve_ode, long_jumps        the clock, the probability-flow ODE and the student's jumps
    load_network, save_network, ...                     our folders, the published files, the Hub

Time t runs from 0 (data) to 1 (noise): z_t = (1 - t) z_0 + t eps. A teacher predicts the velocity v = E[eps - z_0 | z_t], a
student the mean velocity h over [s, t], s <= t (MeanFlow, arXiv 2505.13447; MF-RAE, arXiv 2511.13019). The backbone is that of
RAE (arXiv 2510.11690), its decoder too. Parameter names are those of the published checkpoints, so they load without a table.

Three of these names mislead: `s_embedder` and `s_projector` belong to the encoder tower and have nothing to do with the time s;
`r_embedder` embeds the time DIFFERENCE t - s (the published code calls our s "r").
"""
import errno
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # noqa: F401  now, not by DDP: imported later, its default arguments hold the group for ever
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# ---- Presets: (encoder tower, head) pairs; a size of your own is one more line here ------------------------------------------
DIT_PRESETS = {
    "DiTDH-XL": dict(hidden_size=(1152, 2048), depth=(28, 2), num_heads=(16, 16)),
    "DiTDH-B": dict(hidden_size=(768, 2048), depth=(12, 2), num_heads=(12, 16)),
    "DiTDH-S": dict(hidden_size=(384, 2048), depth=(12, 2), num_heads=(6, 16)),
    "DiTDH-mini": dict(hidden_size=(96, 160), depth=(4, 1), num_heads=(3, 5)),    # the sanity run's: a few CPU minutes
}
DECODER_PRESETS = {
    "ViT-XL": dict(hidden_size=1152, depth=28, num_heads=16, mlp_size=4096),
    "ViT-L": dict(hidden_size=1024, depth=24, num_heads=16, mlp_size=4096),
    "ViT-B": dict(hidden_size=768, depth=12, num_heads=12, mlp_size=3072),
    "ViT-mini": dict(hidden_size=192, depth=2, num_heads=4, mlp_size=768),        # the sanity run's
}
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)              # ImageNet's, as DINOv2 takes them


class InputError(Exception):
    """What the user gave is wrong. The message is one line: what is wrong, and what to do."""


def command(main):
    """Run a script's `main`; an InputError, or a GPU's memory running out, becomes one line on stderr and exit status 2."""
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except (InputError, torch.OutOfMemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{str(error).splitlines()[0]} Smaller --micro-batch (sample.py: --batch-size), or --checkpoint-activations"
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)     # not sys.exit: another process of the group may never come to the barrier that a clean exit waits at
    if dist.is_initialized():
        dist.destroy_process_group()              # here, where no frame holds the network: a Gloo thread left to the interpreter's
    sys.exit(status)                              # end aborts there now and then, and torchrun then kills the others


def provenance():
    """What a result needs to be made again: command, versions, commit if any, host, device, date."""
    import platform
    import shlex
    import subprocess
    from datetime import datetime, timezone
    try:
        commit = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:                               # no git here
        commit = ""
    return {"command": shlex.join(sys.argv), "python": platform.python_version(), "torch": torch.__version__, "commit": commit or None,
            "host": platform.node(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
            "processes": int(os.environ.get("WORLD_SIZE", 1)), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


def processes(precision="fp32"):
    """(world size, rank, device) of this process, by torchrun's environment. InputError: more processes than GPUs, a GPU without bf16."""
    world, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if not torch.cuda.is_available():
        return world, rank, torch.device("cpu")
    if local >= torch.cuda.device_count():
        raise InputError(f"process {local} of this machine has no GPU of its own: torchrun --nproc_per_node={torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError("this GPU has no bf16: --precision fp32")
    return world, rank, torch.device("cuda", local)


def generator(device, *key):
    """A torch.Generator on `device` that follows from `key` (numbers, strings) alone, through a hash: related keys, such as
    neighbouring steps, give unrelated streams."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def generators(device, rows, *key):
    """One for each block of four rows from start to stop of a global batch, which draws for these four: the same numbers however
    the batch is split over processes and micro-batches, as long as these hold multiples of four rows."""
    return [generator(device, *key, block) for block in range(rows[0] // 4, rows[1] // 4)]


# ---- Time --------------------------------------------------------------------------------------------------------------------
def default_time_shift(shape):
    """a = max(1, sqrt(C H W / 4096)) for a latent of shape (C, H, W): 6.93 at 768x16x16, 13.86 at 768x32x32 (RAE)."""
    return max(1.0, math.sqrt(math.prod(shape) / 4096))


def time_shift(u, a):
    """shift(u) = a u / (1 + (a - 1) u): [0, 1] -> [0, 1], towards 1 (noise) for a > 1. `u` a number or a tensor."""
    return a * u / (1 + (a - 1) * u)


def ode_times(steps, a):
    """The PF-ODE grid t_i = shift(1 - i / steps), i = 0 .. steps: from exactly 1 down to exactly 0, as a list of floats."""
    return [time_shift(1 - i / steps, a) for i in range(steps)] + [0.0]


def solve_ode(v, z, times, solver="euler"):
    """Follow dz/dt = v(z, t) from `z` at times[0] along `times`; returns the list of len(times) points, `z` among them.

    v: (B, C, H, W), (B,) -> (B, C, H, W); times: floats. `solver`: "euler", one evaluation of v a step, or "heun", two."""
    points = [z]
    for t, s in zip(times[:-1], times[1:], strict=True):
        v_t = v(z, z.new_full((len(z),), t))
        z_s = z - (t - s) * v_t
        if solver == "heun":
            z_s = z - (t - s) / 2 * (v_t + v(z_s, z.new_full((len(z),), s)))
        z = z_s
        points.append(z)
    return points


def guided(teacher, scale=1.0, interval=(0.0, 1.0), weak=None):
    """The guided velocity v_weak + scale (v - v_weak) where t is in `interval`, v itself elsewhere: a function (z, t, y).

    v_weak: the weaker teacher `weak` (autoguidance, arXiv 2406.02507), or the teacher without label (CFG, arXiv 2207.12598); intervals
    are arXiv 2404.07724's. A row that has no label is not changed by CFG. Costs two evaluations; scale 1 returns the teacher."""
    if scale == 1:
        if weak:
            raise InputError("--weak-teacher does nothing without --guidance W, W above 1")
        return teacher
    if interval[0] > interval[1]:
        raise InputError(f"--guidance-interval {interval[0]} {interval[1]}: the lower time comes first")
    if weak and (weak.shape != teacher.shape or weak.num_classes != teacher.num_classes):
        raise InputError(f"the weak teacher has latents {weak.shape} and {weak.num_classes} classes, the teacher {teacher.shape} and "
                         f"{teacher.num_classes}")

    def velocity(z, t, y):
        if weak:
            v, v_weak = teacher(z, t, y), weak(z, t, y)
        else:
            v, v_weak = teacher(torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, teacher.num_classes)])).chunk(2)
        w = torch.where((interval[0] <= t) & (t <= interval[1]), scale, 1.0)[:, None, None, None]
        return v_weak + w * (v - v_weak)
    return velocity


def long_jumps(h, z, times):
    """Few-step sampling, z_s = z_t - (t - s) h(z_t, t, s) for each pair of neighbours in `times` (MeanFlow, eq. 12).

    h: (B, C, H, W), (B,), (B,) -> (B, C, H, W). Published few-step times are NOT shifted: [1, 0] or [1, 0.5, 0]."""
    for t, s in zip(times[:-1], times[1:], strict=True):
        z = z - (t - s) * h(z, z.new_full((len(z),), t), z.new_full((len(z),), s))
    return z


# ---- Latent statistics: (mean, var), each (C, H, W) in float64 ---------------------------------------------------------------
def normalize(z, stats):
    """Raw latents (B, C, H, W) -> what the backbone sees: (z - mean) / sqrt(var + 1e-5), as float32."""
    mean, var = stats
    return (z.float() - mean.to(z.device).float()) / (var.to(z.device) + 1e-5).sqrt().float()


def denormalize(z, stats):
    """The inverse of `normalize`: what the decoder takes."""
    mean, var = stats
    return z.float() * (var.to(z.device) + 1e-5).sqrt().float() + mean.to(z.device).float()


# ---- Fixed tables: positions -------------------------------------------------------------------------------------------------
def sincos_positions(width, grid):
    """(grid * grid, width): the first half of the channels encodes the COLUMN, the second the ROW; each half [sin(p w), cos(p w)]
    with w_k = 10000^(-k / (width / 4)). Row-major over the grid; positions 0 .. grid - 1."""
    w = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width / 4))
    p = torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * w
    line = torch.cat([p.sin(), p.cos()], dim=1)                                   # (grid, width / 2)
    column, row = line.repeat(grid, 1), line.repeat_interleave(grid, 0)
    return torch.cat([column, row], dim=1).float()


class Rotary(nn.Module):
    """2-D rotary embedding: the first half of a head's channels turns by the token's ROW, the second by its COLUMN, in interleaved
    pairs (x0, x1) -> x cos + (-x1, x0) sin, frequencies 10000^(-2k / half)."""

    def __init__(self, head_width, grid):
        super().__init__()
        half = head_width // 2
        w = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64, device="cpu") / half)
        line = (torch.arange(grid, dtype=torch.float64, device="cpu")[:, None] * w).repeat_interleave(2, dim=1)
        row, column = line.repeat_interleave(grid, 0), line.repeat(grid, 1)
        angle = torch.cat([row, column], dim=1)                                   # (grid * grid, head_width)
        self.register_buffer("freqs_cos", angle.cos().float())
        self.register_buffer("freqs_sin", angle.sin().float())

    def forward(self, x):
        """x: (B, heads, N, head_width), queries or keys."""
        x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-x1, x0], dim=-1).flatten(-2)
        return (x * self.freqs_cos + turned * self.freqs_sin).type_as(x)


# ---- DiT-DH ------------------------------------------------------------------------------------------------------------------
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
        self.embedding_table = nn.Embedding(num_classes + 1, width)               # the last row is "no label"

    def forward(self, y):
        return self.embedding_table(y)


class TokenEmbedding(nn.Module):
    """A 1x1 convolution, (B, C, G, G) -> (B, N, d), computed as a matrix product: cuDNN's convolutions would use TF32."""

    def __init__(self, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=1)

    def forward(self, z):
        return F.linear(z.flatten(2).transpose(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, rotary):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)     # each (B, heads, N, D)
        x = F.scaled_dot_product_attention(rotary(q), rotary(k), v)
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
    """Fused, except where torch.compile traces: its kernels fuse the formula as well, and the fused operator's forward-mode derivative
    cannot be traced on a GPU (torch 2.11: an internal assertion)."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return super().forward(x)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def modulation(width, parts):
    """condition -> `parts` shifts, scales and gates; zero at the start, so that a block is the identity (AdaLN-Zero, DiT)."""
    layer = nn.Linear(width, parts * width)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.SiLU(), layer)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width, eps=1e-6), RMSNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), SwiGLU(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, condition, rotary):
        """x: (B, N, d); condition: (B, 1, d), or (B, N, d) when each token has its own."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, rotary)
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


class DiTDH(nn.Module):
    """DiT with a wide diffusion head over G x G latent tokens (RAE, section 5; DDT, arXiv 2504.05741).

    The encoder tower sees time and label and makes one condition per token; the shallow, wide head sees the noisy latent again and
    is conditioned by these. hidden_size, depth, num_heads: pairs (encoder tower, head). time_difference: False, a teacher
    v(z, t, y); True, a student h(z, t, s, y), which starts as exactly the teacher whose weights it is given."""

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, num_classes, time_difference=False):
        super().__init__()
        (width, head_width), self.depth = hidden_size, tuple(depth)
        self.num_classes, self.shape = num_classes, (in_channels, input_size, input_size)
        self.checkpoint_activations = False
        self.pos_embed = nn.Parameter(sincos_positions(width, input_size)[None], requires_grad=False)
        self.s_embedder = TokenEmbedding(in_channels, width)
        self.x_embedder = TokenEmbedding(in_channels, head_width)
        self.s_projector = nn.Linear(width, head_width) if width != head_width else nn.Identity()
        self.t_embedder = FourierEmbedding(width)
        self.r_embedder = FourierEmbedding(width) if time_difference else None
        self.y_embedder = LabelEmbedding(num_classes, width)
        self.enc_feat_rope = Rotary(width // num_heads[0], input_size)
        self.dec_feat_rope = Rotary(head_width // num_heads[1], input_size)
        self.blocks = nn.ModuleList([Block(width, num_heads[0]) for _ in range(depth[0])]
                                    + [Block(head_width, num_heads[1]) for _ in range(depth[1])])
        self.final_layer = FinalLayer(head_width, in_channels)
        for embedder in (self.s_embedder, self.x_embedder):
            nn.init.xavier_uniform_(embedder.proj.weight.view(len(embedder.proj.weight), -1))
            nn.init.zeros_(embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        if time_difference:                       # e_d = 0 at first: h(z, t, s, y) = v(z, t, y) of the teacher, for every s
            nn.init.zeros_(self.r_embedder.mlp[2].weight)
            nn.init.zeros_(self.r_embedder.mlp[2].bias)

    def forward(self, z, t, y, s=None):
        """z: (B, C, G, G) normalized latents; t, s: (B,) in [0, 1], s <= t; y: (B,) int, num_classes meaning "no label".

        Returns (B, C, G, G): the velocity (teacher) or the mean velocity over [s, t] (student). ValueError for a student
        without s or a teacher with it."""
        if (s is None) != (self.r_embedder is None):
            raise ValueError("a teacher takes (z, t, y), a student (z, t, y, s)")
        e_t = self.t_embedder(t)
        if s is not None:
            e_t = e_t + self.r_embedder(t - s)
        c = F.silu(e_t + self.y_embedder(y))[:, None]
        x = self.s_embedder(z) + self.pos_embed
        for block in self.blocks[:self.depth[0]]:
            x = self.run(block, x, c, self.enc_feat_rope)
        q = self.s_projector(F.silu(e_t[:, None] + x))
        x = self.x_embedder(z).type_as(x)         # under autocast too, the residual stream stays in float32
        for block in self.blocks[self.depth[0]:]:
            x = self.run(block, x, q, self.dec_feat_rope)
        return self.final_layer(x, q).transpose(1, 2).unflatten(2, z.shape[2:])

    def run(self, block, *inputs):
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


# ---- ViT decoder (MAE style): de-normalized latents -> images ----------------------------------------------------------------
class DecoderLayer(nn.Module):
    """A pre-norm ViT block whose parameters carry the names of the published files, those of a Hugging Face ViTMAE layer."""

    def __init__(self, width, heads, mlp_size):
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({
            "attention": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": nn.ModuleDict({"dense": nn.Linear(width, width)})})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, mlp_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp_size, width)})
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x):
        u = self.layernorm_before(x)
        q, k, v = (self.attention["attention"][name](u).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name in ("query", "key", "value"))
        u = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](u)
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))


class ViTDecoder(nn.Module):
    """(B, C, G, G) de-normalized latents -> (B, 3, G * patch, G * patch) images, nominally in [0, 1], not clipped."""

    def __init__(self, input_size, in_channels, hidden_size, depth, num_heads, mlp_size, patch_size=16):
        super().__init__()
        self.patch_size, self.shape = patch_size, (in_channels, input_size, input_size)
        self.decoder_embed = nn.Linear(in_channels, hidden_size)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        positions = torch.cat([torch.zeros(1, hidden_size, device="cpu"), sincos_positions(hidden_size, input_size)])
        self.decoder_pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.decoder_layers = nn.ModuleList([DecoderLayer(hidden_size, num_heads, mlp_size) for _ in range(depth)])
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=1e-12)
        self.decoder_pred = nn.Linear(hidden_size, 3 * patch_size ** 2)

    def forward(self, z):
        x = self.decoder_embed(z.flatten(2).transpose(1, 2))
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        x = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        p, grid = self.patch_size, self.shape[1]
        x = x.unflatten(2, (p, p, 3)).unflatten(1, (grid, grid))                  # (B, row, column, p, p, colour)
        x = x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3).float()
        return x * x.new_tensor(IMAGE_STD)[:, None, None] + x.new_tensor(IMAGE_MEAN)[:, None, None]


# ---- Files: every file of ours is whole or absent, and says when it was damaged ----------------------------------------------
def write_atomically(path, write):
    """`write(temporary path)`, then fsync and rename: `path` holds the old contents or the new, never half of them."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.umask(mask := os.umask(0))
        beside.chmod(0o666 & ~mask)               # safetensors' own mode would keep other users of a cluster out
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)                                                          # the rename itself
        os.close(folder)
    except Exception as error:
        beside.unlink(missing_ok=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            hint = "make space, then go on as after an interruption" if full else "look at the folder and its free space"
            raise InputError(f"cannot write {path} ({error}): {hint}") from error
        raise


def write_json(path, content, digest=True):
    """A dict as JSON, atomically, with the digest of its text as its last entry, unless the file is for other programs."""
    if digest:
        content = {**content, "sha256": hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()}
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1) + "\n"))


def read_json(path):
    """The dict of `write_json`, or of another's file, which has no digest. InputError: missing, or not what was written."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    digest = content.pop("sha256", None)
    if digest and digest != hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest():
        raise InputError(f"{path} has changed since it was written: restore it, or remove its entry sha256 if the change is meant")
    return content


def digest_of(tensors, metadata=None):
    """sha256 over names, types, shapes and contents, and the other entries of the header."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode() if metadata else b"")
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_tensors(path, tensors, metadata=None):
    """Tensors as a safetensors file, atomically, with the digest of the contents in its header; returns the digest."""
    from safetensors.torch import save_file
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    digest = digest_of(tensors, metadata)
    write_atomically(path, lambda beside: save_file(tensors, beside, {**(metadata or {}), "sha256": digest}))
    return digest


def read_tensors(path, device="cpu", check=True):
    """-> (tensors, metadata). InputError where the file is missing, cut, or not what its own digest says; files of others, which
    have no digest, are taken as they are. check=False: without reading the contents; the tensors are maps of the file."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} ({error}): it is missing, cut short or no safetensors file") from error
    others = {name: value for name, value in metadata.items() if name != "sha256"}
    if check and "sha256" in metadata and digest_of(tensors, others) != metadata["sha256"]:
        raise InputError(f"{path} is damaged: its contents are not those that were written; restore or remake it")
    return {name: tensor.to(device) for name, tensor in tensors.items()}, metadata


# ---- Networks in files -------------------------------------------------------------------------------------------------------
def save_network(folder, state, config, stats):
    """A network's folder, enough to sample from: config.json, latent_stats.safetensors, model.safetensors (written last).

    config: {"kind": "teacher" | "student" | "decoder", "network": the constructor's arguments, ...}; stats: (mean, var)."""
    folder = Path(folder)
    write_json(folder / "config.json", config)
    write_tensors(folder / "latent_stats.safetensors", {"mean": stats[0], "var": stats[1]})
    write_tensors(folder / "model.safetensors", state)


def find(source):
    """A local path, or `organization/repository[/path/inside]` on the Hugging Face Hub (its offline cache is honoured)."""
    path, parts = Path(source), str(source).split("/")
    if path.exists():
        return path
    if len(parts) < 2 or any(part in ("", ".", "..") for part in parts) or parts[0] == "runs":
        maker = {"runs/teacher": "train_teacher.py", "runs/cmt": "train_cmt.py", "runs/meanflow": "train_meanflow.py"}.get(str(source))
        raise InputError(f"{source} does not exist" + (f": python {maker} makes it" if maker else ""))
    from huggingface_hub import hf_hub_download, snapshot_download
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if path.suffix in (".pt", ".safetensors"):
            return Path(hf_hub_download(repository, inside))
        return Path(snapshot_download(repository, allow_patterns=[f"{inside}/*"] if inside else ["*.json", "*.safetensors"])) / inside
    except Exception as error:                    # the Hub's client has a dozen kinds: offline, absent, forbidden, ...
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source} is neither here nor could it be had from the Hub ({reason})") from error


def read_plain(path):
    """What a .safetensors or .pt file holds. Never unpickles objects."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                    # torch raises half a dozen types for cut files and refused pickles
        raise InputError(f"{path} is no file of plain tensors ({type(error).__name__}): cut short, or a pickle that would run "
                         "code, which is refused") from error


def read_state(path):
    """State dict of a published .pt (bare, or under "ema" or "model") or .safetensors file."""
    state = read_plain(path)
    if isinstance(state, dict):
        state = state.get("ema", state.get("model", state))
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise InputError(f"{path} holds no state dict (name -> tensor), neither bare nor under 'ema' or 'model'")
    return state


def load_strictly(net, state, new=""):
    """Copy `state` into `net`, every tensor of it. InputError lists what is missing, unexpected or misshapen, with both shapes.

    new: prefix of the tensors that may be absent or of another shape and stay as initialized (printed)."""
    own = net.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    fresh = [name for name in own if new and name.startswith(new) and shapes.get(name) != tuple(own[name].shape)]
    wrong = [f"{name} is missing {tuple(tensor.shape)}" for name, tensor in own.items() if name not in shapes | dict.fromkeys(fresh)]
    wrong += [f"{name} is unexpected {shape}" for name, shape in shapes.items() if name not in own]
    wrong += [f"{name} is {shape}, wanted {tuple(own[name].shape)}" for name, shape in shapes.items()
              if name in own and name not in fresh and shape != tuple(own[name].shape)]
    if wrong:
        raise InputError(f"the weights do not fit, {len(wrong)} tensors: " + "; ".join(wrong[:12]) + ("; ..." if wrong[12:] else ""))
    for name in own:
        # A later RAE release trains its position tables, so they come from the file too; say so when they are not the computed ones.
        if name.endswith(("pos_embed", "freqs_cos", "freqs_sin")) and (state[name].float() - own[name]).abs().max() > 1e-4:
            print(f"note: {name} differs from the computed table; the file's is used")
    if fresh:
        print(f"new, not from the file: {', '.join(fresh)}")
    net.load_state_dict({name: own[name] if name in fresh else state[name] for name in own})


def dit_arguments(state):
    """The constructor's arguments of a published DiT-DH, read off the shapes of its tensors."""
    try:
        width, channels = state["s_embedder.proj.weight"].shape[:2]
        head_width = state["x_embedder.proj.weight"].shape[0]
        widths = [state[name].shape[0] for name in state if name.startswith("blocks.") and name.endswith(".norm1.weight")]
        head_depth = widths.count(head_width) if width != head_width else 2
        return dict(input_size=math.isqrt(state["pos_embed"].shape[1]), in_channels=channels, hidden_size=(width, head_width),
                    depth=(len(widths) - head_depth, head_depth),
                    num_heads=tuple(w // state[f"{tower}_feat_rope.freqs_cos"].shape[1]
                                    for w, tower in ((width, "enc"), (head_width, "dec"))),
                    num_classes=len(state["y_embedder.embedding_table.weight"]) - 1)
    except KeyError as error:
        raise InputError(f"not a DiT-DH: its state dict has no {error}") from error


def load_network(source, kind=None, new="", num_classes=None):
    """A teacher or student from one of our folders, a published .pt or .safetensors file, or the Hub.

    kind: "teacher", "student", or None for either. new: see `load_strictly`; "r_embedder." lets a teacher's weights start a student,
    "y_embedder." together with num_classes an own label table. Returns (net on the CPU, config, stats or None)."""
    path, config, stats = find(source), {}, None
    if path.is_dir():
        config, stats = read_json(path / "config.json"), load_stats(path / "latent_stats.safetensors")
        state = read_state(path / "model.safetensors")
    else:
        state = read_state(path)
    has = config.get("kind") or ("student" if "r_embedder.W" in state else "teacher")
    kind = kind or has
    if has not in ("teacher", "student"):
        raise InputError(f"{source} is a {has}, a teacher or a student is needed here")
    if has != kind and not (has == "teacher" and new == "r_embedder."):
        raise InputError(f"{source} is a {has}, a {kind} is needed here"
                         + (": python train_cmt.py makes one from it" if (has, kind) == ("teacher", "student") else ""))
    arguments = {**(config.get("network") or dit_arguments(state)), "time_difference": kind == "student"}
    if num_classes:
        arguments["num_classes"] = num_classes
        state = {name: tensor for name, tensor in state.items() if not name.startswith("y_embedder.")}
    net = DiTDH(**arguments)
    load_strictly(net, state, new)
    config = {"time_shift": default_time_shift(net.shape), **config, "kind": kind, "network": arguments}
    return net, config, stats


def load_decoder(source):
    """A ViTDecoder from one of our folders, a published .pt file, an `AutoencoderRAE` folder of diffusers, or the Hub.

    Returns (decoder on the CPU, stats or None)."""
    path, config, stats = find(source), {}, None
    if path.is_dir():
        config = read_json(path / "config.json")
        if config.get("_class_name") == "AutoencoderRAE":
            return decoder_from_diffusers(read_state(path / "diffusion_pytorch_model.safetensors"), config)
        if config.get("kind") != "decoder":
            raise InputError(f"{source} is a {config.get('kind')}, not a decoder")
        state, stats = read_state(path / "model.safetensors"), load_stats(path / "latent_stats.safetensors")
    else:
        state = read_state(path)
    decoder = ViTDecoder(**(config.get("network") or decoder_arguments(state)))
    load_strictly(decoder, state)
    return decoder, stats


def decoder_arguments(state):
    try:
        width, channels = state["decoder_embed.weight"].shape
        preset = next(sizes for sizes in DECODER_PRESETS.values() if sizes["hidden_size"] == width)
        patch_size = math.isqrt(len(state["decoder_pred.bias"]) // 3)
        return dict(input_size=math.isqrt(state["decoder_pos_embed"].shape[1] - 1), in_channels=channels, patch_size=patch_size, **preset)
    except (KeyError, StopIteration) as error:
        raise InputError("not a decoder of a known size: see DECODER_PRESETS in model.py") from error


DIFFUSERS_NAMES = (("attention.attention.query", "attention.to_q"), ("attention.attention.key", "attention.to_k"),
                   ("attention.attention.value", "attention.to_v"), ("attention.output.dense", "attention.to_out.0"))


def decoder_from_diffusers(tensors, config):
    """(decoder, stats or None) from the tensors and config.json of an `AutoencoderRAE` folder. It stores sqrt(var + 1e-5)."""
    state = {name.removeprefix("decoder."): tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
    for ours, theirs in DIFFUSERS_NAMES:
        state = {name.replace(theirs, ours): tensor for name, tensor in state.items()}
    decoder = ViTDecoder(config["encoder_input_size"] // config["encoder_patch_size"], config["encoder_hidden_size"],
                         config["decoder_hidden_size"], config["decoder_num_hidden_layers"], config["decoder_num_attention_heads"],
                         config["decoder_intermediate_size"], config["patch_size"])
    load_strictly(decoder, {"decoder_pos_embed": decoder.decoder_pos_embed.detach()} | state)     # the table is not always stored
    mean, std = (tensors[name].double() for name in ("_latents_mean", "_latents_std"))
    return decoder, None if std.numel() == 1 else (mean.expand(decoder.shape).clone(), std.square() - 1e-5)


def export_autoencoder(folder, decoder, stats, encoder):
    """Encoder (encode_latents.Encoder), decoder and statistics as a folder that diffusers' AutoencoderRAE.from_pretrained loads.

    That class (diffusers 0.42) builds its position table for a 16 x 16 base, adds 1e-5 to the stored deviation again, and makes
    its encoder with heads of 64 channels and positions for 518 px: InputError for an encoder unlike that."""
    net = encoder.net.config
    if net.hidden_size != 64 * net.num_attention_heads or net.image_size != 518 or encoder.shape != decoder.shape:
        raise InputError(f"AutoencoderRAE cannot hold the encoder {encoder.source}: it wants DINOv2's heads of 64 channels, its positions "
                         f"for 518 px, and the decoder's latents {decoder.shape}")
    if decoder.shape[1] != 16:
        print(f"warning: at {decoder.shape[1]} x {decoder.shape[1]} tokens AutoencoderRAE of diffusers 0.42 uses other positions than "
              "RAE's (those of a 16 x 16 base): it will decode differently")
    tensors = {f"encoder.{name}": tensor for name, tensor in encoder.net.state_dict().items()}
    for name, tensor in decoder.state_dict().items():
        for ours, theirs in DIFFUSERS_NAMES:
            name = name.replace(ours, theirs)
        tensors[f"decoder.{name}"] = tensor
    del tensors["decoder.decoder_pos_embed"]
    tensors |= {"encoder_mean": torch.tensor(IMAGE_MEAN).view(1, 3, 1, 1), "encoder_std": torch.tensor(IMAGE_STD).view(1, 3, 1, 1),
                "_latents_mean": stats[0].float(), "_latents_std": (stats[1] + 1e-5).sqrt().float()}
    layer = decoder.decoder_layers[0]
    write_json(Path(folder) / "config.json", {
        "_class_name": "AutoencoderRAE", "encoder_type": "dinov2", "encoder_hidden_size": net.hidden_size,
        "encoder_patch_size": net.patch_size, "encoder_num_hidden_layers": net.num_hidden_layers,
        "encoder_input_size": encoder.encoder_size, "patch_size": decoder.patch_size,
        "decoder_hidden_size": decoder.decoder_embed.out_features, "decoder_num_hidden_layers": len(decoder.decoder_layers),
        "decoder_num_attention_heads": layer.heads, "decoder_intermediate_size": layer.intermediate["dense"].out_features,
        "latents_mean": stats[0].float().tolist(), "latents_std": tensors["_latents_std"].tolist()}, digest=False)
    write_tensors(Path(folder) / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})


def load_stats(source, shape=None):
    """(mean, var), float64, each (C, H, W), `shape` where given, from a latent_stats.safetensors, a folder that holds one, or a
    published stat.pt, whose mean may be None: it stands for 0, and the published networks were trained so."""
    path = find(source)
    path = path / "latent_stats.safetensors" if path.is_dir() else path
    tensors = read_plain(path)
    if not isinstance(tensors, dict) or not isinstance(tensors.get("var"), torch.Tensor):
        raise InputError(f"{path} holds no latent statistics (mean, var)")
    var, mean = tensors["var"].double(), tensors.get("mean")
    mean = torch.zeros_like(var) if mean is None else mean.double()
    shape = tuple(shape or var.shape)
    for part in (mean, var):
        if tuple(part.shape) != shape:
            raise InputError(f"{path} holds statistics {tuple(part.shape)}, needed are {shape}: of another encoder or size of images?")
    return mean, var
