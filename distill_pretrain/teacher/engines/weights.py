"""Whether the weight files of a Hugging Face folder are the model's, all of it and nothing else; headers are read only.

transformers fills what is missing with random numbers and leaves out what it has no place for. Here its own loader is
run on tensors without values, so that its renaming and merging of tensors counts as it does when the model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distill_pretrain.checkpoint.hf.files import INDEX, SINGLE, bullets, file_names, header
from distill_pretrain.checkpoint.hf.nested import is_of_other_part, renamed
from distill_pretrain.errors import MissingDependency, TeacherError
from distill_pretrain.teacher.config import NO_TRUST, Trust
from distill_pretrain.teacher.engines.folder import (
    CONFIG_FILE,
    cannot_be_loaded,
    import_transformers,
)
from distill_pretrain.teacher.engines.head import trunk_name
from distill_pretrain.teacher.engines.text_part import causal_class, key_mapping

PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
_PACKAGES = {"bitsandbytes": "bitsandbytes", "gptq": "gptqmodel optimum", "awq": "gptqmodel"}


def weight_files(path: Path, trust: Trust = NO_TRUST) -> list[Path]:
    """List the files that transformers loads a folder's weights from.

    Raises:
        CheckpointError: none, files that are missing, or both of two kinds.
        TeacherError: pickled ones that were not asked for.
    """
    has_safetensors = (path / SINGLE).exists() or (path / INDEX).exists()
    pickled = [name for name in (PICKLED, PICKLED_INDEX) if (path / name).exists()]
    if has_safetensors or not pickled:
        named = file_names(path)
        return [path / file for file in sorted(set(named.values()) if named else {SINGLE})]
    if not trust.pickle:
        raise TeacherError(
            "the folder's weights are pickled, and unpickling can run code",
            where=path,
            found=pickled[0],
            expected="safetensors",
            remedy="save the model with save_pretrained, or trust its origin and set teacher.allow_pickle=true "
            "(kind hf, whole in each process)",
        )
    if pickled[0] == PICKLED:
        return [path / PICKLED]
    try:
        listed = sorted(set(json.loads((path / PICKLED_INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(
            "the index of the weights is damaged", where=path / PICKLED_INDEX, found=error
        ) from None
    missing = [name for name in listed if not (path / name).is_file()]
    if missing:
        raise TeacherError(
            "files of the weights are missing", where=path, found=", ".join(map(str, missing[:8]))
        )
    return [path / name for name in listed]


def meta_model(path: Path, config: Any, trust: Trust = NO_TRUST) -> Any:
    """Build the causal LM of a configuration, without values.

    Raises:
        TeacherError: there is none.
    """
    try:
        with torch.device("meta"), quiet():
            kind = causal_class(import_transformers(), config)
            return kind.from_config(config, trust_remote_code=trust.remote_code)
    except Exception as error:  # transformers raises nearly anything here
        raise cannot_be_loaded(path, error) from error


def require_own_weights(path: Path, model: Any, trust: Trust = NO_TRUST) -> list[Path]:
    """Refuse weight files that are not those of the model in config.json; returns them.

    Args:
        path: of the folder.
        model: of `meta_model`.
        trust: see `weight_files`.

    Raises:
        TeacherError, CheckpointError: tensors are missing, of another shape or not of the model, a file is damaged,
            or weights are quantised and what reads them is not installed; all tensors are named.
        MissingDependency: accelerate.
    """
    files = weight_files(path, trust)
    mapping = key_mapping(path, model.config)
    stored = {
        renamed(name, mapping): tensor
        for name, tensor in _stored_tensors(files).items()
        if not (mapping and is_of_other_part(name))
    }
    quantization = _quantization(model.config)
    if quantization is not None:
        # What the library makes of its tensors is known only where it loads them; see `require_all_loaded`.
        _require_quantizer(path, quantization)
        _require_whole_blocks(path, quantization, stored)
        return files
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise MissingDependency(
            "accelerate", extra="hf", needed_for="Hugging Face teachers"
        ) from None
    try:
        with quiet():
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=_once(stored, model),
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except Exception as error:  # transformers raises nearly anything here
        raise cannot_be_loaded(path, error) from error
    require_all_loaded(path, info, more=_unequal_ties(files, model, mapping))
    return files


def require_all_loaded(
    path: Path,
    info: Mapping[str, Any],
    *,
    spare: str | None = None,
    more: Sequence[str] = (),
    mapping: dict[str, str] | None = None,
) -> None:
    """Refuse a model of which transformers did not load every tensor, or not every tensor of the files.

    Args:
        path: of the folder.
        info: what `from_pretrained(output_loading_info=True)` says.
        spare: beginning of the names of tensors that the model has no use for, such as the LM head of a trunk.
        more: other problems found.
        mapping: see `text_part.key_mapping`.

    Raises:
        TeacherError: names them.
    """
    extra = [
        name
        for name in info["unexpected_keys"]
        if not (spare is not None and renamed(name, mapping or {}).startswith(spare))
        and not (mapping and is_of_other_part(name))
    ]
    problems = [f"{name} is missing" for name in sorted(info["missing_keys"])]
    problems += [f"{name} is not of this model" for name in sorted(extra)]
    problems += [
        f"{name} has shape {list(found)}, not {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += more
    if problems:
        raise TeacherError(
            "the weights are not those of the model in config.json:\n" + bullets(problems),
            where=path,
            remedy="download or save the folder again, or correct its config.json"
            + _hint(info["missing_keys"], extra),
        )


def require_plain_head(path: Path, weight: torch.Tensor) -> None:
    """Refuse an LM head whose stored numbers are not the weights themselves.

    Raises:
        TeacherError: it is quantised.
    """
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise TeacherError(
            "the LM head is quantised, so it cannot be applied to a few positions at a time",
            where=path,
            found=str(weight.dtype).removeprefix("torch."),
            expected="a head in fp32, fp16 or bf16",
            remedy="use the model in bf16",
        )


def _hint(missing: Sequence[str], extra: Sequence[str]) -> str:
    if extra and all("_orig_mod." in name for name in extra):
        return "; the names were saved from a compiled model: save its `_orig_mod` instead"
    if len(missing) == 1 and not extra:
        return "; a head that shares the embedding's weights needs tie_word_embeddings: true"
    return ""


def _stored_tensors(files: Sequence[Path]) -> dict[str, torch.Tensor]:
    """The tensors of the files, without values."""
    from transformers.modeling_utils import load_state_dict, str_to_torch_dtype

    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.suffix != ".safetensors":
            try:
                found.update(load_state_dict(str(file), map_location="meta", weights_only=True))
            except Exception as error:  # whatever is wrong with a pickle
                raise cannot_be_loaded(file, error) from error
            continue
        for name, shape, code in header(file):
            dtype = str_to_torch_dtype.get(code)
            if dtype is None:
                raise TeacherError(
                    "the type of a tensor is unknown", where=file, found=f"{name}: {code}"
                )
            found[name] = torch.empty(shape, dtype=dtype, device="meta")
    return found


def _once(stored: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """The tensors without copies of tied ones: older ones of transformers compare values, which these lack."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    copies = {
        target
        for target, source in tied.items()
        if target in stored and source in stored and stored[target].shape == stored[source].shape
    }
    return {name: tensor for name, tensor in stored.items() if name not in copies}


def _unequal_ties(files: Sequence[Path], model: Any, mapping: dict[str, str]) -> list[str]:
    """Pairs that config.json ties, of which the files have both, with different values."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    prefix = trunk_name(model)
    where = {
        renamed(name, mapping): (file, name)
        for file in files
        if file.suffix == ".safetensors"
        for name, *_ in header(file)
    }

    def stored(name: str) -> torch.Tensor | None:
        from safetensors import safe_open

        for candidate in (name, name.removeprefix(f"{prefix}.")):
            if candidate in where:
                place, own_name = where[candidate]
                with safe_open(place, framework="pt") as file:
                    tensor: torch.Tensor = file.get_tensor(own_name)
                    return tensor
        return None

    problems = []
    for target, source in tied.items():
        pair = stored(target), stored(source)
        if pair[0] is not None and pair[1] is not None and not torch.equal(pair[0], pair[1]):
            problems.append(
                f"{target} and {source} differ, though config.json ties them (tie_word_embeddings)"
            )
    return problems


def _quantization(config: Any) -> Any:
    text = config.get_text_config(decoder=True)
    return getattr(config, "quantization_config", None) or getattr(
        text, "quantization_config", None
    )


def _require_quantizer(path: Path, quantization: Any) -> None:
    from transformers.quantizers import AutoHfQuantizer

    raw = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(raw.get("quant_method"))
    try:
        with quiet():
            AutoHfQuantizer.from_config(quantization, pre_quantized=True).validate_environment(
                device_map=None, weights_only=True
            )
    except Exception as error:  # transformers raises nearly anything here
        remedy = (
            f"pip install {_PACKAGES[method]}, or"
            if method in _PACKAGES
            else "install what reads them, or"
        )
        raise TeacherError(
            "the model's weights are quantised, and cannot be read here",
            where=path / CONFIG_FILE,
            found=f"quant_method: {method}; {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy=f"{remedy} use the model in bf16",
        ) from error


def _require_whole_blocks(
    path: Path, quantization: Any, stored: Mapping[str, torch.Tensor]
) -> None:
    """Refuse FP8 weights whose last blocks are cut by a tensor's end, where there is no GPU.

    transformers (5.24) dequantises them then, with blocks of a tensor's size over the number of its scales: other
    numbers than the model's, or an error. On GPUs it multiplies in FP8, and such blocks are right.
    """
    raw = quantization if isinstance(quantization, dict) else quantization.to_dict()
    block = raw.get("weight_block_size")
    if raw.get("quant_method") != "fp8" or not block or torch.cuda.is_available():
        return
    cut = []
    for name, scales in stored.items():
        weight = stored.get(name.removesuffix("_scale_inv"))
        if name.endswith("_scale_inv") and weight is not None:
            sizes = zip(weight.shape, scales.shape, block, strict=False)
            if any(count > 1 and size != count * width for size, count, width in sizes):
                cut.append(
                    f"{name.removesuffix('_scale_inv')} {list(weight.shape)}, {list(scales.shape)} blocks"
                )
    if cut:
        raise TeacherError(
            "transformers cannot dequantise these FP8 weights without a GPU: tensors end within a block\n"
            + bullets(cut),
            where=path,
            expected=f"whole blocks of {list(block)}",
            remedy="use the model in bf16, or a GPU",
        )


@contextmanager
def quiet(*, keep_bar: bool = False) -> Iterator[None]:
    """Silence transformers' own reports in the block: they repeat, or contradict, what is checked here."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if not keep_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()
