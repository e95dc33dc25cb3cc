"""The fields that all ways of asking for tokens have in common. JSON is taken as it is: no number out of a string, no field that is not known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from quire.server.limits import (
    MAX_ALLOWED_IDS,
    MAX_BIAS_ENTRIES,
    MAX_LABEL_CHARS,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    check_shape,
    check_size,
)
from quire.structured import MAX_CHOICES, MAX_REGEX_CHARACTERS, MAX_STRUCTURED_CHARACTERS

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:  # Python's parser takes them, and 1e999: in a prompt or an answer they would be no JSON
        raise ValueError("must have no number that is not finite") from None
    return value


AnyObject = Annotated[dict[str, Any], AfterValidator(_finite)]  # that is written out again


class Asked(BaseModel):
    """A body."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, data: Any) -> Any:
        return check_shape(data)


class Part(Asked):
    """An object inside a body, whose depth has been checked with it."""

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, data: Any) -> Any:
        return data


class SentBack(Part):
    """A part of an answer that may come back as clients keep it: what it does not have they write as null, under names that may be their own."""

    @model_validator(mode="before")
    @classmethod
    def _shape(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None or name in cls.model_fields} if isinstance(data, dict) else data


class StreamOptions(Part):
    """What a stream carries beside text."""

    include_usage: bool = Field(default=False, description="A last event with the usage of the whole request.")
    include_obfuscation: Literal[False] | None = Field(default=None, description="Nothing is padded.")


Grammar = Annotated[str, Field(min_length=1, max_length=MAX_STRUCTURED_CHARACTERS)]
Schema = dict[str, Any] | bool | Grammar


class NamedSchema(Part):
    """A JSON schema as OpenAI wraps it. It is kept to in any case, so `strict` changes nothing."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="Any JSON object where not given.")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Part):
    """OpenAI's way to say it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = Field(default=None, description="With the type json_schema, and only with it.")


class StructuredOutputs(Part):
    """The form of the text: exactly one of these."""

    json_: Schema | None = Field(default=None, alias="json", description="A JSON schema.")
    json_object: bool | None = Field(default=None, description="Any JSON object.")
    regex: Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARACTERS)] | None = Field(default=None, description="The whole text matches it.")
    choice: Annotated[list[Grammar], Field(min_length=1, max_length=MAX_CHOICES)] | None = Field(default=None, description="The text is one of them.")
    grammar: Grammar | None = Field(default=None, description="A Lark grammar, as llguidance reads it.")


class Sampling(Asked):
    """How tokens are drawn, as OpenAI names it; what OpenAI does not have is marked."""

    model: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = Field(default=None, description="The served model's name; it may be left out.")
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE, description="0 takes the most likely token; 1 where not given.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=MAX_N, description="Choices for each prompt, which is computed once.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, description="The same seed gives the same tokens, in any company.")
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(check_size(MAX_BIAS_ENTRIES))] = Field(
        default=None, description="Token id to what is added to its logit, -100 to 100."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="With stream: true, and only with it.")
    user: Label | None = Field(default=None, description="A label. Nothing depends on it.")

    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="Extension. 0 or -1 keeps all.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Extension.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=1e6, description="Extension.")
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31, description="Extension.")
    ignore_eos: bool | None = Field(default=None, description="Extension.")
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=MAX_STOP_IDS, description="Extension.")
    include_stop_str_in_output: bool | None = Field(default=None, description="Extension.")
    skip_special_tokens: bool | None = Field(default=None, description="Extension.")
    allowed_token_ids: list[TokenId] | None = Field(default=None, min_length=1, max_length=MAX_ALLOWED_IDS, description="Extension.")
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Extension. Of the prompt's tokens; not in a stream.")
    return_token_ids: bool | None = Field(default=None, description="Extension. Ids of prompt and choices in the answer.")
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31, description="Extension. Higher goes first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARS)] | None = Field(
        default=None, description="Extension. Cached pages are shared among this key's requests with the same salt alone."
    )
    structured_outputs: StructuredOutputs | None = Field(default=None, description="Extension. The form of the text.")

    @field_validator("stream_options")
    @classmethod
    def _of_a_stream(cls, options: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("must be left out without stream: true")
        return options

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


def as_prompts(value: Any) -> list[str | list[int]]:
    """A completion's prompts: text, several texts, token ids, or several lists of these.

    Raises:
        ValueError: it is none of them. A long list is looked at once, and one complaint is made, not one for each entry.
    """
    match value:
        case str():
            return [value]
        case [] | None:
            raise ValueError("must have at least one token")
        case list() if _ids(value):
            return [value]
        case list() if len(value) > MAX_PROMPTS:
            raise ValueError(f"must be at most {MAX_PROMPTS} prompts")
        case list() if all(isinstance(one, str) or (isinstance(one, list) and _ids(one)) for one in value):
            return list(value)
    raise ValueError("must be a string, a list of token ids, or a list of these")


def _ids(values: Sequence[Any]) -> bool:
    return set(map(type, values)) <= {int}  # not bool
