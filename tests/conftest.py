"""What the tests share: our files on the path, no GPU unless asked for, the published figures' weights."""
import json
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")    # spinning threads take the core from each other

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(2)

# Tests compare to the bit, and start more processes than there are GPUs: they see none. See test_gpu.py.
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
if GPU := torch.cuda.is_available():
    torch.cuda.init()    # and count, before the variable changes
    torch.cuda.device_count()
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.cuda.is_available = lambda: False


@pytest.fixture
def gpu(monkeypatch):
    if not GPU:
        pytest.skip("no GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if VISIBLE is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)
    return torch.device("cuda")


def uniform(name, shape):
    """Doubles in [-1, 1) that follow from the name alone."""
    g = numpy.random.Generator(numpy.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(2 * g.random(tuple(shape)) - 1)


def fill(net, prefix):
    """Give a network the weights of the published figures, in float32, then double precision."""
    for name, parameter in net.named_parameters():
        if name.endswith("pos_embed"):
            continue
        u = uniform(f"{prefix}.{name}", parameter.shape)
        if name.endswith(".W"):
            u = 2 * u
        elif "norm" in name and name.endswith(".weight"):
            u = 1 + 0.1 * u
        elif parameter.dim() >= 2 and not name.endswith("trainable_cls_token"):
            u = u * (3 / parameter[0].numel()) ** 0.5
        else:
            u = 0.1 * u
        parameter.data.copy_(u.float())
    return net.double()


@pytest.fixture(scope="session")
def figures():
    return json.loads((HERE / "parity.json").read_text())


@pytest.fixture(scope="session")
def published(figures):
    """Teacher and student of the published figures, and their inputs."""
    from model import DiTDH
    names = ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")
    sizes = {name: figures["config"][name] for name in names}
    z, eps = (3 ** 0.5 * uniform(name, (4, 8, 4, 4)) for name in ("z", "eps"))
    t, s = (torch.tensor(figures["inputs"][name], dtype=torch.double) for name in ("t", "r"))
    teacher, student = DiTDH(**sizes), DiTDH(**sizes, time_difference=True)
    return dict(teacher=fill(teacher, "teacher"), student=fill(student, "student"),
                z=z, eps=eps, t=t, s=s, y=torch.tensor(figures["inputs"]["y"]))


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Images, latents, a teacher and a CMT student, each made by its own script."""
    from runs import encode, lively, random_images, save_network, train
    home = tmp_path_factory.mktemp("home")
    random_images(home / "images")
    encode(home)
    save_network(home / "start", lively(), {}, None)
    train(home, "teacher", f"{home}/teacher", "--steps", "8", "--init", f"{home}/start")
    train(home, "cmt", f"{home}/cmt")
    return home
