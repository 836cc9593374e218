"""What a factor search may propose: a grid of rescale factors, its bounds, and the three seeds.

Notation: F = rotary_size / 2 frequency pairs, pair 0 turns fastest; G = F - pinned free pairs, the genes.
Genes are whole grid steps above 1 ([G] int64), so equality is exact and no rounding hides in an operator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lightning_longrope.factors import RescaleFactors
from lightning_longrope.rope import longrope_attention_factor
from lightning_longrope.search.operators import Genes, project

PAPER_START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class Candidate:
    """One point of a search space.

    Args:
        values: Rescale factors, F values on the grid of the space.
        start_tokens: Number of first positions that keep the pretrained speeds, in tokens.
        attention_factor: Multiplier of cos and sin.
        origin: Where it comes from (``seed:yarn``, ``mutant``), for people; no part of equality.
    """

    values: tuple[float, ...]
    start_tokens: int
    attention_factor: float
    origin: str = field(default="", compare=False)

    def to_factors(self, space: "SearchSpace") -> RescaleFactors:
        """The factors to install in a model, for the lengths of ``space``."""
        return RescaleFactors(
            values=self.values,
            original_length=space.original_length,
            target_length=space.target_length,
            start_tokens=self.start_tokens,
            attention_factor=self.attention_factor,
        )


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Bounds and grid of the factors, LongRoPE Table 1.

    Args:
        rotary_size: Number of head channels that rotate; even.
        base: Base of the rotary speeds (``rope_theta``).
        original_length: Window of the pretrained model, in tokens.
        target_length: Window to reach, in tokens; at least ``original_length``.
        max_factor: Largest factor; 1.25 times the extension ratio by default.
        min_factor: Smallest factor of a pair that is not pinned; at least 1.
        step: Distance of neighbouring factors on the grid, which contains 1.
        start_tokens: Allowed numbers of start tokens.
        pinned: Number of fastest pairs held at 1. The paper has 0; retrieval is safer with 2 to 4.
        monotone: Whether factors must not fall from one pair to the next slower one.
        attention_factor: Of all candidates that an algorithm gives no other; ``sqrt(1 + ln s / ln L)`` by default, or
            the nearest to that of ``attention_factors``.
        attention_factors: Allowed attention factors, as a gene of the evolution; by default that one alone.
        pretrained_length: Window whose turns the model has learnt, in tokens; ``original_length`` by default. They
            differ where candidates multiply the factors of an earlier extension.
        warm_start: Factors found for a shorter window, which are stretched to this one and tried first.

    Raises:
        ValueError: If no candidate can satisfy the arguments.

    Source: arXiv:2402.13753, Section 3.2 and Table 1.
    """

    rotary_size: int
    base: float
    original_length: int
    target_length: int
    max_factor: float | None = None
    min_factor: float = 1.0
    step: float = 0.01
    start_tokens: tuple[int, ...] = PAPER_START_TOKENS
    pinned: int = 0
    monotone: bool = True
    attention_factor: float | None = None
    attention_factors: tuple[float, ...] = ()
    pretrained_length: int | None = None
    warm_start: RescaleFactors | None = None

    def __post_init__(self) -> None:
        self._check_model()
        if self.max_factor is None:
            object.__setattr__(self, "max_factor", 1.25 * self.scale)
        object.__setattr__(self, "pretrained_length", self.pretrained_length or self.original_length)
        object.__setattr__(self, "start_tokens", tuple(self.start_tokens))
        self._settle_attention()
        self._check_ranges()

    def _settle_attention(self) -> None:
        default = self.attention_factor
        if default is None:
            lengths = {"original_length": self.original_length, "target_length": self.target_length}
            formula = longrope_attention_factor(**lengths)
            default = min(self.attention_factors or (formula,), key=lambda factor: abs(factor - formula))
        object.__setattr__(self, "attention_factor", default)
        object.__setattr__(self, "attention_factors", tuple(self.attention_factors) or (default,))

    @property
    def pairs(self) -> int:
        """F, the number of frequency pairs."""
        return self.rotary_size // 2

    @property
    def scale(self) -> float:
        """Extension ratio s, target length over original length."""
        return self.target_length / self.original_length

    @property
    def gene_bounds(self) -> tuple[int, int]:
        """Smallest and largest gene, in grid steps above 1."""
        assert self.max_factor is not None
        # A tenth of a millionth of a step forgives (1.1 - 1) / 0.01 = 10.000000000000009.
        return (
            math.ceil((self.min_factor - 1) / self.step - 1e-7),
            math.floor((self.max_factor - 1) / self.step + 1e-7),
        )

    def project(self, values: Sequence[float] | NDArray[np.float64]) -> tuple[float, ...]:
        """The values moved into the space: to the grid, the bounds, the pins, and a rising order.

        Args:
            values: F finite factors, of any order.

        Raises:
            ValueError: If there are not F values, or one is not finite.
        """
        return self._values(self._genes(values))

    def contains(self, candidate: Candidate) -> bool:
        """Whether a candidate satisfies every bound, the grid, the pins and the order, to the last bit."""
        return (
            len(candidate.values) == self.pairs
            and all(math.isfinite(value) for value in candidate.values)
            and self.project(candidate.values) == candidate.values
            and candidate.start_tokens in self.start_tokens
            and candidate.attention_factor in self.attention_factors
        )

    def encode(self, candidate: Candidate) -> Genes:
        """Grid steps above 1 of the free pairs, [G] int64."""
        return self._genes(candidate.values)

    def decode(
        self, genes: Genes, start_tokens: int | None = None, origin: str = "", attention_factor: float | None = None
    ) -> Candidate:
        """The candidate of [G] genes; by default with the fewest start tokens and the space's attention factor."""
        return self._candidate(self._values(genes), start_tokens, origin, attention_factor)

    def candidate(
        self, values: Sequence[float] | NDArray[np.float64], start_tokens: int | None = None, origin: str = ""
    ) -> Candidate:
        """The candidate of F factors, projected into the space."""
        return self._candidate(self.project(values), start_tokens, origin, None)

    def seeds(self) -> list[Candidate]:
        """Linear (PI), NTK and YaRN, projected into the space, and the stretched ``warm_start``; they may coincide."""
        return self._formulas() + (
            [] if self.warm_start is None else [self.candidate(self._warm(), origin="seed:warm")]
        )

    def _warm(self) -> NDArray[np.float64]:
        """The warm start with the logarithm of every factor stretched as that of the extension ratio."""
        assert self.warm_start is not None
        return np.array(self.warm_start.values) ** (math.log(self.scale) / math.log(self.warm_start.scale))

    def _formulas(self) -> list[Candidate]:
        methods = {"linear": RescaleFactors.linear, "ntk": RescaleFactors.ntk, "yarn": RescaleFactors.yarn}
        return [
            self.candidate(
                method(
                    rotary_size=self.rotary_size,
                    base=self.base,
                    original_length=self.original_length,
                    target_length=self.target_length,
                ).values,
                origin=f"seed:{name}",
            )
            for name, method in methods.items()
        ]

    def random(self, rng: np.random.Generator) -> Candidate:
        """A candidate whose factors are uniform on the logarithmic scale, then sorted."""
        low, high = (1 + self.step * bound for bound in self.gene_bounds)
        free = np.exp(rng.uniform(math.log(low), math.log(high), self.pairs - self.pinned))
        if self.monotone:
            free.sort()
        values = np.concatenate([np.ones(self.pinned), free])
        return self.candidate(values, self.start_tokens[rng.integers(len(self.start_tokens))], "random")

    def _candidate(
        self, values: tuple[float, ...], start_tokens: int | None, origin: str, attention_factor: float | None
    ) -> Candidate:
        assert self.attention_factor is not None
        tokens = min(self.start_tokens) if start_tokens is None else int(start_tokens)
        return Candidate(values, tokens, attention_factor or self.attention_factor, origin)

    def _genes(self, values: Sequence[float] | NDArray[np.float64]) -> Genes:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.pairs,) or not np.isfinite(array).all():
            raise ValueError(
                f"A candidate needs {self.pairs} finite factors, got shape {array.shape}: {array.tolist()}."
            )
        steps = (array[self.pinned :] - 1) / self.step
        return project(steps, *self.gene_bounds, monotone=self.monotone)

    def _values(self, genes: Genes) -> tuple[float, ...]:
        # Ten digits give 1.07, not 1.0700000000000001, and the same float whatever the way to it.
        return (1.0,) * self.pinned + tuple(round(1 + int(gene) * self.step, 10) for gene in genes)

    def _check_model(self) -> None:
        if self.rotary_size < 2 or self.rotary_size % 2:
            raise ValueError(f"`rotary_size` must be even and positive, got {self.rotary_size}.")
        if not self.base > 1:
            raise ValueError(f"`base` must be above 1, got {self.base}.")
        if not 0 < self.original_length <= self.target_length:
            raise ValueError(
                f"`target_length` ({self.target_length}) must be at least `original_length` ({self.original_length}),"
                " and both positive."
            )

    def _check_ranges(self) -> None:
        assert self.max_factor is not None
        assert self.attention_factor is not None
        if not (self.min_factor >= 1 and self.step >= 1e-6 and math.isfinite(self.max_factor)):
            raise ValueError(
                "`min_factor` must be at least 1, `step` at least 1e-6 and `max_factor` finite,"
                f" got {self.min_factor}, {self.step} and {self.max_factor}."
            )
        low, high = self.gene_bounds
        if low > high:
            raise ValueError(
                f"No factor lies between `min_factor` {self.min_factor} and `max_factor` {self.max_factor}"
                f" on the grid of `step` {self.step}."
            )
        if not 0 <= self.pinned < self.pairs:
            raise ValueError(
                f"`pinned` must be from 0 to {self.pairs - 1} (there are {self.pairs} pairs), got {self.pinned}."
            )
        if not self.start_tokens or min(self.start_tokens) < 0:
            raise ValueError(f"`start_tokens` needs at least one value, none negative, got {self.start_tokens}.")
        factors = (self.attention_factor, *self.attention_factors)
        if not all(math.isfinite(factor) and factor > 0 for factor in factors):
            raise ValueError(f"`attention_factor` and `attention_factors` must be positive and finite, got {factors}.")
        if self.attention_factor not in self.attention_factors:
            raise ValueError(
                f"`attention_factor` ({self.attention_factor}) must be one of `attention_factors`"
                f" {self.attention_factors}."
            )
        if self.warm_start is not None and not (
            len(self.warm_start.values) == self.pairs and self.warm_start.scale > 1
        ):
            raise ValueError(
                f"`warm_start` needs {self.pairs} factors of a longer window than the model's, got"
                f" {len(self.warm_start.values)} for {self.warm_start.scale:g} times the window."
            )
