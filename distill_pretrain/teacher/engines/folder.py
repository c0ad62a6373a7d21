"""What every engine asks of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distill_pretrain.errors import MissingDependency, TeacherError, TokenizerMismatch
from distill_pretrain.formats.atomic import sha256_file
from distill_pretrain.processes.process import on_first_rank
from distill_pretrain.teacher.engines.head import Finish

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG_FILE = "config.json"
_IDENTITY_PATTERNS = (CONFIG_FILE, "*.safetensors", "*.bin")


def import_transformers() -> Any:
    """The package, or the line that installs it.

    Raises:
        MissingDependency: it is not there.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependency(
            "transformers", extra="hf", needed_for="a Hugging Face teacher"
        ) from None
    return transformers


def read_config(path: Path, *, vocab_size: int, seq_len: int) -> Any:
    """The folder's configuration, of a model that knows the corpus's ids and positions.

    Raises:
        TeacherError, TokenizerMismatch: it cannot be used.
    """
    transformers = import_transformers()
    if not (path / CONFIG_FILE).exists():
        raise TeacherError(
            "not a Hugging Face model folder",
            where=path,
            expected="a local folder with config.json and weights",
            remedy="download the model first and set teacher.path to its folder",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise cannot_be_loaded(path, error) from None
    require_known_ids(path, int(config.vocab_size), vocab_size)
    require_positions(path, getattr(config, "max_position_embeddings", None), seq_len)
    return config


def cannot_be_loaded(path: Path, error: Exception) -> TeacherError:
    """What to raise after transformers refused."""
    return TeacherError("the model cannot be loaded", where=path, found=error)


def require_known_ids(path: Path, width: int, vocab_size: int) -> None:
    """Refuse a model with fewer ids than the corpus.

    Raises:
        TokenizerMismatch: see above.
    """
    if width < vocab_size:
        raise TokenizerMismatch(
            "the model's vocabulary is smaller than the corpus's",
            where=path,
            found=f"{width} ids",
            expected=f"at least {vocab_size} ids",
            remedy="tokenise the corpus with the model's own tokenizer (tokenizer.kind=hf)",
        )


def require_positions(path: Path, longest: int | None, seq_len: int) -> None:
    """Refuse sequences that the model was not made for.

    Raises:
        TeacherError: see above.
    """
    if longest is not None and seq_len > longest:
        raise TeacherError(
            "the sequences are longer than the model allows",
            where=path,
            found=f"data.seq_len = {seq_len}",
            expected=f"at most {longest}",
        )


def weights_identity(path: Path) -> dict[str, str]:
    """File name -> sha256 of what decides the model. Every rank of the job calls it; one reads."""
    files = sorted({f for pattern in _IDENTITY_PATTERNS for f in path.glob(pattern)})
    return on_first_rank(lambda: {f.name: sha256_file(f) for f in files})


def finish_of(config: Any) -> Finish | None:
    """What the model does to the product of hidden states and LM head, as far as known; see `require_known_head`."""
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    if cap:
        return lambda logits: torch.tanh(logits / cap) * cap
    if divisor:
        return lambda logits: logits / divisor
    if factor:
        return lambda logits: logits * factor
    return None


class _Stub(torch.nn.Module):
    """Stands for a model without its head: it says what it was told to."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        return BaseModelOutputWithPast(last_hidden_state=self._hidden)


@torch.no_grad()
def require_known_head(path: Path, config: Any) -> str:
    """Name of the LM head, of a model whose logits are this head applied to its trunk's output, and `finish_of`.

    The model's own code is run on a trunk and a head of made-up numbers; no weights are read.

    Raises:
        TeacherError: its logits are made in another way.
    """
    transformers = import_transformers()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    trunk, old_head = model.base_model, model.get_output_embeddings()
    name = next((n for n, m in model.named_modules() if m is old_head), None)
    g = torch.Generator().manual_seed(0)
    same = False
    if name is not None and trunk is not model and isinstance(old_head, torch.nn.Linear):
        hidden = torch.randn(1, 3, old_head.in_features, generator=g)
        head = torch.nn.Linear(old_head.in_features, 5, bias=old_head.bias is not None)
        model.set_submodule(name, head)
        setattr(model, model.base_model_prefix, _Stub(hidden))
        finish = finish_of(config) or (lambda logits: logits)
        expected = finish(F.linear(hidden, head.weight, head.bias))
        try:
            found = model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
            same = found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
        except (RuntimeError, TypeError, AttributeError, ValueError, NotImplementedError):
            same = False
    if not same:
        raise TeacherError(
            "the model's logits are not its LM head applied to its last hidden states",
            where=path,
            found=f"model_type {config.model_type}",
            expected="a linear LM head, perhaps soft-capped or scaled",
            remedy="use another teacher; the logits of this one cannot be made chunk by chunk",
        )
    assert name is not None
    return name
