"""Linear attention by Triton kernels, on a GPU: what model.linear_plain computes, phi = 1 + ELU.

    S = sum_m phi(k_m)^T v_m      z = sum_m phi(k_m)      out_n = phi(q_n) S / (phi(q_n) . z)
The plain form launches 18 kernels and moves ten times the bytes. Here one kernel sums the state
(S, z) of each head, and another reads it. The backward, with G the gradient of out, does the same:
    t_n = phi(q_n) . z            g_n = G_n / t_n             c_n = -phi(q_n) . (g_n S^T) / t_n
    dphi(q_n) = g_n S^T + c_n z   dS = sum_n phi(q_n)^T g_n   dz = sum_n c_n phi(q_n)
    dphi(k_m) = v_m dS^T + dz     dv_m = phi(k_m) dS"""
import os

import torch
import triton
import triton.language as tl

PROGRAMS = 264      # to fill a GPU, tokens of a head are summed in parts: 2 a processor of an H100
BLOCK = {torch.bfloat16: 64, torch.float16: 32, torch.float32: 32}      # tokens at a time


@triton.jit
def phi(x):
    """model.elu_plus_one; its slope is min(phi(x), 1). Of float16 in float32: sums overflow."""
    wide = x.to(tl.float32)
    y = tl.where(wide > 0, wide + 1, tl.exp(tl.maximum(wide, -30)))
    return y.to(tl.bfloat16) if x.dtype == tl.bfloat16 else y


@triton.jit
def product(a, b):
    """a @ b in the dtype of a, summed in float32. tf32x3: tensor cores' way to float32."""
    return tl.dot(a, b.to(a.dtype), input_precision="tf32x3")


@triton.jit
def places(head, n, H, N, row, D: tl.constexpr):
    """Where tokens n of a head lie in a tensor (B,N,H,D) whose tokens are `row` numbers apart."""
    return ((head // H).to(tl.int64) * N + n[:, None]) * row + head % H * D + tl.arange(0, D)


@triton.jit
def state_places(state, i, D: tl.constexpr):
    """Where S (D,D) and z (D) of state i lie: the rows of one (D+1,D), float32."""
    d, start = tl.arange(0, D), state + i.to(tl.int64) * (D + 1) * D
    return start + d[:, None] * D + d, start + D * D + d


@triton.jit
def sum_keys(k, v, parts, H, N, row, D: tl.constexpr, BLOCK: tl.constexpr):
    head, part = tl.program_id(0), tl.program_id(1)
    S, z = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for block in range(part, tl.cdiv(N, BLOCK), tl.num_programs(1)):
        n = block * BLOCK + tl.arange(0, BLOCK)
        at, exist = places(head, n, H, N, row, D), n[:, None] < N
        phi_k = phi(tl.load(k + at, exist, 0))          # 1 beyond the last token, where v is 0
        S += product(phi_k.T, tl.load(v + at, exist, 0))
        z += tl.sum(tl.where(exist, phi_k.to(tl.float32), 0), 0)
    at_S, at_z = state_places(parts, head * tl.num_programs(1) + part, D)
    tl.store(at_S, S)
    tl.store(at_z, z)


@triton.jit
def read_queries(q, state, out, H, N, row, D: tl.constexpr, BLOCK: tl.constexpr):
    head, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_S, at_z = state_places(state, head, D)
    at, to, exist = places(head, n, H, N, row, D), places(head, n, H, N, H * D, D), n[:, None] < N
    phi_q = phi(tl.load(q + at, exist, 0))
    t = tl.sum(phi_q.to(tl.float32) * tl.load(at_z), 1)[:, None]
    tl.store(out + to, product(phi_q, tl.load(at_S)) / t, exist)


@triton.jit
def sum_queries(q, grad, state, dq, parts, H, N, row, D: tl.constexpr, BLOCK: tl.constexpr):
    head, part = tl.program_id(0), tl.program_id(1)
    at_S, at_z = state_places(state, head, D)
    S, z = tl.load(at_S), tl.load(at_z)
    dS, dz = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    for block in range(part, tl.cdiv(N, BLOCK), tl.num_programs(1)):
        n = block * BLOCK + tl.arange(0, BLOCK)
        at, exist = places(head, n, H, N, H * D, D), n[:, None] < N
        phi_q = phi(tl.load(q + places(head, n, H, N, row, D), exist, 0))
        wide = phi_q.to(tl.float32)
        t = tl.sum(wide * z, 1)[:, None]
        g = tl.load(grad + at, exist, 0).to(tl.float32) / t             # 0 beyond the last token
        gS = product(g.to(phi_q.dtype), S.T)
        c = -tl.sum(wide * gS, 1)[:, None] / t
        tl.store(dq + at, (gS + c * z) * tl.minimum(wide, 1), exist)
        dS += product(phi_q.T, g)
        dz += tl.sum(wide * c, 0)
    at_S, at_z = state_places(parts, head * tl.num_programs(1) + part, D)
    tl.store(at_S, dS)
    tl.store(at_z, dz)


@triton.jit
def read_keys(k, v, dstate, dk, dv, H, N, row, D: tl.constexpr, BLOCK: tl.constexpr):
    head, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at_S, at_z = state_places(dstate, head, D)
    at, to, exist = places(head, n, H, N, row, D), places(head, n, H, N, H * D, D), n[:, None] < N
    phi_k, dS = phi(tl.load(k + at, exist, 0)), tl.load(at_S)
    dphi = product(tl.load(v + at, exist, 0).to(phi_k.dtype), dS.T) + tl.load(at_z)
    tl.store(dk + to, dphi * tl.minimum(phi_k.to(tl.float32), 1), exist)
    tl.store(dv + to, product(phi_k, dS), exist)


class LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        B, H, N, D = q.shape
        ctx.sizes = H, N, q.stride(2), D, BLOCK[q.dtype]
        ctx.grid = B * H, triton.cdiv(N, BLOCK[q.dtype])
        ctx.parts = B * H, min(ctx.grid[1], triton.cdiv(PROGRAMS, B * H)), D + 1, D
        parts = q.new_empty(ctx.parts, dtype=torch.float32)
        out = q.new_empty(B, N, H, D)                   # so that the network joins heads by a view
        sum_keys[ctx.parts[:2]](k, v, parts, *ctx.sizes)
        state = parts.sum(1)                            # in one order: same inputs, same bits
        read_queries[ctx.grid](q, state, out, *ctx.sizes)
        ctx.save_for_backward(q, k, v, state)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, state = ctx.saved_tensors
        parts, grad = state.new_empty(ctx.parts), grad.contiguous()
        dq, dk, dv = (torch.empty_like(grad) for _ in range(3))         # (B,N,H,D)
        sum_queries[ctx.parts[:2]](q, grad, state, dq, parts, *ctx.sizes, num_warps=8)
        read_keys[ctx.grid](k, v, parts.sum(1), dk, dv, *ctx.sizes, num_warps=8)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def linear_attention(q, k, v):
    """q, k, v (B,H,N,D), usable -> the same shape and dtype, in memory as (B,N,H,D)."""
    projected = (q.shape[2] * q.stride(2), q.shape[3], q.stride(2), 1)  # views of one (B,N,3HD)
    if not q.stride() == k.stride() == v.stride() == projected:         # rotary positions: copies
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    return LinearAttention.apply(q, k, v).transpose(1, 2)


def usable(q, plain, *others):
    """Whether linear_attention(q, k, v) can stand for plain(q, k, v). others: k and v."""
    same = all(x.shape == q.shape and x.dtype == q.dtype for x in others)
    wanted = os.environ.get("ADALA_KERNEL") != "plain" and q.is_cuda and q.dtype in BLOCK
    return same and wanted and q.shape[3] in (16, 32, 64) and agrees(plain, q.dtype)


@torch.compiler.assume_constant_result                  # torch.compile asks it while it traces
def agrees(plain, dtype, device="cuda", known={}):
    """Whether the kernels, with their own phi, give what plain gives on 65 random tokens; asked
    once a process. Where they differ or do not run, one sentence says so."""
    if dtype not in known:
        draws = torch.randn(3, 1, 2, 65, 64, generator=torch.Generator().manual_seed(0)) * 3 - 3
        draws, limit = draws.to(device, dtype), max(1e-3, 2 * torch.finfo(dtype).eps)
        try:
            with torch.no_grad():
                ours, truth = linear_attention(*draws), plain(*draws.float())
            torch.testing.assert_close(ours.float(), truth, rtol=limit, atol=limit)
            known[dtype] = True
        except Exception as error:      # another phi, no C compiler, too small or too old a GPU
            known[dtype] = False
            print(f"linear attention in {dtype} runs without its GPU kernel: {repr(error)[:200]}")
    return known[dtype]
