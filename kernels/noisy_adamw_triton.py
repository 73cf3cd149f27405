"""Triton kernels of `kernels.noisy_adamw`: ChaCha20, Box-Muller, the grid's release, AdamW and the average in one pass.

A program makes one window of one shard: L lanes, each of two ChaCha20 blocks (RFC 8439). A block of the noise's 4096
words holds 256 ChaCha20 blocks of radii and then their 256 of angles (`kernels.noise`), so a lane has 8 radii and their
8 angles: 8 neighbouring normals in the block's first half and 8 in its second. Lanes share nothing, not even a branch.

The noise is integers and float64 under +, *, fma, / and sqrt alone, each rounded once as IEEE 754 says, and nothing is
contracted (`enable_fp_fusion=False`): the interpreter's bits are every GPU's. Logarithm, sine and cosine are
polynomials of our own, minimax by Remez' algorithm. AdamW's division and square root, which come after the release, are
the GPU's fast ones, within 2 ulp.
"""

# L lanes of a program, E = 8 L the elements that it makes in each half of a noise block
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# (to a type checker tl.static_range is no iterable, and a dtype no constant)
from __future__ import annotations

import triton
import triton.language as tl

from kernels.aot import Build
from kernels.tiles import Tile

# The table: int64, ROW columns a row. Row 0 holds the bits of three float64: std / spacing, 1 / spacing, spacing. Every
# other is a shard's: addresses, offset in the key's sequence, length, its first window less its first program, its
# number of windows, and the four times 64 bits of its key.
ROW = 16
PARAMETER, GRADIENT, EXP_AVG, EXP_AVG_SQ, AVERAGE, COPY, OFFSET, NUMEL, WINDOW, NUM_WINDOWS, KEY = range(11)
TILE = Tile({"L": 64}, num_warps=2, num_stages=1)

_ROW, _PARAMETER, _GRADIENT, _EXP_AVG, _EXP_AVG_SQ, _AVERAGE, _COPY, _OFFSET, _NUMEL, _WINDOW, _KEY = (
    tl.constexpr(n) for n in (ROW, PARAMETER, GRADIENT, EXP_AVG, EXP_AVG_SQ, AVERAGE, COPY, OFFSET, NUMEL, WINDOW, KEY)
)
_ROUNDING = tl.constexpr(1.5 * 2.0**52)  # x + this - this is x rounded to a whole number, ties to even, for |x| < 2^51


@triton.jit
def _quarter_round(a, b, c, d):
    """RFC 8439, section 2.1."""
    a += b
    d ^= a
    d = (d << 16) | (d >> 16)
    c += d
    b ^= c
    b = (b << 12) | (b >> 20)
    a += b
    d ^= a
    d = (d << 8) | (d >> 24)
    c += d
    b ^= c
    b = (b << 7) | (b >> 25)
    return a, b, c, d


@triton.jit
def _word(low, high):
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def chacha20(low_L, high, k0, k1, k2, k3, k4, k5, k6, k7):
    """The blocks with counters high * 2^32 + low as eight little-endian 64-bit words (L,) (RFC 8439, section 2.3).

    `high` goes on counting in the nonce's first word. Lanes differ in `low` alone: three of the first four quarter
    rounds stay scalar.
    """
    c0 = tl.full((), 0x61707865, tl.uint32)
    c1 = tl.full((), 0x3320646E, tl.uint32)
    c2 = tl.full((), 0x79622D32, tl.uint32)
    c3 = tl.full((), 0x6B206574, tl.uint32)
    zero = tl.full((), 0, tl.uint32)
    x0, x1, x2, x3, x4, x5, x6, x7 = c0, c1, c2, c3, k0, k1, k2, k3
    x8, x9, x10, x11, x12, x13, x14, x15 = k4, k5, k6, k7, low_L, high, zero, zero
    for _ in tl.static_range(10):
        x0, x4, x8, x12 = _quarter_round(x0, x4, x8, x12)
        x1, x5, x9, x13 = _quarter_round(x1, x5, x9, x13)
        x2, x6, x10, x14 = _quarter_round(x2, x6, x10, x14)
        x3, x7, x11, x15 = _quarter_round(x3, x7, x11, x15)
        x0, x5, x10, x15 = _quarter_round(x0, x5, x10, x15)
        x1, x6, x11, x12 = _quarter_round(x1, x6, x11, x12)
        x2, x7, x8, x13 = _quarter_round(x2, x7, x8, x13)
        x3, x4, x9, x14 = _quarter_round(x3, x4, x9, x14)
    w0, w1 = _word(x0 + c0, x1 + c1), _word(x2 + c2, x3 + c3)
    w2, w3 = _word(x4 + k0, x5 + k1), _word(x6 + k2, x7 + k3)
    w4, w5 = _word(x8 + k4, x9 + k5), _word(x10 + k6, x11 + k7)
    w6, w7 = _word(x12 + low_L, x13 + high), _word(x14, x15)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def radius(radius_word, angle_word):
    """sqrt(-2 log(uniform)), of the very uniform in (0, 1] that `kernels.noise` makes of the two words."""
    below = ((angle_word & 2047) | 0x3E90000000000000).to(tl.float64, bitcast=True)  # 2^-22 + (11 bits) * 2^-74
    above = (radius_word & 0x7FFFFFFFFFFFFFFF).to(tl.int64).to(tl.float64)
    uniform = tl.fma(above, 2.0**-63, below - (2.0**-22 - 2.0**-75))
    # uniform = m 2^k, m in [sqrt(1/2), sqrt(2)); log m = 2 atanh s, s = (m - 1) / (m + 1), which is odd in s
    bits = uniform.to(tl.int64, bitcast=True)
    k = (bits - 0x3FE6A09E00000000) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = tl.fma(z, 0.14796261247467693, 0.15314021108786208)
    p = tl.fma(z, p, 0.18183565407733002)
    p = tl.fma(z, p, 0.22222198553773753)
    p = tl.fma(z, p, 0.28571428742562294)
    p = tl.fma(z, p, 0.39999999999413965)
    p = tl.fma(z, p, 0.6666666666666734)
    log_m = tl.fma(s * z, p, s + s)
    return tl.sqrt(-2.0 * tl.fma(k.to(tl.int32).to(tl.float64), 0.6931471805599453, log_m))


@triton.jit
def cosine_and_sine(angle_word):
    """Of 2 pi angle_word / 2^64: the nearest quarter turn is taken off exactly, what is left is at most an eighth."""
    turned = angle_word.to(tl.int64) + 0x2000000000000000
    quarter = turned >> 62
    x = ((turned & 0x3FFFFFFFFFFFFFFF) - 0x2000000000000000).to(tl.float64) * 3.4061215800865545e-19  # 2 pi / 2^64
    z = x * x
    p = tl.fma(z, 1.589679564190449e-10, -2.505075811507459e-08)
    p = tl.fma(z, p, 2.755731369191683e-06)
    p = tl.fma(z, p, -0.00019841269829807805)
    p = tl.fma(z, p, 0.008333333333322413)
    p = tl.fma(z, p, -0.16666666666666632)
    sine = tl.fma(x * z, p, x)
    p = tl.fma(z, -1.1354497995520544e-11, 2.0875608205090917e-09)
    p = tl.fma(z, p, -2.755731333599054e-07)
    p = tl.fma(z, p, 2.48015872849977e-05)
    p = tl.fma(z, p, -0.0013888888888863888)
    p = tl.fma(z, p, 0.04166666666666649)
    p = tl.fma(z, p, -0.5)
    cosine = tl.fma(z, p, 1.0)
    swapped = (quarter & 1) != 0
    of_cosine = tl.where(swapped, sine, cosine).to(tl.int64, bitcast=True) ^ (((quarter + 1) & 2) << 62)
    of_sine = tl.where(swapped, cosine, sine).to(tl.int64, bitcast=True) ^ ((quarter & 2) << 62)
    return of_cosine.to(tl.float64, bitcast=True), of_sine.to(tl.float64, bitcast=True)


@triton.jit
def _two(radius_word, angle_word, scale):
    """Two normals times `scale` (below 2^45), rounded to whole numbers."""
    r = radius(radius_word, angle_word) * scale
    cosine, sine = cosine_and_sine(angle_word)
    return tl.fma(r, cosine, _ROUNDING) - _ROUNDING, tl.fma(r, sine, _ROUNDING) - _ROUNDING


@triton.jit
def _interleaved(n0, n1, n2, n3, n4, n5, n6, n7, L: tl.constexpr):
    """(8 L,): each lane's eight one after the other."""
    even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
    odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    return tl.reshape(tl.join(even, odd), (8 * L,))


@triton.jit
def _noise(table, row, base, L: tl.constexpr):
    """The window's noise in whole multiples of the spacing, float64: its first half and its second, (8 L,) each.

    `base` is its first ChaCha20 block of radii, counted over radii alone. Windows begin at multiples of their size: no
    counter's low word overflows within one.
    """
    key = row + _KEY
    a, b, c, d = tl.load(key), tl.load(key + 1), tl.load(key + 2), tl.load(key + 3)
    k0, k1, k2, k3 = a.to(tl.uint32), (a >> 32).to(tl.uint32), b.to(tl.uint32), (b >> 32).to(tl.uint32)
    k4, k5, k6, k7 = c.to(tl.uint32), (c >> 32).to(tl.uint32), d.to(tl.uint32), (d >> 32).to(tl.uint32)
    lane_L = tl.arange(0, L)
    first = base // 256 * 512 + base % 256
    low_L = first.to(tl.uint32) + (lane_L // 256 * 512 + lane_L % 256).to(tl.uint32)
    high = (first >> 32).to(tl.uint32)
    r0, r1, r2, r3, r4, r5, r6, r7 = chacha20(low_L, high, k0, k1, k2, k3, k4, k5, k6, k7)
    a0, a1, a2, a3, a4, a5, a6, a7 = chacha20(low_L + 256, high, k0, k1, k2, k3, k4, k5, k6, k7)
    scale = tl.load(table).to(tl.float64, bitcast=True)
    # Before they are interleaved, which passes through shared memory: eight bytes an element, not sixteen.
    m0, n0 = _two(r0, a0, scale)
    m1, n1 = _two(r1, a1, scale)
    m2, n2 = _two(r2, a2, scale)
    m3, n3 = _two(r3, a3, scale)
    m4, n4 = _two(r4, a4, scale)
    m5, n5 = _two(r5, a5, scale)
    m6, n6 = _two(r6, a6, scale)
    m7, n7 = _two(r7, a7, scale)
    return _interleaved(m0, m1, m2, m3, m4, m5, m6, m7, L), _interleaved(n0, n1, n2, n3, n4, n5, n6, n7, L)


@triton.jit
def _released(gradient, noise, inverse, spacing):
    """`kernels.release.release_`, to the sign of a zero."""
    scaled = gradient.to(tl.float64) * inverse
    # From 2^23 spacings on an fp32 number is whole already.
    total = tl.where(tl.abs(scaled) < 2.0**51, (scaled + _ROUNDING) - _ROUNDING, scaled) + noise
    size = tl.abs(total)
    coarse = tl.where(size < 2.0**80, (size + 2.0**80) - 2.0**80, size)  # to multiples of 2^28, `release.COARSENING`
    sign = (total.to(tl.int64, bitcast=True) >> 32).to(tl.int32) & -0x80000000
    return ((coarse * spacing).to(tl.float32).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _lerp(start, end, weight):
    """torch.lerp: from the nearer end, rounded once."""
    near = weight < 0.5
    return tl.fma(tl.where(near, weight, weight - 1.0), end - start, tl.where(near, start, end))


@triton.jit
def _place(table, L: tl.constexpr, owners, ALIGNED: tl.constexpr):
    """This program's shard, the shard's row, the window's first block and element, and which of its elements exist."""
    program = tl.program_id(0)
    shard = tl.load(owners + program)
    row = table + (shard + 1) * _ROW
    base = (program + tl.load(row + _WINDOW)) * L
    first = base // 256 * 4096 + base % 256 * 8 - tl.load(row + _OFFSET)  # negative where the shard begins later
    low, high = tl.maximum(-first, 0), tl.minimum(tl.load(row + _NUMEL) - first, 16 * L + 4096)
    if ALIGNED:
        first, low, high = tl.multiple_of(first, 4), tl.multiple_of(low, 4), tl.multiple_of(high, 4)
    return shard, row, base, first, low.to(tl.int32), high.to(tl.int32)


@triton.jit
def _elements(L: tl.constexpr):
    """Where the first half's elements lie in the window; the second half's are 2048 further."""
    element_E = tl.arange(0, 8 * L)
    return element_E // 2048 * 4096 + element_E % 2048


@triton.jit
def _address(row, column: tl.constexpr, first, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the window's first element is, or would be, in one of the shard's tensors."""
    address = tl.load(row + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + first


@triton.jit
def _refused(gradients, element_E, low, high, refused):
    """Whether an element of the window is not finite; its shard is then marked."""
    first_E = tl.load(gradients + element_E, mask=(element_E >= low) & (element_E < high), other=0.0)
    element_E += 2048
    second_E = tl.load(gradients + element_E, mask=(element_E >= low) & (element_E < high), other=0.0)
    finite_E = (tl.abs(first_E) < float("inf")) & (tl.abs(second_E) < float("inf"))
    refuse = tl.max((~finite_E).to(tl.int32), 0) != 0
    tl.store(refused, 1, mask=refuse)  # whoever writes, writes this
    return refuse


@triton.jit
def add_noise(table, owners, refused, L: tl.constexpr, ALIGNED: tl.constexpr):
    """gradient <- released(gradient), window by window; a window that is not finite is left alone, before it draws."""
    shard, row, base, first, low, high = _place(table, L, owners, ALIGNED)
    gradients = _address(row, _GRADIENT, first, tl.float32, ALIGNED)
    element_E = _elements(L)
    if _refused(gradients, element_E, low, high, refused + shard):
        return
    noise_E, second_noise_E = _noise(table, row, base, L)
    inverse = tl.load(table + 1).to(tl.float64, bitcast=True)
    spacing = tl.load(table + 2).to(tl.float64, bitcast=True)
    for _ in tl.static_range(2):
        there_E = (element_E >= low) & (element_E < high)
        gradient_E = tl.load(gradients + element_E, mask=there_E)
        tl.store(gradients + element_E, _released(gradient_E, noise_E, inverse, spacing), mask=there_E)
        element_E += 2048
        noise_E = second_noise_E


@triton.jit
def adamw_ema(
    table, owners, refused, grad_scale, shrink, weight1, beta2, weight2, step, inverse_correction2, eps, ema_weight,
    L: tl.constexpr, NOISE: tl.constexpr, COPY_DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One update of a window, in torch.optim.AdamW's order of operations; a window that is not finite is left alone.

    shrink = 1 - lr * weight_decay, weight1 = 1 - beta1, weight2 = 1 - beta2, step = -lr / (1 - beta1^t),
    inverse_correction2 = 1 / sqrt(1 - beta2^t), ema_weight = 1 - ema_decay.
    """
    shard, row, base, first, low, high = _place(table, L, owners, ALIGNED)
    gradients = _address(row, _GRADIENT, first, tl.float32, ALIGNED)
    element_E = _elements(L)
    noise_E, second_noise_E = element_E, element_E
    if NOISE:
        if _refused(gradients, element_E, low, high, refused + shard):
            return
        noise_E, second_noise_E = _noise(table, row, base, L)
    inverse = tl.load(table + 1).to(tl.float64, bitcast=True)
    spacing = tl.load(table + 2).to(tl.float64, bitcast=True)
    parameters = _address(row, _PARAMETER, first, tl.float32, ALIGNED)
    exp_avgs = _address(row, _EXP_AVG, first, tl.float32, ALIGNED)
    exp_avg_sqs = _address(row, _EXP_AVG_SQ, first, tl.float32, ALIGNED)
    averages = _address(row, _AVERAGE, first, tl.float32, ALIGNED)
    for _ in tl.static_range(2):
        there_E = (element_E >= low) & (element_E < high)
        gradient_E = tl.load(gradients + element_E, mask=there_E)
        parameter_E = tl.load(parameters + element_E, mask=there_E)
        exp_avg_E = tl.load(exp_avgs + element_E, mask=there_E)
        exp_avg_sq_E = tl.load(exp_avg_sqs + element_E, mask=there_E)
        average_E = tl.load(averages + element_E, mask=there_E)
        if NOISE:
            gradient_E = _released(gradient_E, noise_E, inverse, spacing)
        gradient_E *= grad_scale
        parameter_E *= shrink
        exp_avg_E = _lerp(exp_avg_E, gradient_E, weight1)
        exp_avg_sq_E = tl.fma(weight2 * gradient_E, gradient_E, exp_avg_sq_E * beta2)
        parameter_E += step * exp_avg_E / (tl.sqrt(exp_avg_sq_E) * inverse_correction2 + eps)
        tl.store(exp_avgs + element_E, exp_avg_E, mask=there_E)
        tl.store(exp_avg_sqs + element_E, exp_avg_sq_E, mask=there_E)
        tl.store(parameters + element_E, parameter_E, mask=there_E)
        tl.store(averages + element_E, _lerp(average_E, parameter_E, ema_weight), mask=there_E)
        if COPY_DTYPE is not None:
            copies = _address(row, _COPY, first, COPY_DTYPE, ALIGNED)
            tl.store(copies + element_E, parameter_E.to(COPY_DTYPE), mask=there_E)
        element_E += 2048
        noise_E = second_noise_E


def builds() -> list[Build]:
    """Both kernels, for shards that vector instructions reach and for others, with each kind of copy."""
    launch = {"num_warps": TILE.num_warps, "num_stages": TILE.num_stages, "fp_fusion": False}
    tables = {"table": "*i64", "owners": "*i64", "refused": "*i32"}
    scalars = dict.fromkeys(adamw_ema.arg_names[3:12], "fp32")
    found = list[Build]()
    for aligned in (True, False):
        reach, common = "aligned" if aligned else "unaligned", {**TILE.constants, "ALIGNED": aligned}
        found.append(Build("add_noise", reach, add_noise, tables, common, **launch))
        for noise in (True, False):
            for copy in (None, tl.bfloat16, tl.float16):
                case = f"{'noise' if noise else 'no noise'}, {'no' if copy is None else copy.name} copy, {reach}"
                constants = {**common, "NOISE": noise, "COPY_DTYPE": copy}
                found.append(Build("adamw_ema", case, adamw_ema, {**tables, **scalars}, constants, **launch))
    return found
