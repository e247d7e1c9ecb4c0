"""DiTDH-XL at 256 px through sample.py, from files in the published layout.

Their weights are random, and made here (6 GB of disk).

    python tests/benchmarks/sample_xl.py          # prints seconds and peak memory; docs/PUBLISHED.md holds what was measured
"""
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from model import DECODER_PRESETS, DIT_PRESETS, DiTDH, ViTDecoder  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    home = Path(folder)
    student = DiTDH(16, 768, num_classes=1000, time_difference=True, **DIT_PRESETS["DiTDH-XL"])
    # Away from zero.
    torch.nn.init.normal_(student.final_layer.linear.weight, std=0.02)
    torch.save({"ema": student.state_dict()}, home / "student.pt")
    decoder = ViTDecoder(16, 768, **DECODER_PRESETS["ViT-XL"])
    torch.save(decoder.state_dict(), home / "decoder.pt")
    torch.save({"mean": None, "var": torch.ones(768, 16, 16)}, home / "stat.pt")
    del student, decoder
    # The difference is the cost of eight images.
    for count in (1, 9):
        start = time.perf_counter()
        command = [sys.executable, ROOT / "sample.py", home / "student.pt", "--decoder", home / "decoder.pt",
                   "--stats", home / "stat.pt", "--nfe", "1", "--num-samples", str(count),
                   "--batch-size", "8", "--out", home / f"{count}.npz"]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        assert numpy.load(home / f"{count}.npz")["arr_0"].shape == (count, 256, 256, 3)
        print(f"{count} images in one step, loading and decoding included: {seconds:.1f} s")
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB")
