"""What the tests share: our files on the path, no GPU but where a test asks for it, and the published figures' weights."""
import json
import os
import signal
import sys
import zlib
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # spinning threads take the core from each other on a busy machine

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
torch.set_num_threads(2)

# Tests compare to the bit, and start more processes than there are GPUs: they see none. See test_gpu.py.
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
if GPU := torch.cuda.is_available():
    torch.cuda.init()                             # and count, before the variable changes
    torch.cuda.device_count()
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.cuda.is_available = lambda: False


@pytest.fixture
def gpu(monkeypatch):
    if not GPU:
        pytest.skip("no GPU here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if VISIBLE is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
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
        with torch.no_grad():
            parameter.copy_(u.float())
    return net.double()


@pytest.fixture(autouse=True)
def signals():
    """As in a shell, whatever started the tests (nohup, `&`); a stage that ran in one catches no more after it."""
    caught = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = [(number, signal.getsignal(number)) for number in caught]
    for number in caught:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def figures():
    return json.loads((HERE / "parity.json").read_text())


@pytest.fixture(scope="session")
def published(figures):
    """Teacher and student of the published figures, and their inputs."""
    from model import DiTDH
    c = figures["config"]
    sizes = {k: c[k] for k in ("input_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes")}
    teacher = fill(DiTDH(**sizes), "teacher")
    student = fill(DiTDH(**sizes, time_difference=True), "student")
    z, eps = (3 ** 0.5 * uniform(name, (4, 8, 4, 4)) for name in ("z", "eps"))
    t, s, y = (torch.tensor(figures["inputs"][name], dtype=dtype) for name, dtype in
               (("t", torch.double), ("r", torch.double), ("y", torch.long)))
    return dict(teacher=teacher, student=student, z=z, eps=eps, t=t, s=s, y=y)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Images, latents, a teacher and a CMT student, each made by its own script."""
    from runs import encode, random_images, train
    home = tmp_path_factory.mktemp("home")
    random_images(home / "images")
    encode(home)
    train(home, "teacher", f"{home}/teacher", "--steps", "8")
    train(home, "cmt", f"{home}/cmt")
    return home
