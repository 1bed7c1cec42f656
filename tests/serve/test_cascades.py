"""Cascades over HTTP: asked for as text, refused with status 400, and seen under `/metrics`."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serve.servers import MODEL, drafting
from vllm_orthrus.demo.server import Server

pytestmark = pytest.mark.slow

RULE = {"rule": "chow", "alpha": 1.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {
        "orthrus_passes": "two",
        "orthrus_modes": [],
        "draft_sample_method": "probabilistic",
        "orthrus_cascade": {"rule": "token_v3", "alpha": 0.5},
    }
    with drafting(tmp_path_factory.mktemp("server"), settings) as up:
        yield up


def say(server: Server, **extra: Any) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    asked = client.completions.create(
        model=MODEL,
        prompt="Count down from 90 to 20 in steps of",
        max_tokens=40,
        temperature=0,
        extra_body={"vllm_xargs": extra} if extra else {},
    )
    return asked.choices[0].text


def test_a_server_that_is_lossy_says_so(server: Server) -> None:
    say(server)
    assert "LOSSY: Orthrus leaves tokens to drafts by token_v3 (alpha=0.5)" in server.log.read_text()


def test_requests_choose(server: Server) -> None:
    for chosen in ("off", json.dumps(RULE)):
        assert say(server, orthrus_cascade=chosen)
    counted = {one.labels["rule"]: one.value for one in server.metrics("vllm:orthrus_cascade_tokens")}
    assert counted["chow"] > 0
    assert say(server, orthrus_cascade="off") == say(server, orthrus_cascade='{"rule": "chow", "alpha": 0}')


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"orthrus_cascade": '{"rule": "tokenv3", "alpha": 0.1}'}, "It may be one of chow, diff, opt, token_v1"),
        ({"orthrus_cascade": '{"rule": "chow", "alpha": 7}'}, "It must be a number from 0 to 1"),
        ({"orthrus_cascade": "chow"}, "nor JSON such as"),
        ({"orthrus_alpha": 0.3}, "no extra argument is called orthrus_alpha"),
    ],
)
def test_what_is_wrong_is_a_400(extra: dict[str, Any], says: str, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        say(server, **extra)
    assert refused.value.status_code == 400 and says in str(refused.value)
