"""What mutations of the code once got past every other test: the optimizer's step replayed by hand from the
saved states, what is saved, details of sampling and of precision and recall."""
import numpy
import pytest
import torch

import eval_fid
import model
import sample
from test_eval_fid import Small, draw
from runs import STAGES, TINY, lively, log, save_decoder, train, weights



def state(folder, step):
    """{"net": {parameter: tensor}, "average": ..., "exp_avg": ..., "exp_avg_sq": ...} after a step."""
    parts = {}
    for name, tensor in weights(folder, f"state_{step:08d}.safetensors").items():
        part, _, parameter = name.partition("/")
        parts.setdefault(part, {})[parameter] = tensor.double()
    return parts


@pytest.mark.parametrize("clip", [0.01, 100])
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_replayed(home, tmp_path, stage, clip):
    """From a state to the next: AdamW with betas (0.9, 0.95) and no weight decay, on the gradient clipped to
    --clip; then average <- ema average + (1 - ema) net. The states give the gradient: m' = 0.9 m + 0.1 g."""
    start = [] if stage == "teacher" else ["--teacher", lively(home, tmp_path / "teacher")]
    train(home, stage, tmp_path / "out", "--steps", "4", "--save-every", "1", "--ema", "0.8", "--clip", clip,
          "--lr-final", "5e-4", *start)
    lines, before = log(tmp_path / "out"), state(tmp_path / "out", 1)
    assert all(0.02 < line["grad_norm"] < 50 for line in lines)                   # all are clipped, or none
    assert len({line["lr"] for line in lines}) > 1
    for step in (2, 3, 4):
        after, line = state(tmp_path / "out", step), lines[step - 1]
        trained = after["average"].keys()
        assert trained == after["exp_avg"].keys() == after["exp_avg_sq"].keys() < after["net"].keys()
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
            average = 0.8 * before["average"][name] + 0.2 * after["net"][name]
            torch.testing.assert_close(after["average"][name], average, rtol=1e-6, atol=1e-7)
        before = after


@pytest.mark.parametrize("stage", STAGES)
def test_the_saved_network_is_the_average(home, tmp_path, stage):
    """model.safetensors, what the next stage and sample.py read: the average where there is one."""
    train(home, stage, tmp_path, "--steps", "2", "--ema", "0.5")
    saved, last = weights(tmp_path), weights(tmp_path, "state_00000002.safetensors")
    average = {name[8:]: tensor for name, tensor in last.items() if name.startswith("average/")}
    net = {name[4:]: tensor for name, tensor in last.items() if name.startswith("net/")}
    assert saved.keys() == net.keys() > average.keys() and len(average) > 30
    assert all(torch.equal(tensor, average.get(name, net[name])) for name, tensor in saved.items())
    assert sum(not torch.equal(saved[name], net[name]) for name in average) > 5   # zeros keep others still
    loaded = model.load_network(tmp_path)[0].state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


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
        return model.read_tensors(statistics)[0]["features"]
    every = features(31)
    assert len(every) == len(every.unique(dim=0)) == 31 and torch.equal(features(1000), every)
    for count in (4, 12, 30):
        places = [[i for i in range(31) if torch.equal(every[i], x)] for x in features(count)]
        places = sorted(sum(places, []))
        assert len(places) == len(set(places)) == count
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 31], strict=True)]
        assert max(gaps) - min(gaps) <= 1, places
