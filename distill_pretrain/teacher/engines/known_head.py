"""Whether a Hugging Face model's logits are its LM head applied to its trunk's output, and what else it does to them.

Shapes: B sequences, L positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.errors import TeacherError
from distill_pretrain.teacher.engines.head import Finish, trunk_name, trunk_of


def finish_of(config: Any) -> Finish | None:
    """Return what the model does to the product of hidden states and LM head, as far as `require_known_head` knows.

    Args:
        config: of the whole model; the part for text is what counts.
    """
    text = config.get_text_config(decoder=True)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    cap = next((c for c in (getattr(text, name, None) for name in caps) if c), None)
    # Granite and its kin divide by the key with which HyperCLOVA X multiplies.
    divides = not text.model_type.startswith("hyperclovax")
    divisor = getattr(text, "logits_scaling", None) if divides else None
    factors = ("logit_scale", "lm_head_multiplier", *(() if divides else ("logits_scaling",)))
    factor = next((f for f in (getattr(text, name, None) for name in factors) if f), None)
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    if divisor:
        return lambda logits: logits / divisor
    if factor:
        return lambda logits: logits * factor
    return None


@torch.no_grad()
def require_known_head(path: Path, model: Any) -> str:
    """Name of the LM head, of a model whose logits are this head applied to its trunk's output, and `finish_of`.

    The model's own code is run on a trunk and a head of made-up numbers; no weights are read.

    Args:
        path: of its folder, for messages.
        model: without values (on the device "meta"); spoilt by the call.

    Raises:
        TeacherError: its logits are made in another way, or its own code fails on the made-up numbers.
    """
    _require_causal(path, model.config)
    trunk, old_head = trunk_of(model), model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is old_head), None)
    if name is None or not isinstance(old_head, torch.nn.Linear):
        raise _unknown_head(path, model, f"its head is {_kind_of(old_head)}")
    if trunk is model:
        raise _unknown_head(path, model, "its trunk is no module of its own")
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, old_head.in_features, generator=g)
    head = torch.nn.Linear(old_head.in_features, 5, bias=old_head.bias is not None)
    model.set_submodule(name, head)
    setattr(model, trunk_name(model), _Stub(hidden, trunk))
    finish = finish_of(model.config) or (lambda logits: logits)
    expected = finish(F.linear(hidden, head.weight, head.bias))
    try:
        found = model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
    except Exception as error:  # whatever foreign code raises
        more = "layers between its trunk and its head" if "meta" in str(error) else repr(error)
        raise _unknown_head(path, model, more) from error
    if (
        found.shape != expected.shape
        or found.is_meta
        or not torch.allclose(found, expected, atol=1e-5)
    ):
        raise _unknown_head(path, model, "other numbers")
    return name


def _require_causal(path: Path, config: Any) -> None:
    """Refuse what transformers lists among causal LMs though a position sees later tokens."""
    kind = config.model_type
    if kind in ("cpmant", "xlnet") or (kind == "xlm" and not config.causal):
        raise TeacherError(
            "the model is not causal: its predictions see the tokens they should predict",
            where=path,
            found=f"model_type {kind}",
            expected="a model that reads from left to right",
        )


def _kind_of(head: object) -> str:
    return "absent" if head is None else type(head).__name__


def _unknown_head(path: Path, model: Any, found: str) -> TeacherError:
    return TeacherError(
        "the model's logits are not its LM head applied to its last hidden states",
        where=path,
        found=f"model_type {model.config.model_type}: {found}",
        expected="a linear LM head, perhaps soft-capped or scaled",
        remedy="use another teacher; the logits of this one cannot be made chunk by chunk",
    )


class _Stub(torch.nn.Module):
    """Stands for a model without its head: it says what it was told to, and has the settings of its trunk."""

    def __init__(self, hidden: torch.Tensor, trunk: torch.nn.Module) -> None:
        super().__init__()
        self._hidden = hidden
        self._settings = {k: v for k, v in vars(trunk).items() if not k.startswith("_")}

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__.get("_settings", {})
        return settings[name] if name in settings else super().__getattr__(name)

    @property
    def decoder(self) -> _Stub:
        """Itself, where the trunk only wraps a decoder."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _output_type()(last_hidden_state=self._hidden)


def _output_type() -> type[Any]:
    """An output of a trunk that has nothing but hidden states, whatever else is asked of it."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            # Routers' logits, cross-attentions and the like: None, as where they were not asked for.
            if name.startswith("__"):
                raise AttributeError(name)

    return Output
