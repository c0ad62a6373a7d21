"""Makes a Hugging Face folder in fp32, with its tokenizer, of a model in a GGUF file.

    python tools/folder_of_gguf.py MODEL.gguf FOLDER

Needs the packages transformers and gguf. The weights are what the file's quantised ones stand for: what a program that
runs the file computes with, up to its own rounding. The folder appears when it is whole.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from reporting import run

from distill_pretrain.errors import DistillPretrainError


class NoModel(DistillPretrainError):
    """A file is not there, or cannot be read as a model."""


def folder_of(file: Path, folder: Path) -> None:
    """Write the folder.

    Args:
        file: a causal LM of an architecture that transformers reads from GGUF.
        folder: to make; it and its parents need not exist.

    Raises:
        NoModel: there is no such file, the folder exists, or the file holds no model that transformers can read.
    """
    if not file.is_file():
        raise NoModel("there is no such file", where=file, remedy="name a .gguf file")
    if folder.exists():
        raise NoModel(
            "the folder is there already", where=folder, remedy="name another, or remove it"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    try:
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ImportError, OSError, ValueError) as error:
        raise NoModel(
            "transformers cannot read the file",
            where=file,
            found=str(error).splitlines()[0],
            remedy="pip install gguf; see which architectures transformers reads from GGUF",
        ) from error
    # As long as the configuration says `quantized`, save_pretrained refuses.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="MODEL.gguf")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    folder_of(args.file, args.folder)
    print(f"the model is in {args.folder}")


if __name__ == "__main__":
    run(main)
