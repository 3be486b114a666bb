"""What all services share of HTTP: the application with its storage, who is asking, what was sent, errors as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from shardkit import errors

from .operations import NameTaken, NotFound
from .storage import Storage, from_environment
from .tokens import TokenInvalid, Tokens

LONGEST = 2000
NAME = re.compile(r"[a-z0-9_]{1,30}")


def application(routes: Sequence[Route]) -> Starlette:
    """An application with these routes, on the storage that the environment names and with its `INSTAGRAM_SECRET`."""
    return Starlette(
        routes=list(routes),
        lifespan=_lifespan,
        exception_handlers={
            HTTPException: lambda _, error: failure(error.status_code, error.detail),
            NotFound: lambda _, error: failure(404, error),
            NameTaken: lambda _, error: failure(409, f"the name {error} is taken"),
            TokenInvalid: lambda _, error: failure(401, error),
            errors.RetryLater: lambda _, error: failure(503, error),  # a shard is away: only its keys are
        },
    )


@asynccontextmanager
async def _lifespan(_: Starlette) -> AsyncIterator[dict[str, Any]]:
    storage = from_environment()
    try:
        yield {"storage": storage, "tokens": Tokens(os.environ["INSTAGRAM_SECRET"])}
    finally:
        await storage.close()


def failure(status: int, why: object) -> Response:
    """An error as JSON."""
    return JSONResponse({"error": str(why)}, status)


def storage(request: Request) -> Storage:
    """The storage of the application."""
    found: Storage = request.state.storage
    return found


def tokens(request: Request) -> Tokens:
    """The tokens of the application."""
    found: Tokens = request.state.tokens
    return found


def asking(request: Request) -> UUID:
    """Who is logged in. Raises `TokenInvalid`."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        raise TokenInvalid("log in, and send 'Authorization: Bearer TOKEN'")
    return tokens(request).user(token)


async def sent(request: Request, *names: str) -> list[str]:
    """The texts of these names in the JSON object that was sent; anything else is answered with 400."""
    try:
        document = json.loads(await request.body())
        texts = [document[name] for name in names]
        whole = all(0 < len(text.encode()) <= LONGEST and "\0" not in text for text in texts)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise HTTPException(400, f"send a JSON object with texts: {', '.join(names)}") from error
    if not whole:
        raise HTTPException(400, f"texts have 1 to {LONGEST} bytes")
    return texts


def user_name(request: Request) -> str:
    """The name of a user that the path has."""
    found: str = request.path_params["name"]
    if not NAME.fullmatch(found):
        raise NotFound(f"there is no user {found}")
    return found


def post_id(request: Request) -> UUID:
    """The post that the path names."""
    found: UUID = request.path_params["post"]
    return found


def before(request: Request) -> UUID | None:
    """The ``before=ID`` of the query: the page after the one whose last post this is."""
    text = request.query_params.get("before")
    try:
        return None if text is None else UUID(text)
    except ValueError as error:
        raise HTTPException(400, "before is the id of a post") from error
