"""Rotary embedding of q and k, alone and behind an RMS norm of each head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _op
from .._autograd import Function, differentiable
from .._op import Op, Sample, check_tensor, compiled, overridable, real, wide, wide_dtype

rotary_fwd = compiled("rotary_fwd")
rotary_bwd = compiled("rotary_bwd")


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rot = cos.shape[-1]
    z, rest = x[..., :rot], x[..., rot:]
    a, b = (z[..., ::2], z[..., 1::2]) if interleaved else (z[..., : rot // 2], z[..., rot // 2 :])
    across = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
    cos, sin = (of_batch(t, x) for t in (cos, sin))
    return torch.cat((z * wide(cos) + across * wide(sin), rest), -1)


def of_batch(t: Tensor, x: Tensor) -> Tensor:
    """A table of its own for each first index of x, or one for all."""
    return t.view(t.shape[0], *[1] * (x.dim() - 3), *t.shape[1:]) if t.dim() == 3 else t


def normed(x: Tensor, w: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if w is None else y * wide(w)


def rotary_embedding_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    return tuple(turned(wide(x), cos, sin, interleaved).to(x.dtype) for x in (q, k))


def qk_norm_rope_reference(q, k, q_weight, k_weight, cos, sin, eps, interleaved) -> tuple[Tensor, Tensor]:
    sides = ((q, q_weight), (k, k_weight))
    return tuple(turned(normed(wide(x), w, eps), cos, sin, interleaved).to(x.dtype) for x, w in sides)


def _like(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    return y if x.shape[-1] <= 1 or y.stride(-1) == 1 else x.new_empty(x.shape)


@torch.library.register_fake("fusegrad::rotary_fwd")
def _(q, k, q_weight, k_weight, cos, sin, normed, eps, interleaved):
    rstd = (x.new_empty(x.shape[:-1], dtype=wide_dtype(x)) if normed else None for x in (q, k))
    return _like(q), _like(k), *rstd


@torch.library.register_fake("fusegrad::rotary_bwd")
def _(dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, interleaved, needed):
    sides = ((dq_out, q, q_weight), (dk_out, k, k_weight))
    dx = (_like(g if x is None else x) if g is not None and n else None for (g, x, _), n in zip(sides, needed))
    dw = (g.new_empty(g.shape[-1:], dtype=w.dtype) if g is not None and n else None for (g, _, w), n in zip(sides, needed[2:]))
    return *dx, *dw


def _inputs(ctx) -> tuple:
    """Of the forward, with zeros for q and k: the op is linear in them, so that no derivative depends on them."""
    *_, cos, sin = ctx.saved_tensors
    zero = cos.new_zeros((), dtype=ctx.dtype)
    return *(zero.expand(shape) for shape in ctx.shape), cos, sin


class _RotaryFn(Function):
    @classmethod
    def why_no_vmap(cls, tensors, options):
        return "vmap has no kernel where each item has tables of its own" if tensors[-1].dim() == 3 else None


class RotaryEmbeddingFn(_RotaryFn):
    op = "rotary_embedding"
    reference = staticmethod(rotary_embedding_reference)
    params = (2, 3)

    @staticmethod
    def forward(q, k, cos, sin, interleaved):
        return rotary_fwd(q, k, None, None, cos, sin, False, 0.0, interleaved)[:2]

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        q, k, cos, sin, *ctx.options = inputs
        ctx.shape, ctx.dtype = (q.shape, k.shape), q.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(None, None, cos, sin)

    @differentiable(_inputs)
    def backward(ctx, dq_out, dk_out):
        dq = dk = None
        if not (dq_out is None and dk_out is None):
            needed = (*ctx.needs_input_grad[:2], False, False)
            dq, dk, _, _ = rotary_bwd(dq_out, dk_out, *[None] * 6, *ctx.saved_tensors[2:], *ctx.options, needed)
        return dq, dk, None, None, None


class QKNormRopeFn(_RotaryFn):
    op = "qk_norm_rope"
    reference = staticmethod(qk_norm_rope_reference)
    params = (2, 3, 4, 5)

    @staticmethod
    def forward(q, k, q_weight, k_weight, cos, sin, eps, interleaved):
        return rotary_fwd(q, k, q_weight, k_weight, cos, sin, True, eps, interleaved)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        *tensors, eps, interleaved = inputs
        ctx.options = (eps, interleaved)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[2:])
        ctx.save_for_backward(*tensors, *outputs[2:])

    @differentiable(lambda ctx: ctx.saved_tensors[:6])
    def backward(ctx, dq_out, dk_out, *_):
        grads = (None,) * 4
        if not (dq_out is None and dk_out is None):
            q, k, q_weight, k_weight, cos, sin, q_rstd, k_rstd = ctx.saved_tensors
            saved = (q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin)
            grads = rotary_bwd(dq_out, dk_out, *saved, ctx.options[1], ctx.needs_input_grad[:4])
        return *grads, None, None, None, None


def _tables(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of cos and sin that belong to q's positions, after all shapes have been checked."""
    for name, t in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        check_tensor(op, name, t)
    if q.dim() < 2:
        raise RuntimeError(f"{op}: q must be [..., heads, seq, dim], got {list(q.shape)}")
    if k.dim() != q.dim() or k.shape[-2:] != q.shape[-2:] or k.shape[:-3] != q.shape[:-3] or k.dtype != q.dtype:
        fact = f"{k.dtype} {list(k.shape)}"
        raise RuntimeError(f"{op}: k must have the dtype and shape of q ({q.dtype} {list(q.shape)}), but for the heads, got {fact}")
    if cos.shape != sin.shape:
        raise RuntimeError(f"{op}: sin must have the shape of cos ({list(cos.shape)}), got {list(sin.shape)}")
    if cos.dim() < 2 or cos.shape[-1] % 2 or cos.shape[-1] > q.shape[-1]:
        raise RuntimeError(f"{op}: cos must have an even number of columns, at most the {q.shape[-1]} of q, got {list(cos.shape)}")
    if position_ids is not None:
        check_tensor(op, "position_ids", position_ids)
        if cos.dim() != 2 or position_ids.dim() not in (1, 2) or position_ids.dtype not in (torch.int64, torch.int32):
            fact = f"{position_ids.dtype} {list(position_ids.shape)} and cos {list(cos.shape)}"
            raise RuntimeError(f"{op}: position_ids must be [seq] or [batch, seq] of integers, and cos [positions, rot_dim], got {fact}")
        if position_ids.device != cos.device:
            raise RuntimeError(f"{op}: position_ids must be on {cos.device}, where cos is, got a tensor on {position_ids.device}")
        positions = cos.shape[0]
        try:
            cos, sin = F.embedding(position_ids, cos), F.embedding(position_ids, sin)  # which counts no position from the end
        except IndexError:
            low, high = position_ids.aminmax()
            raise IndexError(f"{op}: position_ids must be in [0, {positions}), the rows of cos, got {low} to {high}") from None
    batch = q.shape[0] if q.dim() > 3 else 1
    if cos.shape[-2] != q.shape[-2] or cos.dim() > 3 or (cos.dim() == 3 and cos.shape[0] not in (1, batch)):
        expected = f"[{q.shape[-2]}, rot_dim] or [{batch}, {q.shape[-2]}, rot_dim] for q {list(q.shape)}"
        raise RuntimeError(f"{op}: cos must be {expected}, got {list(cos.shape)}")
    return (cos[0], sin[0]) if cos.dim() == 3 and q.dim() <= 3 else (cos, sin)


def _call(fn: type[Function], tensors: tuple, cos: Tensor, sin: Tensor, *options) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        _op.count(fn.op, "cos or sin requires grad")
        return fn.reference(*tensors, cos, sin, *options)
    return fn.call((*tensors, cos, sin), *options, outputs=2)


@overridable
def rotary_embedding(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, position_ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Turns pairs of columns of q and k by angles that grow with the position, both in one kernel:

    .. math:: y_a = x_a \cos_a - x_b \sin_a, \quad y_b = x_b \cos_b + x_a \sin_b

    for the pairs (a, b) = (i, i + rot_dim / 2), or (2 i, 2 i + 1) if interleaved. Columns from rot_dim on stay as they are.

    Args:
        q: `[..., heads, seq, dim]` (or `[seq, dim]`), float32, float64, float16 or bfloat16. Any layout: slices of one packed
            projection are read where they lie, without a copy.
        k: the dtype and shape of `q`, but for the number of heads.
        cos: `[seq, rot_dim]` or `[batch, seq, rot_dim]`, rot_dim even and at most dim; of the dtype of `q`, or float32 with 16-bit q.
            With both of a pair's columns given, as model code has them: `cat((angles, angles), -1).cos()`, or
            `angles.repeat_interleave(2, -1).cos()` if interleaved. If it requires grad, the reference is taken.
        sin: the same of `cos`.
        interleaved: a pair is two neighbours (GPT-J, Llama's own code), and not a column of each half (GPT-NeoX, transformers).
        position_ids: `[seq]` or `[batch, seq]`: the row of `cos` and `sin`, which then have one for each position, `[positions, rot_dim]`.

    Returns:
        q and k turned: their dtype and shape, in the order of their memory. Computed in float32 (float64 for float64).
        Saved for backward: cos and sin (their rows, with `position_ids`).

    Raises:
        RuntimeError: a shape that does not fit, an odd rot_dim, two devices, a tensor that is not dense. TypeError: a dtype that
        does not go with that of q. IndexError: on the CPU, a position that the tables do not have.

    Equivalent eager code::

        rot_dim = cos.shape[-1]
        x, rest = q.float()[..., :rot_dim], q[..., rot_dim:]
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        across = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
        cos, sin = (t.unsqueeze(-3) if t.dim() == 3 else t for t in (cos, sin))  # of q with four dimensions
        y = torch.cat(((x * cos + across * sin).to(q.dtype), rest), -1)  # k alike

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv:2104.09864.
    """
    cos, sin = _tables("rotary_embedding", q, k, cos, sin, position_ids)
    return _call(RotaryEmbeddingFn, (q, k), cos, sin, bool(interleaved))


@overridable
def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    interleaved: bool = False,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""RMS norm of each head of q and k, then the rotary embedding, in one kernel each way:

    .. math:: y = \mathrm{rotary}\left(x / \sqrt{\mathrm{mean}(x^2) + \mathrm{eps}} \cdot \mathrm{weight}\right)

    Args:
        q: `[..., heads, seq, dim]`, as in `rotary_embedding`. Any dim.
        k: the dtype and shape of `q`, but for the number of heads.
        q_weight: `[dim]`, of the dtype of `q`, or float32 with 16-bit q; or None for 1.
        k_weight: the same for `k`.
        cos, sin, interleaved, position_ids: as in `rotary_embedding`.
        eps: added to the mean of squares.

    Returns:
        q and k normed and turned: their dtype and shape, in the order of their memory. Computed in float32 (float64 for float64) and
        rounded once. Saved for backward: q, k, weights, cos, sin, and one float32 for each head and position.

    Raises:
        RuntimeError, TypeError, IndexError: as `rotary_embedding`, and for a weight that does not fit.

    Equivalent eager code::

        x = torch.nn.functional.rms_norm(q.float(), q.shape[-1:], q_weight, eps)
        rot_dim = cos.shape[-1]
        x, rest = x[..., :rot_dim], x[..., rot_dim:]
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        across = torch.stack((-b, a), -1).flatten(-2) if interleaved else torch.cat((-b, a), -1)
        cos, sin = (t.unsqueeze(-3) if t.dim() == 3 else t for t in (cos, sin))  # of q with four dimensions
        y = torch.cat((x * cos + across * sin, rest), -1).to(q.dtype)  # k alike

    Sources: Henry et al., Query-Key Normalization for Transformers, 2020, arXiv:2010.04245; Su et al. 2021, arXiv:2104.09864.
    """
    cos, sin = _tables("qk_norm_rope", q, k, cos, sin, position_ids)
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        if w is not None:
            check_tensor("qk_norm_rope", name, w)
            if w.shape != q.shape[-1:] or w.device != q.device:
                fact = f"{list(w.shape)} on {w.device}"
                raise RuntimeError(f"qk_norm_rope: {name} must have shape {list(q.shape[-1:])} and be on {q.device}, got {fact}")
            if w.dtype not in (q.dtype, wide_dtype(q)):
                raise TypeError(f"qk_norm_rope: {name} must be {q.dtype} or {wide_dtype(q)}, got {w.dtype}")
    return _call(QKNormRopeFn, (q, k, q_weight, k_weight), cos, sin, real("qk_norm_rope", "eps", eps), bool(interleaved))


class RotaryEmbedding(torch.nn.Module):
    """`rotary_embedding` of q and k with tables of its own, for positions 0 to max_position - 1. They grow with the sequence, but not
    for `position_ids`, which would have to be looked at.

    Args:
        dim: columns that are turned, even: all of a head's, or the first ones.
        base: the angle of pair i grows by base ** (-2 i / dim) with each position.
        max_position: how many positions the tables start with.
        interleaved: see `rotary_embedding`.

    The tables `cos` and `sin` are buffers `[max_position, dim]`, float32 (also beside 16-bit q and k; float64 in a module that is cast to
    it), and not part of the state dict. Those of a longer sequence are kept beside them, so that buffers are of one size in every replica.
    """

    _longer: tuple[Tensor, Tensor] | None = None

    def __init__(self, dim: int, base: float = 10000.0, max_position: int = 2048, *, interleaved: bool = False, device=None):
        super().__init__()
        if dim % 2:
            raise ValueError(f"RotaryEmbedding: dim must be even, got {dim}")
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        device = torch.empty(0, device=device).device  # the default one is perhaps none of the CPU, where the tables are computed
        for name, table in zip(("cos", "sin"), self._tables(max_position, device, torch.float32)):
            self.register_buffer(name, table, persistent=False)

    def _tables(self, positions: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False):  # they outlive it
            wide = dict(dtype=torch.float64, device="cpu")
            angles = torch.outer(torch.arange(positions, **wide), self.base ** (-torch.arange(0, self.dim, 2, **wide) / self.dim))
            angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat((angles, angles), -1)
            return angles.cos().to(device, dtype), angles.sin().to(device, dtype)

    def _tables_for(self, seq: int) -> tuple[Tensor, Tensor]:
        tables = self._longer
        if tables is None or (tables[0].device, tables[0].dtype) != (self.cos.device, self.cos.dtype):
            tables = self.cos, self.sin
        if seq > len(tables[0]):
            tables = self._tables(max(seq, 2 * len(tables[0])), self.cos.device, self.cos.dtype)
            if type(tables[0]) is Tensor:  # and no fake one
                self._longer = tables
        return tables

    def reset_parameters(self) -> None:
        self.cos, self.sin = self._tables(len(self.cos), self.cos.device, self.cos.dtype)

    def _apply(self, fn, recurse=True):
        before = self.cos
        super()._apply(fn, recurse)
        if self.cos is not before:  # elsewhere, without numbers, or rounded: bfloat16 has no room for the angles of far positions
            dtype = torch.promote_types(self.cos.dtype, torch.float32)
            self.cos, self.sin = self._tables(len(self.cos), self.cos.device, dtype)
        return self

    def forward(self, q: Tensor, k: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos, self.sin
        if cos.is_meta and not q.is_meta:  # of a meta module whose parameters came by load_state_dict(assign=True)
            cos, sin = self._tables(len(cos), q.device, cos.dtype)
            if type(cos) is Tensor:
                self.cos, self.sin = cos, sin
        if position_ids is None:
            seq = q.shape[-2]
            if seq > len(cos):
                cos, sin = self._tables_for(seq)
            cos, sin = cos[:seq], sin[:seq]
        tables = cos.to(wide_dtype(q)), sin.to(wide_dtype(q))
        return rotary_embedding(q, k, *tables, interleaved=self.interleaved, position_ids=position_ids)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}, max_position={self.cos.shape[0]}, interleaved={self.interleaved}"


def _heads(make, *shape, kv=None, rot=None, batch=None, layout="contiguous", packed=False, **options):
    """q of that shape and k with kv heads; tables of any numbers, as the formula takes them."""
    if packed:  # [batch, seq, 3, heads, dim], the result of one projection
        b, h, s, d = shape
        q, k = make(b, s, 3, h, d).permute(2, 0, 3, 1, 4)[:2]
    else:
        q, k = make(*shape, layout=layout), make(*shape[:-3], *([kv or shape[-3]] if len(shape) > 2 else []), *shape[-2:], layout=layout)
    table = (*([batch] if batch else []), shape[-2], shape[-1] - shape[-1] % 2 if rot is None else rot)
    if "position_ids" in options:
        table = (int(options["position_ids"].max()) + 3, table[-1])
    return dict(q=q, k=k, cos=make.param(*table), sin=make.param(*table), **options)


def _both_samples(make):
    positions = make.labels
    yield "plain", _heads(make, 2, 3, 5, 16)
    yield "grouped", _heads(make, 2, 4, 3, 32, kv=1)
    yield "interleaved", _heads(make, 2, 3, 5, 16, interleaved=True)
    yield "interleaved_grouped", _heads(make, 1, 4, 7, 40, kv=2, interleaved=True)
    yield "partial", _heads(make, 2, 2, 5, 24, rot=10)
    yield "partial_odd", _heads(make, 2, 2, 4, 13, rot=6, interleaved=True)
    yield "odd_dim", _heads(make, 1, 2, 4, 7)
    yield "nothing_turned", _heads(make, 2, 2, 3, 8, rot=0)
    yield "batched_tables", _heads(make, 3, 2, 4, 18, batch=3)
    yield "batched_tables_of_five", _heads(make, 2, 2, 3, 4, 6, batch=2)
    yield "position_ids", _heads(make, 2, 2, 5, 12, position_ids=positions(5, classes=9))
    yield "batched_position_ids", _heads(make, 3, 2, 5, 12, position_ids=positions(3, 5, classes=9), interleaved=True)
    yield "packed", _heads(make, 2, 3, 4, 16, packed=True)
    yield "packed_interleaved", _heads(make, 2, 3, 4, 20, packed=True, rot=12, interleaved=True)
    yield "column_strided", _heads(make, 2, 3, 4, 16, layout="column_strided")
    yield "transposed", _heads(make, 2, 3, 6, 10, layout="transposed")
    yield "one_head", _heads(make, 5, 8)
    yield "no_batch", _heads(make, 3, 5, 8, kv=1)
    yield "no_rows", _heads(make, 2, 3, 0, 8)
    yield "long", _heads(make, 1, 1, 2, 2002)


def _rotary_samples(make):
    for name, kwargs in _both_samples(make):
        yield Sample(name, kwargs)


def _qk_norm_samples(make):
    for i, (name, kwargs) in enumerate(_both_samples(make)):
        dim = kwargs["q"].shape[-1]
        weights = [None if name == "grouped" else make.param(dim), None if name in ("grouped", "partial") else make.param(dim)]
        eps = dict(eps=1e-2) if i % 2 else {}
        yield Sample(name, dict(q=kwargs.pop("q"), k=kwargs.pop("k"), q_weight=weights[0], k_weight=weights[1]) | kwargs | eps)


def _tables_bytes(kwargs) -> int:
    rows = kwargs["position_ids"].numel() if "position_ids" in kwargs else kwargs["cos"].shape[:-1].numel()
    return 2 * rows * kwargs["cos"].shape[-1] * kwargs["cos"].itemsize


def _norm_bytes(kwargs) -> int:
    sides = (kwargs["q"], kwargs["k"])
    weights = sum(kwargs[w].nbytes for w in ("q_weight", "k_weight") if kwargs[w] is not None)
    return weights + sum(x.nbytes + x.shape[:-1].numel() * wide_dtype(x).itemsize for x in sides)


def _shards(q, cos, at: int):
    """Heads, positions and batch: k has heads of its own number, tables have none."""
    batch = () if cos.dim() == 2 else (0,) if cos.shape[0] == q.shape[0] else (None,)
    return (-1,), {1: range(q.dim()), at: (*batch, -2, None), at + 1: (*batch, -2, None)}


ROTARY_EMBEDDING = Op(
    name="rotary_embedding",
    fn=RotaryEmbeddingFn,
    functional=rotary_embedding,
    reference=rotary_embedding_reference,
    samples=_rotary_samples,
    module=RotaryEmbedding,
    constants=("cos", "sin"),
    by_reference="cos or sin that requires grad",
    saved_bytes=_tables_bytes,
    shards=lambda q, k, cos, *_: _shards(q, cos, 2),
    bench=lambda make, rows, cols: _heads(make, rows, cols),
)

QK_NORM_ROPE = Op(
    name="qk_norm_rope",
    fn=QKNormRopeFn,
    functional=qk_norm_rope,
    reference=qk_norm_rope_reference,
    samples=_qk_norm_samples,
    constants=("cos", "sin"),
    by_reference="cos or sin that requires grad",
    saved_bytes=lambda kwargs: _tables_bytes(kwargs) + _norm_bytes(kwargs),
    shards=lambda q, k, q_weight, k_weight, cos, *_: _shards(q, cos, 4),
    bench=lambda make, rows, cols: _heads(make, rows, cols) | dict(q_weight=make.param(cols), k_weight=make.param(cols)),
)
