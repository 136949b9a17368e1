"""Models of libraries, external weight files, and normalisation inside the model."""

import importlib.util
import os
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from attacks.affine import affine_margins
from attacks.measure import measure
from attacks.registry import create
from harness.config.options import ConfigError
from harness.config.run_config import parse_normalize
from harness.models.build import build
from harness.models.libraries import check_robustbench
from harness.models.weights import Normalized, load_weights
from harness.store import RunFolder
from harness.track import main
from tests.runs import ONE_LINE

SHAPE = (3, 8, 8)


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3))


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(3)
    model = net()
    model(torch.rand(9, 1, 2, 2))
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.module.", "model._orig_mod.", "module._orig_mod.module.model.", "net."]
)
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_external_state_dicts_are_read(tmp_path: Path, trained: nn.Module, prefix: str, key: str | None) -> None:
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    torch.save({key: state, "epoch": 7} if key else state, tmp_path / "weights.pt")
    model = net()
    assert load_weights(tmp_path / "weights.pt", model) == []
    assert same(model, trained)


def test_a_wrapper_around_a_part_is_read(tmp_path: Path, trained: nn.Module) -> None:
    # as written for a compiled or data-parallel submodule
    state = {name.replace("1.", "1._orig_mod.module."): value for name, value in trained.state_dict().items()}
    torch.save(state, tmp_path / "weights.pt")
    model = net()
    assert load_weights(tmp_path / "weights.pt", model) == []
    assert same(model, trained)


@pytest.mark.parametrize("key", ["model_ema", "ema_state_dict", "state_dict_ema"])
def test_plain_weights_are_preferred_to_averaged_ones_and_reported(
    tmp_path: Path, trained: nn.Module, key: str
) -> None:
    averaged = {f"module.{name}": torch.zeros_like(value) for name, value in trained.state_dict().items()}
    torch.save({key: averaged | {"n_averaged": torch.tensor(3)}, "model": trained.state_dict()}, tmp_path / "both.pt")
    model = net()
    assert load_weights(tmp_path / "both.pt", model) == [f"weights: model is read, {key} is not"]
    assert same(model, trained)
    # without plain weights the averaged ones are read
    torch.save({key: averaged | {"n_averaged": torch.tensor(3)}, "epoch": 3}, tmp_path / "alone.pt")
    assert load_weights(tmp_path / "alone.pt", model) == [
        f"weights: {key} is read, an average: the file has no others",
        "weights: left n_averaged, which the model does not have",
    ]
    assert not any(value.any() for value in model.state_dict().values())


def test_an_averaged_model_is_read(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(AveragedModel(trained).state_dict(), tmp_path / "weights.pt")
    model = net()
    note = load_weights(tmp_path / "weights.pt", model)
    assert note == ["weights: left n_averaged, which the model does not have"]
    assert same(model, trained)


def test_entries_outside_the_model_are_skipped_with_a_note(tmp_path: Path, trained: nn.Module) -> None:
    state: dict[str, object] = {f"model.{name}": value for name, value in trained.state_dict().items()}
    state |= {"criterion.weight": torch.ones(3), "train_acc.tp": torch.zeros(2), "model.1.total_ops": torch.zeros(1)}
    torch.save(state | {"total_params": torch.zeros(1), "a.b": torch.zeros(1), "epoch": 3}, tmp_path / "weights.pt")
    model = net()
    assert load_weights(tmp_path / "weights.pt", model) == [
        "weights: left criterion.weight, train_acc.tp, model.1.total_ops, total_params and 1 more, "
        "which the model does not have"
    ]
    assert same(model, trained)


def test_batch_norm_counters_may_be_missing(tmp_path: Path, trained: nn.Module) -> None:
    state = {name: value for name, value in trained.state_dict().items() if "batches" not in name}
    save_file(state, tmp_path / "weights.safetensors")
    model = net()
    model(torch.rand(9, 1, 2, 2))
    assert load_weights(tmp_path / "weights.safetensors", model) == []
    # and not that of the previous weights
    assert model.state_dict()["2.num_batches_tracked"] == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_the_command_prints_the_skipped_entries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = build("dense", (1, 8, 8), 10, seed=5).state_dict()
    save_file(state | {"criterion.weight": torch.ones(3)}, tmp_path / "weights.safetensors")
    command = f"--model dense --weights {tmp_path / 'weights.safetensors'} --out {tmp_path / 'run'} --epochs 0"
    command += " --estimator linear --probe 4 --train-images 40 --test-images 8 --device cpu --no-report"
    assert main(command.split()) == 0
    line = "weights: left criterion.weight, which the model does not have"
    assert line in capsys.readouterr().out.splitlines()
    assert line in RunFolder(tmp_path / "run").read_manifest()["notes"]


def test_safetensors_are_read_into_a_normalised_model(tmp_path: Path, trained: nn.Module) -> None:
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    model = Normalized(net(), [0.5], [0.25])
    load_weights(tmp_path / "weights.safetensors", model)
    assert same(model.model, trained)


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code from data')",)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("code", "got a pickle that asks for exec, which is not run; save a state dict"),
        (
            "whole model",
            "got a pickle that asks for torch.nn.modules.container.Sequential, which is not run; save a st",
        ),
        ("text", "got a damaged file or one of another kind (KeyError); save a state dict"),
        ("missing", "got no 1.bias; give its own, or another --model"),
        ("other shape", "got 1.bias of shape (5,); give its own, or another --model"),
        ("deeper", "got also 9.weight; give its own, or another --model"),
        ("deeper block", "got also 1.0.weight; give its own, or another --model"),
        ("two models", "got model.1.weight and module.1.weight; save one of them alone"),
        ("no dict", "got list; save model.state_dict()"),
        ("no file", "got none; give the path of one"),
        ("folder", "got none; give the path of one"),
        ("FIFO", "got none; give the path of one"),
    ],
)
def test_weights_that_do_not_fit_the_model_give_a_one_line_error(
    tmp_path: Path, trained: nn.Module, kind: str, words: str
) -> None:
    path, state = tmp_path / "weights.pt", dict(trained.state_dict())
    arguments = {"code": Trap(), "whole model": trained, "no dict": [1, 2]}
    if kind == "text":
        path.write_bytes(b"hello")
    elif kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "deeper block":
        state["1.0.weight"] = torch.zeros(1)
    elif kind == "two models":
        state = {prefix + name: value for prefix in ("model.", "module.") for name, value in state.items()}
    elif kind == "missing":
        del state["1.bias"]
    elif kind == "other shape":
        state["1.bias"] = torch.zeros(5)
    elif kind == "deeper":
        state["9.weight"] = torch.zeros(1)
    if kind not in ("text", "folder", "FIFO", "no file"):
        torch.save(arguments.get(kind, state), path)
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="expected") as caught:
        load_weights(path, model)
    assert words in str(caught.value)
    assert ONE_LINE.fullmatch(str(caught.value)), caught.value
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_distances_of_a_normalised_model_are_in_pixel_units() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 4)
    model = Normalized(nn.Sequential(nn.Flatten(), layer), [0.1, 0.5, 0.9], [0.5, 0.25, 0.2])
    images = 0.3 + 0.4 * torch.rand(5, 3, 2, 2)
    # W ((x - m) / s) + b is an affine model of x
    scale = torch.tensor([0.5, 0.25, 0.2]).repeat_interleave(4)
    mean = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(4)
    weight = layer.weight / scale
    for norm in ("l2", "linf"):
        exact = affine_margins(weight, layer.bias - weight @ mean, images, norm, domain="box")  # type: ignore[arg-type]
        found = measure(model, images, create("cascade"), norm).distance  # type: ignore[arg-type]
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"), [("", None), ("0.5:0.25", ((0.5,), (0.25,))), ("1,2,3:4,5,6", ((1, 2, 3), (4, 5, 6)))]
)
def test_normalisation_is_read(text: str, expected: object) -> None:
    assert parse_normalize(text) == expected


@pytest.mark.parametrize("text", ["0.5", "0.5:0", "0.5:-1", "a:b", "1,2:3", "nan:1", ":", "1:2:3"])
def test_an_invalid_normalisation_gives_a_one_line_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected --normalize as MEAN:STD, .*, got .*; write it so"):
        parse_normalize(text)


def test_a_torchvision_model_is_built(tmp_path: Path) -> None:
    model = build("torchvision:squeezenet1_1", (3, 32, 32), 7, seed=0, normalize=([0.5] * 3, [0.2] * 3))
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    again = build("torchvision:squeezenet1_1", (3, 32, 32), 7, seed=0)
    save_file(again.state_dict(), tmp_path / "weights.safetensors")
    other = build("torchvision:squeezenet1_1", (3, 32, 32), 7, seed=1, weights=tmp_path / "weights.safetensors")
    assert same(other, again)
    for name in ("torchvision:nothing", "timm:nothing", "torchvision:resnet18"):
        with pytest.raises(ValueError, match="expected") as caught:
            build(name, (1, 8, 8), 7, seed=0)
        assert ONE_LINE.fullmatch(str(caught.value)), caught.value


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_a_timm_model_is_built() -> None:
    model = build("timm:resnet10t", (1, 32, 32), 5, seed=0)
    assert model.eval()(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def is_robustbench_here() -> bool:
    try:
        return bool(metadata.version("robustbench"))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(is_robustbench_here(), reason="RobustBench is installed")
def test_the_torchattacks_folder_is_not_mistaken_for_robustbench() -> None:
    assert importlib.util.find_spec("robustbench") is not None
    with pytest.raises(ValueError, match=r"expected the package robustbench, got none \(torchattacks") as caught:
        build("robustbench:Standard", (3, 32, 32), 10, seed=0)
    assert ONE_LINE.fullmatch(str(caught.value))


@pytest.mark.skipif(not is_robustbench_here(), reason="RobustBench is not installed")
def test_a_network_of_robustbench_has_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet
    from robustbench.utils import load_model

    # as downloaded by `load_model`
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = WideResNet(depth=28, widen_factor=10).state_dict()
    (tmp_path / "models/cifar10/Linf").mkdir(parents=True)
    torch.save({"state_dict": state}, "models/cifar10/Linf/Standard.pt")
    model = build("robustbench:Standard", (3, 32, 32), 10, seed=0)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), load_model("Standard", threat_model="Linf")(images))
    for name, classes in (("Nobody2020", 10), ("L3/Standard", 10), ("Standard", 7)):
        with pytest.raises(ValueError, match=r"expected .*obust.*ench") as caught:
            build(f"robustbench:{name}", (3, 32, 32), classes, seed=0)
        assert ONE_LINE.fullmatch(str(caught.value)), caught.value


def test_files_of_torchattacks_that_replace_those_of_robustbench_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class File(str):
        hash = SimpleNamespace(mode="sha256", value="47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU")  # of nothing
        content = b""

        def read_binary(self) -> bytes:
            return self.content

    file = File("robustbench/utils.py")
    monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(files=[file]))
    check_robustbench()
    file.content = b"import other"
    with pytest.raises(ValueError, match="got torchattacks' in their place; reinstall"):
        check_robustbench()
