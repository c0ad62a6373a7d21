"""What the ranks of tests need: imported once, by the server that they are forked from."""

from __future__ import annotations

from contextlib import suppress

import torch._inductor.compile_fx  # noqa: F401

import distill_pretrain.mcore.student.base
import distill_pretrain.teacher.capture
import distill_pretrain.train.job  # noqa: F401

with suppress(ImportError):
    import transformers.models.llama.modeling_llama  # noqa: F401
