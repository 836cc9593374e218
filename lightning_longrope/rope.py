"""Rescaled rotary position embedding: pure tensor functions, no modules, no state.

Every method of context extension is here in one form, a factor for each frequency pair that slows it down, so that
methods can be compared, mixed and searched. Tables are float64: float32 angles are off by 0.06 rad at 1M tokens.

Shapes: B batch, S sequence, R rotary size, F = R / 2 frequency pairs.
Pair 0 turns fastest. Angles are in radians, positions and lengths in tokens.
"""

import math

import torch
from torch import Tensor

_CHUNK = 1 << 22  # angles held at once, so that a table of 2M tokens does not take gigabytes of float64


def pretrained_inv_freq(*, rotary_size: int, base: float) -> Tensor:
    """Angular speed of every frequency pair as pretrained, in radians per token.

    Args:
        rotary_size: R, the number of head channels that rotate; even.
        base: Base of the geometric progression (``rope_theta`` in a Hugging Face config).

    Returns:
        [F] float64 on the CPU, ``base ** (-2 i / R)``.

    Raises:
        ValueError: If ``rotary_size`` is not even and positive, or ``base`` is not above 1.

    Source: RoFormer, arXiv:2104.09864, Eq. 15.
    """
    if rotary_size < 2 or rotary_size % 2:
        raise ValueError(f"`rotary_size` must be even and at least 2, got {rotary_size}.")
    if not (math.isfinite(base) and base > 1):
        raise ValueError(f"`base` must be finite and above 1, got {base}.")
    # the device is named because models are often built inside `with torch.device("meta")`
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.float64, device="cpu") / rotary_size
    return base**-exponents


def rescaled_inv_freq(factors: Tensor, *, rotary_size: int, base: float) -> Tensor:
    """Angular speed of every frequency pair after rescaling, in radians per token.

    Pair ``i`` turns at ``1 / (factors[i] * base ** (2 * i / rotary_size))``. A factor of 1 keeps the pretrained speed;
    a factor of ``s`` slows the pair ``s`` times, which is position interpolation.

    Args:
        factors: Rescale factors, [F] or [B, F], finite and at least 1.
        rotary_size: R, the number of head channels that rotate; even.
        base: Base of the geometric progression (``rope_theta`` in a Hugging Face config).

    Returns:
        Float64 tensor of the shape and on the device of ``factors``.

    Raises:
        ValueError: If ``factors`` does not hold R / 2 finite values of at least 1.

    Source: LongRoPE, arXiv:2402.13753, Eq. 3.
    """
    pretrained = pretrained_inv_freq(rotary_size=rotary_size, base=base).to(factors.device)
    if factors.ndim not in (1, 2) or factors.shape[-1] != len(pretrained):
        raise ValueError(
            f"`factors` needs one value for each of the {len(pretrained)} frequency pairs"
            f" (rotary_size={rotary_size}), got shape {tuple(factors.shape)}."
        )
    if not bool((factors >= 1).all() and factors.isfinite().all()):
        raise ValueError(f"`factors` must be finite and at least 1, got {factors.tolist()}.")
    return pretrained / factors.double()


def linear_factors(*, rotary_size: int, base: float, original_length: int, target_length: int) -> Tensor:
    """Position interpolation: every pair is slowed by the extension ratio s.

    Args:
        rotary_size: R, the number of head channels that rotate; even.
        base: Base of the geometric progression; not used, here so that all methods are called alike.
        original_length: L, the pretrained window in tokens.
        target_length: L', the window to reach in tokens.

    Returns:
        [F] float64.

    Source: arXiv:2306.15595, Eq. 4.
    """
    scale = extension_ratio(original_length, target_length)
    return torch.full_like(pretrained_inv_freq(rotary_size=rotary_size, base=base), scale)


def ntk_factors(*, rotary_size: int, base: float, original_length: int, target_length: int) -> Tensor:
    """NTK-aware interpolation: the base grows to ``base * s ** (R / (R - 2))``.

    The fastest pair keeps its speed and the slowest is slowed exactly s times: ``s ** (2 i / (R - 2))``.

    Args:
        rotary_size: R, the number of head channels that rotate; even and at least 4.
        base: Base of the geometric progression; cancels out of the factors.
        original_length: L, the pretrained window in tokens.
        target_length: L', the window to reach in tokens.

    Returns:
        [F] float64.

    Source: YaRN, arXiv:2309.00071, Section 3.1.
    """
    return _ntk(extension_ratio(original_length, target_length), rotary_size=rotary_size, base=base)


def dynamic_ntk_factors(
    *, rotary_size: int, base: float, original_length: int, target_length: int, factor: float = 1.0
) -> Tensor:
    """Dynamic NTK: the table a model uses for a sequence of ``target_length`` tokens.

    It is the NTK table of ``s = n / L`` for each sequence length ``n``; this function gives it for one length and does
    not follow a growing sequence.

    Args:
        rotary_size: R, the number of head channels that rotate; even and at least 4.
        base: Base of the geometric progression; cancels out of the factors.
        original_length: L, the pretrained window in tokens.
        target_length: n, the sequence length in tokens.
        factor: 1 for ``s = n / L``; otherwise ``s = factor * n / L - (factor - 1)``, the form of transformers'
            ``dynamic`` rope type.

    Returns:
        [F] float64.

    Raises:
        ValueError: If ``factor`` is below 1.

    Source: YaRN, arXiv:2309.00071, Section 3.3; ``transformers.modeling_rope_utils``.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(f"`factor` must be finite and at least 1, got {factor}.")
    scale = factor * extension_ratio(original_length, target_length) - (factor - 1)
    return _ntk(scale, rotary_size=rotary_size, base=base)


def yarn_factors(
    *,
    rotary_size: int,
    base: float,
    original_length: int,
    target_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Tensor:
    """YaRN: fast pairs keep their speed, slow ones are interpolated, a ramp of speeds lies between.

    The blend is one of frequencies: ``1 / factor = (1 - m) / s + m``. A blend of factors is another (and a worse)
    table. The attention factor that belongs to it is :func:`yarn_attention_factor`.

    Args:
        rotary_size: R, the number of head channels that rotate; even.
        base: Base of the geometric progression (``rope_theta`` in a Hugging Face config).
        original_length: L, the pretrained window in tokens.
        target_length: L', the window to reach in tokens.
        beta_fast: Pairs that turn more often than this within L keep their speed.
        beta_slow: Pairs that turn less often than this within L are interpolated in full.
        truncate: Round the ends of the ramp to whole pairs, as the released code does.

    Returns:
        [F] float64.

    Raises:
        ValueError: If not ``beta_fast >= beta_slow > 0``.

    Source: YaRN, arXiv:2309.00071, Section 3.2; ``transformers.modeling_rope_utils``.
    """
    if not beta_fast >= beta_slow > 0:
        raise ValueError(f"YaRN needs beta_fast >= beta_slow > 0, got beta_fast={beta_fast}, beta_slow={beta_slow}.")
    scale = extension_ratio(original_length, target_length)
    pair = torch.arange(len(pretrained_inv_freq(rotary_size=rotary_size, base=base)), dtype=torch.float64, device="cpu")
    low, high = (
        rotary_size * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (beta_fast, beta_slow)
    )
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_size - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((pair - low) / (high - low)).clamp(0, 1)  # m: 1 keeps the pretrained speed
    return 1 / ((1 - keep) / scale + keep)


def llama3_factors(
    *,
    rotary_size: int,
    base: float,
    original_length: int,
    target_length: int,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Tensor:
    """Llama 3.1's rescaling: a ramp over wavelengths, linear in the number of turns within the pretrained window.

    Args:
        rotary_size: R, the number of head channels that rotate; even.
        base: Base of the geometric progression (``rope_theta`` in a Hugging Face config).
        original_length: L, the pretrained window in tokens.
        target_length: L', the window to reach in tokens.
        factor: How much slow pairs are slowed; ``target_length / original_length`` if None. Llama 3.1 itself goes from
            8k to 128k with a factor of 8.
        low_freq_factor: Pairs with fewer turns than this within L are slowed in full.
        high_freq_factor: Pairs with more turns than this within L keep their speed.

    Returns:
        [F] float64.

    Raises:
        ValueError: If ``factor`` is below 1 or not ``high_freq_factor > low_freq_factor > 0``.

    Source: ``transformers.modeling_rope_utils``, rope type ``llama3``.
    """
    slow = extension_ratio(original_length, target_length) if factor is None else factor
    if not (math.isfinite(slow) and slow >= 1):
        raise ValueError(f"`factor` must be finite and at least 1, got {slow}.")
    if not high_freq_factor > low_freq_factor > 0:
        raise ValueError(
            "llama3 needs high_freq_factor > low_freq_factor > 0,"
            f" got high_freq_factor={high_freq_factor}, low_freq_factor={low_freq_factor}."
        )
    turns = original_length * pretrained_inv_freq(rotary_size=rotary_size, base=base) / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return 1 / ((1 - keep) / slow + keep)


def longrope_attention_factor(*, original_length: int, target_length: int) -> float:
    """Multiplier of cos and sin that keeps attention entropy at the target length: ``sqrt(1 + ln s / ln L)``.

    Returns 1 when nothing is extended. Both queries and keys carry it, so attention logits grow by its square.

    Source: LongRoPE's released code and transformers' ``longrope``; the paper's text has none.
    """
    scale = extension_ratio(original_length, target_length)
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original_length))


def yarn_attention_factor(*, original_length: int, target_length: int) -> float:
    """Multiplier of cos and sin in YaRN: ``0.1 ln s + 1``, and 1 when nothing is extended.

    Source: YaRN, arXiv:2309.00071, Eq. 22.
    """
    scale = extension_ratio(original_length, target_length)
    return 1.0 if scale <= 1 else 0.1 * math.log(scale) + 1


def cos_sin(
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    pretrained: Tensor,
    start_tokens: int | Tensor,
    attention_factor: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, in the layout of Hugging Face models.

    Angles are float64 products; only the finished values are rounded to ``dtype``. Positions below ``start_tokens``
    turn at the pretrained speed. Nothing is validated here: it runs in every forward.

    Args:
        position_ids: Positions in tokens, [B, S] or [1, S] int64.
        inv_freq: Speeds in radians per token, [F] or, one table for each row, [B, F] float64.
        pretrained: Speeds of the start tokens, [F] float64.
        start_tokens: How many first positions keep the pretrained speed, an int or [B] int64.
        attention_factor: Multiplier of both results, a float or [B] float64.
        dtype: Type of the results.

    Returns:
        cos and sin, [B, S, R] each: the F values of a position twice, one half after the other.

    Source: LongRoPE, arXiv:2402.13753, Eq. 3.
    """
    tables = inv_freq.reshape(-1, 1, inv_freq.shape[-1])  # [1 or B, 1, F]
    starts = torch.as_tensor(start_tokens, device=position_ids.device).reshape(-1, 1, 1)
    scales = torch.as_tensor(attention_factor, dtype=torch.float64, device=position_ids.device).reshape(-1, 1, 1)
    rows = max(len(position_ids), len(tables), len(starts), len(scales))
    shape = (rows, position_ids.shape[1], 2 * tables.shape[-1])
    cos, sin = (torch.empty(shape, dtype=dtype, device=position_ids.device) for _ in range(2))
    for begin in range(0, shape[1], max(1, _CHUNK // (rows * tables.shape[-1]))):
        part = slice(begin, begin + max(1, _CHUNK // (rows * tables.shape[-1])))
        positions = position_ids[:, part, None]
        angles = positions * torch.where(positions < starts, pretrained, tables)  # [B, s, F]
        cos[:, part] = (angles.cos() * scales).repeat(1, 1, 2)
        sin[:, part] = (angles.sin() * scales).repeat(1, 1, 2)
    return cos, sin


def extension_ratio(original_length: int, target_length: int) -> float:
    """The extension ratio s = L' / L, at least 1.

    Raises:
        ValueError: If the pretrained window is shorter than 2 tokens or longer than the target.
    """
    if original_length < 2:
        raise ValueError(f"`original_length` must be at least 2 tokens, got {original_length}.")
    if target_length < original_length:
        raise ValueError(
            f"`target_length` ({target_length}) is shorter than `original_length` ({original_length}):"
            " windows can be extended only. Are the two swapped?"
        )
    return target_length / original_length


def _ntk(scale: float, *, rotary_size: int, base: float) -> Tensor:
    """Factors of the NTK-aware change of base for one ratio, [F] float64."""
    pairs = len(pretrained_inv_freq(rotary_size=rotary_size, base=base))
    if pairs < 2:
        raise ValueError(f"NTK scaling needs a `rotary_size` of at least 4, got {rotary_size}.")
    return scale ** (torch.arange(pairs, dtype=torch.float64, device="cpu") / (pairs - 1))
