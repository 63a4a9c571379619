"""What is asked of servers before they are used: which model they serve; and the key that they want to see.

``where`` is what the settings are called, for messages that say what to type: the dotted name in a recipe, e.g.
``teachers.math.server``, or the beginning of options, ``--server``.
"""

from __future__ import annotations

import os
from typing import Any

from uniopd_mm.config import ServerConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.servers.errors import ServerError
from uniopd_mm.servers.pool import ServerPool


def setting(where: str, name: str, value: object = None) -> str:
    """A setting as it is typed: ``teachers.math.server.kind=vllm``, or ``--server-kind vllm``."""
    text = "" if value is None else str(value)
    if where.startswith("--"):
        return f"{where}-{name.replace('_', '-')} {text}".rstrip()
    return f"{where}.{name}" + (f"={text}" if text else "")


def make_pool(where: str, server: ServerConfig, urls: list[str] | None = None) -> ServerPool:
    """A pool of ``urls`` (default: all of the settings); ConfigError where the API key is missing."""
    return ServerPool(
        urls or server.urls,
        concurrency=server.concurrency,
        timeout_s=server.timeout_s,
        retries=server.retries,
        headers=auth_headers(where, server),
    )


def auth_headers(where: str, server: ServerConfig) -> dict[str, str]:
    """The header with the API key, if one is to be sent; ConfigError if its variable is not set."""
    if server.api_key_env is None:
        return {}
    key = os.environ.get(server.api_key_env)
    if not key:
        raise ConfigError(
            f"{setting(where, 'api_key_env')} names the environment variable {server.api_key_env}, which is not set. "
            f"Type export {server.api_key_env}=KEY, or leave that setting out."
        )
    return {"Authorization": f"Bearer {key}"}


def find_model(where: str, server: ServerConfig, pool: ServerPool, path: str | None = None) -> str:
    """The name under which every URL serves the model; ConfigError where one does not answer or they differ.

    ``path`` to ask at; None = where the kind of server says most.
    """
    path = path or ("/model_info" if server.kind == "sglang" else "/v1/models")
    served = {url: _served_models(where, url, path, reply) for url, reply in pool.get(path)}
    return _choose_model(where, served, server.model)


def find_context(pool: ServerPool) -> int | None:
    """Tokens that a prompt and its answer may have together at every URL; None where no server says it."""
    listed = [reply.get("data") for _, reply in pool.get("/v1/models") if isinstance(reply, dict)]
    models = [model for some in listed if isinstance(some, list) for model in some if isinstance(model, dict)]
    lengths = [model.get("max_model_len") for model in models]
    return min((length for length in lengths if type(length) is int and length > 0), default=None)


def _served_models(where: str, url: str, path: str, reply: dict[str, Any] | ServerError) -> list[str]:
    """Names under which a server knows its models; :class:`ConfigError` if it does not say."""
    if isinstance(reply, ServerError):
        raise ConfigError(f"{where}: {reply}") from reply
    listed = reply.get("data")
    names = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    names += [reply.get("model_path"), reply.get("served_model_name")]
    known = [n for n in dict.fromkeys(names) if isinstance(n, str) and n]
    if not known:
        raise ConfigError(
            f"{where}: {url}{path} does not say which model it serves (found {str(reply)[:200]}). "
            f"Check {setting(where, 'kind')} and the URL."
        )
    return known


def _choose_model(where: str, served: dict[str, list[str]], wanted: str | None) -> str:
    """The served name to ask for: ``wanted``, or the only one there is at every URL."""
    if wanted is not None:
        for url, names in served.items():
            if wanted not in names:
                raise ConfigError(
                    f"{where}: {url} serves {', '.join(names)}, not '{wanted}'. Type {setting(where, 'model', names[0])}, or start "
                    f"the server with --served-model-name {wanted}"
                )
        return wanted
    different = {names[0] for names in served.values()}
    if len(different) > 1 or any(len(names) > 1 for names in served.values()):
        listed = "; ".join(f"{url}: {', '.join(names)}" for url, names in served.items())
        first = next(iter(served.values()))[0]
        raise ConfigError(
            f"{where}: the URLs serve several models ({listed}). Type {setting(where, 'model', first)}, for example"
        )
    return different.pop()
