"""Names, the text form, validation of parameters, outside packages; all of it without torch."""

import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attacks.registry import ESTIMATORS, WRAPPERS, check_name, create, known, text_form
from attacks.types import DOMAINS, NORMS, EstimatorError

ROOT = Path(__file__).resolve().parent.parent
ONE_LINE = re.compile(r"(estimator \w+: )?expected .+, got .+; .+")
# another value of each field that is not a number
OTHERS = {"of": "fmn:steps=7/gamma=0.1+ddn", "warm": 100, "most": 700, "engine": "foolbox", "polish": False}
NAMED = sorted(set(ESTIMATORS) - set(WRAPPERS))


def refusal(text: str) -> str:
    """The one-line error of `create` for this text."""
    with pytest.raises(EstimatorError) as caught:
        create(text)
    message = str(caught.value)
    assert ONE_LINE.fullmatch(message), message
    return message


@pytest.mark.parametrize("name", NAMED)
def test_the_list_states_what_the_class_can_do(name: str) -> None:
    estimator, entry = create(name), ESTIMATORS[name]
    assert estimator.name == name
    assert set(entry.norms) == estimator.norms
    assert set(entry.domains) == estimator.domains
    assert set(estimator.tightness) == estimator.norms
    assert estimator.norms <= set(NORMS)
    assert estimator.domains <= set(DOMAINS)
    assert entry.cost
    assert entry.about


@pytest.mark.parametrize("name", NAMED)
def test_the_text_form_omits_defaults_and_keeps_every_other_field(name: str) -> None:
    plain = create(name)
    assert text_form(plain) == name
    fields = dataclasses.fields(plain)  # type: ignore[arg-type]
    spelled_out = ",".join(f"{field.name}={getattr(plain, field.name)}" for field in reversed(fields))
    assert create(f"{name}:{spelled_out}") == plain
    assert text_form(create(f"{name}:{spelled_out}")) == name
    others = {f.name: OTHERS[f.name] if f.name in OTHERS else getattr(plain, f.name) + 1 for f in fields}
    changed = dataclasses.replace(plain, **others)  # type: ignore[type-var]
    assert create(text_form(changed)) == changed
    keys = [pair.partition("=")[0] for pair in text_form(changed).partition(":")[2].split(",")]
    assert keys == [field.name for field in fields], "declared order"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("fmn:", "fmn"),
        ("fmn:gamma=0.2,steps=200", "fmn:steps=200,gamma=0.2"),
        ("fmn: steps = 200 ,", "fmn:steps=200"),
        ("deepfool:overshoot=0.020", "deepfool"),
        ("pgd:temperature=0", "pgd:temperature=0.0"),
        ("fmn:stride=1e-5", "fmn:stride=1e-05"),
        ("foolbox:L2PGD", "foolbox:L2PGD"),
        (
            "foolbox:L2PGD:steps=5,random_start=False,epsilon=0.5",
            "foolbox:L2PGD:epsilon=0.5,random_start=false,steps=5",
        ),
        ("foolbox:L2PGD:abs_stepsize=NONE", "foolbox:L2PGD:abs_stepsize=none"),
        ("torchattacks:CW:lr=0.1,c=2", "torchattacks:CW:c=2,lr=0.1"),
    ],
)
def test_the_text_form_is_canonical(text: str, canonical: str) -> None:
    assert text_form(create(text)) == canonical
    assert create(canonical) == create(text)
    assert text_form(create(canonical)) == canonical


def test_values_are_parsed_to_their_types() -> None:
    attack = create("foolbox:L2PGD:steps=5,random_start=true,abs_stepsize=none,rel_stepsize=1e-1")
    values = dict(attack.parameters)  # type: ignore[attr-defined]
    assert values == {"steps": 5, "random_start": True, "abs_stepsize": None, "rel_stepsize": 0.1}
    assert [type(v) for v in values.values()] == [type(None), bool, float, int]
    temperature = create("pgd:temperature=2").temperature  # type: ignore[attr-defined]
    assert (temperature, type(temperature)) == (2.0, float)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("fnm", "fmn"), ("deep-fool:steps=3", "deepfool"), ("DeepFool", "deepfool"), ("torchattack:PGD", "torchattacks")],
)
def test_an_unknown_name_lists_the_known_and_the_closest(text: str, nearest: str) -> None:
    message = refusal(text)
    assert f"expected an estimator of {', '.join(ESTIMATORS)}" in message
    assert f"got {text.partition(':')[0]!r}; did you mean {nearest!r}?" in message


@pytest.mark.parametrize("text", ["", "zzzzzz", ":steps=3"])
def test_a_dissimilar_name_gets_no_suggestion(text: str) -> None:
    assert refusal(text).endswith("; choose one of them")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fmn:step=3", ["parameter of fmn", "steps: int = 60", "gamma: float = 0.1", "got 'step'"]),
        ("fmn:steps=many", ["fmn's steps to be of type int (default 60)", "got 'many'"]),
        ("fmn:steps=2.5", ["fmn's steps to be of type int", "got '2.5'"]),
        ("fmn:steps=true", ["fmn's steps to be of type int", "got 'true'"]),
        ("fmn:steps=", ["fmn's steps to be of type int", "got ''"]),
        ("fmn:steps=none", ["fmn's steps to be of type int", "got 'none'"]),
        ("deepfool:overshoot=true", ["deepfool's overshoot to be of type float (default 0.02)", "got 'true'"]),
        ("fmn:steps=0", ["steps to be an integer of at least 1, got 0; the default is 60"]),
        ("deepfool:candidates=1", ["candidates to be an integer of at least 2, got 1; the default is 10"]),
        ("deepfool:overshoot=-0.1", ["overshoot to be a number of at least 0, got -0.1; the default is 0.02"]),
        ("deepfool:overshoot=nan", ["overshoot to be a number of at least 0, got nan"]),
        ("fmn:steps=3,steps=4", ["key=value,key=value, got 'steps=3,steps=4'; write each once"]),
        ("fmn:steps", ["key=value,key=value, got 'steps'"]),
        ("foolbox", ["foolbox:<ClassName>", "got 'foolbox'"]),
        ("torchattacks:", ["torchattacks:<ClassName>", "got 'torchattacks:'"]),
        ("foolbox:L2PGD:steps=1,steps=2", ["write each once"]),
    ],
)
def test_parameters_are_checked_with_type_and_default_in_the_message(text: str, parts: list[str]) -> None:
    message = refusal(text)
    for part in parts:
        assert part in message


def test_settings_are_checked_without_the_text_form_too() -> None:
    cls = type(create("deepfool"))
    with pytest.raises(EstimatorError, match=r"expected steps to be an integer of at least 1, got 2\.0"):
        cls(steps=2.0)
    with pytest.raises(EstimatorError, match="expected overshoot to be a number of at least 0, got True"):
        cls(overshoot=True)


OUTSIDE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine:
    name = "mine"
    norms = frozenset({"l2"})
    domains = frozenset({"box"})
    tightness = {"l2": 1.0}
    batch_invariant = True

    steps: int = 3
    limit: int | None = None
    mode: str = "slow"

    def perturb(self, model, images, labels, norm, *, seeds, start=None):
        return 1 - images

class Plain:
    name = "plain"

@dataclasses.dataclass(frozen=True, kw_only=True)
class Needy:
    name = "needy"
    size: int
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real distribution folder on sys.path, with working and broken entry points."""
    (tmp_path / "outside_estimators.py").write_text(OUTSIDE, encoding="utf-8")
    info = tmp_path / "outside-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n", encoding="utf-8")
    points = {
        "mine": "outside_estimators:Mine",
        "plain": "outside_estimators:Plain",
        "needy": "outside_estimators:Needy",
        "gone": "outside_estimators:Gone",
        "nowhere": "no_such_module:Gone",
        "fmn": "outside_estimators:Mine",
    }
    lines = ["[margin_harness.estimators]", *(f"{name} = {target}" for name, target in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("outside_estimators", None)


@pytest.mark.usefixtures("installed")
def test_external_packages_add_estimators() -> None:
    assert list(known()) == [*ESTIMATORS, "mine", "plain", "needy", "gone", "nowhere"]
    assert known()["mine"].about == "from outside_estimators"
    assert known()["fmn"] == ESTIMATORS["fmn"], "ours cannot be replaced"
    assert check_name("mine:steps=5") == "mine"
    mine = create("mine:mode=7,steps=5,limit=2")
    assert (mine.steps, mine.limit, mine.mode) == (5, 2, "7")  # type: ignore[attr-defined]
    assert text_form(mine) == "mine:steps=5,limit=2,mode=7"
    assert create(text_form(mine)) == mine
    assert create("mine:limit=none") == create("mine")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mine:step=5", "a parameter of mine (steps: int = 3, limit: int | None = None, mode: str = slow)"),
        ("gone", "an estimator class at outside_estimators:Gone"),
        ("nowhere", "an estimator class at no_such_module:Gone, got No module named 'no_such_module'"),
        ("plain", "a dataclass of hyperparameters at outside_estimators:Plain"),
        ("mien", "did you mean 'mine'?"),
    ],
)
def test_a_broken_external_package_is_named(text: str, part: str) -> None:
    assert part in refusal(text)


@pytest.mark.usefixtures("installed")
def test_an_external_parameter_without_default_is_required() -> None:
    with pytest.raises(EstimatorError, match=r"^estimator needy: .*missing 1 required keyword-only argument: 'size'"):
        create("needy")
    assert create("needy:size=4").size == 4  # type: ignore[attr-defined]


def test_the_list_needs_no_torch() -> None:
    script = """
import sys
import attacks, attacks.registry, attacks.estimator
assert attacks.known() and attacks.registry.check_name("fmn:steps=3") == "fmn"
try:
    attacks.registry.check_name("fnm")
except attacks.EstimatorError:
    pass
loaded = {name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "foolbox", "torchattacks", "eagerpy"}
sys.exit(f"loaded {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_names_of_the_package_raise_attribute_error() -> None:
    import attacks

    assert attacks.create is create
    with pytest.raises(AttributeError, match="module 'attacks' has no attribute 'nothing'"):
        attacks.nothing  # noqa: B018
