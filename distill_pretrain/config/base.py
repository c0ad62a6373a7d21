"""The base class of every recipe section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, keyword-only, typed group of settings; unknown keys are refused.

    Fields carry their documentation as the docstring below them; `distill-pretrain VERB --help` prints it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
