"""What all kernels share: how a block is loaded, and what each term and mask does to a tile of scores.

The accumulator holds scores over `unit`, the scale of the products of queries and keys: these need no scaling then,
and one multiplication by `unit * log2(e)` stands before `exp2`. Rows and columns come as index blocks, `[M, 1]` and
`[1, N]` or the other way round, so that the same functions serve tiles of either orientation.

Names: `i_` program index, `o_` offsets, `p_` pointers, `b_` block in registers, `n_` sizes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashbias.masks import FAR

LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_E_REST = tl.constexpr(1.925963033500e-08)  # what fp32 leaves of it
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)  # what stands for sums of finite scores that fp32 cannot hold: -inf would make NaN
FARTHEST = tl.constexpr(FAR)
# Tiles of queries divide it. What is near a table's distances is the same for all queries of a band.
BAND = tl.constexpr(128)


class Block(NamedTuple):
    """A tensor as kernels see it: where it starts, and its strides over outer batch, inner batch, head and row.

    A stride of zero broadcasts. The last dimension, where there is one, is contiguous.
    """

    ptr: Any
    outer: int
    inner: int
    head: int
    row: int

    @property
    def stride(self) -> tuple[int, int, int, int]:
        """The four strides."""
        return self[1:]


@triton.jit
def row_place(i_bh, o_m, n_q, n_heads, ABREAST: tl.constexpr):
    """Rows of an output in front of these rows of one head; ABREAST: all heads of a row lie side by side."""
    if ABREAST:
        return (i_bh // n_heads * n_q + o_m) * n_heads + i_bh % n_heads
    return i_bh * n_q + o_m


class Terms(NamedTuple):
    """The terms of the bias, None where there is none. Factor columns may be over `unit`.

    A matrix is read by pointers, or, where a tensor descriptor sees it as a stack of planes, through that; its strides
    then count planes. A table by distance goes from `-reach` to `reach`. `end`: by the last constant of a tuple triton
    3.5 learns of all others inside; without one it takes strides of 1 for None.
    """

    q_columns: Block | None
    k_columns: Block | None
    slopes: Block | None
    q_positions: Block | None
    k_positions: Block | None
    matrix: Block | None
    table: Block | None
    reach: int | None
    end: None = None


class Masks(NamedTuple):
    """The masks, None where there is none; `end` as in `Terms`."""

    offsets: Block | None
    lengths: Block | None
    q_ids: Block | None
    k_ids: Block | None
    allowed: Block | None
    end: None = None


@triton.jit
def start_of(x, i_o, i_i, i_h):
    return x.ptr + i_o * x.outer + i_i * x.inner + i_h * x.head


@triton.jit
def among(first, n_rows):
    """The first row of a block, or the last that there is: for blocks that may lie beyond."""
    return tl.minimum(first, tl.maximum(n_rows - 1, 0))


@triton.jit
def load_rows(
    x, i_o, i_i, i_h, first, n_rows, BLOCK: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
    o_from=0,
):  # fmt: skip
    """Rows `first ...` of `x` and their features `o_from ...`, `[BLOCK, WIDTH]`, zero beyond C features.

    Beyond `n_rows` (where CHECK) zero too, but in fp32 the last row again, or the first where there is none: that
    takes no longer than rows unchecked, and fewer registers than a mask. `first` is near them then (`among`).
    """
    REPEATED: tl.constexpr = CHECK and x.ptr.dtype.element_ty == tl.float32
    # Only the start is computed in 64 bits: within a block 32 do.
    p_x = start_of(x, i_o, i_i, i_h) + tl.cast(first, tl.int64) * x.row
    o_row = tl.arange(0, BLOCK)[:, None]
    if REPEATED:
        o_row = tl.minimum(o_row, tl.maximum(n_rows - 1, 0) - first)
    o_c = o_from + tl.arange(0, WIDTH)[None, :]
    p_x += o_row * x.row + o_c
    if CHECK and not REPEATED:
        if C % WIDTH == 0:
            return tl.load(p_x, mask=first + o_row < n_rows, other=0.0)
        return tl.load(p_x, mask=(first + o_row < n_rows) & (o_c < C), other=0.0)
    if C % WIDTH == 0:
        return tl.load(p_x)
    return tl.load(p_x, mask=o_c < C, other=0.0)


@triton.jit
def load_chunk(x, i_chunk, i_o, i_i, i_h, first, n_rows, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CHECK: tl.constexpr):
    """Rows `first ...` and factor columns `i_chunk * CHUNK ...` of `x`, `[BLOCK, CHUNK]`."""
    p_x = start_of(x, i_o, i_i, i_h) + tl.cast(first, tl.int64) * x.row
    o_row = tl.arange(0, BLOCK)[:, None]
    p_x += o_row * x.row + i_chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    if CHECK:
        return tl.load(p_x, mask=first + o_row < n_rows, other=0.0)
    return tl.load(p_x)


@triton.jit
def add_product(b_sum, b_left, b_right, PRECISION: tl.constexpr):
    """`sum + left @ right`, formed in float64 where the sum is.

    What is fp32 is added outside of the product, where tensor cores would truncate the sum.
    """
    if b_sum.dtype == tl.float64:
        b_sum = tl.dot(b_left.to(tl.float64), b_right.to(tl.float64), b_sum, out_dtype=tl.float64)
    elif b_left.dtype == tl.float32:
        b_product = tl.dot(b_left, b_right, input_precision=PRECISION)
        b_sum = tl.fma(b_sum, tl.full(b_sum.shape, 1.0, tl.float32), b_product)  # `+` would be put into the product
    else:
        b_sum = tl.dot(b_left, b_right, b_sum)
    return b_sum


@triton.jit
def dot_features(b_left, b_right, b_sum, PRECISION: tl.constexpr):
    """`sum + left @ right^T` over features, `[L, C]` and `[R, C]`."""
    return add_product(b_sum, b_left, tl.trans(b_right), PRECISION)  # [L, C] @ [C, R]


@triton.jit
def dot_rows(
    b_left, b_right, left, right, b_sum, i_o, i_i, i_h_left, i_h_right, left_first, right_first, n_left, n_right,
    C: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """`sum + left @ right^T` over the C features of two blocks of rows, `[L, WIDTH]` and `[R, WIDTH]`.

    Long rows of fp32, which every warp holds in three parts, would not fit into the registers: they are read again,
    some features at a time. So are all where a product in float64 is made of SUMS.
    """
    SUMMED: tl.constexpr = SUMS and b_sum.dtype == tl.float64
    PART: tl.constexpr = 4 if SUMMED else 16
    LONG: tl.constexpr = C > 64
    if SUMMED or (LONG and b_left.dtype == tl.float32):
        for o_part in tl.range(0, C, PART, num_stages=1):
            b_l = load_rows(left, i_o, i_i, i_h_left, left_first, n_left, b_left.shape[0], C, PART, True, o_part)
            b_r = load_rows(right, i_o, i_i, i_h_right, right_first, n_right, b_right.shape[0], C, PART, True, o_part)
            if SUMMED:
                b_sum += tl.sum(b_l.to(tl.float64)[:, None, :] * b_r.to(tl.float64)[None, :, :], 2)
            else:
                b_sum = dot_features(b_l, b_r, b_sum, PRECISION)
    else:
        b_sum = dot_features(b_left, b_right, b_sum, PRECISION)
    return b_sum


@triton.jit
def products(
    b_left, b_right, left, right, b_left_columns, left_columns, right_columns, i_o, i_i, i_h, i_h_left, i_h_right,
    left_first, right_first, n_left, n_right, unit,
    BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr, C: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr,
    FOLDED: tl.constexpr, PRECISION: tl.constexpr, SUMS: tl.constexpr, CHECK: tl.constexpr,
    DTYPE: tl.constexpr = tl.float32,
):  # fmt: skip
    """Scores of a tile, in DTYPE, from its matrix products: of queries and keys, and of the factor columns.

    Left and right are queries and keys, or keys and queries. `b_left_columns` are the left columns where one chunk
    holds them all, loaded once by the caller. CHECK: the right side may cross its end.
    """
    b_s = tl.zeros([BLOCK_LEFT, BLOCK_RIGHT], DTYPE)
    if FOLDED:
        # First, since the bias over a small unit is large, and each later addition would be rounded to its size.
        b_s = dot_rows(
            b_left, b_right, left, right, b_s, i_o, i_i, i_h_left, i_h_right, left_first, right_first, n_left, n_right,
            C, PRECISION, SUMS,
        )  # fmt: skip
    SUMMED: tl.constexpr = SUMS and b_s.dtype == tl.float64
    LONG: tl.constexpr = RANK > 64 and b_left.dtype == tl.float32
    if RANK > 0 and (SUMMED or LONG):
        b_s = dot_rows(
            b_left, b_right, left_columns, right_columns, b_s, i_o, i_i, i_h, i_h, left_first, right_first,
            n_left, n_right, RANK, PRECISION, SUMS,
        )  # fmt: skip
    elif RANK > 0:
        for i_chunk in tl.static_range(0, RANK // CHUNK):
            if RANK > CHUNK:
                b_left_columns = load_chunk(
                    left_columns, i_chunk, i_o, i_i, i_h, left_first, n_left, BLOCK_LEFT, CHUNK, True
                )
            b_columns = load_chunk(
                right_columns, i_chunk, i_o, i_i, i_h, right_first, n_right, BLOCK_RIGHT, CHUNK, CHECK
            )
            b_s = dot_features(b_left_columns, b_columns, b_s, PRECISION)
    if not FOLDED:
        b_s = dot_features(b_left, b_right, b_s * (1 / unit), PRECISION)
    return b_s


@triton.jit
def program(n_tiles, n_inner, n_heads, group):
    """Tile, flat batch-head, outer, inner, head and key head of a program of a grid over (batch, head, tile)."""
    # Divided in 32 bits, which takes a fifth of the time; as offsets they need 64.
    i_bh = tl.program_id(0) // n_tiles
    i_h, i_b = i_bh % n_heads, i_bh // n_heads
    i_o, i_i, i_kv = i_b // n_inner, i_b % n_inner, i_h // group
    return (
        tl.program_id(0) % n_tiles, i_bh.to(tl.int64), i_o.to(tl.int64), i_i.to(tl.int64), i_h.to(tl.int64),
        i_kv.to(tl.int64),
    )  # fmt: skip


@triton.jit
def load_item(x, i_o, i_i, i_h):
    return tl.load(start_of(x, i_o, i_i, i_h))


@triton.jit
def load_vector(x, i_o, i_i, o_row, n_rows, other):
    """Entries `o_row` of a vector without heads, in the shape of `o_row`."""
    return tl.load(x.ptr + i_o * x.outer + i_i * x.inner + o_row * x.row, mask=o_row < n_rows, other=other)


@triton.jit
def first_key_beyond(masks, i_o, i_i, n_k):
    """The number of keys that may be read."""
    if masks.lengths is not None:
        length = load_item(masks.lengths, i_o, i_i, 0).to(tl.int64)
        n_k = tl.maximum(tl.minimum(length, n_k), 0).to(tl.int32)
    return n_k


@triton.jit
def diagonal(masks, i_o, i_i, offset):
    """The offset of the causal diagonal, and of the queries' positions."""
    if masks.offsets is not None:
        offset = load_item(masks.offsets, i_o, i_i, 0).to(tl.int64)
        offset = tl.maximum(tl.minimum(offset, FARTHEST), -FARTHEST).to(tl.int32)
    return offset


@triton.jit
def key_range(
    masks, i_o, i_i, m_first, n_k, offset, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """For a tile of queries: the number of keys there are, and the keys to visit.

    Keys [0, whole) need neither their number nor the diagonal checked; [whole, end) do.
    """
    n_keys = first_key_beyond(masks, i_o, i_i, n_k)
    end = n_keys
    whole = n_keys
    if CAUSAL:
        end = tl.minimum(end, m_first + BLOCK_M + offset)
        whole = tl.minimum(whole, m_first + offset + 1)
    return n_keys, tl.maximum(whole, 0) // BLOCK_N * BLOCK_N, tl.maximum(end, 0)


@triton.jit
def exponential(b_x, unit, EXACT: tl.constexpr):
    """`exp(unit * x)`; where EXACT to the last bit or two, whatever the size of the exponent."""
    to_log2 = unit * LOG2_E
    if b_x.dtype == tl.float64:
        b_p = tl.exp(b_x * tl.cast(unit, tl.float64))
    elif EXACT:
        b_y = b_x * to_log2
        rest = tl.fma(unit, LOG2_E, -to_log2) + unit * LOG2_E_REST
        b_lost = tl.fma(b_x, tl.zeros_like(b_x) + to_log2, -b_y) + b_x * rest  # by rounding; it grows with y
        b_whole = tl.floor(b_y + 0.5)
        b_part = (b_y - b_whole + b_lost) * LN_2
        b_p = tl.full(b_y.shape, 1.0, tl.float32)
        for i in tl.static_range(0, 7):  # Taylor's series, good to 5e-9; the hardware's exp2 is to 2e-7
            b_p = tl.fma(b_p, b_part * (1.0 / (7 - i)), tl.full(b_y.shape, 1.0, tl.float32))
        b_p = tl.where(b_y < -126.0, 0.0, b_p * tl.exp2(b_whole))
    else:
        b_p = tl.exp2(b_x * to_log2)
    return b_p


@triton.jit
def steps(BLOCK: tl.constexpr, ALONG_COLUMNS: tl.constexpr):
    """0, 1, ... in fp32: `[1, BLOCK]`, or `[BLOCK, 1]`."""
    b_steps = tl.arange(0, BLOCK).to(tl.float32)
    return b_steps[None, :] if ALONG_COLUMNS else b_steps[:, None]


@triton.jit
def distances(
    terms, i_o, i_i, o_m, o_n, m_first, n_first, n_q, n_k, offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, STANDING: tl.constexpr,
    DTYPE: tl.constexpr = tl.float32,
):  # fmt: skip
    """`p_j - p_i` in DTYPE, or `-|p_j - p_i|`.

    Positions are taken relative to those of the tile while they are still integers: small differences of large
    numbers stay exact.
    """
    if terms.q_positions is None:
        # What does not change from tile to tile is converted once, outside of the loop.
        b_n = steps(BLOCK_N, STANDING) + (n_first - m_first - offset).to(tl.float32)
        b_m = steps(BLOCK_M, not STANDING)
    else:
        b_n = load_vector(terms.k_positions, i_o, i_i, o_n, n_k, 0)
        b_m = load_vector(terms.q_positions, i_o, i_i, o_m, n_q, 0)
        INTEGER_N: tl.constexpr = b_n.dtype != tl.float32  # names, since triton 3.3 knows `or` of constants only
        INTEGER_M: tl.constexpr = b_m.dtype != tl.float32
        if INTEGER_N or INTEGER_M:
            first = load_vector(terms.q_positions, i_o, i_i, m_first, n_q, 0)
            b_n, b_m = (b_n - first).to(tl.float32), (b_m - first).to(tl.float32)
    b_distance = b_n.to(DTYPE) - b_m.to(DTYPE)
    return -tl.abs(b_distance) if SYMMETRIC else b_distance


@triton.jit
def load_pairs(x, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_k, CHECK: tl.constexpr, other):
    """A tile of a matrix over pairs, in the shape of `o_m + o_n`."""
    stride = x.row
    p_x = start_of(x, i_o, i_i, i_h) + tl.cast(m_first, tl.int64) * stride + n_first
    # Rows beyond the last are read from the last: a mask along rows would cost more than it saves.
    p_x += (tl.minimum(o_m, n_q - 1) - m_first) * stride + (o_n - n_first)
    if CHECK:
        return tl.load(p_x, mask=o_n < n_k, other=other)
    return tl.load(p_x)


@triton.jit
def mask_scores(
    b_s,
    masks,
    i_o,
    i_i,
    i_h,
    o_m,
    o_n,
    m_first,
    n_first,
    n_q,
    n_keys,
    offset,
    CAUSAL: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Scores with -inf where a query may not attend. CHECK: this tile may cross the diagonal or the last key."""
    if CHECK:
        b_s = tl.where(o_n < n_keys, b_s, float("-inf"))
        if CAUSAL:
            b_s = tl.where(o_n <= o_m + offset, b_s, float("-inf"))
    if masks.q_ids is not None:
        b_q = load_vector(masks.q_ids, i_o, i_i, o_m, n_q, -1)
        b_k = load_vector(masks.k_ids, i_o, i_i, o_n, n_keys, -1)
        b_s = tl.where((b_q == b_k) & (b_q != -1), b_s, float("-inf"))
    if masks.allowed is not None:
        b_allowed = load_pairs(masks.allowed, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, CHECK, 0)
        b_s = tl.where(b_allowed != 0, b_s, float("-inf"))
    return b_s


@triton.jit
def over(x, unit, like):
    """`x / unit`, rounded to nearest, in the dtype of `like`."""
    return x / tl.cast(unit, tl.float64) if like.dtype == tl.float64 else tl.div_rn(x, unit)


@triton.jit
def add_scaled(b_s, factor, b_x):
    """`s + factor * x`, for an x that broadcasts, in the dtype of s.

    Written as a sum, x would become the accumulator of the product that s is: computed before it, and, if it is
    loaded, loaded only then.
    """
    return tl.fma(tl.full(b_s.shape, factor, b_s.dtype), tl.broadcast_to(b_x, b_s.shape).to(b_s.dtype), b_s)


@triton.jit
def add_distances(
    b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, offset, unit,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SYMMETRIC: tl.constexpr, STANDING: tl.constexpr,
):  # fmt: skip
    """Scores with slopes times distances."""
    if terms.slopes is not None:
        slope = over(load_item(terms.slopes, i_o, i_i, i_h), unit, b_s)
        b_distance = distances(
            terms, i_o, i_i, o_m, o_n, m_first, n_first, n_q, n_keys, offset, BLOCK_M, BLOCK_N, SYMMETRIC, STANDING,
            b_s.dtype,
        )  # fmt: skip
        b_s = add_scaled(b_s, slope, b_distance)
    return b_s


@triton.jit
def load_matrix(
    terms, tiles, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, CHECK: tl.constexpr, STANDING: tl.constexpr
):
    """A tile of the dense bias, or None. STANDING: queries by keys, not on its side."""
    if tiles is not None:
        i_plane = i_o * terms.matrix.outer + i_i * terms.matrix.inner + i_h * terms.matrix.head
        b_matrix = tiles.load([i_plane.to(tl.int32), m_first, n_first])
        b_matrix = b_matrix.reshape(tiles.block_shape[1], tiles.block_shape[2])
        if not STANDING:
            b_matrix = tl.trans(b_matrix)
    elif terms.matrix is not None:
        b_matrix = load_pairs(terms.matrix, i_o, i_i, i_h, o_m, o_n, m_first, n_first, n_q, n_keys, CHECK, 0.0)
    else:
        b_matrix = None
    return b_matrix


@triton.jit
def add_matrix(b_s, b_matrix, unit):
    """Scores with a tile of the dense bias, if there is one."""
    if b_matrix is not None:
        b_s = add_scaled(b_s, over(1.0, unit, b_s), b_matrix.to(tl.float32))
    return b_s


@triton.jit
def add_table(
    b_s, terms, i_o, i_i, i_h, o_m, o_n, m_first, n_first, offset, unit, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Scores with the entries of a table by distance, if there is one.

    A tile that lies beyond the table's reach has the same entry everywhere: of a long row these are most.
    """
    if terms.table is not None:
        p_table = start_of(terms.table, i_o, i_i, i_h) + terms.reach
        corner = n_first - m_first - offset
        # Only entries come out of the branches: triton 3.6 cannot compile those through which a product goes.
        if (corner + BLOCK_N <= 1 - terms.reach) | (corner - BLOCK_M >= terms.reach - 1):
            entry = tl.load(p_table + tl.where(corner > 0, terms.reach, -terms.reach))
            b_entry = tl.zeros(b_s.shape, tl.float32) + entry
        else:
            o_distance = tl.minimum(tl.maximum(o_n - o_m - offset, -terms.reach), terms.reach)
            b_entry = tl.load(p_table + o_distance)
        b_s = add_scaled(b_s, over(1.0, unit, b_s), b_entry)
    return b_s


@triton.jit
def near_keys(n_q, band, reach, offset):
    """Keys [begin, end) near a table's distances: of others, all distances to the band's queries are beyond its reach.

    Multiples of BAND; both move with the band. There are no bands from which keys before `begin` could be reached.
    """
    begin = tl.maximum((offset - reach + 1) & -BAND, -((n_q - 1) & -BAND))
    return band + begin, band + ((offset + reach + 2 * BAND - 2) & -BAND)
