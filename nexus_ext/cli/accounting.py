"""What an answer cost, as a line for people and as fields for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.cli.session import Answer
    from nexus_ext.runtime import RunStats


def fields(answer: Answer) -> dict[str, object]:
    """Return the accounting for JSON output; what does not apply is null."""
    stats = answer.decode
    return {
        "finish": answer.finish,
        "tokens": len(answer.tokens),
        "tok_s": answer.tok_s,
        "decode_s": answer.decode_s,
        "prompt_tokens": answer.n_prompt,
        "prefill_tokens": answer.n_prefill,
        "prefill_tok_s": answer.prefill_tok_s,
        "prefill_s": answer.prefill_s,
        "streaming": stats is not None,
        "bytes_read_per_token": stats.read_per_pass_bytes if stats else None,
        "wait_fraction": wait_fraction(stats) if stats else None,
        "hit_rate": stats.hit_rate if stats else None,
        "expert_hit_rate": stats.expert_hit_rate if stats else None,
        "bound_tok_s": stats.bound_tok_s if stats else None,
        "bound_fraction": stats.bound_fraction if stats else None,
        "prefill_stats": answer.prefill,
        "decode_stats": stats,
    }


def line(answer: Answer) -> str:
    """Return the accounting in one line."""
    parts = [f"{len(answer.tokens)} tokens, {rate(answer.tok_s)}"]
    parts.append(f"prefill {answer.n_prefill} tokens, {rate(answer.prefill_tok_s)}")
    stats = answer.decode
    if stats is None:
        parts.append("nothing streamed" if answer.tokens else "no token")
    elif stats.passes:
        parts.append(f"{format_bytes(stats.read_per_pass_bytes)} read a token ({stats.io_mode})")
        if stats.expert_hit_rate is not None:
            parts.append(f"{stats.expert_hit_rate:.0%} of the experts cached")
            parts.append(f"prediction {stats.prediction}")
        parts.append(f"I/O wait {wait_fraction(stats):.0%}")
        if stats.bound_fraction is not None and stats.bound_tok_s is not None:
            parts.append(_bound(stats.bound_fraction, stats.bound_tok_s))
    return "; ".join(parts)


def _bound(fraction: float, tok_s: float) -> str:
    if fraction > 1:
        return f"above the disk's measured bound ({rate(tok_s)})"
    return f"{fraction:.0%} of the bound ({rate(tok_s)})"


def progress(n_tokens: int, elapsed_s: float, stats: RunStats | None) -> str:
    """Return the line that is shown while tokens are computed."""
    parts = [f"{n_tokens} tokens", rate(n_tokens / elapsed_s if elapsed_s > 0 else None)]
    if stats is not None and elapsed_s > 0:
        parts.append(f"{format_bytes(stats.bytes_read / elapsed_s)}/s read")
        hits = stats.hit_rate if stats.expert_hit_rate is None else stats.expert_hit_rate
        parts.append(f"hit rate {hits:.0%}")
        if stats.prediction:
            parts.append(f"prediction {stats.prediction}")
    return ", ".join(parts)


def wait_fraction(stats: RunStats) -> float:
    """Return the share of the computing time in which a read was waited for."""
    return min(stats.wait_s / stats.pass_s, 1.0) if stats.pass_s > 0 else 0.0


def rate(tok_s: float | None) -> str:
    if tok_s is None:
        return "- tok/s"
    return f"{tok_s:.2f} tok/s" if tok_s < 100 else f"{tok_s:.0f} tok/s"
