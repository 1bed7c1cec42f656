"""A server's clients need not know that it drafts: the `openai` package, streamed, in turns, in a form, with tools.

    vllm serve Qwen/Qwen3-8B --speculative-config '{"method":"orthrus"}' \\
        --enable-auto-tool-choice --tool-call-parser hermes
    python examples/chat.py --url http://localhost:8000/v1 stream turns form tools
"""

import argparse
import json
from typing import Any

import openai

QUESTION = "What is 17 + 25?"
FORM = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers",
        "parameters": {
            "type": "object",
            "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in ("a", "b")},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Chat:
    def __init__(self, url: str, parameters: dict[str, Any]) -> None:
        self.client = openai.OpenAI(base_url=url, api_key="none")
        self.asked: dict[str, Any] = {
            "model": self.client.models.list().data[0].id,
            "temperature": 0,
            "max_tokens": 128,
        } | parameters

    def stream(self) -> str:
        """Several tokens come at once where drafts are kept."""
        parts = self.client.chat.completions.create(messages=[said(QUESTION)], stream=True, **self.asked)
        answer = ""
        for part in parts:
            answer += part.choices[0].delta.content or ""
        return answer

    def turns(self) -> str:
        """What was said before is cached, and drafts read it there."""
        messages, answer = list[Any](), ""
        for question in (QUESTION, "And 40 + 41?", "Thank you."):
            messages.append(said(question))
            answer = (
                self.client.chat.completions.create(messages=messages, **self.asked).choices[0].message.content or ""
            )
            messages.append({"role": "assistant", "content": answer})
        return answer

    def form(self) -> str:
        """Drafts that the form forbids are not kept."""
        schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": FORM, "strict": True}}
        answer = self.client.chat.completions.create(messages=[said(QUESTION)], response_format=schema, **self.asked)
        return json.dumps(json.loads(answer.choices[0].message.content or ""))

    def tools(self) -> str:
        choice: Any = {"type": "function", "function": {"name": "add"}}
        answer = self.client.chat.completions.create(
            messages=[said(QUESTION)], tools=[TOOL], tool_choice=choice, **self.asked
        )
        call = (answer.choices[0].message.tool_calls or [])[0].function
        return f"{call.name}({call.arguments})"


def said(text: str) -> Any:
    return {"role": "user", "content": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = ["stream", "turns", "form", "tools"]
    parser.add_argument("ways", nargs="*", metavar="way", help=f"{', '.join(ways)} (default: all)")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--parameters", type=json.loads, default={}, metavar="JSON", help="of every request")
    args = parser.parse_args()
    if unknown := set(args.ways) - set(ways):
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(ways)}")
    chat = Chat(args.url, args.parameters)
    for way in args.ways or ways:
        print(f"{way}: {getattr(chat, way)()}")


if __name__ == "__main__":
    main()
