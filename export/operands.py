"""The inputs of a quantized operator: the DequantizeLinear each comes from, and what that one reads."""

from dataclasses import dataclass

import onnx_ir as ir

MOVES = frozenset({"Reshape", "Transpose"})  # what may stand between DequantizeLinear and an operator


@dataclass(frozen=True)
class Operand:
    """An input of an operator that a DequantizeLinear writes."""

    operator: ir.Node
    index: int
    dequantize: ir.Node

    @property
    def where(self) -> str:
        return f"{self.operator.name}, input {self.index}"

    @property
    def codes(self) -> ir.Value:
        value = self.dequantize.inputs[0]
        assert value is not None
        return value

    @property
    def quantize(self) -> ir.Node | None:
        """What makes the codes, unless they are stored."""
        producer = self.codes.producer()
        return producer if producer is not None and producer.op_type == "QuantizeLinear" else None

    @property
    def is_weight(self) -> bool:
        return self.codes.const_value is not None or self.requantized is not None or self.widened

    @property
    def widened(self) -> bool:
        """Are its codes a constant of another type?"""
        cast = self.codes.producer()
        source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        return source is not None and source.const_value is not None

    @property
    def requantized(self) -> ir.Node | None:
        """The int4 DequantizeLinear behind a requantization, if there is one."""
        source = self.quantize.inputs[0] if self.quantize is not None else None
        outer = source.producer() if source is not None else None
        if outer is None or outer.op_type != "DequantizeLinear":
            return None
        stored = outer.inputs[0]
        return outer if stored is not None and stored.const_value is not None else None

    @property
    def output_axis(self) -> int:
        """The axis of the operator's weight along which output channels lie."""
        return output_axis(self.operator)


def output_axis(operator: ir.Node) -> int:
    """The axis of an operator's weight along which output channels lie."""
    if operator.op_type == "MatMul":
        return 1
    if operator.op_type == "Gemm":
        return 0 if operator.attributes.get_int("transB", 0) else 1
    return 0


def operand(node: ir.Node, index: int) -> Operand | None:
    """An operator's input; None if it does not come from a DequantizeLinear."""
    producer = came_from(node, index)
    return Operand(node, index, producer) if producer is not None and producer.op_type == "DequantizeLinear" else None


def came_from(node: ir.Node, index: int) -> ir.Node | None:
    """What made an operator's input, before it was moved; None of a constant or the graph's input."""
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type in MOVES:
        value = producer.inputs[0]
        producer = value.producer() if value is not None else None
    return producer
