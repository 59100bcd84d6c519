"""The options that choose tokens, under llama.cpp's names, and the grammars that constrain them."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import click

from nexus_ext.cli.options import Finite, Function
from nexus_ext.cli.session import Sampling
from nexus_ext.errors import UsageError

if TYPE_CHECKING:
    from nexus_ext.cli.session import Session


# Names that stores have for our options.
_STORED: Final = {
    "temperature": "temp",
    "mirostat": "mirostat_mode",
    "num_predict": "n_predict",
    "stop": "stops",
}


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen, and when an answer ends."""

    sampling: Sampling
    seed: int
    repeat_last_n: int
    n_predict: int
    stops: tuple[str, ...]
    grammar_file: str | None
    json_schema: str | None
    json_schema_file: str | None
    given: frozenset[str] = frozenset()  # which options the command line has

    def with_parameters(self, parameters: Mapping[str, object]) -> SamplingOptions:
        """Return options in which a stored model's parameters stand for what was not given."""
        mine = {_STORED.get(name, name): value for name, value in parameters.items()}
        left = {name: value for name, value in mine.items() if name not in self.given}
        sampling: Any = {name: left[name] for name in Sampling.__slots__ if name in left}
        others: Any = {name: left[name] for name in ("repeat_last_n", "n_predict") if name in left}
        if "seed" in left and isinstance(seed := left["seed"], int) and seed >= 0:
            others["seed"] = seed % 2**32
        if "stops" in left and isinstance(stops := left["stops"], list):
            others["stops"] = tuple(stops)
        return replace(self, sampling=replace(self.sampling, **sampling), **others)

    def grammar(self, session: Session) -> Any:
        """Return the grammar that was asked for, if one was."""
        given = [self.grammar_file, self.json_schema, self.json_schema_file]
        if sum(value is not None for value in given) > 1:
            raise UsageError(
                "more than one grammar is given",
                hint="use one of --grammar-file, --json-schema and --json-schema-file",
            )
        if self.grammar_file is not None:
            return session.grammar(read(self.grammar_file), self.grammar_file)
        if self.json_schema_file is not None:
            return session.schema_grammar(read(self.json_schema_file))
        return None if self.json_schema is None else session.schema_grammar(self.json_schema)


def _number(name: str, field: str, help_text: str, *others: str, least: float = 0.0) -> Any:
    default = getattr(Sampling(), field)
    kind = click.IntRange if isinstance(default, int) else Finite
    return click.option(
        name,
        *others,
        field,
        type=kind(min=type(default)(least)),
        default=default,
        metavar="N",
        help=f"{help_text}  [default: {default}]",
    )


_OPTIONS: Final = (
    click.option(
        "-n",
        "--predict",
        "--n-predict",
        "n_predict",
        type=click.IntRange(min=-1),
        default=-1,
        metavar="N",
        help="Tokens to generate at most; -1: until the model ends or the context is full.",
    ),
    click.option(
        "-s",
        "--seed",
        type=click.IntRange(-1, 2**32 - 1),
        default=-1,
        metavar="N",
        help="Seed of the choice; -1: another one each time.  [default: -1]",
    ),
    _number("--temp", "temp", "Temperature; 0: always the likeliest token."),
    _number("--top-k", "top_k", "Choose among the K likeliest; 0: all."),
    _number("--top-p", "top_p", "Choose among the likeliest that sum to P; 1: all."),
    _number("--min-p", "min_p", "Leave out what is less likely than P times the likeliest."),
    _number("--typical", "typical_p", "Locally typical sampling; 1: off.", "--typical-p"),
    _number("--repeat-penalty", "repeat_penalty", "Penalty for repetition; 1: none."),
    _number("--presence-penalty", "presence_penalty", "Penalty for having occurred.", least=-2.0),
    _number("--frequency-penalty", "frequency_penalty", "Penalty for each occurrence.", least=-2.0),
    click.option(
        "--repeat-last-n",
        "repeat_last_n",
        type=click.IntRange(min=0),
        default=64,
        metavar="N",
        help="Tokens that penalties look back.  [default: 64]",
    ),
    _number("--mirostat", "mirostat_mode", "Mirostat 1 or 2 instead of top-k and top-p; 0: off."),
    _number("--mirostat-ent", "mirostat_tau", "Mirostat's target entropy.", "--mirostat-tau"),
    _number("--mirostat-lr", "mirostat_eta", "Mirostat's learning rate.", "--mirostat-eta"),
    click.option(
        "--stop",
        "-r",
        "--reverse-prompt",
        "stops",
        multiple=True,
        metavar="TEXT",
        help="End before this text. Can be repeated.",
    ),
    click.option("--grammar-file", metavar="FILE", help="Constrain the answer to a GBNF grammar."),
    click.option(
        "-j", "--json-schema", metavar="JSON", help="Constrain the answer to a JSON schema."
    ),
    click.option(
        "-jf", "--json-schema-file", metavar="FILE", help="The same, with the schema in a file."
    ),
)


def sampling_options(function: Function) -> Function:
    """Add the options about choosing tokens; the command gets `SamplingOptions` as `choosing`."""

    @functools.wraps(function)
    def command(*args: Any, seed: int, **kwargs: Any) -> Any:
        sampling = Sampling(**{name: kwargs.pop(name) for name in Sampling.__slots__})
        if sampling.mirostat_mode > 2:
            raise UsageError(f"--mirostat is {sampling.mirostat_mode}, not 0, 1 or 2")
        names = [n for n in SamplingOptions.__slots__ if n not in ("sampling", "seed", "given")]
        context = click.get_current_context()
        default = click.core.ParameterSource.DEFAULT
        given = {n for n in context.params if context.get_parameter_source(n) is not default}
        choosing = SamplingOptions(
            sampling=sampling,
            seed=secrets.randbits(32) if seed < 0 else seed,
            given=frozenset(given),
            **{name: kwargs.pop(name) for name in names},
        )
        return function(*args, choosing=choosing, **kwargs)

    wrapped: Any = command
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[no-any-return]


def read(path: str) -> str:
    """Return the text of a file that the user has named."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path!r} cannot be read: {error}", hint="name a text file") from error
