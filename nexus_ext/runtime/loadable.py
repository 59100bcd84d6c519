"""What llama.cpp's loader takes for granted: where it does not hold, it ends the process."""

from __future__ import annotations

from nexus_ext.errors import FormatError
from nexus_ext.types import Catalog

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024


def check_loadable(catalog: Catalog) -> None:
    """Raise FormatError for a header that makes llama.cpp abort instead of returning an error."""
    shape = catalog.shape
    n_experts, n_used = shape.n_experts, shape.n_experts_used
    n_groups = _number(catalog, "expert_group_count")
    n_groups_used = _number(catalog, "expert_group_used_count")
    _expect(catalog, "block_count", shape.n_layers, 1, _MAX_LAYERS)
    _expect(catalog, "expert_count", n_experts, 0, _MAX_EXPERTS)
    _expect(catalog, "expert_used_count", n_used, min(n_experts, 1), n_experts)
    _expect(catalog, "expert_group_count", n_groups, 0, max(n_experts - 1, 0))
    if n_groups > 1:
        _expect(catalog, "expert_group_used_count", n_groups_used, 1, n_groups - 1)
        if n_experts % n_groups:
            raise _refusal(catalog, "expert_group_count", n_groups, f"a divisor of {n_experts}")


def _expect(catalog: Catalog, key: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        wanted = f"{least} to {most}" if least < most else f"{most}"
        raise _refusal(catalog, key, value, wanted)


def _refusal(catalog: Catalog, key: str, value: int, wanted: str) -> FormatError:
    name = f"{catalog.shape.architecture}.{key}"
    return FormatError(
        f"{catalog.files[0].path}: the key '{name}' is {value}; llama.cpp wants {wanted}",
        hint="the file is damaged, or made for another program",
    )


def _number(catalog: Catalog, key: str) -> int:
    value = catalog.metadata.get(f"{catalog.shape.architecture}.{key}", 0)
    return value if isinstance(value, int) else 0
