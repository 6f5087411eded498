"""The command `beta-dpo convert`, which writes a GGUF file as a folder that transformers and this project load."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.cli.mistakes import checked_command
from app.core.errors import UserError, first_line
from app.core.files import atomic_folder


@checked_command
def convert(gguf: str, out: str) -> None:
    """Write the model in the file GGUF to the folder OUT in float32, with its tokenizer.

    Args:
        gguf: a .gguf file, or the name of an installed Python package that contains one.
        out: the folder to create; it appears only when complete.
    """
    if Path(out).exists():
        raise UserError(f"{out} exists already: choose another folder, or remove it first.")
    path = find_gguf(gguf)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    except ImportError as error:
        raise UserError("Reading GGUF needs more packages: pip install gguf accelerate.") from error
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{path} cannot be read as a GGUF model: {first_line(error)}") from error
    # transformers leaves them on a dequantised model, which save_pretrained then refuses
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    with atomic_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"converted {path.name} to {out}")


def find_gguf(name: str) -> Path:
    """Return the file itself, or the only .gguf file of an installed package. Raises UserError if there is none."""
    if name.lower().endswith(".gguf"):
        if not Path(name).is_file():
            raise UserError(f"There is no file {name}.")
        return Path(name)
    spec = None
    if all(map(str.isidentifier, name.split("."))):
        with suppress(ModuleNotFoundError):  # of a parent package, the only one that this imports
            spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is neither a .gguf file nor an installed package: install it first.")
    found = [path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.gguf")]
    if len(found) != 1:
        raise UserError(f"The package {name} holds {len(found)} .gguf files: give the path of one.")
    return found[0]
