"""How a configuration is parsed: ranges of numbers, repeated keys, the seed, the options of classes."""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, add_instantiator, get_loader, set_loader
from jsonargparse.typing import register_type
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.core.errors import UserError, first_line
from app.core.log_folder import flattened
from app.method.ranges import LARGEST_SEED, FromMinusOne, NonNegativeInt, Number, PositiveFloat, PositiveInt

log = logging.getLogger(__name__)
# options of Lightning's Trainer that it accepts at any value but later ignores or fails on
TRAINER_RANGES: dict[str, Any] = {
    **dict.fromkeys(("trainer.log_every_n_steps", "trainer.check_val_every_n_epoch"), PositiveInt),
    **dict.fromkeys(("trainer.min_epochs", "trainer.min_steps"), NonNegativeInt),
    **dict.fromkeys(("trainer.max_steps", "trainer.max_epochs", "trainer.num_sanity_val_steps"), FromMinusOne),
    "trainer.val_check_interval": PositiveFloat,
}
MAY_BE_INFINITE = ("meta_init_above",)
LARGEST = 1e15  # limit for numbers, ours or Lightning's
refusals: list[Exception] = []  # of `built`: jsonargparse keeps only the text of errors from members of a union


def set_up_parsing() -> None:
    """Make jsonargparse refuse repeated keys, check the ranges of numbers, and name a class that fails."""
    for kind in Number.__subclasses__():
        register_type(kind, kind.base, kind, type_check=lambda value, kind: kind.holds(value))
    add_instantiator(built, object, subclasses=True)
    read = get_loader("yaml")

    def without_repeats(text: str) -> Any:
        refuse_repeats(yaml.compose(text, yaml.SafeLoader))
        return read(text)

    set_loader("yaml", without_repeats, (yaml.YAMLError,))


def refuse_repeats(node: yaml.Node | None) -> None:
    """Raise YAMLError for a key that a mapping holds twice, because YAML keeps the last value alone."""
    seen: set[str] = set()
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = part if isinstance(part, tuple) else (None, part)
        if key is not None and str(key.value) in seen:
            raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
        seen.add("" if key is None else str(key.value))
        refuse_repeats(value)


def yaml_fault(error: Exception) -> str:
    """Return place and fault of text that is no YAML, without the reader's name for it and its drawing."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark and error.problem:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).replace('in "<unicode string>", ', "").split())


def built(class_type: type, *args: Any, applied_instantiation_links: dict, **settings: Any) -> Any:
    """Return `class_type(…)` with the configured settings. Raises UserError with the class name if that fails."""
    try:
        return class_type(*args, **settings)
    except (UserError, ModuleNotFoundError) as error:
        refusals.append(error)
        raise
    except Exception as error:
        named = str(error).startswith(f"{class_type.__name__}: ")
        refusals.append(UserError(reason(error) if named else f"{class_type.__name__}: {reason(error)}"))
        raise refusals[-1] from error


def reason(error: BaseException) -> str:
    """Return the first line of the error's text, with the error's type if the text alone says little."""
    text = first_line(error)
    plain = isinstance(error, (ValueError, TypeError, ImportError, MisconfigurationException, UserError))
    text = text if plain or text == type(error).__name__ else f"{type(error).__name__} {text}"
    return text if text.endswith((".", "!", "`")) else f"{text}."


def check_values(config: Namespace) -> None:
    """Raise UserError for an empty path, and for a number that is NaN, absurd or outside of `TRAINER_RANGES`."""
    for key, leaf in flattened(config.as_dict()).items():
        for value in leaf if isinstance(leaf, (list, tuple)) else [leaf]:
            if value == "" and key.endswith(("path", "dir")):
                raise UserError(f"{key} is empty: name a place, or leave it out.")
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if key in TRAINER_RANGES:
                try:
                    TRAINER_RANGES[key](value)
                except ValueError as error:
                    raise UserError(f"{key} {error}.") from None
            wrong = not abs(value) <= LARGEST  # NaN too
            if wrong and not (value > 0 and key.endswith(MAY_BE_INFINITE)):
                raise UserError(f"{key} is {value}: give a finite number, no larger than {LARGEST:g}.")


def settled_seed(seed: bool | int | None, *, resumes: bool = False, nodes: int = 1) -> int:
    """Return the number that `seed_everything` gives, or a picked one for null and true. Raises UserError."""
    if seed is False:
        raise UserError("seed_everything: every run has a seed; give a number, or null to have one picked.")
    picks = seed is None or seed is True
    given = os.environ.get("PL_GLOBAL_SEED") if picks else str(seed)  # where Lightning's ranks find that of rank 0
    if given is None:
        if resumes:
            raise UserError("--ckpt_path needs the seed of the run: give the --seed_everything of its config.yaml.")
        # torchrun and srun start the processes separately, and each would pick another seed
        if nodes > 1 or (os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or "1") != "1":
            raise UserError("seed_everything: processes started apart cannot agree on a seed; give a number.")
        given = str(secrets.randbelow(LARGEST_SEED + 1))
        log.info("seed_everything: picked %s, which a log folder records", given)
    elif not given.isdecimal() or int(given) > LARGEST_SEED:
        name = "PL_GLOBAL_SEED" if picks else "seed_everything"
        raise UserError(f"{name} must lie between 0 and {LARGEST_SEED}, not {given}.")
    # not of a rank that Lightning starts; a second run in one process finds the seed of the first
    elif picks and "LOCAL_RANK" not in os.environ:
        log.info("seed_everything: %s, from the environment variable PL_GLOBAL_SEED", given)
    return int(given)


def options_of(kind: type) -> dict[str, Any]:
    """Return the options of a class and their defaults, with those that it forwards to other classes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return dict(parser.get_defaults().as_dict())


set_up_parsing()  # at import, so that every reader of a configuration checks the ranges of numbers
