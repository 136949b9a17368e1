"""One definition of a run: defaults, precedence, checks, fingerprint, and the help that states it all without torch."""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.config.devices import sized
from harness.config.options import ConfigError, OneLineParser, add_options
from harness.config.run_config import RunConfig, as_dict, digest, from_dict, from_namespace

ROOT = Path(__file__).resolve().parent.parent
ONE_LINE = re.compile(r"expected .+, got .+; .+")

# DESIGN.md, section 4, and what was added to it since
DESIGN = """--dataset --data-root --download --train-images --test-images --model --normalize --checkpoints --weights
    --training --pgd-epsilon --pgd-steps --pgd-step-size --pgd-norm --trades-beta --noise-sigma --augment
    --loss --optimizer --learning-rate --weight-decay --batch-size --epochs --estimator --norm --domain
    --noise-retries --probe --probe-seed --every --warm-start --cold-every --keep-checkpoints --certify
    --certify-every --certify-probe --expect-over --binary --seed --deterministic --log --engine --workers
    --gpus-per-worker --unit-timeout --device --threads --measure-batch"""
FLAGS = DESIGN.split()
COMMAND_FLAGS = ["--config", "--out", "--resume", "--list-estimators"]

# another value of every option; in the fingerprint, so another run ...
FIXED: dict[str, Any] = {
    "dataset": "mnist",
    "train_images": 100,
    "test_images": 100,
    "model": "dense",
    "normalize": "0.5:0.25",
    "weights": "mine.safetensors",
    "training": "pgd",
    "pgd_epsilon": 0.2,
    "pgd_steps": 3,
    "pgd_step_size": 0.5,
    "pgd_norm": "l2",
    "trades_beta": 1.0,
    "noise_sigma": 0.1,
    "augment": "flip",
    "loss": "hinge",
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.1,
    "batch_size": 7,
    "domain": "free",
    "noise_retries": 0,
    "probe": 5,
    "probe_seed": 1,
    "warm_start": True,
    "seed": 1,
    "deterministic": True,
    "measure_batch": 7,
    "certify_probe": 3,
    "expect_over": 4,
    "binary": True,
}
# ... or not
FREE: dict[str, Any] = {
    "data_root": "elsewhere",
    "download": True,
    "epochs": 3,
    "estimator": ("fmn",),
    "norm": ("l2",),
    "every": 2,
    "cold_every": 2,
    "keep_checkpoints": 2,
    "checkpoints": "ckpt/*.pt",
    "certify": ("crown",),
    "certify_every": 2,
    "log": ("tensorboard:here",),
    "engine": "ray",
    "workers": 2,
    "gpus_per_worker": 0.5,
    "unit_timeout": 2.5,
    "device": "cpu",
    "threads": 2,
}


def parse(*argv: str) -> RunConfig:
    """What the command makes of these arguments."""
    parser = OneLineParser(prog="track", allow_abbrev=False)
    add_options(parser, dataclasses.fields(RunConfig))
    return from_namespace(parser.parse_args(argv))


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert ONE_LINE.fullmatch(message), message
    return message


def toml(folder: Path, text: str) -> str:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# defaults and precedence


def test_every_option_of_the_design_exists_and_no_other() -> None:
    names = [field.name for field in dataclasses.fields(RunConfig)]
    assert sorted(FLAGS) == sorted("--" + name.replace("_", "-") for name in names)
    assert sorted(FIXED.keys() | FREE.keys()) == sorted(names)
    assert not FIXED.keys() & FREE.keys()


def test_the_defaults_are_those_of_the_design() -> None:
    assert as_dict(parse()) == {
        "dataset": "digits",
        "data_root": "data",
        "download": False,
        "train_images": None,
        "test_images": None,
        "model": "cnn",
        "normalize": "",
        "checkpoints": "",
        "weights": "",
        "training": "standard",
        "pgd_epsilon": 0.1,
        "pgd_steps": 10,
        "pgd_step_size": 0.025,
        "pgd_norm": "linf",
        "trades_beta": 6.0,
        "noise_sigma": 0.25,
        "augment": "none",
        "loss": "cross-entropy",
        "optimizer": "adam",
        "learning_rate": 0.001,
        "weight_decay": 0.0,
        "batch_size": 32,
        "epochs": 20,
        "estimator": ["deepfool"],
        "norm": ["l2", "linf"],
        "domain": "box",
        "noise_retries": 6,
        "probe": 1000,
        "probe_seed": 0,
        "every": 1,
        "warm_start": False,
        "cold_every": 5,
        "keep_checkpoints": 1,
        "certify": [],
        "certify_every": 5,
        "certify_probe": 100,
        "expect_over": 1,
        "binary": False,
        "seed": 0,
        "deterministic": False,
        "log": [],
        "engine": "local",
        "workers": 0,
        "gpus_per_worker": 0.0,
        "unit_timeout": None,
        "device": "auto",
        "threads": 1,
        "measure_batch": 500,
    }


@pytest.mark.parametrize(
    ("dataset", "epsilon", "batch", "epochs", "threads", "measure_batch"),
    [
        ("digits", 0.1, 32, 20, 1, 500),
        ("mnist", 0.3, 128, 40, None, None),
        ("fashion-mnist", 0.1, 128, 40, None, None),
        ("cifar10", 8 / 255, 128, 40, None, None),
    ],
)
def test_unset_options_depend_on_the_data_set(
    dataset: str, epsilon: float, batch: int, epochs: int, threads: int | None, measure_batch: int | None
) -> None:
    config = parse("--dataset", dataset)
    assert config.pgd_epsilon == epsilon
    assert config.pgd_step_size == 2.5 * epsilon / 10
    found = (config.batch_size, config.epochs, config.threads, config.measure_batch)
    assert found == (batch, epochs, threads, measure_batch)
    # what the data set leaves open the device decides; a device that is not here does, too
    sizes = [sized(config, torch.device(kind)).measure_batch for kind in ("cpu", "cuda")]
    assert sizes == [measure_batch or 128, measure_batch or 1000]
    asked = sized(parse("--dataset", dataset, "--measure-batch", "9"), torch.device("cuda"))
    assert asked.measure_batch == 9
    options = parse(
        "--dataset", dataset, "--batch-size", "5", "--epochs", "0", "--threads", "3", "--pgd-epsilon", "0.4"
    )
    assert (options.batch_size, options.epochs, options.threads, options.pgd_epsilon) == (5, 0, 3, 0.4)
    assert options.pgd_step_size == pytest.approx(0.1, rel=1e-12)
    assert parse("--dataset", dataset, "--pgd-steps", "5").pgd_step_size == 2.5 * epsilon / 5
    assert parse("--dataset", dataset, "--pgd-step-size", "0.07").pgd_step_size == 0.07


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    file = toml(
        tmp_path, 'epochs = 3\nbatch-size = 9\nprobe_seed = 4\nestimator = ["fmn", "ddn"]\ndeterministic = true'
    )
    config = parse("--config", file)
    assert (config.epochs, config.batch_size, config.probe_seed) == (3, 9, 4)
    assert config.estimator == ("fmn", "ddn")
    assert config.deterministic is True
    assert config.seed == 0
    over = parse("--config", file, "--epochs", "7", "--estimator", "pgd")
    # given once, a repeatable option replaces the file's list: it does not add to it
    assert (over.epochs, over.batch_size, over.estimator) == (7, 9, ("pgd",))


def test_dashes_and_underscores_are_the_same_in_a_file(tmp_path: Path) -> None:
    dashes = parse("--config", toml(tmp_path, "weight-decay = 0.5\nprobe-seed = 3"))
    underscores = parse("--config", toml(tmp_path, "weight_decay = 0.5\nprobe_seed = 3"))
    assert dashes == underscores == parse("--weight-decay", "0.5", "--probe-seed", "3")
    assert dashes != parse("--weight-decay", "0.25", "--probe-seed", "3")


def test_a_whole_number_in_a_file_is_the_same_run_as_on_the_command_line(tmp_path: Path) -> None:
    file, line = parse("--config", toml(tmp_path, "learning-rate = 1")), parse("--learning-rate", "1")
    assert digest(file.fingerprint) == digest(line.fingerprint)
    assert digest(file.fingerprint) != digest(parse("--learning-rate", "2").fingerprint)


def test_any_configuration_round_trips_through_json() -> None:
    config = parse()
    for name, value in (FIXED | FREE).items():
        changed = dataclasses.replace(config, **{name: value})
        assert changed != config, name
        assert from_dict(json.loads(json.dumps(as_dict(changed)))) == changed, name


# refusals


@pytest.mark.parametrize(
    ("argv", "what", "got"),
    [
        ("--probe 0", "--probe of at least 1", "0"),
        ("--probe 2.5", "--probe to be of type int", "'2.5'"),
        ("--probe many", "--probe to be of type int", "'many'"),
        ("--epochs -1", "--epochs of at least 0", "-1"),
        ("--every 0", "--every of at least 1", "0"),
        ("--threads 0", "--threads of at least 1", "0"),
        ("--measure-batch 0", "--measure-batch of at least 1", "0"),
        ("--batch-size 0", "--batch-size of at least 1", "0"),
        ("--noise-retries -1", "--noise-retries of at least 0", "-1"),
        ("--seed -1", "--seed of at least 0", "-1"),
        ("--seed 9223372036854775808", "--seed below", "9223372036854775808"),
        ("--learning-rate 0", "--learning-rate above 0", "0.0"),
        ("--learning-rate nan", "--learning-rate above 0", "nan"),
        ("--learning-rate inf", "--learning-rate below", "inf"),
        ("--weight-decay -0.1", "--weight-decay of at least 0", "-0.1"),
        ("--weight-decay inf", "--weight-decay below", "inf"),
        ("--pgd-epsilon 0", "--pgd-epsilon above 0", "0.0"),
        ("--noise-sigma 0", "--noise-sigma above 0", "0.0"),
        ("--pgd-step-size x", "--pgd-step-size to be of type float", "'x'"),
        ("--dataset svhn", "digits, mnist, fashion-mnist, cifar10", "'svhn'"),
        ("--training free", "standard, pgd, trades, gaussian", "'free'"),
        ("--training pgd --pgd-norm l2", "--pgd-epsilon with --pgd-norm l2", "none"),
        ("--loss mse", "cross-entropy, label-smoothing, hinge, squared-error", "'mse'"),
        ("--optimizer lamb", "adam, adamw, sgd", "'lamb'"),
        ("--domain ball", "box, free", "'ball'"),
        ("--norm l1", "l2, linf", "'l1'"),
        ("--norm l2 --norm l2", "each --norm once", "l2, l2"),
        ("--estimator fmn --estimator fmn", "each --estimator once", "fmn, fmn"),
        ("--estimator depfool", "deepfool, fmn, ddn", "'depfool'; did you mean 'deepfool'?"),
        (
            "--model vgg",
            "dense, cnn, resnet18, torchvision:NAME, timm:NAME, robustbench:NAME or pkg.module:factory",
            "'vgg'",
        ),
    ],
)
def test_a_bad_option_gives_a_one_line_error_with_the_expected_value(argv: str, what: str, got: str) -> None:
    message = refusal(*argv.split())
    expected, _, rest = message.partition(", got ")
    assert what in expected
    assert rest.startswith(got)


@pytest.mark.parametrize(
    ("text", "what", "got"),
    [
        ("epochs = ", "a TOML file at", "Invalid value"),
        ("epochs", "a TOML file at", "Expected '=' after a key"),
        ("epoch = 3", "options of augment, batch_size, ", "epoch; remove"),
        ("[training]\nloss = 'hinge'", "--training to be of type str", "{'loss': 'hinge'}"),
        ("[run]\nepochs = 3", "options of augment, batch_size, ", "run; remove"),
        ("epochs = '3'", "--epochs to be of type int", "'3'"),
        ("epochs = 3.0", "--epochs to be of type int", "3.0"),
        ("epochs = true", "--epochs to be of type int", "True"),
        ("seed = 1e400", "--seed to be of type int", "inf"),
        ("learning-rate = true", "--learning-rate to be of type float", "True"),
        ("learning-rate = 1979-05-27", "--learning-rate to be of type float", "datetime.date"),
        (f"learning-rate = {10**400}", "--learning-rate below", "1000"),
        ("download = 1", "--download to be of type bool", "1"),
        ("model = 3", "--model to be of type str", "3"),
        ("estimator = 'fmn'", "--estimator as one or more names", "'fmn'"),
        ("estimator = []", "--estimator as one or more names", "()"),
        ("estimator = [3]", "--estimator as one or more names", "(3,)"),
        ("norm = ['l2', 'l2']", "each --norm once", "l2, l2"),
        ("probe = 0", "--probe of at least 1", "0"),
        ("batch-size = 3\nbatch_size = 4", "each option once in", "batch-size with dashes"),
        ("config = 'other.toml'", "options of augment, batch_size, ", "config; remove"),
    ],
)
def test_a_bad_file_gives_a_one_line_error(tmp_path: Path, text: str, what: str, got: str) -> None:
    message = refusal("--config", toml(tmp_path, text))
    expected, _, rest = message.partition(", got ")
    assert what in expected
    assert rest.startswith(got)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"model = '\xe9'")
    for path in (tmp_path / "none.toml", tmp_path, latin):
        assert f"expected a TOML file at {path}, got " in refusal("--config", str(path))


def test_the_programs_own_fields_are_checked_like_the_options() -> None:
    with pytest.raises(ConfigError, match=r"expected --probe of at least 1, got 0; "):
        RunConfig(probe=0)
    with pytest.raises(ConfigError, match=r"expected options of .*, got epoch, prob; remove them"):
        from_dict({"prob": 3, "epoch": 3, "seed": 1})
    assert from_dict({"probe": 3, "seed": 1}) == RunConfig(probe=3, seed=1)


# fingerprint


@pytest.mark.parametrize("name", FIXED)
def test_another_value_changes_the_fingerprint(name: str) -> None:
    plain = parse()
    changed = dataclasses.replace(plain, **{name: FIXED[name]})
    assert digest(changed.fingerprint) != digest(plain.fingerprint)
    keys = plain.fingerprint | changed.fingerprint
    differing = [key for key in keys if plain.fingerprint.get(key) != changed.fingerprint.get(key)]
    assert differing == [name]


def test_options_added_later_keep_the_fingerprint_of_earlier_runs() -> None:
    later = {f.name for f in dataclasses.fields(RunConfig) if f.metadata["later"]}
    assert later == {
        *("warm_start", "noise_sigma", "certify_probe", "normalize", "weights", "pgd_norm", "trades_beta", "augment"),
        *("expect_over", "binary"),
    }
    assert parse().fingerprint.keys() == FIXED.keys() - later


@pytest.mark.parametrize("name", FREE)
def test_options_that_extend_or_move_a_run_keep_its_fingerprint(name: str) -> None:
    plain = parse()
    changed = dataclasses.replace(plain, **{name: FREE[name]})
    assert changed != plain
    assert changed.fingerprint == plain.fingerprint
    assert digest(changed.fingerprint) == digest(plain.fingerprint)


def test_the_digest_does_not_depend_on_the_order() -> None:
    fingerprint = parse().fingerprint
    assert digest(dict(reversed(fingerprint.items()))) == digest(fingerprint)
    assert re.fullmatch(r"[0-9a-f]{64}", digest(fingerprint))


# help and usage errors


def run_without_torch(tmp_path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where importing torch ends the process with code 99."""
    (tmp_path / "torch.py").write_text("import os\nos._exit(99)\n", encoding="utf-8")
    program = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; {code}"
    return subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, cwd=tmp_path)


def track_without_torch(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return run_without_torch(tmp_path, f"from harness.track import main; sys.exit(main({list(argv)}))")


def test_help_states_every_default_without_torch(tmp_path: Path) -> None:
    done = track_without_torch(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    # one entry per option, each on a separate line in the second half
    entries = {}
    for entry in re.split(r"\n  (?=-)", done.stdout.partition("options:\n")[2]):
        words = entry.split()
        entries[next(word for word in words if word.startswith("--")).strip(",")] = " ".join(words)
    assert {*FLAGS, *COMMAND_FLAGS} <= entries.keys()
    defaults = {
        "--dataset": "digits",
        "--data-root": "data",
        "--download": "no",
        "--train-images": "all",
        "--test-images": "all",
        "--model": "cnn",
        "--normalize": "none",
        "--checkpoints": "none",
        "--weights": "none",
        "--training": "standard",
        "--pgd-epsilon": "mnist 0.3, digits and fashion-mnist 0.1, else 8/255",
        "--pgd-steps": "10",
        "--pgd-step-size": "2.5 * epsilon / steps",
        "--pgd-norm": "linf",
        "--trades-beta": "6.0",
        "--noise-sigma": "0.25",
        "--augment": "none",
        "--loss": "cross-entropy",
        "--optimizer": "adam",
        "--learning-rate": "0.001",
        "--weight-decay": "0.0",
        "--batch-size": "32 on digits, else 128",
        "--epochs": "20 on digits, else 40",
        "--estimator": "deepfool",
        "--norm": "l2 and linf",
        "--domain": "box",
        "--noise-retries": "6",
        "--probe": "1000",
        "--probe-seed": "0",
        "--every": "1",
        "--warm-start": "no",
        "--cold-every": "5",
        "--keep-checkpoints": "1",
        "--certify": "none",
        "--certify-every": "5",
        "--certify-probe": "100",
        "--expect-over": "1",
        "--binary": "no",
        "--seed": "0",
        "--deterministic": "no",
        "--log": "none",
        "--engine": "local",
        "--workers": "0",
        "--gpus-per-worker": "0.0",
        "--unit-timeout": "no limit",
        "--device": "auto",
        "--threads": "1 on digits, too small to share, else torch's choice",
        "--measure-batch": "500 on digits, else 128, on CUDA all of a split",
        "--out": "runs/<data set>-<model>-<training>-<time>",
    }
    assert defaults.keys() == {*FLAGS, "--out"}
    for flag, default in defaults.items():
        assert f"(default: {default})" in entries[flag], flag


def test_certifiers_are_refused_for_an_averaged_network() -> None:
    assert parse("--expect-over", "1", "--certify", "crown").expect_over == 1
    assert refusal("--expect-over", "8", "--certify", "crown") == (
        "expected no certifiers with --expect-over 8, got 1: bounds are proved for one fixed network; leave one of the "
        "two out"
    )
    assert refusal("--expect-over", "0").startswith("expected --expect-over of at least 1, got 0")


def test_the_list_of_estimators_needs_no_torch(tmp_path: Path) -> None:
    done = track_without_torch(tmp_path, "--list-estimators")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert {"deepfool", "fmn", "ddn", "cw", "bb", "pgd", "apgd", "fab", "foolbox", "torchattacks"} <= rows.keys()
    assert re.match(r"deepfool +l2 linf +box free +[0-9-]+ +linearise", rows["deepfool"])
    assert re.match(r"ddn +l2 +box free +\d+ ", rows["ddn"])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--prob 3", "unknown option --prob 3; did you mean --probe?"),
        ("--probe", "expected a value for --probe, got none; give one"),
        (
            "--resume=yes",
            "expected options as in --help, got argument --resume: ignored explicit argument 'yes'; fix them",
        ),
        ("--probe three", "expected --probe to be of type int, got 'three'; write it so"),
        ("--epochs -1", "expected --epochs of at least 0, got -1; give a larger number"),
        ("--resume", "expected --out with --resume, got none; name the run folder to continue"),
    ],
)
def test_a_usage_error_gives_one_line_without_torch(tmp_path: Path, argv: str, line: str) -> None:
    done = track_without_torch(tmp_path, *argv.split())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"track: error: {line}\n")


def test_control_an_import_of_torch_is_detected(tmp_path: Path) -> None:
    # control of the tests above
    assert run_without_torch(tmp_path, "import harness.tracking.tracker").returncode == 99
    assert run_without_torch(tmp_path, "import harness, harness.track, attacks").returncode == 0


def test_unset_options_are_not_in_the_namespace() -> None:
    parser = OneLineParser(prog="track")
    add_options(parser, dataclasses.fields(RunConfig))
    assert parser.parse_args([]) == argparse.Namespace(config=None)
    assert parser.parse_args(["--probe", "3"]) == argparse.Namespace(config=None, probe=3)
