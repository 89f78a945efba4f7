"""Formats: one word in JSON, and no word that means nothing."""

from __future__ import annotations

import random
from fractions import Fraction
from math import prod

import pytest
from pydantic import ValidationError

from tokenspeed_plan.plans.types import DTYPE_BITS, FORMATS, DType, Format, TensorSpec

DTYPES: tuple[DType, ...] = tuple(DTYPE_BITS)


def random_format(rng: random.Random) -> Format:
    block = tuple(rng.randint(1, 200_000) for _ in range(rng.randint(0, 4)))
    scale = rng.choice(DTYPES) if block else None
    row_scale = rng.choice((None, *DTYPES)) if block else None
    return Format(dtype=rng.choice(DTYPES), block=block, scale=scale, row_scale=row_scale)


def test_every_format_goes_through_json() -> None:
    rng = random.Random(0)
    made = [*FORMATS.values(), *(random_format(rng) for _ in range(500))]
    for one in made:
        text = one.model_dump_json()
        assert text == f'"{one}"'
        assert Format.model_validate_json(text) == one
        spec = TensorSpec(shape=("num_tokens", 64), format=one)
        assert TensorSpec.model_validate_json(spec.model_dump_json()) == spec
    assert len(set(map(str, made))) == len(set(made))  # different formats have different words


def test_bytes_count_scales() -> None:
    rng = random.Random(1)
    for one in (random_format(rng) for _ in range(200)):
        bits = Fraction(DTYPE_BITS[one.dtype])
        if one.scale is not None:
            bits += Fraction(DTYPE_BITS[one.scale], prod(one.block))
        assert one.bytes_per_element == pytest.approx(float(bits / 8), rel=1e-12)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("bf61", "unknown dtype `bf61`; known are fp64, fp32, bf16, fp8, fp4, i64, i32"),
        ("fp8[128x128]:f32", "unknown dtype `f32`"),
        ("fp8[128x128]", "is no format such as"),
        ("fp8:fp32", "is no format such as"),
        ("fp8[128x128]:fp32:f32", "unknown dtype `f32`"),
        ("fp8:fp32:fp32", "is no format such as"),
        ("fp8[0x128]:fp32", "greater than or equal to 1"),
        ("fp8[]:fp32", "is no format such as"),
        ("fp8[128x128]:fp32 ", "is no format such as"),
        ("", "is no format such as"),
    ],
)
def test_other_words_are_refused(word: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says.replace("[", r"\[")):
        Format.model_validate(word)


def test_a_block_and_its_scale_come_together() -> None:
    with pytest.raises(ValidationError, match="come together"):
        Format(dtype="fp8", block=(16,))
    with pytest.raises(ValidationError, match="come together"):
        Format(dtype="fp8", scale="fp32")
    with pytest.raises(ValidationError, match="factors of rows come with blocks"):
        Format(dtype="fp8", row_scale="fp32")


def test_bytes_of_nvfp4() -> None:
    """A published expert: [N, K / 2] bytes, [N, K / 16] scales; its factor is one of each row."""
    spec = TensorSpec(shape=(8, 512, 2048), format=FORMATS["nvfp4"])
    assert spec.size_bytes() == 8 * 512 * (1024 + 128 + 4)
