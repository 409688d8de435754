"""examples/dcgan.py: its options, its data, bitwise resume, Ctrl-C and the comparison."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import dcgan
import dcgan_data
import dcgan_options
import dcgan_plots
import numpy as np
import pytest
import torch
from dcgan_data import BatchOrder, DataError, load_images
from dcgan_engines import ENGINES
from dcgan_history import History
from dcgan_model import build_networks
from dcgan_ranks import Ranks
from dcgan_trainer import CheckpointError, Config, Trainer
from PIL import Image

PROGRAM = Path(dcgan.__file__)
TINY = ["--imageSize", "8", "--nz", "4", "--ngf", "4", "--ndf", "4", "--batchSize", "256", "--device", "cpu"]
# At 2^24 the first gradients overflow, and two good iterations let a scale grow: every kind of step within ten.
LIVELY = [*TINY, "--init-scale", str(2**24), "--growth-interval", "2", "--lr", "1e-3"]
TINY_CONFIG = Config(
    engine="fp32",
    dataset="digits",
    images=1797,
    nc=1,
    imageSize=8,
    batchSize=256,
    nz=4,
    ngf=4,
    ndf=4,
    lr=1e-3,
    beta1=0.5,
    init_scale=65536.0,
    growth_interval=2000,
    manualSeed=2809,
)


def config(**changes) -> Config:
    return Config(**{**vars(TINY_CONFIG), **changes})


def flat(value, name="") -> dict[str, object]:
    """The leaves of a nested state, by path."""
    if isinstance(value, dict):
        return {leaf: v for key, part in value.items() for leaf, v in flat(part, f"{name}.{key}").items()}
    if isinstance(value, (list, tuple)):
        return {leaf: v for i, part in enumerate(value) for leaf, v in flat(part, f"{name}[{i}]").items()}
    return {name: value}


def bits(path: Path) -> dict[str, object]:
    """Every leaf of a checkpoint but the times, tensors as (dtype, shape, bytes)."""
    state = torch.load(path, weights_only=True)
    del state["history"]["seconds"]
    leaves = flat(state)
    for name, leaf in leaves.items():
        if isinstance(leaf, torch.Tensor):
            leaves[name] = (leaf.dtype, tuple(leaf.shape), leaf.contiguous().numpy().tobytes())
    return leaves


def error_of(argv: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_info:
        dcgan.main(argv)
    assert exit_info.value.code == 2
    return capsys.readouterr().err


# ---- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--imageSize", "48"], ["48", "power of two", "64"]),
        (["--imageSize", "4"], ["4", "from 8 up"]),
        (["--batchSize", "1"], ["1", "from 2 up"]),
        (["--batchSize", "2000"], ["2000", "1797 or less"]),
        (["--lr", "-1"], ["-1", "positive"]),
        (["--lr", "nan"], ["nan", "positive"]),
        (["--beta1", "1"], ["1", "below 1"]),
        (["--niter", "0"], ["0", "from 1 up"]),
        (["--iterations", "many"], ["many", "from 1 up"]),
        (["--init-scale", "inf"], ["inf", "FP32"]),
        (["--engine", "bf16"], ["bf16", "mpengine"]),
        (["--engine", "fp32", "--compare"], ["--engine", "--compare"]),
        (["--dataset", "cifar10"], ["cifar10", "hub:NAME"]),
        (["--dataset", "folder:"], ["folder:", "folder:PATH"]),
        (["--dataset", "folder:nowhere"], ["nowhere", "check the path"]),
        (["--compare", "--resume", "x.pt"], ["x.pt", "--engine"]),
        (["--resume", "x.pt", "--netG", "y.pt"], ["x.pt", "--netG"]),
        (["--resume", "missing.pt", "--engine", "fp32"], ["missing.pt", "check the path"]),
    ],
)
def test_bad_options_are_refused_with_value_and_remedy(options, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = error_of([*TINY, *options], capsys)
    assert all(part in message for part in said), message
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is for machines without CUDA")
def test_cuda_without_a_device_is_refused(capsys):
    assert "--device cpu" in error_of(["--device", "cuda"], capsys)


def test_apex_defaults():
    args = dcgan_options.parser("x").parse_args([])
    expected = {"batchSize": 64, "imageSize": 64, "nz": 100, "ngf": 64, "ndf": 64, "niter": 25, "workers": 2}
    assert {name: getattr(args, name) for name in expected} == expected
    assert (args.lr, args.beta1, args.engine, args.dataset) == (2e-4, 0.5, "mpengine", "digits")


def test_resume_command_replaces_what_it_must():
    argv = ["--compare", "--nz", "4", "--outf=a b", "--resume", "old.pt", "--lr", "1e-3"]
    command = dcgan_options.resume_command("dcgan.py", argv, "fp32", Path("a b/fp32"))
    expected = "python dcgan.py --nz 4 --lr 1e-3 --engine fp32 --outf 'a b/fp32' --resume 'a b/fp32/checkpoint.pt'"
    assert command == expected


# ---- data


def load(spec, root=Path(), size=8, channels=None):
    return load_images(spec, dataroot=root, image_size=size, channels=channels)


@pytest.mark.parametrize(
    ("options", "size", "said"),
    [
        (["--compare"], "2", ["--compare", "--engine", "torchrun"]),
        (["--batchSize", "255"], "2", ["255", "multiple of 2"]),
        (["--batchSize", "4"], "4", ["4", "from 8 up"]),
    ],
)
def test_what_several_processes_cannot_do_is_refused(options, size, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", size)
    message = error_of([*TINY, "--outf", str(tmp_path / "out"), *options], capsys)
    assert all(part in message for part in said), message
    assert not list(tmp_path.iterdir())


def test_it_runs_under_torchrun(tmp_path):
    """Two processes, started by torchrun; the first alone writes and prints."""
    options = [*LIVELY, "--iterations", "4", "--outf", "out", "--dataset", "fake"]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(PROGRAM),
            *options,
        ],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("4 iterations:") == 1
    assert run.stderr.count("100%") == 1  # one progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"checkpoint.pt", "fake_samples_000004.png", "real_samples.png", "scales.png"}
    saved = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert saved["iteration"] == 4
    assert not any(name.startswith("module.") for name in saved["netD"])


def test_processes_share_each_batch():
    whole = list(BatchOrder(10, 4, seed=1, start=0, stop=4))
    parts = [list(BatchOrder(10, 4, 1, 0, 4, Ranks(rank, 2))) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    assert all(len(batch) == 2 for part in parts for batch in part)


def test_digits_at_their_own_size_are_scikit_learns_pixels():
    from sklearn.datasets import load_digits

    images = load("digits")
    assert len(images) == 1797
    expected = torch.from_numpy(load_digits().images[5]).float() / 8.0 - 1.0
    torch.testing.assert_close(images[5], expected.unsqueeze(0), rtol=0, atol=1e-6)


def test_digits_resized_and_repeated():
    image = load("digits", size=32, channels=3)[0]
    assert image.shape == (3, 32, 32)
    assert torch.equal(image[0], image[2])
    assert image.min() >= -1.0
    assert image.max() <= 1.0


def test_folder_crops_the_middle_and_reads_below(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = (255, 0, 127)  # the middle square
    (tmp_path / "deep").mkdir()
    Image.fromarray(pixels).save(tmp_path / "deep" / "b.PNG")
    Image.new("L", (5, 7), 255).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    images = load("folder:.", tmp_path)
    assert len(images) == 2
    assert torch.equal(images[0], torch.ones(3, 8, 8))
    expected = torch.tensor([1.0, -1.0, 127 / 127.5 - 1.0]).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(images[1], expected, rtol=0, atol=1e-6)
    assert load("folder:deep", tmp_path, channels=1)[0].shape == (1, 8, 8)


def test_empty_folder_and_broken_picture(tmp_path):
    with pytest.raises(DataError, match="no picture below"):
        load("folder:.", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"broken\.png .*repair or remove"):
        load("folder:.", tmp_path)[0]


def png(picture: Image.Image) -> bytes:
    import io

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


WHITE = Image.new("RGB", (10, 10), (255, 255, 255))


@pytest.mark.parametrize(
    "cell",
    [
        WHITE,
        {"bytes": png(WHITE), "path": None},
        np.full((10, 10, 3), 255, np.uint8),
        np.full((10, 10), 255, np.uint8),
        [[255] * 10] * 10,
    ],
    ids=["pillow", "bytes", "colour array", "grey array", "lists"],
)
def test_hub_finds_and_converts_the_pictures(cell, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"label": 3, "caption": "white", "img": cell}] * 4

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    images = load("hub:some/name")
    assert calls == [(("some/name",), {"split": "train"})]
    assert len(images) == 4
    assert torch.equal(images[3], torch.ones(3, 8, 8))


def test_hub_prefers_local_files(monkeypatch, tmp_path):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return [{"image": WHITE}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    (tmp_path / "train.parquet").touch()
    (tmp_path / "folder").mkdir()
    load("hub:train.parquet", tmp_path)
    load("hub:folder", tmp_path)
    parquet = str(tmp_path / "train.parquet")
    assert calls == [
        (("parquet",), {"data_files": parquet, "split": "train"}),
        ((str(tmp_path / "folder"),), {"split": "train"}),
    ]


def test_hub_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        load("hub:cifar10")

    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    for loader, said in [
        (lambda *a, **k: [], "is empty"),
        (lambda *a, **k: [{"text": "x", "label": 1, "vector": [0.5, 0.25]}], "no column of pictures.*label"),
        (unreachable, "no network.*check the name"),
    ]:
        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=loader))
        with pytest.raises(DataError, match=said):
            load("hub:cifar10")


def test_fake_pictures_are_the_same_in_every_run():
    first, second = load("fake"), load("fake")
    assert first[7].shape == (3, 8, 8)
    assert torch.equal(first[7], second[7])
    assert not torch.equal(first[7], first[8])


def test_order_covers_each_epoch_and_continues_anywhere():
    whole = list(BatchOrder(10, 3, seed=1, start=0, stop=9))
    assert len(whole) == 9
    for epoch in range(3):
        seen = [index for batch in whole[3 * epoch : 3 * epoch + 3] for index in batch]
        assert len(set(seen)) == 9
    assert whole[0:3] != whole[3:6]
    assert [list(BatchOrder(10, 3, seed=1, start=at, stop=9)) for at in range(9)] == [whole[at:] for at in range(9)]
    assert list(BatchOrder(10, 3, seed=2, start=0, stop=9)) != whole


# ---- networks and pictures


@pytest.mark.parametrize("size", [8, 16, 64, 128])
def test_networks_fit_every_size(size):
    net_g, net_d = build_networks(size, 3, nz=5, ngf=2, ndf=2, seed=0)
    images = net_g(torch.zeros(2, 5, 1, 1))
    assert images.shape == (2, 3, size, size)
    assert net_d(images).shape == (2,)


def test_networks_at_64_are_apexs():
    net_g, net_d = build_networks(64, 3, nz=100, ngf=64, ndf=64, seed=0)
    assert sum(p.numel() for p in net_g.parameters()) == 3_576_704
    assert sum(p.numel() for p in net_d.parameters()) == 2_765_568


def test_grid_places_and_colours_the_tiles():
    images = torch.stack([torch.full((1, 48, 48), value) for value in (-1.0, 0.0, 1.0)])
    picture = dcgan_plots.grid(images)
    assert picture.shape == (100, 100, 3)
    centres = [picture[25, 25], picture[25, 75], picture[75, 25], picture[75, 75]]
    assert [tuple(map(int, centre)) for centre in centres] == [(0,) * 3, (128,) * 3, (255,) * 3, (96,) * 3]


def test_history_reconstructs_torch_amps_overflows():
    history = History([8.0])
    for iteration, scale in enumerate([8.0, 4.0, 8.0, 2.0], start=1):
        history.add_scales(iteration, [scale], None)
    assert history.overflow_iterations(0) == [(2.0, 8.0), (4.0, 8.0)]
    assert history.scale_rows[-1] == [4.0, 2.0, 3.0]  # 8 to 2 was two overflows


# ---- training


def initial(engine: str, weights: Path | None = None) -> Trainer:
    return Trainer(config(engine=engine, lr=0.01), torch.device("cpu"), net_g=weights, net_d=weights)


@pytest.fixture
def strong(tmp_path) -> Path:
    """Weights 15 times the initial ones: with those, every logit is about 0 and no two figures differ."""
    net_g, net_d = build_networks(8, 1, nz=4, ngf=4, ndf=4, seed=2809)
    states = {
        key: {name: 15.0 * value if value.ndim == 4 else value for name, value in network.state_dict().items()}
        for key, network in (("netG", net_g), ("netD", net_d))
    }
    torch.save(states, tmp_path / "strong.pt")
    return tmp_path / "strong.pt"


def test_every_engine_starts_from_the_same_weights_and_noise():
    plain = initial("fp32")
    for engine in ENGINES:
        other = initial(engine)
        assert torch.equal(other._noise.get_state(), plain._noise.get_state())
        assert torch.equal(other._fixed_noise, plain._fixed_noise)
        for mine, theirs in zip(plain.net_g.parameters(), other.net_g.parameters(), strict=True):
            assert torch.equal(mine.to(theirs.dtype), theirs)
    assert {p.dtype for p in initial("mpengine").net_g.parameters()} == {torch.float16, torch.float32}


def test_one_iteration_is_the_papers(strong):
    """Loss_D = -log D(x) - log(1 - D(G(z))), then D's step, then Loss_G = -log D(G(z)) and G's step."""
    images = load("digits")
    batch = torch.stack([images[index] for index in range(64)])
    trainer = initial("fp32", strong)
    trainer.train_step(batch)
    trainer.record()

    net_g, net_d = build_networks(8, 1, nz=4, ngf=4, ndf=4, seed=0)
    net_g.load_state_dict(torch.load(strong)["netG"])
    net_d.load_state_dict(torch.load(strong)["netD"])
    steps = [torch.optim.Adam(network.parameters(), lr=0.01, betas=(0.5, 0.999)) for network in (net_d, net_g)]
    generated = net_g(torch.randn(64, 4, 1, 1, generator=torch.Generator().manual_seed(2810)))
    real, before = net_d(batch), net_d(generated.detach())
    loss_d = -real.sigmoid().log().mean() - (1 - before.sigmoid()).log().mean()
    loss_d.backward()
    steps[0].step()
    after = net_d(generated)
    loss_g = -after.sigmoid().log().mean()
    loss_g.backward()
    steps[1].step()
    assert (before - after).abs().mean() > 0.01
    expected = [loss_d, loss_g, *(logits.sigmoid().mean() for logits in (real, before, after))]
    torch.testing.assert_close(trainer.history.metrics[0], torch.stack(expected).detach(), rtol=0, atol=1e-5)
    for mine, theirs in ((trainer.net_g, net_g), (trainer.net_d, net_d)):
        for name, weight in mine.named_parameters():
            torch.testing.assert_close(weight, theirs.get_parameter(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_first_iteration_is_the_same_up_to_fp16(engine, strong):
    images = load("digits")
    batch = torch.stack([images[index] for index in range(64)])
    plain, other = initial("fp32", strong), initial(engine, strong)
    for trainer in (plain, other):
        trainer.train_step(batch)
        trainer.record()
    # A logit has been through at most four fp16 layers: eight roundings of up to 2^-11, of values that are about 1.
    torch.testing.assert_close(other.history.metrics, plain.history.metrics, rtol=0, atol=8 * 2.0**-11)


@pytest.mark.parametrize("engine", ENGINES)
def test_resume_is_bitwise(engine, tmp_path):
    common = [*LIVELY, "--engine", engine, "--sample-every", "3", "--log-every", "4"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert dcgan.main([*common, "--iterations", "10", "--outf", str(straight)]) == 0
    assert dcgan.main([*common, "--iterations", "5", "--outf", str(stopped)]) == 0
    half = bits(stopped / "checkpoint.pt")
    resume = ["--iterations", "10", "--outf", str(stopped), "--resume", str(stopped / "checkpoint.pt")]
    assert dcgan.main([*common, *resume]) == 0  # 7 batches an epoch: the second half begins a new one
    whole = bits(stopped / "checkpoint.pt")
    assert whole == bits(straight / "checkpoint.pt")
    weights = [name for name in whole if name.startswith((".netG", ".netD"))]
    assert weights
    assert any(whole[name] != half[name] for name in weights)
    assert (stopped / "real_samples.png").exists()
    assert (stopped / "fake_samples_000010.png").read_bytes() == (straight / "fake_samples_000010.png").read_bytes()
    if engine != "fp32":
        rows = torch.load(straight / "checkpoint.pt", weights_only=True)["history"]["scale_rows"]
        scales = [row[1] for row in rows]
        assert min(scales) < scales[0], "the run had no overflow"
        assert any(new > old for old, new in pairwise(scales)), "no scale grew"
        assert (straight / "scales.png").exists()


def test_resume_refuses_other_runs(tmp_path, capsys):
    fp32 = [*TINY, "--engine", "fp32", "--outf", str(tmp_path)]
    assert dcgan.main([*fp32, "--iterations", "1"]) == 0
    checkpoint = str(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    resumed = [*fp32, "--resume", checkpoint]
    assert "--nz 4, this run has 5" in error_of([*resumed, "--nz", "5"], capsys)
    assert "--engine fp32, this run has torch-amp" in error_of([*resumed, "--engine", "torch-amp"], capsys)
    assert "--iterations 2 or more" in error_of([*resumed, "--iterations", "1"], capsys)
    (tmp_path / "other.pt").write_bytes(b"something else")
    assert "other.pt was not written by torch.save" in error_of([*fp32, "--resume", str(tmp_path / "other.pt")], capsys)
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.pt")
    assert "not a checkpoint" in error_of([*fp32, "--resume", str(tmp_path / "other.pt")], capsys)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_networks_start_from_a_checkpoints_weights(tmp_path):
    first = initial("fp32")
    first.train_step(torch.zeros(8, 1, 8, 8))
    first.save(tmp_path / "a.pt")
    second = Trainer(config(manualSeed=5), torch.device("cpu"), net_g=tmp_path / "a.pt", net_d=tmp_path / "a.pt")
    for mine, theirs in ((first.net_g, second.net_g), (first.net_d, second.net_d)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(CheckpointError, match=r"--netG .* does not fit"):
        Trainer(config(ngf=6), torch.device("cpu"), net_g=tmp_path / "a.pt")


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = initial("fp32")
    trainer.save(tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def disk_full(_state, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        trainer.save(tmp_path / "checkpoint.pt")
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_samples_change_no_state():
    trainer = initial("fp32")
    trainer.train_step(torch.zeros(8, 1, 8, 8))
    before = {name: value.clone() for name, value in trainer.net_g.state_dict().items()}
    first, second = trainer.samples(), trainer.samples()
    assert torch.equal(first, second)
    assert trainer.net_g.training
    assert all(torch.equal(before[name], value) for name, value in trainer.net_g.state_dict().items())


@pytest.mark.parametrize("engine", ["fp32", "mpengine"])
def test_ctrl_c_saves_between_iterations_and_says_how_to_resume(engine, tmp_path, monkeypatch, capsys):
    class Interrupted(dcgan_data.Fake):
        reads = 0

        def __getitem__(self, index):
            Interrupted.reads += 1
            if Interrupted.reads == 2 * 256 + 5:  # within the third batch
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

    before = signal.getsignal(signal.SIGINT)
    common = [*LIVELY, "--dataset", "fake", "--nc", "1", "--engine", engine, "--iterations", "5"]
    assert dcgan.main([*common, "--outf", str(tmp_path / "straight")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(dcgan, "load_images", lambda spec, **kwargs: Interrupted(8, 1))
        status = dcgan.main([*common, "--outf", str(tmp_path / "stopped")])
    assert status == 130
    said = capsys.readouterr().out
    assert "after iteration 3 of 5" in said
    assert signal.getsignal(signal.SIGINT) is before  # whoever started the tests may ignore it
    assert torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["iteration"] == 3
    command = shlex.split(said.strip().splitlines()[-1])
    assert dcgan.main(command[2:]) == 0
    assert bits(tmp_path / "stopped" / "checkpoint.pt") == bits(tmp_path / "straight" / "checkpoint.pt")


def test_ctrl_c_with_reader_processes(tmp_path):
    """The terminal sends SIGINT to the whole process group, the data loader's workers included."""
    for index in range(8):
        Image.new("L", (8, 8), 30 * index).save(tmp_path / f"{index}.png")
    options = ["--engine", "fp32", "--dataset", f"folder:{tmp_path}", "--batchSize", "4", "--sample-every", "1"]
    options += ["--iterations", "1000000", "--outf", str(tmp_path / "out"), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *TINY, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        started = tmp_path / "out" / "fake_samples_000002.png"
        while not started.exists() and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    assert process.returncode == 130, err
    assert "--resume" in out
    assert "Traceback" not in err
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["iteration"] >= 2


# ---- comparison


def test_compare_writes_table_and_pictures(tmp_path, capsys):
    assert dcgan.main([*LIVELY, "--compare", "--iterations", "6", "--outf", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "comparison.json").read_text())
    results = {result["engine"]: result for result in record["results"]}
    assert list(results) == ["mpengine", "torch-amp", "fp32"]
    assert record["options"]["init_scale"] == 2.0**24
    for engine, result in results.items():
        assert result["iterations"] == 6
        assert result["peak_memory_bytes"] is None
        for net in "DG":
            assert sum(result["steps"][net].values()) == 6
        expected = torch.load(tmp_path / engine / "checkpoint.pt", weights_only=True)["history"]["metrics"].mean(0)
        torch.testing.assert_close(torch.tensor(list(result["metrics"].values())), expected, rtol=1e-5, atol=1e-6)
    assert results["fp32"]["steps"] == {"D": {"taken": 6, "skipped": 0}, "G": {"taken": 6, "skipped": 0}}
    assert results["torch-amp"]["steps"]["D"]["skipped"] > 0
    assert results["mpengine"]["steps"]["D"]["skipped"] > 0
    assert list(results["mpengine"]["scales"]) == ["D on real", "D on fake", "G"]
    assert list(results["torch-amp"]["scales"]) == ["all losses"]
    assert results["fp32"]["scales"] == {}
    table = (tmp_path / "comparison.md").read_text()
    assert "| Loss_D " in table
    assert "n/a on a CPU" in table
    assert table.split("\n\n", 1)[1] in printed
    assert "not the speed" in printed
    for name in ("comparison_samples.png", "comparison_losses.png", "mpengine/scales.png", "torch-amp/scales.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 300
