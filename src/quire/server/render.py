"""A program of its own: renders chat templates for the server, which kills it when one takes too long or too much memory.

Templates come with checkpoints and are fed by clients. They run in jinja2's immutable sandbox, and that in a process that holds nothing: no
model, no keys, no environment. One JSON object a line in, `{"text"}` or `{"error"}` a line out. It imports nothing of Quire, so that it starts
in the time jinja2 takes. What templates may use is what transformers gives them.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "
MAX_CHARS = 2**24  # of what a template makes; no context is so long


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says, for training; here it is as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """What is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """A namespace without underscored names, which lead to Python's insides."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        names = dict(*args[1:], **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"no namespace may hold {name!r}")


class Dict:
    """`dict` as a function: the class itself would lead to Python's insides."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """As dict's."""
        return dict.fromkeys(*args, **kwargs)


def to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja2's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    """What templates call when a chat is not as they want it."""
    raise jinja2.exceptions.TemplateError(message)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """A template ready to render."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "dict": Dict(),
        "namespace": Namespace,
    }
    return environment.from_string(template)


def render(template: str, messages: list[dict[str, Any]], variables: dict[str, Any], continued: bool) -> str:
    """The text of a chat; with `continued` it ends within the last message's content, as if that were still being written."""
    final = messages[-1].get("content", "") if continued else ""
    if continued:
        if not isinstance(final, str) or not final:
            raise ValueError("the last message has no content to continue")
        messages[-1]["content"] = final + CONTINUED
    text = compiled(template).render(messages=messages, **variables)
    if not continued:
        return text
    at = text.rfind(CONTINUED.strip())
    if at < 0 or final.strip() not in text:
        raise ValueError("this model's chat template leaves the last message out, or changes it, so that it cannot be continued")
    # A template that strips messages has stripped the mark's space too: then the message's own was meant to go as well.
    return text[:at] if text.startswith(CONTINUED, at) else text[:at].rstrip()


def main() -> None:
    """Answer line by line until the server closes its end."""
    most = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for line in sys.stdin.buffer:
        try:
            text = render(**json.loads(line))
            answer = {"text": text} if len(text) <= MAX_CHARS else {"error": f"it makes more than {MAX_CHARS} characters of them"}
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except Exception as error:  # a template may raise anything
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
