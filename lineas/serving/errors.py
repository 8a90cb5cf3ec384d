"""What the server answers where it cannot do what it was asked: error objects as OpenAI's API has them."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException

logger = logging.getLogger("lineas.serving")


class ApiError(HTTPException):
    """An error for the client: an HTTP status, a message, and the field of the request that it is about, if any."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        # What it quotes may have halves of surrogate pairs, which UTF-8 cannot hold.
        message, param = (one and one.encode(errors="replace").decode() for one in (self.message, self.param))
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error object with its status."""
        return JSONResponse(self.body(), self.status)


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """The error for a field with a value that it must not have."""
    return ApiError(400, message, param=param, code=code)


def shown(value: Any) -> str:
    """A value of a request for a message, shortened."""
    return reprlib.repr(value)


def name_field(location: Sequence[str | int]) -> str:
    """The path of a field, such as ``messages[0].role``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in location]
    return "".join(parts).lstrip(".")


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first thing that pydantic found."""
    first = error.errors()[0]
    what, where = str(first["type"]), [part for part in first["loc"] if part != "body"]
    if what == "json_invalid":
        return ApiError(400, f"the body of the request is no JSON: {first['ctx']['error']}")
    if not where:
        return ApiError(400, "the body of the request must be a JSON object, sent with Content-Type: application/json")
    param = name_field(where)
    if what == "missing":
        return refuse(param, f"{param} is missing", "missing_required_parameter")
    message = str(first["msg"])
    return refuse(param, f"{param}: {message[0].lower()}{message[1:]}, got {shown(first['input'])}")


def answer_errors(app: FastAPI) -> None:
    """Let every error of `app` be answered by an error object."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _of_validation(error).response()

    @app.exception_handler(AnyHTTPException)
    async def _http_error(request: Request, error: AnyHTTPException) -> JSONResponse:
        found = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        response = found.response()
        response.headers.update(error.headers or {})  # such as the methods that are allowed
        return response

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> JSONResponse:
        return failure(error).response()


def failure(error: BaseException) -> ApiError:
    """What the client is told of an error that it did not make; the whole of it is logged, or raised by who calls."""
    return ApiError(500, f"the server failed ({type(error).__name__}); its log says more")
