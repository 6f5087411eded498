"""One sentence per mistake in a configuration, from the messages of jsonargparse."""

from __future__ import annotations

import inspect
import os
import re
import sys
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import NamedTuple

import torch

from app.cli.options import names_at, options_of, suggestion
from app.core.files import shipped_names
from callbacks.slots import BY_NAME

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
STAGES = ("lightning_modules", "datamodules", "callbacks")
OWN_PACKAGES = ("app", *STAGES, "torch.optim")


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
            if owner in ("LightningModule", "LightningDataModule"):
                wrong = "its class is not known yet: give the configuration that names it before this one"
            break
        elif absent := re.match(r"the following arguments are required: (.*)", text):
            wrong = f"{(class_path or '').rpartition('.')[2]} needs a value for {absent[1]}"
            break
        elif UNTOUCHED.search(text):
            text = text.rstrip(".")
            wrong, class_path = f"{text}{cure(text)}", None  # there is no such class to list
            break
        elif ranged := re.match(r"Not of type \w+: (.*)", text):
            expected.append(re.sub(r"^Expected | but got .*$", "", ranged[1]))
        elif named := re.search(r"Expected a dot import path string: ?(.*)$", text):
            value = value or named[1]
            expected.append("class")
        elif text.startswith("Unexpected import path format: "):  # of a number or a list
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


def cure(fault: str) -> str:
    """Return what may mend one of the UNTOUCHED faults, to follow it, or an empty text."""
    near = ""
    if file := re.match(r"File does not exist: '(.+)'", fault):
        given = os.path.relpath(file[1]).removeprefix("configs/").removesuffix(".yaml")
        near = suggestion(given, shipped_names())
    elif name := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", fault):
        there = [one for one in dir(sys.modules.get(name[1])) if not one.startswith("_")]
        near = suggestion(name[2], there, f"{name[1]}.")
    elif "No module named" in fault:
        return ": the folder of a file of your own must be on the path, PYTHONPATH=. for the current one"
    return f".{near}" if near else ""


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
    base = resolve_name(named[1]) if named else BASES.get(field[-1])
    if base is None:
        others = [words for words in dict.fromkeys(expected) if words != "class"]
        return f"{value!r} is no class: give the path of one{''.join(f', or {words}' for words in others)}"
    slot = BY_NAME.get(".".join(field))
    is_name = re.fullmatch("[A-Za-z]\\w*", value.strip("'\""))
    if not (slot and is_name) and not inspect.isabstract(base) and hasattr(base, "__dataclass_fields__"):
        fields = ", ".join(options_of(base))
        return f"{value!r} are no settings of {base.__name__}: give a mapping, {{name: value}}, of {fields}"
    classes = subclasses(base) if slot is None else {kind.__name__: kind for kind in slot.kinds}
    null = ", or null" if "null" in expected else ""
    option = re.match(r"NestedArg\(key='(\w+)'|\{'(\w+)'", value)  # without the class that it belongs to
    name = (option[1] or option[2]) if option else value.lower().strip("'\"")
    near = [
        one
        for one, kind in classes.items()
        if name in (inspect.signature(kind).parameters if option else one.lower())
    ]
    short = {one.rpartition(".")[2].lower(): one for one in classes}
    near = near or [short[one] for one in get_close_matches(name.rpartition(".")[2], short, 1, 0.6)]
    wrong = f"{name} is an option of a class" if option else f"{value!r} names no class of {base.__name__}"
    if not classes:
        return f"{wrong}: give the path of one"
    first = (near or list(classes))[0]
    return f"{wrong}: name one, for example --{'.'.join(field)} {first}; there are {', '.join(classes)}{null}"


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
