"""`quire chat`: a conversation on the terminal. All of it is sent again with every message, which the cache makes cheap."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from quire.cli.door import FAILED, Stdout, complain, load
from quire.cli.keyboard import Stopped, half_a_line, line_editing, prompt, stoppable
from quire.cli.options import refuse_api_key, refuse_engine_options
from quire.cli.remote import Remote, is_url
from quire.cli.tables import table
from quire.cli.talkers import Here, Messages, Talker, There, Turn
from quire.config import EngineConfig
from quire.errors import ConfigError, EngineDeadError, InvalidRequestError, ModelError, QuireError, RequestFailedError
from quire.params import SamplingParams

NEARBY = "http://127.0.0.1:8000"  # where `quire serve` listens
LATE_S = 0.5  # a Ctrl-C this long after an answer's end was meant for the answer, and must not end the conversation
# What could move the cursor or do worse; a model may have been told to write it.
CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
NARROW = 56  # columns, below which the table of /stats does not fit
COMMANDS = {
    "/system TEXT": "what the model is told first; without TEXT nothing",
    "/save FILE": "write the conversation down, as a JSON list",
    "/stats": "what each answer took, and what was cached",
    "/clear": "forget the conversation, not the system message",
    "/help": "this",
    "/exit": "leave; so do Ctrl-D, and Ctrl-C on an empty line",
}
HELP = "Ctrl-C stops an answer, or drops a line that is being typed. A message that begins with a slash is written with two."


def chat(
    context: typer.Context,
    config: EngineConfig,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL or http://...", help="A local folder, a hub id, or a server's address.", show_default=NEARBY),
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="The server's.", envvar="QUIRE_API_KEY", show_default=False)] = None,
    name: Annotated[str | None, typer.Option(help="Which of the server's models.", show_default="the first")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.", show_default=False)] = None,
    history: Annotated[
        Path | None, typer.Option(help="Keep what is typed in this file, for the up arrow of the next time.", show_default="nothing is kept")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens of an answer.", show_default="what there is room for")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of most likely tokens that reaches this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.", show_default="from the system")] = None,
) -> None:
    """Talk with a model, loaded here or a server's.

    /help lists the commands. Where stdin is not a terminal each of its lines is a message, or a command.
    """
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    source = NEARBY if model is None else model
    if is_url(source):
        refuse_engine_options(config)
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        try:
            there = There(Remote(source, api_key), name, {name: value for name, value in given.items() if value is not None})
        except RequestFailedError as error:
            raise error if model is not None else RequestFailedError(f"{error}; name a model, or a server's address") from error
        _talk(Conversation(there, system), there.name or source, history)
        return
    refuse_api_key(context, "a server's address")
    if name is not None:
        raise ConfigError(f"name={name!r}: must be given with a server's address")
    shown = Path(source).name or source
    with load(source, config) as llm:
        _talk(Conversation(Here(llm, shown, params), system), shown, history)


def _talk(talk: Conversation, name: str, history: Path | None) -> None:
    if sys.stdin.isatty() and sys.stdout.isatty():
        talk.console.print(Text.assemble((name, "bold"), "; /help lists the commands"))
        with line_editing(history):
            _watched(talk)
        return
    for data in sys.stdin.buffer:
        try:
            line = data.decode().removeprefix("\ufeff")  # a file's mark of UTF-8 is no part of what it says
        except UnicodeDecodeError as error:
            complain(InvalidRequestError("stdin", data, f"lines of text in UTF-8 (byte {error.start} of this one is not)"))
            talk.num_failed += 1
            continue
        talk.take(line.rstrip("\r\n"), watched=False)
        if talk.ended:
            break
    if talk.num_failed:
        raise typer.Exit(FAILED)


def _watched(talk: Conversation) -> None:
    """Line after line as they are typed, until /exit, Ctrl-D, or a Ctrl-C that has nothing else to end."""
    shown = prompt(talk.console)
    while not talk.ended:
        typing = True
        try:
            line = input(shown)
            typing = False
            talk.take(line, watched=True)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not (typing and half_a_line()) and not talk.just_answered:
                return


class Conversation:
    """What has been said, and what can be done about it. `ended` is set by /exit."""

    def __init__(self, talker: Talker, system: str | None) -> None:
        self.console = Stdout()
        self.ended, self.num_failed = False, 0
        self._talker, self._system = talker, system
        self._said: Messages = []
        self._turns: list[Turn | None] = []
        self._answered_s: float | None = None

    def take(self, line: str, watched: bool) -> None:
        """A line as it was typed; `watched` where somebody sits there who may stop an answer, and sees what it took.

        Raises:
            ModelError, EngineDeadError: nobody can go on with this.
        """
        self._answered_s = None
        if line.startswith("/") and not line.startswith("//"):
            command, _, rest = line[1:].partition(" ")
            self._command(command, rest.strip())
        elif line.strip():
            self._answer(line.removeprefix("/") if line.startswith("//") else line, watched)
            self._answered_s = time.monotonic()

    @property
    def messages(self) -> Messages:
        """All, the system's first."""
        return [*([{"role": "system", "content": self._system}] if self._system else []), *self._said]

    @property
    def just_answered(self) -> bool:
        """Whether the last answer has ended only now."""
        return self._answered_s is not None and time.monotonic() - self._answered_s < LATE_S

    def _answer(self, text: str, watched: bool) -> None:
        self._said.append({"role": "user", "content": text})
        parts, stopped = list[str](), False
        try:
            with stoppable() if watched else contextlib.nullcontext(), contextlib.closing(self._talker.answer(self.messages)) as pieces:
                for piece in pieces:
                    parts.append(piece)
                    self.console.out(piece.translate(CONTROL) if self.console.is_terminal else piece, end="", highlight=False)
        except Stopped:
            stopped = True
        except (ModelError, EngineDeadError):
            raise
        except QuireError as error:
            self.num_failed += 1
            self._end_line(parts)
            complain(error)
            self._said.pop()  # as if it had not been said: the next message is no answer to it
            return
        self._end_line(parts)
        if stopped and not parts:
            self._said.pop()
            self._note("stopped; nothing was said")
            return
        self._said.append({"role": "assistant", "content": "".join(parts)})  # where it was stopped, what there is of it
        self._turns.append(self._talker.turn)
        if watched:
            self._note(("stopped; " if stopped else "") + _told(self._talker.turn))

    def _end_line(self, parts: list[str]) -> None:
        if not parts or not parts[-1].endswith("\n"):
            self.console.out("", highlight=False)

    def _command(self, command: str, rest: str) -> None:
        match command:
            case "exit" | "quit":
                self.ended = True
            case "help":
                self._help()
            case "system":
                self._system = rest or None
                self._note("told from now on" if rest else "told nothing from now on")
            case "clear":
                self._said, self._turns = [], []
                self._note("forgotten")
            case "save":
                self._save(rest)
            case "stats":
                self._stats()
            case _:
                complain(f"there is no /{command}; /help lists the commands")

    def _help(self) -> None:
        told = Table.grid(padding=(0, 2))
        told.add_column(no_wrap=True)
        for command, meaning in COMMANDS.items():
            told.add_row(command, meaning)
        self.console.print(told, style="dim")
        self._note(HELP)

    def _save(self, name: str) -> None:
        if not name:
            complain(InvalidRequestError("save", name, "followed by a file's name"))
            return
        try:
            Path(name).expanduser().write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", "utf-8", "replace")
        except OSError as error:
            complain(InvalidRequestError("save", name, f"a file that can be written ({error.strerror})"))
            return
        self._note(f"{len(self.messages)} messages in {name}")

    def _stats(self) -> None:
        known = [turn for turn in self._turns if turn is not None]
        if self.console.width < NARROW:
            for i, turn in enumerate(self._turns, 1):
                self._note(f"{i}: {_told(turn)}")
        elif known:
            made = table("answer", "prompt\ntokens", "from\ncache", "new\ntokens", "first\ntoken", "tokens\nper s")
            for i, turn in enumerate(self._turns, 1):
                made.add_row(str(i), *(_cells(turn) if turn is not None else ["-"] * 5))
            self.console.print(made)
        prompt, cached = sum(turn.prompt_tokens for turn in known), sum(turn.cached_tokens for turn in known)
        answers = f"{len(self._turns)} answer{'s' if len(self._turns) != 1 else ''}"
        self._note(f"{answers}, {cached} of {prompt} prompt tokens cached, {sum(turn.new_tokens for turn in known)} new tokens")

    def _note(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))


def _told(turn: Turn | None) -> str:
    if turn is None:
        return "what it took is not known"
    return f"{turn.new_tokens} tokens, {turn.cached_tokens} of {turn.prompt_tokens} prompt tokens cached, first after {turn.first_s:.2f} s"


def _cells(turn: Turn) -> list[str]:
    speed = f"{(turn.new_tokens - 1) / turn.rest_s:.0f}" if turn.new_tokens > 1 and turn.rest_s > 0 else "-"
    return [str(turn.prompt_tokens), str(turn.cached_tokens), str(turn.new_tokens), f"{turn.first_s * 1000:.0f} ms", speed]
