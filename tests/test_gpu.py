"""On a GPU: the losses are the CPU's, float32 is float32, and every stage runs in its default precision."""
import copy

import numpy
import pytest
import torch
from runs import encode, log, random_images, save_decoder, train

import sample
from model import Log, jvp_by_parts
from train_meanflow import meanflow_loss


def loss_and_gradient(published, device, derivative, autocast=False):
    h, v = (copy.deepcopy(published[name]).float().to(device) for name in ("student", "teacher"))
    z, eps, t, s = (published[name].float().to(device) for name in ("z", "eps", "t", "s"))
    y = published["y"].to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss, _ = meanflow_loss(h, v, z, eps, t, y, s, derivative=derivative, loss_form="mean",
                                loss_power=0.0, jvp=jvp_by_parts)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in h.parameters() if p.grad is not None])


@pytest.mark.parametrize("derivative", ["jvp", "fd"])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_are_the_cpus(published, gpu, derivative, autocast):
    """Float32 to rounding, which a finite difference divides by delta_t: in TF32 that would be more than a
    percent. bf16 to its own."""
    loss, gradient = loss_and_gradient(published, torch.device("cpu"), derivative)
    torch.set_float32_matmul_precision("high" if derivative == "fd" and autocast else "highest")
    try:
        on_gpu, its = loss_and_gradient(published, gpu, derivative, autocast)
    finally:
        torch.set_float32_matmul_precision("highest")
    tolerance = 3e-2 if autocast else 1e-3 if derivative == "fd" else 1e-5
    assert on_gpu == pytest.approx(loss, rel=tolerance)
    assert (its - gradient).norm() < 2 * tolerance * gradient.norm()


def test_stages_and_sampling(gpu, tmp_path, monkeypatch):
    """Every stage in bf16; going on; three ways to take the derivative agree; images are the CPU's."""
    random_images(tmp_path / "images")
    encode(tmp_path)
    for stage, out, more in (("teacher", "teacher", ""), ("cmt", "cmt", ""), ("meanflow", "exact", ""),
                             ("meanflow", "fd", "--derivative fd"), ("meanflow", "compiled", "--compile")):
        out, more = tmp_path / out, f"--precision bf16 {more}"
        train(tmp_path, stage, out, more)
        assert len(log(out)) == 6 and all(line["memory_gb"] > 0 for line in log(out)), stage
        train(tmp_path, stage, out, more, "--steps 7")    # goes on
        assert log(out)[-1]["step"] == 7
    losses = [log(tmp_path / out)[0]["loss"] for out in ("exact", "fd", "compiled")]
    assert max(losses) < 1.02 * min(losses), losses
    nothing_waits(tmp_path, monkeypatch)

    save_decoder(tmp_path, tmp_path / "decoder")
    images = []
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        out = tmp_path / f"{available}.npz"
        sample.main([f"{tmp_path}/teacher", "--decoder", f"{tmp_path}/decoder", "--out", str(out),
                     *"--nfe 4 --num-samples 20".split()])
        images.append(numpy.load(out)["arr_0"].astype(int))
    assert abs(images[0] - images[1]).max() <= 1


def nothing_waits(home, monkeypatch):
    """Torch raises where a step would synchronize; the log, each third step, may. Not run on a GPU yet."""
    def writing(*args, write=Log.write):
        torch.cuda.set_sync_debug_mode("default")
        write(*args)
        torch.cuda.set_sync_debug_mode("error")
    monkeypatch.setattr(Log, "write", writing)
    try:
        train(home, "meanflow", home / "out", "--precision bf16 --log-every 3 --save-every 0")
    finally:
        torch.cuda.set_sync_debug_mode("default")
