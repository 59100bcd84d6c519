"""`nexus run -i`: ask, answer, ask again, with what was said before in the context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext.cli import accounting
from nexus_ext.errors import NexusError, UsageError

if TYPE_CHECKING:
    from nexus_ext.cli.live import Live
    from nexus_ext.cli.output import Output
    from nexus_ext.cli.sampling import SamplingOptions
    from nexus_ext.cli.session import Answer, Session

HELP = """/clear   forget what was said
/stats   show what the last answer cost
/exit    leave (also /bye, Ctrl-D)
Ctrl-C   end the answer"""


class Conversation:
    """What was said: messages for a model with a template, plain tokens for one without."""

    def __init__(self, session: Session, system: str | None, with_template: bool) -> None:
        self._session = session
        self._system = system
        self._with_template = with_template
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system's text."""
        self._messages = [{"role": "system", "content": self._system}] if self._system else []
        self._history: list[int] = []

    def prompt(self, text: str) -> tuple[list[int], list[str]]:
        """Return the tokens that ask `text` after all that was said, and the template's stops."""
        if self._with_template:
            return self._session.chat([*self._messages, {"role": "user", "content": text}])
        if self._history:
            tokens = self._session.llm.tokenize(f"\n{text}".encode(), add_bos=False, special=True)
            return [*self._history, *tokens], []
        return self._session.complete(f"{self._system}\n\n{text}" if self._system else text), []

    def keep(self, text: str, prompt: list[int], answer: Answer) -> None:
        """Remember what was asked and answered."""
        self._messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": answer.text},
        ]
        self._history = [*prompt, *answer.tokens]


def chat(
    session: Session,
    choosing: SamplingOptions,
    system: str | None,
    with_template: bool,
    first: str | None,
    output: Output,
    live: Live,
) -> int:
    """Chat until /exit, /bye, Ctrl-D or the end of stdin. Returns the exit status."""
    from nexus_ext.cli.run import answer_live

    grammar = choosing.grammar(session)
    conversation = Conversation(session, system, with_template)
    if not with_template:
        output.note("The model has no chat template: what you type is continued as plain text.")
    output.note("/help lists what can be said besides; Ctrl-D leaves.")
    last: Answer | None = None
    turn = 0
    while True:
        text, first = (first, None) if first is not None else (_ask(output), None)
        if text is None or text.strip() in ("/exit", "/bye"):
            return 0
        if text.strip().startswith("/"):
            last = _command(text.strip(), conversation, last, output)
            continue
        if not text.strip():
            continue
        try:
            tokens, stops = conversation.prompt(text)
            answer = answer_live(session, choosing, tokens, stops, live, grammar, seed_offset=turn)
        except NexusError as error:
            # The model is still there: a failed read or a full context ends one answer only.
            live.end_line()
            output.error(error)
            if last is not None and isinstance(error, UsageError):
                output.note("What was said before counts as well: /clear forgets it.")
            continue
        live.text("\n")
        conversation.keep(text, tokens, answer)
        last, turn = answer, turn + 1


def _ask(output: Output) -> str | None:
    """Return the next line, None at the end. Ctrl-C takes back what was typed."""
    while True:
        try:
            return output.ask("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            output.line()


def _command(
    name: str, conversation: Conversation, last: Answer | None, output: Output
) -> Answer | None:
    """Do what a line that begins with "/" asks for; return the answer that /stats speaks of."""
    if name == "/clear":
        conversation.clear()
        output.note("Forgotten.")
    elif name == "/stats":
        output.note(accounting.line(last) if last is not None else "No answer yet.")
    elif name == "/help":
        output.note(HELP)
    else:
        output.note(f"There is no {name}.\n{HELP}")
    return last
