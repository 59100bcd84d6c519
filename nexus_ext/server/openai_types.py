"""Bodies of OpenAI's API, checked at the edge.

Keys that llama.cpp's server has besides (top_k, min_p, grammar and the like) are taken under its
names.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from nexus_ext.server.http import Body, Reply, Whole

MAX_CHOICES = 16
Number = Annotated[float, Field(allow_inf_nan=False)]
StopTexts = Annotated[list[str], Field(max_length=64)]


class SamplingBody(Body):
    """How tokens are picked; what is left out is the model's, then llama.cpp's default."""

    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, ge=0, le=1)
    presence_penalty: Number | None = Field(None, ge=-2, le=2)
    frequency_penalty: Number | None = Field(None, ge=-2, le=2)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    logit_bias: dict[str, Number] | None = None
    stop: str | StopTexts | None = None
    top_k: Whole | None = Field(None, ge=0, lt=2**31)
    min_p: Number | None = Field(None, ge=0, le=1)
    typical_p: Number | None = Field(None, ge=0, le=1)
    repeat_penalty: Number | None = Field(None, ge=0, le=100)
    repeat_last_n: Whole | None = Field(None, ge=0, lt=2**31)
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Number | None = Field(None, ge=0, le=1000)
    mirostat_eta: Number | None = Field(None, ge=0, le=1000)
    grammar: str | None = Field(None, description="GBNF that the answer has to follow")
    user: str | None = None
    prompt_cache_key: str | None = Field(None, description="names the conversation")


class StreamOptions(Body):
    include_usage: bool = False


class AnswerBody(SamplingBody):
    """What is asked of which model, how often and in which form."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = Field(None, ge=1, le=MAX_CHOICES)


class FunctionCall(Body):
    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Part(Body):
    type: str
    text: str | None = None


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None


class Function(Body):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatBody(AnswerBody):
    messages: list[Message] = Field(min_length=1)
    max_tokens: Whole | None = Field(None, ge=-1, description="-1: no limit")
    max_completion_tokens: Whole | None = Field(None, ge=-1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = Field(None, description="refused: use tools")
    modalities: list[str] | None = Field(None, description="text and nothing else")
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionBody(AnswerBody):
    prompt: str | list[str] | list[int] | list[list[int]] = Field(
        description="a text, the tokens of one, or a list of either"
    )
    best_of: Whole | None = Field(None, ge=1, le=MAX_CHOICES)
    max_tokens: Whole | None = Field(None, ge=-1, description="-1: no limit; 16 if it is left out")
    logprobs: Whole | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    suffix: str | None = None


class EmbeddingBody(Body):
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Whole | None = Field(None, ge=1)
    user: str | None = None


class ResponsesBody(Body):
    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Whole | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=100)
    top_p: Number | None = Field(None, ge=0, le=1)
    tools: list[dict[str, Any]] | None = Field(None, max_length=256)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None


# What is answered; streamed parts are described by OpenAI.


class PromptDetails(Reply):
    cached_tokens: int


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class ModelReply(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsReply(Reply):
    object: Literal["list"]
    data: list[ModelReply]


class FunctionReply(Reply):
    name: str
    arguments: str


class ToolCallReply(Reply):
    id: str
    type: Literal["function"]
    function: FunctionReply


class MessageReply(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallReply] | None = None


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobReply(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprobReply]
    refusal: None


class ChatChoice(Reply):
    index: int
    message: MessageReply
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatReply(Reply):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionReply(Reply):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class EmbeddingReply(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsReply(Reply):
    object: Literal["list"]
    model: str
    data: list[EmbeddingReply]
    usage: EmbeddingUsage


class ResponsesReply(Body):
    """A response of the Responses API; OpenAI's documentation describes all of its keys."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]
