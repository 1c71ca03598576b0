"""The client of an OpenAI-compatible endpoint: asks, tries again, and never shows the key. Imports httpx."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

from meristem.errors import BadInput, EnvironmentFailure
from meristem.evaluation.tasks.judge import JudgeSettings

try:
    import httpx
except ImportError as error:
    raise BadInput("the metric judge needs httpx; pip install 'meristem[judge]'") from error

AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
NO_SUCH_MODEL = frozenset({400, 404, 422})
LONGEST_PAUSE = 60.0  # seconds
FIRST_PAUSE = 0.5
SHOWN = 200


class Reply(NamedTuple):
    """``text`` is ``None`` where the model said nothing; ``model`` and ``fingerprint`` are the endpoint's words."""

    text: str | None
    model: str | None
    fingerprint: str | None


class JudgeClient:
    """A connection to the judge, for the length of a ``with`` block."""

    def __init__(self, settings: JudgeSettings):
        self.settings = settings
        self._key = _key(settings)
        self._tries = settings.retries + 1
        self._over = threading.Event()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = httpx.Client(headers=headers, timeout=settings.timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def check(self) -> None:
        """Before anything is computed: the endpoint is there, lets us in and knows the model.

        A model that ``GET /models`` does not list is asked for one token, as some servers load what they are asked
        for. Raises ``EnvironmentFailure`` when nobody answers, ``BadInput`` when the model is not known.
        """
        self._tries = min(self._tries, 2)  # somebody waits for the first word
        listed = self._models()
        if self.settings.model not in listed:
            answer = self._send("POST", "/chat/completions", {**self._body("Say yes."), **self._one_token()})
            if answer.status_code in NO_SUCH_MODEL:
                known = f"; it has {', '.join(listed[:5])}" if listed else ""
                raise BadInput(
                    f"{self._who} refuses a first question: {self._said(answer)}{known}; mend model or options"
                )
            self._refuse(answer)

    def ask(self, prompts: Sequence[str]) -> list[Reply]:
        """The replies, in order; ``concurrency`` of them are asked for at a time."""
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            return list(pool.map(self._ask, prompts))
        except BaseException:
            self._over.set()  # the other requests need not be tried again
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _ask(self, prompt: str) -> Reply:
        reply = self._send("POST", "/chat/completions", self._body(prompt), whole=True)
        self._refuse(reply)
        found = _reply(reply)
        assert found is not None  # else _send had tried again and given up
        return found

    def _models(self) -> list[str]:
        """The models that the endpoint lists; none where it has no such list."""
        answer = self._send("GET", "/models", again=frozenset())
        if answer.status_code in (401, 403):
            self._refuse(answer)
        try:
            return [str(model["id"]) for model in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    def _body(self, prompt: str) -> dict[str, Any]:
        settings = self.settings
        given = {key: getattr(settings, key) for key in ("temperature", "max_tokens", "seed")}
        return {
            "model": settings.model,
            "messages": [{"role": "user", "content": prompt}],
            **{key: value for key, value in given.items() if value is not None},
            **settings.options,
        }

    def _one_token(self) -> dict[str, int]:
        return {"max_tokens": 1} if self.settings.max_tokens is not None else {}

    def _send(
        self,
        method: str,
        path: str,
        body: Any = None,
        again: frozenset[int] = AGAIN,
        whole: bool = False,
    ) -> httpx.Response:
        """One request, repeated while it fails for reasons that pass; ``whole``: an answer must be a completion."""
        why, pause = "", FIRST_PAUSE
        for attempt in range(self._tries):
            if attempt:
                if self._over.wait(pause):
                    break
                pause = min(2 * pause, LONGEST_PAUSE)
            try:
                answer = self._http.request(method, f"{self.settings.url}{path}", json=body)
            except httpx.InvalidURL as error:
                raise BadInput(f"{self._who}: {error}; mend its url") from error
            except httpx.RequestError as error:
                why = self._hidden(str(error) or type(error).__name__)
                continue
            if answer.status_code in again:
                why, pause = self._said(answer), _asked_pause(answer, pause)
            elif whole and answer.is_success and _reply(answer) is None:
                why = f"its reply is no chat completion: {self._said(answer)}"
            else:
                return answer
        raise EnvironmentFailure(
            f"{self._who} cannot be reached ({why}; tried {self._tries} times); start it or mend its url, then run "
            "the same command again: finished judgements are kept"
        )

    def _refuse(self, answer: httpx.Response) -> None:
        if answer.status_code in (401, 403):
            named = self.settings.api_key_env
            remedy = f"set the key in ${named}" if named else "name the variable with the key in api_key_env"
            raise EnvironmentFailure(f"{self._who} does not let us in ({self._said(answer)}); {remedy}")
        if not answer.is_success:
            raise EnvironmentFailure(
                f"{self._who} refuses the question: {self._said(answer)}; mend the settings"
            )

    @property
    def _who(self) -> str:
        return f"judge {self.settings.model} at {self.settings.url}"

    def _said(self, answer: httpx.Response) -> str:
        text = " ".join(self._hidden(answer.text).split())
        return f"{answer.status_code} {text[:SHOWN]}".strip()

    def _hidden(self, text: str) -> str:
        """Servers repeat what they were sent: the key must not reach an error or a log."""
        return text.replace(self._key, "***") if self._key else text


def _key(settings: JudgeSettings) -> str | None:
    if settings.api_key_env is None:
        return None
    key = os.environ.get(settings.api_key_env, "").strip()
    if not key:
        raise BadInput(f"judge {settings.model}: the variable {settings.api_key_env} holds no key; set it")
    if not key.isascii() or not key.isprintable():
        raise BadInput(
            f"judge {settings.model}: the key in {settings.api_key_env} has unprintable characters"
        )
    return key


def _asked_pause(answer: httpx.Response, pause: float) -> float:
    """Seconds of the Retry-After header, within bounds, or ``pause``."""
    try:
        return min(max(float(answer.headers["retry-after"]), 0.0), LONGEST_PAUSE)
    except (KeyError, ValueError):
        return pause


def _reply(answer: httpx.Response) -> Reply | None:
    """``None`` when the body is no chat completion."""
    try:
        body = answer.json()
        text = body["choices"][0]["message"].get("content")
        model, mark = body.get("model"), body.get("system_fingerprint")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    return Reply(text, None if model is None else str(model), None if mark is None else str(mark))
