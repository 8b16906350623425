"""Triton's `triton_python_backend_utils`, which its server alone has: what our model uses of it, and requests."""

from typing import ClassVar

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class Logger:
    errors: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, message):
        cls.errors.append(message)


class TritonError:
    INVALID_ARG, INTERNAL, CANCELLED = "invalid", "internal", "cancelled"

    def __init__(self, message, code):
        self.message, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors=(), error=None):
        self.outputs, self.error = {tensor.name: tensor.array for tensor in output_tensors}, error


class Request:
    """Inputs by name, a list of one value for every picture; it keeps the responses of a decoupled model."""

    def __init__(self, cancelled=False, **inputs):
        types = {"seed": np.uint64, "class": np.int64, "guidance": np.float32, "steps": np.int32}
        self.inputs = {
            name: Tensor(name, np.array(values, types.get(name, object)).reshape(-1, 1))
            for name, values in inputs.items()
        }
        self.cancelled, self.sent, self.ended = cancelled, [], False

    def is_cancelled(self):
        return self.cancelled

    def get_response_sender(self):
        return self

    def send(self, response=None, flags=0):
        assert not self.ended, "nothing may follow the last response"
        if response is not None:
            self.sent.append(response)
        self.ended = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL


def get_input_tensor_by_name(request, name):
    return request.inputs.get(name)
