"""Recipe section `objective`."""

from __future__ import annotations

from pydantic import Field, model_validator

from distill_pretrain.config import Section


class ObjectiveConfig(Section):
    """What the student minimises: ce_weight * CE(label) + kd_weight * KL(teacher || student), per token."""

    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the true next token."""
    kd_weight: float = Field(default=0.0, ge=0)
    """Weight of the sparse forward KL; needs data.cache."""

    @model_validator(mode="after")
    def _some_weight(self) -> ObjectiveConfig:
        if self.ce_weight == 0 and self.kd_weight == 0:
            raise ValueError("ce_weight and kd_weight are both 0: there is nothing to learn")
        return self
