"""The loss under which a sparse student of a frozen dense model is trained together with its bridges [G 2.3, A.3, A.4].

The loss of a step, each term with its own coefficient:

    CE(student)  +  KL(y_d || y_s)
    +  sum over sites i of   NMSE(f_i(h_d), h_s) + NMSE(g_i(h_s), h_d)
    +  sum over sites i of   KL(y_d || student from i on f_i(h_d))  +  KL(y_d || dense model from i on g_i(h_s))

The last line costs a partial pass of each model per site. By default one site per step stands for all of them, with
the weight 2L+1, so that the expectation of the loss and of its gradient is that of the full sum. Sites are dealt from
a shuffled deck, each once in 2L+1 steps, and the deck is a function of seed and step: resuming needs no state.

The dense model's weights are frozen, but in the last term the gradient runs *through* its later layers, to g_i and to
the student's stream before site i.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bridges.hybrid import cross
from bridges.losses import Reference, cross_entropy, nmse
from bridges.maps import Bridges, BridgeShape, check_bridges
from bridges.metrics import recorded
from bridges.targets import LiveTeacher, Teacher, arithmetic
from distill.command import no_type_check
from distill.model.run import Runnable


@no_type_check
@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Terms of the loss and how they are estimated; every value is checked when it is made."""

    ce: float = 1.0
    """Coefficient of the student's cross-entropy on the tokens."""
    kl: float = 1.0
    """Coefficient of KL(dense || student); 0 in the source."""
    nmse: float = 1.0
    """Coefficient of the NMSE of encoders and decoders, summed over sites."""
    kl_d2s: float = 1.0
    """Coefficient of KL(dense || student run on from the encoded dense stream), summed over sites."""
    kl_s2d: float = 1.0
    """Coefficient of KL(dense || dense model run on from the decoded student's stream), summed over sites."""
    k_fraction: float = 0.25
    """Share of channels that an encoder leaves non-zero, in (0, 1]; 1 switches its AbsTopK off."""
    sites: Literal["sample", "all"] = "sample"
    """Partial passes per step: from one site, with weight 2L+1, or from all of them."""
    nmse_sites: Literal["sample", "all"] = "all"
    """NMSE terms per step: of the sampled site, with weight 2L+1, or of all sites, which costs no pass."""
    kl_top: int | None = None
    """Tokens kept apart in each KL, the dense model's likeliest, all others one class; none: full vocabulary."""
    first_position: Literal["auto", "in", "out"] = "auto"
    """Whether NMSE counts position 0; auto: unless the dense model's norm there exceeds 10 times the median."""
    initial: Literal["random", "least_squares"] = "random"
    """Bridges at the start: Gaussian, or the least-squares ones for the untrained student."""
    recompute: bool = False
    """Whether partial passes and their KL are computed again in the backward pass, to save memory."""
    dense_precision: Literal["training", "float32", "bfloat16"] = "training"
    """Arithmetic of the frozen dense model's passes: that of the training, or always this one."""
    seed: int = 0
    """Seed of the bridges at the start and of the order of sites."""

    def __post_init__(self) -> None:
        for name in ("ce", "kl", "nmse", "kl_d2s", "kl_s2d"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "finite numbers from 0")
        terms = (self.ce, self.kl, self.nmse, self.kl_d2s, self.kl_s2d)
        self._require("ce", any(terms), "numbers above 0 where kl, nmse, kl_d2s and kl_s2d are 0 too")
        self._require("k_fraction", 0 < self.k_fraction <= 1, "above 0, up to 1")
        for name in ("sites", "nmse_sites"):
            self._require(name, getattr(self, name) in ("sample", "all"), "sample, all")
        self._require("kl_top", self.kl_top is None or self.kl_top >= 1, "whole numbers from 1, or none")
        self._require("first_position", self.first_position in ("auto", "in", "out"), "auto, in, out")
        self._require("initial", self.initial in ("random", "least_squares"), "random, least_squares")
        precisions = ("training", "float32", "bfloat16")
        self._require("dense_precision", self.dense_precision in precisions, ", ".join(precisions))
        self._require("seed", self.seed >= 0, "whole numbers from 0")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: got {getattr(self, name)!r}, allowed are {allowed}")

    def shape(self, dense: Runnable, student: Runnable) -> BridgeShape:
        """Shape of the bridges between two models."""
        return BridgeShape(
            n_layer=dense.n_layer,
            d_dense=dense.d_model,
            d_sparse=student.d_model,
            k=max(1, round(self.k_fraction * student.d_model)),
        )

    def site(self, step: int, sites: Sequence[str]) -> str:
        """The site of the partial passes of a step; each site comes once in steps 0 to 2L, 2L+1 to 4L+1, and so on."""
        deal, place = divmod(step, len(sites))
        # RandomState, for numpy promises that its numbers never change.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((self.seed, deal))))
        return sites[int(random.permutation(len(sites))[place])]

    @property
    def reads(self) -> Literal["none", "sample", "all"]:
        """At which sites a step needs the dense residual stream: none, that of its partial passes, or all."""
        wanted = {self.nmse_sites} if self.nmse else set()
        wanted |= {self.sites} if self.kl_d2s else set()
        return "all" if "all" in wanted else "sample" if wanted else "none"

    def read_sites(self, step: int, sites: Sequence[str]) -> tuple[str, ...]:
        """The sites at which a step needs the dense residual stream."""
        return {"none": (), "sample": (self.site(step, sites),), "all": tuple(sites)}[self.reads]


class BridgeObjective:
    """The loss of a student and its bridges, as the shared trainer calls it: (tokens, step) -> (loss, terms)."""

    def __init__(
        self,
        dense: Runnable,
        student: Runnable,
        bridges: Bridges,
        config: BridgeConfig,
        *,
        skip_first: bool = False,
        teacher: Teacher | None = None,
    ) -> None:
        """
        Arguments:
            dense: frozen here for good: evaluation mode, weights without gradients.
            student: trained.
            bridges: trained.
            config: coefficients and estimators.
            skip_first: leave position 0 out of the NMSE terms (`config.first_position` is not looked at).
            teacher: what the dense model says of the text, for partial passes excepted; None: it is run.

        Raises `ValueError` for models that do not fit each other or the bridges.
        """
        check_pair(dense, student)
        check_bridges(bridges, n_layer=dense.n_layer, d_dense=dense.d_model, d_sparse=student.d_model)
        self.dense = dense.eval().requires_grad_(False)
        self.student, self.bridges, self.config = student, bridges, config
        self.first = int(skip_first)
        self.teacher = teacher or LiveTeacher(dense, top=config.kl_top, precision=config.dense_precision)

    def __call__(self, tokens: Int[Tensor, "B T1"], step: int) -> tuple[Float[Tensor, ""], dict[str, float | Tensor]]:
        """
        Arguments:
            tokens: ids with the last target column.
            step: decides the site of the partial passes.

        Returns the loss and, without coefficients, `ce`, `kl`, and `nmse_d2s`, `nmse_s2d`, `kl_d2s`, `kl_s2d` as sums
        over sites (estimates of them where sites are sampled), each with its parts `{term}.{site}`: a part that is
        sampled is logged with its weight, so that the mean over a round of steps is the value at that site. Terms
        with coefficient 0 are not computed.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        seen = self.teacher(inputs, step, self.config.read_sites(step, self.bridges.sites))
        h_d = seen.residuals
        y_s, h_s = recorded(self.student, inputs)
        terms: dict[str, Tensor] = {}
        if self.config.ce:
            terms["ce"] = cross_entropy(y_s, targets)
        if self.config.kl:
            terms["kl"] = seen.reference.kl(y_s)
        parts: dict[str, Tensor] = {}
        sampled = self.site(step)
        for site in self.bridges.sites:
            weight = self._weight(self.config.nmse_sites, site, sampled)
            if weight and self.config.nmse:
                parts |= {name: weight * value for name, value in self._errors(site, h_d[site], h_s[site]).items()}
            weight = self._weight(self.config.sites, site, sampled)
            if weight:
                passes = self._passes(site, inputs, seen.reference, h_d.get(site), h_s[site])
                parts |= {name: weight * value for name, value in passes.items()}
        for name, value in parts.items():
            term = name.split(".", 1)[0]
            terms[term] = terms[term] + value if term in terms else value
        loss = torch.stack([self.coefficient(name) * value for name, value in terms.items()]).sum()
        return loss, {name: value.detach() for name, value in {**terms, **parts}.items()}

    def coefficient(self, term: str) -> float:
        """The coefficient of a term by the name it is logged under."""
        return getattr(self.config, "nmse" if term.startswith("nmse") else term)

    def site(self, step: int) -> str:
        """The site of the partial passes of a step, see `BridgeConfig.site`."""
        return self.config.site(step, self.bridges.sites)

    def _weight(self, which: str, site: str, sampled: str) -> float:
        if which == "all":
            return 1.0
        return float(len(self.bridges.sites)) if site == sampled else 0.0

    def _errors(self, site: str, h_d: Tensor, h_s: Tensor) -> dict[str, Tensor]:
        h_d, h_s = h_d[:, self.first :].to(h_s.dtype), h_s[:, self.first :]
        return {
            f"nmse_d2s.{site}": nmse(self.bridges.encode(site, h_d), h_s),
            f"nmse_s2d.{site}": nmse(self.bridges.decode(site, h_s), h_d),
        }

    def _passes(
        self, site: str, tokens: Tensor, reference: Reference, h_d: Tensor | None, h_s: Tensor
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if self.config.kl_d2s:
            assert h_d is not None, site
            encoded = cross(self.bridges, self.student, site, h_d, to="sparse")
            found[f"kl_d2s.{site}"] = self._divergence(self.student, tokens, site, encoded, reference)
        if self.config.kl_s2d:
            decoded = cross(self.bridges, self.dense, site, h_s, to="dense")
            with arithmetic(tokens.device.type, self.config.dense_precision):
                found[f"kl_s2d.{site}"] = self._divergence(self.dense, tokens, site, decoded, reference)
        return found

    def _divergence(self, model: Runnable, tokens: Tensor, site: str, residual: Tensor, reference: Reference) -> Tensor:
        def run_on(x: Tensor) -> Tensor:
            return reference.kl(model.run(tokens, start=site, residual=x))

        if not self.config.recompute:
            return run_on(residual)
        # The divergence is computed again too: of a large vocabulary it keeps more than the pass does.
        found = checkpoint(run_on, residual, use_reentrant=False)
        assert isinstance(found, Tensor)
        return found


def check_pair(dense: Runnable, student: Runnable, *, context: int | None = None) -> None:
    """Whether a student can be fitted to a dense model.

    Arguments:
        context: tokens per training sequence.

    Raises `ValueError` for one model in both places, another vocabulary or depth, and a context that is too short.
    """
    if dense is student:
        raise ValueError("student: is the dense model itself, which is frozen; allowed is another model")
    for name in ("vocab_size", "n_layer"):
        if getattr(student, name) != getattr(dense, name):
            raise ValueError(f"{name}: the student has {getattr(student, name)}, allowed is {getattr(dense, name)}")
    for who, model in (("dense model", dense), ("student", student)):
        if context is not None and model.context < context:
            raise ValueError(f"context: got {context}, allowed are 1 to {model.context} (the {who}'s)")
