"""Checkpoints as other trainers save them: prefixes of names, more than weights, pickles; and the Hub that does not answer."""
import argparse
import math

import pytest
import torch
from runs import TINY

import model

SIZES = dict(**TINY, input_size=4, in_channels=12, num_classes=3)
DECODER = dict(input_size=4, in_channels=12, depth=1, patch_size=4, hidden_size=192, num_heads=4, mlp_size=64)


def prefixed(net, prefix):
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net."])
def test_a_prefix_of_all_names_is_taken_off(tmp_path, prefix):
    net = model.DiTDH(**SIZES)
    torch.save({"ema": {**prefixed(net, prefix), "step": 7}, "step": 7}, tmp_path / "teacher.pt")
    loaded, _ = model.load_network(tmp_path / "teacher.pt", "teacher")
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in net.state_dict().items())


def test_a_decoders_prefix(tmp_path):
    decoder = model.ViTDecoder(**DECODER)
    torch.save(prefixed(decoder, "decoder."), tmp_path / "decoder.pt")
    loaded, _ = model.load_decoder(tmp_path / "decoder.pt")
    assert loaded.shape == (12, 4, 4)


def test_what_is_found_is_named(tmp_path):
    torch.save({"conv1.weight": torch.zeros(2), "conv2.bias": torch.zeros(2)}, tmp_path / "other.pt")
    for load in (model.load_network, model.load_decoder):
        with pytest.raises(model.InputError, match="first names are conv1.weight, conv2.bias"):
            load(tmp_path / "other.pt")


def test_a_pickle_of_objects_is_refused_with_the_way_out(tmp_path):
    torch.save({"ema": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "run.pt")
    with pytest.raises(model.InputError, match="run.pt .*objects in it that could run code: save its tensors alone"):
        model.load_network(tmp_path / "run.pt")


def test_a_mistyped_path_is_said_before_the_hub_is_asked(monkeypatch, capsys):
    import huggingface_hub

    def no_answer(repository, file):
        assert (repository, file) == ("run/teacher", "model.safetensors")
        raise ConnectionError("no answer")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_answer)
    with pytest.raises(model.InputError, match="neither here nor could it be had from the Hub .no answer."):
        model.load_network("run/teacher")
    assert "run/teacher is not here: asking" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["net", "average"])
def test_what_is_not_finite_is_not_saved(tmp_path, which):
    """The average, too: one overflow of the weights stays in it."""
    nets = {name: torch.nn.Linear(2, 2) for name in ("net", "average")}
    nets[which].weight.data[0, 0] = math.inf
    with pytest.raises(model.InputError, match="weights are not finite at step 7; not saved"):
        model.save_state({"settings": {"out": tmp_path}, "stats": {}}, 7, 0.0, *nets.values(), torch.optim.AdamW(nets["net"].parameters()))
    assert not list(tmp_path.iterdir())
