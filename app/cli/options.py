"""One sentence per mistake in a configuration, from the errors of jsonargparse and of the classes it builds."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, add_instantiator, get_loader, set_loader
from jsonargparse.typing import register_type
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.core.errors import UserError, first_line
from app.method.ranges import FromMinusOne, NonNegativeInt, PositiveFloat, PositiveInt, number_types
from callbacks.slots import BY_NAME

# options of Lightning's Trainer that it accepts at any value but later ignores or fails on
TRAINER_RANGES: dict[str, Any] = {
    "log_every_n_steps": PositiveInt,
    "check_val_every_n_epoch": PositiveInt,
    "val_check_interval": PositiveFloat,
    "min_epochs": NonNegativeInt,
    "min_steps": NonNegativeInt,
    "max_steps": FromMinusOne,
    "max_epochs": FromMinusOne,
    "num_sanity_val_steps": FromMinusOne,
}
MAY_BE_INFINITE = ("meta_init_above",)
LARGEST = 1e15  # limit for numbers, ours or Lightning's

WORDS = {
    "<class 'float'>": "a number",
    "<class 'int'>": "a whole number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
    "<class 'list'>": "a list",
    "<class 'dict'>": "a mapping, {name: value}",
}
# one alternative of a union in a jsonargparse error: a class without the given option
WITHOUT_THE_OPTION = re.compile(
    r"^    - Problem with given class_path '.+':\n +Option '.+' is not accepted\n", re.MULTILINE
)
# faults that jsonargparse says well
UNTOUCHED = re.compile(
    "has no attribute|No module named|^(File does not exist|Path is not|Problems parsing|Unable to load)"
)
BASES = {"optimizer": torch.optim.Optimizer, "lr_scheduler": torch.optim.lr_scheduler.LRScheduler}
refusals: list[Exception] = []  # of `built`: jsonargparse keeps only the text of errors from members of a union
STAGES = ("lightning_modules", "datamodules", "callbacks")
OWN_PACKAGES = ("app", *STAGES, "torch.optim")


def set_up_parsing() -> None:
    """Make jsonargparse refuse repeated keys, check the ranges of numbers, and name a class that fails."""
    for kind in number_types():
        register_type(
            kind, serializer=kind.base, deserializer=kind, type_check=lambda value, kind: kind.holds(value)
        )
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


def check_numbers(config: Namespace) -> None:
    """Raise UserError for a number that is NaN, infinite, absurdly large or outside of `TRAINER_RANGES`."""
    for key, value in numbers(config.as_dict()):
        name = key.removeprefix("trainer.")
        if key != name and name in TRAINER_RANGES:
            try:
                TRAINER_RANGES[name](value)
            except ValueError as error:
                raise UserError(f"{key} {error}.") from None
        wrong = not math.isfinite(value) or abs(value) > LARGEST
        if wrong and not (value > 0 and key.endswith(MAY_BE_INFINITE)):
            raise UserError(f"{key} is {value}: give a finite number, no larger than {LARGEST:g}.")


def numbers(config: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number in a configuration with the name of its option, such as `trainer.callbacks[2].alpha`."""
    if isinstance(config, (int, float)) and not isinstance(config, bool):
        yield key, config
    named = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for name, value in named:
        inner = f"{key}[{name}]" if isinstance(config, list) else key if name == "init_args" else f"{key}.{name}"
        yield from numbers(value, inner.removeprefix("."))


# --- the messages of jsonargparse --------------------------------------------------------------------------


class Finding(NamedTuple):
    """The first mistake in a jsonargparse error: its field, the class and the fault."""

    field: str
    class_path: str | None
    wrong: str


def sentence(message: str, command: str, known: list[str]) -> str:
    """Return a jsonargparse error `message` of a `command` as one sentence; `known` are options to suggest."""
    missing = re.match(r"the following arguments are required: (.*)", message)
    if missing:
        names = missing[1].replace(f"{command}.", "")
        return f"{names}: missing, and required ({message.replace(missing[1], names)}). {listed(command)}"
    unknown = re.match(r"[Uu]nrecogni[sz]ed arguments: (.*)", message)
    if unknown:
        word = unknown[1].split()[0].split("=")[0]
        name = word.strip("-")
        hint = suggestion(name, known, "--") if word.startswith("-") else ""
        if name in known:  # an argument without a default
            hint = f" Give {name} as a word without --, in its place among the others."
        return f"There is no option {unknown[1]}.{hint} {listed(command)}"
    found = finding(message)
    if found is None:
        text = " ".join(dict.fromkeys(line.strip(" -") for line in message.splitlines() if line.strip(" -")))
        if refused := re.match(r"\w+ '\w+' does not accept option '(.+)'", text):
            return f"There is no option {refused[1]}.{suggestion(refused[1], known)} {listed(command)}"
        return f"{text[:500].rstrip('.')}. {listed(command)}"
    text = found.wrong if found.wrong.endswith("?") else f"{found.wrong.rstrip('.')}."
    return f"{found.field}: {text} {listed(command, found)}"


def listed(command: str, found: Finding | None = None) -> str:
    """Return a sentence with the command that lists the valid options."""
    place = found.field.split(".")[0] if found else ""
    if found and found.class_path and place in ("model", "data", *BY_NAME):
        package, _, name = found.class_path.rpartition(".")
        # a class of another package is among the options of a stage
        inner = f".{found.field.split('.')[1]}" if package not in STAGES and "." in found.field else ""
        return f"See `beta-dpo {command} --{place}{inner}.help {name}`."
    return f"See `beta-dpo {command} --help`."


def finding(message: str) -> Finding | None:
    """Return the mistake in the first alternative that jsonargparse tried; None for a message of another form."""
    others = WITHOUT_THE_OPTION.sub("", message)
    if re.search(r"^    - Problem with given class_path", others, re.MULTILINE):
        message = others  # keep the class of the slot that has the option
    field: list[str] = []
    class_path, subtypes, wrong, depth = None, "", "", -1
    expected: list[str] = []
    value = ""
    for line in message.splitlines():
        text, indent = line.strip(" -"), len(line) - len(line.lstrip(" "))
        if called := re.match(r"Type typing\.Callable.* expects a function or a callable class: ?", text):
            text = text[called.end() :]
            named = re.search(r"class_path='([\w.]+)'", message[message.index(line) :])
            class_path = named[1] if named else class_path
        if (key := re.match(r'Parser key "(.+?)":?\s*(.*)', text)) and not (expected and indent <= depth):
            field.append(key[1].removeprefix("init_args."))
            expected, depth, text, subtypes, value = [], indent, key[2], "", ""
        elif indent < depth and (expected or wrong):
            break
        if given := re.search(r"(?:Got value|Given value): (.*?)(?:\. Got value.*)?$", text):
            value = given[1]
            text = text[: given.start()].rstrip(". ")
        if inner := re.match(r"Problem with given class_path '(.+)':", text):
            class_path, expected, depth = inner[1], [], indent
        elif text.startswith("Subtypes: "):
            subtypes = text
        elif unknown := re.match(r"Option '(.+)' is not accepted", text):
            field.append(unknown[1])
            owner = (class_path or "").rpartition(".")[2]
            wrong = f"{owner} has no such option.{suggestion(unknown[1], names_at(class_path or ''))}"
            break
        elif absent := re.match(r"the following arguments are required: (.*)", text):
            wrong = f"{(class_path or '').rpartition('.')[2]} needs a value for {absent[1]}"
            break
        elif UNTOUCHED.search(text):
            wrong = text
            break
        elif ranged := re.match(r"Not of type \w+: (.*)", text):
            expected.append(re.sub(r"^Expected | but got .*$", "", ranged[1]))
        elif named := re.search(r"Expected a dot import path string: ?(.*)$", text):
            value = value or named[1]
            expected.append("class")
        elif function := re.match(r"Expected '.+' to be a function that returns (.+?)\.?$", text):
            expected.append(f"a class, or a function annotated to return {function[1]}")
        elif other := re.search(r"Expected '(.+)' to be a subclass of|does not correspond to a subclass of", text):
            value = other[1] or value
            expected.append("class")
        elif abstract := re.match(r"Expected an instantiatable class, but (\S+) is abstract", text):
            subtypes = f"<class '{abstract[1]}'>"
            expected.append("class")
        elif wanted := re.match(r"Expected an? (?!path but)(.*)$", text):
            words = re.sub(r"^typing\.Literal\[(.*)\].*", r"one of \1", wanted[1])
            expected.append(WORDS.get(wanted[1].rstrip("."), words))
    if not field or not (wrong or expected):
        return None
    return Finding(".".join(field), class_path, wrong or unmet(field, expected, subtypes, value))


def unmet(field: list[str], expected: list[str], subtypes: str, value: str) -> str:
    """Return a text that says that `value` is none of the `expected` ones."""
    value = f"{value[:60]}…" if len(value) > 60 else value
    ranged = next((words for words in expected if words.startswith("must be")), None)
    if ranged is not None:
        return ranged.replace("must be", "must be null or", 1) if "null" in expected else ranged
    if "a number" in expected:  # the class is that of a tensor, which no user gives
        expected = [words for words in expected if words != "class"]
    if "class" not in expected:
        return f"expected {' or '.join(dict.fromkeys(expected))}, not {value!r}"
    named = re.search(r"<class '(\w+\.[\w.]+)'>", subtypes)
    base = class_at(named[1]) if named else BASES.get(field[-1])
    if base is None:
        others = [words for words in dict.fromkeys(expected) if words != "class"]
        return f"{value!r} is no class: give the path of one{''.join(f', or {words}' for words in others)}"
    if not inspect.isabstract(base) and hasattr(base, "__dataclass_fields__"):
        fields = ", ".join(options_of(base))
        return f"{value!r} are no settings of {base.__name__}: give a mapping, {{name: value}}, of {fields}"
    classes = subclasses(base)
    option = re.match(r"NestedArg\(key='(\w+)'|\{'(\w+)'", value)  # without the class that it belongs to
    name = (option[1] or option[2]) if option else value.lower().strip("'\"")
    near = [
        one
        for one, kind in classes.items()
        if name in (inspect.signature(kind).parameters if option else one.lower())
    ]
    wrong = f"{name} is an option of a class" if option else f"{value!r} names no class of {base.__name__}"
    if not classes:
        return f"{wrong}: give the path of one"
    first = (near or list(classes))[0]
    return f"{wrong}: name one, for example --{'.'.join(field)} {first}; there are {', '.join(classes)}"


def subclasses(base: type) -> dict[str, type]:
    """Return the subclasses in this project and torch.optim by their shortest names that a configuration takes."""
    found: set[type] = {base}
    for _ in range(4):
        found |= set().union(*(one.__subclasses__() for one in found))
    ours = [
        one
        for one in found
        if one.__module__.startswith(OWN_PACKAGES)
        and not inspect.isabstract(one)
        and not one.__name__.startswith("_")
    ]
    named = {
        f"torch.optim.{one.__name__}" if hasattr(torch.optim, one.__name__) else one.__name__: one
        for one in ours
        if one is not base or one.__module__.startswith(("app", "callbacks"))
    }
    return dict(sorted(named.items()))


def options_of(kind: type) -> dict[str, Any]:
    """Return the options of a class and their defaults, with those that it forwards to other classes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return dict(parser.get_defaults().as_dict())


def names_at(path: str) -> list[str]:
    """Return the names of the options of the class at an import path; none if there is no such class."""
    try:
        return list(options_of(class_at(path)))
    except (ImportError, AttributeError, ValueError):
        return []


def class_at(path: str) -> type:
    """Return the class at an import path."""
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def suggestion(word: str, known: list[str], dashes: str = "") -> str:
    """Return ` Did you mean …?` with the nearest known word, or an empty text."""
    near = get_close_matches(word, known, 1, 0.6)
    near = near or [one for one in known if one.startswith(word) or word.startswith(one)]
    return f" Did you mean {dashes}{near[0]}?" if near else ""
