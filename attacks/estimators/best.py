"""The envelope of several estimators: per image, the nearest verified witness of all members."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from attacks.certify.network.piecewise import PiecewiseNetwork
from attacks.estimator import Estimator, Settings, revision_of, setting
from attacks.geometry import boundary_fraction, on_segment, row_norm
from attacks.isolation import Classifier
from attacks.polish import Polished, polished, read, warmth
from attacks.pool import Pool, uses_pool, with_pool
from attacks.registry import create, text_form
from attacks.search.linearised import left_class
from attacks.seeds import derive_seed, seed_generators
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, InputError, Norm

# a plus sign before a name separates members; the one in 1e+16 does not
BETWEEN = re.compile(r"\+(?=\s*[A-Za-z_])")
# most units of a network that is polished by default: 28x28 networks have a few thousand, a ResNet half a million
UNITS = 20_000
# revision of the choice among members and of the default members (see `attacks.estimator.Settings`)
REVISION = 3


@dataclass(frozen=True, kw_only=True)
class Best(Settings):
    """Runs its members and returns, per image, the witness with the smallest refined distance.

    The default members are those that won on PGD-trained networks: the long ``cascade`` nearly everywhere, ``apgd`` in
    L-infinity after training with large perturbations.

    Where two members agree on the smallest distance to within ``agreement`` (relative), the members after them are
    not run for that image. With 0, all are.

    Members are separated by ``+`` and their own parameters by ``/``, since commas separate the parameters of ``best``:
    ``best:of=deepfool+fmn:steps=200/gamma=0.2+apgd``. Each member gets the same images, seeds and starts as on its own,
    with the view's state restored and the generators seeded again, so that it finds what it finds on its own without
    noise retries. Noise retries of ``best`` are for images that no member moved. Members that lack the norm or domain
    are skipped. Where a member raises an error, its batch is halved until the affected rows are alone; a row fails
    only if all its members raised. The returned witness is as the winner left it, and the winner's text is the row's
    message in `Margins`. The comparison costs one forward and up to 14 bisections per member and image.

    The ``basins`` are the distance of the second nearest member over that of the nearest.

    With ``polish``, the winner's witness is polished (see `attacks.polish`), which its text states. This applies to
    networks that can be read and have at most ``UNITS`` units; other models are measured without polishing.
    """

    name: ClassVar[str] = "best"

    of: str = setting("cascade:budget=1000+fmn:steps=200+apgd")
    polish: bool = setting(True)
    agreement: float = setting(1e-3, least=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = [part.strip() for part in BETWEEN.split(self.of)]
        if any(part.partition(":")[0] == self.name for part in parts):
            raise EstimatorError(f"expected members other than best, got {self.of!r}; name its members instead")
        texts = [text_form(create(part.replace("/", ","))).replace(",", "/") for part in parts]
        if len(set(texts)) < len(texts):
            raise EstimatorError(f"expected every member once, got {'+'.join(texts)}; leave the others out")
        object.__setattr__(self, "of", "+".join(texts))
        if not self.domains:
            raise EstimatorError(f"expected members that share a domain, got {self.of}; choose others")

    @cached_property
    def members(self) -> Mapping[str, Estimator]:
        """The members by their canonical texts, in order."""
        texts = [text.replace("/", ",") for text in BETWEEN.split(self.of)]
        return {text: create(text) for text in texts}

    @property
    def norms(self) -> frozenset[Norm]:
        """The norms that at least one member supports."""
        return frozenset(norm for norm in NORMS for m in self.members.values() if norm in m.norms)

    @property
    def domains(self) -> frozenset[Domain]:
        """The domains that at least one member supports for each of the norms."""
        return frozenset(d for d in DOMAINS if all(self._able(norm, d) for norm in self.norms))

    @property
    def tightness(self) -> Mapping[Norm, float]:
        """The smallest value that a member declares: the median of a minimum is below every member's."""
        declared = [(norm, limit) for m in self.members.values() for norm, limit in m.tightness.items()]
        return {norm: min(limit for n, limit in declared if n == norm) for norm, _ in declared}

    @property
    def batch_invariant(self) -> bool:
        """Whether all members are batch invariant."""
        return all(m.batch_invariant for m in self.members.values())

    @property
    def uses_pool(self) -> bool:
        """Whether any member takes a pool."""
        return any(uses_pool(m) for m in self.members.values())

    @property
    def revision(self) -> int:  # type: ignore[override]
        """Rises with the revision of every member, and of polishing with ``polish``."""
        return REVISION + sum(revision_of(_polished(m) if self.polish else m) - 1 for m in self.members.values())

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
        pool: Pool | None = None,
    ) -> Tensor:
        """See `Estimator.perturb`."""
        result, winner = images.clone(), [""] * len(images)
        least, second = (torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device) for _ in "12")
        answered = torch.zeros_like(labels, dtype=torch.bool)
        errors: list[BaseException] = []
        for text, member in self._able(norm, model.domain).items():
            agreed = (second <= least * (1 + self.agreement)) & second.isfinite() & (self.agreement > 0)
            rows = torch.nonzero(~agreed)
            rows = rows.flatten()
            if not len(rows):
                break
            call = _Call(member, model, images, labels, norm, seeds, start, pool)
            candidates = call.run(rows)
            errors += call.errors
            answered |= call.answered
            distance = torch.full_like(least, torch.inf)
            with model.rows(rows):
                distance[rows] = refined_distance(model, images[rows], labels[rows], candidates[rows], norm)
            for row in torch.nonzero(distance < least).flatten().tolist():
                result[row], winner[row] = candidates[row], text
            second = torch.minimum(torch.maximum(least, distance), second)
            least = torch.minimum(least, distance)
        if not answered.all():
            # `measure` halves the batch too and keeps the message of the rows that are alone
            raise errors[0]
        if self.polish and (network := _readable(model, images)) is not None:
            self._polish(network, model, images, labels, result, winner, norm)
        model.note(winner)
        model.disagree(torch.where(second.isfinite(), second, torch.nan) / least)
        return result

    def _polish(
        self,
        network: PiecewiseNetwork,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        result: Tensor,
        winner: list[str],
        norm: Norm,
    ) -> None:
        """Polish the witnesses of winners that do not polish themselves, in place; their texts say so."""
        texts = {text: text_form(_polished(member)) for text, member in self.members.items()}
        changed = [row for row, text in enumerate(winner) if texts.get(text, text) != text]
        rows = torch.tensor(changed, dtype=torch.long, device=images.device)
        if len(rows):
            with model.rows(rows):
                result[rows] = polished(network, model, images[rows], labels[rows], result[rows], norm)
            for row in changed:
                winner[row] = texts[winner[row]]

    def _able(self, norm: Norm, domain: Domain) -> dict[str, Estimator]:
        return {t: m for t, m in self.members.items() if norm in m.norms and domain in m.domains}


def _polished(member: Estimator) -> Estimator:
    """The member with polishing, unless it polishes already or has warm starts."""
    return member if isinstance(member, Polished) or warmth(member) else Polished(inner=member)


def _readable(model: Classifier, images: Tensor) -> PiecewiseNetwork | None:
    """The network to polish in; None where the model cannot be read or is too large."""
    try:
        return read(model, images, UNITS)
    except InputError:
        return None


class _Call:
    """The call of one member on one batch; ``answered`` ``(B,)`` bool: the rows on which it did not raise."""

    def __init__(
        self,
        member: Estimator,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        seeds: Tensor,
        start: Tensor | None,
        pool: Pool | None,
    ) -> None:
        self.pool = with_pool(member, pool)
        self.member, self.model, self.images, self.labels = member, model, images, labels
        self.norm, self.seeds, self.start = norm, seeds, start
        self.answered = torch.zeros_like(labels, dtype=torch.bool)
        self.errors: list[BaseException] = []
        self.result = images.clone()

    def run(self, rows: Tensor) -> Tensor:
        """Run the member on these rows ``(A,)``; returns candidates of the batch, the image itself where it raised."""
        seed_generators(derive_seed("chunk", *self.seeds[rows].tolist()))
        try:
            with self.model.rows(rows):
                candidates = self.member.perturb(
                    self.model,
                    self.images[rows].clone(),
                    self.labels[rows].clone(),
                    self.norm,
                    seeds=self.seeds[rows],
                    start=None if self.start is None else self.start[rows].clone(),
                    **self.pool,
                )
        except (EstimatorError, InputError):
            raise
        except (Exception, SystemExit) as error:
            self.errors.append(error)
            if len(rows) > 1:
                half = len(rows) // 2
                self.run(rows[:half])
                self.run(rows[half:])
        else:
            self.answered[rows] = True
            self.result[rows] = candidates.detach().to(self.images)
        finally:
            self.model.settle()
        return self.result


@torch.no_grad()
def refined_distance(model: Classifier, images: Tensor, labels: Tensor, candidates: Tensor, norm: Norm) -> Tensor:
    """Distance ``(B,)`` float64 of each candidate after bisection towards its image; inf if it is not a witness."""
    points = candidates.clamp(*model.bounds)

    def outside(middle: Tensor, rows: Tensor) -> Tensor:
        with model.rows(rows):
            logits: Tensor = model(middle)
        return left_class(logits, labels[rows])

    finite = torch.nonzero(points.flatten(1).isfinite().all(1)).flatten()
    rows = finite[outside(points[finite], finite)]
    distance = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
    if len(rows):
        fraction = boundary_fraction(lambda middle, active: outside(middle, rows[active]), images[rows], points[rows])
        distance[rows] = row_norm(on_segment(images[rows], points[rows], fraction) - images[rows], norm)
    return torch.where(distance > 0, distance, torch.inf)
