"""Catalogs and machines of any size for the tests of placement, without files."""

from __future__ import annotations

from nexus_ext.hardware.profile import Cpu, Disk, DiskPoint, Gpu, HardwareProfile, Memory
from nexus_ext.types import Catalog, FileInfo, ModelShape, Role, TensorInfo

MIB = 1 << 20
GIB = 1 << 30


def machine(
    *,
    available: int = 16 * GIB,
    limit: int | None = None,
    disk_bytes_s: float | None = 2e9,
    random_bytes_s: float = 1e9,
    memory_bytes_s: float = 20e9,
    gpus: tuple[Gpu, ...] = (),
) -> HardwareProfile:
    points = []
    if disk_bytes_s is not None:
        points.append(DiskPoint(MIB, 16, "sequential", disk_bytes_s))
        points += [DiskPoint(size, 16, "random", random_bytes_s) for size in (4096, MIB)]
    return HardwareProfile(
        cpu=Cpu(n_cores=4, n_threads=8, isa=("avx2",), name="test"),
        memory=Memory(max(available, 64 * GIB), available, limit, memory_bytes_s),
        gpus=gpus,
        disk=Disk("/", "nvme0n1", "ext4", True, "", 512, 4096, tuple(points), "test"),
    )


def gpu(size: int, *, unified: bool = False, bytes_s: float | None = 300e9) -> Gpu:
    return Gpu("test GPU", size, size, size, unified, bytes_s)


def model(
    *,
    n_layers: int = 4,
    n_embd: int = 256,
    n_ff: int = 768,
    n_heads: int = 4,
    n_heads_kv: int = 2,
    head_dim: int = 64,
    n_vocab: int = 4096,
    n_experts: int = 0,
    n_used: int = 0,
    tied: bool = False,
    mixed: bool = True,
    architecture: str | None = None,
    metadata: dict[str, object] | None = None,
) -> Catalog:
    """A llama or a mixture of experts; `mixed` makes every other down projection larger (Q6_K)."""
    tensors: list[TensorInfo] = []
    offset = 0

    def add(name: str, kind: str, role: Role, layer: int | None, *shape: int) -> None:
        nonlocal offset
        values = 1
        for extent in shape:
            values *= extent
        bits = {"F32": 32, "F16": 16, "Q4_K": 4.5, "Q6_K": 6.5625}[kind]
        nbytes = int(values * bits / 8)
        is_tied = tied and role is Role.TOKEN_EMBEDDING
        tensors.append(
            TensorInfo(name, shape, kind, 0, offset, nbytes, role, layer, tied_output=is_tied)
        )
        offset += -(-nbytes // 32) * 32

    add("token_embd.weight", "Q4_K", Role.TOKEN_EMBEDDING, None, n_embd, n_vocab)
    for i in range(n_layers):
        p = f"blk.{i}."
        add(p + "attn_norm.weight", "F32", Role.SMALL, i, n_embd)
        for part, width in (("q", n_heads), ("k", n_heads_kv), ("v", n_heads_kv)):
            name = f"{p}attn_{part}.weight"
            add(name, "Q4_K", Role.ATTENTION, i, n_embd, width * head_dim)
        add(p + "attn_output.weight", "Q4_K", Role.ATTENTION, i, n_heads * head_dim, n_embd)
        add(p + "ffn_norm.weight", "F32", Role.SMALL, i, n_embd)
        down = "Q6_K" if mixed and i % 2 else "Q4_K"
        if n_experts:
            add(p + "ffn_gate_inp.weight", "F32", Role.ROUTER, i, n_embd, n_experts)
            for part in ("gate", "up"):
                name = f"{p}ffn_{part}_exps.weight"
                add(name, "Q4_K", Role.EXPERT, i, n_embd, n_ff, n_experts)
            add(p + "ffn_down_exps.weight", down, Role.EXPERT, i, n_ff, n_embd, n_experts)
        else:
            for part in ("gate", "up"):
                add(f"{p}ffn_{part}.weight", "Q4_K", Role.FFN, i, n_embd, n_ff)
            add(p + "ffn_down.weight", down, Role.FFN, i, n_ff, n_embd)
    add("output_norm.weight", "F32", Role.SMALL, None, n_embd)
    if not tied:
        add("output.weight", "Q6_K", Role.OUTPUT, None, n_embd, n_vocab)
    shape = ModelShape(
        architecture=architecture or ("qwen3moe" if n_experts else "llama"),
        n_layers=n_layers,
        n_embd=n_embd,
        n_ff=0 if n_experts else n_ff,
        n_heads=n_heads,
        n_heads_kv=(n_heads_kv,) * n_layers,
        head_dim_k=head_dim,
        head_dim_v=head_dim,
        n_vocab=n_vocab,
        n_ctx_train=4096,
        n_experts=n_experts,
        n_experts_used=n_used,
    )
    return Catalog(
        files=(FileInfo("/model.gguf", offset),),
        shape=shape,
        tensors=tuple(tensors),
        metadata=metadata or {},
        fingerprint="0" * 32,
        header=b"",
        virtual_offsets=tuple(t.offset for t in tensors),
        virtual_nbytes=offset,
    )


def large_model() -> Catalog:
    """An 8 billion parameter llama at 4 bits."""
    return model(
        n_layers=32,
        n_embd=4096,
        n_ff=14336,
        n_heads=32,
        n_heads_kv=8,
        head_dim=128,
        n_vocab=128256,
    )


def large_moe() -> Catalog:
    """A 30 billion parameter mixture of 128 experts, 8 used, at 4 bits."""
    return model(
        n_layers=48,
        n_embd=2048,
        n_ff=768,
        n_heads=32,
        n_heads_kv=4,
        head_dim=128,
        n_vocab=151936,
        n_experts=128,
        n_used=8,
    )


def test_builders_make_models_of_the_size_they_say() -> None:
    assert 4 * GIB < large_model().nbytes < 5 * GIB
    assert 15 * GIB < large_moe().nbytes < 19 * GIB
    assert model(tied=True).tensors[-1].role is Role.SMALL
