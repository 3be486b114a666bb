"""The monolith: all of it as one web application.

uvicorn examples.instagram.web:app
"""

from __future__ import annotations

from .services import comments, likes, posts, users
from .serving import application

app = application([*users.routes, *posts.routes, *comments.routes, *likes.routes])
