"""The OpenAI images API in types: what a request may hold, how errors look, pictures as bytes.

Beside the API's own fields a request may hold those that people know from diffusers: seed, num_inference_steps,
guidance_scale, negative_prompt. Fields that only concern other people's models are taken and have no effect.
"""

import base64
import io
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .together import LONGEST_PROMPT

Format = Literal["png", "jpeg", "webp"]
MOST_PARTIAL = 50  # previews of a picture


class ApiError(Exception):
    """An answer that is an error, in the API's own form."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        parameter: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = error_body(message, kind, parameter, code)


def error_body(message: str, kind: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


class GenerateRequest(BaseModel):
    """The body of POST /v1/images/generations; null stands for a field that was left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field("", max_length=LONGEST_PROMPT)
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Format = "png"
    output_compression: int = Field(95, ge=0, le=100)
    background: Literal["auto", "opaque"] = "auto"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=MOST_PARTIAL)
    seed: int | None = Field(None, ge=0, lt=2**64)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    deadline: float | None = Field(None, gt=0)  # seconds; the server's own is the most
    quality: str | None = None  # from here on: without effect
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    safety_identifier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


def validation_error(errors: list[dict[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request, by pydantic's account of it."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not where:
        return ApiError(400, "the body must be a JSON object, sent as application/json")
    parameter = ".".join(where)
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {parameter!r}", parameter=parameter, code="unknown_parameter")
    return ApiError(400, f"{parameter}: {first['msg']}", parameter=parameter, code="invalid_value")


def encoded(picture: np.ndarray, output_format: Format, quality: int = 95) -> bytes:
    """The file of a picture, uint8 (H, W, C) with C 1 or 3; `quality` is of JPEG and WebP, which is lossless at 100."""
    file = io.BytesIO()
    image = Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)
    settings = {"png": {}, "jpeg": {"quality": quality}, "webp": {"quality": quality, "lossless": quality == 100}}
    image.save(file, format=output_format.upper(), **settings[output_format])
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def preview_rows(count: int, steps: int) -> frozenset[int]:
    """`count` rows of a plan, evenly apart and never the last, after which a preview is shown."""
    return frozenset(row for k in range(count) if (row := (k + 1) * steps // (count + 1)) < steps - 1)
