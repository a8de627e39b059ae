"""Which ONNX operators TensorRT's parser takes, and in which types.

Transcribed from the parser's own operator table, docs/operators.md of onnx/onnx-tensorrt:

- 11.1: the file at commit 7c51a63a719180eb5160c874c111746f3fb46a6b, which is the parser that the
  tag v11.1 of NVIDIA/TensorRT builds.
- 10.8: the file at tag release/10.1-GA (commit 96e781103cfc4adf4a6bb557e94bac8e693f6f4c) with
  what docs/Changelog.md adds up to 10.8 (windows in 10.4, STFT in 10.5, FP4 in 10.8). The file
  as of 10.8 was not at hand; every row of 10.15's stands here too, but for what the changelog
  dates later (Attention, RMSNormalization, RotaryEmbedding, TensorScatter, integer Pow).

Types are ONNX's in numpy's spelling. Restrictions that have no column there stand in
`tensorrt_parser`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Types = frozenset[str]

_FLOAT = "float32 float16 bfloat16"
_INT = "int32 int64"
_QUANTIZED = "float8 float4 int4"

# Types -> operators; the same in both versions.
_COMMON = {
    f"{_FLOAT} {_INT}": """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual
        Max Min Mod Mul Neg Pad Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
        ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements
        ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    _FLOAT: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv
        ConvTranspose Cos Cosh CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool
        GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish Hardmax ImageScaler
        InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM
        LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu
        QuantizeLinear RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal
        Resize RNN Round ScaledTanh Scan Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan
        Tanh ThresholdedRelu Upsample""",
    f"{_FLOAT} {_INT} bool": """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape
        ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    "bool": "And Not Or Xor",
    "float32 float16": """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero
        RoiAlign""",
    f"{_FLOAT} {_INT} uint8 bool": "Cast CastLike",
    f"{_FLOAT} int8 {_INT}": "Gelu",
    f"{_FLOAT} float8 {_INT}": "Mean",
    "float32": "STFT",
}
_ONLY_10_8 = {
    _FLOAT: "Pow",
    f"{_FLOAT} {_INT} bool": "Constant ConstantOfShape",
    f"{_QUANTIZED} int8": "DequantizeLinear",
}
_ONLY_11_1 = {
    f"{_FLOAT} {_INT}": "Pow",
    f"{_FLOAT} {_QUANTIZED} {_INT} bool": "Constant ConstantOfShape",
    f"{_QUANTIZED} int8": "DequantizeLinear",
    _FLOAT: "RMSNormalization RotaryEmbedding Swish",
    f"{_FLOAT} int8 float8": "Attention",
    f"{_FLOAT} int32": "TensorScatter",
}


@dataclass(frozen=True)
class ParserTable:
    """What one version of the parser takes: operator -> types of its data."""

    version: str
    opsets: range
    operators: Mapping[str, Types]


def _operators(*groups: Mapping[str, str]) -> dict[str, Types]:
    return {
        name: frozenset(types.split())
        for group in groups
        for types, names in group.items()
        for name in names.split()
    }


TABLES = (
    # 10.1's file says opset 20; ONNX 1.17, which 10.6 brought, has up to 22, untested by us.
    ParserTable("10.8", range(9, 21), _operators(_COMMON, _ONLY_10_8)),
    ParserTable("11.1", range(9, 25), _operators(_COMMON, _ONLY_11_1)),
)
"""Oldest first. A version between two of them is held to the older."""
