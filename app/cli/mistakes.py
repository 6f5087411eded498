"""One sentence for a user's mistake, from the exceptions of libraries and the messages of jsonargparse."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, wraps
from inspect import signature
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from app.cli import options
from app.cli.options import options_of
from app.core.errors import UserError, suggestion
from app.core.files import shipped_names
from app.method.ranges import Number, refuse
from callbacks import BY_NAME

F = TypeVar("F", bound=Callable[..., Any])
# errors of the disk → the sentence for them, with the file and the system's reason
DISK = {
    "ENOSPC EDQUOT EFBIG": "{0} could not be written, there is no space left: free some, or write to another disk.",
    "EACCES EPERM EROFS": "{0} may not be read or written ({1}): choose another place or other permissions.",
    "ENOENT ENOTDIR EISDIR EEXIST": "{0}: {1}; check the paths that you gave.",
}
PARTS = {"datamodules": "data", "lightning_modules": "model", "callbacks": "a callback"}
# library code that raises errors about a user's options → the part of the configuration with these options
CONFIGURED = {
    "lightning/pytorch/callbacks/": "trainer.callbacks",
    "lightning/pytorch/loggers/": "trainer.logger",
    "lightning/pytorch/profilers/": "trainer.profiler",
    "torch/optim/lr_scheduler.py": "model.lr_scheduler",
}
TRACE = " (BETA_DPO_TRACEBACK=1 shows the traceback.)"


def plain_sentence(error: BaseException) -> str | None:
    """Return the user's mistake that caused `error` and its cure; None if a traceback helps more."""
    text = str(error)
    if "loading state_dict" in text or "loaded state dict" in text:
        return "--ckpt_path: the checkpoint is of another model or optimizer than the configuration names."
    if "find_unused_parameters=True" in text:
        return "trainer.strategy: some weights get no gradient: take ddp_find_unused_parameters_true."
    for cause in causes(error):
        if isinstance(cause, UserError):  # raised while jsonargparse built an object, and wrapped by it
            return str(cause)
        if isinstance(cause, MisconfigurationException):
            return f"trainer: {options.reason(cause)}"
        if isinstance(cause, ModuleNotFoundError):
            return f"A package is missing, install it first: {options.reason(cause)}"
        for names, told in DISK.items():
            if isinstance(cause, OSError) and errno.errorcode.get(cause.errno or 0) in names.split():
                return told.format(cause.filename or "A file", cause.strerror)
    frames = traceback.extract_tb(error.__traceback__)
    if frames and isinstance(error, (ValueError, TypeError, RuntimeError)):
        for place, part in CONFIGURED.items():
            if place in frames[-1].filename and (frames[-1].line or "").startswith("raise"):  # on purpose
                return f"{part}: {options.reason(error)}{TRACE}"
    return None


@contextmanager
def refusing(doing: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn an exception in the block into a UserError, unless it has a `plain_sentence` or `unless()` is true."""
    options.refusals.clear()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if unless() or plain_sentence(error) is not None:
            raise
        if options.refusals:
            raise options.refusals[-1] from error
        raise UserError(f"{doing} failed in {part_of(error)}: {options.reason(error)}{TRACE}") from error


def part_of(error: BaseException) -> str:
    """Return the part of the configuration that an exception came from, by the innermost frame in our packages."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for package, part in PARTS.items():
            if f"/{package}/" in frame.filename and "site-packages" not in frame.filename:
                return part
    return "the Trainer"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error`, its cause, the cause of that, and so on."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def checked_command(function: F) -> F:
    """Return the command with the checks of the command line, for calls from Python, which may give a `Path`."""
    parameters, hints = signature(function), cache(lambda: get_type_hints(function))

    @wraps(function)
    def checking(*words: Any, **options: Any) -> Any:
        given = parameters.bind(*words, **options)
        for name, value in given.arguments.items():
            value = [_as_text(one) for one in value] if isinstance(value, list) else _as_text(value)
            try:
                refuse(name, hints()[name], value)
            except ValueError as error:
                raise UserError(f"{error}.") from None
            if value == "" or value == [""]:
                raise UserError(f"{name} is empty: give a value.")
            if not _fits(hints()[name], value):
                wanted = parameters.parameters[name].annotation
                raise UserError(f"{name} must be {wanted}, not {value!r:.60}.")
            given.arguments[name] = value
        return function(*given.args, **given.kwargs)

    return checking  # type: ignore[return-value]


def _as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _fits(hint: Any, value: Any) -> bool:
    """Return whether a value has the type of an annotation; `refuse` has looked at numbers and words."""
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(part, value) for part in parts)
    if kind is list:
        return isinstance(value, list) and all(_fits(parts[0], one) for one in value)
    if kind is Literal:
        return value in parts
    return isinstance(value, (int, float) if issubclass(kind, Number) else kind)


# --- messages of jsonargparse ----------------------------------------------------------------------------------

# line of a message → what it expects, in words; the first row that matches counts
EXPECTED = (
    (r"Not of type \w+: (?:Expected )?(.*?)(?: but got .*)?", r"\1"),
    (r"Expected '.+' to be a function that returns (.+?)\.?", r"a class, or a function annotated to return \1"),
    (r".*(import path|instantiatable class|a subclass of).*", "class"),
    (r"Expected an? typing\.Literal\[(.*)\].*", r"one of \1"),
    (r"Expected a <class 'float'>", "a number"),
    (r"Expected a <class 'int'>", "a whole number"),
    (r"Expected a <class 'bool'>", "true or false"),
    (r"Expected a <class 'str'>", "text"),
    (r"Expected a <class 'NoneType'>", "null"),
    (r"Expected a <class 'list'>", "a list"),
    (r"Expected a <class 'dict'>", "a mapping, {name: value}"),
    (r"Expected an? (?!path but)(.*)", r"\1"),
)
VALUE = re.compile(r"\.?(?:Got value|Given value|Expected a dot import path string): ?(.*?)(?:\. Got value.*)?$")
# one alternative of a union in a message: a class without the given option
WITHOUT_THE_OPTION = re.compile(r"(?m)^    - Problem with given class_path '.+':\n +Option '.+' is not accepted\n")
# faults that jsonargparse says well
UNTOUCHED = re.compile("has no attribute|No module named|^(File does not|Path is not|Problems parsing|Unable to)")
BASES = {"optimizer": torch.optim.Optimizer, "lr_scheduler": torch.optim.lr_scheduler.LRScheduler}
STAGES = ("lightning_modules", "datamodules", "callbacks")
OWN_PACKAGES = ("app", *STAGES, "torch.optim")


def sentence(message: str, command: str, known: list[str]) -> str:
    """Return a jsonargparse error `message` of a `command` as one sentence; `known` are options to suggest."""
    listed = f"See `beta-dpo {command} --help`."
    if missing := re.match(r"the following arguments are required: (.*)", message):
        names = re.sub(rf"\b(fit|{command})\.", "", missing[1])  # `show` and `plan` take the options of `fit`
        return f"{names}: missing, and required ({message.replace(missing[1], names)}). {listed}"
    if bare := re.match(r"argument (--\S+): expected one argument", message):
        return f"{bare[1]} needs a value after it, such as true or a number. {listed}"
    if unknown := re.match(r"[Uu]nrecogni[sz]ed arguments: (.*)", message):
        word = unknown[1].split()[0].split("=")[0]
        name = word.strip("-")
        hint = suggestion(name, known, "--") if word.startswith("-") else ""
        if name in known:  # an argument without a default
            hint = f" Give {name} as a word without --, in its place among the others."
        return f"There is no option {unknown[1]}.{hint} {listed}"
    found = finding(message)
    if found is None:
        text = " ".join(dict.fromkeys(line.strip(" -") for line in message.splitlines() if line.strip(" -")))
        if refused := re.match(r"\w+ '\w+' does not accept option '(.+)'", text):
            return f"There is no option {refused[1]}.{suggestion(refused[1], known)} {listed}"
        return f"{text[:500].rstrip('.')}. {listed}"
    field, class_path, wrong = found
    place, _, inner = field.partition(".")
    package, _, name = class_path.rpartition(".")
    if name and place in ("model", "data", *BY_NAME):
        # a class of another package is among the options of a stage
        within = f".{inner.split('.')[0]}" if package not in STAGES and inner else ""
        listed = f"See `beta-dpo {command} --{place}{within}.help {name}`."
    return f"{field}: {wrong.rstrip('.')}{'' if wrong.endswith('?') else '.'} {listed}"


def finding(message: str) -> tuple[str, str, str] | None:
    """Return field, class path (empty if no class helps) and fault of a message; None for one of another form."""
    others = WITHOUT_THE_OPTION.sub("", message)
    if re.search(r"^    - Problem with given class_path", others, re.MULTILINE):
        message = others  # keep the class of the slot that has the option
    field: list[str] = []
    expected: list[str] = []
    class_path, wrong, subtypes, value, depth = "", "", "", "", -1
    for line in message.splitlines():
        text, indent = line.strip(" -"), len(line) - len(line.lstrip(" "))
        if expected and indent < depth:
            break  # the next alternative
        if called := re.match(r"Type typing\.Callable.* expects a function or a callable class: ?", text):
            text = text[called.end() :]
            named = re.search(r"class_path='([\w.]+)'", message[message.index(line) :])
            class_path = named[1] if named else class_path
        if (key := re.match(r'Parser key "(.+?)":?\s*(.*)', text)) and not (expected and indent == depth):
            field.append(key[1].removeprefix("init_args."))
            expected, depth, text, subtypes, value = [], indent, key[2], "", ""
        if given := VALUE.search(text):
            value = given[1] or value
            text = text if "import" in text else text[: given.start()].rstrip(". ")
        if of_another := re.search(r"Expected '(.+)' to be a subclass of", text):
            value = of_another[1]
        name = class_path.rpartition(".")[2]
        if inner := re.match(r"Problem with given class_path '(.+)':", text):
            class_path, expected, depth = inner[1], [], indent
        elif text.startswith("Subtypes: "):
            subtypes = text
        elif unknown := re.match(r"Option '(.+)' is not accepted", text):
            field.append(unknown[1])
            wrong = f"{name} has no such option.{suggestion(unknown[1], options_at(class_path))}"
            if name in ("LightningModule", "LightningDataModule"):
                wrong = "its class is not known yet: give the configuration that names it before this one"
        elif absent := re.match(r"the following arguments are required: (.*)", text):
            wrong = f"{name} needs a value for {absent[1]}"
        elif UNTOUCHED.search(text):
            wrong, class_path = f"{text.rstrip('.')}{cure(text)}", ""  # there is no such class to list
        else:
            matches = ((re.fullmatch(pattern, text), words) for pattern, words in EXPECTED)
            expected += [match.expand(words) for match, words in matches if match][:1]
        if wrong:
            break
    if not field or not (wrong or expected):
        return None
    name = ".".join(field)
    return name, class_path, wrong or unmet(name, list(dict.fromkeys(expected)), subtypes, value)


def options_at(path: str) -> list[str]:
    """Return the options of the class at an import path; none if there is no such class."""
    try:
        return list(options_of(resolve_name(path)))
    except (ImportError, AttributeError, ValueError):
        return []


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


def unmet(field: str, expected: list[str], subtypes: str, value: str) -> str:
    """Return a text that says that `value` is none of the `expected` ones."""
    value = f"{value[:60]}…" if len(value) > 60 else value
    if ranged := next((words for words in expected if words.startswith("must be")), ""):
        return ranged.replace("must be", "must be null or", 1) if "null" in expected else ranged
    others = [words for words in expected if words != "class"]
    if "class" not in expected or "a number" in expected:  # the class is that of a tensor, which no user gives
        return f"expected {' or '.join(others)}, not {value!r}"
    named = re.search(r"<class '(\w+\.[\w.]+)'>", subtypes)
    base = resolve_name(named[1]) if named else BASES.get(field.rpartition(".")[2])
    if base is None:
        return f"{value!r} is no class: give the path of one{''.join(f', or {words}' for words in others)}"
    slot = BY_NAME.get(field)
    is_name = re.fullmatch("[A-Za-z]\\w*", value.strip("'\""))
    if not (slot and is_name) and not inspect.isabstract(base) and hasattr(base, "__dataclass_fields__"):
        fields = ", ".join(options_of(base))
        return f"{value!r} are no settings of {base.__name__}: give a mapping, {{name: value}}, of {fields}"
    classes = subclasses(base) if slot is None else {kind.__name__: kind for kind in slot.kinds}
    option = re.match(r"NestedArg\(key='(\w+)'|\{'(\w+)'", value)  # without the class that it belongs to
    name = (option[1] or option[2]) if option else value.lower().strip("'\"")
    of = base.__name__ if slot is None else "this slot"
    wrong = f"{name} is an option of a class" if option else f"{value!r} names no class of {of}"
    if not classes:
        return f"{wrong}: give the path of one"
    if option:
        near = [one for one, kind in classes.items() if name in signature(kind).parameters]
    else:
        short = {one.rpartition(".")[2].lower(): one for one in classes}
        near = [one for one in classes if name in one.lower()]
        near += [short[one] for one in get_close_matches(name.rpartition(".")[2], short, 1, 0.6)]
    null = ", or null" if "null" in expected else ""
    first = [*near, *classes][0]
    return f"{wrong}: name one, for example --{field} {first}; there are {', '.join(classes)}{null}"


def subclasses(base: type) -> dict[str, type]:
    """Return `base` and its subclasses in this project and torch.optim, by the shortest name that a file takes."""
    found, named = [base], {}
    for kind in found:  # which grows
        found += kind.__subclasses__()
        name = kind.__name__
        ours = OWN_PACKAGES if kind is not base else ("app", "callbacks")
        if kind.__module__.startswith(ours) and not inspect.isabstract(kind) and not name.startswith("_"):
            named[f"torch.optim.{name}" if hasattr(torch.optim, name) else name] = kind
    return dict(sorted(named.items()))
