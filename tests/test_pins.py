"""What mutations of the code once got past every other test: the optimizer's step replayed by hand from the
saved states, what is saved, details of sampling and of precision and recall."""
import json
import os
import signal
import time
from pathlib import Path

import numpy
import pytest
import torch

import encode_latents
import eval_fid
import model
import sample
import train_cmt
import train_meanflow
import train_teacher
from runs import STAGES, TINY, arguments, lively, log, run_on, save_decoder, state, train, watch
from sanity import random_encoder
from test_eval_fid import Small, draw



def parts_of(folder, step):
    """{"net": {parameter: tensor}, "ema": ..., "exp_avg": ..., "exp_avg_sq": ...} after a step, in double precision."""
    return {part.removeprefix("optimizer/"): {name: tensor.double() for name, tensor in tensors.items()}
            for part, tensors in state(folder, step).items()}


@pytest.mark.parametrize("clip", [0.01, 100])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_replayed(home, tmp_path, stage, clip):
    """From a state to the next: AdamW with betas (0.9, 0.95) and no weight decay, on the gradient clipped to
    --clip; then average <- ema average + (1 - ema) net. The states give the gradient: m' = 0.9 m + 0.1 g."""
    start = [] if stage == "teacher" else ["--teacher", lively(home, tmp_path / "teacher")]
    train(home, stage, tmp_path / "out", "--steps", "4", "--save-every", "1", "--ema", "0.8", "--clip", clip,
          "--lr-final", "5e-4", *start)
    lines, before = log(tmp_path / "out"), parts_of(tmp_path / "out", 1)
    assert all(0.02 < line["grad_norm"] < 50 for line in lines)                   # all are clipped, or none
    assert len({line["lr"] for line in lines}) > 1
    for step in (2, 3, 4):
        after, line = parts_of(tmp_path / "out", step), lines[step - 1]
        trained = after["exp_avg"].keys()
        assert trained == after["exp_avg_sq"].keys() < after["net"].keys() == after["ema"].keys()
        g = {name: (after["exp_avg"][name] - 0.9 * before["exp_avg"][name]) / 0.1 for name in trained}
        norm = torch.cat([x.flatten() for x in g.values()]).norm().item()
        assert norm == pytest.approx(min(clip, line["grad_norm"]), rel=1e-4)
        for name in trained:
            p, square = before["net"][name].clone().requires_grad_(), after["exp_avg_sq"][name]
            p.grad = g[name]
            optimizer = torch.optim.AdamW([p], lr=line["lr"], betas=(0.9, 0.95), weight_decay=0.0)
            optimizer.state[p] = {key: before[key][name].clone() for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p]["step"] = torch.tensor(step - 1.0)
            optimizer.step()
            wanted = optimizer.state[p]["exp_avg_sq"]
            torch.testing.assert_close(square, wanted, rtol=1e-4, atol=1e-6 * wanted.max().item())
            # weight decay of 0.01 would take 1e-5 of a weight at this learning rate
            torch.testing.assert_close(after["net"][name], p.detach(), rtol=1e-6, atol=1e-6)
            average = 0.8 * before["ema"][name] + 0.2 * after["net"][name]
            torch.testing.assert_close(after["ema"][name], average, rtol=1e-6, atol=1e-7)
        before = after


@pytest.mark.parametrize("stage", STAGES)
def test_a_state_as_a_network_is_the_average(home, tmp_path, stage):
    """What the next stage and sample.py read."""
    train(home, stage, tmp_path, "--steps", "2", "--ema", "0.5")
    last = state(tmp_path)
    assert last["ema"].keys() == last["net"].keys() > last["optimizer/exp_avg"].keys()
    assert sum(not torch.equal(x, last["net"][name]) for name, x in last["ema"].items()) > 5  # zeros keep others still
    for source in (tmp_path, tmp_path / "state_00000002.safetensors"):
        loaded = model.load_network(source)[0].state_dict()
        assert all(torch.equal(x, loaded[name]) for name, x in last["ema"].items())


def test_heun_takes_half_as_many_steps():
    """--nfe counts evaluations: four are two steps of Heun's method, here by hand on the grid 1, 3/4, 0."""
    torch.manual_seed(0)
    net = model.DiTDH(**TINY, input_size=4, in_channels=12, num_classes=3)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    seen = []
    net.register_forward_hook(lambda module, arguments, output: seen.append(len(output)))
    z, y = torch.randn(2, 12, 4, 4), torch.tensor([0, 2])
    with torch.no_grad():
        by_hand, times = z, (1.0, 0.75, 0.0)
        for t, s in zip(times[:2], times[1:], strict=True):
            v_t = net(by_hand, torch.full((2,), t), y)
            v_s = net(by_hand + (s - t) * v_t, torch.full((2,), s), y)
            by_hand = by_hand + (s - t) * (v_t + v_s) / 2
        for nfe in (2, 4, 10):
            seen.clear()
            out = sample.generate(net, z, y, nfe, solver="heun", shift=3.0)
            assert seen == [2] * nfe
            assert torch.allclose(out, by_hand, rtol=1e-5, atol=1e-5) == (nfe == 4)
        euler = sample.generate(net, z, y, 4, solver="euler", shift=3.0)
    assert not torch.allclose(euler, by_hand, atol=1e-3)


def test_pixels_are_rounded_and_truncated_on_request():
    levels = torch.arange(256.0).repeat(3, 1).view(1, 3, 16, 16)
    wanted = levels.permute(0, 2, 3, 1).to(torch.uint8)
    for off in (-0.45, -0.2, 0.0, 0.2, 0.45):
        assert torch.equal(sample.to_uint8((levels + off) / 255), wanted)
    up = (wanted.int() + 1).clamp(max=255).to(torch.uint8)
    assert torch.equal(sample.to_uint8((levels + 0.55) / 255), up)
    assert torch.equal(sample.to_uint8((levels + 0.9) / 255, truncate=True), wanted)
    ends = sample.to_uint8(torch.tensor([-1.0, 2.0, 0.5])[None, :, None, None])
    assert ends.dtype == torch.uint8 and ends.tolist() == [[[[0, 255, 128]]]]


def test_each_image_has_its_own_noise():
    """520 images, 520 noises, whatever the batches; the labels that are drawn have no period either."""
    z, y = sample.noise_and_labels(range(520), 0, (2, 3, 3), 1000, "random")
    assert len(z.flatten(1).unique(dim=0)) == 520 and len(y.unique()) > 350       # 405 are expected
    far = [64, 4096, 49_999, 50_000, 65_536, 2**20]
    other, labels = sample.noise_and_labels([7, *far], 0, (2, 3, 3), 1000, "random")
    assert torch.equal(other[:2], z[[7, 64]]) and torch.equal(labels[:2], y[[7, 64]])
    assert len(torch.cat([z[:64], other[1:]]).flatten(1).unique(dim=0)) == 64 + len(far)
    assert not torch.equal(sample.noise_and_labels([0], 1, (2, 3, 3), 1000, "random")[0], z[:1])
    assert abs(z.mean()) < 0.05 and abs(z.std() - 1) < 0.05
    for kind, wanted in (("equal", [i % 3 for i in range(70)]), ([2, 0], 35 * [2, 0])):
        assert sample.noise_and_labels(range(70), 0, (1,), 3, kind)[1].tolist() == wanted


def test_noise_and_rounding_of_sampled_images(home, tmp_path):
    """Through sample.py: 70 images of one class differ, and half of their pixels lose by --truncate."""
    save_decoder(home, tmp_path / "decoder")
    images = []
    for name, more in (("rounded", []), ("truncated", ["--truncate"])):
        sample.main([f"{home}/cmt", "--decoder", f"{tmp_path}/decoder", "--num-samples", "70", "--labels",
                     "1", "--batch-size", "35", "--out", f"{tmp_path}/{name}.npz", *more])
        images.append(numpy.load(tmp_path / f"{name}.npz")["arr_0"].astype(int))
    rounded, truncated = images
    assert len(numpy.unique(rounded.reshape(70, -1), axis=0)) == 70
    not_clipped = (truncated > 0) & (truncated < 255)
    assert set(numpy.unique(rounded - truncated)) == {0, 1}
    assert not_clipped.any() and 0.4 < (rounded - truncated)[not_clipped].mean() < 0.6


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_precision_sees_evenly_spread_reference_images(tmp_path):
    """--pr-images of a reference, which is sorted by class, come from all of it: with even gaps."""
    torch.jit.script(Small()).save(tmp_path / "net.pt")
    numpy.savez(tmp_path / "reference.npz", arr_0=draw(31, 1))

    def features(count):
        """Which features --save-statistics keeps for precision and recall."""
        statistics = tmp_path / f"{count}.safetensors"
        eval_fid.main(["--reference", f"{tmp_path}/reference.npz", "--inception", f"{tmp_path}/net.pt",
                       "--pr-images", str(count), "--micro-batch", "4", "--save-statistics", str(statistics)])
        return model.read_tensors(statistics)[0][""]["features"]
    every = features(31)
    assert len(every) == len(every.unique(dim=0)) == 31 and torch.equal(features(1000), every)
    for count in (4, 12, 30):
        places = [[i for i in range(31) if torch.equal(every[i], x)] for x in features(count)]
        places = sorted(sum(places, []))
        assert len(places) == len(set(places)) == count
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 31], strict=True)]
        assert max(gaps) - min(gaps) <= 1, places


# ---- What 93 single changes of the code showed to be held by no test -------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_the_rate_is_constant_until_decay_from(home, tmp_path, stage):
    train(home, stage, tmp_path, "--steps", "8", "--decay-from", "0.5", "--lr-final", "1e-4")
    rates = [line["lr"] for line in log(tmp_path)]
    assert rates == pytest.approx(5 * [1e-3] + [7e-4, 4e-4, 1e-4])


@pytest.mark.parametrize("stage", STAGES)
def test_activations_are_checkpointed(home, tmp_path, monkeypatch, stage):
    calls = watch(monkeypatch, model, "checkpoint")
    train(home, stage, tmp_path / "plain", "--steps", "1")
    assert not calls
    train(home, stage, tmp_path / "out", "--steps", "1", "--checkpoint-activations")
    assert len(calls) == 3                        # blocks of the network that is trained


@pytest.fixture
def forwards(monkeypatch):
    """(is it a student's?, autocast?, inference mode?, gradient?, times t) of every evaluation of a DiTDH."""
    forward, seen = model.DiTDH.forward, []

    def watching(self, z, t, y, s=None):
        times = getattr(t, "value", t)
        seen.append((s is not None, torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled(), torch.is_grad_enabled(),
                     times.tolist()))
        return forward(self, z, t, y, s)
    monkeypatch.setattr(model.DiTDH, "forward", watching)
    return seen


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_autocast_reaches_every_evaluation(home, tmp_path, forwards, stage, precision):
    """The teacher's, too, where CMT follows its trajectories."""
    train(home, stage, tmp_path, "--steps", "1", "--precision", precision)
    assert {student for student, *_ in forwards} == {"teacher": {False}}.get(stage, {False, True})
    assert {cast for _, cast, *_ in forwards} == {precision == "bf16"}


def test_sampling_is_in_bf16_and_inference_mode(home, tmp_path, forwards):
    save_decoder(home, tmp_path / "decoder")
    for precision in ("bf16", "fp32"):
        forwards.clear()
        sample.main([f"{home}/teacher", "--decoder", f"{tmp_path}/decoder", "--num-samples", "2", "--nfe", "2", "--time-shift", "5",
                     "--precision", precision, "--out", f"{tmp_path}/{precision}.npz"])
        assert [seen[1:3] for seen in forwards] == 2 * [(precision == "bf16", True)]
        assert [t[0] for *_, t in forwards] == pytest.approx([1, 5 / 6])          # shift(1/2) at a = 5, not at the network's 3


def test_a_student_is_trained_on_its_own_times(home, tmp_path, monkeypatch):
    """Without --time-shift: what the student was made with, 3, and not what its latents' shape says, 1."""
    calls = watch(monkeypatch, train_meanflow, "time_shift")
    train(home, "meanflow", tmp_path, "--steps", "1")
    assert {a for _, a, _ in calls} == {3.0}


@pytest.mark.parametrize("stage, loss, place", [("teacher", "flow_matching_loss", 4), ("cmt", "consistency_loss", 4),
                                                ("meanflow", "meanflow_loss", 5)])
def test_every_class_is_drawn(home, tmp_path, monkeypatch, stage, loss, place):
    calls = watch(monkeypatch, STAGES[stage], loss)
    train(home, stage, tmp_path, "--batch-size", "64")
    assert torch.cat([call[place] for call in calls]).unique().tolist() == [0, 1, 2, 3]   # 3 is "no label"


def test_keys_of_random_numbers_are_used_once(home, tmp_path, monkeypatch):
    """Within a run, and by different stages of one seed; the order of the data alone is that of both that see it."""
    def keys_of(stage, *more):
        keys, original = [], model.generator

        def watching(device, *key):
            keys.append(key)
            return original(device, *key)
        with monkeypatch.context() as patch:
            for module in (model, encode_latents, train_cmt):
                patch.setattr(module, "generator", watching)
            train(home, stage, tmp_path / stage, "--steps", "4", *more)
        assert len(keys) == len(set(keys)) > 10
        return {key for key in keys if "epoch" not in key and "flips" not in key}, set(keys)
    latents = tmp_path / "latents"
    encode_latents.main(["--data-path", f"{home}/images", "--out", str(latents), "--encoder", f"{home}/encoder", "--flips",
                         *"--image-size 16 --encoder-size 16 --workers 0".split()])
    flips = ["--latents", latents, "--data-path", home / "images"]
    teacher, order = keys_of("teacher", *flips)
    assert {key for key in order if "flips" in key} and len(order) > len(teacher) + 1
    cmt, meanflow = keys_of("cmt")[0], keys_of("meanflow")[0]
    assert not (teacher & cmt or teacher & meanflow or cmt & meanflow)
    assert {len([x for x in key if isinstance(x, str)]) for key in teacher | cmt | meanflow} == {1}


def test_initialization():
    """AdaLN-Zero, Xavier-uniform embeddings of patches, N(0, 0.02) for labels and the time's MLP (METHOD, section 3)."""
    torch.manual_seed(0)
    net = model.DiTDH(4, 64, (96, 160), (2, 1), (3, 5), 500, time_difference=True)
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or name.startswith(("final_layer.linear", "r_embedder.mlp.2")) or name.endswith("embedder.proj.bias"):
            assert not p.any(), name
    for embedder, width in ((net.s_embedder, 96), (net.x_embedder, 160)):
        bound = (6 / (64 + width)) ** 0.5
        assert 0.99 * bound < embedder.proj.weight.abs().max() <= bound
        assert embedder.proj.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.03)
    for p in (net.y_embedder.embedding_table.weight, net.t_embedder.mlp[0].weight, net.t_embedder.mlp[2].weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.03) and abs(p.mean()) < 5e-4
    assert net.t_embedder.W.std().item() == pytest.approx(1, rel=0.1) and not net.t_embedder.W.requires_grad
    assert not torch.equal(net.t_embedder.W, net.r_embedder.W) and net.r_embedder.mlp[0].weight.any()


def test_the_residual_streams_stay_in_float32():
    torch.manual_seed(0)
    net, seen = model.DiTDH(**TINY, input_size=4, in_channels=12, num_classes=3), []
    for block in net.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.extend([inputs[0].dtype, output.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 12, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    assert seen == 6 * [torch.float32]


def test_last_epsilons(tmp_path):
    """The decoder's norms are RAE's, 1e-12; the encoder's last one keeps its own, without its affine part."""
    norms = [m for m in model.ViTDecoder(4, 12, 32, 2, 2, 64).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert [norm.eps for norm in norms] == 5 * [1e-12]
    net = random_encoder.dinov2(12, 1, 2, 4, 16, layer_norm_eps=0.25)
    net.save_pretrained(tmp_path)
    encoder = encode_latents.Encoder(tmp_path, 16, 16)
    z = encoder(torch.rand(2, 3, 16, 16))
    assert encoder.net.layernorm.eps == 0.25 and z.std() < 0.95                   # 1 with an epsilon of 0


def test_the_gradients_norm_in_the_log(home, tmp_path, monkeypatch):
    """grad_norm is the mean, grad_norm_max the largest finite one; one that is not finite ends the run, unsaved, whatever the loss is."""
    norms = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, **__: torch.tensor(norms.pop(0)))
    norms[:] = [9.0, 1.0, 6.0, 2.0]
    train(home, "teacher", tmp_path / "finite", "--steps", "4", "--log-every", "4", "--save-every", "4")
    assert [(line["grad_norm"], line["grad_norm_max"]) for line in log(tmp_path / "finite")] == [(9, 9), (3, 6)]
    norms[:] = [1.0, 1.0, float("nan"), 2.0]
    with pytest.raises(model.InputError, match="not finite"):
        train(home, "teacher", tmp_path / "nan", "--steps", "4", "--log-every", "4", "--save-every", "4")
    line = log(tmp_path / "nan")[-1]
    assert line["grad_norm"] is None and line["grad_norm_max"] == 2 and line["loss"] > 0 and not list((tmp_path / "nan").glob("state_*"))


def test_seconds_are_of_all_training_and_not_of_saving(home, tmp_path, monkeypatch):
    loss, save = train_teacher.flow_matching_loss, train_teacher.save_state
    monkeypatch.setattr(train_teacher, "flow_matching_loss", lambda *args: time.sleep(0.2) or loss(*args))
    monkeypatch.setattr(train_teacher, "save_state", lambda *args: time.sleep(1) or save(*args))
    train(home, "teacher", tmp_path, "--steps", "3", "--save-every", "1")
    first = log(tmp_path)[-1]["seconds"]
    assert 0.6 <= first < 1.5                     # three steps, and not two saves
    monkeypatch.setattr(train_teacher, "flow_matching_loss", loss)
    train(home, "teacher", tmp_path, "--steps", "4")
    assert first < log(tmp_path)[-1]["seconds"] < first + 0.5


def saved_before_going_on(argv):
    """Every process finds the state on the disk when save_state returns, though writing it takes a second."""
    write, save = model.write_tensors, train_teacher.save_state

    def look(*args, **more):
        save(*args, **more)
        assert list(Path(argv[argv.index("--out") + 1]).glob("state_*.safetensors"))
    model.write_tensors = lambda *args, **more: time.sleep(1) or write(*args, **more)
    train_teacher.save_state = look
    train_teacher.main(argv)


def test_all_wait_for_a_save(home, tmp_path):
    run_on(2, saved_before_going_on, arguments(home, "teacher", tmp_path, "--steps", "1"))


def test_files_are_on_the_disk_before_they_have_their_name(home, tmp_path, monkeypatch):
    """Written, fsync, renamed, fsync of the folder; with the mode that the user's umask gives."""
    calls, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        calls.append(("fsync", path, os.path.getsize(path)))
        fsync(number)

    def watched_replace(a, b):
        calls.append(("replace", str(a), str(b)))
        replace(a, b)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    before = os.umask(0o027)
    try:
        train(home, "teacher", tmp_path / "run", "--steps", "1")
    finally:
        os.umask(before)
    saved, = (tmp_path / "run").glob("state_*")
    at = next(i for i, call in enumerate(calls) if call[0] == "replace" and call[2] == str(saved))
    beside = calls[at][1]
    assert calls[at - 1] == ("fsync", beside, saved.stat().st_size) and calls[at + 1][:2] == ("fsync", str(tmp_path / "run"))
    assert {oct(path.stat().st_mode)[-3:] for path in (tmp_path / "run").iterdir()} == {"640"}


def test_two_signals_at_once_save_and_stop(home, tmp_path, monkeypatch):
    """torchrun and a scheduler may both send one."""
    loss = train_teacher.flow_matching_loss

    def signals(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(*args)
    monkeypatch.setattr(train_teacher, "flow_matching_loss", signals)
    with pytest.raises(SystemExit) as end:
        train(home, "teacher", tmp_path, "--steps", "9", "--save-every", "9")
    assert end.value.code == 143 and list(tmp_path.glob("state_00000001.*"))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_precision_and_recall_of_several_processes(tmp_path):
    """Each keeps its own part of the images that are evenly spread: the figures of one process."""
    torch.jit.script(Small()).save(tmp_path / "net.pt")
    for name, seed in (("samples", 1), ("reference", 2)):
        numpy.savez(tmp_path / f"{name}.npz", arr_0=draw(31, seed))
    figures = []
    for world in (1, 3):
        argv = [f"{tmp_path}/samples.npz", "--reference", f"{tmp_path}/reference.npz", "--inception", f"{tmp_path}/net.pt", "--pr-images",
                "13", "--micro-batch", "4", "--out", f"{tmp_path}/{world}.json", "--save-statistics", f"{tmp_path}/{world}.safetensors"]
        run_on(world, eval_fid.main, argv) if world > 1 else eval_fid.main(argv)
        figures.append(json.loads((tmp_path / f"{world}.json").read_text())["metrics"])
    one, three = (model.read_tensors(tmp_path / f"{world}.safetensors")[0][""]["features"] for world in (1, 3))
    assert torch.equal(one, three) and figures[0] == pytest.approx(figures[1], rel=1e-9) and 0 < figures[0]["recall"] < 1
